package oci_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"git.omukk.dev/wrenn/sandbox/internal/oci"
	"git.omukk.dev/wrenn/sandbox/internal/oci/ocitest"
)

// puller may use the registries at these hosts, over plain HTTP.
func puller(o oci.Options, hosts ...string) *oci.Puller {
	for _, h := range hosts {
		o.Registries = append(o.Registries, oci.Registry{Host: h, Plain: true})
	}
	return oci.NewPuller(o)
}

func resolve(t *testing.T, p *oci.Puller, ref string, c oci.Credentials) (*oci.Image, error) {
	t.Helper()
	r, err := oci.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	return p.Resolve(t.Context(), r, c)
}

// pull reads an image with all its layers.
func pull(t *testing.T, p *oci.Puller, ref string) (*oci.Image, []string, error) {
	t.Helper()
	im, err := resolve(t, p, ref, oci.Credentials{})
	if err != nil {
		return nil, nil, err
	}
	var layers []string
	for i := range im.Layers() {
		text, err := readLayer(t, im, i)
		if err != nil {
			return im, layers, err
		}
		layers = append(layers, text)
	}
	return im, layers, nil
}

func readLayer(t *testing.T, im *oci.Image, i int) (string, error) {
	t.Helper()
	r, err := im.Layer(t.Context(), i)
	if err != nil {
		return "", err
	}
	defer r.Close()
	text, err := io.ReadAll(r)
	return string(text), err
}

func wantError(t *testing.T, err error, words ...string) {
	t.Helper()
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Fatalf("error is %v; want one with %q", err, w)
		}
	}
}

var config = v1.Config{Env: []string{"PATH=/opt/bin:/bin", "A=b"}, User: "app", WorkingDir: "/srv"}

func TestAnImageComesOutOfItsIndexWithEveryLayer(t *testing.T) {
	r := ocitest.New(t, nil)
	one := ocitest.Tar(t, ocitest.File("etc/", ""), ocitest.File("etc/one", "1"))
	two := ocitest.Tar(t, ocitest.File("two", strings.Repeat("2", 1<<20)))
	im := ocitest.Image(t, config, one, two)
	other, err := mutate.ConfigFile(im, &v1.ConfigFile{OS: "linux", Architecture: "arm64"})
	if err != nil {
		t.Fatal(err)
	}
	r.Push("team/app:v1", ocitest.Index(t, map[string]v1.Image{"linux/amd64": im, "linux/arm64": other, "linux/amd64/v3": ocitest.Image(t, config)}))
	digest, err := im.Digest()
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{r.Host + "/team/app:v1", r.Host + "/team/app@" + digest.String(), r.Host + "/team/app:v1@" + digest.String()} {
		got, layers, err := pull(t, puller(oci.Options{}, r.Host), ref)
		if err != nil {
			t.Fatalf("%s: %v", ref, err)
		}
		if len(layers) != 2 || layers[0] != string(one) || layers[1] != string(two) {
			t.Errorf("%s: %d layers, not those that were pushed", ref, len(layers))
		}
		if got.Name != r.Host+"/team/app@"+digest.String() || fmt.Sprint(got.Env) != fmt.Sprint(config.Env) || got.User != "app" || got.Workdir != "/srv" {
			t.Errorf("%s: it is %+v", ref, got)
		}
	}
}

func TestEveryCompressionOfLayersIsRead(t *testing.T) {
	r := ocitest.New(t, nil)
	plain := ocitest.Tar(t, ocitest.File("a", "text"))
	var z bytes.Buffer
	w, err := zstd.NewWriter(&z)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(plain)
	w.Close()
	for name, l := range map[string]v1.Layer{
		"zstd": static.NewLayer(z.Bytes(), types.OCILayerZStd), "plain": static.NewLayer(plain, types.OCIUncompressedLayer),
	} {
		im, err := mutate.Append(ocitest.Image(t, config), mutate.Addendum{Layer: diffed{l, plain}})
		if err != nil {
			t.Fatal(err)
		}
		r.Push("x:"+name, im)
		_, layers, err := pull(t, puller(oci.Options{}, r.Host), r.Host+"/x:"+name)
		if err != nil || layers[0] != string(plain) {
			t.Errorf("%s: %q, %v", name, layers, err)
		}
	}
}

// diffed is a layer whose content, unpacked, is known.
type diffed struct {
	v1.Layer
	plain []byte
}

func (d diffed) DiffID() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(d.plain))
	return h, err
}

func TestDockerHubsImagesComeFromTheMirror(t *testing.T) {
	r := ocitest.New(t, nil)
	r.Push("library/python:3.12", ocitest.Image(t, config, ocitest.Tar(t)))
	m := oci.Registry{Host: r.Host, Plain: true}
	p := oci.NewPuller(oci.Options{Mirror: &m})
	for _, ref := range []string{"python:3.12", "docker.io/python:3.12", "docker.io/library/python:3.12", "index.docker.io/library/python:3.12"} {
		im, err := resolve(t, p, ref, oci.Credentials{})
		if err != nil || !strings.HasPrefix(im.Name, "docker.io/library/python@sha256:") {
			t.Errorf("%s: %+v, %v", ref, im, err)
		}
	}
	_, err := resolve(t, p, "python:4", oci.Credentials{})
	wantError(t, err, "no image docker.io/library/python:4")
}

func TestCredentialsAreForOneRegistry(t *testing.T) {
	var sent atomic.Int64
	r := ocitest.New(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if u, p, _ := q.BasicAuth(); u != "me" || p != "secret" {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			sent.Add(1)
			next.ServeHTTP(w, q)
		})
	})
	r.Push("private:1", ocitest.Image(t, config, ocitest.Tar(t)))
	p, ref := puller(oci.Options{}, r.Host), r.Host+"/private:1"
	if _, err := resolve(t, p, ref, oci.Credentials{Username: "me", Password: "secret"}); err != nil || sent.Load() == 0 {
		t.Errorf("with the right credentials: %v", err)
	}
	_, err := resolve(t, p, ref, oci.Credentials{})
	wantError(t, err, "fromImageRegistry", "give credentials")
	_, err = resolve(t, p, ref, oci.Credentials{Username: "me", Password: "wrong-pass"})
	wantError(t, err, "fromImageRegistry", "does not take")
	if strings.Contains(err.Error(), "wrong-pass") {
		t.Errorf("the error tells the password: %v", err)
	}
}

// TestTokensAreFetchedWhereTheRegistrySays: as Docker Hub does it.
func TestTokensAreFetchedWhereTheRegistrySays(t *testing.T) {
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		json.NewEncoder(w).Encode(map[string]string{"token": "for " + q.URL.Query().Get("scope")})
	}))
	t.Cleanup(tokens.Close)
	r := ocitest.New(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if q.Header.Get("Authorization") != "Bearer for repository:app:pull" {
				w.Header().Set("WWW-Authenticate", `Bearer realm="`+tokens.URL+`/token",service="s",scope="repository:app:pull"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			next.ServeHTTP(w, q)
		})
	})
	r.Push("app:1", ocitest.Image(t, config, ocitest.Tar(t)))
	// A token service is held to the same rules as the registry.
	_, _, err := pull(t, puller(oci.Options{}, r.Host), r.Host+"/app:1")
	wantError(t, err, "not allowed")
	if _, _, err := pull(t, puller(oci.Options{}, r.Host, strings.TrimPrefix(tokens.URL, "http://")), r.Host+"/app:1"); err != nil {
		t.Error(err)
	}
}

func TestABrokenDownloadGoesOnWhereItWas(t *testing.T) {
	for name, c := range map[string]struct {
		piece  int   // after which it breaks
		breaks int64 // how often
		well   bool
	}{
		"three times":                {1000, 3, true},
		"too often":                  {1000, 100, false},
		"often, and comes on always": {1500 << 10, 8, true},
	} {
		t.Run(name, func(t *testing.T) { breakOff(t, c.piece, c.breaks, c.well) })
	}
}

func breakOff(t *testing.T, piece int, breaks int64, well bool) {
	text := ocitest.Tar(t, ocitest.File("a", strings.Repeat("0123456789", 1600000)))
	var gets atomic.Int64
	r := ocitest.New(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if q.Method == http.MethodGet && strings.Contains(q.URL.Path, "/blobs/") && gets.Add(1) > 1 && gets.Load() <= 1+breaks {
				if piece > 1<<20 { // else it begins anew, and leaves out what it has
					w.Header().Set("Accept-Ranges", "bytes")
				}
				w = &cut{w, piece}
			}
			next.ServeHTTP(w, q)
		})
	})
	im, err := mutate.Append(ocitest.Image(t, config), mutate.Addendum{Layer: diffed{static.NewLayer(text, types.OCIUncompressedLayer), text}})
	if err != nil {
		t.Fatal(err)
	}
	r.Push("x:1", im)
	_, layers, err := pull(t, puller(oci.Options{}, r.Host), r.Host+"/x:1")
	if !well {
		wantError(t, err, "layer 1")
		return
	}
	if err != nil || layers[0] != string(text) || gets.Load() < 2+breaks {
		t.Errorf("after %d requests: %d layers, %v", gets.Load(), len(layers), err)
	}
}

// cut breaks the connection after some bytes.
type cut struct {
	http.ResponseWriter
	left int
}

func (c *cut) Write(p []byte) (int, error) {
	if len(p) > c.left {
		c.ResponseWriter.Write(p[:c.left])
		c.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	c.left -= len(p)
	return c.ResponseWriter.Write(p)
}

func TestADownloadThatStallsEnds(t *testing.T) {
	im, err := mutate.Append(ocitest.Image(t, config), mutate.Addendum{Layer: static.NewLayer(make([]byte, 100000), types.OCIUncompressedLayer)})
	if err != nil {
		t.Fatal(err)
	}
	c, err := im.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	r := ocitest.New(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if !strings.Contains(q.URL.Path, "/blobs/") || strings.HasSuffix(q.URL.Path, c.String()) {
				next.ServeHTTP(w, q)
				return
			}
			w.Header().Set("Content-Length", "100000")
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			<-over
		})
	})
	t.Cleanup(func() { close(over) })
	r.Push("x:1", im)
	_, _, err = pull(t, puller(oci.Options{Stall: 20 * time.Millisecond}, r.Host), r.Host+"/x:1")
	wantError(t, err, "layer 1")
}
