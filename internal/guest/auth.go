package guest

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/gen/filesystem/filesystemconnect"
	"git.omukk.dev/wrenn/sandbox/internal/gen/process/processconnect"
)

// tokenHeader carries the sandbox's token.
const tokenHeader = "X-Access-Token"

// guard decides who may call what:
//
//	/health         everyone
//	/init           the gateway
//	/sync, /trust   the gateway, with the token
//	/files          the token, or a signature made with it (see allowFile)
//	everything else the token
//
// Before the first /init only the first two answer.
func (s *Server) guard(next http.Handler) http.Handler {
	refuse := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var err *connect.Error
		switch r.URL.Path {
		case "/health":
		case "/init":
			err = s.fromGateway(r)
		case "/sync", "/trust":
			if err = s.fromGateway(r); err == nil {
				err = s.hasToken(r)
			}
		case "/files":
			if s.ident.Load() == nil {
				err = errNotConfirmed
			} else if r.Header.Get(tokenHeader) != "" {
				err = s.hasToken(r)
			} // else the handler checks the signature
		default:
			err = s.hasToken(r)
		}
		if err == nil {
			next.ServeHTTP(w, r)
			return
		}
		// A plain GET could be a Connect one by its looks: the path decides.
		rpc := strings.HasPrefix(r.URL.Path, "/"+processconnect.ProcessName) ||
			strings.HasPrefix(r.URL.Path, "/"+filesystemconnect.FilesystemName)
		if rpc && refuse.IsSupported(r) {
			_ = refuse.Write(w, r, err)
			return
		}
		writeError(w, err)
	})
}

var (
	errNotConfirmed = connect.NewError(connect.CodeUnavailable, errors.New("the sandbox has not been confirmed by its host"))
	errToken        = connect.NewError(connect.CodeUnauthenticated, errors.New("unauthorized access, please provide a valid access token or method signing if supported"))
	errGateway      = connect.NewError(connect.CodePermissionDenied, errors.New("only the sandbox's host may call this"))
)

func (s *Server) fromGateway(r *http.Request) *connect.Error {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return errGateway
	}
	addr, err := netip.ParseAddr(host)
	if err != nil || addr.Unmap() != s.opt.Gateway {
		return errGateway
	}
	// The host also forwards its clients' calls, from the same address. It
	// must not forward this one; where it does, forwarding leaves marks.
	if r.Header.Get("E2b-Sandbox-Id") != "" || r.Header.Get("X-Forwarded-For") != "" || r.Header.Get("Forwarded") != "" {
		return errGateway
	}
	return nil
}

func (s *Server) hasToken(r *http.Request) *connect.Error {
	id := s.ident.Load()
	if id == nil {
		return errNotConfirmed
	}
	if !equalSecret(r.Header.Get(tokenHeader), id.Token) {
		return errToken
	}
	return nil
}

// equalSecret takes the same time whatever the strings are.
func equalSecret(got, want string) bool {
	g, w := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(want))
	return want != "" && subtle.ConstantTimeCompare(g[:], w[:]) == 1
}

// fileSignature is the SDKs' signature of one file operation ("read" or
// "write"): path, operation, user and token, and the expiry where there is
// one, as the query has them.
func fileSignature(path, operation, user, token, expiry string) string {
	text := strings.Join([]string{path, operation, user, token}, ":")
	if expiry != "" {
		text += ":" + expiry
	}
	sum := sha256.Sum256([]byte(text))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// allowFile checks the signature of a /files call without a token.
func (s *Server) allowFile(r *http.Request, operation string) *connect.Error {
	id := s.ident.Load()
	if id == nil {
		return errNotConfirmed
	}
	if r.Header.Get(tokenHeader) != "" {
		return nil // guard has checked it
	}
	q := r.URL.Query()
	got := q.Get("signature")
	if got == "" {
		return errToken
	}
	// A client that did not encode its "+" meant one.
	got = strings.ReplaceAll(got, " ", "+")
	expiry := q.Get("signature_expiration")
	if !equalSecret(got, fileSignature(q.Get("path"), operation, q.Get("username"), id.Token, expiry)) {
		return connect.NewError(connect.CodeUnauthenticated, errors.New("invalid signature"))
	}
	if expiry != "" {
		at, err := strconv.ParseInt(expiry, 10, 64)
		if err != nil {
			return connect.NewError(connect.CodeUnauthenticated, errors.New("invalid signature expiration"))
		}
		if s.opt.Now().Unix() >= at {
			return connect.NewError(connect.CodeUnauthenticated, errors.New("signature is already expired"))
		}
	}
	return nil
}

// httpStatus maps this package's error codes to those of plain HTTP calls.
func httpStatus(c connect.Code) int {
	switch c {
	case connect.CodeInvalidArgument:
		return http.StatusBadRequest
	case connect.CodeUnauthenticated:
		return http.StatusUnauthorized
	case connect.CodePermissionDenied:
		return http.StatusForbidden
	case connect.CodeNotFound:
		return http.StatusNotFound
	case connect.CodeAlreadyExists, connect.CodeFailedPrecondition:
		return http.StatusConflict
	case connect.CodeResourceExhausted:
		return http.StatusInsufficientStorage
	case connect.CodeUnavailable:
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}

// writeError answers a plain HTTP call: {"code":<status>,"message":"…"}.
func writeError(w http.ResponseWriter, err error) {
	status, body := errorAnswer(err)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

func errorAnswer(err error) (status int, body []byte) {
	status = httpStatus(codeOf(err))
	msg := err.Error()
	var ce *connect.Error
	if errors.As(err, &ce) {
		msg = ce.Message()
	}
	body, _ = json.Marshal(map[string]any{"code": status, "message": msg}) // a number and a string
	return status, append(body, '\n')
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
