package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

	"crypto/sha256"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

func TestPausedSandboxCostsNoMemoryAndKeepsItsProcesses(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	ask(t, s, sb.ID, "remake") // 32 MiB of memory of its own
	before := ask(t, s, sb.ID, "set kept in memory only")
	pids := sh(t, s, sb.ID, "pgrep -of '[k]eeper.py'; cat /proc/1/stat | cut -d' ' -f22")
	boot := sh(t, s, sb.ID, "cat /proc/sys/kernel/random/boot_id")
	identity := sh(t, s, sb.ID, "hostname; cat /etc/machine-id")

	vm := s.VM(sb.ID)
	if vm == nil {
		t.Fatal("a running sandbox has no process")
	}
	free := harness.FreeMemory()
	pause(t, s, sb.ID)
	if vm := s.VM(sb.ID); vm != nil {
		t.Errorf("process %d of the paused sandbox lives", vm.PID)
	}
	// 32 MiB and QEMU's own; the host's other processes move the figure too.
	if !harness.Eventually(5*time.Second, func() bool { return harness.FreeMemory()-free > 16<<20 }) {
		t.Logf("the host's free memory grew by %d MiB only; other work may have taken it", (harness.FreeMemory()-free)>>20)
	}
	if _, err := s.Exec(t.Context(), sb.ID, client.ExecRequest{Cmd: "true"}); !client.IsInvalidState(err) {
		t.Errorf("exec in a paused sandbox: %v, want invalid_state", err)
	}

	resume(t, s, sb.ID)
	after := ask(t, s, sb.ID, "stat")
	if after.PID != before.PID || after.Born != before.Born || after.Made != before.Made {
		t.Errorf("another process answers: %+v, was %+v", after, before)
	}
	if after.Value != "kept in memory only" {
		t.Errorf("it holds %q", after.Value)
	}
	if after.Counter < before.Counter {
		t.Errorf("its counter went back from %d to %d", before.Counter, after.Counter)
	}
	if now := sh(t, s, sb.ID, "pgrep -of '[k]eeper.py'; cat /proc/1/stat | cut -d' ' -f22"); now != pids {
		t.Errorf("processes %q, were %q", now, pids)
	}
	if now := sh(t, s, sb.ID, "cat /proc/sys/kernel/random/boot_id"); now != boot {
		t.Errorf("boot_id %s, was %s: it booted", now, boot)
	}
	if now := sh(t, s, sb.ID, "hostname; cat /etc/machine-id"); now != identity {
		t.Errorf("a resumed sandbox is another: %q, was %q", now, identity)
	}
	clockIsRight(t, s, sb.ID)
}

// clockIsRight compares the guest's clock with ours, both around the answer.
func clockIsRight(t *testing.T, s *harness.Server, id string) {
	t.Helper()
	began := time.Now()
	out := sh(t, s, id, "date +%s.%N")
	ended := time.Now()
	sec, err := strconv.ParseFloat(out, 64)
	if err != nil {
		t.Fatalf("date says %q", out)
	}
	guest := time.Unix(0, int64(sec*1e9))
	if guest.Before(began.Add(-2*time.Second)) || guest.After(ended.Add(2*time.Second)) {
		t.Errorf("the guest's clock says %v, it is %v", guest, ended)
	}
}

func TestResumeSetsTheClockAfterALongSleep(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	pause(t, s, sb.ID)
	// The promise is about time that passes; nothing else can be waited for.
	time.Sleep(4 * time.Second)
	resume(t, s, sb.ID)
	clockIsRight(t, s, sb.ID)
}

func TestConnectionsOfTheOldLifeAreClosed(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	// A stream is a connection from the host into the guest.
	st, err := s.ExecStream(timeout(t, time.Minute), sb.ID, client.ExecRequest{Cmd: "sleep", Args: []string{"3600"}})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if ev, err := st.Recv(); err != nil || ev.Type != client.EventStart {
		t.Fatalf("first event %+v, %v", ev, err)
	}
	pause(t, s, sb.ID)
	if ev, err := st.Recv(); err == nil {
		t.Errorf("the stream into a paused sandbox says %+v", ev)
	}
	resume(t, s, sb.ID)
	if out := sh(t, s, sb.ID, "pgrep -fc '^sleep 3600'"); out != "1" {
		t.Errorf("%s of the streamed command's process live on, want 1", out)
	}
	// Port 49983 is C33F in /proc/net/tcp6; 01 is ESTABLISHED. Only the
	// connections of the present life are there: that of this exec at least,
	// and no half-dead one of before.
	out := sh(t, s, sb.ID, "cat /proc/net/tcp /proc/net/tcp6 | awk '$2 ~ /:C33F$/ && $4 == \"01\"' | wc -l")
	if n, err := strconv.Atoi(out); err != nil || n < 1 || n > 3 {
		t.Errorf("%s connections to the agent after a resume", out)
	}
}

func TestTenGenerationsKeepMemoryAndDisk(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	sh(t, s, sb.ID, "mkdir -p /home/user/work && cd /home/user/work && head -c 8M /dev/urandom > fixed && md5sum fixed > sums")
	trim := "sudo fstrim /"
	if harness.Driver() == "firecracker" {
		trim = "sync" // its disk takes no discards
	}
	var made string
	for g := range 10 {
		if g%3 == 0 {
			made = ask(t, s, sb.ID, "remake").Made
		}
		value := fmt.Sprintf("generation %d", g)
		ask(t, s, sb.ID, "set "+value)
		// New data, data over old data, and a hole where data was.
		sh(t, s, sb.ID, fmt.Sprintf(`cd /home/user/work && head -c 1M /dev/urandom > g%d && md5sum g%d >> sums &&
			if [ %d -ge 4 ]; then rm g%d && sed -i '/ g%d$/d' sums && %s ; fi`, g, g, g, g-4, g-4, trim))
		pause(t, s, sb.ID)
		resume(t, s, sb.ID)
		a := ask(t, s, sb.ID, "stat")
		if a.Value != value || a.Made != made {
			t.Fatalf("generation %d: the process says %+v, want %q and data %s", g, a, value, made)
		}
		// Past the guest's own cache: what the disk itself holds.
		sh(t, s, sb.ID, "sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches'; cd /home/user/work && md5sum --quiet -c sums")
	}
}

func TestPauseWritesOnlyWhatChanged(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	pause(t, s, sb.ID)
	resume(t, s, sb.ID)
	before := harness.DiskUsage(s.Dir + "/store")
	pause(t, s, sb.ID)
	// 512 MiB of RAM, of which 32 MiB belong to the keeper.
	if grown := harness.DiskUsage(s.Dir+"/store") - before; grown > 24<<20 {
		t.Errorf("pausing an idle sandbox wrote %d MiB", grown>>20)
	}
}

// randomReader yields n bytes that depend on the seed only.
func randomReader(seed uint64, n int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}), n)
}

func TestLargeFilesGoUpAndDownWhole(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	const size = 64 << 20
	sum := sha256.New()
	ctx := timeout(t, 4*time.Minute)
	if err := s.PutFile(ctx, sb.ID, "/home/user/large", io.TeeReader(randomReader(1, size), sum), client.PutOptions{Mode: 0o640}); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%x", sum.Sum(nil))
	if got := strings.Fields(sh(t, s, sb.ID, "sha256sum /home/user/large"))[0]; got != want {
		t.Errorf("the guest has SHA-256 %s, sent %s", got, want)
	}
	if got := sh(t, s, sb.ID, "stat -c '%a %U %s' /home/user/large"); got != fmt.Sprintf("640 user %d", size) {
		t.Errorf("mode, owner, size: %s", got)
	}
	f, err := s.GetFile(ctx, sb.ID, "/home/user/large", "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	back := sha256.New()
	n, err := io.Copy(back, bufio.NewReader(f))
	if err != nil || n != size {
		t.Fatalf("%d bytes came back: %v", n, err)
	}
	if got := fmt.Sprintf("%x", back.Sum(nil)); got != want {
		t.Errorf("SHA-256 %s came back, sent %s", got, want)
	}
}

func TestFilesAreMadeListedAndRemoved(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	ctx := timeout(t, time.Minute)
	const dir = "/home/user/ä b/c"
	if err := s.MakeDir(ctx, sb.ID, dir, ""); err != nil {
		t.Fatal(err)
	}
	content := []byte("eins\x00zwei\xff\n")
	for _, c := range [][]byte{[]byte("a longer content that is replaced"), content} {
		if err := s.PutFile(ctx, sb.ID, dir+"/f", bytes.NewReader(c), client.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.PutFile(ctx, sb.ID, dir+"/empty", bytes.NewReader(nil), client.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	f, err := s.GetFile(ctx, sb.ID, dir+"/f", "")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(f)
	f.Close()
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("read %q, %v, want %q", got, err, content)
	}
	list, err := s.ListFiles(ctx, sb.ID, dir, client.ListFilesOptions{})
	if err != nil {
		t.Fatal(err)
	}
	sizes := map[string]int64{}
	for _, e := range list {
		sizes[e.Name] = e.Size
	}
	if len(sizes) != 2 || sizes["f"] != int64(len(content)) || sizes["empty"] != 0 {
		t.Errorf("the directory lists %v", list)
	}
	if err := s.DeleteFile(ctx, sb.ID, "/home/user/ä b", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetFile(ctx, sb.ID, dir+"/f", ""); !client.IsNotFound(err) {
		t.Errorf("read a removed file: %v, want not_found", err)
	}
	if out := sh(t, s, sb.ID, "ls /home/user/"); strings.Contains(out, "ä") {
		t.Errorf("the directory is still there: %s", out)
	}
}

func TestCommandsKeepTheirContract(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	ctx := timeout(t, 2*time.Minute)
	run := func(req client.ExecRequest) *client.ExecResult {
		t.Helper()
		r, err := s.Exec(ctx, sb.ID, req)
		if err != nil {
			t.Fatalf("%+v: %v", req, err)
		}
		return r
	}
	if status, body := raw(t, s, "POST", "/v1/sandboxes/"+sb.ID+"/exec", `{"cmd":"true"}`); status != 200 ||
		!strings.Contains(body, `"exit_code":0`) || !strings.Contains(body, `"encoding":"utf-8"`) || !strings.Contains(body, `"duration_ms":`) {
		t.Errorf("exec true: %d %s", status, body)
	}
	if r := run(client.ExecRequest{Cmd: "sh", Args: []string{"-c", "echo out; echo err >&2; exit 42"}}); r.ExitCode != 42 || string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" {
		t.Errorf("got %+v", r)
	}
	if r := run(client.ExecRequest{Cmd: "sh", Args: []string{"-c", "kill -9 $$"}}); r.ExitCode != 137 {
		t.Errorf("killed by signal 9: exit code %d, want 137", r.ExitCode)
	}
	if r := run(client.ExecRequest{Cmd: "echo", Args: []string{"$HOME", "*", "a  b"}}); string(r.Stdout) != "$HOME * a  b\n" {
		t.Errorf("a shell looked at the arguments: %q", r.Stdout)
	}
	if r := run(client.ExecRequest{Cmd: "sh", Args: []string{"-c", "id -un; pwd; echo $GREETING"}, Envs: map[string]string{"GREETING": "hallo"}, Cwd: "/tmp", User: "root"}); string(r.Stdout) != "root\n/tmp\nhallo\n" {
		t.Errorf("user, cwd, envs: %q", r.Stdout)
	}
	if r := run(client.ExecRequest{Cmd: "sh", Args: []string{"-c", "id -un; pwd"}}); string(r.Stdout) != "user\n/home/user\n" {
		t.Errorf("defaults: %q", r.Stdout)
	}
	stdin := bytes.Repeat([]byte("0123456789abcdef"), 32<<10) // 512 KiB: more than a pipe holds
	if r := run(client.ExecRequest{Cmd: "cat", Stdin: stdin}); !bytes.Equal(r.Stdout, stdin) {
		t.Errorf("cat gave back %d of %d bytes", len(r.Stdout), len(stdin))
	}
	if r := run(client.ExecRequest{Cmd: "printf", Args: []string{`\377\376ok`}}); string(r.Stdout) != "\xff\xfeok" {
		t.Errorf("bytes that are no text: %q", r.Stdout)
	}
	if _, body := raw(t, s, "POST", "/v1/sandboxes/"+sb.ID+"/exec", `{"cmd":"printf","args":["\\377"]}`); !strings.Contains(body, `"encoding":"base64"`) || !strings.Contains(body, `"stdout":"/w=="`) {
		t.Errorf("bytes that are no text: %s", body)
	}
	began := time.Now()
	if r := run(client.ExecRequest{Cmd: "sh", Args: []string{"-c", "echo before; sleep 600"}, TimeoutSec: 5}); !r.TimedOut || string(r.Stdout) != "before\n" {
		t.Errorf("beyond its limit: %+v", r)
	} else if d := time.Since(began); d > 2*time.Minute { // and not 600 s
		t.Errorf("a limit of 5 s took %v", d)
	}
	if !harness.Eventually(time.Minute, func() bool {
		out, err := s.Sh(ctx, sb.ID, "pgrep -fc '^sleep 600' || true")
		return err == nil && out == "0"
	}) {
		t.Error("a command lives on beyond its limit")
	}
	for _, cmd := range []string{"/no/such/program", "no-such-program"} {
		if _, err := s.Exec(ctx, sb.ID, client.ExecRequest{Cmd: cmd}); !client.IsInvalidRequest(err) && !client.IsNotFound(err) {
			t.Errorf("%s: %v, want a refusal", cmd, err)
		}
	}
}

func TestTheCommandLineDoesTheWholeLifeCycle(t *testing.T) {
	s := server(t)
	out, code := cli(t, s, "sandbox", "create", warm, "--json")
	if code != 0 {
		t.Fatalf("create: exit code %d", code)
	}
	id := jsonField(t, out, "id")
	t.Cleanup(func() { remove(t, s, id) })
	if out, code := cli(t, s, "sandbox", "exec", id, "--", "sh", "-c", "echo hier; exit 7"); code != 7 || out != "hier\n" {
		t.Errorf("exec: exit code %d, output %q", code, out)
	}
	if out, code := cli(t, s, "sandbox", "pause", id, "--json"); code != 0 || jsonField(t, out, "status") != "paused" {
		t.Errorf("pause: exit code %d, %s", code, out)
	}
	if out, code := cli(t, s, "sandbox", "resume", id, "--json"); code != 0 || jsonField(t, out, "status") != "running" {
		t.Errorf("resume: exit code %d, %s", code, out)
	}
	if out, code := cli(t, s, "sandbox", "list"); code != 0 || !strings.Contains(out, id) {
		t.Errorf("list: exit code %d, %s", code, out)
	}
	if _, code := cli(t, s, "sandbox", "rm", id); code != 0 {
		t.Errorf("rm: exit code %d", code)
	}
	if _, code := cli(t, s, "sandbox", "get", id); code == 0 {
		t.Error("get of a removed sandbox succeeds")
	}
}

func TestDeleteWinsOverAnOperationUnderWay(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	paused := make(chan error, 1)
	go func() {
		_, err := s.PauseSandbox(context.Background(), sb.ID)
		paused <- err
	}()
	if !harness.Eventually(time.Minute, func() bool {
		now, err := s.GetSandbox(t.Context(), sb.ID)
		return err != nil || now.Status != client.StatusRunning
	}) {
		t.Fatal("the pause does not begin")
	}
	if err := s.DeleteSandbox(timeout(t, time.Minute), sb.ID); err != nil {
		t.Errorf("delete during a pause: %v", err)
	}
	<-paused // either answer is right
	if _, err := s.GetSandbox(t.Context(), sb.ID); !client.IsNotFound(err) {
		t.Errorf("get after delete: %v, want not_found", err)
	}
	if vm := s.VM(sb.ID); vm != nil {
		t.Errorf("process %d lives on", vm.PID)
	}
}
