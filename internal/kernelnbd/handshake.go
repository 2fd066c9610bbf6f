package kernelnbd

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Wire constants of the NBD handshake, named as in its specification.
const (
	magicInit      = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption    = 0x49484156454F5054 // "IHAVEOPT"
	flagsNewstyle  = 1<<0 | 1<<1        // fixed newstyle, no zeroes
	optExportName  = 1
	transHasFlags  = 1 << 0
	maxExportBytes = 1 << 50
)

// export is what the server offers under the name "".
type export struct {
	size  uint64
	flags uint16
}

// negotiate speaks the phase that the kernel leaves to us.
func negotiate(c io.ReadWriter) (e export, err error) {
	var hello [18]byte
	if _, err := io.ReadFull(c, hello[:]); err != nil {
		return e, fmt.Errorf("read the server's greeting: %w", err)
	}
	if binary.BigEndian.Uint64(hello[:]) != magicInit || binary.BigEndian.Uint64(hello[8:]) != magicOption {
		return e, fmt.Errorf("the greeting % x is not that of an NBD server", hello[:16])
	}
	if f := binary.BigEndian.Uint16(hello[16:]); f&flagsNewstyle != flagsNewstyle {
		return e, fmt.Errorf("the server's flags %#x lack the fixed newstyle", f)
	}
	req := binary.BigEndian.AppendUint32(nil, flagsNewstyle)
	req = binary.BigEndian.AppendUint64(req, magicOption)
	req = binary.BigEndian.AppendUint32(req, optExportName)
	req = binary.BigEndian.AppendUint32(req, 0)
	if _, err := c.Write(req); err != nil {
		return e, fmt.Errorf("ask for the export: %w", err)
	}
	var answer [10]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return e, fmt.Errorf("read the export's size: %w", err)
	}
	e.size, e.flags = binary.BigEndian.Uint64(answer[:]), binary.BigEndian.Uint16(answer[8:])
	if e.flags&transHasFlags == 0 || e.size == 0 || e.size > maxExportBytes || e.size%blockSize != 0 {
		return e, fmt.Errorf("the server offers %d bytes with flags %#x", e.size, e.flags)
	}
	return e, nil
}
