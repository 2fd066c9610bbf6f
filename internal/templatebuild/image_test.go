package templatebuild_test

import (
	"bytes"
	"net/http"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"git.omukk.dev/wrenn/sandbox/internal/oci"
	"git.omukk.dev/wrenn/sandbox/internal/oci/ocitest"
	"git.omukk.dev/wrenn/sandbox/internal/store"
	"git.omukk.dev/wrenn/sandbox/internal/templatebuild"
)

// withImages is a builder that may use a registry on this machine.
func withImages(t *testing.T, f *fake, host string) *templatebuild.Builder {
	t.Helper()
	db, err := store.Open(t.Context(), t.TempDir()+"/db")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	b, err := templatebuild.New(t.Context(), templatebuild.Options{
		Store: db, Sandboxes: f, Dir: t.TempDir(), ReadyEvery: time.Millisecond,
		Images: oci.NewPuller(oci.Options{Registries: []oci.Registry{{Host: host, Plain: true}}}),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func TestABuildFromAnImage(t *testing.T) {
	r := ocitest.New(t, nil)
	one := ocitest.Tar(t, ocitest.File("big", strings.Repeat("x", 1<<20)))
	two := ocitest.Tar(t, ocitest.File("two", ""))
	r.Push("app:1", ocitest.Image(t, v1.Config{Env: []string{"PATH=/opt/bin:/bin", "A=b=c", "NOT A NAME=x"}, User: "app"}, one, two))
	f := newFake()
	x := build(t, withImages(t, f, r.Host), "web", nil, templatebuild.Spec{
		FromImage: r.Host + "/app:1", Steps: run("make").Steps,
	})
	if x.Status != templatebuild.Ready {
		t.Fatalf("the build: %s, %s\n%s", x.Status, x.Reason, text(x.Log))
	}
	if len(f.layers) != 2 || f.layers[0] != string(one) || f.layers[1] != string(two) {
		t.Errorf("%d layers came, not as they were pushed", len(f.layers))
	}
	// The script, which is long, between its neighbours.
	if n := len(f.ran); n != 5 || f.ran[0] != "root: adopt-root" || f.ran[1] != "(reboot)" || f.ran[2] != "root: drop-old-root" ||
		!strings.Contains(f.ran[3], "the image lacks") || f.ran[4] != "make" {
		t.Errorf("ran %.200q", f.ran)
	}
	if got := f.files[templatebuild.DefaultsPath]; got != `{"envs":{"A":"b=c","PATH":"/opt/bin:/bin"}}` {
		t.Errorf("the defaults are %s", got)
	}
	if !strings.Contains(text(x.Log), "NOT A NAME") || !strings.Contains(text(x.Log), `user ("app")`) {
		t.Errorf("the log says\n%s", text(x.Log))
	}
}

func TestABuildFromAnImageThatFailsLeavesNothing(t *testing.T) {
	r := ocitest.New(t, nil)
	r.Push("app:1", ocitest.Image(t, v1.Config{}, ocitest.Tar(t)))
	r.Push("bad:1", ocitest.Image(t, v1.Config{}, append([]byte("bad"), bytes.Repeat([]byte{0}, 1<<20)...)))
	for name, c := range map[string]struct{ image, failOn, want string }{
		"no image":    {"none:1", "", "fromImage: there is no image"},
		"a bad layer": {"bad:1", "", "it is bad"},
		"no reboot":   {"app:1", "reboot", "reboot broke"},
		"no process":  {"app:1", "start", "start broke"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake()
			f.failOn = c.failOn
			x := build(t, withImages(t, f, r.Host), "web", nil, templatebuild.Spec{FromImage: r.Host + "/" + c.image})
			if x.Status != templatebuild.Failed || x.Step != "base" || !strings.Contains(x.Reason, c.want) {
				t.Errorf("%s at step %q: %s; want %q", x.Status, x.Step, x.Reason, c.want)
			}
			if s, n := f.left(); s != 0 || n != 0 {
				t.Errorf("%d sandboxes and %d snapshots are left", s, n)
			}
		})
	}
}

func TestABuildIsCancelledWhileItsImageComes(t *testing.T) {
	asked, over := make(chan struct{}, 10), make(chan struct{})
	r := ocitest.New(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if strings.Contains(q.URL.Path, "/blobs/") {
				asked <- struct{}{}
				<-over
			}
			next.ServeHTTP(w, q)
		})
	})
	t.Cleanup(func() { close(over) })
	r.Push("app:1", ocitest.Image(t, v1.Config{}, ocitest.Tar(t)))
	f := newFake()
	b := withImages(t, f, r.Host)
	x, err := b.Request(t.Context(), "web", nil, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Start(t.Context(), "web", x.ID, templatebuild.Spec{FromImage: r.Host + "/app:1"}); err != nil {
		t.Fatal(err)
	}
	<-asked
	if err := b.Cancel(t.Context(), "web", x.ID); err != nil {
		t.Fatal(err)
	}
	if x = wait(t, b, x); x.Status != templatebuild.Failed || !strings.Contains(x.Reason, "cancelled") {
		t.Errorf("%s: %s", x.Status, x.Reason)
	}
}
