package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
)

// Wire constants, named as in the specification without their NBD_ prefix.
const (
	magicInit     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption   = 0x49484156454F5054 // "IHAVEOPT"
	magicOptReply = 0x0003e889045565a9
	magicRequest  = 0x25609513
	magicReply    = 0x67446698

	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1

	optExportName = 1
	optAbort      = 2
	optList       = 3
	optInfo       = 6
	optGo         = 7

	repAck        = 1
	repServer     = 2
	repInfo       = 3
	repErrUnsup   = 1<<31 + 1
	repErrInvalid = 1<<31 + 3
	repErrUnknown = 1<<31 + 6
	repErrTooBig  = 1<<31 + 9

	infoExport    = 0
	infoName      = 1
	infoBlockSize = 3

	transHasFlags        = 1 << 0
	transReadOnly        = 1 << 1
	transSendFlush       = 1 << 2
	transSendFUA         = 1 << 3
	transSendTrim        = 1 << 5
	transSendWriteZeroes = 1 << 6
	transCanMultiConn    = 1 << 8

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6

	cmdFlagFUA    = 1 << 0
	cmdFlagNoHole = 1 << 1

	errPerm     = 1
	errIO       = 5
	errNoMem    = 12
	errInval    = 22
	errNoSpace  = 28
	errOverflow = 75
)

const (
	requestLen      = 28
	optionHeaderLen = 16
	replyLen        = 16
	// maxOption bounds one option's data: a name is at most 4096 bytes.
	maxOption = 8 << 10
	// maxOptions bounds the haggling before transmission.
	maxOptions = 64
	// preferredBlock is the unit of the overlay's map.
	preferredBlock = 4096
)

// request is the decoded header of one command.
type request struct {
	flags  uint16
	cmd    uint16
	cookie uint64
	offset uint64
	length uint32
}

// errDrop marks what leaves the stream out of step: the connection must end.
var errDrop = errors.New("protocol violation")

// decodeRequest decodes a request's header. The only error is a wrong magic
// or a payload too large to take: after these the stream cannot be followed.
func decodeRequest(b *[requestLen]byte) (request, error) {
	if m := binary.BigEndian.Uint32(b[0:]); m != magicRequest {
		return request{}, fmt.Errorf("%w: request magic %#x", errDrop, m)
	}
	r := request{
		flags:  binary.BigEndian.Uint16(b[4:]),
		cmd:    binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		offset: binary.BigEndian.Uint64(b[16:]),
		length: binary.BigEndian.Uint32(b[24:]),
	}
	if r.cmd == cmdWrite && r.length > MaxRequest {
		return r, fmt.Errorf("%w: write of %d bytes, limit %d", errDrop, r.length, MaxRequest)
	}
	return r, nil
}

// check judges a decoded request against the device and gives the error
// number to answer with, 0 when it may go on.
func (r request) check(size int64, readOnly bool) uint32 {
	allowed := uint16(0)
	switch r.cmd {
	case cmdRead:
		if r.length > MaxRequest {
			return errOverflow
		}
		allowed = cmdFlagFUA // meaningless but harmless, says the specification
	case cmdWrite, cmdTrim:
		allowed = cmdFlagFUA
	case cmdWriteZeroes:
		allowed = cmdFlagFUA | cmdFlagNoHole
	case cmdFlush:
		allowed = cmdFlagFUA
		if r.offset != 0 || r.length != 0 {
			return errInval
		}
	default:
		return errInval
	}
	if r.flags&^allowed != 0 {
		return errInval
	}
	writes := r.cmd == cmdWrite || r.cmd == cmdTrim || r.cmd == cmdWriteZeroes
	if writes && readOnly {
		return errPerm
	}
	// No sum that could wrap: offset is the client's 64 bits.
	if r.offset > uint64(size) || uint64(r.length) > uint64(size)-r.offset {
		if writes {
			return errNoSpace
		}
		return errInval
	}
	return 0
}

func encodeReply(b *[replyLen]byte, errno uint32, cookie uint64) {
	binary.BigEndian.PutUint32(b[0:], magicReply)
	binary.BigEndian.PutUint32(b[4:], errno)
	binary.BigEndian.PutUint64(b[8:], cookie)
}

// errno maps a device's error to the few numbers the protocol knows.
func errno(err error) uint32 {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return errNoSpace
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EROFS):
		return errPerm
	case errors.Is(err, syscall.ENOMEM):
		return errNoMem
	default:
		return errIO
	}
}

// infoRequest is the data of the options GO and INFO.
type infoRequest struct {
	name      string
	wantsName bool
}

func decodeInfo(b []byte) (infoRequest, error) {
	if len(b) < 6 {
		return infoRequest{}, fmt.Errorf("option data of %d bytes, at least 6 needed", len(b))
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-6) {
		return infoRequest{}, fmt.Errorf("name of %d bytes in option data of %d", n, len(b))
	}
	req := infoRequest{name: string(b[4 : 4+n])}
	b = b[4+n:]
	count := int(binary.BigEndian.Uint16(b))
	b = b[2:]
	if len(b) != 2*count {
		return infoRequest{}, fmt.Errorf("%d information requests in %d bytes", count, len(b))
	}
	for ; len(b) > 0; b = b[2:] {
		if binary.BigEndian.Uint16(b) == infoName {
			req.wantsName = true
		}
	}
	return req, nil
}
