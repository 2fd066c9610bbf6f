package e2bapi

import (
	"encoding/json"
	"net/http"
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
		sb, err := a.svc.Create(r.Context(), p)
		if err != nil {
			return err
		}
		return a.replySandbox(w, r, http.StatusCreated, sb)
	}
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
		TemplateID: sb.Template, Alias: sb.Template, SandboxID: sb.ID, ClientID: clientID, EnvdVersion: EnvdVersion,
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
		Memory *bool `json:"memory"`
	}
	id, err := body(w, r, &b)
	if err != nil {
		return err
	}
	if _, err := a.svc.PauseSettled(r.Context(), id, b.Memory != nil && !*b.Memory); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
