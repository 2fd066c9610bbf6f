// Package ocitest has a registry and images for tests.
package ocitest

import (
	"archive/tar"
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Registry is a real registry on this machine, in memory, over plain HTTP.
type Registry struct {
	Host string
	t    testing.TB
	// own is the registry without what the test put before it.
	own *httptest.Server
}

// New starts one. before, where not nil, stands before its answers.
func New(t testing.TB, before func(http.Handler) http.Handler) *Registry {
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	front := h
	if before != nil {
		front = before(h)
	}
	own, s := httptest.NewServer(h), httptest.NewServer(front)
	t.Cleanup(own.Close)
	t.Cleanup(s.Close)
	return &Registry{Host: strings.TrimPrefix(s.URL, "http://"), t: t, own: own}
}

// Image makes one for linux/amd64 of layers, each a tar.
func Image(t testing.TB, c v1.Config, layers ...[]byte) v1.Image {
	t.Helper()
	im, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: "amd64", Config: c, RootFS: v1.RootFS{Type: "layers"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(l)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if im, err = mutate.AppendLayers(im, layer); err != nil {
			t.Fatal(err)
		}
	}
	return im
}

// Index makes one of images by platform, os/architecture.
func Index(t testing.TB, images map[string]v1.Image) v1.ImageIndex {
	t.Helper()
	ix := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for platform, im := range images {
		p, err := v1.ParsePlatform(platform)
		if err != nil {
			t.Fatal(err)
		}
		ix = mutate.AppendManifests(ix, mutate.IndexAddendum{Add: im, Descriptor: v1.Descriptor{Platform: p}})
	}
	return ix
}

// Push puts an image or an index into the registry, under repository:tag.
func (r *Registry) Push(as string, what remote.Taggable) {
	r.t.Helper()
	ref, err := name.ParseReference(strings.TrimPrefix(r.own.URL, "http://")+"/"+as, name.Insecure)
	if err != nil {
		r.t.Fatal(err)
	}
	switch x := what.(type) {
	case v1.Image:
		err = remote.Write(ref, x)
	case v1.ImageIndex:
		err = remote.WriteIndex(ref, x)
	default:
		err = remote.Tag(ref.(name.Tag), x)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// Entry is a file of a layer.
type Entry struct {
	tar.Header
	Text string
}

// Tar makes a layer.
func Tar(t testing.TB, entries ...Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			if strings.HasSuffix(h.Name, "/") {
				h.Typeflag = tar.TypeDir
			}
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		h.Size = int64(len(e.Text))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.Text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// File is a file of a layer; the name of a directory ends in a slash.
func File(name, text string) Entry { return Entry{tar.Header{Name: name}, text} }
