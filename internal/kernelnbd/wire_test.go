package kernelnbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// greeting is what a server says: its greeting, and the export's size and flags.
func greeting(size uint64, handshake, flags uint16) []byte {
	b := binary.BigEndian.AppendUint64(nil, magicInit)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint16(b, handshake)
	b = binary.BigEndian.AppendUint64(b, size)
	return binary.BigEndian.AppendUint16(b, flags)
}

// peer says what it was given and takes what it is told.
type peer struct {
	io.Reader
	told bytes.Buffer
}

func (p *peer) Write(b []byte) (int, error) { return p.told.Write(b) }

func TestNegotiationTakesOnlyWhatItCanUse(t *testing.T) {
	good := greeting(1<<20, flagsNewstyle, transHasFlags|1<<2)
	p := &peer{Reader: bytes.NewReader(good)}
	e, err := negotiate(p)
	if err != nil || e.size != 1<<20 || e.flags != transHasFlags|1<<2 {
		t.Errorf("a good server: %+v, %v", e, err)
	}
	if p.told.Len() != 4+8+4+4 {
		t.Errorf("it was told % x", p.told.Bytes())
	}
	for name, c := range map[string]struct {
		says []byte
		want string
	}{
		"another protocol":  {[]byte("HTTP/1.1 400 Bad Request\r\n"), "not that of an NBD server"},
		"the old handshake": {greeting(1<<20, 0, transHasFlags), "fixed newstyle"},
		"no flags":          {greeting(1<<20, flagsNewstyle, 0), "flags 0x0"},
		"no bytes":          {greeting(0, flagsNewstyle, transHasFlags), "offers 0 bytes"},
		"half a block":      {greeting(4097, flagsNewstyle, transHasFlags), "offers 4097 bytes"},
		"too large":         {greeting(maxExportBytes+blockSize, flagsNewstyle, transHasFlags), "offers"},
	} {
		if _, err := negotiate(&peer{Reader: bytes.NewReader(c.says)}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	for n := range good {
		if _, err := negotiate(&peer{Reader: bytes.NewReader(good[:n])}); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d bytes: %v", n, err)
		}
	}
}

// announcement is one netlink message of the kernel's NBD client.
func announcement(cmd uint8, index uint32) []byte {
	body := []byte{cmd, 1, 0, 0}
	body = binary.NativeEndian.AppendUint16(body, 8)
	body = binary.NativeEndian.AppendUint16(body, attrIndex)
	body = binary.NativeEndian.AppendUint32(body, index)
	head := make([]byte, unix.NLMSG_HDRLEN)
	binary.NativeEndian.PutUint32(head, uint32(len(head)+len(body)))
	return append(head, body...)
}

func TestAnnouncementsOfBrokenConnections(t *testing.T) {
	both := append(announcement(cmdLinkDead, 3), announcement(cmdLinkDead, 70000)...)
	both = append(both, announcement(cmdConnect, 5)...)
	if got := deadLinks(both); len(got) != 2 || got[0] != 3 || got[1] != 70000 {
		t.Errorf("got %v, want 3 and 70000", got)
	}
	if got := deadLinks(both[:len(both)-1]); len(got) != 2 {
		t.Errorf("cut in the last message: %v", got)
	}
}

func FuzzAnnouncements(f *testing.F) {
	f.Add(announcement(cmdLinkDead, 3))
	f.Add(append(announcement(cmdConnect, 1), announcement(cmdLinkDead, 2)...))
	f.Add([]byte{255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		if got := deadLinks(b); len(got) > len(b)/unix.NLMSG_HDRLEN {
			t.Errorf("%d announcements in %d bytes", len(got), len(b))
		}
	})
}
