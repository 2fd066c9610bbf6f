package e2bapi

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// The time limits in seconds of sandboxes whose caller names none.
const (
	defaultTimeout   = 15
	defaultTimeoutV2 = 300
)

// never stands for the end of a sandbox that has no limit: the SDKs need one.
var never = time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)

// newSandbox is the body of a create.
type newSandbox struct {
	TemplateID      string            `json:"templateID"`
	Timeout         *int64            `json:"timeout"`
	Metadata        map[string]string `json:"metadata"`
	EnvVars         map[string]string `json:"envVars"`
	AllowInternet   *bool             `json:"allow_internet_access"`
	Network         *network          `json:"network"`
	AutoPause       bool              `json:"autoPause"`
	AutoPauseMemory *bool             `json:"autoPauseMemory"`
	AutoResume      *struct {
		Enabled bool `json:"enabled"`
	} `json:"autoResume"`
	MCP          json.RawMessage   `json:"mcp"`
	IAM          json.RawMessage   `json:"iam"`
	VolumeMounts []json.RawMessage `json:"volumeMounts"`
}

// sandbox answers a create or a connect.
type sandbox struct {
	TemplateID         string `json:"templateID"`
	Alias              string `json:"alias,omitempty"`
	SandboxID          string `json:"sandboxID"`
	ClientID           string `json:"clientID"`
	EnvdVersion        string `json:"envdVersion"`
	EnvdAccessToken    string `json:"envdAccessToken"`
	TrafficAccessToken string `json:"trafficAccessToken,omitempty"`
	Domain             string `json:"domain,omitempty"`
}

const clientID = "wrenn"

// envdPort is where the guest agent listens.
const envdPort = 49983

// given tells whether JSON holds something.
func given(raw json.RawMessage) bool {
	s := string(raw)
	return s != "" && s != "null" && s != "{}" && s != "[]"
}

func (b newSandbox) params(sec int64, privatePorts bool) (control.CreateParams, error) {
	p := control.CreateParams{
		ID: control.NewID(), Template: templateName(b.TemplateID), TimeoutSec: sec,
		AutoPause: b.AutoPause, Metadata: b.Metadata,
	}
	switch {
	case b.TemplateID == "":
		return p, control.Invalid("templateID", "must name a template or a snapshot")
	case given(b.MCP):
		return p, control.Invalid("mcp", "is not supported: there is no template with an MCP gateway")
	case given(b.IAM):
		return p, control.Invalid("iam", "is not supported")
	case len(b.VolumeMounts) > 0:
		return p, control.Invalid("volumeMounts", "is not supported")
	}
	if b.Timeout != nil {
		if *b.Timeout < 1 {
			return p, control.Invalid("timeout", "must be at least 1 second; got %d", *b.Timeout)
		}
		p.TimeoutSec = *b.Timeout
	}
	o := control.SandboxOptions{
		AutoResume:        b.AutoResume != nil && b.AutoResume.Enabled,
		AutoPauseDiskOnly: b.AutoPauseMemory != nil && !*b.AutoPauseMemory,
		PrivatePorts:      privatePorts,
	}
	if o.AutoResume && b.AutoPause && o.AutoPauseDiskOnly {
		return p, control.Invalid("autoResume", "cannot be had with autoPauseMemory false: such a pause is left by an explicit connect only")
	}
	if err := b.Network.into(&o); err != nil {
		return p, err
	}
	if b.AllowInternet != nil {
		if o.Egress == nil {
			o.Egress = &control.Egress{}
		}
		o.Egress.Internet = b.AllowInternet
	}
	if o.PrivatePorts {
		o.TrafficToken = control.NewTrafficToken()
	}
	p.Options = o
	p.Envs = map[string]string{"E2B_SANDBOX": "true", "E2B_SANDBOX_ID": p.ID, "E2B_TEMPLATE_ID": p.Template}
	for k, v := range b.EnvVars {
		p.Envs[k] = v
	}
	return p, nil
}

func (a *api) create(sec int64) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		var b newSandbox
		if err := decode(w, r, &b); err != nil {
			return err
		}
		p, err := b.params(sec, a.PrivatePorts)
		if err != nil {
			return err
		}
		sb, err := a.createOnce(r, b, p)
		if err != nil {
			return err
		}
		return a.replySandbox(w, r, http.StatusCreated, sb)
	}
}

// createOnce creates; a request that comes again under its Idempotency-Key gets
// the sandbox that the first one made. Kept is its ID, never its tokens.
func (a *api) createOnce(r *http.Request, b newSandbox, p control.CreateParams) (sb control.Sandbox, err error) {
	names := r.Header.Values("Idempotency-Key")
	if len(names) == 0 {
		return a.svc.Create(r.Context(), p)
	}
	body, err := json.Marshal(b)
	if err != nil {
		return sb, fmt.Errorf("encode a request again: %w", err)
	}
	id, _ := r.Context().Value(keyID{}).(string)
	var failed error
	got, replayed, err := a.svc.Once(r.Context(), control.Answer{
		Scope: id, Name: strings.Join(names, ","), Digest: control.RequestDigest(r.Method, r.URL.Path, body),
	}, func() control.Answer {
		if sb, failed = a.svc.Create(r.Context(), p); failed != nil {
			status, _ := verdict(failed)
			return control.Answer{Status: status}
		}
		return control.Answer{Status: http.StatusCreated, Body: sb.ID}
	})
	switch {
	case err != nil:
		return sb, err
	case replayed:
		return a.svc.Get(r.Context(), got.Body)
	}
	return sb, failed
}

func (a *api) replySandbox(w http.ResponseWriter, r *http.Request, status int, sb control.Sandbox) error {
	out, err := a.sandboxOf(r, sb)
	if err != nil {
		return err
	}
	reply(w, status, out)
	return nil
}

func (a *api) sandboxOf(r *http.Request, sb control.Sandbox) (sandbox, error) {
	token, err := a.svc.AccessToken(r.Context(), sb.ID)
	return sandbox{
		TemplateID: templateOf(sb), Alias: templateOf(sb), SandboxID: sb.ID, ClientID: clientID, EnvdVersion: EnvdVersion,
		EnvdAccessToken: token, TrafficAccessToken: sb.Options.TrafficToken, Domain: a.Domain,
	}, err
}

func (a *api) connect(sec int64) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		b := struct {
			Timeout *int64 `json:"timeout"`
			Memory  *bool  `json:"memory"`
		}{}
		id, err := body(w, r, &b)
		if err != nil {
			return err
		}
		p := control.ConnectParams{TimeoutSec: sec, Reboot: b.Memory != nil && !*b.Memory}
		if b.Timeout != nil {
			if p.TimeoutSec = *b.Timeout; p.TimeoutSec < 1 {
				return control.Invalid("timeout", "must be at least 1 second; got %d", p.TimeoutSec)
			}
		}
		sb, resumed, err := a.svc.Connect(r.Context(), id, p)
		if err != nil {
			return err
		}
		status := http.StatusOK
		if resumed {
			status = http.StatusCreated
		}
		return a.replySandbox(w, r, status, sb)
	}
}

// body reads the ID of the path and the body.
func body(w http.ResponseWriter, r *http.Request, v any) (string, error) {
	id, err := pathID(r)
	if err != nil {
		return "", err
	}
	return id, decode(w, r, v)
}

// resume is the older form of connect, for paused sandboxes alone.
func (a *api) resume(w http.ResponseWriter, r *http.Request) error {
	b := struct {
		Timeout int64 `json:"timeout"`
		Memory  *bool `json:"memory"`
	}{Timeout: defaultTimeout}
	id, err := body(w, r, &b)
	if err != nil {
		return err
	}
	sb, resumed, err := a.svc.Connect(r.Context(), id, control.ConnectParams{TimeoutSec: b.Timeout, Reboot: b.Memory != nil && !*b.Memory})
	if err != nil {
		return err
	}
	if !resumed {
		return &control.Error{Code: control.CodeInvalidState, Message: "sandbox " + id + " is running already"}
	}
	return a.replySandbox(w, r, http.StatusCreated, sb)
}

func (a *api) kill(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	// One that is being deleted already is as good as gone.
	if err := a.svc.Delete(r.Context(), id); err != nil && control.CodeOf(err) != control.CodeInvalidState {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *api) setTimeout(w http.ResponseWriter, r *http.Request) error {
	var b struct {
		Timeout *int64 `json:"timeout"`
	}
	id, err := body(w, r, &b)
	if err != nil {
		return err
	}
	if b.Timeout == nil {
		return control.Invalid("timeout", "must be given, in seconds")
	}
	if _, err := a.svc.SetDeadline(r.Context(), id, *b.Timeout); err != nil {
		return gone(err)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// gone makes not_found of what only a running sandbox can do: to the SDKs a
// paused one is not there.
func gone(err error) error {
	if control.CodeOf(err) == control.CodeInvalidState {
		return &control.Error{Code: control.CodeNotFound, Message: "the sandbox is not running", Err: err}
	}
	return err
}

// refresh lets a sandbox run for at least so long; an older SDK's call.
func (a *api) refresh(w http.ResponseWriter, r *http.Request) error {
	b := struct {
		Duration int64 `json:"duration"`
	}{defaultTimeout}
	id, err := body(w, r, &b)
	if err != nil {
		return err
	}
	sb, err := a.svc.Get(r.Context(), id)
	if err == nil && sb.Status != control.StatusRunning {
		err = &control.Error{Code: control.CodeNotFound, Message: "the sandbox is not running"}
	}
	if err == nil {
		_, _, err = a.svc.Connect(r.Context(), id, control.ConnectParams{TimeoutSec: b.Duration})
	}
	if err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *api) pause(w http.ResponseWriter, r *http.Request) error {
	var b struct {
		Memory         *bool `json:"memory"`
		RequireHealthy bool  `json:"requireHealthyGuest"`
	}
	id, err := body(w, r, &b)
	if err != nil {
		return err
	}
	diskOnly := b.Memory != nil && !*b.Memory
	// Without the guest's help what it has not written yet would be lost.
	if diskOnly || b.RequireHealthy {
		if err := a.guestAnswers(r.Context(), id); err != nil {
			return err
		}
	}
	if _, err := a.svc.PauseSettled(r.Context(), id, diskOnly); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// healthWait bounds the wait for a guest agent's answer.
const healthWait = 10 * time.Second

// guestAnswers asks a running sandbox's guest agent whether it is there; of any
// other the pause itself says what is wrong.
func (a *api) guestAnswers(ctx context.Context, id string) error {
	sb, err := a.svc.Get(ctx, id)
	if err != nil || sb.Status != control.StatusRunning {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, healthWait)
	defer cancel()
	silent := func(err error) error {
		return &control.Error{Code: control.CodeHostUnavailable, Message: "the sandbox's guest agent does not answer; it goes on running", Err: err}
	}
	c, err := a.svc.Dial(ctx, id, envdPort)
	if err != nil {
		return silent(err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if _, err := io.WriteString(c, "GET /health HTTP/1.1\r\nHost: sandbox\r\nConnection: close\r\n\r\n"); err != nil {
		return silent(err)
	}
	// A status line is all that is wanted of a guest.
	line, err := bufio.NewReader(io.LimitReader(c, 1<<10)).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "HTTP/1.1 204") {
		return silent(fmt.Errorf("the guest agent said %.40q: %w", line, err))
	}
	return nil
}
