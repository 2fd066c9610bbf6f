package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

const (
	// reserveSize is what is kept beside an SQLite database. A delete takes some
	// tens of KiB of the write-ahead log, and gives its sandbox's disk back.
	reserveSize = 4 << 20
	// reservePart is what one write gets that finds no room: whoever fills the
	// disk takes what it does not use, so the rest is for the writes after it.
	reservePart = 256 << 10
	// reserveEvery is how often a reserve that was used looks for room: nobody
	// tells when a disk has some.
	reserveEvery = 5 * time.Second
)

// reserve is room on the disk of an SQLite database for the writes without which
// nobody could make room: a file of blocks, given back part by part.
type reserve struct {
	path  string
	every time.Duration

	mu      sync.Mutex
	size    int64
	filling bool
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

// openReserve takes the room, or what there is of it from before. On a disk that
// is full already a part is given back at once: SQLite needs some to open.
func openReserve(path string) (*reserve, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the database's reserve of room: %w", err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("look at the database's reserve of room: %w", err)
	}
	r := &reserve{path: path, every: reserveEvery, size: min(st.Size, st.Blocks*512)} // a copy may be all holes
	r.ctx, r.cancel = context.WithCancel(context.Background())
	switch free, err := storage.FreeBelow(filepath.Dir(path)); {
	case err != nil:
		return nil, err
	case free < reservePart:
		r.spend()
	default:
		r.fill()
		r.mu.Lock()
		r.fillSoon()
		r.mu.Unlock()
	}
	return r, nil
}

// spend gives a part back to the disk and tells whether there was any.
func (r *reserve) spend() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.size <= 0 {
		return false
	}
	left := max(0, r.size-reservePart)
	if err := os.Truncate(r.path, left); err != nil {
		return false
	}
	r.size = left
	r.fillSoon()
	return true
}

// fillSoon takes the room again when there is plenty. mu is held.
func (r *reserve) fillSoon() {
	if r.filling || r.size == reserveSize || r.ctx.Err() != nil {
		return
	}
	r.filling = true
	r.wg.Go(func() {
		tick := time.NewTicker(r.every)
		defer tick.Stop()
		for {
			select {
			case <-r.ctx.Done():
				return
			case <-tick.C:
				if r.fill() {
					return
				}
			}
		}
	})
}

// fill takes the room if the disk has twice as much, so that nobody misses it
// meanwhile, and tells whether the reserve is whole.
func (r *reserve) fill() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.size == reserveSize {
		r.filling = false
		return true
	}
	if free, err := storage.FreeBelow(filepath.Dir(r.path)); err != nil || free < 2*reserveSize {
		return false
	}
	if err := allocate(r.path, reserveSize); err != nil {
		_ = os.Truncate(r.path, r.size) // a part may have been had
		return false
	}
	r.size, r.filling = reserveSize, false
	return true
}

func (r *reserve) close() {
	r.cancel()
	r.wg.Wait()
}

// allocate gives a file blocks for n bytes.
func allocate(path string, n int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.Fallocate(int(f.Fd()), 0, 0, n)
	if errors.Is(err, unix.EOPNOTSUPP) {
		// Written, and not with zeros, which a file system may leave out.
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i>>8) | 1
		}
		if _, err = f.WriteAt(b, 0); err == nil {
			err = f.Sync()
		}
	}
	return err
}
