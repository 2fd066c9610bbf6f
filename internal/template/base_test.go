package template

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The tests in this file build the real base template, from a real mirror, and
// boot it. They run when WRENN_TEST_BASE names a directory, which keeps the
// packages from run to run.
const baseEnv = "WRENN_TEST_BASE"

// buildBase builds the base with internal/guest/boot/testmain for a guest agent.
func buildBase(t *testing.T, dir string) Result {
	t.Helper()
	agent := filepath.Join(t.TempDir(), "envd")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", agent, "../guest/boot/testmain")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the stand-in for envd: %v\n%s", err, out)
	}
	start := time.Now()
	r, err := Build(t.Context(), Options{Dir: filepath.Join(dir, "base"), Cache: filepath.Join(dir, "cache"), EnvdPath: agent})
	if err != nil {
		t.Fatal(err)
	}
	used, err := usedBytes(r.Rootfs)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("built in %v (cached: %v), %d MiB on disk", time.Since(start).Round(time.Millisecond), r.Cached, used>>20)
	return r
}

func requireBase(t *testing.T) (dir string) {
	t.Helper()
	dir = os.Getenv(baseEnv)
	if dir == "" {
		t.Skipf("%s is not set: it names a directory to build the real base template in (needs a mirror, root, 2 GiB)", baseEnv)
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skipf("no QEMU: apt-get install qemu-system-x86: %v", err)
	}
	return dir
}

// guest is a booted base.
type guest struct {
	t       *testing.T
	cmd     *exec.Cmd
	url     string
	console *bytes.Buffer // complete once done is closed
	done    chan struct{}
}

// boot starts a VM on a copy of the base's disk ("" for none).
func boot(t *testing.T, r Result, disk, cmdline string) *guest {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close() // QEMU opens it again; nobody else is likely to in between
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on,auto-kernel-cmdline=off",
		"-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand", "-smp", "1", "-m", "512",
		"-kernel", r.Kernel, "-initrd", r.Initrd,
		"-append", "console=ttyS0 quiet panic=-1 reboot=t random.trust_cpu=on no_timer_check tsc=reliable tsc_early_khz=2000000 mitigations=off " + cmdline,
		"-netdev", "user,id=n,net=172.30.0.0/24,host=172.30.0.1,restrict=on,hostfwd=tcp:" + addr + "-172.30.0.2:49983",
		"-device", "virtio-net-device,netdev=n,mac=02:77:72:00:00:02",
		"-chardev", "stdio,id=c,signal=off", "-serial", "chardev:c",
	}
	if disk != "" {
		args = append(args, "-drive", "id=d,file="+disk+",format=raw,if=none", "-device", "virtio-blk-device,drive=d")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	g := &guest{t: t, cmd: exec.CommandContext(ctx, "qemu-system-x86_64", args...), url: "http://" + addr,
		console: new(bytes.Buffer), done: make(chan struct{})}
	stdin, err := g.cmd.StdinPipe() // open: an end of file would be a hang-up of the console
	if err != nil {
		t.Fatal(err)
	}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	g.cmd.Stderr = g.cmd.Stdout
	start := time.Now()
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(g.done)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			fmt.Fprintf(g.console, "%6.2f %s\n", time.Since(start).Seconds(), sc.Text())
		}
		g.cmd.Wait()
		stdin.Close()
	}()
	t.Cleanup(func() { g.cmd.Process.Kill(); <-g.done })
	return g
}

// wait waits until the guest's service answers.
func (g *guest) wait() {
	g.t.Helper()
	client := http.Client{Timeout: time.Second}
	for range 600 {
		select {
		case <-g.done:
			g.t.Fatalf("the machine ended:\n%s", g.console)
		case <-time.After(100 * time.Millisecond):
		}
		if resp, err := client.Get(g.url + "/health"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusNoContent {
				return
			}
		}
	}
	g.cmd.Process.Kill()
	<-g.done
	g.t.Fatalf("the guest does not answer:\n%s", g.console)
}

// run runs a script in the guest as user, who has to succeed.
func (g *guest) run(user, script string) string {
	g.t.Helper()
	client := http.Client{Timeout: time.Minute}
	resp, err := client.Post(g.url+"/run?user="+user, "text/plain", strings.NewReader("set -eu\n"+script))
	if err != nil {
		g.t.Fatalf("running %q: %v", script, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		g.t.Errorf("running %q: %s, %v\n%s", script, resp.Status, err, text)
	}
	return strings.TrimSpace(string(text))
}

// ended waits for the machine's own end and returns its console.
func (g *guest) ended(limit time.Duration) string {
	g.t.Helper()
	select {
	case <-g.done:
	case <-time.After(limit):
		g.cmd.Process.Kill()
		<-g.done
		g.t.Errorf("the machine did not end within %v", limit)
	}
	return g.console.String()
}

func privateDisk(t *testing.T, r Result) string {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	if err := cloneSparse(t.Context(), r.Rootfs, disk, func(_, _ int64) {}); err != nil {
		t.Fatal(err)
	}
	return disk
}

const guestNet = "wrenn.ip=172.30.0.2/30 wrenn.gw=172.30.0.1 wrenn.dns=1.1.1.1,8.8.8.8 wrenn.hostname=base-test"

func TestBaseBootsAndHoldsWhatItPromises(t *testing.T) {
	r := buildBase(t, requireBase(t))
	disk := privateDisk(t, r)
	g := boot(t, r, disk, guestNet)
	g.wait()
	for _, c := range []struct{ script, want string }{
		{"id -un; id -u; pwd; umask", "user\n1000\n/home/user\n0022"},
		{"hostname; sudo -n id -u", "base-test\n0"},
		// A login shell starts nothing by itself, and has the paths of its user.
		{"bash -lxc : 2>&1 | grep -c 'id -u' || true; bash -lc 'echo $PATH'; sh -lc 'echo $PATH' | cut -c1-14; sudo bash -lc 'echo $PATH' | cut -c1-15",
			"0\n/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games\n/usr/local/bin\n/usr/local/sbin"},
		{"python --version | cut -d. -f1; python3 -m pip --version | cut -d' ' -f1; python3 -c 'import ssl, sqlite3, venv; print(1)'", "Python 3\npip\n1"},
		{"git daemon --inetd --version >/dev/null 2>&1 || test -x $(git --exec-path)/git-daemon; echo ok", "ok"},
		{"TERM=xterm-256color tput colors; realpath /bin; curl --version | cut -d' ' -f1 | head -1", "256\n/usr/bin\ncurl"},
		{"touch x; setfattr -n user.e2b.a -v b x; getfattr --only-values -n user.e2b.a x", "b"},
		{"ip -4 -o addr show eth0 | awk '{print $4}'; ip route show default", "172.30.0.2/30\ndefault via 172.30.0.1 dev eth0"},
		{"cat /etc/resolv.conf; grep -c base-test /etc/hosts", "nameserver 1.1.1.1\nnameserver 8.8.8.8\n1"},
		{"wc -c </etc/machine-id; ls /etc/ssh 2>/dev/null | grep host || true; ls /var/lib/apt/lists | wc -l", "33\n0"},
		{"sudo modprobe overlay; grep -c ^overlay /proc/modules; ps -o comm= 1; stat -fc %T /tmp /dev/shm /sys/fs/cgroup", "1\nenvd\next2/ext3\ntmpfs\ncgroup2fs"},
		{"ls / | tr '\\n' ' '", "bin boot dev etc home lib lib64 lost+found media mnt opt proc root run sbin srv sys tmp usr var"},
	} {
		if got := g.run("user", c.script); got != c.want {
			t.Errorf("%s\nsays %q, want %q", c.script, got, c.want)
		}
	}
	// PID 1 starts the service again.
	g.run("root", "before=$(pgrep -f 'envd serve'); (sleep 0.2; kill -9 $before) >/dev/null 2>&1 &")
	time.Sleep(500 * time.Millisecond) // let it die; wait would see the old one
	g.wait()
	g.run("root", "(sleep 0.2; poweroff) >/dev/null 2>&1 &")
	console := g.ended(30 * time.Second)
	t.Logf("console:\n%s", console)
	for _, want := range []string{"signal killed", "stopping all processes"} {
		if !strings.Contains(console, want) {
			t.Errorf("the console does not say %q", want)
		}
	}
	if err := (Result{Rootfs: disk}).check(t); err != nil {
		t.Errorf("after poweroff the file system is not clean: %v", err)
	}
}

// A machine that cannot boot says why and ends.
func TestBaseThatCannotBootEnds(t *testing.T) {
	r := buildBase(t, requireBase(t))
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, disk, cmdline, want string }{
		{"no file system", empty, guestNet, "mounting /dev/vda as ext4"},
		{"bad parameter", privateDisk(t, r), "wrenn.ip=nonsense", "kernel parameter wrenn.ip"},
	} {
		t.Run(c.name, func(t *testing.T) {
			console := boot(t, r, c.disk, c.cmdline).ended(time.Minute)
			if !strings.Contains(console, c.want) || !strings.Contains(console, "turning the machine off") {
				t.Errorf("console:\n%s", console)
			}
		})
	}
}

func TestBaseIsReproducible(t *testing.T) {
	dir := requireBase(t)
	if os.Getenv("WRENN_TEST_REPRODUCIBLE") == "" {
		t.Skip("WRENN_TEST_REPRODUCIBLE is not set: building the packages twice takes minutes")
	}
	first := buildBase(t, dir)
	second := buildBase(t, t.TempDir())
	if first.Digest != second.Digest {
		t.Skipf("the mirror has other packages than when %s was built: remove it", dir)
	}
	for _, p := range [][2]string{{first.Rootfs, second.Rootfs}, {first.Initrd, second.Initrd}, {first.Kernel, second.Kernel}} {
		if out, err := exec.Command("cmp", p[0], p[1]).CombinedOutput(); err != nil {
			t.Errorf("%v", errors.Join(err, errors.New(string(out))))
		}
	}
}
