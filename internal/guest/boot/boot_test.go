package boot

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestParseCmdline(t *testing.T) {
	p, err := parseCmdline("console=ttyS0 quiet wrenn.ip=172.30.0.2/30 wrenn.gw=172.30.0.1 " +
		"wrenn.dns=1.1.1.1,8.8.8.8 wrenn.hostname=abc123 wrenn.future=x\n")
	if err != nil {
		t.Fatal(err)
	}
	if p.IP != netip.MustParsePrefix("172.30.0.2/30") || p.Gateway != netip.MustParseAddr("172.30.0.1") ||
		len(p.DNS) != 2 || p.DNS[1] != netip.MustParseAddr("8.8.8.8") || p.Hostname != "abc123" {
		t.Errorf("parsed %+v", p)
	}
	if p, err := parseCmdline(""); err != nil || p.IP.IsValid() || p.Hostname != defaultHostname {
		t.Errorf("no parameters: %+v, %v", p, err)
	}
	for _, bad := range []string{
		"wrenn.ip=172.30.0.2", "wrenn.ip=", "wrenn.ip=172.30.0.2/33", "wrenn.ip=x/30",
		"wrenn.ip=172.30.0.2/30 wrenn.gw=gate", "wrenn.gw=172.30.0.1",
		"wrenn.dns=", "wrenn.dns=1.1.1.1,", "wrenn.dns=one",
		"wrenn.hostname=", "wrenn.hostname=a_b", "wrenn.hostname=-a", "wrenn.hostname=" + strings.Repeat("a", 65),
	} {
		if _, err := parseCmdline(bad); err == nil {
			t.Errorf("%q: no error", bad)
		} else if name, _, _ := strings.Cut(strings.Fields(bad)[len(strings.Fields(bad))-1], "="); !strings.Contains(err.Error(), name) {
			t.Errorf("%q: error %q does not name %s", bad, err, name)
		}
	}
}

func FuzzParseCmdline(f *testing.F) {
	f.Add("wrenn.ip=172.30.0.2/30 wrenn.gw=172.30.0.1 wrenn.dns=1.1.1.1 wrenn.hostname=a")
	f.Add("wrenn.hostname=\x00 wrenn.dns=,,")
	f.Fuzz(func(t *testing.T, line string) {
		p, err := parseCmdline(line)
		if err == nil && CheckHostname(p.Hostname) != nil {
			t.Errorf("accepted the host name %q", p.Hostname)
		}
	})
}

func TestCheckHostname(t *testing.T) {
	for _, good := range []string{"a", "sandbox-1", "A.b", strings.Repeat("a", 64)} {
		if err := CheckHostname(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{"", "-a", ".a", "a b", "a\nb", "a/b", "ä", "a\x00", strings.Repeat("a", 65)} {
		if CheckHostname(bad) == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestParseOrder(t *testing.T) {
	list, err := parseOrder("# comment\nvirtio.ko\n\nvirtio_pci.ko pci\n")
	if err != nil || len(list) != 2 || list[0] != (module{"virtio.ko", ""}) || list[1] != (module{"virtio_pci.ko", "pci"}) {
		t.Errorf("parsed %v, %v", list, err)
	}
	for _, bad := range []string{"a.ko usb", "a.ko pci x", "../a.ko", "a/b.ko", "/etc/x"} {
		if _, err := parseOrder("ok.ko\n" + bad); err == nil || !strings.Contains(err.Error(), "line 2") {
			t.Errorf("%q: error is %v, want one that names line 2", bad, err)
		}
	}
}

func TestHostsFile(t *testing.T) {
	fresh := hostsFile(" \n", "one")
	if !strings.Contains(fresh, "127.0.0.1\tlocalhost\n") || !strings.Contains(fresh, "127.0.1.1\tone\n") {
		t.Errorf("fresh file:\n%s", fresh)
	}
	// The user's own lines stay, also one without a final newline.
	own := strings.Replace(fresh, "127.0.1.1\tone\n", "127.0.1.1 one\n127.0.1.1\tagain\n", 1) + "10.0.0.9 db"
	renamed := hostsFile(own, "two")
	if strings.Contains(renamed, "one") || strings.Contains(renamed, "again") ||
		strings.Count(renamed, "127.0.1.1\ttwo\n") != 1 || !strings.HasSuffix(renamed, "10.0.0.9 db\n") {
		t.Errorf("renamed:\n%s", renamed)
	}
	if got := hostsFile("10.0.0.9 db\n", "x"); got != "10.0.0.9 db\n127.0.1.1\tx\n" {
		t.Errorf("added: %q", got)
	}
	if hostsFile(renamed, "two") != renamed {
		t.Error("not stable")
	}
}

func TestResolvConf(t *testing.T) {
	got := resolvConf([]netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("2606:4700::1111")})
	if got != "nameserver 1.1.1.1\nnameserver 2606:4700::1111\n" {
		t.Errorf("got %q", got)
	}
}

func TestEnsureMachineID(t *testing.T) {
	path := filepath.Join(t.TempDir(), "machine-id")
	if err := os.WriteFile(path, nil, 0o444); err != nil { // as the base template ships it
		t.Fatal(err)
	}
	read := func() string {
		t.Helper()
		if err := ensureMachineID(path); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	first := read()
	if len(first) != 33 || strings.Trim(first, "0123456789abcdef\n") != "" {
		t.Errorf("machine id is %q", first)
	}
	if read() != first {
		t.Error("a good machine id was replaced")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if read() == first {
		t.Error("two machines have the same id")
	}
}

func TestWriteIfChangedDoesNotTouch(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := writeIfChanged(path, "a"); err != nil {
		t.Fatal(err)
	}
	old := time.Unix(1000, 0)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	if err := writeIfChanged(path, "a"); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || !st.ModTime().Equal(old) {
		t.Errorf("unchanged text was written: %v, %v", st.ModTime(), err)
	}
	if err := writeIfChanged(path, "b"); err != nil {
		t.Fatal(err)
	}
	if text, _ := os.ReadFile(path); string(text) != "b" {
		t.Errorf("holds %q", text)
	}
}

func TestTraceTimesEachStep(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(0, 0)
	tr := newTrace(&out, "init", func() time.Time { return now })
	now = now.Add(5 * time.Millisecond)
	tr.step("mounts")
	now = now.Add(20 * time.Millisecond)
	tr.step("network")
	tr.warn("mounting", errors.New("no"))
	tr.done()
	want := "wrenn init: warning: mounting: no\nwrenn init: 25.0 ms: mounts=5.0 network=20.0 (uptime "
	if !strings.HasPrefix(out.String(), want) {
		t.Errorf("printed %q, want %q…", out.String(), want)
	}
}

func TestWaitForDisk(t *testing.T) {
	err := waitForDisk(filepath.Join(t.TempDir(), "vda"), 10*time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "did not appear within 10ms") {
		t.Errorf("error is %v", err)
	}
	file := filepath.Join(t.TempDir(), "vda")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := waitForDisk(file, time.Second); err == nil || !strings.Contains(err.Error(), "not a block device") {
		t.Errorf("error is %v", err)
	}
}

func TestMountPoints(t *testing.T) {
	if is, err := isMountPoint("/proc"); err != nil || !is {
		t.Errorf("/proc: %v, %v", is, err)
	}
	if is, err := isMountPoint(t.TempDir()); err != nil || is {
		t.Errorf("a plain directory: %v, %v", is, err)
	}
	if _, err := isMountPoint("/does/not/exist"); err == nil {
		t.Error("a missing directory: no error")
	}
}

func TestInitRefusesToBeAnyProcess(t *testing.T) {
	if err := runInit(); err == nil || !strings.Contains(err.Error(), "not 1") {
		t.Errorf("error is %v", err)
	}
}
