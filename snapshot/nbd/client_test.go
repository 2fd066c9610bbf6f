package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// memDevice is a device in memory that records what reached it.
type memDevice struct {
	mu      sync.Mutex
	data    []byte
	durable []byte // data at the last Flush
	log     []string
	fail    error
	// hold, when set, is called by WriteAt before the write takes effect.
	hold func(off int64)
}

func newMemDevice(size int) *memDevice {
	return &memDevice{data: make([]byte, size), durable: make([]byte, size)}
}

func (d *memDevice) Size() int64 { return int64(len(d.data)) }

func (d *memDevice) op(name string) error {
	d.log = append(d.log, name)
	return d.fail
}

func (d *memDevice) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.op("read"); err != nil {
		return 0, err
	}
	n := copy(p, d.data[off:])
	if off+int64(n) == int64(len(d.data)) {
		return n, io.EOF // as io.ReaderAt may at the end
	}
	return n, nil
}

func (d *memDevice) WriteAt(p []byte, off int64) (int, error) {
	if d.hold != nil {
		d.hold(off)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.op("write"); err != nil {
		return 0, err
	}
	return copy(d.data[off:], p), nil
}

func (d *memDevice) Zero(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.op("zero"); err != nil {
		return err
	}
	clear(d.data[off : off+n])
	return nil
}

func (d *memDevice) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.op("flush"); err != nil {
		return err
	}
	copy(d.durable, d.data)
	return nil
}

func (d *memDevice) setFail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = err
}

func (d *memDevice) takeLog() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.log
	d.log = nil
	return l
}

func (d *memDevice) at(off, n int) (data, durable []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.data[off : off+n]), bytes.Clone(d.durable[off : off+n])
}

// start serves dev on a unix socket until the test ends and gives its path.
func start(t testing.TB, dev Device, o Options) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, dev, o) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(time.Minute):
			t.Error("Serve does not end")
		}
	})
	return path
}

// client is a minimal NBD client.
type client struct {
	t      testing.TB
	c      net.Conn
	cookie uint64
	size   uint64
	flags  uint16
}

func dial(t testing.TB, path string) *client {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	return &client{t: t, c: c}
}

func (c *client) write(b []byte) {
	c.t.Helper()
	if _, err := c.c.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.c, b); err != nil {
		c.t.Fatal(err)
	}
	return b
}

func (c *client) wantClosed() {
	c.t.Helper()
	n, err := c.c.Read(make([]byte, 1))
	var timeout net.Error
	if err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		c.t.Fatalf("connection still open: %d bytes, %v", n, err)
	}
}

func (c *client) hello(flags uint32) {
	c.t.Helper()
	b := c.read(18)
	if binary.BigEndian.Uint64(b) != magicInit || binary.BigEndian.Uint64(b[8:]) != magicOption || binary.BigEndian.Uint16(b[16:]) != 3 {
		c.t.Fatalf("greeting %x", b)
	}
	c.write(binary.BigEndian.AppendUint32(nil, flags))
}

func option(opt uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func infoData(name string, infos ...uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, i)
	}
	return b
}

func (c *client) optReply(opt uint32) (kind uint32, data []byte) {
	c.t.Helper()
	b := c.read(20)
	if binary.BigEndian.Uint64(b) != magicOptReply || binary.BigEndian.Uint32(b[8:]) != opt {
		c.t.Fatalf("option reply %x", b)
	}
	return binary.BigEndian.Uint32(b[12:]), c.read(int(binary.BigEndian.Uint32(b[16:])))
}

// open negotiates with GO.
func open(t testing.TB, path string) *client {
	t.Helper()
	c := dial(t, path)
	c.hello(3)
	c.write(option(optGo, infoData("", infoBlockSize)))
	for {
		kind, data := c.optReply(optGo)
		switch {
		case kind == repAck:
			return c
		case kind != repInfo:
			t.Fatalf("GO answered %#x %q", kind, data)
		case binary.BigEndian.Uint16(data) == infoExport:
			c.size, c.flags = binary.BigEndian.Uint64(data[2:]), binary.BigEndian.Uint16(data[10:])
		}
	}
}

func header(cmd, flags uint16, cookie, off uint64, n uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, magicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, n)
}

// do sends one request and gives the error number and, for a read, the data.
func (c *client) do(cmd, flags uint16, off uint64, n uint32, payload []byte) (uint32, []byte) {
	c.t.Helper()
	c.cookie++
	c.write(append(header(cmd, flags, c.cookie, off, n), payload...))
	num, cookie := c.reply()
	if cookie != c.cookie {
		c.t.Fatalf("reply to %d, %d asked", cookie, c.cookie)
	}
	if cmd == cmdRead && num == 0 {
		return 0, c.read(int(n))
	}
	return num, nil
}

func (c *client) reply() (num uint32, cookie uint64) {
	c.t.Helper()
	b := c.read(replyLen)
	if binary.BigEndian.Uint32(b) != magicReply {
		c.t.Fatalf("reply %x", b)
	}
	return binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint64(b[8:])
}

func (c *client) mustWrite(off uint64, p []byte) {
	c.t.Helper()
	if num, _ := c.do(cmdWrite, 0, off, uint32(len(p)), p); num != 0 {
		c.t.Fatalf("write: error %d", num)
	}
}

var errFull = &net.OpError{Op: "x", Err: syscall.ENOSPC} // wrapped, as a real one is
