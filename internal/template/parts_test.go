package template

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestOptionsAreChecked(t *testing.T) {
	good := Options{Dir: "d", Cache: "c", EnvdPath: "e"}
	if err := good.setDefaults(); err != nil {
		t.Fatal(err)
	}
	if good.DiskSizeBytes != DefaultDiskSize || good.SourceDateEpoch != DefaultSourceDateEpoch || !filepath.IsAbs(good.Dir) {
		t.Errorf("defaults: %+v", good)
	}
	for name, o := range map[string]Options{
		"no directory":  {Cache: "c", EnvdPath: "e"},
		"no cache":      {Dir: "d", EnvdPath: "e"},
		"no envd":       {Dir: "d", Cache: "c"},
		"odd disk":      {Dir: "d", Cache: "c", EnvdPath: "e", DiskSizeBytes: minDisk + 1},
		"tiny disk":     {Dir: "d", Cache: "c", EnvdPath: "e", DiskSizeBytes: blockSize},
		"huge disk":     {Dir: "d", Cache: "c", EnvdPath: "e", DiskSizeBytes: 2 * maxDisk},
		"negative disk": {Dir: "d", Cache: "c", EnvdPath: "e", DiskSizeBytes: -blockSize},
		"time before":   {Dir: "d", Cache: "c", EnvdPath: "e", SourceDateEpoch: -1},
		"time after":    {Dir: "d", Cache: "c", EnvdPath: "e", SourceDateEpoch: 1 << 31},
	} {
		if _, err := Build(t.Context(), o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestMissingToolNamesItsPackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := findTool("mmdebstrap")
	if err == nil || !strings.Contains(err.Error(), "apt-get install mmdebstrap") {
		t.Errorf("error is %v", err)
	}
	if p, err := findTool("mke2fs"); err != nil || !filepath.IsAbs(p) {
		t.Errorf("mke2fs outside PATH: %q, %v", p, err)
	}
}

func TestHostSources(t *testing.T) {
	const debian12 = "ID=debian\nVERSION_CODENAME=bookworm\n"
	for _, c := range []struct {
		name, osRelease, list, sources, want string
	}{
		{"deb822, others' archives left out", debian12, "deb https://packages.example/apt x-bookworm main\n",
			"Types: deb\n# old\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: /k.gpg\n\n" +
				"Types: deb\nURIs: http://mirror/other\nSuites: nodistro\nComponents: main\n\n" +
				"Types: deb-src\nURIs: http://mirror/debian\nSuites: bookworm\nComponents: main\n\n" +
				"Enabled: no\nTypes: deb\nURIs: http://off/debian\nSuites: bookworm\nComponents: main\n",
			"deb [signed-by=/k.gpg] http://mirror/debian bookworm main\ndeb [signed-by=/k.gpg] http://mirror/debian bookworm-updates main\n"},
		{"one line, options, comments, backports", debian12,
			"# deb http://a bookworm main\ndeb [arch=amd64 trusted=yes] http://b/debian bookworm main non-free # x\n" +
				"deb http://b/debian bookworm-backports main\ndeb http://c bookworm-security contrib\ndeb-src http://b bookworm main\ndeb [broken http://d bookworm main\n",
			"", "deb [trusted=yes] http://b/debian bookworm main\n"},
		{"newer Debian: its mirror, our release", "ID=debian\nVERSION_CODENAME=\"trixie\"\n",
			"deb http://m/debian trixie main\ndeb http://m/sec trixie-security main\n", "",
			"deb http://m/debian bookworm main\ndeb http://m/sec bookworm-security main\n"},
		{"inline key", debian12, "", "Types: deb\nURIs: http://m\nSuites: bookworm\nComponents: main\nSigned-By:\n -----BEGIN PGP\n .\n abc\n",
			"deb http://m bookworm main\n"},
		{"security alone is no mirror", debian12, "deb http://m bookworm-security main\n", "", ""},
		{"not Debian", "ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n", "deb http://archive.ubuntu.com/ubuntu noble main\n", "", ""},
		{"no os-release", "", "deb http://m bookworm main\n", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			etc := t.TempDir()
			for name, text := range map[string]string{
				"os-release": c.osRelease, "apt/sources.list": c.list, "apt/sources.list.d/debian.sources": c.sources,
				"apt/sources.list.d/x.save": "deb http://saved bookworm main\n",
			} {
				p := filepath.Join(etc, name)
				if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			var got strings.Builder
			for _, s := range hostSources(etc, "bookworm") {
				got.WriteString(s.line())
			}
			if got.String() != c.want {
				t.Errorf("got\n%s, want\n%s", got.String(), c.want)
			}
		})
	}
}

func TestResolveModulesRefuses(t *testing.T) {
	for name, c := range map[string]struct{ dep, builtin, want string }{
		"nothing there": {"", "", "neither a file nor built in"},
		"no colon":      {"kernel/virtio.ko\n", "", "no colon"},
		"a circle": {"k/virtio.ko: k/virtio_ring.ko\nk/virtio_ring.ko: k/virtio.ko\n", "",
			"circle"},
	} {
		if _, err := resolveModules(c.dep, c.builtin); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want %q", name, err, c.want)
		}
	}
	all := "k/virtio_ring.ko\nk/virtio.ko\nk/virtio_mmio.ko\nk/virtio_pci.ko\nk/virtio-blk.ko\nk/virtio_net.ko\nk/inet_diag.ko\nk/tcp_diag.ko\n"
	if list, err := resolveModules("", all); err != nil || len(list) != 0 {
		t.Errorf("all built in: %v, %v", list, err)
	}
}

func TestFixTimesRefusesWhatItWouldBreak(t *testing.T) {
	mke2fs, err := findTool("mke2fs")
	if err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"metadata checksums": {"-O", "metadata_csum,^64bit"},
		"small inodes":       {"-I", "128", "-O", "^metadata_csum,^64bit"},
		"small blocks":       {"-b", "1024", "-O", "^metadata_csum,^64bit"},
	} {
		image := filepath.Join(t.TempDir(), "image")
		args = append([]string{"-q", "-F"}, append(args, image, "16M")...)
		if out, err := exec.Command(mke2fs, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		before, err := fileDigest(image)
		if err != nil {
			t.Fatal(err)
		}
		if err := fixTimes(image, 1, 1); err == nil {
			t.Errorf("%s: no error", name)
		}
		if after, err := fileDigest(image); err != nil || after != before {
			t.Errorf("%s: the image was changed (%v)", name, err)
		}
	}
	short := filepath.Join(t.TempDir(), "short")
	if err := os.WriteFile(short, make([]byte, 1500), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := fixTimes(short, 1, 1); err == nil {
		t.Error("a short file: no error")
	}
}

func TestHasBackup(t *testing.T) {
	want := map[int64]bool{0: true, 1: true, 3: true, 5: true, 7: true, 9: true, 25: true, 27: true, 49: true, 81: true}
	for g := range int64(100) {
		if hasBackup(g) != want[g] {
			t.Errorf("group %d: %v", g, hasBackup(g))
		}
	}
}

func TestUnescapeMount(t *testing.T) {
	for in, want := range map[string]string{`/a\040b`: "/a b", `/a\134b`: `/a\b`, "/plain": "/plain", `/a\04`: `/a\04`} {
		if got := unescapeMount(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestOutputIsBounded(t *testing.T) {
	var b lineBuffer
	line := strings.Repeat("x", 1023) + "\n"
	for range 5000 {
		b.Write([]byte(line))
	}
	b.Write([]byte("the end"))
	if n := len(b.text()); n > maxOutput {
		t.Errorf("kept %d bytes", n)
	}
	if !strings.HasSuffix(b.tail(2), line+"the end") {
		t.Error("the last lines are lost")
	}
}
