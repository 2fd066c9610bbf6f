package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// qmpMaxLine bounds one message of QEMU; query-qmp-schema, which we never
// call, is the only known one that comes near.
const qmpMaxLine = 1 << 20

// qmpFallback bounds a command whose context has no deadline: a main loop
// that does not answer for so long is stuck.
const qmpFallback = 60 * time.Second

// qmpError is a command refused by QEMU, in its own words.
type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return e.Desc }

// qmpEvent is an event as it came.
type qmpEvent struct {
	Name string
	Data json.RawMessage
}

type qmpMessage struct {
	QMP    json.RawMessage `json:"QMP"`
	Return json.RawMessage `json:"return"`
	Error  *qmpError       `json:"error"`
	Event  string          `json:"event"`
	Data   json.RawMessage `json:"data"`
	ID     *uint64         `json:"id"`
}

// qmpClient speaks the QEMU Machine Protocol over one connection. One
// goroutine reads until the connection ends; every failure of it ends all
// pending commands with the same error.
type qmpClient struct {
	conn    *net.UnixConn
	onEvent func(qmpEvent) // called by the reader, must not block

	write sync.Mutex // one command on the wire at a time

	mu      sync.Mutex
	next    uint64
	pending map[uint64]chan qmpMessage
	waiters map[*qmpWaiter]struct{}
	err     error
	done    chan struct{}
}

// qmpWaiter receives the first event that matches.
type qmpWaiter struct {
	match func(qmpEvent) bool
	got   chan qmpEvent // capacity 1
}

// newQMP takes over conn, reads the greeting and leaves negotiation mode.
// onEvent may be nil.
func newQMP(ctx context.Context, conn *net.UnixConn, onEvent func(qmpEvent)) (*qmpClient, error) {
	c := &qmpClient{
		conn: conn, onEvent: onEvent,
		pending: map[uint64]chan qmpMessage{}, waiters: map[*qmpWaiter]struct{}{},
		done: make(chan struct{}),
	}
	greeted := make(chan struct{})
	go c.read(greeted)
	ctx, cancel := context.WithTimeout(ctx, qmpFallback)
	defer cancel()
	select {
	case <-greeted:
	case <-c.done:
		return nil, fmt.Errorf("waiting for QEMU's greeting: %w", c.err)
	case <-ctx.Done():
		c.close()
		return nil, fmt.Errorf("waiting for QEMU's greeting: %w", ctx.Err())
	}
	if err := c.execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// read ends with the connection.
func (c *qmpClient) read(greeted chan struct{}) {
	sc := bufio.NewScanner(c.conn)
	sc.Buffer(make([]byte, 0, 4096), qmpMaxLine)
	seen := false
	for sc.Scan() {
		if len(sc.Bytes()) == 0 {
			continue
		}
		var m qmpMessage
		if err := json.Unmarshal(sc.Bytes(), &m); err != nil {
			c.fail(fmt.Errorf("QEMU sent a line that is not QMP: %w", err))
			return
		}
		switch {
		case !seen && m.QMP != nil:
			seen = true
			close(greeted)
		case !seen:
			c.fail(errors.New("QEMU did not greet"))
			return
		case m.Event != "":
			c.event(qmpEvent{Name: m.Event, Data: m.Data})
		case m.ID != nil:
			c.reply(*m.ID, m)
		case m.Error != nil:
			// No id: QEMU could not parse what we sent, so nobody knows whose it is.
			c.fail(fmt.Errorf("QEMU did not understand: %w", m.Error))
			return
		}
	}
	err := sc.Err()
	if err == nil {
		err = errors.New("QEMU closed the control connection")
	}
	c.fail(err)
}

func (c *qmpClient) event(e qmpEvent) {
	if c.onEvent != nil {
		c.onEvent(e)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for w := range c.waiters {
		if w.match(e) {
			w.got <- e
			delete(c.waiters, w)
		}
	}
}

func (c *qmpClient) reply(id uint64, m qmpMessage) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ch := c.pending[id]; ch != nil { // else the caller gave up on it
		ch <- m
		delete(c.pending, id)
	}
}

func (c *qmpClient) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	c.conn.Close()
	close(c.done)
}

// close ends the connection; QEMU then takes the next one.
func (c *qmpClient) close() { c.fail(net.ErrClosed) }

func (c *qmpClient) alive() bool {
	select {
	case <-c.done:
		return false
	default:
		return true
	}
}

// expect registers for an event before the command that causes it is sent;
// the cancel function must be called.
func (c *qmpClient) expect(match func(qmpEvent) bool) (<-chan qmpEvent, func()) {
	w := &qmpWaiter{match: match, got: make(chan qmpEvent, 1)}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiters[w] = struct{}{}
	return w.got, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.waiters, w)
	}
}

// execute runs one command, handing over files with it, and decodes what it
// returns into out (nil: nobody wants it). An error names the command.
func (c *qmpClient) execute(ctx context.Context, name string, args, out any, files ...*os.File) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, qmpFallback)
		defer cancel()
	}
	m, err := c.roundTrip(ctx, name, args, files)
	if err == nil && m.Error != nil {
		err = m.Error
	}
	if err != nil {
		return fmt.Errorf("QMP %s: %w", name, err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, out); err != nil {
		return fmt.Errorf("QMP %s: decoding its result: %w", name, err)
	}
	return nil
}

func (c *qmpClient) roundTrip(ctx context.Context, name string, args any, files []*os.File) (qmpMessage, error) {
	ch := make(chan qmpMessage, 1)
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return qmpMessage{}, c.err
	}
	id := c.next
	c.next++
	c.pending[id] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.pending, id)
	}()

	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{name, args, id})
	if err != nil {
		return qmpMessage{}, err
	}
	if err := c.send(ctx, append(line, '\n'), files); err != nil {
		return qmpMessage{}, err
	}
	select {
	case m := <-ch:
		return m, nil
	case <-c.done:
		select { // the reply may have come just before the end
		case m := <-ch:
			return m, nil
		default:
			return qmpMessage{}, c.err
		}
	case <-ctx.Done():
		return qmpMessage{}, ctx.Err()
	}
}

// send writes one line. A line that was cut short would spoil all that
// follow, so any failure ends the connection.
func (c *qmpClient) send(ctx context.Context, line []byte, files []*os.File) error {
	c.write.Lock()
	defer c.write.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	deadline, _ := ctx.Deadline()
	_ = c.conn.SetWriteDeadline(deadline)
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	n, _, err := c.conn.WriteMsgUnix(line, oob, nil)
	if err == nil && n < len(line) {
		_, err = c.conn.Write(line[n:])
	}
	if err != nil {
		c.fail(fmt.Errorf("writing to QEMU: %w", err))
	}
	return err
}
