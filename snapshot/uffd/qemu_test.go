//go:build linux && amd64

package uffd

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestAttachToQEMU attaches to a real QEMU that waits for its state, as the
// engine does, and has its monitor read guest memory through the page faults.
func TestAttachToQEMU(t *testing.T) {
	needRoot(t)
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("needs qemu-system-x86_64 (Debian package qemu-system-x86)")
	}
	const sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
	for _, tc := range []struct {
		name  string
		args  []string
		devFD int
	}{
		{"incoming", []string{"-incoming", "defer"}, -1},
		{"incoming, seccomp", []string{"-incoming", "defer", "-sandbox", sandbox}, -1},
		{"incoming, seccomp, inherited device", []string{"-incoming", "defer", "-sandbox", sandbox}, 4},
		{"stopped, pc, seccomp", []string{"-S", "-incoming", "defer", "-M", "q35,memory-backend=ram", "-sandbox", sandbox}, -1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			img := newTestImage(64)
			shared := newTestShared(t, img)
			srv := newTestServer(t, Options{OnFatal: func(id string, err error) { t.Errorf("fatal: %v", err) }})
			q := startQEMU(t, bin, shared, tc.args)
			if n := shared.Resident(); n != 0 {
				t.Logf("QEMU touched %d bytes of guest memory before it was attached", n)
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			start := time.Now()
			a, err := Inject(ctx, q.pid, shared, tc.devFD)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("attached in %v", time.Since(start))
			rec := a.Record()
			mustAdd(t, srv, "q", a)
			for _, off := range []int64{1 << 20, 2<<20 + 3*pageSize, img.zeroFrom + 8, img.size - pageSize} {
				var want [16]byte
				page := make([]byte, pageSize)
				img.fill(page, off&^(pageSize-1))
				copy(want[:], page[off%pageSize:])
				text := q.monitor(t, fmt.Sprintf("xp /4wx %#x", off))
				for i := range 4 {
					if w := fmt.Sprintf("0x%08x", binary.LittleEndian.Uint32(want[4*i:])); !strings.Contains(text, w) {
						t.Errorf("guest memory at %#x reads %q, want %s in it", off, text, w)
					}
				}
			}
			if err := ScanDirty(rec.PID, rec.Addr, rec.Length, func(off, n int64) error {
				t.Errorf("%d dirty bytes at %d in a VM that has not run", n, off)
				return nil
			}); err != nil {
				t.Error(err)
			}
			if st, _ := srv.Stats("q"); st.DataFaults == 0 || st.ZeroFaults == 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

type qemu struct {
	pid   int
	stdin io.Writer
	out   *bufio.Reader
}

func startQEMU(t *testing.T, bin string, shared *Shared, args []string) *qemu {
	t.Helper()
	args = append([]string{
		"-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-m", "64",
		"-object", "memory-backend-file,id=ram,size=64M,mem-path=/proc/self/fd/3,share=on",
		"-qmp", "stdio",
	}, args...)
	if !strings.Contains(strings.Join(args, " "), "-M ") {
		args = append(args, "-M", "microvm,memory-backend=ram")
	}
	dev, err := os.OpenFile("/dev/userfaultfd", os.O_RDWR, 0)
	if err != nil {
		t.Skip("needs /dev/userfaultfd: ", err)
	}
	defer dev.Close()
	cmd := exec.Command(bin, args...)
	cmd.ExtraFiles = []*os.File{shared.File(), dev}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	limit := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	t.Cleanup(func() {
		limit.Stop()
		cmd.Process.Kill()
		cmd.Wait()
	})
	q := &qemu{pid: cmd.Process.Pid, stdin: stdin, out: bufio.NewReader(stdout)}
	if _, err := q.out.ReadString('\n'); err != nil {
		t.Fatalf("QEMU's greeting: %v", err)
	}
	q.command(t, `{"execute":"qmp_capabilities"}`)
	return q
}

func (q *qemu) monitor(t *testing.T, line string) string {
	t.Helper()
	return q.command(t, fmt.Sprintf(`{"execute":"human-monitor-command","arguments":{"command-line":%q}}`, line))
}

// command sends a QMP command and gives its result, as a string if it is one.
func (q *qemu) command(t *testing.T, cmd string) string {
	t.Helper()
	if _, err := io.WriteString(q.stdin, cmd+"\n"); err != nil {
		t.Fatal(err)
	}
	for {
		line, err := q.out.ReadBytes('\n')
		if err != nil {
			t.Fatalf("QEMU's answer to %s: %v", cmd, err)
		}
		var m struct {
			Return any
			Error  any
			Event  string
		}
		if err := json.Unmarshal(line, &m); err != nil || m.Error != nil {
			t.Fatalf("QEMU says %s to %s, %v", line, cmd, err)
		}
		if m.Event == "" {
			s, _ := m.Return.(string)
			return s
		}
	}
}
