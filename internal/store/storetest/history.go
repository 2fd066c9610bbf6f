package storetest

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

func events(t *testing.T, s control.Store) {
	ctx := t.Context()
	e := control.Event{
		SandboxID: "a1", At: base, Type: control.EventPause, Status: control.StatusPaused,
		Duration: 1500 * time.Microsecond, Detail: "dé", Error: "why", RequestID: "r-1",
	}
	want(t, s.AddEvent(ctx, e), control.ErrNotFound)
	must(t, s.CreateSandbox(ctx, sample("a1")))
	must(t, s.CreateSandbox(ctx, sample("b2")))
	must(t, s.AddEvent(ctx, e))
	other := e
	other.SandboxID, other.Type = "b2", control.EventResume
	must(t, s.AddEvent(ctx, other))
	must(t, s.AddEvent(ctx, control.Event{SandboxID: "a1", At: base, Type: control.EventDelete, Status: control.StatusStopped}))
	got, err := s.ListEvents(ctx, "a1", 0, 10)
	must(t, err)
	e.Seq = 1
	same(t, got, []control.Event{e, {SandboxID: "a1", Seq: 2, At: base, Type: control.EventDelete, Status: control.StatusStopped}})
	got, err = s.ListEvents(ctx, "a1", 1, 10)
	must(t, err)
	if len(got) != 1 || got[0].Seq != 2 {
		t.Fatalf("after 1: %+v", got)
	}
	got, err = s.ListEvents(ctx, "a1", 0, 1)
	must(t, err)
	if len(got) != 1 || got[0].Seq != 1 {
		t.Fatalf("one: %+v", got)
	}
	// The version is the row's alone, and the log goes with the row.
	sb, err := s.GetSandbox(ctx, "a1")
	must(t, err)
	same(t, sb.Version, int64(1))
	must(t, s.DeleteSandbox(ctx, "a1", 1))
	got, err = s.ListEvents(ctx, "a1", 0, 10)
	must(t, err)
	if len(got) != 0 {
		t.Fatalf("of a deleted row: %+v", got)
	}
}

func waits(t *testing.T, s control.Store) {
	ctx := t.Context()
	note := func(id string, typ control.EventType, why string) {
		t.Helper()
		must(t, s.AddEvent(ctx, control.Event{SandboxID: id, At: base, Type: typ, Status: control.StatusRunning, Error: why}))
	}
	for _, id := range []string{"on", "off", "again", "never", "gone"} {
		must(t, s.CreateSandbox(ctx, sample(id)))
		note(id, control.EventCreate, "")
	}
	got, err := s.ListWaits(ctx)
	must(t, err)
	if len(got) != 0 {
		t.Fatalf("of logs without one: %+v", got)
	}
	for _, id := range []string{"on", "off", "again", "gone"} {
		note(id, control.EventWait, "first")
	}
	note("off", control.EventGoOn, "")
	note("again", control.EventGoOn, "")
	note("again", control.EventWait, "second")
	note("on", control.EventPause, "failed") // says nothing of it
	must(t, s.DeleteSandbox(ctx, "gone", 1))
	got, err = s.ListWaits(ctx)
	must(t, err)
	wait := control.Event{At: base, Type: control.EventWait, Status: control.StatusRunning}
	again, on := wait, wait
	again.SandboxID, again.Seq, again.Error = "again", 4, "second"
	on.SandboxID, on.Seq, on.Error = "on", 2, "first"
	same(t, got, []control.Event{again, on})
}

func eventsAreBounded(t *testing.T, s control.Store) {
	ctx := t.Context()
	must(t, s.CreateSandbox(ctx, sample("a1")))
	const more = 7
	for range control.MaxEvents + more {
		must(t, s.AddEvent(ctx, control.Event{SandboxID: "a1", At: base, Type: control.EventTimeout}))
	}
	got, err := s.ListEvents(ctx, "a1", 0, 2*control.MaxEvents)
	must(t, err)
	if len(got) != control.MaxEvents || got[0].Seq != more+1 || got[len(got)-1].Seq != control.MaxEvents+more {
		t.Fatalf("%d events, from %d", len(got), got[0].Seq)
	}
}

func eventsAtOnce(t *testing.T, s control.Store) {
	ctx := t.Context()
	must(t, s.CreateSandbox(ctx, sample("a1")))
	errs := make([]error, 20)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			errs[i] = s.AddEvent(ctx, control.Event{SandboxID: "a1", At: base, Type: control.EventPause, Detail: fmt.Sprint(i)})
		})
	}
	wg.Wait()
	for _, err := range errs {
		must(t, err)
	}
	got, err := s.ListEvents(ctx, "a1", 0, 100)
	must(t, err)
	if len(got) != len(errs) || got[len(got)-1].Seq != int64(len(errs)) {
		t.Fatalf("%d events, the last %+v", len(got), got[len(got)-1])
	}
}

func answers(t *testing.T, s control.Store) {
	ctx := t.Context()
	a := control.Answer{Scope: "key", Name: "n", Digest: "d", CreatedAt: base}
	want(t, s.FinishAnswer(ctx, a), control.ErrNotFound)
	_, err := s.ClaimAnswer(ctx, a)
	must(t, err)
	got, err := s.ClaimAnswer(ctx, control.Answer{Scope: "key", Name: "n", Digest: "other", CreatedAt: base.Add(time.Hour)})
	want(t, err, control.ErrExists)
	same(t, got, a)
	_, err = s.ClaimAnswer(ctx, control.Answer{Scope: "key2", Name: "n", Digest: "d", CreatedAt: base.Add(time.Hour)})
	must(t, err)
	a.Status, a.Location, a.Body = 201, "/x", `{"é":1}`
	must(t, s.FinishAnswer(ctx, a))
	got, err = s.ClaimAnswer(ctx, a)
	want(t, err, control.ErrExists)
	same(t, got, a)
	n, err := s.PruneAnswers(ctx, base.Add(time.Minute))
	must(t, err)
	same(t, n, int64(1))
	_, err = s.ClaimAnswer(ctx, a)
	must(t, err)
	must(t, s.DropAnswer(ctx, a.Scope, a.Name))
	must(t, s.DropAnswer(ctx, a.Scope, a.Name))
	winners := make([]error, 20)
	var wg sync.WaitGroup
	for i := range winners {
		wg.Go(func() { _, winners[i] = s.ClaimAnswer(ctx, a) })
	}
	wg.Wait()
	won := 0
	for _, err := range winners {
		if err == nil {
			won++
		} else {
			want(t, err, control.ErrExists)
		}
	}
	same(t, won, 1)
}
