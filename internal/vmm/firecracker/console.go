package firecracker

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	fifoName    = "console.fifo" // what the guest prints
	logFifoName = "log.fifo"     // what Firecracker says, in its own directory
)

// console carries what comes through a FIFO to a bounded file. Firecracker's
// end never blocks, and that of the guest's console is open for reading too, so
// that it is no broken pipe while nobody of ours is there.
type console struct {
	fifo, file *os.File
	room       int64
	done       chan struct{}
}

// openConsole opens the FIFO and the file.
func openConsole(fifo, path string) (_ *console, err error) {
	c := &console{done: make(chan struct{})}
	if c.fifo, err = makeFIFO(fifo); err != nil {
		return nil, err
	}
	c.file, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		c.fifo.Close()
		return nil, fmt.Errorf("opening the console: %w", err)
	}
	if fi, err := c.file.Stat(); err == nil {
		c.room = max(logLimit-fi.Size(), 0)
	}
	return c, nil
}

// makeFIFO opens a FIFO, made before if it is not there.
func makeFIFO(path string) (*os.File, error) {
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("making the console's FIFO: %w", err)
	}
	return openFIFO(path)
}

func openFIFO(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the console's FIFO: %w", err)
	}
	if fi, err := f.Stat(); err != nil || fi.Mode()&os.ModeNamedPipe == 0 {
		f.Close()
		return nil, fmt.Errorf("opening the console's FIFO: %s is none (%v)", path, err)
	}
	return f, nil
}

// run copies until stop or, once the process has ended, all is read.
func (c *console) run() {
	defer close(c.done)
	defer c.file.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := c.fifo.Read(buf)
		keep := buf[:min(int64(n), c.room)]
		if w, werr := c.file.Write(keep); werr == nil {
			c.room -= int64(w)
		} // what the host's full disk cannot take is lost, as beyond the limit
		if err != nil {
			return
		}
	}
}

// drain ends it when everything that was written has been read.
func (c *console) drain() {
	_ = c.fifo.SetReadDeadline(time.Unix(1, 0)) // what waits ends, what is there stays
	<-c.done
	buf := make([]byte, 64<<10)
	raw, err := c.fifo.SyscallConn()
	if err != nil {
		return
	}
	f, err := os.OpenFile(c.file.Name(), os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		defer f.Close()
		_ = raw.Control(func(fd uintptr) {
			for {
				n, err := unix.Read(int(fd), buf)
				if n <= 0 || err != nil {
					return
				}
				w, _ := f.Write(buf[:min(int64(n), c.room)])
				c.room -= int64(w)
			}
		})
	}
	c.fifo.Close()
}

// abort closes one that never ran.
func (c *console) abort() {
	c.fifo.Close()
	c.file.Close()
}

// stop ends it at once.
func (c *console) stop() {
	c.fifo.Close()
	<-c.done
}
