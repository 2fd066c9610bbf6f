package pager

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
)

// keeperRig is a directory in which pagers run as processes of their own.
func keeperRig(t *testing.T) (*rig, KeeperOptions) {
	t.Helper()
	r := newRig(t, 4)
	must(t, r.srv.Close())
	t.Setenv(roleEnv, "pager")
	must(t, os.RemoveAll(filepath.Join(r.dir, "run")))
	exe, err := os.Executable()
	must(t, err)
	socket := filepath.Join(r.dir, "pager.sock")
	return r, KeeperOptions{
		Command: []string{exe, r.dir, socket}, Socket: socket,
		LogPath: filepath.Join(r.dir, "pager.log"), Logger: slog.New(slog.DiscardHandler),
	}
}

func TestKeeperReplacesAPagerOfAnotherVersion(t *testing.T) {
	r, o := keeperRig(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var first int
	keep := func(version string) *Keeper {
		t.Helper()
		t.Setenv(versionEnv, version)
		o.Version = version
		k, err := Keep(ctx, o)
		must(t, err)
		s, err := k.Client().GetStatus(ctx, connect.NewRequest(&pagerv1.GetStatusRequest{}))
		must(t, err)
		if s.Msg.Version != version || int(s.Msg.Pid) != k.PID() {
			t.Errorf("the pager says %v, want version %s of process %d", s.Msg, version, k.PID())
		}
		return k
	}
	k := keep("old")
	first = k.PID()
	prep, err := k.Client().PrepareMemory(ctx, connect.NewRequest(&pagerv1.PrepareMemoryRequest{SandboxId: "s", ImageId: r.image.String()}))
	must(t, err)
	v := startVMM(t)
	v.do("share /proc/%d/fd/%d %d", prep.Msg.Pid, prep.Msg.Fd, len(r.content))
	_, err = k.Client().AttachMemory(ctx, connect.NewRequest(&pagerv1.AttachMemoryRequest{SandboxId: "s", Pid: int32(v.pid())}))
	must(t, err)
	k.Close() // as the old program ends
	k = keep("old")
	if k.PID() != first {
		t.Error("a pager of our own version was replaced")
	}
	k.Close()
	k = keep("new")
	if k.PID() == first {
		t.Error("the pager of another version serves on")
	}
	v.wantSum(r.content)
	v.kill()
	must(t, k.Stop())
}

// said tells when a message was logged.
type said struct {
	slog.Handler
	text string
	when chan struct{}
}

func (s said) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, s.text) {
		select {
		case s.when <- struct{}{}:
		default: // once is enough
		}
	}
	return nil
}

func (said) Enabled(context.Context, slog.Level) bool { return true }

func TestKeeperDoesNotGiveUp(t *testing.T) {
	_, o := keeperRig(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// A program that can be taken away and put back.
	program := filepath.Join(filepath.Dir(o.Socket), "program")
	exe := o.Command[0]
	must(t, os.Symlink(exe, program))
	o.Command[0] = program
	failed := said{slog.DiscardHandler, "no pager runs", make(chan struct{}, 1)}
	o.Logger = slog.New(failed)
	k, err := Keep(ctx, o)
	must(t, err)
	stopped := false
	t.Cleanup(func() { // a test that fails leaves no pager either
		if !stopped {
			_ = k.Stop()
		}
	})
	first := k.PID()
	must(t, os.Remove(program))
	must(t, unix.Kill(first, unix.SIGKILL))
	select {
	case <-failed.when:
	case <-ctx.Done():
		t.Fatal("the failed start was not told")
	}
	// A call made now is answered by the next one.
	answered := make(chan error, 1)
	go func() {
		_, err := k.Client().GetStatus(ctx, connect.NewRequest(&pagerv1.GetStatusRequest{}))
		answered <- err
	}()
	must(t, os.Symlink(exe, program))
	for k.PID() == first {
		if ctx.Err() != nil {
			t.Fatal("no other pager was started")
		}
		unix.Nanosleep(&unix.Timespec{Nsec: 5e6}, nil) // there is no event for it
	}
	must(t, <-answered)
	stopped = true
	must(t, k.Stop())
}
