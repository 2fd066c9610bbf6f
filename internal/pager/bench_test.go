package pager

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
)

// BenchmarkHundredVMs tells the memory of a real pager process, beyond the
// shared images, with a hundred VMs attached that have touched all of them.
func BenchmarkHundredVMs(b *testing.B) {
	r := newRig(b, 16)
	must(b, r.srv.Close())
	b.Setenv(roleEnv, "pager")
	must(b, os.RemoveAll(filepath.Join(r.dir, "run")))
	exe, err := os.Executable()
	must(b, err)
	socket := filepath.Join(r.dir, "pager.sock")
	k, err := Keep(context.Background(), KeeperOptions{
		Command: []string{exe, r.dir, socket}, Socket: socket, LogPath: filepath.Join(r.dir, "pager.log"), Logger: slog.New(slog.DiscardHandler),
	})
	must(b, err)
	b.Cleanup(func() { must(b, k.Stop()) })
	ctx := context.Background()
	var vms []*vmmProc
	for i := range 100 {
		id := fmt.Sprintf("v%d", i)
		p, err := k.Client().PrepareMemory(ctx, connect.NewRequest(&pagerv1.PrepareMemoryRequest{SandboxId: id, ImageId: r.image.String()}))
		must(b, err)
		v := startVMM(b)
		v.do("share /proc/%d/fd/%d %d", p.Msg.Pid, p.Msg.Fd, len(r.content))
		_, err = k.Client().AttachMemory(ctx, connect.NewRequest(&pagerv1.AttachMemoryRequest{SandboxId: id, Pid: int32(v.pid())}))
		must(b, err)
		vms = append(vms, v)
	}
	for _, v := range vms {
		v.wantSum(r.content)
	}
	for b.Loop() {
		vms[0].do("peek 0")
	}
	anon, file, shmem := rss(b, k.PID())
	b.ReportMetric(float64(anon+file)/(1<<20), "MiB")
	b.ReportMetric(float64(anon)/(1<<20), "anon-MiB")
	b.ReportMetric(float64(shmem)/(1<<20), "shared-MiB")
	for _, v := range vms {
		v.kill()
	}
}

// rss reads a process's resident memory by kind, bytes.
func rss(b *testing.B, pid int) (anon, file, shmem int64) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	must(b, err)
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		for name, p := range map[string]*int64{"RssAnon:": &anon, "RssFile:": &file, "RssShmem:": &shmem} {
			if rest, ok := strings.CutPrefix(sc.Text(), name); ok {
				_, err := fmt.Sscan(rest, p)
				must(b, err)
				*p <<= 10
			}
		}
	}
	return anon, file, shmem
}
