package e2bapi_test

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// keyed is a create under an Idempotency-Key.
func (s *server) keyed(t *testing.T, key, body string) (status int, id, token string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "POST", s.URL+"/e2b/v2/sandboxes", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-KEY", s.key)
	req.Header.Set("Idempotency-Key", key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var out struct{ SandboxID, EnvdAccessToken string }
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, out.SandboxID, out.EnvdAccessToken
}

func TestACreateSentAgainMakesOneSandbox(t *testing.T) {
	s := setup(t)
	const body = `{"templateID":"base","metadata":{"a":"1","b":"2"}}`
	var wg sync.WaitGroup
	ids := make([]string, 8)
	for i := range ids {
		wg.Go(func() {
			status, id, token := s.keyed(t, "a-key", body)
			if status != 201 || token == "" {
				t.Errorf("%d, token %q", status, token)
			}
			ids[i] = id
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id == "" || id != ids[0] {
			t.Errorf("the same request made %v", ids)
		}
	}
	if status, _, _ := s.keyed(t, "a-key", `{"templateID":"base"}`); status != 409 {
		t.Errorf("another request under the key: %d", status)
	}
	if status, id, _ := s.keyed(t, "another-key", body); status != 201 || id == ids[0] {
		t.Errorf("under another key: %d %s", status, id)
	}
	if status, _, _ := s.keyed(t, "", body); status != 400 {
		t.Errorf("an empty key: %d", status)
	}
	// An error is not kept, and what is gone is not said to be there.
	for range 2 {
		if status, _, _ := s.keyed(t, "bad", `{"templateID":"none"}`); status != 404 {
			t.Errorf("of no template: %d", status)
		}
	}
	s.want(t, 204, "DELETE", "/sandboxes/"+ids[0], "")
	if status, _, _ := s.keyed(t, "a-key", body); status != 404 {
		t.Errorf("of a sandbox that is gone: %d", status)
	}
}

// A pause that needs the guest's help is refused when the guest agent is silent
// or says nonsense, and the sandbox goes on.
func TestAPauseThatNeedsTheGuestIsRefusedWithoutIt(t *testing.T) {
	s := setup(t)
	id := s.create(t, `{"templateID":"base"}`)
	says := func(text string) {
		s.host.OnDial(func(string, int) (net.Conn, error) {
			guest, host := net.Pipe()
			go func() {
				defer guest.Close()
				_, _ = guest.Read(make([]byte, 1<<10))
				_, _ = io.WriteString(guest, text)
			}()
			return host, nil
		})
	}
	for _, text := range []string{"", "HTTP/1.1 500 Oops\r\n\r\n", strings.Repeat("x", 1<<20)} {
		says(text)
		for _, body := range []string{`{"requireHealthyGuest":true}`, `{"memory":false}`} {
			s.want(t, 503, "POST", "/sandboxes/"+id+"/pause", body)
		}
	}
	if sb, err := s.svc.Get(t.Context(), id); err != nil || sb.Status != control.StatusRunning {
		t.Errorf("after refused pauses: %v, %v", sb.Status, err)
	}
	says("HTTP/1.1 204 No Content\r\n\r\n")
	s.want(t, 204, "POST", "/sandboxes/"+id+"/pause", `{"requireHealthyGuest":true}`)
	s.want(t, 409, "POST", "/sandboxes/"+id+"/pause", `{"requireHealthyGuest":true}`)
	s.want(t, 404, "POST", "/sandboxes/nosuch/pause", `{"requireHealthyGuest":true}`)
}
