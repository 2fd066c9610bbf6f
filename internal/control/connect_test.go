package control_test

import (
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
)

func TestConnectOnlyEverProlongsARunningSandbox(t *testing.T) {
	f := setup(t)
	sb := f.create(t, control.CreateParams{TimeoutSec: 300})
	same, resumed, err := f.Connect(t.Context(), sb.ID, control.ConnectParams{TimeoutSec: 10})
	if err != nil || resumed || !same.ExpiresAt.Equal(sb.ExpiresAt) || same.Version != sb.Version {
		t.Errorf("a shorter limit changed the sandbox: %v, %v, %+v", resumed, err, same)
	}
	longer, _, err := f.Connect(t.Context(), sb.ID, control.ConnectParams{TimeoutSec: 600})
	if err != nil || !longer.ExpiresAt.Equal(f.clock.Now().Add(600*time.Second).UTC()) {
		t.Errorf("a longer limit: %v, %v", longer.ExpiresAt, err)
	}
	shorter, err := f.SetDeadline(t.Context(), sb.ID, 5)
	if err != nil || !shorter.ExpiresAt.Before(sb.ExpiresAt) {
		t.Errorf("SetDeadline must shorten, too: %v, %v", shorter.ExpiresAt, err)
	}
}

func TestADiskOnlyPauseMakesTheNextResumeABoot(t *testing.T) {
	f := setup(t)
	sb := f.create(t, control.CreateParams{TimeoutSec: 300})
	for _, c := range []struct{ diskOnly, reboot, want bool }{
		{false, false, false}, {true, false, true}, {false, false, false}, {false, true, true},
	} {
		if _, err := f.PauseSettled(t.Context(), sb.ID, c.diskOnly); err != nil {
			t.Fatal(err)
		}
		_, resumed, err := f.Connect(t.Context(), sb.ID, control.ConnectParams{TimeoutSec: 60, Reboot: c.reboot})
		if err != nil || !resumed {
			t.Fatal(resumed, err)
		}
		if got := f.host.Rebooted(sb.ID); got != c.want {
			t.Errorf("%+v: rebooted %v", c, got)
		}
	}
	if _, err := f.PauseSettled(t.Context(), sb.ID, false); err != nil {
		t.Fatal(err)
	}
	if _, err := f.PauseSettled(t.Context(), sb.ID, false); control.CodeOf(err) != control.CodeInvalidState {
		t.Errorf("pausing what is paused: %v", err)
	}
}

func TestAPauseWaitsForTheOperationUnderWay(t *testing.T) {
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	release := f.host.Hold("snapshot")
	snapped := make(chan error, 1)
	go func() { _, err := f.CreateSnapshot(t.Context(), sb.ID, "s"); snapped <- err }()
	for f.host.Calls("snapshot") == 0 {
		time.Sleep(time.Millisecond)
	}
	paused := make(chan error, 1)
	go func() { _, err := f.PauseSettled(t.Context(), sb.ID, false); paused <- err }()
	select {
	case err := <-paused:
		t.Fatalf("the pause did not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	release()
	if err := <-snapped; err != nil {
		t.Error(err)
	}
	if err := <-paused; err != nil {
		t.Error(err)
	}
	if f.host.Overlaps() != 0 {
		t.Error("two operations at once")
	}
}

func TestTrafficWakesOnlyWhoAskedForIt(t *testing.T) {
	f := setup(t)
	plain := f.create(t, control.CreateParams{TimeoutSec: 60})
	waking := f.create(t, control.CreateParams{TimeoutSec: 60, Options: control.SandboxOptions{AutoResume: true}})
	for _, id := range []string{plain.ID, waking.ID} {
		if _, err := f.Pause(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Reach(t.Context(), plain.ID); control.CodeOf(err) != control.CodeInvalidState {
		t.Errorf("a paused sandbox: %v", err)
	}
	sb, err := f.Reach(t.Context(), waking.ID)
	if err != nil || sb.Status != control.StatusRunning {
		t.Errorf("one that wakes: %s, %v", sb.Status, err)
	}
	if _, err := f.PauseDisk(t.Context(), waking.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Reach(t.Context(), waking.ID); control.CodeOf(err) != control.CodeInvalidState {
		t.Errorf("traffic must not boot what was paused without memory: %v", err)
	}
}

func TestEgressIsCheckedAndKept(t *testing.T) {
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	for _, c := range []struct{ entry, want string }{
		{"example.com", "0.0.0.0/0"}, {"no name!", "name such as"}, {"com", "name such as"}, {"a.*.example", "name such as"}, {"2001:db8::1", "IPv4"}, {"10.0.0.0/33", "prefix"}, {"", "prefix"}, {"::ffff:10.0.0.1/128", "IPv4"},
	} {
		_, err := f.SetEgress(t.Context(), sb.ID, &control.Egress{Allow: []string{c.entry}})
		if control.CodeOf(err) != control.CodeInvalid || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v", c.entry, err)
		}
	}
	if _, err := f.SetEgress(t.Context(), sb.ID, &control.Egress{Deny: make([]string, control.MaxEgressRules+1)}); control.CodeOf(err) != control.CodeInvalid {
		t.Errorf("too many entries: %v", err)
	}
	if _, err := f.SetEgress(t.Context(), sb.ID, &control.Egress{Allow: []string{"192.0.2.1"}, Deny: []string{"0.0.0.0/0"}}); err != nil {
		t.Fatal(err)
	}
	closed := false
	for _, e := range []control.Egress{
		{Allow: []string{"*.Example.com.", "example.com"}, Deny: []string{"0.0.0.0/0"}}, {Allow: []string{"*.example.com", "example.com"}, Internet: &closed},
	} {
		if _, err := f.SetEgress(t.Context(), sb.ID, &e); err != nil || f.host.Egress(sb.ID).Allow[0] != "*.example.com" {
			t.Errorf("names: %+v, %v", f.host.Egress(sb.ID), err)
		}
	}
	if _, err := f.SetEgress(t.Context(), sb.ID, &control.Egress{Deny: []string{"example.com"}}); control.CodeOf(err) != control.CodeInvalid {
		t.Errorf("a name that is denied: %v", err)
	}
	if _, err := f.SetEgress(t.Context(), sb.ID, &control.Egress{Allow: []string{"192.0.2.1"}, Deny: []string{"0.0.0.0/0"}}); err != nil {
		t.Fatal(err)
	}
	got, err := f.again(t).Get(t.Context(), sb.ID)
	if err != nil || got.Options.Egress == nil || got.Options.Egress.Allow[0] != "192.0.2.1/32" {
		t.Errorf("after a restart: %+v, %v", got.Options.Egress, err)
	}
	if e := f.host.Egress(sb.ID); e == nil || e.Deny[0] != "0.0.0.0/0" {
		t.Errorf("on the host: %+v", e)
	}
	for _, c := range []struct {
		host, name, value, want string
	}{
		{"192.0.2.1", "X", "v", "host names"}, {"*", "X", "v", "name such as"}, {"com", "X", "v", "name such as"}, {"a.example", "a b", "v", "name of a header"},
		{"a.example", "host", "v", "delivered"}, {"a.example", "X", "v\nw", "characters"}, {"a.example", "X", "Bearer ${e2b.identity.tokens.aws}", "placeholder"},
		{"a.example", "X", strings.Repeat("v", 65<<10), "65536 bytes"},
	} {
		_, err := f.SetEgress(t.Context(), sb.ID, &control.Egress{Rules: map[string][]control.EgressRule{c.host: {{Headers: map[string]string{c.name: c.value}}}}})
		if control.CodeOf(err) != control.CodeInvalid || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "rules") {
			t.Errorf("%s %s: %v", c.host, c.name, err)
		}
	}
	twice := map[string][]control.EgressRule{"a.example": nil, "A.example": nil}
	if _, err := f.SetEgress(t.Context(), sb.ID, &control.Egress{Rules: twice}); control.CodeOf(err) != control.CodeInvalid {
		t.Errorf("a host in two spellings: %v", err)
	}
	f.host.Fail("egress", controltest.Err(control.CodeInternal, "no"))
	if _, err := f.SetEgress(t.Context(), sb.ID, nil); err == nil {
		t.Error("a host's refusal was hidden")
	}
	if got, _ := f.Get(t.Context(), sb.ID); got.Options.Egress == nil {
		t.Error("what the host refused was written down")
	}
}

func TestASandboxIsFoundByItsToken(t *testing.T) {
	f := setup(t)
	a, b := f.create(t, control.CreateParams{}), f.create(t, control.CreateParams{})
	for _, sb := range []control.Sandbox{a, b} {
		got, ok, err := f.FindByToken(t.Context(), func(tok string) bool { return tok == controltest.Token(sb.ID) })
		if err != nil || !ok || got.ID != sb.ID {
			t.Errorf("%s: %s, %v, %v", sb.ID, got.ID, ok, err)
		}
	}
	if err := f.Delete(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := f.FindByToken(t.Context(), func(tok string) bool { return tok == controltest.Token(a.ID) }); ok || err != nil {
		t.Errorf("a deleted sandbox: %v, %v", ok, err)
	}
}

func TestDialChecksBeforeItAsks(t *testing.T) {
	f := setup(t)
	sb := f.create(t, control.CreateParams{})
	for _, port := range []int{0, -1, 65536} {
		if _, err := f.Dial(t.Context(), sb.ID, port); control.CodeOf(err) != control.CodeInvalid {
			t.Errorf("port %d: %v", port, err)
		}
	}
	if f.host.Calls("dial") != 0 {
		t.Error("a bad port reached the host")
	}
	if _, err := f.Dial(t.Context(), sb.ID, 80); !errors.Is(err, control.ErrPortClosed) {
		t.Errorf("a closed port: %v", err)
	}
	f.host.OnDial(func(string, int) (net.Conn, error) { c, _ := net.Pipe(); return c, nil })
	c, err := f.Dial(t.Context(), sb.ID, 80)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
