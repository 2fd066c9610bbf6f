package nbd

import (
	"encoding/binary"
	"fmt"
	"io"
)

// negotiator speaks the phase before transmission.
type negotiator struct {
	r        io.Reader
	w        io.Writer
	name     string
	size     int64
	flags    uint16
	noZeroes bool
}

// run returns true when the client entered transmission, false when it said
// good-bye.
func (n *negotiator) run() (bool, error) {
	hello := make([]byte, 0, 18)
	hello = binary.BigEndian.AppendUint64(hello, magicInit)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	if _, err := n.w.Write(hello); err != nil {
		return false, fmt.Errorf("greet: %w", err)
	}
	var b [4]byte
	if _, err := io.ReadFull(n.r, b[:]); err != nil {
		return false, fmt.Errorf("read client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^uint32(flagFixedNewstyle|flagNoZeroes) != 0 {
		return false, fmt.Errorf("%w: unknown client flags %#x", errDrop, flags)
	}
	n.noZeroes = flags&flagNoZeroes != 0
	for range maxOptions {
		opt, data, err := n.readOption()
		if err != nil {
			return false, err
		}
		start, end, err := n.answer(opt, data)
		if err != nil || start || end {
			return start, err
		}
	}
	return false, fmt.Errorf("%w: more than %d options", errDrop, maxOptions)
}

func (n *negotiator) readOption() (opt uint32, data []byte, err error) {
	var h [optionHeaderLen]byte
	if _, err := io.ReadFull(n.r, h[:]); err != nil {
		return 0, nil, fmt.Errorf("read option: %w", err)
	}
	if m := binary.BigEndian.Uint64(h[:]); m != magicOption {
		return 0, nil, fmt.Errorf("%w: option magic %#x", errDrop, m)
	}
	opt = binary.BigEndian.Uint32(h[8:])
	length := binary.BigEndian.Uint32(h[12:])
	if length > maxOption {
		// Told and dropped: skipping megabytes for a client that has no
		// business sending them is worth nothing.
		_ = n.reply(opt, repErrTooBig, nil)
		return 0, nil, fmt.Errorf("%w: option %d with %d bytes, limit %d", errDrop, opt, length, maxOption)
	}
	data = make([]byte, length)
	if _, err := io.ReadFull(n.r, data); err != nil {
		return 0, nil, fmt.Errorf("read option %d: %w", opt, err)
	}
	return opt, data, nil
}

func (n *negotiator) answer(opt uint32, data []byte) (start, end bool, err error) {
	switch opt {
	case optExportName:
		if string(data) != n.name {
			// This option has no way to say no.
			return false, false, fmt.Errorf("%w: unknown export %.64q", errDrop, data)
		}
		_, err = n.w.Write(n.exportReply())
		return err == nil, false, err
	case optAbort:
		_ = n.reply(opt, repAck, nil) // the client may be gone already
		return false, true, nil
	case optList:
		if len(data) != 0 {
			return false, false, n.reply(opt, repErrInvalid, []byte("LIST carries no data"))
		}
		entry := binary.BigEndian.AppendUint32(nil, uint32(len(n.name)))
		if err := n.reply(opt, repServer, append(entry, n.name...)); err != nil {
			return false, false, err
		}
		return false, false, n.reply(opt, repAck, nil)
	case optInfo, optGo:
		return n.answerInfo(opt, data)
	default:
		return false, false, n.reply(opt, repErrUnsup, nil)
	}
}

func (n *negotiator) answerInfo(opt uint32, data []byte) (start, end bool, err error) {
	req, err := decodeInfo(data)
	if err != nil {
		return false, false, n.reply(opt, repErrInvalid, []byte(err.Error()))
	}
	if req.name != n.name {
		return false, false, n.reply(opt, repErrUnknown, []byte("unknown export"))
	}
	export := binary.BigEndian.AppendUint16(nil, infoExport)
	export = binary.BigEndian.AppendUint64(export, uint64(n.size))
	export = binary.BigEndian.AppendUint16(export, n.flags)
	block := binary.BigEndian.AppendUint16(nil, infoBlockSize)
	block = binary.BigEndian.AppendUint32(block, 1)
	block = binary.BigEndian.AppendUint32(block, preferredBlock)
	block = binary.BigEndian.AppendUint32(block, MaxRequest)
	infos := [][]byte{export, block}
	if req.wantsName {
		name := binary.BigEndian.AppendUint16(nil, infoName)
		infos = append(infos, append(name, n.name...))
	}
	for _, info := range infos {
		if err := n.reply(opt, repInfo, info); err != nil {
			return false, false, err
		}
	}
	if err := n.reply(opt, repAck, nil); err != nil {
		return false, false, err
	}
	return opt == optGo, false, nil
}

func (n *negotiator) exportReply() []byte {
	b := binary.BigEndian.AppendUint64(nil, uint64(n.size))
	b = binary.BigEndian.AppendUint16(b, n.flags)
	if !n.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	return b
}

func (n *negotiator) reply(opt, kind uint32, data []byte) error {
	b := make([]byte, 0, 20+len(data))
	b = binary.BigEndian.AppendUint64(b, magicOptReply)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if _, err := n.w.Write(append(b, data...)); err != nil {
		return fmt.Errorf("reply to option %d: %w", opt, err)
	}
	return nil
}
