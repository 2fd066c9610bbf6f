package proxy

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net/http"
	"regexp"
	"strconv"
	"strings"
)

// EnvdPort is where the guest agent listens.
const EnvdPort = 49983

// The headers by which the SDKs name a sandbox, and that open a private port.
const (
	idHeader      = "E2b-Sandbox-Id"
	portHeader    = "E2b-Sandbox-Port"
	trafficHeader = "E2b-Traffic-Access-Token"
)

var (
	hostRE = regexp.MustCompile(`^([0-9]{1,5})-([a-z0-9]{1,32})\.`)
	idRE   = regexp.MustCompile(`^[a-z0-9]{1,32}$`)
	// signatureRE is the form of every signature.
	signatureRE = regexp.MustCompile(`^v1_[A-Za-z0-9+/]{43}$`)
)

// route is where a request is to go.
type route struct {
	id   string
	port int
	// signed: no sandbox is named; a signature of /files finds it.
	signed bool
	// bad says what is wrong with how the sandbox is named.
	bad string
}

// routeOf reads a request's target; false when it is for no sandbox.
func routeOf(r *http.Request) (route, bool) {
	if m := hostRE.FindStringSubmatch(strings.ToLower(r.Host)); m != nil {
		return checked(m[2], m[1]), true
	}
	if id := r.Header.Get(idHeader); id != "" {
		// Older SDKs append the client's ID.
		id, _, _ = strings.Cut(id, "-")
		port := r.Header.Get(portHeader)
		if port == "" {
			port = strconv.Itoa(EnvdPort)
		}
		return checked(id, port), true
	}
	if r.URL.Path == "/files" && r.URL.Query().Get("signature") != "" {
		return route{port: EnvdPort, signed: true}, true
	}
	return route{}, false
}

func checked(id, port string) route {
	rt := route{id: id}
	if !idRE.MatchString(id) {
		return route{bad: "the sandbox's ID must be 1 to 32 of a-z and 0-9"}
	}
	n, err := strconv.Atoi(port)
	if err != nil || n < 1 || n > 65535 {
		rt.bad = "the port must be 1 to 65535"
	}
	rt.port = n
	return rt
}

// maxSigned bounds what is hashed for every token: a path and a user.
const maxSigned = 8 << 10

// signature is the request's. A client that did not encode its "+" meant one.
func signature(r *http.Request) string {
	return strings.ReplaceAll(r.URL.Query().Get("signature"), " ", "+")
}

// signedBy tells whether the request's signature was made with a token.
func signedBy(r *http.Request) func(token string) bool {
	operation := "read"
	if r.Method == http.MethodPost {
		operation = "write"
	}
	q := r.URL.Query()
	got := []byte(signature(r))
	expiry := ""
	if e := q.Get("signature_expiration"); e != "" {
		expiry = ":" + e
	}
	head := q.Get("path") + ":" + operation + ":" + q.Get("username") + ":"
	if len(head)+len(expiry) > maxSigned {
		return func(string) bool { return false } // no file has such a name
	}
	return func(token string) bool {
		sum := sha256.Sum256([]byte(head + token + expiry))
		want := "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
		return token != "" && subtle.ConstantTimeCompare([]byte(want), got) == 1
	}
}

// unforwarded says of what no guest is to get why, and the status.
func unforwarded(r *http.Request, rt route) (string, int) {
	switch {
	case r.Method == http.MethodConnect:
		return "a sandbox is no proxy; send the request itself", http.StatusMethodNotAllowed
	case rt.signed && !signatureRE.MatchString(signature(r)):
		// Before any token is tried: it is the cheapest way to be wrong.
		return "invalid signature", http.StatusUnauthorized
	case rt.port == EnvdPort && hostsOwn(r.URL.Path):
		return "only the sandbox's host may call this", http.StatusNotFound
	case rt.port == EnvdPort && r.Header.Get("Upgrade") != "":
		// What is said after an upgrade we do not see, and could not mark as
		// forwarded.
		return "the guest agent's port takes no upgrades", http.StatusBadRequest
	}
	return "", 0
}

// hostsOwn names the guest agent's calls that are the host's alone, however
// the path is written.
func hostsOwn(path string) bool {
	first := strings.TrimLeft(path, "/")
	for _, own := range []string{"init", "sync", "trust"} {
		if strings.EqualFold(first, own) || strings.HasPrefix(strings.ToLower(first), own+"/") {
			return true
		}
	}
	return strings.Contains(path, "/../") || strings.Contains(path, "/./")
}
