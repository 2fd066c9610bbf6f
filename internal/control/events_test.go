package control_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
)

// log gives a sandbox's events as words.
func (f *fixture) log(t *testing.T, id string) string {
	t.Helper()
	list, err := f.Events(t.Context(), id, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range list {
		fmt.Fprintf(&b, "%s:%s", e.Type, e.Status)
		if e.Error != "" {
			fmt.Fprintf(&b, "(%s)", e.Error)
		}
		b.WriteByte(' ')
	}
	return strings.TrimSpace(b.String())
}

func TestEventsHaveTheReasonsOfFailures(t *testing.T) {
	t.Parallel()
	f := setup(t)
	ctx := control.WithRequestID(t.Context(), "req-7")
	sb := f.create(t, control.CreateParams{})
	f.host.Fail("pause", controltest.Err(control.CodeHostUnavailable, "the disk is full"))
	_, err := f.Pause(ctx, sb.ID)
	code(t, err, control.CodeHostUnavailable)
	_, err = f.Resume(ctx, sb.ID) // refused before anything is done: no event
	code(t, err, control.CodeInvalidState)
	f.host.Fail("pause", fmt.Errorf("secret path /x"))
	_, err = f.Pause(ctx, sb.ID)
	code(t, err, control.CodeInternal)
	want := "create:running pause:running(the disk is full) pause:running(an internal error; the log has the details)"
	if got := f.log(t, sb.ID); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	list, _ := f.Events(t.Context(), sb.ID, 1, 1)
	if len(list) != 1 || list[0].RequestID != "req-7" {
		t.Errorf("%+v", list)
	}
}

func TestEventsOfWhatNobodyAskedFor(t *testing.T) {
	t.Parallel()
	f := setup(t)
	died := f.create(t, control.CreateParams{})
	f.host.Crash(died.ID, "killed by signal 9")
	f.host.Put(control.HostSandbox{ID: "stranger", State: control.HostRunning, VCPUs: 1, MemoryMB: 128})
	if _, err := f.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := f.log(t, died.ID); got != "create:running found:error(killed by signal 9)" {
		t.Error(got)
	}
	if got := f.log(t, "stranger"); got != "adopt:running" {
		t.Error(got)
	}
	f.run(t)
	limited := f.create(t, control.CreateParams{TimeoutSec: 5})
	f.clock.WaitTimer(5 * time.Second)
	f.clock.Advance(5 * time.Second)
	await(t, "it is deleted", func() bool { return f.log(t, limited.ID) == "create:running expire:running delete:stopped" })
}

func TestEventsTellOfASandboxThatStandsStill(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	f.run(t)
	noted := "create:running"
	for _, c := range []struct{ why, event string }{
		{"no room", " wait:running(no room)"}, {"no room", ""}, // said twice, noted once
		{"", " go_on:running"}, {"again", " wait:running(again)"},
	} {
		noted += c.event
		f.host.SetWaiting(sb.ID, c.why)
		await(t, "it is noted: "+noted, func() bool { return f.log(t, sb.ID) == noted })
	}
}

// The next process tells that it goes on, though it never saw it stand still.
func TestEventsTellOfAWaitThatEndedBetweenTwoProcesses(t *testing.T) {
	t.Parallel()
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	stop := f.run(t)
	f.host.SetWaiting(sb.ID, "no room")
	await(t, "it is noted", func() bool { return f.log(t, sb.ID) == "create:running wait:running(no room)" })
	stop()
	f.host.SetWaiting(sb.ID, "")
	f.Service = f.again(t)
	f.run(t)
	await(t, "it goes on", func() bool { return f.log(t, sb.ID) == "create:running wait:running(no room) go_on:running" })
}

func TestARequestCutOffByTheServersEndIsAConflict(t *testing.T) {
	t.Parallel()
	f := setup(t)
	ask := control.Answer{Scope: "k", Name: "n", Digest: control.RequestDigest("POST", "/v1/sandboxes", []byte("{}"))}
	// The process ends between the claim and the answer.
	if _, err := f.store.ClaimAnswer(t.Context(), ask); err != nil {
		t.Fatal(err)
	}
	ran := false
	_, _, err := f.again(t).Once(t.Context(), ask, func() control.Answer { ran = true; return control.Answer{} })
	code(t, err, control.CodeConflict)
	if ran {
		t.Error("the work was done again")
	}
}

func TestAPanicTakesTheClaimBack(t *testing.T) {
	t.Parallel()
	f := setup(t)
	ask := control.Answer{Scope: "k", Name: "n", Digest: "d"}
	func() {
		defer func() { _ = recover() }()
		_, _, _ = f.Once(t.Context(), ask, func() control.Answer { panic("boom") })
	}()
	got, replayed, err := f.Once(t.Context(), ask, func() control.Answer { return control.Answer{Status: http.StatusOK, Body: "b"} })
	if err != nil || replayed || got.Body != "b" {
		t.Errorf("%+v, %v, %v", got, replayed, err)
	}
}

func TestKeptAnswersGoAfterADay(t *testing.T) {
	t.Parallel()
	f := setup(t)
	ask := control.Answer{Scope: "k", Name: "n", Digest: "d"}
	times := 0
	once := func() bool {
		_, replayed, err := f.Once(t.Context(), ask, func() control.Answer { times++; return control.Answer{Status: 201} })
		if err != nil {
			t.Fatal(err)
		}
		return replayed
	}
	once()
	f.clock.Advance(control.KeepAnswers - time.Minute)
	if _, err := f.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !once() {
		t.Error("forgotten too early")
	}
	f.clock.Advance(2 * time.Minute)
	if _, err := f.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if once() || times != 2 {
		t.Errorf("kept for longer than said; done %d times", times)
	}
}
