package template

import (
	"os"
	"path/filepath"
	"testing"
)

func TestPruneKeepsWhatBuildFinds(t *testing.T) {
	f := newFixture(t)
	if _, err := f.builder().prune(t.Context()); err == nil {
		t.Error("nothing is built, and prune does not say so")
	}
	old := f.build(t)
	f.o.SourceDateEpoch = 1_500_000_000 // another packages stage too
	f.write(t, "envd", "\x7fELF another agent", 0o755)
	current := f.build(t)
	mine := filepath.Join(f.o.Dir, "mine")
	if err := os.Mkdir(mine, 0o700); err != nil {
		t.Fatal(err)
	}
	freed, err := f.builder().prune(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if freed < 1<<20 {
		t.Errorf("freed %d bytes", freed)
	}
	if _, err := os.Stat(old.Rootfs); !os.IsNotExist(err) {
		t.Errorf("the old template is still there: %v", err)
	}
	f.packagesFile(t, rootfsName) // fails unless exactly one is left
	if _, err := os.Stat(mine); err != nil {
		t.Errorf("somebody else's directory: %v", err)
	}
	if again := f.build(t); !again.Cached || again.Digest != current.Digest {
		t.Errorf("after pruning: %+v", again)
	}
}

func TestProxyOptions(t *testing.T) {
	for line, want := range map[string]bool{
		`Acquire::http::Proxy "http://127.0.0.1:3142"`:     true,
		`Acquire::https::Proxy::deb.debian.org "DIRECT"`:   true,
		`Acquire::http::Proxy ""`:                          false,
		`Acquire::https::Verify-Peer "false"`:              false,
		`Acquire::http::Proxy-Auto-Detect "/usr/bin/x"`:    false,
		`Acquire::http::Proxy "x"; APT::Get "y"`:           false,
		`APT::Update::Pre-Invoke "Acquire::http::Proxy x"`: false,
	} {
		if proxyOption.MatchString(line) != want {
			t.Errorf("%s: %v, want %v", line, !want, want)
		}
	}
}
