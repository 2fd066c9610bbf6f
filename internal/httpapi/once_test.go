package httpapi_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/httpapi"
)

// ask sends a POST with idempotency keys.
func (s *server) ask(t *testing.T, path, body string, keys ...string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "POST", s.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", s.key)
	for _, k := range keys {
		req.Header.Add("Idempotency-Key", k)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{status: res.StatusCode, header: res.Header, body: b}
}

func TestSameKeySameAnswer(t *testing.T) {
	t.Parallel()
	s := setup(t)
	first := s.ask(t, "/v1/sandboxes", `{"metadata":{"a":"b"}}`, "k-1")
	if first.status != 201 || first.header.Get("Idempotent-Replayed") != "" {
		t.Fatalf("%d %s", first.status, first.body)
	}
	again := s.ask(t, "/v1/sandboxes", `{"metadata":{"a":"b"}}`, "k-1")
	if again.status != 201 || string(again.body) != string(first.body) || again.header.Get("Idempotent-Replayed") != "true" ||
		again.header.Get("Location") != first.header.Get("Location") || again.header.Get("Content-Type") != "application/json" {
		t.Errorf("%d %v %s, was %s", again.status, again.header, again.body, first.body)
	}
	if n := len(s.host.IDs()); n != 1 {
		t.Errorf("%d sandboxes", n)
	}
	for path, body := range map[string]string{
		"/v1/sandboxes":     `{"metadata":{"a":"c"}}`,
		"/v1/sandboxes?x=1": `{"metadata":{"a":"b"}}`,
		"/v1/snapshots":     `{"metadata":{"a":"b"}}`,
	} {
		a := s.ask(t, path, body, "k-1")
		if code, message := a.code(t); a.status != 409 || code != "conflict" || !strings.Contains(message, "Idempotency-Key:") {
			t.Errorf("%s %s under the same key: %d %s", path, body, a.status, a.body)
		}
	}
	if other := s.ask(t, "/v1/sandboxes", `{"metadata":{"a":"b"}}`, "k-2"); string(other.body) == string(first.body) {
		t.Error("another key got the same answer")
	}
}

func TestAnErrorIsNotKept(t *testing.T) {
	t.Parallel()
	s := setup(t)
	id := s.create(t, m{}).ID
	if a := s.ask(t, "/v1/sandboxes/"+id+"/resume", ``, "r"); a.status != 409 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	s.want(t, "POST", "/v1/sandboxes/"+id+"/pause", nil, 200)
	if a := s.ask(t, "/v1/sandboxes/"+id+"/resume", ``, "r"); a.status != 200 || a.header.Get("Idempotent-Replayed") != "" {
		t.Errorf("%d %v %s", a.status, a.header, a.body)
	}
	// It runs, and the answer is that of then.
	if a := s.ask(t, "/v1/sandboxes/"+id+"/resume", ``, "r"); a.status != 200 || a.header.Get("Idempotent-Replayed") != "true" {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestManyAtOnceUnderOneKeyAreDoneOnce(t *testing.T) {
	t.Parallel()
	s := setup(t)
	var wg sync.WaitGroup
	answers := make([]answer, 30)
	for i := range answers {
		wg.Go(func() { answers[i] = s.ask(t, "/v1/sandboxes", `{}`, "same") })
	}
	wg.Wait()
	for _, a := range answers {
		if a.status != 201 || string(a.body) != string(answers[0].body) {
			t.Errorf("%d %s, want %s", a.status, a.body, answers[0].body)
		}
	}
	if n := len(s.host.IDs()); n != 1 {
		t.Errorf("%d sandboxes", n)
	}
}

func TestBadIdempotencyKeys(t *testing.T) {
	t.Parallel()
	s := setup(t)
	for _, keys := range [][]string{{""}, {"a b"}, {"é"}, {strings.Repeat("x", 256)}, {"a", "b"}} {
		a := s.ask(t, "/v1/sandboxes", `{}`, keys...)
		if code, message := a.code(t); a.status != 400 || code != "invalid_request" || !strings.HasPrefix(message, "Idempotency-Key:") {
			t.Errorf("%q: %d %s", keys, a.status, a.body)
		}
	}
	if n := len(s.host.IDs()); n != 0 {
		t.Errorf("%d sandboxes", n)
	}
}

func TestTooManyRequestsAreRefusedWithATime(t *testing.T) {
	t.Parallel()
	s := setup(t)
	s.serve(t, httpapi.Limits{PerSecond: 0.5, Burst: 3, Concurrent: 10})
	for range 3 {
		s.want(t, "GET", "/v1/sandboxes", nil, 200)
	}
	a := s.want(t, "GET", "/v1/sandboxes", nil, 429)
	if code, message := a.code(t); code != "rate_limited" || message == "" {
		t.Errorf("%s", a.body)
	}
	if after := a.header.Get("Retry-After"); after != "2" && after != "1" {
		t.Errorf("Retry-After: %q", after)
	}
	s.want(t, "GET", "/healthz", nil, 200) // probes have no key and no limit
}

func TestTooMuchUnderWayIsRefused(t *testing.T) {
	t.Parallel()
	s := setup(t)
	s.serve(t, httpapi.Limits{Concurrent: 2})
	p := "/v1/sandboxes/" + s.create(t, m{}).ID
	// Uploads whose bodies do not end. The first byte is asked for by the server,
	// in a request that counts then.
	uploads := &http.Client{Transport: &http.Transport{ExpectContinueTimeout: time.Hour}}
	hold := make([]io.Closer, 0, 2)
	for range 2 {
		r, w := io.Pipe()
		req, _ := http.NewRequestWithContext(t.Context(), "PUT", s.URL+p+"/files?path=/x", r)
		req.Header.Set("X-API-Key", s.key)
		req.Header.Set("Expect", "100-continue")
		go func() {
			res, err := uploads.Do(req)
			if err == nil {
				res.Body.Close()
			}
			r.CloseWithError(errors.New("the upload has ended"))
		}()
		if _, err := fmt.Fprint(w, "begun"); err != nil {
			t.Fatal(err)
		}
		hold = append(hold, w)
	}
	refused := s.call(t, "GET", p, nil)
	if code, _ := refused.code(t); code != "rate_limited" || refused.header.Get("Retry-After") == "" {
		t.Errorf("%d %s", refused.status, refused.body)
	}
	for _, h := range hold {
		h.Close()
	}
	for range 10000 {
		if s.call(t, "GET", p, nil).status == 200 {
			return
		}
	}
	t.Error("the ended requests still count")
}

func TestEventsTellWhatHappened(t *testing.T) {
	t.Parallel()
	s := setup(t)
	id := s.create(t, m{}).ID
	p := "/v1/sandboxes/" + id
	s.want(t, "POST", p+"/pause", nil, 200)
	s.want(t, "POST", p+"/resume", nil, 200)
	s.want(t, "POST", p+"/timeout", m{"timeout_sec": 60}, 200)
	s.want(t, "POST", "/v1/snapshots", m{"sandbox_id": id, "name": "ev"}, 201)
	s.want(t, "POST", p+"/fork", m{"count": 1}, 201)
	s.want(t, "DELETE", p, nil, 204)
	type page struct {
		Events []struct {
			Seq       int64
			Type      string
			Status    string
			RequestID string `json:"request_id"`
		}
		NextCursor string `json:"next_cursor"`
	}
	var got []string
	cursor := ""
	for {
		var pg page
		s.want(t, "GET", p+"/events?limit=3"+cursor, nil, 200).decode(t, &pg)
		if len(pg.Events) == 0 {
			break
		}
		for _, e := range pg.Events {
			got = append(got, e.Type+":"+e.Status)
			if e.Seq != int64(len(got)) || e.RequestID == "" {
				t.Errorf("%+v", e)
			}
		}
		cursor = "&cursor=" + pg.NextCursor
	}
	want := "create:running pause:paused resume:running timeout:running snapshot:running fork:running delete:stopped"
	if strings.Join(got, " ") != want {
		t.Errorf("%v, want %s", got, want)
	}
	s.want(t, "GET", p, nil, 404) // it is gone, its log is not
	s.want(t, "GET", "/v1/sandboxes/nosuch/events", nil, 404)
	for _, q := range []string{"?cursor=%21", "?cursor=LTE", "?limit=0", "?x=1"} {
		s.want(t, "GET", p+"/events"+q, nil, 400)
	}
}
