package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// ErrPortClosed is in the chain of an error of Dial when the sandbox runs and
// nothing listens on that port.
var ErrPortClosed = errors.New("nothing listens on the port")

// touchEvery is how often traffic moves last_active_at on the disk; what is
// read in between is the present time while there is traffic.
const touchEvery = 5 * time.Second

// tokens remembers what opens the sandboxes' guest agents: it never changes in
// a sandbox's life.
type tokens struct {
	mu   sync.Mutex
	byID map[string]string
}

// AccessToken is what a sandbox's guest agent asks of its callers. It stays the
// same for life, paused or not.
func (s *Service) AccessToken(ctx context.Context, id string) (string, error) {
	if _, err := s.row(ctx, id); err != nil {
		return "", err
	}
	return s.token(ctx, id)
}

func (s *Service) token(ctx context.Context, id string) (string, error) {
	s.tokens.mu.Lock()
	t, ok := s.tokens.byID[id]
	s.tokens.mu.Unlock()
	if ok {
		return t, nil
	}
	t, err := s.host.AccessToken(ctx, id)
	if err != nil {
		return "", fmt.Errorf("read the access token of %s: %w", id, err)
	}
	s.tokens.mu.Lock()
	defer s.tokens.mu.Unlock()
	if s.tokens.byID == nil {
		s.tokens.byID = map[string]string{}
	}
	s.tokens.byID[id] = t
	return t, nil
}

// FindByToken gives the one running or paused sandbox whose access token match
// accepts: for requests that prove a token and name no sandbox.
func (s *Service) FindByToken(ctx context.Context, match func(token string) bool) (Sandbox, bool, error) {
	rows, err := s.store.ListSandboxes(ctx, SandboxFilter{Statuses: []Status{
		StatusRunning, StatusPausing, StatusPaused, StatusResuming,
	}})
	if err != nil {
		return Sandbox{}, false, fmt.Errorf("list sandboxes: %w", err)
	}
	live := make(map[string]bool, len(rows))
	for _, r := range rows {
		live[r.ID] = true
		t, err := s.token(ctx, r.ID)
		if err != nil {
			if CodeOf(err) == CodeNotFound {
				continue // deleted meanwhile
			}
			return Sandbox{}, false, err
		}
		if match(t) {
			return r, true, nil
		}
	}
	s.tokens.keep(live)
	return Sandbox{}, false, nil
}

// keep forgets the tokens of sandboxes that are gone.
func (t *tokens) keep(live map[string]bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id := range t.byID {
		if !live[id] {
			delete(t.byID, id)
		}
	}
}

// Reach finds a sandbox that traffic is for. A paused one that is to wake on
// traffic is resumed first. One that does not run otherwise is invalid_state.
func (s *Service) Reach(ctx context.Context, id string) (Sandbox, error) {
	sb, err := s.row(ctx, id)
	if err != nil {
		return sb, err
	}
	if sb.Status == StatusRunning {
		return sb, nil
	}
	if !sb.Options.AutoResume || sb.Options.DiskOnly {
		return sb, wrongState(sb, "traffic", string(StatusRunning))
	}
	switch sb.Status {
	case StatusPaused, StatusPausing, StatusResuming:
		sb, _, err = s.Connect(ctx, id, ConnectParams{TimeoutSec: max(sb.TimeoutSec, autoResumeSec)})
		return sb, err
	}
	return sb, wrongState(sb, "traffic", string(StatusRunning))
}

// autoResumeSec is the least time that a sandbox gets which traffic woke.
const autoResumeSec = 300

// Dial connects to a TCP port of a running sandbox. The connection ends with
// the sandbox's present run at the latest.
func (s *Service) Dial(ctx context.Context, id string, port int) (net.Conn, error) {
	if err := ValidateID("id", id); err != nil {
		return nil, err
	}
	if err := inRange("port", int64(port), 1, 65535, ""); err != nil {
		return nil, err
	}
	c, err := s.host.Dial(ctx, id, port)
	if err != nil {
		if errors.Is(err, ErrPortClosed) {
			return nil, err
		}
		return nil, s.lost(ctx, id, fmt.Errorf("connect to port %d of %s: %w", port, id, err))
	}
	return c, nil
}

// Active marks a sandbox as used until the returned function is called.
func (s *Service) Active(id string) (end func()) {
	s.active.add(id, 1)
	var once sync.Once
	return func() {
		once.Do(func() {
			if s.traffic.due(id, s.clock.Mono()) {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				if err := s.store.TouchSandbox(ctx, id, s.now()); err != nil {
					s.log.WarnContext(ctx, "write last_active_at", "sandbox", id, "err", err)
				}
			}
			s.active.add(id, -1)
		})
	}
}

// touched knows when traffic last moved last_active_at, by sandbox.
type touched struct {
	mu sync.Mutex
	at map[string]time.Duration // of Clock.Mono
}

func (t *touched) due(id string, now time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if last, ok := t.at[id]; ok && now-last < touchEvery {
		return false
	}
	if t.at == nil || len(t.at) > 10_000 {
		t.at = map[string]time.Duration{} // forgetting costs one write each
	}
	t.at[id] = now
	return true
}
