package guest

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/guest/boot"
)

// identity is what /init made of this sandbox. A value is never changed.
type identity struct {
	BootID         string            `json:"boot_id"`
	Generation     string            `json:"generation"`
	Token          string            `json:"access_token"`
	Envs           map[string]string `json:"envs,omitempty"`
	DefaultUser    string            `json:"default_user,omitempty"`
	DefaultWorkdir string            `json:"default_workdir,omitempty"`
}

// identity is the present one; empty where there is none.
func (s *Server) identity() identity {
	if id := s.ident.Load(); id != nil {
		return *id
	}
	return identity{}
}

// InitRequest is the body of POST /init. Unknown fields are refused.
type InitRequest struct {
	// Generation is the id of this life of the sandbox: 1 to 128 characters of
	// [A-Za-z0-9._:-].
	Generation string `json:"generation"`
	// Fork tells that the memory is a copy of another sandbox's.
	Fork bool `json:"fork"`
	// Hostname; empty leaves it.
	Hostname string `json:"hostname"`
	// MachineID is 32 lower-case hex digits; empty leaves it.
	MachineID string `json:"machine_id"`
	// AccessToken is what all other calls carry from now on: 16 to 512
	// printable characters.
	AccessToken string `json:"access_token"`
	// Envs are part of the environment of all processes started from now on;
	// they replace earlier ones.
	Envs map[string]string `json:"envs"`
	// DefaultUser; empty is "user", or root where there is no such user.
	DefaultUser string `json:"default_user"`
	// DefaultWorkdir; empty is the user's home.
	DefaultWorkdir string `json:"default_workdir"`
	// TimeUnixNano is the host's wall clock, as a decimal string.
	TimeUnixNano string `json:"time_unix_nano"`
	// Entropy is base64 of 64 to 4096 random bytes.
	Entropy string `json:"entropy"`
}

// InitResponse answers it. All six steps are listed, also those for which
// nothing had to change.
type InitResponse struct {
	Generation  string   `json:"generation"`
	Steps       []string `json:"steps"`
	EnvdVersion string   `json:"envd_version"`
	BootID      string   `json:"boot_id"`
	// Notes tell what this kernel could not do and is no failure.
	Notes []string `json:"notes,omitempty"`
}

// initPlan is a checked request.
type initPlan struct {
	InitRequest
	clock   time.Time
	entropy []byte
}

const (
	minEntropy = 64
	maxEntropy = 4096
)

var (
	// A clock outside of these years is a mistake of the host's.
	clockMin = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	clockMax = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)
)

// only tells whether s has from min to max bytes, all of which ok allows.
// Regular expressions would be compiled at each start of the agent, for longer
// than all its other initialisation takes.
func only(s string, min, max int, ok func(c byte) bool) bool {
	for i := range len(s) {
		if !ok(s[i]) {
			return false
		}
	}
	return min <= len(s) && len(s) <= max
}

func isDigit(c byte) bool     { return '0' <= c && c <= '9' }
func isHex(c byte) bool       { return isDigit(c) || 'a' <= c && c <= 'f' }
func isPrintable(c byte) bool { return '!' <= c && c <= '~' }
func isName(c byte) bool {
	return isDigit(c) || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || strings.IndexByte("._:-", c) >= 0
}

func (r InitRequest) check() (*initPlan, error) {
	p := &initPlan{InitRequest: r}
	ns, err := strconv.ParseInt(r.TimeUnixNano, 10, 64)
	p.clock = time.Unix(0, ns)
	if err != nil || p.clock.Before(clockMin) || p.clock.After(clockMax) {
		return nil, invalidf("time_unix_nano: %q is not a time of this age", clip(r.TimeUnixNano))
	}
	p.entropy, err = base64.StdEncoding.DecodeString(r.Entropy)
	if err != nil || len(p.entropy) < minEntropy || len(p.entropy) > maxEntropy {
		return nil, invalidf("entropy: must be base64 of %d to %d bytes", minEntropy, maxEntropy)
	}
	switch {
	case !only(r.Generation, 1, 128, isName):
		return nil, invalidf("generation: must be 1 to 128 characters of [A-Za-z0-9._:-]")
	case !only(r.AccessToken, 16, 512, isPrintable):
		return nil, invalidf("access_token: must be 16 to 512 printable characters")
	case r.MachineID != "" && !only(r.MachineID, 32, 32, isHex):
		return nil, invalidf("machine_id: must be 32 lower-case hex digits")
	case len(r.DefaultUser) > maxUser || strings.ContainsAny(r.DefaultUser, ":\n\x00"):
		return nil, invalidf("default_user: not a user name")
	}
	if r.Hostname != "" {
		if err := boot.CheckHostname(r.Hostname); err != nil {
			return nil, invalidf("hostname: %v", err)
		}
	}
	if err := checkPath("default_workdir", r.DefaultWorkdir); err != nil {
		return nil, err
	}
	if _, err := checkEnvs("envs", r.Envs); err != nil {
		return nil, err
	}
	return p, nil
}

func (s *Server) handleInit(w http.ResponseWriter, r *http.Request) {
	var req InitRequest
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxJSONBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&req); err != nil {
		writeError(w, invalidf("body: %v", err))
		return
	}
	plan, err := req.check()
	if err != nil {
		writeError(w, err)
		return
	}
	// A host that goes away in the middle must find the same thing done when
	// it asks again; it asks for all of it again.
	res, err := s.initialize(context.WithoutCancel(r.Context()), plan)
	if err != nil {
		s.log.Error("init failed", "error", err)
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, res)
}

// initialize makes the guest a new individual, or confirms that it is one.
// Until all steps of a new generation are done the guest serves nothing.
func (s *Server) initialize(ctx context.Context, p *initPlan) (*InitResponse, error) {
	s.initMu.Lock()
	defer s.initMu.Unlock()
	fresh := s.identity().Generation != p.Generation
	if fresh {
		s.ident.Store(nil)
		// An agent restarted from here on must not take the old life over.
		if err := os.Remove(s.stateFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("removing the earlier state: %w", err))
		}
	}
	bootID, err := s.sys.BootID()
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	res := &InitResponse{Generation: p.Generation, EnvdVersion: Version, BootID: bootID}
	steps := []struct {
		name string
		run  func() error
	}{
		{"clock", func() error { return s.stepClock(p.clock) }},
		{"entropy", func() error { return s.sys.AddEntropy(p.entropy) }},
		{"hostname", func() error {
			if p.Hostname == "" {
				return nil
			}
			return s.sys.SetHostname(p.Hostname)
		}},
		{"machine_id", func() error {
			if p.MachineID == "" {
				return nil
			}
			return s.sys.SetMachineID(p.MachineID)
		}},
		{"generation", func() error { return s.sys.WriteGeneration(p.Generation) }},
		{"connections", func() error {
			if !fresh {
				return nil // those that are open now are of this life
			}
			s.conns.closeOthers(ctx)
			n, err := s.sys.CloseConnections(Port)
			if errors.Is(err, errors.ErrUnsupported) {
				res.Notes = append(res.Notes, "connections: this kernel cannot close those of other processes")
				return nil
			}
			s.log.Info("connections closed", "count", n)
			return err
		}},
	}
	for _, st := range steps {
		if err := st.run(); err != nil {
			return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("step %s: %w", st.name, err))
		}
		res.Steps = append(res.Steps, st.name)
	}
	id := &identity{
		BootID: bootID, Generation: p.Generation, Token: p.AccessToken,
		Envs: p.Envs, DefaultUser: p.DefaultUser, DefaultWorkdir: p.DefaultWorkdir,
	}
	if err := s.saveState(id); err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	s.ident.Store(id)
	return res, nil
}

// clockAhead is how far the guest's clock may be ahead: the host's time is as
// old as the call took, and a clock that jumps back at each repetition of the
// call would break more than a small offset.
const clockAhead = 250 * time.Millisecond

func (s *Server) stepClock(t time.Time) error {
	if ahead := s.opt.Now().Sub(t); ahead >= 0 && ahead <= clockAhead {
		return nil
	}
	return s.sys.SetClock(t)
}

func (s *Server) handleSync(w http.ResponseWriter, _ *http.Request) {
	s.syncMu.Lock()
	defer s.syncMu.Unlock()
	s.sys.Sync()
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) handleEnvs(w http.ResponseWriter, _ *http.Request) {
	envs := s.identity().Envs
	if envs == nil {
		envs = map[string]string{}
	}
	writeJSON(w, http.StatusOK, envs)
}

func (s *Server) stateFile() string { return filepath.Join(s.opt.RunDir, "envd.json") }

// saveState keeps the identity for an agent that is restarted in this boot.
func (s *Server) saveState(id *identity) error {
	b, err := json.Marshal(id)
	if err != nil {
		return fmt.Errorf("encoding the agent's state: %w", err)
	}
	if err := os.MkdirAll(s.opt.RunDir, 0o755); err != nil {
		return fmt.Errorf("making the run directory: %w", err)
	}
	if err := replaceFile(s.stateFile(), b, 0o600); err != nil {
		return fmt.Errorf("writing the agent's state: %w", err)
	}
	return nil
}

func (s *Server) loadState() error {
	b, err := os.ReadFile(s.stateFile())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the agent's state: %w", err)
	}
	var id identity
	if err := json.Unmarshal(b, &id); err != nil {
		return fmt.Errorf("decoding the agent's state: %w", err)
	}
	bootID, err := s.sys.BootID()
	if err != nil {
		return err
	}
	// Where the run directory is not a tmpfs, a reboot finds the old file.
	if id.Token != "" && id.BootID == bootID {
		s.ident.Store(&id)
	}
	return nil
}
