package e2bapi

import (
	"encoding/json"
	"net/http"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// network is what a sandbox may reach and who may reach it.
type network struct {
	AllowPublicTraffic *bool           `json:"allowPublicTraffic,omitempty"`
	AllowOut           []string        `json:"allowOut,omitempty"`
	DenyOut            []string        `json:"denyOut,omitempty"`
	MaskRequestHost    string          `json:"maskRequestHost,omitempty"`
	DNSServers         []string        `json:"dnsServers,omitzero"`
	EgressProxy        json.RawMessage `json:"egressProxy,omitempty"`
	HTTPSPorts         []int           `json:"httpsPorts,omitempty"`
	// Rules are by host name.
	Rules map[string][]networkRule `json:"rules,omitempty"`
	// AllowInternet is part of an update alone.
	AllowInternet *bool `json:"allow_internet_access,omitempty"`
}

// networkRule is what becomes of a sandbox's requests to a host.
type networkRule struct {
	Transform *transform `json:"transform,omitempty"`
}

type transform struct {
	Headers map[string]string `json:"headers,omitempty"`
}

func (n *network) rules() map[string][]control.EgressRule {
	if len(n.Rules) == 0 {
		return nil
	}
	out := map[string][]control.EgressRule{}
	for host, list := range n.Rules {
		rules := make([]control.EgressRule, len(list))
		for i, r := range list {
			if r.Transform != nil {
				rules[i].Headers = r.Transform.Headers
			}
		}
		out[host] = rules
	}
	return out
}

func rulesOf(e *control.Egress) map[string][]networkRule {
	if len(e.Rules) == 0 {
		return nil
	}
	out := map[string][]networkRule{}
	for host, list := range e.Rules {
		rules := make([]networkRule, len(list))
		for i, r := range list {
			if r.Headers != nil {
				rules[i].Transform = &transform{r.Headers}
			}
		}
		out[host] = rules
	}
	return out
}

// check refuses what is not there, by its name.
func (n *network) check() error {
	for _, f := range []struct {
		name string
		raw  json.RawMessage
	}{{"egressProxy", n.EgressProxy}} {
		if given(f.raw) {
			return control.Invalid("network."+f.name, "is not supported")
		}
	}
	return nil
}

func (n *network) egress() *control.Egress {
	if len(n.AllowOut)+len(n.DenyOut)+len(n.Rules) == 0 && n.DNSServers == nil && n.AllowInternet == nil {
		return nil
	}
	return &control.Egress{Internet: n.AllowInternet, Allow: n.AllowOut, Deny: n.DenyOut, DNSServers: n.DNSServers, Rules: n.rules()}
}

// into puts a create's wishes into o.
func (n *network) into(o *control.SandboxOptions) error {
	if n == nil {
		return nil
	}
	if err := n.check(); err != nil {
		return err
	}
	if n.AllowPublicTraffic != nil {
		o.PrivatePorts = !*n.AllowPublicTraffic
	}
	if len(n.MaskRequestHost) > 255 {
		return control.Invalid("network.maskRequestHost", "must have at most 255 characters")
	}
	o.HostMask, o.HTTPSPorts = n.MaskRequestHost, n.HTTPSPorts
	o.Egress = n.egress()
	return nil
}

func networkOf(o control.SandboxOptions) *network {
	public := !o.PrivatePorts
	n := &network{AllowPublicTraffic: &public, MaskRequestHost: o.HostMask, HTTPSPorts: o.HTTPSPorts}
	if o.Egress != nil {
		n.AllowOut, n.DenyOut, n.Rules, n.DNSServers = o.Egress.Allow, o.Egress.Deny, rulesOf(o.Egress), o.Egress.DNSServers
	}
	return n
}

// setNetwork replaces what a sandbox may reach; a list left out is empty.
func (a *api) setNetwork(w http.ResponseWriter, r *http.Request) error {
	var b network
	id, err := body(w, r, &b)
	if err != nil {
		return err
	}
	if err := b.check(); err != nil {
		return err
	}
	if len(b.HTTPSPorts) > 0 {
		return control.Invalid("network.httpsPorts", "can be given when the sandbox is created, not changed")
	}
	if _, err := a.svc.SetEgress(r.Context(), id, b.egress()); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
