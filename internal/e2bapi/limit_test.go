package e2bapi_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/e2bapi"
)

// later is a refusal as the limiter of keys makes it.
type later struct{}

func (later) Error() string      { return "too many" }
func (later) RetryAfter() string { return "7" }
func (later) Unwrap() error {
	return &control.Error{Code: control.CodeRateLimited, Message: "too many requests"}
}

func TestAKeyIsBounded(t *testing.T) {
	s := setup(t)
	underway, refuse := 0, false
	h := e2bapi.New(e2bapi.Options{Service: s.svc, Limit: func(key string) (func(), error) {
		if key == "" {
			t.Error("a request without the ID of its key")
		}
		if refuse {
			return nil, later{}
		}
		underway++
		return func() { underway-- }, nil
	}})
	get := func(key string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(t.Context(), "GET", "/v2/sandboxes", nil)
		r.Header.Set("X-API-Key", key)
		h.ServeHTTP(w, r)
		return w
	}
	if w := get(s.key); w.Code != http.StatusOK || underway != 0 {
		t.Errorf("%d, and %d requests are under way after it", w.Code, underway)
	}
	refuse = true
	w := get(s.key)
	if w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") != "7" || !strings.Contains(w.Body.String(), `"code":429`) {
		t.Errorf("refused with %d, %v, %s", w.Code, w.Header(), w.Body)
	}
	if w := get("wrn_nobody"); w.Code != http.StatusUnauthorized {
		t.Errorf("a stranger is counted: %d", w.Code)
	}
}

// A client sends again by itself what failed for now, and must not when nobody
// knows whether it was done.
func TestWhatMayHaveHappenedIsNotSentAgain(t *testing.T) {
	s := setup(t)
	for _, uncertain := range []bool{false, true} {
		s.host.Fail("create", &control.Error{Code: control.CodeHostUnavailable, Message: "no answer", Err: errors.New("x"), Uncertain: uncertain})
		status, h, _ := s.do(t, "POST", "/v2/sandboxes", `{"templateID":"base"}`)
		if status != 503 || (h.Get("Should-Retry") == "false") != uncertain {
			t.Errorf("uncertain %v: %d, Should-Retry %q", uncertain, status, h.Get("Should-Retry"))
		}
	}
}
