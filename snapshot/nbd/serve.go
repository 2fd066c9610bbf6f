package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Serve accepts clients of dev on l until ctx ends or l is closed from
// outside; both return nil. Any other failure to accept that does not pass is
// returned. It owns l and closes it (which unlinks a unix socket). When it
// returns no request is at work any more; it neither flushes nor closes dev.
func Serve(ctx context.Context, l net.Listener, dev Device, o Options) error {
	s := &server{dev: dev, size: dev.Size(), o: o.withDefaults(), conns: map[*conn]struct{}{}}
	if s.size < 0 {
		l.Close()
		return fmt.Errorf("nbd: device of %d bytes", s.size)
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() {
		l.Close()
		s.closeConns()
	})
	defer func() {
		cancel()
		stop()
		l.Close()
		s.closeConns()
		s.wg.Wait()
	}()
	return s.accept(ctx, l)
}

type server struct {
	dev  Device
	size int64
	o    Options
	wg   sync.WaitGroup

	mu     sync.Mutex
	conns  map[*conn]struct{}
	closed bool

	// owner is the client in transmission of an Exclusive server.
	ownerMu sync.Mutex
	owner   *conn
}

func (s *server) accept(ctx context.Context, l net.Listener) error {
	pause := time.Millisecond
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return nil
		default:
			// Out of descriptors or memory: it passes, or it does not within
			// about two seconds and is an error.
			if pause > time.Second {
				return fmt.Errorf("nbd: accept: %w", err)
			}
			s.o.Logger.Warn("nbd: accept failed, trying again", "error", err)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(pause):
			}
			pause *= 2
			continue
		}
		pause = time.Millisecond
		c := newConn(s, nc)
		if !s.add(c) {
			s.o.Logger.Warn("nbd: connection refused", "limit", s.o.MaxConns)
			nc.Close()
			continue
		}
		go func() {
			defer s.wg.Done()
			defer s.remove(c)
			if err := c.serve(ctx); err != nil && ctx.Err() == nil {
				s.o.Logger.Warn("nbd: connection ended", "error", err)
			}
		}()
	}
}

func (s *server) add(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.conns) >= s.o.MaxConns {
		return false
	}
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	return true
}

func (s *server) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

func (s *server) closeConns() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.conns {
		c.close()
	}
}

// takeOver makes c the only client of an Exclusive server: the one before is
// cut off and its requests have ended when this returns.
func (s *server) takeOver(ctx context.Context, c *conn) error {
	if !s.o.Exclusive {
		return nil
	}
	s.ownerMu.Lock()
	defer s.ownerMu.Unlock()
	if old := s.owner; old != nil {
		old.close()
		select {
		case <-old.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	s.owner = c
	return nil
}

func (s *server) transmissionFlags() uint16 {
	f := uint16(transHasFlags | transSendFlush | transSendFUA | transSendTrim | transSendWriteZeroes)
	if s.o.ReadOnly {
		f |= transReadOnly
	}
	if !s.o.Exclusive {
		// All connections see one Device, and its Flush covers them all.
		f |= transCanMultiConn
	}
	return f
}
