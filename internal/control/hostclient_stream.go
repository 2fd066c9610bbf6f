package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
)

// writeChunk is how much of an upload goes into one message.
const writeChunk = 64 << 10

func (h *hostClient) Exec(ctx context.Context, id string, r ExecRequest) (ExecResult, error) {
	res, err := h.c.Exec(ctx, connect.NewRequest(&hostagentv1.ExecRequest{
		SandboxId: id, Cmd: r.Cmd, Args: r.Args, Envs: r.Envs, Cwd: r.Cwd, User: r.User,
		TimeoutSec: hostSec(r.TimeoutSec), Stdin: r.Stdin,
	}))
	if err != nil {
		return ExecResult{}, hostError(err)
	}
	m := res.Msg
	return ExecResult{
		Stdout: m.GetStdout(), Stderr: m.GetStderr(), ExitCode: m.GetExitCode(),
		Duration: time.Duration(m.GetDurationUs()) * time.Microsecond, TimedOut: m.GetTimedOut(),
	}, nil
}

// hostSec makes the greatest limit explicit, so that the host ends what its
// caller left behind.
func hostSec(sec int64) uint32 {
	if sec == 0 {
		return MaxExecSec
	}
	return uint32(sec)
}

func (h *hostClient) ExecStream(ctx context.Context, id string, r ExecRequest) (ExecStream, error) {
	ctx, cancel := context.WithCancel(ctx)
	st := h.c.ExecStream(ctx)
	start := &hostagentv1.ExecStart{
		SandboxId: id, Cmd: r.Cmd, Args: r.Args, Envs: r.Envs, Cwd: r.Cwd, User: r.User,
		TimeoutSec: hostSec(r.TimeoutSec), AttachPid: r.AttachPID,
	}
	if r.Pty != nil {
		start.Pty = &hostagentv1.PtySize{Cols: r.Pty.Cols, Rows: r.Pty.Rows}
	}
	err := st.Send(&hostagentv1.ExecStreamRequest{Message: &hostagentv1.ExecStreamRequest_Start{Start: start}})
	// EOF means that the answer is there already; Recv tells which.
	if err != nil && !errors.Is(err, io.EOF) {
		cancel()
		return nil, hostError(err)
	}
	return &execStream{st: st, cancel: cancel}, nil
}

type execStream struct {
	st     *connect.BidiStreamForClient[hostagentv1.ExecStreamRequest, hostagentv1.ExecStreamResponse]
	cancel context.CancelFunc
	exited bool
}

func (e *execStream) Send(in ExecInput) error {
	m := &hostagentv1.ExecStreamRequest{}
	switch {
	case in.Stop:
		m.Message = &hostagentv1.ExecStreamRequest_Stop{Stop: true}
	case in.CloseStdin:
		m.Message = &hostagentv1.ExecStreamRequest_CloseStdin{CloseStdin: true}
	case in.Resize != nil:
		m.Message = &hostagentv1.ExecStreamRequest_Resize{Resize: &hostagentv1.PtySize{Cols: in.Resize.Cols, Rows: in.Resize.Rows}}
	default:
		m.Message = &hostagentv1.ExecStreamRequest_Stdin{Stdin: in.Stdin}
	}
	if err := e.st.Send(m); err != nil {
		if errors.Is(err, io.EOF) {
			return io.EOF // The command has ended; Recv tells how.
		}
		return hostError(err)
	}
	return nil
}

func (e *execStream) Recv() (ExecEvent, error) {
	if e.exited {
		return ExecEvent{}, io.EOF
	}
	m, err := e.st.Receive()
	if errors.Is(err, io.EOF) {
		return ExecEvent{}, &Error{Code: CodeHostUnavailable, Message: "the host agent ended the stream before the command ended"}
	}
	if err != nil {
		return ExecEvent{}, hostError(err)
	}
	switch v := m.GetMessage().(type) {
	case *hostagentv1.ExecStreamResponse_Pid:
		return ExecEvent{Kind: EventStart, PID: v.Pid}, nil
	case *hostagentv1.ExecStreamResponse_Stdout:
		return ExecEvent{Kind: EventStdout, Data: v.Stdout}, nil
	case *hostagentv1.ExecStreamResponse_Stderr:
		return ExecEvent{Kind: EventStderr, Data: v.Stderr}, nil
	case *hostagentv1.ExecStreamResponse_Pty:
		return ExecEvent{Kind: EventPty, Data: v.Pty}, nil
	case *hostagentv1.ExecStreamResponse_Exit:
		e.exited = true
		return ExecEvent{Kind: EventExit, ExitCode: v.Exit.GetExitCode(), Reason: v.Exit.GetError()}, nil
	}
	return ExecEvent{}, &Error{Code: CodeInternal, Message: "the host agent sent a message of no known kind"}
}

func (e *execStream) Close() error {
	e.cancel()
	// Errors say no more than that it was cancelled.
	_ = e.st.CloseRequest()
	_ = e.st.CloseResponse()
	return nil
}

func fromEntry(p *hostagentv1.FileEntry) FileEntry {
	return FileEntry{
		Name: p.GetName(), Path: p.GetPath(), Type: p.GetType(), Size: p.GetSize(),
		Mode: p.GetMode(), Owner: p.GetOwner(), Group: p.GetGroup(),
		ModifiedAt: fromTime(p.GetModifiedAt()), SymlinkTarget: p.GetSymlinkTarget(),
	}
}

func (h *hostClient) ReadFile(ctx context.Context, id string, f FileRef) (FileEntry, io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	st, err := h.c.ReadFile(ctx, connect.NewRequest(&hostagentv1.ReadFileRequest{SandboxId: id, Path: f.Path, User: f.User}))
	if err != nil {
		cancel()
		return FileEntry{}, nil, hostError(err)
	}
	r := &fileReader{st: st, cancel: cancel}
	if !st.Receive() {
		err := st.Err()
		_ = r.Close()
		if err == nil {
			err = errors.New("the host agent sent no entry")
		}
		return FileEntry{}, nil, hostError(err)
	}
	if st.Msg().GetEntry() == nil {
		_ = r.Close()
		return FileEntry{}, nil, &Error{Code: CodeInternal, Message: "the host agent sent data before the entry"}
	}
	return fromEntry(st.Msg().GetEntry()), r, nil
}

type fileReader struct {
	st     *connect.ServerStreamForClient[hostagentv1.ReadFileResponse]
	cancel context.CancelFunc
	rest   []byte
}

func (r *fileReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if !r.st.Receive() {
			if err := r.st.Err(); err != nil {
				return 0, hostError(err)
			}
			return 0, io.EOF
		}
		r.rest = r.st.Msg().GetData()
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *fileReader) Close() error {
	r.cancel()
	_ = r.st.Close() // It was cancelled: there is nothing to be told.
	return nil
}

func (h *hostClient) WriteFile(ctx context.Context, id string, f FileRef, mode uint32, body io.Reader) (FileEntry, error) {
	// Cancelling is what tells the host that the content is not whole.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st := h.c.WriteFile(ctx)
	start := &hostagentv1.WriteFileStart{SandboxId: id, Path: f.Path, User: f.User, Mode: mode}
	err := st.Send(&hostagentv1.WriteFileRequest{Message: &hostagentv1.WriteFileRequest_Start{Start: start}})
	for buf := make([]byte, writeChunk); err == nil; {
		n, readErr := body.Read(buf)
		if n > 0 {
			err = st.Send(&hostagentv1.WriteFileRequest{Message: &hostagentv1.WriteFileRequest_Data{Data: buf[:n]}})
		}
		// Exactly EOF: a body that was cut short says ErrUnexpectedEOF.
		if readErr == io.EOF {
			break
		}
		if readErr != nil {
			cancel()
			return FileEntry{}, fmt.Errorf("read content: %w", readErr)
		}
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return FileEntry{}, hostError(err)
	}
	res, err := st.CloseAndReceive()
	if err != nil {
		return FileEntry{}, hostError(err)
	}
	return fromEntry(res.Msg.GetEntry()), nil
}

func (h *hostClient) ListFiles(ctx context.Context, id string, f FileRef, depth uint32) ([]FileEntry, error) {
	res, err := h.c.ListFiles(ctx, connect.NewRequest(&hostagentv1.ListFilesRequest{SandboxId: id, Path: f.Path, User: f.User, Depth: depth}))
	if err != nil {
		return nil, hostError(err)
	}
	var out []FileEntry
	for _, p := range res.Msg.GetEntries() {
		out = append(out, fromEntry(p))
	}
	return out, nil
}

func (h *hostClient) MakeDir(ctx context.Context, id string, f FileRef) (FileEntry, error) {
	res, err := h.c.MakeDir(ctx, connect.NewRequest(&hostagentv1.MakeDirRequest{SandboxId: id, Path: f.Path, User: f.User}))
	if err != nil {
		return FileEntry{}, hostError(err)
	}
	return fromEntry(res.Msg.GetEntry()), nil
}

func (h *hostClient) RemoveFile(ctx context.Context, id string, f FileRef) error {
	_, err := h.c.RemoveFile(ctx, connect.NewRequest(&hostagentv1.RemoveFileRequest{SandboxId: id, Path: f.Path, User: f.User}))
	return hostError(err)
}
