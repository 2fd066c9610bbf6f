package vmmtest

import (
	"errors"
	"io"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

func fakeSubject(f *Fake) Subject {
	return Subject{
		Driver: f, Patience: time.Minute,
		Boot: vmm.BootArgs{Kernel: "/dev/null", Spec: vmm.Spec{VCPUs: 1, MemoryMB: 64, MAC: "02:77:72:00:00:02"}},
	}
}

func TestFakeConforms(t *testing.T) { Run(t, fakeSubject(NewFake())) }

// TestFakeFails: each method fails when it was told to, once, and the machine
// is as whole as it was.
func TestFakeFails(t *testing.T) {
	f := NewFake()
	s := fakeSubject(f)
	ctx := s.context(t)
	errTest := errors.New("told to")
	f.Fail("Boot", 2, errTest)
	a := s.Args(t)
	m, err := f.Boot(ctx, a)
	must(t, err)
	t.Cleanup(func() { _ = m.Kill(ctx) })
	if _, err := f.Boot(ctx, s.Args(t)); !errors.Is(err, errTest) {
		t.Errorf("the second Boot: %v", err)
	}
	for method, call := range map[string]func() error{
		"Pause":     func() error { return m.Pause(ctx) },
		"Continue":  func() error { return m.Continue(ctx) },
		"SaveState": func() error { return m.SaveState(ctx, io.Discard) },
		"Kill":      func() error { return m.Kill(ctx) },
	} {
		f.Fail(method, 1, errTest)
		if err := call(); !errors.Is(err, errTest) {
			t.Errorf("%s: %v", method, err)
		}
	}
	must(t, m.Continue(ctx))
	s.WaitTicks(t, m, len(Ticks(t, m.Record().ConsolePath))+2)
	must(t, f.End(a.ID, vmm.ReasonPanic))
	gone(t, m, s.Patience, vmm.ReasonPanic)
	if calls := f.Calls(); calls[0] != "Boot "+a.ID {
		t.Errorf("the transcript begins with %q", calls[0])
	}
}
