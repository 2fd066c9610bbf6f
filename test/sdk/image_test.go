package sdk

import (
	"archive/tar"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"git.omukk.dev/wrenn/sandbox/internal/oci/ocitest"
)

// TestTemplatesFromImages builds templates from images of a registry on this
// machine: it stands for Docker Hub, and asks for a password for one of them.
func TestTemplatesFromImages(t *testing.T) {
	r := ocitest.New(t, askForPassword)
	root := hostRoot(t, "bash", "cat", "chown", "find", "getent", "id", "ls", "mkdir", "mktemp", "rm", "sh", "sleep", "stat", "tar", "touch")
	change := ocitest.Tar(t, ocitest.File("etc/.wh.gone", ""), ocitest.File("opt/tool/bin/tool", "#!/bin/sh\necho the tool\n"))
	image := ocitest.Image(t, v1.Config{
		Env: []string{"PATH=/opt/tool/bin:/usr/local/bin:/usr/bin:/bin", "FLAVOUR=from the image", "PYTHON_VERSION=3.12"}, User: "app", WorkingDir: "/srv",
	}, root, change)
	r.Push("private/app:1", image)
	bashless := ocitest.Image(t, v1.Config{}, hostRoot(t, "sh"))
	r.Push("library/bashless:1", ocitest.Index(t, map[string]v1.Image{"linux/amd64": bashless, "linux/arm64": ocitest.Image(t, v1.Config{}, root)}))
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	s := ownServer(t, func(o *options) { o.Args = append(o.Args, "--registry-mirror", "http://"+r.Host) })
	env := append(modeAOf(t, s), "WRENN_TEST_REGISTRY="+r.Host, "WRENN_TEST_DIGEST="+digest.String())
	script(t, env, sdk.Python(), "py/images.py")
}

// askForPassword of everybody who wants a private image.
func askForPassword(next http.Handler) http.Handler {
	private := regexp.MustCompile(`^/v2/private/`)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); private.MatchString(r.URL.Path) && (u != "me" || p != "secret") {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

var library = regexp.MustCompile(`(/\S+) \(0x`)

// hostRoot is a layer with programs of this machine and the libraries that they
// need: a small distribution, without a package manager.
func hostRoot(t *testing.T, programs ...string) []byte {
	t.Helper()
	entries := []ocitest.Entry{
		link("bin", "usr/bin"), link("lib", "usr/lib"), link("lib64", "usr/lib64"), link("sbin", "usr/bin"),
		ocitest.File("etc/passwd", "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/:/bin/sh\n"), ocitest.File("etc/group", "root:x:0:\napp:x:1000:\n"),
		ocitest.File("etc/gone", ""), ocitest.File("etc/skel/.profile", "# from the image\n"), ocitest.File("root/", ""),
	}
	files := map[string]string{}
	for _, p := range programs {
		path, err := exec.LookPath(p)
		if err != nil {
			t.Fatal(err)
		}
		files["usr/bin/"+p] = path
		out, err := exec.Command("ldd", path).Output()
		if err != nil {
			t.Fatalf("ldd %s: %v", path, err)
		}
		for _, m := range library.FindAllSubmatch(out, -1) {
			lib := string(m[1])
			dir, err := filepath.EvalSymlinks(filepath.Dir(lib))
			if err != nil {
				t.Fatal(err)
			}
			files[filepath.Join(dir, filepath.Base(lib))[1:]] = lib
			// What loads it looks where the program says.
			if top := filepath.Dir(lib); top == "/lib64" {
				files["usr/lib64/"+filepath.Base(lib)] = lib
			}
		}
	}
	for name, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, ocitest.File(name, string(text)))
	}
	return ocitest.Tar(t, entries...)
}

func link(name, to string) ocitest.Entry {
	return ocitest.Entry{Header: tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeSymlink}}
}
