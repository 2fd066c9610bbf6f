package control

import (
	"crypto/rand"
	"encoding/hex"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// SandboxOptions are what callers of other surfaces than our own may choose about a
// sandbox beyond its row. The zero value is what our own makes.
type SandboxOptions struct {
	// AutoResume wakes it on traffic while it is paused.
	AutoResume bool `json:"auto_resume,omitempty"`
	// AutoPauseDiskOnly makes the pause at the time limit a disk-only one.
	AutoPauseDiskOnly bool `json:"auto_pause_disk_only,omitempty"`
	// DiskOnly: the present pause kept the disk alone; the next resume boots.
	DiskOnly bool `json:"disk_only,omitempty"`
	// PrivatePorts asks for TrafficToken of whoever uses a published port.
	PrivatePorts bool   `json:"private_ports,omitempty"`
	TrafficToken string `json:"traffic_token,omitempty"`
	// HostMask is the Host that published ports see; "${PORT}" is the port.
	HostMask string `json:"host_mask,omitempty"`
	// HTTPSPorts are published ports on which the guest's programs speak TLS.
	HTTPSPorts []int `json:"https_ports,omitempty"`
	// Egress is what the guest may reach; nil is the default.
	Egress *Egress `json:"egress,omitempty"`
	// Alias is the built template whose tag led to the row's Template.
	Alias string `json:"alias,omitempty"`
}

func (o SandboxOptions) clone() SandboxOptions {
	o.Egress, o.HTTPSPorts = o.Egress.clone(), slices.Clone(o.HTTPSPorts)
	return o
}

// maxHTTPSPorts bounds SandboxOptions.HTTPSPorts.
const maxHTTPSPorts = 128

func validateHTTPSPorts(ports []int) error {
	if len(ports) > maxHTTPSPorts {
		return Invalid("httpsPorts", "must have at most %d ports; has %d", maxHTTPSPorts, len(ports))
	}
	for _, p := range ports {
		switch {
		case p < 1 || p > 65535:
			return Invalid("httpsPorts", "%d is no port: must be 1 to 65535", p)
		case p == agentPort:
			return Invalid("httpsPorts", "%d is the guest agent's port, which speaks no TLS", p)
		}
	}
	return nil
}

// agentPort is where the guest agent listens.
const agentPort = 49983

// Egress is what a guest may reach of the public IPv4 internet; private ranges
// are closed in any case. What is allowed goes before what is denied.
type Egress struct {
	// Internet is what happens to what neither list names; nil is open.
	Internet *bool `json:"internet,omitempty"`
	// Allow has prefixes, and names: example.com, or *.example.com for all
	// below it. Names need all else denied.
	Allow []string `json:"allow,omitempty"`
	Deny  []string `json:"deny,omitempty"`
	// DNSServers are addresses that are open, too, where Allow has names. Queries
	// by UDP are answered by the host all the same: nil and none differ only in
	// what is told of them.
	DNSServers []string `json:"dns_servers,omitzero"`
	// Rules change the guest's requests to hosts: those of a name, or of all
	// names below one. They open nothing. Their headers are secrets.
	Rules map[string][]EgressRule `json:"rules,omitempty"`
}

// EgressRule is what is done with a request.
type EgressRule struct {
	// Headers are set, in place of those of the same name.
	Headers map[string]string `json:"headers,omitempty"`
}

func (e *Egress) clone() *Egress {
	if e == nil {
		return nil
	}
	c := *e
	c.Allow, c.Deny, c.DNSServers = slices.Clone(e.Allow), slices.Clone(e.Deny), slices.Clone(e.DNSServers)
	c.Rules = maps.Clone(e.Rules)
	for host, rules := range c.Rules {
		rules = slices.Clone(rules)
		for i := range rules {
			rules[i].Headers = maps.Clone(rules[i].Headers)
		}
		c.Rules[host] = rules
	}
	return &c
}

// MaxEgressRules bounds each list of an Egress.
const MaxEgressRules = 256

// validate checks the lists and puts them into the form of prefixes.
func (e *Egress) validate() error {
	if e == nil {
		return nil
	}
	for _, l := range []struct {
		field string
		list  []string
	}{{"allowOut", e.Allow}, {"denyOut", e.Deny}} {
		if len(l.list) > MaxEgressRules {
			return Invalid(l.field, "must have at most %d entries; has %d", MaxEgressRules, len(l.list))
		}
		for i, s := range l.list {
			if name := strings.ToLower(strings.TrimSuffix(s, ".")); len(name) <= 253 && domainRE.MatchString(name) {
				l.list[i] = name
				continue
			}
			p, err := ParsePrefix(l.field, s)
			if err != nil {
				return err
			}
			l.list[i] = p.String()
		}
	}
	if err := e.validateRules(); err != nil {
		return err
	}
	if len(e.DNSServers) > maxDNSServers {
		return Invalid("dnsServers", "must have at most %d addresses; has %d", maxDNSServers, len(e.DNSServers))
	}
	for _, s := range e.DNSServers {
		if a, err := netip.ParseAddr(s); err != nil || !a.Is4() {
			return Invalid("dnsServers", "%.64q is no IPv4 address", s)
		}
	}
	return e.validateNames()
}

const maxDNSServers = 10

// open is what the host lets through: the servers belong to names.
func (e *Egress) open() []string {
	out := slices.Clone(e.Allow)
	if slices.ContainsFunc(e.Allow, domainRE.MatchString) {
		for _, s := range e.DNSServers {
			out = append(out, s+"/32")
		}
	}
	return out
}

var domainRE = regexp.MustCompile(`^(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?$`)

// validateNames: a name opens addresses when the guest asks for it, so it can
// neither be denied nor be an exception from what is open anyway.
func (e *Egress) validateNames() error {
	if i := slices.IndexFunc(e.Deny, domainRE.MatchString); i >= 0 {
		return Invalid("denyOut", "%.64q: names cannot be denied; deny 0.0.0.0/0 and allow the names that may be reached", e.Deny[i])
	}
	i := slices.IndexFunc(e.Allow, domainRE.MatchString)
	closed := e.Internet != nil && !*e.Internet || slices.Contains(e.Deny, "0.0.0.0/0")
	if i >= 0 && !closed {
		return Invalid("allowOut", "%.64q: to allow a name, deny all else: add 0.0.0.0/0 to denyOut", e.Allow[i])
	}
	return nil
}

// ParsePrefix reads an IPv4 address or prefix.
func ParsePrefix(field, s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Is4() {
		return netip.PrefixFrom(a, 32), nil
	}
	p, err := netip.ParsePrefix(s)
	if err == nil && p.Addr().Is4() {
		return p.Masked(), nil
	}
	if err == nil || strings.Contains(s, ":") {
		return p, Invalid(field, "%.64q is not IPv4; sandboxes have no IPv6", s)
	}
	return p, Invalid(field, "%.64q must be an IPv4 address, a prefix such as 192.0.2.0/24 or a name such as example.com or *.example.com", s)
}

// NewTrafficToken makes what opens private ports.
func NewTrafficToken() string {
	var b [20]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// NewID makes an ID for a sandbox.
func NewID() string { return newID() }

// forkedOptions are those of a child: it is not paused, and its ports have a
// token of their own.
func forkedOptions(o SandboxOptions) SandboxOptions {
	o = o.clone()
	o.DiskOnly = false
	if o.TrafficToken != "" {
		o.TrafficToken = NewTrafficToken()
	}
	return o
}
