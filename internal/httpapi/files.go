package httpapi

import (
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

type entryBody struct {
	Name          string    `json:"name"`
	Path          string    `json:"path"`
	Type          string    `json:"type"`
	Size          uint64    `json:"size"`
	Mode          uint32    `json:"mode"`
	Owner         string    `json:"owner"`
	Group         string    `json:"group"`
	ModifiedAt    time.Time `json:"modified_at,omitzero"`
	SymlinkTarget string    `json:"symlink_target,omitempty"`
}

func toEntry(e control.FileEntry) entryBody { return entryBody(e) }

// fileQuery checks a request about a file.
func fileQuery(r *http.Request, more ...string) (id string, f control.FileRef, q url.Values, err error) {
	if id, err = pathID(r); err != nil {
		return
	}
	if q, err = query(r, append([]string{"path", "user"}, more...)...); err != nil {
		return
	}
	if !q.Has("path") {
		err = control.Invalid("path", "is required, as ?path=")
	}
	return id, control.FileRef{Path: q.Get("path"), User: q.Get("user")}, q, err
}

func (a *api) readFile(w http.ResponseWriter, r *http.Request) error {
	id, f, _, err := fileQuery(r)
	if err != nil {
		return err
	}
	e, content, err := a.svc.ReadFile(r.Context(), id, f)
	if err != nil {
		return err
	}
	defer content.Close()
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-File-Mode", strconv.FormatUint(uint64(e.Mode), 8))
	if !e.ModifiedAt.IsZero() {
		h.Set("Last-Modified", e.ModifiedAt.UTC().Format(http.TimeFormat))
	}
	src := io.Reader(content)
	sized := e.Type == "file" && e.Size > 0 && !strings.HasPrefix(e.Path, "/proc/") && !strings.HasPrefix(e.Path, "/sys/")
	if sized {
		// A file that grows meanwhile is read as far as it was; one that
		// shrinks breaks the answer. The kernel's files have sizes of their own.
		h.Set("Content-Length", strconv.FormatUint(e.Size, 10))
		src = io.LimitReader(content, int64(e.Size))
	}
	w.WriteHeader(http.StatusOK)
	n, err := io.Copy(flushing{w, http.NewResponseController(w)}, src)
	if err == nil && sized && uint64(n) < e.Size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		a.log.InfoContext(r.Context(), "reading a file broke", "request_id", requestIDOf(r), "sandbox", id, "err", err)
		// The one way left to say that this is not all.
		panic(http.ErrAbortHandler)
	}
	return nil
}

// flushing sends what it has at once: a file that grows slowly (a pipe, a log
// of the kernel) is seen while it comes.
type flushing struct {
	w  io.Writer
	rc *http.ResponseController
}

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err == nil {
		err = f.rc.Flush()
	}
	return n, err
}

// upload remembers whether it was the client that failed.
type upload struct {
	io.Reader
	err error
}

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.Reader.Read(p)
	if err != nil && err != io.EOF {
		u.err = err
	}
	return n, err
}

func (a *api) writeFile(w http.ResponseWriter, r *http.Request) error {
	id, f, q, err := fileQuery(r, "mode")
	if err != nil {
		return err
	}
	mode, err := number(q, "mode", 8, 0, 0, 0o7777)
	if err != nil {
		return err
	}
	body := &upload{Reader: r.Body}
	e, err := a.svc.WriteFile(r.Context(), id, f, uint32(mode), body)
	if body.err != nil {
		return &control.Error{Code: control.CodeInvalid, Message: "body: ended before it was whole; the file is as it was", Err: errors.Join(body.err, err)}
	}
	if err != nil {
		return err
	}
	return reply(w, http.StatusOK, toEntry(e))
}

func (a *api) removeFile(w http.ResponseWriter, r *http.Request) error {
	id, f, _, err := fileQuery(r)
	if err != nil {
		return err
	}
	if err := a.svc.RemoveFile(r.Context(), id, f); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *api) listFiles(w http.ResponseWriter, r *http.Request) error {
	id, f, q, err := fileQuery(r, "depth")
	if err != nil {
		return err
	}
	depth, err := number(q, "depth", 10, 1, 1, control.MaxListDepth)
	if err != nil {
		return err
	}
	list, err := a.svc.ListFiles(r.Context(), id, f, depth)
	if err != nil {
		return err
	}
	out := struct {
		Entries []entryBody `json:"entries"`
	}{[]entryBody{}}
	for _, e := range list {
		out.Entries = append(out.Entries, toEntry(e))
	}
	return reply(w, http.StatusOK, out)
}

func (a *api) makeDir(w http.ResponseWriter, r *http.Request) error {
	id, f, _, err := fileQuery(r)
	if err != nil {
		return err
	}
	if err := noBody(w, r); err != nil {
		return err
	}
	e, err := a.svc.MakeDir(r.Context(), id, f)
	if err != nil {
		return err
	}
	return reply(w, http.StatusCreated, toEntry(e))
}
