package main

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// pagerLogMost bounds the pager's log; as much again is kept of what came
// before.
const pagerLogMost = 8 << 20

// rotatingLog is a log file of bounded size: one that is full becomes PATH.1, in
// place of an older one, and a new one is begun.
type rotatingLog struct {
	path string
	most int64
	// over is told of each new file, before it is written to; nil: nobody is.
	over func(*os.File) error

	mu   sync.Mutex
	f    *os.File
	size int64
}

func openRotatingLog(path string, most int64, over func(*os.File) error) (*rotatingLog, error) {
	l := &rotatingLog{path: path, most: most, over: over}
	return l, l.open()
}

// open goes on with the file, or begins it. An error leaves the one before.
func (l *rotatingLog) open() error {
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	st, err := f.Stat()
	if err == nil && l.over != nil {
		err = l.over(f)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("open the log: %w", err), f.Close())
	}
	if l.f != nil {
		l.f.Close()
	}
	l.f, l.size = f, st.Size()
	return nil
}

// Write implements io.Writer. What cannot be rotated goes on to be written, up
// to twice the bound: then lines are lost.
func (l *rotatingLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size > 0 && l.size+int64(len(p)) > l.most {
		err := os.Rename(l.path, l.path+".1")
		if err == nil {
			err = l.open()
		}
		if err != nil && l.size+int64(len(p)) > 2*l.most {
			return 0, err
		}
	}
	n, err := l.f.Write(p)
	l.size += int64(n)
	return n, err
}

// ontoStandardOutputs makes a file this process's standard output and error, so
// that the last words of the runtime go there too.
func ontoStandardOutputs(f *os.File) error {
	for _, fd := range []int{1, 2} {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return err
		}
	}
	return nil
}
