package engine

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/gen/filesystem/filesystemconnect"
	"git.omukk.dev/wrenn/sandbox/internal/gen/process/processconnect"
)

// The guest agent's port, and the name under which requests address it: the
// name is never looked up, every connection is made inside the sandbox's
// network namespace.
const (
	// AgentPort is the guest agent's port.
	AgentPort = 49983
	envdPort  = AgentPort
	envdURL   = "http://envd"
)

// Guest is the connection to one sandbox's agent during one run. It ends with
// the run: a call on it then fails.
type Guest struct {
	token     string
	transport *http.Transport
	// dial connects to a port of the guest; the connection ends with the run.
	dial func(ctx context.Context, port int) (net.Conn, error)
	// hangUp closes every connection: the peer of one may be gone without a
	// word, and a call that waits on it would wait for ever.
	hangUp context.CancelFunc
	// patience is confirmPatience but for tests.
	patience time.Duration
	Process  processconnect.ProcessClient
	Files    filesystemconnect.FilesystemClient
}

func newGuest(slot Slot, token string) *Guest {
	run, hangUp := context.WithCancel(context.Background())
	dial := func(ctx context.Context, port int) (net.Conn, error) {
		c, err := slot.Dial(ctx, port)
		if err != nil {
			return nil, err
		}
		return runConn{c, context.AfterFunc(run, func() { c.Close() })}, nil
	}
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dial(ctx, envdPort)
		},
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     time.Minute,
		// What goes through is short messages and raw files; the guest's
		// emulated CPU has better things to do than to compress.
		DisableCompression: true,
	}
	g := &Guest{token: token, transport: t, dial: dial, hangUp: hangUp, patience: confirmPatience}
	c := &http.Client{Transport: g}
	g.Process = processconnect.NewProcessClient(c, envdURL)
	g.Files = filesystemconnect.NewFilesystemClient(c, envdURL)
	return g
}

// runConn is a connection that ends with its run at the latest.
type runConn struct {
	net.Conn
	forget func() bool
}

func (c runConn) Close() error {
	c.forget()
	return c.Conn.Close()
}

// CloseWrite ends the sending direction.
func (c runConn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return c.Close()
}

// RoundTrip adds the sandbox's token to every request.
func (g *Guest) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Header.Set("X-Access-Token", g.token)
	return g.transport.RoundTrip(req)
}

// HTTP sends a request to one of the agent's plain HTTP paths; a body is sent
// as it is.
func (g *Guest) HTTP(ctx context.Context, method, pathAndQuery string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, envdURL+pathAndQuery, body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/octet-stream")
	}
	return g.RoundTrip(req)
}

// Guest returns the connection to a running sandbox's agent.
func (e *Engine) Guest(id string) (*Guest, error) {
	sb, err := e.find(id)
	if err != nil {
		return nil, err
	}
	r := sb.current()
	if state := sb.info().State; r == nil || state != Running {
		return nil, fmt.Errorf("%w: sandbox %s is %s, not running", ErrState, id, state)
	}
	return r.guest, nil
}

func (g *Guest) close() {
	g.hangUp()
	g.transport.CloseIdleConnections()
}

// initRequest makes a guest a new individual, or sets its clock.
type initRequest struct {
	Generation     string            `json:"generation"`
	Fork           bool              `json:"fork"`
	Hostname       string            `json:"hostname"`
	MachineID      string            `json:"machine_id"`
	AccessToken    string            `json:"access_token"`
	Envs           map[string]string `json:"envs"`
	DefaultUser    string            `json:"default_user"`
	DefaultWorkdir string            `json:"default_workdir"`
	TimeUnixNano   string            `json:"time_unix_nano"`
	Entropy        string            `json:"entropy"`
}

type initResponse struct {
	Generation  string   `json:"generation"`
	Steps       []string `json:"steps"`
	EnvdVersion string   `json:"envd_version"`
	BootID      string   `json:"boot_id"`
}

// confirmSteps are what the guest must say it has done (a fork is a new
// individual, or it does not start).
var confirmSteps = []string{"clock", "entropy", "hostname", "machine_id", "generation", "connections"}

// confirm tells the guest who it is now and returns when it has confirmed
// every step. It asks until the guest answers or ctx ends; only a guest that
// answers with a refusal ends it early.
func (g *Guest) confirm(ctx context.Context, ended <-chan struct{}, req initRequest, now func() time.Time) (initResponse, error) {
	// A guest that has just booted has no listener yet: there is no event to
	// wait for, so try again at short intervals.
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	patience, again := g.patience, false
	for {
		began := time.Now()
		req.TimeUnixNano = strconv.FormatInt(now().UnixNano(), 10)
		req.Entropy = base64.StdEncoding.EncodeToString(randomBytes(256))
		resp, err := g.postInit(ctx, req, patience)
		var refused *refusedError
		if err == nil && !again && time.Since(began) > g.patience/3 {
			again = true // it was told the time of a while ago
			continue
		}
		if err == nil || errors.As(err, &refused) {
			return resp, err
		}
		select {
		case <-ended:
			return resp, errors.New("the VM ended before its guest agent answered")
		case <-ctx.Done():
			return resp, fmt.Errorf("the guest agent does not answer: %w", err)
		case <-tick.C:
		}
		if errors.Is(err, context.DeadlineExceeded) {
			patience = min(2*patience, 8*g.patience)
		}
	}
}

// confirmPatience is how long the first attempt to have a guest confirm may
// take. Those after it get up to eight times as long: a slow guest must not be
// asked anew for ever while it is about to answer.
const confirmPatience = 3 * time.Second

// refusedError is an answer of the guest agent that repeating will not change.
type refusedError struct {
	status int
	text   string
}

func (e *refusedError) Error() string {
	return fmt.Sprintf("the guest agent answered %d: %s", e.status, e.text)
}

func (g *Guest) postInit(ctx context.Context, req initRequest, patience time.Duration) (initResponse, error) {
	// A connection attempt can fall into the moment before the guest's
	// network is up and then wait for TCP to try again; a short limit makes
	// us try anew.
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var out initResponse
	body, err := g.post(ctx, "/init", req)
	if err != nil {
		return out, err
	}
	if err := json.Unmarshal(body, &out); err != nil {
		return out, &refusedError{status: http.StatusOK, text: "not JSON: " + err.Error()}
	}
	if out.Generation != req.Generation {
		return out, &refusedError{status: http.StatusOK, text: fmt.Sprintf("it confirmed generation %q, not %q", out.Generation, req.Generation)}
	}
	done := map[string]bool{}
	for _, s := range out.Steps {
		done[s] = true
	}
	for _, s := range confirmSteps {
		if !done[s] {
			return out, &refusedError{status: http.StatusOK, text: fmt.Sprintf("it did not confirm the step %q", s)}
		}
	}
	return out, nil
}

// sync asks the guest to write its file systems' caches to the disk.
func (g *Guest) sync(ctx context.Context) error {
	_, err := g.post(ctx, "/sync", nil)
	return err
}

// maxAnswer bounds what is read of a control answer: the guest is hostile.
const maxAnswer = 1 << 20

func (g *Guest) post(ctx context.Context, path string, in any) ([]byte, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, envdURL+path, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := g.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("read the answer to %s: %w", path, err)
	}
	if resp.StatusCode/100 != 2 {
		return nil, &refusedError{status: resp.StatusCode, text: firstLine(b)}
	}
	return b, nil
}

// firstLine keeps a hostile guest's words out of our logs beyond a line.
func firstLine(b []byte) string {
	b, _, _ = bytes.Cut(bytes.TrimSpace(b), []byte("\n"))
	if len(b) > 300 {
		b = b[:300]
	}
	return string(bytes.ToValidUTF8(b, []byte("?")))
}
