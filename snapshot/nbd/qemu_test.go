package nbd

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/snapshot/block"
)

var _ Device = (*block.Overlay)(nil)

func needTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s (Debian package qemu-utils)", name)
	}
	return path
}

func runTool(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, needTool(t, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func TestQEMUReadsAndWrites(t *testing.T) {
	needTool(t, "qemu-io")
	const size = 8 << 20
	dev := newMemDevice(size)
	path := start(t, dev, Options{})
	url := "nbd+unix:///?socket=" + path
	if out := runTool(t, "qemu-img", "info", "-f", "raw", url); !strings.Contains(out, "(8388608 bytes)") {
		t.Errorf("qemu-img info says\n%s", out)
	}
	out := runTool(t, "qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -P 0x5a 4096 3M", "-c", "read -P 0x5a 4096 3M", "-c", "aio_write -P 0x11 5M 64k",
		"-c", "aio_write -P 0x12 6M 64k", "-c", "aio_flush", "-c", "read -P 0x11 5M 64k", "-c", "read -P 0x12 6M 64k", "-c", "write -z 1M 1M",
		"-c", "read -P 0 1M 1M", "-c", "discard 2M 64k", "-c", "read -P 0 2M 64k", "-c", "flush", url)
	if strings.Contains(out, "failed") || strings.Contains(out, "error") {
		t.Errorf("qemu-io says\n%s", out)
	}
	want := make([]byte, size)
	fill := func(off, n int, v byte) { copy(want[off:off+n], bytes.Repeat([]byte{v}, n)) }
	fill(4096, 3<<20, 0x5a)
	fill(5<<20, 64<<10, 0x11)
	fill(6<<20, 64<<10, 0x12)
	fill(1<<20, 1<<20, 0)
	fill(2<<20, 64<<10, 0)
	if data, durable := dev.at(0, size); !bytes.Equal(data, want) || !bytes.Equal(durable, want) {
		t.Error("device does not hold what qemu-io wrote and flushed")
	}
	if log := dev.takeLog(); !slices.Contains(log, "zero") {
		t.Errorf("write -z and discard never became Zero: %v", log)
	}
	// Writethrough cache makes every write FUA.
	runTool(t, "qemu-io", "-f", "raw", "-t", "writethrough", "-c", "write -f -P 7 0 4k", url)
	if _, durable := dev.at(0, 1); durable[0] != 7 {
		t.Error("write -f is not durable")
	}
}

// TestQEMUReconnects restarts the server under a client of QEMU's, which must
// find it again and lose nothing.
func TestQEMUReconnects(t *testing.T) {
	dev := newMemDevice(1 << 20)
	path := filepath.Join(t.TempDir(), "s")
	serve := func() (stop func()) {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- Serve(ctx, l, dev, Options{Exclusive: true}) }()
		return func() {
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	}
	bin := needTool(t, "qemu-io")
	stop := serve()
	cmd := exec.Command(bin, "--image-opts", "driver=nbd,server.type=unix,server.path="+path+",reconnect-delay=10")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	limit := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer limit.Stop()
	out := bufio.NewReader(stdout)
	until := func(s string) {
		t.Helper()
		var all strings.Builder
		for !strings.Contains(all.String(), s) {
			b, err := out.ReadByte()
			if err != nil {
				t.Fatalf("qemu-io ends after %q", all.String())
			}
			all.WriteByte(b)
		}
	}
	for i := range 3 {
		fmt.Fprintf(stdin, "write -P %d %d 4096\n", i+1, i*4096)
		until("wrote 4096/4096")
		stop()
		stop = serve()
	}
	// One line at a time: qemu-io polls standard input, which it also buffers.
	for _, c := range []string{"read -P 1 0 4096\n", "read -P 3 8192 4096\n"} {
		io.WriteString(stdin, c)
		until("read 4096/4096")
	}
	io.WriteString(stdin, "quit\n")
	if rest, _ := io.ReadAll(out); strings.Contains(string(rest), "fail") {
		t.Errorf("qemu-io says %s", rest)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	stop()
	for i := range 3 {
		if data, _ := dev.at(i*4096, 4096); !bytes.Equal(data, bytes.Repeat([]byte{byte(i + 1)}, 4096)) {
			t.Errorf("write %d is lost", i)
		}
	}
}
