package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"
)

func FuzzDecodeRequest(f *testing.F) {
	f.Add(header(cmdRead, 0, 1, 0, 4096))
	f.Add(header(cmdWrite, cmdFlagFUA, 2, 1<<63, MaxRequest+1))
	f.Add(header(cmdTrim, 0xffff, 3, 1<<64-1, 1<<32-1))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < requestLen {
			return
		}
		r, err := decodeRequest((*[requestLen]byte)(b))
		if err != nil {
			return
		}
		if got := header(r.cmd, r.flags, r.cookie, r.offset, r.length); !bytes.Equal(got, b[:requestLen]) {
			t.Fatalf("decoded %+v, encodes to %x", r, got)
		}
		const size = 1 << 20
		if r.check(size, false) == 0 && (r.offset > size || uint64(r.length) > size-r.offset || int64(r.offset) < 0) {
			t.Fatalf("accepted %+v on %d bytes", r, size)
		}
		if r.check(size, true) == 0 && r.cmd != cmdRead && r.cmd != cmdFlush {
			t.Fatalf("accepted %+v read-only", r)
		}
	})
}

func FuzzDecodeInfo(f *testing.F) {
	f.Add(infoData("", infoName))
	f.Add(infoData("export"))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		req, err := decodeInfo(b)
		if err == nil && len(req.name)+6 > len(b) {
			t.Fatalf("name of %d bytes out of %d", len(req.name), len(b))
		}
	})
}

// strictDevice fails the test on what check must keep away from a device.
type strictDevice struct {
	t    *testing.T
	size int64
}

func (d strictDevice) Size() int64 { return d.size }
func (d strictDevice) see(off, n int64) {
	if off < 0 || n < 0 || off > d.size || n > d.size-off {
		d.t.Errorf("device of %d bytes is asked for %d at %d", d.size, n, off)
	}
}
func (d strictDevice) ReadAt(p []byte, off int64) (int, error) {
	d.see(off, int64(len(p)))
	return len(p), nil
}
func (d strictDevice) WriteAt(p []byte, off int64) (int, error) {
	d.see(off, int64(len(p)))
	return len(p), nil
}
func (d strictDevice) Zero(off, n int64) error { d.see(off, n); return nil }
func (d strictDevice) Flush() error            { return nil }

// FuzzConnection feeds a whole connection: whatever comes, it ends and the
// device is asked for nothing outside its bounds.
func FuzzConnection(f *testing.F) {
	flags := binary.BigEndian.AppendUint32(nil, 3)
	goOpt := option(optGo, infoData(""))
	f.Add(append(append(bytes.Clone(flags), goOpt...), header(cmdRead, 0, 1, 0, 100)...))
	f.Add(append(append(bytes.Clone(flags), goOpt...), append(header(cmdWrite, 1, 1, 10, 5), "hello"...)...))
	f.Add(append(append(bytes.Clone(flags), option(optList, nil)...), option(optExportName, nil)...))
	f.Add(append(append(bytes.Clone(flags), goOpt...), append(header(cmdWriteZeroes, 0, 1, 65000, 5000), header(cmdDisc, 0, 0, 0, 0)...)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &server{dev: strictDevice{t, 1 << 16}, size: 1 << 16, o: Options{}.withDefaults(), conns: map[*conn]struct{}{}}
		here, there := net.Pipe()
		here.SetDeadline(time.Now().Add(time.Minute))
		go io.Copy(io.Discard, here)
		go func() {
			here.Write(b)
			here.Close()
		}()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = newConn(s, there).serve(context.Background())
		}()
		select {
		case <-done:
		case <-time.After(time.Minute):
			t.Fatal("connection does not end")
		}
	})
}
