package httpapi

import (
	"bytes"
	"io"
	"maps"
	"net/http"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

const (
	idempotencyHeader = "Idempotency-Key"
	replayedHeader    = "Idempotent-Replayed"
)

// kept collects an answer before it is sent, so that it can be sent again.
type kept struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (k *kept) Header() http.Header { return k.header }

func (k *kept) WriteHeader(status int) {
	if k.status == 0 {
		k.status = status
	}
}

func (k *kept) Write(b []byte) (int, error) {
	k.WriteHeader(http.StatusOK)
	return k.body.Write(b)
}

// once is do for calls that may carry an Idempotency-Key: the same key and the
// same request get the same answer, and the work is done once.
func (a *api) once(h handler) http.HandlerFunc {
	plain := a.do(h)
	return a.do(func(w http.ResponseWriter, r *http.Request) error {
		names := r.Header.Values(idempotencyHeader)
		switch len(names) {
		case 0:
			plain(w, r)
			return nil
		case 1:
		default:
			return control.Invalid(idempotencyHeader, "must be given once")
		}
		body, err := readBody(w, r)
		if err != nil {
			return err
		}
		ask := control.Answer{
			Scope: apiKeyOf(r), Name: names[0],
			Digest: control.RequestDigest(r.Method, r.URL.RequestURI(), body),
		}
		k := &kept{header: http.Header{}}
		got, replayed, err := a.svc.Once(r.Context(), ask, func() control.Answer {
			r.Body = io.NopCloser(bytes.NewReader(body))
			plain(k, r)
			return control.Answer{Status: k.status, Location: k.header.Get("Location"), Body: k.body.String()}
		})
		if err != nil {
			return err
		}
		if replayed {
			k.header.Set("Content-Type", "application/json")
			k.header.Set(replayedHeader, "true")
			if got.Location != "" {
				k.header.Set("Location", got.Location)
			}
		}
		maps.Copy(w.Header(), k.header)
		w.WriteHeader(got.Status)
		_, _ = io.WriteString(w, got.Body) // a client that has gone asks again
		return nil
	})
}
