package clienttest

import (
	"fmt"
	"io"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"

	"git.omukk.dev/wrenn/sandbox/client"
)

type file struct {
	kind   string // client.FileType…
	data   []byte
	mode   uint32
	target string
}

// Put puts a file into a sandbox.
func (s *Server) Put(id, name, content string, mode uint32) {
	s.PutEntry(id, name, client.FileTypeFile, content, mode)
}

// PutEntry puts anything into a sandbox: for a link, content is its target.
// The name is not checked, so that hostile ones can be tried.
func (s *Server) PutEntry(id, name, kind, content string, mode uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[id+" "+name] = &file{kind: kind, data: []byte(content), mode: mode, target: content}
}

// Content returns a file of a sandbox, its mode, and whether it is there.
func (s *Server) Content(id, name string) (string, uint32, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, ok := s.files[id+" "+name]
	if !ok || f.kind != client.FileTypeFile {
		return "", 0, false
	}
	return string(f.data), f.mode, true
}

// Discarded returns how many bytes were written under /discard.
func (s *Server) Discarded() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.discarded
}

func (s *Server) filePath(r *http.Request) (id, name string, err error) {
	sb, err := s.running(r)
	if err != nil {
		return "", "", err
	}
	name = r.URL.Query().Get("path")
	if !strings.HasPrefix(name, "/") {
		return "", "", invalid("path: must be absolute")
	}
	return sb.ID, path.Clean(name), nil
}

// isDir tells whether anything lies below name; the caller holds mu.
func (s *Server) isDir(id, name string) bool {
	if f, ok := s.files[id+" "+name]; ok {
		return f.kind == client.FileTypeDir
	}
	below := id + " " + strings.TrimSuffix(name, "/") + "/"
	for k := range s.files {
		if strings.HasPrefix(k, below) {
			return true
		}
	}
	return name == "/"
}

func (s *Server) getFile(w http.ResponseWriter, r *http.Request) error {
	id, name, err := s.filePath(r)
	if err != nil {
		return err
	}
	if n, ok := strings.CutPrefix(name, "/big/"); ok {
		return writeBig(w, n)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.files[id+" "+name]
	if f != nil && f.kind == client.FileTypeSymlink {
		f = s.files[id+" "+f.target]
	}
	switch {
	case f == nil && !s.isDir(id, name):
		return notFound("there is no file " + name)
	case f == nil || f.kind != client.FileTypeFile:
		return invalid("path: " + name + " is a directory")
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(f.data)))
	w.Header().Set("X-File-Mode", fmt.Sprintf("%04o", f.mode))
	_, err = w.Write(f.data)
	return err
}

// writeBig writes n bytes; "Nx" breaks off after N.
func writeBig(w http.ResponseWriter, n string) error {
	digits, cut := strings.CutSuffix(n, "x")
	size, err := strconv.ParseInt(digits, 10, 64)
	if err != nil {
		return notFound("there is no file /big/" + n)
	}
	if !cut {
		w.Header().Set("Content-Length", digits)
	}
	buf := make([]byte, 64<<10)
	for size > 0 {
		m, err := w.Write(buf[:min(size, int64(len(buf)))])
		if err != nil {
			return nil
		}
		size -= int64(m)
	}
	if cut {
		panic(http.ErrAbortHandler)
	}
	return nil
}

func (s *Server) putFile(w http.ResponseWriter, r *http.Request) error {
	id, name, err := s.filePath(r)
	if err != nil {
		return err
	}
	mode, err := strconv.ParseUint(r.URL.Query().Get("mode"), 8, 12)
	if r.URL.Query().Get("mode") == "" {
		mode, err = 0o644, nil
	}
	if err != nil {
		return invalid("mode: must be octal")
	}
	if strings.HasPrefix(name, "/discard/") {
		n, err := io.Copy(io.Discard, r.Body)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.discarded += n
		if err != nil {
			return invalid("body: " + err.Error())
		}
		return reply(w, 200, client.FileEntry{Path: name, Size: n})
	}
	s.mu.Lock()
	dir := s.isDir(id, name)
	s.mu.Unlock()
	if dir {
		return invalid("path: " + name + " is a directory")
	}
	data, err := io.ReadAll(r.Body)
	if err != nil {
		return invalid("body: " + err.Error())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[id+" "+name] = &file{kind: client.FileTypeFile, data: data, mode: uint32(mode)}
	return reply(w, 200, s.entry(id, name))
}

func (s *Server) deleteFile(w http.ResponseWriter, r *http.Request) error {
	id, name, err := s.filePath(r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files[id+" "+name] == nil && !s.isDir(id, name) {
		return notFound("there is no file " + name)
	}
	for k := range s.files {
		if k == id+" "+name || strings.HasPrefix(k, id+" "+name+"/") {
			delete(s.files, k)
		}
	}
	w.WriteHeader(204)
	return nil
}

// entry describes a file; the caller holds mu.
func (s *Server) entry(id, name string) client.FileEntry {
	e := client.FileEntry{Name: path.Base(name), Path: name, Type: client.FileTypeDir, Mode: 0o755, ModifiedAt: Epoch}
	if f := s.files[id+" "+name]; f != nil {
		e.Type, e.Mode, e.Size = f.kind, f.mode, int64(len(f.data))
		if f.kind == client.FileTypeSymlink {
			e.SymlinkTarget = f.target
			if s.isDir(id, f.target) {
				e.Type = client.FileTypeDir
			} else if to := s.files[id+" "+f.target]; to != nil {
				e.Type, e.Mode = to.kind, to.mode
			}
		}
	}
	return e
}

func (s *Server) listFiles(w http.ResponseWriter, r *http.Request) error {
	id, name, err := s.filePath(r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isDir(id, name) {
		if s.files[id+" "+name] != nil {
			return invalid("path: " + name + " is not a directory")
		}
		return notFound("there is no directory " + name)
	}
	out := struct {
		Entries []client.FileEntry `json:"entries"`
	}{Entries: []client.FileEntry{}}
	below := id + " " + strings.TrimSuffix(name, "/") + "/"
	var names []string
	for k := range s.files {
		rest, ok := strings.CutPrefix(k, below)
		if !ok {
			continue
		}
		if !strings.HasPrefix(rest, "..") {
			rest, _, _ = strings.Cut(rest, "/")
		}
		if !slices.Contains(names, rest) {
			names = append(names, rest)
		}
	}
	slices.Sort(names)
	for _, n := range names {
		e := s.entry(id, strings.TrimSuffix(name, "/")+"/"+n)
		e.Name = n
		out.Entries = append(out.Entries, e)
	}
	return reply(w, 200, out)
}

func (s *Server) mkdir(w http.ResponseWriter, r *http.Request) error {
	id, name, err := s.filePath(r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.files[id+" "+name]; f != nil && f.kind != client.FileTypeDir {
		return &client.Error{Status: 409, Code: client.CodeConflict, Message: name + " is a file"}
	}
	s.files[id+" "+name] = &file{kind: client.FileTypeDir, mode: 0o755}
	return reply(w, 201, s.entry(id, name))
}
