package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// pooledBuffer is the size of the buffers kept for the usual small requests;
// larger ones are made and left to the collector.
const pooledBuffer = 128 << 10

// maxInflightBytes bounds the payload in memory per connection. One request
// of MaxRequest must fit.
const maxInflightBytes = 2 * MaxRequest

var buffers = sync.Pool{New: func() any { b := make([]byte, pooledBuffer); return &b }}

// conn is one client. A reader takes requests off the stream, each is carried
// out in a goroutine of its own, bounded by two semaphores.
type conn struct {
	s     *server
	nc    net.Conn
	r     *bufio.Reader
	slots *semaphore.Weighted
	bytes *semaphore.Weighted
	work  sync.WaitGroup
	done  chan struct{} // closed when no request of this client is at work

	writeMu sync.Mutex // one reply at a time
}

func newConn(s *server, nc net.Conn) *conn {
	return &conn{
		s: s, nc: nc,
		r:     bufio.NewReaderSize(nc, 32<<10),
		slots: semaphore.NewWeighted(int64(s.o.MaxInflight)),
		bytes: semaphore.NewWeighted(maxInflightBytes),
		done:  make(chan struct{}),
	}
}

func (c *conn) close() { c.nc.Close() }

// serve runs the connection to its end. nil: the client said good-bye or went
// away between requests.
func (c *conn) serve(ctx context.Context) error {
	defer close(c.done)
	defer c.work.Wait()
	defer c.close()
	n := &negotiator{r: c.r, w: c.nc, name: c.s.o.Name, size: c.s.size, flags: c.s.transmissionFlags()}
	if err := c.nc.SetDeadline(time.Now().Add(c.s.o.NegotiationTimeout)); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	start, err := n.run()
	if errors.Is(err, io.EOF) {
		return nil // a probe that only connected
	}
	if err != nil {
		return fmt.Errorf("negotiate: %w", err)
	}
	if !start {
		return nil
	}
	if err := c.s.takeOver(ctx, c); err != nil {
		return err
	}
	if err := c.nc.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("clear deadline: %w", err)
	}
	return c.transmit(ctx)
}

func (c *conn) transmit(ctx context.Context) error {
	var header [requestLen]byte
	for {
		if _, err := io.ReadFull(c.r, header[:]); err != nil {
			if err == io.EOF || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("read request: %w", err)
		}
		req, err := decodeRequest(&header)
		if err != nil {
			return err
		}
		if req.cmd == cmdDisc {
			return nil
		}
		if err := c.accept(ctx, req); err != nil {
			return err
		}
	}
}

// accept takes a request's payload and starts its execution, waiting while
// the connection has its share of requests or bytes at work.
func (c *conn) accept(ctx context.Context, req request) error {
	refusal := req.check(c.s.size, c.s.o.ReadOnly)
	payload := int64(0)
	if req.cmd == cmdWrite || (req.cmd == cmdRead && refusal == 0) {
		payload = int64(req.length)
	}
	// Cannot deadlock: what holds slots or bytes needs none to finish, and
	// its reply fails when the connection is closed.
	if err := c.slots.Acquire(ctx, 1); err != nil {
		return err
	}
	if err := c.bytes.Acquire(ctx, payload); err != nil {
		c.slots.Release(1)
		return err
	}
	buf, pooled := takeBuffer(payload)
	release := func() {
		if pooled != nil {
			buffers.Put(pooled)
		}
		c.bytes.Release(payload)
		c.slots.Release(1)
	}
	if req.cmd == cmdWrite {
		if _, err := io.ReadFull(c.r, buf); err != nil {
			release()
			return fmt.Errorf("read payload of %d bytes: %w", payload, err)
		}
	}
	c.work.Go(func() {
		defer release()
		num := refusal
		if num == 0 {
			num = c.execute(req, buf)
		}
		var data []byte
		if req.cmd == cmdRead && num == 0 {
			data = buf
		}
		if err := c.reply(num, req.cookie, data); err != nil {
			c.close() // wakes the reader, which ends the connection
		}
	})
	return nil
}

func (c *conn) execute(req request, buf []byte) uint32 {
	off := int64(req.offset) // fits: checked against the size
	var err error
	switch req.cmd {
	case cmdRead:
		var n int
		n, err = c.s.dev.ReadAt(buf, off)
		if n == len(buf) {
			err = nil // io.EOF at the very end of the device is no failure
		} else if err == nil {
			err = io.ErrUnexpectedEOF
		}
	case cmdWrite:
		_, err = c.s.dev.WriteAt(buf, off)
	case cmdTrim, cmdWriteZeroes:
		// TRIM may leave anything; zeros are the one answer that a later
		// snapshot can keep exact.
		err = c.s.dev.Zero(off, int64(req.length))
	case cmdFlush:
		err = c.s.dev.Flush()
	}
	if err == nil && req.flags&cmdFlagFUA != 0 && req.cmd != cmdRead && req.cmd != cmdFlush {
		err = c.s.dev.Flush()
	}
	if err != nil {
		c.s.o.Logger.Error("nbd: request failed", "command", req.cmd, "offset", req.offset, "length", req.length, "error", err)
	}
	return errno(err)
}

func (c *conn) reply(num uint32, cookie uint64, data []byte) error {
	var h [replyLen]byte
	encodeReply(&h, num, cookie)
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if len(data) == 0 {
		_, err := c.nc.Write(h[:])
		return err
	}
	v := net.Buffers{h[:], data}
	_, err := v.WriteTo(c.nc)
	return err
}

// takeBuffer gives n bytes; pooled is what to return to the pool, or nil.
func takeBuffer(n int64) (b []byte, pooled *[]byte) {
	switch {
	case n == 0:
		return nil, nil
	case n <= pooledBuffer:
		p := buffers.Get().(*[]byte)
		return (*p)[:n], p
	default:
		return make([]byte, n), nil
	}
}
