package guest

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/process"
)

func TestStdin(t *testing.T) {
	a := confirmed(t)
	codecs(t, func(t *testing.T, opts ...connect.ClientOption) {
		c := a.processes(opts...)
		ctx := t.Context()
		s, pid := started(t, ctx, c, &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "cat"}, Tag: proto.String("my cat")})
		defer s.Close()
		in := func(text string) *pb.ProcessInput {
			return &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte(text)}}
		}
		if _, err := c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in("one ")})); err != nil {
			t.Fatal(err)
		}
		st := c.StreamInput(ctx)
		for _, m := range []*pb.StreamInputRequest{
			{Event: &pb.StreamInputRequest_Start{Start: &pb.StreamInputRequest_StartEvent{Process: byTag("my cat")}}},
			{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{Input: in("two ")}}},
			{Event: &pb.StreamInputRequest_Keepalive{Keepalive: &pb.StreamInputRequest_KeepAlive{}}},
			{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{Input: in("three")}}},
		} {
			if err := st.Send(m); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := st.CloseAndReceive(); err != nil {
			t.Fatal(err)
		}
		list, err := c.List(ctx, connect.NewRequest(&pb.ListRequest{}))
		if err != nil || len(list.Msg.GetProcesses()) != 1 || list.Msg.GetProcesses()[0].GetTag() != "my cat" ||
			list.Msg.GetProcesses()[0].GetConfig().GetCmd() != "cat" || list.Msg.GetProcesses()[0].GetPid() != pid {
			t.Fatalf("list: %v %v", list, err)
		}
		if _, err := c.CloseStdin(ctx, connect.NewRequest(&pb.CloseStdinRequest{Process: byPID(pid)})); err != nil {
			t.Fatal(err)
		}
		r := &run{}
		for s.Receive() {
			r.add(s.Msg().GetEvent())
		}
		if r.stdout != "one two three" || r.end.GetExitCode() != 0 || s.Err() != nil {
			t.Fatalf("%q %v %v", r.stdout, r.end, s.Err())
		}
		_, err = c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in("late")}))
		wantCode(t, err, connect.CodeNotFound, fmt.Sprint(pid))
	})
}

func TestInputRefusals(t *testing.T) {
	a := confirmed(t)
	c, ctx := a.processes(), t.Context()
	m := sh("exec sleep 60")
	m.Stdin = proto.Bool(false)
	s, pid := started(t, ctx, c, m)
	defer s.Close()
	send := func(p *pb.ProcessSelector, in *pb.ProcessInput) error {
		_, err := c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: p, Input: in}))
		return err
	}
	stdin := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("x")}}
	wantCode(t, send(byPID(pid), stdin), connect.CodeFailedPrecondition, "without an input")
	wantCode(t, send(byPID(pid), &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("x")}}), connect.CodeFailedPrecondition, "no terminal")
	wantCode(t, send(byPID(pid), nil), connect.CodeInvalidArgument, "input")
	wantCode(t, send(nil, stdin), connect.CodeInvalidArgument, "pid or tag")
	wantCode(t, send(byTag("nobody"), stdin), connect.CodeNotFound, "nobody")
	_, err := c.Update(ctx, connect.NewRequest(&pb.UpdateRequest{Process: byPID(pid), Pty: &pb.PTY{}}))
	wantCode(t, err, connect.CodeFailedPrecondition, "no terminal")
	_, err = c.SendSignal(ctx, connect.NewRequest(&pb.SendSignalRequest{Process: byPID(pid)}))
	wantCode(t, err, connect.CodeInvalidArgument, "signal")
	_, err = c.SendSignal(ctx, connect.NewRequest(&pb.SendSignalRequest{Process: byPID(4_000_000), Signal: pb.Signal_SIGNAL_SIGKILL}))
	wantCode(t, err, connect.CodeNotFound, "4000000")
	st := c.StreamInput(ctx)
	if err := st.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{Input: stdin}}}); err != nil {
		t.Fatal(err)
	}
	_, err = st.CloseAndReceive()
	wantCode(t, err, connect.CodeInvalidArgument, "first message")
}

// Input that a process does not read waits, and the caller's limit ends it.
func TestInputBlocks(t *testing.T) {
	a := confirmed(t)
	c := a.processes()
	s, pid := started(t, t.Context(), c, sh("exec sleep 60"))
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	big := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: make([]byte, 1<<20)}}
	_, err := c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: big}))
	wantCode(t, err, connect.CodeDeadlineExceeded, "")
	p, err := a.procs.find(byPID(pid), false)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the writer gives up its turn", func() bool { return len(p.in.turn) == 1 })
}

func TestPTY(t *testing.T) {
	a := confirmed(t)
	c, ctx := a.processes(), t.Context()
	m := sh("stty size; stty -echo; echo ready; read line; stty size; echo got $line; exit 4")
	m.Pty = &pb.PTY{Size: &pb.PTY_Size{Cols: 100, Rows: 30}}
	s, pid := started(t, ctx, c, m)
	defer s.Close()
	r := &run{}
	for !strings.Contains(r.pty, "ready") && s.Receive() {
		r.add(s.Msg().GetEvent())
	}
	if !strings.HasPrefix(r.pty, "30 100\r\n") {
		t.Fatalf("%q %v", r.pty, s.Err())
	}
	size := &pb.PTY{Size: &pb.PTY_Size{Cols: 120, Rows: 40}}
	if _, err := c.Update(ctx, connect.NewRequest(&pb.UpdateRequest{Process: byPID(pid), Pty: size})); err != nil {
		t.Fatal(err)
	}
	_, err := c.Update(ctx, connect.NewRequest(&pb.UpdateRequest{Process: byPID(pid), Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 1 << 20, Rows: 1}}}))
	wantCode(t, err, connect.CodeInvalidArgument, "pty.size")
	_, err = c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("x")}}}))
	wantCode(t, err, connect.CodeFailedPrecondition, "send pty")
	in := &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("it\n")}}
	if _, err := c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in})); err != nil {
		t.Fatal(err)
	}
	for s.Receive() {
		r.add(s.Msg().GetEvent())
	}
	if !strings.HasSuffix(r.pty, "40 120\r\ngot it\r\n") || r.stdout != "" || r.end.GetExitCode() != 4 {
		t.Errorf("%q %v %v", r.pty, r.end, s.Err())
	}
}

// The end of input of a terminal ends a program that reads it.
func TestPTYCloseStdin(t *testing.T) {
	a := confirmed(t)
	c, ctx := a.processes(), t.Context()
	m := &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "cat"}, Pty: &pb.PTY{}}
	s, pid := started(t, ctx, c, m)
	defer s.Close()
	if _, err := c.CloseStdin(ctx, connect.NewRequest(&pb.CloseStdinRequest{Process: byPID(pid)})); err != nil {
		t.Fatal(err)
	}
	r := &run{}
	for s.Receive() {
		r.add(s.Msg().GetEvent())
	}
	if r.end == nil || r.end.GetExitCode() != 0 {
		t.Errorf("%v %v", r.end, s.Err())
	}
}
