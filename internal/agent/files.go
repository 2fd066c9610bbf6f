package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/gen/filesystem"
	agentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
)

// fileChunk is the size of one message of file data.
const fileChunk = 256 << 10

// fileRequest makes a Connect request that acts as a user.
func fileRequest[T any](msg *T, user string) *connect.Request[T] {
	req := connect.NewRequest(msg)
	asUser(req.Header(), user)
	return req
}

func checkPath(path string) error {
	if path == "" {
		return fmt.Errorf("%w: path is empty; give the file's path in the sandbox", engine.ErrInvalid)
	}
	return nil
}

// filesGuest checks the path and finds the guest.
func (a *Agent) filesGuest(ctx context.Context, id, path string) (*engine.Guest, error) {
	if err := checkPath(path); err != nil {
		return nil, a.wire(ctx, err)
	}
	g, err := a.engine.Guest(id)
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	return g, nil
}

func filesQuery(path, user string) string {
	q := url.Values{"path": {path}}
	if user != "" {
		q.Set("username", user)
	}
	return "/files?" + q.Encode()
}

// ReadFile implements hostagent.v1.
func (a *Agent) ReadFile(ctx context.Context, req *connect.Request[agentv1.ReadFileRequest], stream *connect.ServerStream[agentv1.ReadFileResponse]) error {
	m := req.Msg
	g, err := a.filesGuest(ctx, m.SandboxId, m.Path)
	if err != nil {
		return err
	}
	st, err := g.Files.Stat(ctx, fileRequest(&filesystem.StatRequest{Path: m.Path}, m.User))
	if err != nil {
		return a.wire(ctx, guestError(err))
	}
	if st.Msg.GetEntry().GetType() == filesystem.FileType_FILE_TYPE_DIRECTORY {
		return a.wire(ctx, fmt.Errorf("%w: path %q is a directory; list it, or name a file in it", engine.ErrInvalid, m.Path))
	}
	resp, err := g.HTTP(ctx, http.MethodGet, filesQuery(m.Path, m.User), nil)
	if err != nil {
		return a.wire(ctx, fmt.Errorf("read %q: %w", m.Path, err))
	}
	defer resp.Body.Close()
	if err := httpError(resp); err != nil {
		return a.wire(ctx, err)
	}
	entry := entryOf(st.Msg.Entry)
	if resp.ContentLength >= 0 {
		// What a link has is its own size; what comes is its target.
		entry.Size = uint64(resp.ContentLength)
	}
	if err := stream.Send(&agentv1.ReadFileResponse{Message: &agentv1.ReadFileResponse_Entry{Entry: entry}}); err != nil {
		return err
	}
	buf := make([]byte, fileChunk)
	body := &endReader{r: resp.Body}
	for {
		n, err := io.ReadFull(body, buf)
		if n > 0 {
			if err := stream.Send(&agentv1.ReadFileResponse{Message: &agentv1.ReadFileResponse_Data{Data: buf[:n]}}); err != nil {
				return err
			}
		}
		// ReadFull calls a last, shorter chunk unexpected; what the body
		// itself calls so is a guest that broke off.
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) && body.ended {
			return nil
		}
		if err != nil {
			return a.wire(ctx, fmt.Errorf("read %q: %w", m.Path, err))
		}
	}
}

// endReader remembers whether its reader came to a proper end.
type endReader struct {
	r     io.Reader
	ended bool
}

func (e *endReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	e.ended = e.ended || err == io.EOF
	return n, err
}

// WriteFile implements hostagent.v1.
func (a *Agent) WriteFile(ctx context.Context, stream *connect.ClientStream[agentv1.WriteFileRequest]) (*connect.Response[agentv1.WriteFileResponse], error) {
	if !stream.Receive() || stream.Msg().GetStart() == nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.Join(errors.New("the first message must be start"), stream.Err()))
	}
	m := stream.Msg().GetStart()
	g, err := a.filesGuest(ctx, m.SandboxId, m.Path)
	if err != nil {
		return nil, err
	}
	// The body is read from the stream as the guest takes it. A stream that
	// breaks off must break the upload too, or half a file would look whole.
	body := &streamReader{stream: stream}
	q := filesQuery(m.Path, m.User) + "&replace=1"
	if m.Mode != 0 {
		q += fmt.Sprintf("&mode=%o", m.Mode)
	}
	resp, err := g.HTTP(ctx, http.MethodPost, q, body)
	if err != nil {
		return nil, a.wire(ctx, fmt.Errorf("write %q: %w", m.Path, err))
	}
	defer resp.Body.Close()
	if err := httpError(resp); err != nil {
		return nil, a.wire(ctx, err)
	}
	st, err := g.Files.Stat(ctx, fileRequest(&filesystem.StatRequest{Path: m.Path}, m.User))
	if err != nil {
		return nil, a.wire(ctx, guestError(err))
	}
	return connect.NewResponse(&agentv1.WriteFileResponse{Entry: entryOf(st.Msg.Entry)}), nil
}

// streamReader reads the data of a WriteFile stream.
type streamReader struct {
	stream *connect.ClientStream[agentv1.WriteFileRequest]
	rest   []byte
}

func (r *streamReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if !r.stream.Receive() {
			if err := r.stream.Err(); err != nil {
				return 0, fmt.Errorf("the upload broke off: %w", err)
			}
			return 0, io.EOF
		}
		r.rest = r.stream.Msg().GetData()
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// httpError turns an answer of the guest agent's HTTP side into an error.
func httpError(resp *http.Response) error {
	if resp.StatusCode/100 == 2 {
		return nil
	}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
	var body struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(b, &body) != nil || body.Message == "" {
		body.Message = http.StatusText(resp.StatusCode)
	}
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden:
		return &guestWord{engine.ErrInvalid, body.Message}
	case http.StatusNotFound:
		return &guestWord{engine.ErrNotFound, body.Message}
	case http.StatusConflict:
		return &guestWord{engine.ErrExists, body.Message}
	case http.StatusInsufficientStorage:
		return &guestWord{engine.ErrNoRoom, body.Message}
	}
	return fmt.Errorf("the guest agent answered %d: %s", resp.StatusCode, body.Message)
}

// ListFiles implements hostagent.v1.
func (a *Agent) ListFiles(ctx context.Context, req *connect.Request[agentv1.ListFilesRequest]) (*connect.Response[agentv1.ListFilesResponse], error) {
	m := req.Msg
	g, err := a.filesGuest(ctx, m.SandboxId, m.Path)
	if err != nil {
		return nil, err
	}
	r, err := g.Files.ListDir(ctx, fileRequest(&filesystem.ListDirRequest{Path: m.Path, Depth: max(1, m.Depth)}, m.User))
	if err != nil {
		return nil, a.wire(ctx, guestError(err))
	}
	out := &agentv1.ListFilesResponse{}
	for _, e := range r.Msg.Entries {
		out.Entries = append(out.Entries, entryOf(e))
	}
	return connect.NewResponse(out), nil
}

// MakeDir implements hostagent.v1.
func (a *Agent) MakeDir(ctx context.Context, req *connect.Request[agentv1.MakeDirRequest]) (*connect.Response[agentv1.MakeDirResponse], error) {
	m := req.Msg
	g, err := a.filesGuest(ctx, m.SandboxId, m.Path)
	if err != nil {
		return nil, err
	}
	r, err := g.Files.MakeDir(ctx, fileRequest(&filesystem.MakeDirRequest{Path: m.Path}, m.User))
	if err != nil {
		return nil, a.wire(ctx, guestError(err))
	}
	return connect.NewResponse(&agentv1.MakeDirResponse{Entry: entryOf(r.Msg.Entry)}), nil
}

// RemoveFile implements hostagent.v1. The guest's own call succeeds on what is
// missing, as the E2B SDKs want it; a caller of ours who mistyped a path is told.
func (a *Agent) RemoveFile(ctx context.Context, req *connect.Request[agentv1.RemoveFileRequest]) (*connect.Response[agentv1.RemoveFileResponse], error) {
	m := req.Msg
	g, err := a.filesGuest(ctx, m.SandboxId, m.Path)
	if err != nil {
		return nil, err
	}
	if _, err := g.Files.Stat(ctx, fileRequest(&filesystem.StatRequest{Path: m.Path}, m.User)); err != nil {
		return nil, a.wire(ctx, guestError(err))
	}
	if _, err := g.Files.Remove(ctx, fileRequest(&filesystem.RemoveRequest{Path: m.Path}, m.User)); err != nil {
		return nil, a.wire(ctx, guestError(err))
	}
	return connect.NewResponse(&agentv1.RemoveFileResponse{}), nil
}

var fileTypes = map[filesystem.FileType]string{
	filesystem.FileType_FILE_TYPE_FILE:      "file",
	filesystem.FileType_FILE_TYPE_DIRECTORY: "dir",
	filesystem.FileType_FILE_TYPE_SYMLINK:   "symlink",
}

func entryOf(e *filesystem.EntryInfo) *agentv1.FileEntry {
	t := fileTypes[e.GetType()]
	if t == "" {
		t = "other"
	}
	return &agentv1.FileEntry{
		Name: e.GetName(), Path: e.GetPath(), Type: t, Size: uint64(max(0, e.GetSize())), Mode: e.GetMode() & 0o7777,
		Owner: e.GetOwner(), Group: e.GetGroup(), ModifiedAt: e.GetModifiedTime(), SymlinkTarget: e.GetSymlinkTarget(),
	}
}
