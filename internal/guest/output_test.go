package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/process"
)

func readers(a *agent, pid uint32) int {
	p, err := a.procs.find(byPID(pid), true)
	if err != nil {
		return -1
	}
	p.out.mu.Lock()
	defer p.out.mu.Unlock()
	return len(p.out.readers)
}

func TestDisconnectAndConnectAgain(t *testing.T) {
	a := confirmed(t)
	codecs(t, func(t *testing.T, opts ...connect.ClientOption) {
		c := a.processes(opts...)
		ctx, cancel := context.WithCancel(t.Context())
		s, pid := started(t, ctx, c, sh("echo first; read x; echo $x; read y; echo last; exit 5"))
		if !s.Receive() || string(s.Msg().GetEvent().GetData().GetStdout()) != "first\n" {
			t.Fatalf("%v %v", s.Msg(), s.Err())
		}
		cancel()
		_ = s.Close()
		eventually(t, "the client is gone", func() bool { return readers(a, pid) == 0 })
		send := func(text string) {
			t.Helper()
			in := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte(text)}}
			if _, err := c.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in})); err != nil {
				t.Fatal(err)
			}
		}
		send("while nobody looked\n")
		eventually(t, "the output is there", func() bool {
			p, _ := a.procs.find(byPID(pid), false)
			p.out.mu.Lock()
			defer p.out.mu.Unlock()
			return len(p.out.pieces) > 0
		})
		cs, err := c.Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)}))
		if err != nil {
			t.Fatal(err)
		}
		r := &run{}
		for cs.Receive() {
			r.add(cs.Msg().GetEvent())
			if r.stdout == "while nobody looked\n" && r.end == nil {
				send("go\n")
				r.stdout = ""
			}
		}
		if cs.Err() != nil || r.pid != pid || r.events[0] != "start" || r.stdout != "last\n" || r.end.GetExitCode() != 5 {
			t.Fatalf("%+v %v", r, cs.Err())
		}
		// Its end has been told: now it is unknown.
		cs, err = c.Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)}))
		if err == nil {
			for cs.Receive() {
			}
			err = cs.Err()
		}
		wantCode(t, err, connect.CodeNotFound, "not found")
	})
}

// While nobody is attached a process runs on; what is kept is bounded and is
// the newest.
func TestDetachedOutputIsBounded(t *testing.T) {
	a := confirmed(t)
	ctx, cancel := context.WithCancel(t.Context())
	s, pid := started(t, ctx, a.processes(), sh("read x; head -c 8000000 /dev/zero; echo the end"))
	p, err := a.procs.find(byPID(pid), false)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	_ = s.Close()
	eventually(t, "the client is gone", func() bool { return readers(a, pid) == 0 })
	in := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("\n")}}
	if _, err := a.processes().SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it ends", func() bool { return len(a.procs.list()) == 0 })
	if p.out.size > outputLimit {
		t.Errorf("%d bytes are kept", p.out.size)
	}
	cs, err := a.processes().Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)}))
	if err != nil {
		t.Fatal(err)
	}
	r := &run{}
	for cs.Receive() {
		r.add(cs.Msg().GetEvent())
	}
	if !strings.HasSuffix(r.stdout, "the end\n") || len(r.stdout) < outputLimit/2 || r.end == nil || r.end.GetExitCode() != 0 {
		t.Errorf("%d bytes, end %v, %v", len(r.stdout), r.end, cs.Err())
	}
}

// 64 MiB through one stream, in bounded memory and complete; the client is
// slower than the process.
func TestBigOutput(t *testing.T) {
	a := confirmed(t)
	const size = 64 << 20
	s, err := a.processes().Start(t.Context(), connect.NewRequest(sh(fmt.Sprintf("head -c %d /dev/zero", size))))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var total, peak, n int
	var code int32 = -1
	for s.Receive() {
		e := s.Msg().GetEvent()
		total += len(e.GetData().GetStdout())
		if e.GetEnd() != nil {
			code = e.GetEnd().GetExitCode()
		}
		if n++; n%256 == 0 {
			if ps := a.procs.list(); len(ps) == 1 {
				ps[0].out.mu.Lock()
				peak = max(peak, ps[0].out.size)
				ps[0].out.mu.Unlock()
			}
		}
	}
	if s.Err() != nil || total != size || code != 0 {
		t.Fatalf("%d bytes, exit code %d, %v", total, code, s.Err())
	}
	if peak > outputLimit {
		t.Errorf("%d bytes were held", peak)
	}
}

// A server left behind by a command neither holds the end of it up nor dies of
// its closed output.
func TestBackgroundChild(t *testing.T) {
	a := confirmed(t)
	mark := filepath.Join(a.home, "mark")
	r := runAll(t, a.processes(), connect.NewRequest(sh("(while ! test -e "+mark+"; do sleep 0.05; done; echo one; echo two; echo done >"+mark+") & echo started $!")))
	if r.err != nil || !strings.HasPrefix(r.stdout, "started ") || r.end.GetExitCode() != 0 {
		t.Fatalf("%+v", r)
	}
	// It ended, and the child still waits for this:
	writeFile(t, mark, "go")
	eventually(t, "the child could write", func() bool {
		b, _ := os.ReadFile(mark)
		return string(b) == "done\n"
	})
}

var keptAlive = regexp.MustCompile(`^start( keepalive)+ end$`)

func TestKeepalive(t *testing.T) {
	a := confirmed(t)
	req := connect.NewRequest(sh("sleep 1.3"))
	req.Header().Set(keepaliveHeader, "1")
	r := runAll(t, a.processes(), req)
	// One a second: on a busy machine it takes longer than it should.
	if events := strings.Join(r.events, " "); r.err != nil || !keptAlive.MatchString(events) {
		t.Errorf("%v %v", events, r.err)
	}
	req = connect.NewRequest(sh("exit 0"))
	req.Header().Set(keepaliveHeader, "soon")
	wantCode(t, runAll(t, a.processes(), req).err, connect.CodeInvalidArgument, keepaliveHeader)
}

// Two clients of one process both get all of it.
func TestTwoClients(t *testing.T) {
	a := confirmed(t)
	c := a.processes()
	s, pid := started(t, t.Context(), c, sh("read x; seq 1 20000"))
	defer s.Close()
	cs, err := c.Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)}))
	if err != nil || !cs.Receive() {
		t.Fatalf("%v %v", err, cs.Err())
	}
	defer cs.Close()
	in := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("\n")}}
	if _, err := c.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in})); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	got := make([]run, 2)
	wg.Go(func() {
		for s.Receive() {
			got[0].add(s.Msg().GetEvent())
		}
	})
	wg.Go(func() {
		for cs.Receive() {
			got[1].add(cs.Msg().GetEvent())
		}
	})
	wg.Wait()
	for i, r := range got {
		if len(r.stdout) != 108894 || !strings.HasSuffix(r.stdout, "\n20000\n") || r.end == nil {
			t.Errorf("client %d: %d bytes, end %v", i, len(r.stdout), r.end)
		}
	}
}
