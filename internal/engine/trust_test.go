package engine_test

import (
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/egress"
	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/engine/enginetest"
)

// A guest trusts the host's certificates before its requests are taken: from the
// create, the change or the resume on. One that cannot write them down is not
// changed, and a resume does not fail for it.
func TestGuestsTrustTheHostWhereHeadersAreSet(t *testing.T) {
	h := enginetest.New(t)
	e := h.Start(nil)
	ctx := t.Context()
	headers := &engine.Egress{Headers: egress.Rules{"a.example": {"X-Key": "secret"}}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	wants := func(id string, n int) {
		t.Helper()
		if got := h.Trusts(id); got != n {
			t.Errorf("%s was given the certificate %d times, want %d", id, got, n)
		}
	}
	_, _, err := e.Create(ctx, engine.CreateSpec{ID: "plain", Template: enginetest.BaseName})
	must(err)
	wants("plain", 0)
	_, _, err = e.Create(ctx, engine.CreateSpec{ID: "a", Template: enginetest.BaseName, Egress: headers})
	must(err)
	wants("a", 1)
	must(e.SetEgress(ctx, "plain", headers))
	wants("plain", 1)
	_, _, err = e.Pause(ctx, "a")
	must(err)

	h.RefuseTrust(true)
	_, _, err = e.Resume(ctx, "a", false)
	must(err)
	must(e.SetEgress(ctx, "plain", nil))
	if err := e.SetEgress(ctx, "plain", headers); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("a guest that cannot trust the host: %v", err)
	}
	h.RefuseTrust(false)
	must(e.SetEgress(ctx, "a", headers))
	wants("a", 2)
	for _, bad := range []egress.Rules{{"*": {}}, {"a.example": {"Host": "b.example"}}} {
		if err := e.SetEgress(ctx, "a", &engine.Egress{Headers: bad}); err == nil {
			t.Errorf("%v was taken", bad)
		}
	}
}
