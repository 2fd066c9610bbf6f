// Package kernelnbd gives NBD exports the form of block devices, /dev/nbdN, for
// programs that speak no NBD themselves. It negotiates with the server and hands
// the connection to the kernel's client over netlink. internal/engine and
// cmd/wrenn may import it.
//
// Invariants:
//
//  1. The kernel chooses the device, in the call that takes it: no two users
//     can be given the same one.
//  2. A device carries its owner's name in the kernel itself, so that it is
//     found again by whoever comes after a crash, with no record to lose.
//  3. A connection that breaks is made again while Devices is open; until then
//     requests wait, for DeadTime at most.
package kernelnbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// DeadTime is how long requests wait for a server that went away.
const DeadTime = 2 * time.Minute

const blockSize = 4096

// ErrMissing: the kernel has no NBD client.
var ErrMissing = errors.New("the kernel's nbd module is not there: modprobe nbd")

// Devices are the block devices of one owner of sandboxes.
type Devices struct {
	prefix string // of the owners' names in the kernel
	log    *slog.Logger
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	servers map[int]server // by device
}

// server is where a device's export is served, and for whom.
type server struct{ owner, socket string }

// Open finds the kernel's client. prefix tells the devices of one state
// directory from another's.
func Open(prefix string, log *slog.Logger) (*Devices, error) {
	ctx, cancel := context.WithCancel(context.Background())
	d := &Devices{prefix: prefix, log: log, cancel: cancel, servers: map[int]server{}}
	dead, err := subscribe(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	d.wg.Add(1)
	go d.mend(ctx, dead)
	return d, nil
}

// Close ends the mending; the devices stay.
func (d *Devices) Close() {
	d.cancel()
	d.wg.Wait()
}

// Attach makes a device of the export at socket and returns its path. One that
// the owner has already is taken away first.
func (d *Devices) Attach(ctx context.Context, owner, socket string) (path string, err error) {
	if err := d.Detach(ctx, owner); err != nil {
		return "", err
	}
	fail := func(err error) (string, error) {
		return "", fmt.Errorf("attach the disk of %s to a block device: %w", owner, err)
	}
	conn, e, err := dial(ctx, socket)
	if err != nil {
		return fail(err)
	}
	defer conn.Close() // the kernel holds its own reference
	index, err := connect(conn, e, d.name(owner))
	if err != nil {
		return fail(err)
	}
	d.mu.Lock()
	d.servers[index] = server{owner, socket}
	d.mu.Unlock()
	return device(index), nil
}

// Adopt takes over the device that an earlier process attached, and connects it
// anew if its server went away meanwhile.
func (d *Devices) Adopt(ctx context.Context, owner, socket string) error {
	found, err := d.find(owner)
	if err != nil {
		return err
	}
	if len(found) != 1 {
		return fmt.Errorf("take over the block device of %s: there are %d", owner, len(found))
	}
	d.mu.Lock()
	d.servers[found[0]] = server{owner, socket}
	d.mu.Unlock()
	err = d.reconnect(ctx, found[0], server{owner, socket})
	if errors.Is(err, unix.ENOSPC) { // no connection is dead
		return nil
	}
	return err
}

// Flush writes to the server what the kernel holds back of the owner's device.
func (d *Devices) Flush(owner string) error {
	found, err := d.find(owner)
	if err != nil {
		return err
	}
	for _, index := range found {
		f, err := os.OpenFile(device(index), os.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("flush the block device of %s: %w", owner, err)
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return fmt.Errorf("flush the block device of %s: %w", owner, err)
		}
	}
	return nil
}

// Detach gives the owner's device back; with none it does nothing. Nobody may
// use it any more.
func (d *Devices) Detach(_ context.Context, owner string) error {
	found, err := d.find(owner)
	if err != nil {
		return err
	}
	for _, index := range found {
		d.mu.Lock()
		delete(d.servers, index)
		d.mu.Unlock()
		if err := disconnect(index); err != nil {
			return fmt.Errorf("detach %s from the disk of %s: %w", device(index), owner, err)
		}
	}
	return nil
}

func (d *Devices) name(owner string) string { return d.prefix + ":" + owner }

func device(index int) string { return "/dev/nbd" + strconv.Itoa(index) }

// Owners tells who has a device of ours, from the names that the kernel keeps.
func (d *Devices) Owners() (owners []string, err error) {
	err = d.each(func(name string, _ int) {
		if owner, ours := strings.CutPrefix(name, d.prefix+":"); ours {
			owners = append(owners, owner)
		}
	})
	return owners, err
}

// find asks the kernel which devices bear the owner's name.
func (d *Devices) find(owner string) (found []int, err error) {
	err = d.each(func(name string, index int) {
		if name == d.name(owner) {
			found = append(found, index)
		}
	})
	return found, err
}

// each goes through the connected devices and their names.
func (d *Devices) each(f func(name string, index int)) error {
	names, err := filepath.Glob("/sys/block/nbd*/backend")
	if err != nil {
		return err
	}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue // detached meanwhile
		}
		if err != nil {
			return fmt.Errorf("ask whose %s is: %w", n, err)
		}
		index, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(n)), "nbd"))
		if err == nil {
			f(strings.TrimSpace(string(b)), index)
		}
	}
	return nil
}

// dial connects to a server and negotiates.
func dial(ctx context.Context, socket string) (*os.File, export, error) {
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, export{}, fmt.Errorf("connect to the NBD server: %w", err)
	}
	defer c.Close()
	deadline := time.Now().Add(10 * time.Second)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := c.SetDeadline(deadline); err != nil {
		return nil, export{}, err
	}
	e, err := negotiate(c)
	if err != nil {
		return nil, e, err
	}
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		return nil, e, err
	}
	return f, e, nil
}

func (d *Devices) reconnect(ctx context.Context, index int, s server) error {
	conn, _, err := dial(ctx, s.socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	return reconfigure(index, conn, d.name(s.owner))
}

// mend connects devices anew whose connection broke, until Close.
func (d *Devices) mend(ctx context.Context, dead <-chan int) {
	defer d.wg.Done()
	tick := time.NewTicker(50 * time.Millisecond) // a server that restarts gives no sign
	defer tick.Stop()
	broken := map[int]time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case index := <-dead:
			broken[index] = time.Now()
			continue
		case <-tick.C:
		}
		for index, since := range broken {
			d.mu.Lock()
			srv := d.servers[index]
			d.mu.Unlock()
			if srv.socket == "" || time.Since(since) > DeadTime {
				delete(broken, index)
				continue
			}
			err := d.reconnect(ctx, index, srv)
			if err == nil || errors.Is(err, unix.ENOSPC) {
				d.log.Info("a block device has its server again", "device", device(index))
				delete(broken, index)
			}
		}
	}
}
