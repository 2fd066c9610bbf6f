package guest

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
)

const (
	maxParts         = 10_000
	maxMetadata      = 64
	maxMetadataKey   = 200 // the kernel allows 255 with the prefix
	maxMetadataValue = 4096
	metadataHeader   = "X-Metadata-"
	copyBuffer       = 128 << 10
)

func (s *Server) handleGetFile(w http.ResponseWriter, r *http.Request) {
	if err := s.allowFile(r, "read"); err != nil {
		writeError(w, err)
		return
	}
	path, f, fi, err := s.openForRead(r)
	if err != nil {
		writeError(w, err)
		return
	}
	defer f.Close()
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": filepath.Base(path)}))
	h.Set("Vary", "Accept-Encoding")
	var body io.Reader = f
	if fi.Size() == 0 {
		// Files of /proc have no size; a truly empty one must say so.
		first := make([]byte, 4096)
		n, err := f.Read(first)
		if err != nil && !errors.Is(err, io.EOF) {
			writeError(w, pathError(path, err))
			return
		}
		if n == 0 {
			h.Set("Content-Length", "0")
			return
		}
		body = io.MultiReader(bytes.NewReader(first[:n]), f)
	}
	switch {
	case wantsGzip(r):
		h.Set("Content-Encoding", "gzip")
		zw, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
		if _, err := io.CopyBuffer(zw, body, make([]byte, copyBuffer)); err != nil {
			panic(http.ErrAbortHandler) // an orderly end would look like the whole file
		}
		if err := zw.Close(); err != nil {
			panic(http.ErrAbortHandler)
		}
	case fi.Size() == 0:
		if _, err := io.Copy(w, body); err != nil {
			panic(http.ErrAbortHandler)
		}
	default:
		http.ServeContent(w, r, "", fi.ModTime(), f)
	}
}

func (s *Server) openForRead(r *http.Request) (string, *os.File, fs.FileInfo, error) {
	q := r.URL.Query()
	u, err := s.callUser(q.Get("username"), r.Header)
	if err != nil {
		return "", nil, nil, err
	}
	path, err := resolvePath("path", q.Get("path"), "", u)
	if err != nil {
		return "", nil, nil, err
	}
	// Opening a pipe must not wait for its writer.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", nil, nil, pathError(path, err)
	}
	fi, err := f.Stat()
	switch {
	case err != nil:
		err = pathError(path, err)
	case fi.IsDir():
		err = invalidf("path '%s' is a directory", clip(path))
	case !fi.Mode().IsRegular():
		err = invalidf("path '%s' is not a regular file", clip(path))
	}
	if err != nil {
		_ = f.Close()
		return "", nil, nil, err
	}
	return path, f, fi, nil
}

// wantsGzip is true for a caller that asks for gzip and nothing else. HTTP
// libraries list several codings by themselves; compressing for them would
// only slow an emulated processor down.
func wantsGzip(r *http.Request) bool {
	return r.Header.Get("Accept-Encoding") == "gzip" && r.Header.Get("Range") == ""
}

// writtenFile is one element of the answer of POST /files.
type writtenFile struct {
	Name     string            `json:"name"`
	Path     string            `json:"path"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

func (s *Server) handlePostFiles(w http.ResponseWriter, r *http.Request) {
	if err := s.allowFile(r, "write"); err != nil {
		writeError(w, err)
		return
	}
	files, err := s.receiveFiles(r)
	if err != nil {
		refuseUpload(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, files)
}

// What is left of a refused upload is taken for so long, and so much of it.
const (
	drainTime  = 10 * time.Second
	drainBytes = 4 << 30
)

// refuseUpload answers an upload that its sender may not have sent to its end,
// and then takes the rest: who finds the connection broken while he sends does
// not read why.
func refuseUpload(w http.ResponseWriter, r *http.Request, err error) {
	rc := http.NewResponseController(w)
	_ = rc.EnableFullDuplex() // HTTP/2 always is
	status, body := errorAnswer(err)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body)
	_ = rc.Flush()
	_ = rc.SetReadDeadline(time.Now().Add(drainTime))
	_, _ = io.CopyN(io.Discard, r.Body, drainBytes)
}

func (s *Server) receiveFiles(r *http.Request) ([]writtenFile, error) {
	q := r.URL.Query()
	u, err := s.callUser(q.Get("username"), r.Header)
	if err != nil {
		return nil, err
	}
	md, err := uploadMetadata(r.Header)
	if err != nil {
		return nil, err
	}
	body, size := io.Reader(r.Body), r.ContentLength
	switch enc := r.Header.Get("Content-Encoding"); enc {
	case "", "identity":
	case "gzip":
		zr, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, invalidf("body: not gzip: %v", err)
		}
		body, size = zr, -1
	default:
		return nil, invalidf("Content-Encoding: %q is not supported, only gzip and identity", clip(enc))
	}
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return nil, invalidf("Content-Type: %v", err)
	}
	switch kind {
	case "application/octet-stream":
		up := upload{user: u, body: body, size: size, metadata: md}
		if up.path, err = resolvePath("path", q.Get("path"), "", u); err != nil {
			return nil, err
		}
		write := up.write
		if q.Has("replace") {
			if up.mode, err = parseMode(q.Get("mode")); err != nil {
				return nil, err
			}
			write = up.replace
		}
		f, err := write()
		if err != nil {
			return nil, err
		}
		return []writtenFile{f}, nil
	case "multipart/form-data":
		if params["boundary"] == "" {
			return nil, invalidf("Content-Type: the boundary is missing")
		}
		// The multipart reader takes its input in small pieces.
		buffered := bufio.NewReaderSize(body, copyBuffer)
		up := upload{user: u, metadata: md, more: func() bool { return buffered.Buffered() > 0 }}
		return receiveParts(multipart.NewReader(buffered, params["boundary"]), q.Get("path"), up)
	default:
		return nil, invalidf("Content-Type: %q is neither multipart/form-data nor application/octet-stream", clip(kind))
	}
}

// receiveParts writes each part named "file" to the path of the query, else to
// the one of the part; all are as up says.
func receiveParts(mr *multipart.Reader, path string, up upload) ([]writtenFile, error) {
	var done []writtenFile
	seen := map[string]bool{}
	for n := 0; ; n++ {
		part, err := mr.NextPart()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, invalidf("body: %v", err)
		}
		if n == maxParts {
			return nil, invalidf("body: more than %d parts", maxParts)
		}
		if part.FormName() != "file" {
			continue
		}
		name := path
		if name == "" {
			// Part.FileName would strip the directories.
			_, p, err := mime.ParseMediaType(part.Header.Get("Content-Disposition"))
			if err != nil {
				return nil, invalidf("body: Content-Disposition: %v", err)
			}
			name = p["filename"]
		}
		up.body, up.size = part, -1
		if up.path, err = resolvePath("filename", name, "", up.user); err != nil {
			return nil, err
		}
		if seen[up.path] {
			return nil, invalidf("body: two files for the path '%s'", clip(up.path))
		}
		seen[up.path] = true
		f, err := up.write()
		if err != nil {
			return nil, err
		}
		done = append(done, f)
	}
	if len(done) == 0 {
		return nil, invalidf("body: no part named \"file\"")
	}
	return done, nil
}

func uploadMetadata(h http.Header) (map[string]string, error) {
	md := map[string]string{}
	for name, values := range h {
		key, ok := strings.CutPrefix(name, metadataHeader)
		if !ok {
			continue
		}
		// Header names have no case of their own on the way here.
		key = strings.ToLower(key)
		if key == "" || len(key) > maxMetadataKey {
			return nil, invalidf("%s: a metadata key must have 1 to %d bytes", clip(name), maxMetadataKey)
		}
		if len(values) != 1 || len(values[0]) > maxMetadataValue {
			return nil, invalidf("%s: must be given once and have at most %d bytes", clip(name), maxMetadataValue)
		}
		md[key] = values[0]
	}
	if len(md) > maxMetadata {
		return nil, invalidf("metadata: %d keys are more than %d", len(md), maxMetadata)
	}
	return md, nil
}

// upload is one file to write.
//
// An existing file is truncated and written in place, not replaced by a
// rename: watchers must see a write of that name and no temporary one, and
// owner links, hard links, bind mounts and open descriptors go on meaning the
// same file. The price is that an upload that breaks off leaves what had
// arrived by then; one that made the file removes it again. Callers who want
// all or nothing ask to replace.
type upload struct {
	user     account
	path     string
	mode     fs.FileMode // permission bits, for replace; 0: the file's, or 0644
	body     io.Reader
	size     int64 // -1: not known
	metadata map[string]string
	// more tells that the body's next bytes are here already: it comes in small
	// pieces. nil: it comes in large ones.
	more func() bool
}

func (up *upload) write() (writtenFile, error) {
	if err := makeDirs(filepath.Dir(up.path), up.user); err != nil {
		return writtenFile{}, err
	}
	f, created, err := up.open()
	if err != nil {
		return writtenFile{}, err
	}
	err = up.fill(f)
	if cerr := f.Close(); err == nil && cerr != nil {
		err = pathError(up.path, cerr)
	}
	if err != nil {
		if created {
			_ = os.Remove(up.path)
		}
		return writtenFile{}, err
	}
	return writtenFile{Name: filepath.Base(up.path), Path: up.path, Type: "file", Metadata: up.metadata}, nil
}

func (up *upload) open() (f *os.File, created bool, err error) {
	const mode = 0o644
	f, err = os.OpenFile(up.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err == nil {
		return f, true, nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return nil, false, pathError(up.path, err)
	}
	f, err = os.OpenFile(up.path, os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK, mode)
	switch {
	case errors.Is(err, unix.EISDIR):
		return nil, false, invalidf("path '%s' is a directory", clip(up.path))
	case errors.Is(err, unix.ENXIO): // a pipe that nobody reads
		return nil, false, invalidf("path '%s' is not a regular file", clip(up.path))
	case err != nil:
		return nil, false, pathError(up.path, err)
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		_ = f.Close()
		return nil, false, invalidf("path '%s' is not a regular file", clip(up.path))
	}
	return f, false, nil
}

// fill writes the body into the opened file.
func (up *upload) fill(f *os.File) error {
	if err := up.checkSpace(f); err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		return pathError(up.path, err)
	}
	// Watchers see each of these two: they are done only where they change
	// something.
	if fi.Size() > 0 {
		if err := f.Truncate(0); err != nil {
			return pathError(up.path, err)
		}
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if os.Geteuid() == 0 && (!ok || st.Uid != up.user.uid || st.Gid != up.user.gid) {
		if err := f.Chown(int(up.user.uid), int(up.user.gid)); err != nil {
			return pathError(up.path, err)
		}
	}
	src := &bodyReader{r: up.body}
	if err := up.copy(f, src); err != nil {
		if src.err != nil {
			return invalidf("body: %v", src.err)
		}
		return pathError(up.path, err)
	}
	return writeMetadata(f, up.path, up.metadata)
}

// copy writes in large pieces, without keeping back what has come.
func (up *upload) copy(w io.Writer, r io.Reader) error {
	buf := make([]byte, copyBuffer)
	for n := 0; ; {
		m, err := r.Read(buf[n:])
		n += m
		if n > 0 && (n == len(buf) || err != nil || up.more == nil || !up.more()) {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
			n = 0
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// checkSpace refuses what cannot fit before anything is overwritten.
func (up *upload) checkSpace(f *os.File) error {
	var st unix.Statfs_t
	if up.size <= 0 || unix.Fstatfs(int(f.Fd()), &st) != nil {
		return nil
	}
	free := int64(st.Bavail) * st.Bsize
	if os.Geteuid() == 0 {
		free = int64(st.Bfree) * st.Bsize
	}
	if fi, err := f.Stat(); err == nil {
		free += fi.Size()
	}
	if up.size > free {
		return connect.NewError(connect.CodeResourceExhausted,
			fmt.Errorf("path '%s': not enough disk space: %d bytes required, %d available", clip(up.path), up.size, free))
	}
	return nil
}

// bodyReader remembers that it was the client's side that failed.
type bodyReader struct {
	r   io.Reader
	err error
}

func (b *bodyReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	return n, err
}
