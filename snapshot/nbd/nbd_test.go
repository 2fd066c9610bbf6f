package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

func TestNegotiation(t *testing.T) {
	path := start(t, newMemDevice(1<<20), Options{})
	c := dial(t, path)
	c.hello(3)
	c.write(option(8, nil)) // structured replies
	if kind, _ := c.optReply(8); kind != repErrUnsup {
		t.Errorf("unknown option answered %#x", kind)
	}
	c.write(option(optList, nil))
	if kind, data := c.optReply(optList); kind != repServer || !bytes.Equal(data, make([]byte, 4)) {
		t.Errorf("list entry %#x %x", kind, data)
	}
	if kind, _ := c.optReply(optList); kind != repAck {
		t.Errorf("list ends with %#x", kind)
	}
	c.write(option(optList, []byte("x")))
	if kind, _ := c.optReply(optList); kind != repErrInvalid {
		t.Errorf("list with data answered %#x", kind)
	}
	c.write(option(optGo, infoData("other")))
	if kind, _ := c.optReply(optGo); kind != repErrUnknown {
		t.Errorf("unknown export answered %#x", kind)
	}
	for _, bad := range [][]byte{nil, {0, 0, 0}, infoData("")[:5], {0xff, 0xff, 0xff, 0xff, 0, 0}, append(infoData(""), 0)} {
		c.write(option(optGo, bad))
		if kind, _ := c.optReply(optGo); kind != repErrInvalid {
			t.Errorf("GO with %x answered %#x", bad, kind)
		}
	}
	c.write(option(optInfo, infoData("", infoName, infoBlockSize)))
	var infos []uint16
	for {
		kind, data := c.optReply(optInfo)
		if kind == repAck {
			break
		}
		infos = append(infos, binary.BigEndian.Uint16(data))
		if infos[len(infos)-1] == infoBlockSize && !bytes.Equal(data[2:], []byte{0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0}) {
			t.Errorf("block sizes %x", data)
		}
	}
	if !slices.Equal(infos, []uint16{infoExport, infoBlockSize, infoName}) {
		t.Errorf("information %v", infos)
	}
	c.write(option(optAbort, nil))
	if kind, _ := c.optReply(optAbort); kind != repAck {
		t.Errorf("abort answered %#x", kind)
	}
	c.wantClosed()
}

func TestExportName(t *testing.T) {
	path := start(t, newMemDevice(12345), Options{Name: "disk", ReadOnly: true})
	for flags, n := range map[uint32]int{1: 134, 3: 10} {
		c := dial(t, path)
		c.hello(flags)
		c.write(option(optExportName, []byte("disk")))
		b := c.read(n)
		if size := binary.BigEndian.Uint64(b); size != 12345 {
			t.Errorf("size %d", size)
		}
		if f := binary.BigEndian.Uint16(b[8:]); f&(transHasFlags|transReadOnly) != transHasFlags|transReadOnly {
			t.Errorf("flags %#x", f)
		}
		if num, data := c.do(cmdRead, 0, 12340, 5, nil); num != 0 || !bytes.Equal(data, make([]byte, 5)) {
			t.Errorf("read at the end: %d %x", num, data)
		}
		if num, _ := c.do(cmdWrite, 0, 0, 3, []byte("abc")); num != errPerm {
			t.Errorf("write to a read-only export: %d", num)
		}
		if num, _ := c.do(cmdTrim, 0, 0, 3, nil); num != errPerm {
			t.Errorf("trim of a read-only export: %d", num)
		}
	}
	c := dial(t, path)
	c.hello(3)
	c.write(option(optExportName, []byte("other")))
	c.wantClosed()
}

func TestCommands(t *testing.T) {
	const size = 1 << 20
	dev := newMemDevice(size)
	c := open(t, start(t, dev, Options{}))
	if c.size != size || c.flags != transHasFlags|transSendFlush|transSendFUA|transSendTrim|transSendWriteZeroes|transCanMultiConn {
		t.Fatalf("export of %d bytes, flags %#x", c.size, c.flags)
	}
	c.mustWrite(1001, []byte("hello"))
	if num, data := c.do(cmdRead, 0, 1000, 7, nil); num != 0 || string(data) != "\x00hello\x00" {
		t.Errorf("read %d %q", num, data)
	}
	big := bytes.Repeat([]byte("0123456789abcdef"), 20<<10)
	c.mustWrite(4096, big)
	if num, data := c.do(cmdRead, 0, 4096, uint32(len(big)), nil); num != 0 || !bytes.Equal(data, big) {
		t.Errorf("large read: %d", num)
	}
	dev.takeLog()
	for _, tc := range []struct {
		name   string
		cmd    uint16
		flags  uint16
		off    uint64
		n      uint32
		want   uint32
		effect []string
	}{
		{"trim", cmdTrim, 0, 4097, 10, 0, []string{"zero"}},
		{"write zeroes", cmdWriteZeroes, cmdFlagNoHole, 5000, 10, 0, []string{"zero"}},
		{"write zeroes, all, durable", cmdWriteZeroes, cmdFlagFUA, 0, size, 0, []string{"zero", "flush"}},
		{"flush", cmdFlush, 0, 0, 0, 0, []string{"flush"}},
		{"flush with a length", cmdFlush, 0, 0, 1, errInval, nil},
		{"read beyond", cmdRead, 0, size - 1, 2, errInval, nil},
		{"read far beyond", cmdRead, 0, 1<<64 - 1, 2, errInval, nil},
		{"read too large", cmdRead, 0, 0, MaxRequest + 1, errOverflow, nil},
		{"zero beyond", cmdWriteZeroes, 0, size, 1, errNoSpace, nil},
		{"trim that wraps", cmdTrim, 0, 1<<64 - 4096, 8192, errNoSpace, nil},
		{"unknown command", 99, 0, 0, 0, errInval, nil},
		{"unknown flag", cmdRead, 1 << 7, 0, 1, errInval, nil},
	} {
		num, _ := c.do(tc.cmd, tc.flags, tc.off, tc.n, nil)
		if log := dev.takeLog(); num != tc.want || !slices.Equal(log, tc.effect) {
			t.Errorf("%s: error %d, device did %v; want %d, %v", tc.name, num, log, tc.want, tc.effect)
		}
	}
	if num, _ := c.do(cmdWrite, 0, size-1, 2, []byte("xy")); num != errNoSpace {
		t.Errorf("write over the end: %d", num)
	}
	if num, _ := c.do(cmdWrite, 1<<9, 0, 2, []byte("xy")); num != errInval {
		t.Errorf("write with an unknown flag: %d", num)
	}
	if log := dev.takeLog(); log != nil {
		t.Errorf("refused writes did %v", log)
	}
	c.write(header(cmdDisc, 0, 0, 0, 0))
	c.wantClosed()
}

func TestDurability(t *testing.T) {
	dev := newMemDevice(8192)
	c := open(t, start(t, dev, Options{}))
	c.mustWrite(0, []byte("plain"))
	if num, _ := c.do(cmdWrite, cmdFlagFUA, 4096, 3, []byte("fua")); num != 0 {
		t.Fatalf("write with FUA: %d", num)
	}
	if _, durable := dev.at(4096, 3); string(durable) != "fua" {
		t.Errorf("FUA answered, %q durable", durable)
	}
	c.mustWrite(100, []byte("later"))
	if _, durable := dev.at(100, 5); string(durable) == "later" {
		t.Error("a plain write was flushed: the test shows nothing")
	}
	if num, _ := c.do(cmdFlush, 0, 0, 0, nil); num != 0 {
		t.Fatalf("flush: %d", num)
	}
	if _, durable := dev.at(100, 5); string(durable) != "later" {
		t.Errorf("flush answered, %q durable", durable)
	}
	for err, want := range map[error]uint32{errFull: errNoSpace, errors.New("bad sector"): errIO} {
		dev.setFail(err)
		for _, cmd := range []uint16{cmdRead, cmdTrim, cmdWriteZeroes} {
			if num, _ := c.do(cmd, 0, 0, 512, nil); num != want {
				t.Errorf("command %d on a device with %v: %d", cmd, err, num)
			}
		}
		if num, _ := c.do(cmdFlush, 0, 0, 0, nil); num != want {
			t.Errorf("flush on a device with %v: %d", err, num)
		}
		if num, _ := c.do(cmdWrite, cmdFlagFUA, 0, 1, []byte("x")); num != want {
			t.Errorf("write on a device with %v: %d", err, num)
		}
	}
}

func TestGarbageHurtsOnlyItsSender(t *testing.T) {
	dev := newMemDevice(1 << 20)
	path := start(t, dev, Options{NegotiationTimeout: 300 * time.Millisecond})
	good := open(t, path)
	before := map[string]func(c *client){
		"wrong option magic": func(c *client) { c.hello(3); c.write(make([]byte, 16)) },
		"unknown flags":      func(c *client) { c.hello(0xffffffff) },
		"huge option":        func(c *client) { c.hello(3); c.write(append(option(optGo, nil)[:12], 0xff, 0xff, 0xff, 0xff)) },
		"endless options": func(c *client) {
			c.hello(3)
			c.c.Write(bytes.Repeat(option(99, nil), maxOptions+1))
			for {
				if _, err := c.c.Read(make([]byte, 4096)); err != nil {
					return
				}
			}
		},
		"silence":    func(c *client) { c.hello(3) },
		"no hello":   func(c *client) { c.read(18) },
		"cut option": func(c *client) { c.hello(3); c.write(option(optGo, infoData(""))[:10]) },
	}
	for name, f := range before {
		t.Run(name, func(t *testing.T) {
			c := dial(t, path)
			f(c)
			if name == "huge option" {
				if kind, _ := c.optReply(optGo); kind != repErrTooBig {
					t.Errorf("answered %#x", kind)
				}
			}
			c.wantClosed()
		})
	}
	dev.takeLog()
	for name, b := range map[string][]byte{
		"wrong request magic": bytes.Repeat([]byte{0xee}, requestLen),
		"oversized write":     header(cmdWrite, 0, 1, 0, MaxRequest+1),
	} {
		t.Run(name, func(t *testing.T) {
			c := open(t, path)
			c.write(b)
			c.wantClosed()
		})
	}
	for name, b := range map[string][]byte{
		"cut request": header(cmdWrite, 0, 1, 0, 16)[:20],
		"cut payload": append(header(cmdWrite, 0, 1, 0, 16), "only ten b"...),
		"no payload":  header(cmdWrite, 0, 1, 0, 16),
	} {
		t.Run(name, func(t *testing.T) {
			c := open(t, path)
			c.write(b)
			c.c.(*net.UnixConn).CloseWrite()
			c.wantClosed()
		})
	}
	if log := dev.takeLog(); log != nil {
		t.Errorf("garbage reached the device: %v", log)
	}
	good.mustWrite(7, []byte("still here"))
	if num, data := good.do(cmdRead, 0, 7, 10, nil); num != 0 || string(data) != "still here" {
		t.Errorf("the good client reads %d %q", num, data)
	}
}

func TestParallelRequestsAreBounded(t *testing.T) {
	dev := newMemDevice(1 << 20)
	var mu sync.Mutex
	at, most := 0, 0
	gate := make(chan struct{})
	dev.hold = func(int64) {
		mu.Lock()
		at++
		most = max(most, at)
		mu.Unlock()
		<-gate
		mu.Lock()
		at--
		mu.Unlock()
	}
	c := open(t, start(t, dev, Options{MaxInflight: 4}))
	go func() {
		for i := range uint64(64) {
			c.c.Write(append(header(cmdWrite, 0, i, i*4096, 4096), make([]byte, 4096)...))
		}
	}()
	deadline := time.Now().Add(time.Minute)
	for { // until as many as may are in the device
		mu.Lock()
		n := at
		mu.Unlock()
		if n == 4 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d requests at work", n)
		}
		time.Sleep(time.Millisecond)
	}
	close(gate)
	seen := map[uint64]bool{}
	for range 64 {
		num, cookie := c.reply()
		if num != 0 || seen[cookie] {
			t.Errorf("request %d: error %d, answered before: %v", cookie, num, seen[cookie])
		}
		seen[cookie] = true
	}
	if most != 4 {
		t.Errorf("%d requests at a time", most)
	}
}

func TestReconnectNeverSeesTheOldConnectionsWrites(t *testing.T) {
	dev := newMemDevice(8192)
	entered, gate := make(chan struct{}), make(chan struct{})
	var once sync.Once
	dev.hold = func(int64) {
		once.Do(func() {
			close(entered)
			<-gate
		})
	}
	path := start(t, dev, Options{Exclusive: true})
	old := open(t, path)
	if old.flags&transCanMultiConn != 0 {
		t.Error("exclusive export says that several connections are fine")
	}
	old.write(append(header(cmdWrite, 0, 1, 0, 3), "old"...))
	<-entered // and stays in the device
	ready := make(chan *client)
	go func() {
		c := dial(t, path)
		c.hello(3)
		c.write(option(optExportName, nil))
		c.read(10)
		c.write(append(header(cmdWrite, 0, 2, 0, 3), "new"...))
		ready <- c
	}()
	old.wantClosed() // replaced
	close(gate)
	c := <-ready
	if num, cookie := c.reply(); num != 0 || cookie != 2 {
		t.Fatalf("reply %d to %d", num, cookie)
	}
	if data, _ := dev.at(0, 3); string(data) != "new" {
		t.Errorf("device holds %q", data)
	}
	if log := dev.takeLog(); !slices.Equal(log, []string{"write", "write"}) {
		t.Errorf("device did %v", log)
	}
}

func TestServeEnds(t *testing.T) {
	dev := newMemDevice(4096)
	for _, how := range []string{"context", "listener"} {
		path := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		ended := make(chan error, 1)
		go func() { ended <- Serve(ctx, l, dev, Options{MaxConns: 2}) }()
		a, b := open(t, path), dial(t, path) // one at work, one in negotiation
		b.read(18)
		refused := dial(t, path)
		refused.wantClosed()
		if how == "context" {
			cancel()
		} else {
			l.Close()
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("%s: %v", how, err)
			}
		case <-time.After(time.Minute):
			t.Fatalf("%s: Serve goes on", how)
		}
		a.wantClosed()
		b.wantClosed()
		if _, err := net.Dial("unix", path); err == nil {
			t.Errorf("%s: socket still answers", how)
		}
	}
}
