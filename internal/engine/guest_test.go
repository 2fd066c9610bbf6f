package engine

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// dialSlot is a network slot whose guest is a server of the test.
type dialSlot struct {
	Slot
	addr string
	port atomic.Int64
}

func (s *dialSlot) OpenTap() (*os.File, error) { return nil, errors.New("no tap") }

func (s *dialSlot) Dial(ctx context.Context, port int) (net.Conn, error) {
	s.port.Store(int64(port))
	return (&net.Dialer{}).DialContext(ctx, "tcp", s.addr)
}

// guestThat returns a connection to a guest agent that answers by h.
func guestThat(t *testing.T, h http.HandlerFunc) *Guest {
	t.Helper()
	srv := httptest.NewServer(h)
	slot := &dialSlot{addr: srv.Listener.Addr().String()}
	g := newGuest(slot, "the-token")
	t.Cleanup(func() {
		g.close()
		srv.Close()
		if p := slot.port.Load(); p != 0 && p != envdPort {
			t.Errorf("the guest agent was called on port %d", p)
		}
	})
	return g
}

var theRequest = initRequest{Generation: "life-2", Fork: true, Hostname: "h", MachineID: "m", AccessToken: "the-token"}

// answer confirms the generation and all steps but one.
func answer(generation string, without string) string {
	r := initResponse{Generation: generation}
	for _, s := range confirmSteps {
		if s != without {
			r.Steps = append(r.Steps, s)
		}
	}
	b, _ := json.Marshal(r)
	return string(b)
}

func TestGuestIsConfirmedByEveryStep(t *testing.T) {
	var entropy []string
	calls := 0
	g := guestThat(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Access-Token") != "the-token" {
			t.Errorf("token %q", r.Header.Get("X-Access-Token"))
		}
		var req initRequest
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.Generation != "life-2" || !req.Fork || req.TimeUnixNano != "42" {
			t.Errorf("asked with %+v, %v", req, err)
		}
		entropy = append(entropy, req.Entropy)
		if calls++; calls == 1 { // as one that is still starting
			conn, _, _ := w.(http.Hijacker).Hijack()
			conn.Close()
			return
		}
		io.WriteString(w, answer("life-2", ""))
	})
	now := func() time.Time { return time.Unix(0, 42) }
	if _, err := g.confirm(t.Context(), nil, theRequest, now); err != nil {
		t.Fatal(err)
	}
	if len(entropy) != 2 || entropy[0] == entropy[1] {
		t.Errorf("entropy of two attempts: %q", entropy)
	}
	if b, err := base64.StdEncoding.DecodeString(entropy[1]); err != nil || len(b) < 32 {
		t.Errorf("%d bytes of entropy, %v", len(b), err)
	}
}

func TestGuestThatDoesNotConfirmIsRefused(t *testing.T) {
	type refusal struct {
		name, body string
		status     int
		names      string
	}
	cases := []refusal{
		{"another life", answer("life-1", ""), 200, `"life-1"`},
		{"no answer of ours", "<html>", 200, "not JSON"},
		{"nothing", "", 200, "not JSON"},
		{"an error", "boom\nand a forged log line", 500, "500: boom"},
		{"no right", "wrong token", 401, "401: wrong token"},
		{"too much", answer("life-2", "") + strings.Repeat(" ", maxAnswer) + "x", 200, ""},
		{"control characters", "\xff\xfe", 503, "503: ?"},
	}
	for _, step := range confirmSteps {
		cases = append(cases, refusal{"without " + step, answer("life-2", step), 200, `the step "` + step + `"`})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			g := guestThat(t, func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(c.status)
				io.WriteString(w, c.body)
			})
			_, err := g.confirm(t.Context(), nil, theRequest, time.Now)
			if c.name == "too much" { // cut at the bound, what is within it counts
				if err != nil {
					t.Errorf("a padded answer: %v", err)
				}
				return
			}
			var refused *refusedError
			if !errors.As(err, &refused) || !strings.Contains(err.Error(), c.names) {
				t.Fatalf("%v, want a refusal that names %q", err, c.names)
			}
			if strings.Contains(err.Error(), "forged") {
				t.Errorf("%q carries more than a line of the guest's words", err)
			}
		})
	}
}

func TestGuestThatNeverAnswersIsNotWaitedForBeyondItsVM(t *testing.T) {
	asked := make(chan struct{}, 1)
	release := make(chan struct{})
	g := guestThat(t, func(w http.ResponseWriter, r *http.Request) {
		select {
		case asked <- struct{}{}:
		default:
		}
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	defer close(release)
	t.Run("the limit", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-asked; cancel() }()
		if _, err := g.confirm(ctx, nil, theRequest, time.Now); err == nil || !strings.Contains(err.Error(), "does not answer") {
			t.Errorf("%v", err)
		}
	})
	t.Run("the VM's end", func(t *testing.T) {
		ended := make(chan struct{})
		close(ended)
		g := guestThat(t, func(w http.ResponseWriter, _ *http.Request) {
			conn, _, _ := w.(http.Hijacker).Hijack()
			conn.Close()
		})
		if _, err := g.confirm(t.Context(), ended, theRequest, time.Now); err == nil || !strings.Contains(err.Error(), "the VM ended") {
			t.Errorf("%v", err)
		}
	})
}

func TestCallsIntoAGuestEndWithItsRun(t *testing.T) {
	asked := make(chan struct{})
	g := guestThat(t, func(_ http.ResponseWriter, r *http.Request) {
		close(asked)
		<-r.Context().Done()
	})
	go func() { <-asked; g.close() }()
	if _, err := g.HTTP(t.Context(), http.MethodGet, "/files", nil); err == nil {
		t.Error("a call outlived the run")
	}
	c, err := g.dial(t.Context(), envdPort)
	if err != nil {
		return // refused at once is as good
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlives the run")
	}
}

// TestASlowGuestIsGivenTimeAndTheRightTime: one that needs longer for its first
// answer than the first attempt lasts is not asked anew for ever, and is told
// the time once more when it has answered late.
func TestASlowGuestIsGivenTimeAndTheRightTime(t *testing.T) {
	const patience = 300 * time.Millisecond
	var calls atomic.Int64
	g := guestThat(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		limit := time.After(map[int64]time.Duration{1: time.Hour, 2: patience + patience/3}[calls.Add(1)])
		select {
		case <-limit:
		case <-r.Context().Done():
			return
		}
		var req initRequest
		if err := json.Unmarshal(body, &req); err != nil {
			t.Error(err)
		}
		io.WriteString(w, answer(req.Generation, ""))
	})
	g.patience = patience
	if _, err := g.confirm(t.Context(), make(chan struct{}), theRequest, time.Now); err != nil {
		t.Fatal(err)
	}
	// Once in vain, once answered late, and once more with the right time. A
	// busy machine may need more.
	if n := calls.Load(); n < 3 {
		t.Errorf("it was asked %d times, want 3", n)
	}
}
