package egress

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// Rules are the headers to set in requests: by host name, or by "*." and a name
// for all hosts below it. The most exact one decides alone.
type Rules map[string]map[string]string

// Bounds of Rules.
const (
	maxHosts   = 256
	maxHeaders = 64
	maxBytes   = 64 << 10 // of all names and values together
)

// reserved are headers that say how a message is delivered, and to whom.
var reserved = []string{"Connection", "Content-Length", "Expect", "Host", "Keep-Alive", "Proxy-Authenticate",
	"Proxy-Authorization", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade"}

// Check tells what is wrong with rules; ok says what a host's name is. Values
// are not in its errors.
func (r Rules) Check(ok func(name string) bool) error {
	if len(r) > maxHosts {
		return fmt.Errorf("there must be at most %d hosts", maxHosts)
	}
	size := 0
	for host, headers := range r {
		if !ok(host) {
			return fmt.Errorf("%.64q is no host name, such as example.com or *.example.com", host)
		}
		if len(headers) > maxHeaders {
			return fmt.Errorf("%s: there must be at most %d headers", host, maxHeaders)
		}
		for name, value := range headers {
			if err := checkHeader(name, value); err != nil {
				return fmt.Errorf("%s: header %.64q: %w", host, name, err)
			}
			size += len(name) + len(value)
		}
	}
	if size > maxBytes {
		return fmt.Errorf("all headers together must have at most %d bytes", maxBytes)
	}
	return nil
}

func checkHeader(name, value string) error {
	switch {
	case !httpguts.ValidHeaderFieldName(name):
		return errors.New("this is no name of a header")
	case slices.Contains(reserved, http.CanonicalHeaderKey(name)):
		return errors.New("it says how a message is delivered and cannot be set")
	case !httpguts.ValidHeaderFieldValue(value):
		return errors.New("its value has characters that no header can have")
	}
	return nil
}

// find gives the headers for a host; none where no rule is about it.
func (r Rules) find(host string) map[string]string {
	if headers, ok := r[host]; ok {
		return headers
	}
	for rest := host; ; {
		_, below, ok := strings.Cut(rest, ".")
		if !ok {
			return nil
		}
		if headers, ok := r["*."+below]; ok {
			return headers
		}
		rest = below
	}
}
