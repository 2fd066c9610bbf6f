package control

import (
	"net/http"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// Bounds of an Egress's rules.
const (
	maxRuleHosts    = 256
	maxHostRules    = 16
	maxRuleHeaders  = 64       // of one host
	maxHeadersBytes = 64 << 10 // of all hosts together
)

// delivery are headers that say how a message is delivered, and to whom.
var delivery = []string{"Connection", "Content-Length", "Expect", "Host", "Keep-Alive", "Proxy-Authenticate",
	"Proxy-Authorization", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade"}

// validateRules checks the rules and puts their hosts into lower case. Values
// of headers are secrets: no error has one.
func (e *Egress) validateRules() error {
	if len(e.Rules) > maxRuleHosts {
		return Invalid("rules", "must have at most %d hosts; has %d", maxRuleHosts, len(e.Rules))
	}
	size := 0
	rules := make(map[string][]EgressRule, len(e.Rules))
	for key, list := range e.Rules {
		host := strings.ToLower(strings.TrimSuffix(key, "."))
		if len(host) > 253 || !domainRE.MatchString(host) {
			if _, err := ParsePrefix("rules", key); err == nil {
				return Invalid("rules", "%.64q: rules are for host names, not for addresses", key)
			}
			return Invalid("rules", "%.64q must be a name such as example.com or *.example.com", key)
		}
		if _, twice := rules[host]; twice {
			return Invalid("rules", "%.64q is there twice, in different spellings", host)
		}
		n, err := validateHeaders(host, list)
		if err != nil {
			return err
		}
		size += n
		rules[host] = list
	}
	if size > maxHeadersBytes {
		return Invalid("rules", "all headers together must have at most %d bytes; have %d", maxHeadersBytes, size)
	}
	if e.Rules != nil {
		e.Rules = rules
	}
	return nil
}

// validateHeaders checks the rules of one host and gives their size.
func validateHeaders(host string, list []EgressRule) (size int, err error) {
	if len(list) > maxHostRules {
		return 0, Invalid("rules", "%s: must have at most %d rules; has %d", host, maxHostRules, len(list))
	}
	count := 0
	for _, r := range list {
		set := make(map[string]string, len(r.Headers))
		for name, value := range r.Headers {
			if err := validateHeader(host, name, value); err != nil {
				return 0, err
			}
			canonical := http.CanonicalHeaderKey(name)
			if _, twice := set[canonical]; twice {
				return 0, Invalid("rules", "%s: header %s is there twice in one rule, in different spellings", host, canonical)
			}
			set[canonical] = value
			size += len(name) + len(value)
			count++
		}
	}
	if count > maxRuleHeaders {
		return 0, Invalid("rules", "%s: must have at most %d headers; has %d", host, maxRuleHeaders, count)
	}
	return size, nil
}

func validateHeader(host, name, value string) error {
	switch {
	case !httpguts.ValidHeaderFieldName(name):
		return Invalid("rules", "%s: %.64q is no name of a header", host, name)
	case slices.Contains(delivery, http.CanonicalHeaderKey(name)):
		return Invalid("rules", "%s: header %s says how a message is delivered and cannot be set", host, name)
	case !httpguts.ValidHeaderFieldValue(value):
		return Invalid("rules", "%s: the value of header %s has characters that no header can have", host, name)
	case strings.Contains(value, "${e2b."):
		return Invalid("rules", "%s: header %s has a placeholder for a secret or token; there is no store of them here: give the value itself", host, name)
	}
	return nil
}
