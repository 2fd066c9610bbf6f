package oci_test

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"git.omukk.dev/wrenn/sandbox/internal/oci"
	"git.omukk.dev/wrenn/sandbox/internal/oci/ocitest"
)

// TestNothingPrivateIsReached: references, redirects and names that lead to this
// machine or its networks end before a connection is made.
func TestNothingPrivateIsReached(t *testing.T) {
	var reached atomic.Int64
	inner := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Add(1) }))
	t.Cleanup(inner.Close)
	secure := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Add(1) }))
	t.Cleanup(secure.Close)
	port := secure.URL[strings.LastIndex(secure.URL, ":"):]
	for _, host := range []string{
		strings.TrimPrefix(inner.URL, "http://"), strings.TrimPrefix(secure.URL, "https://"), "localhost" + port,
		"127.1.2.3" + port, "0.0.0.0" + port, "[::1]" + port, "[::ffff:127.0.0.1]" + port, "169.254.169.254", "10.0.0.1" + port, "[fd00::1]", "[fe80::1]", "[64:ff9b::7f00:1]",
	} {
		ref, err := oci.ParseReference(host + "/x:1")
		if err != nil {
			continue // as good
		}
		_, err = oci.NewPuller(oci.Options{}).Resolve(t.Context(), ref, oci.Credentials{})
		wantError(t, err, "not allowed", "--registry")
	}
	// A registry that may be used sends us elsewhere.
	for _, to := range []string{inner.URL, secure.URL} {
		r := ocitest.New(t, func(http.Handler) http.Handler { return http.RedirectHandler(to+"/", http.StatusTemporaryRedirect) })
		_, err := resolve(t, puller(oci.Options{}, r.Host), r.Host+"/x:1", oci.Credentials{})
		wantError(t, err, "not allowed")
	}
	if n := reached.Load(); n > 0 {
		t.Errorf("%d requests came through", n)
	}
}

func TestPlainHTTPIsForWhomTheOperatorSays(t *testing.T) {
	r := ocitest.New(t, nil)
	r.Push("x:1", ocitest.Image(t, config, ocitest.Tar(t)))
	_, err := resolve(t, oci.NewPuller(oci.Options{Registries: []oci.Registry{{Host: r.Host}}}), r.Host+"/x:1", oci.Credentials{})
	if err == nil {
		t.Error("a registry without TLS was used as one with")
	}
}

// tamper changes the body of the nth blob that is asked for.
func tamper(n int64, change func([]byte) []byte) func(http.Handler) http.Handler {
	var blobs atomic.Int64
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if q.Method != http.MethodGet || !strings.Contains(q.URL.Path, "/blobs/") || blobs.Add(1) != n {
				next.ServeHTTP(w, q)
				return
			}
			rec := httptest.NewRecorder()
			next.ServeHTTP(rec, q)
			w.Write(change(rec.Body.Bytes()))
		})
	}
}

func flip(b []byte) []byte { b[len(b)/2] ^= 1; return b }

func TestWhatIsNotWhatItsDigestSaysIsRefused(t *testing.T) {
	layer := ocitest.Tar(t, ocitest.File("a", strings.Repeat("text", 1000)))
	for name, c := range map[string]struct {
		change func(http.Handler) http.Handler
		word   string
	}{
		"configuration": {tamper(1, flip), "configuration"},
		"layer":         {tamper(2, flip), "layer 1"},
	} {
		t.Run(name, func(t *testing.T) {
			r := ocitest.New(t, c.change)
			im, err := mutate.Append(ocitest.Image(t, config), mutate.Addendum{Layer: static.NewLayer(layer, types.OCIUncompressedLayer)})
			if err != nil {
				t.Fatal(err)
			}
			r.Push("x:1", im)
			_, _, err = pull(t, puller(oci.Options{}, r.Host), r.Host+"/x:1")
			wantError(t, err, c.word)
		})
	}
	t.Run("unpacked", func(t *testing.T) {
		r := ocitest.New(t, nil)
		im, err := mutate.Append(ocitest.Image(t, config), mutate.Addendum{Layer: diffed{static.NewLayer(layer, types.OCIUncompressedLayer), []byte("other")}})
		if err != nil {
			t.Fatal(err)
		}
		r.Push("x:1", im)
		_, _, err = pull(t, puller(oci.Options{}, r.Host), r.Host+"/x:1")
		wantError(t, err, "layer 1", "configuration says")
	})
}

func TestHostileImagesAreBounded(t *testing.T) {
	bomb := ocitest.Image(t, config, bytes.Repeat([]byte{0}, 8<<20)) // some KiB as gzip
	var many []v1.Layer
	for range 257 {
		many = append(many, static.NewLayer(nil, types.OCIUncompressedLayer))
	}
	deep, err := mutate.AppendLayers(ocitest.Image(t, config), many...)
	if err != nil {
		t.Fatal(err)
	}
	odd, err := mutate.AppendLayers(ocitest.Image(t, config), static.NewLayer([]byte("x"), "application/x-rar"))
	if err != nil {
		t.Fatal(err)
	}
	windows, err := mutate.ConfigFile(ocitest.Image(t, config), &v1.ConfigFile{OS: "windows", Architecture: "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	short, err := mutate.ConfigFile(ocitest.Image(t, config, ocitest.Tar(t)), &v1.ConfigFile{OS: "linux", Architecture: "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	r := ocitest.New(t, nil)
	for as, im := range map[string]v1.Image{"bomb": bomb, "deep": deep, "odd": odd, "windows": windows, "short": short} {
		r.Push("x:"+as, im)
	}
	r.Push("x:arm", ocitest.Index(t, map[string]v1.Image{"linux/arm64": ocitest.Image(t, config)}))
	p := puller(oci.Options{MaxUnpacked: 1 << 20, MaxBytes: 1 << 20}, r.Host)
	for as, words := range map[string][]string{
		"bomb":    {"unpacked", "1 MiB"},
		"deep":    {"257 layers", "256"},
		"odd":     {"application/x-rar"},
		"windows": {"windows/amd64"},
		"short":   {"names 0 layers", "manifest 1"},
		"arm":     {"linux/arm64", "no linux/amd64"},
	} {
		_, _, err := pull(t, p, r.Host+"/x:"+as)
		wantError(t, err, words...)
	}
	_, _, err = pull(t, puller(oci.Options{MaxBytes: 100}, r.Host), r.Host+"/x:bomb")
	wantError(t, err, "more than")
}

func TestGarbageOfARegistryIsAnError(t *testing.T) {
	for name, text := range map[string]string{
		"no JSON": "<html>", "nothing": "{}", "huge": `{"a":"` + strings.Repeat("x", 8<<20) + `"}`,
		"schema 1":                         `{"schemaVersion":1,"name":"x","tag":"1","fsLayers":[]}`,
		"a negative layer":                 `{"schemaVersion":2,"config":{"digest":"sha256:` + strings.Repeat("0", 64) + `","size":2},"layers":[{"size":-1}]}`,
		"an index of one that is an index": `{"schemaVersion":2,"manifests":[{"digest":"x","size":1,"platform":{"os":"linux","architecture":"amd64"}}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			r := ocitest.New(t, func(http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
					w.Write([]byte(text))
				})
			})
			if _, _, err := pull(t, puller(oci.Options{}, r.Host), r.Host+"/x:1"); err == nil {
				t.Error("no error")
			}
		})
	}
}

func TestReferences(t *testing.T) {
	for in, want := range map[string]string{
		"python": "docker.io/library/python:latest", "python:3.12": "docker.io/library/python:3.12",
		"oven/bun:1": "docker.io/oven/bun:1", "ghcr.io/a/b/c:d": "ghcr.io/a/b/c:d", "host:5000/x": "host:5000/x:latest",
		"localhost/x":                               "localhost/x:latest",
		"a@sha256:" + strings.Repeat("0", 64):       "docker.io/library/a@sha256:" + strings.Repeat("0", 64),
		"a:1@sha256:" + strings.Repeat("0", 64):     "docker.io/library/a@sha256:" + strings.Repeat("0", 64),
		"docker.io/debian:12":                       "docker.io/library/debian:12",
		"index.docker.io/library/debian:12":         "docker.io/library/debian:12",
		"123.dkr.ecr.eu-west-1.amazonaws.com/x/y:z": "123.dkr.ecr.eu-west-1.amazonaws.com/x/y:z",
	} {
		got, err := oci.ParseReference(in)
		if err != nil || got.String() != want {
			t.Errorf("%s: %s, %v; want %s", in, got, err, want)
		}
	}
	for _, bad := range []string{"", " ", "A", "a b", "a:", "a:b c", "a@sha256:0", "http://host/x", "host:99999999/", "../x", "a/../b", "user@host/x", strings.Repeat("a", 2000), "x\x00y"} {
		if got, err := oci.ParseReference(bad); err == nil {
			t.Errorf("%.40q was taken as %.100s", bad, got)
		}
	}
}

func FuzzParseReference(f *testing.F) {
	f.Add("python:3.12")
	f.Add("host:1/x@sha256:" + strings.Repeat("a", 64))
	f.Fuzz(func(t *testing.T, s string) {
		r, err := oci.ParseReference(s)
		if err != nil {
			return
		}
		again, err := oci.ParseReference(r.String())
		if err != nil || again != r {
			t.Errorf("%q is %q, and that is %q, %v", s, r, again, err)
		}
	})
}

func TestRegistriesOfTheOperator(t *testing.T) {
	for in, want := range map[string]oci.Registry{
		"host": {Host: "host"}, "host:5000": {Host: "host:5000"}, "http://10.0.0.1:5000/": {Host: "10.0.0.1:5000", Plain: true}, "https://a.b": {Host: "a.b"},
	} {
		if got, err := oci.ParseRegistry(in); err != nil || got != want {
			t.Errorf("%s: %+v, %v", in, got, err)
		}
	}
	for _, bad := range []string{"", "http://", "a/b", "ftp://x", "a b"} {
		if got, err := oci.ParseRegistry(bad); err == nil {
			t.Errorf("%q was taken as %+v", bad, got)
		}
	}
}
