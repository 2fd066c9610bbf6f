// Package clienttest has a server that behaves like Wrenn's API and runs no
// virtual machine: for tests of package client, of the command line, and of
// programs that use them. Only tests may import it.
//
// Commands are imitations (see Server.exec); files are kept in memory, except
// that reading /big/N gives N bytes and writing /discard/… keeps only a count,
// so that transfers larger than memory can be tested.
package clienttest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
)

// Key is the API key that the server knows.
const Key = "wrn_test"

// MaxForks is how many of the sandboxes of one fork the server can start.
const MaxForks = 4

// Epoch is when everything in the server was created.
var Epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// Server is the imitation. Its fields may be set before it is used.
type Server struct {
	*httptest.Server
	// PageSize is the number of items in a page of a list.
	PageSize int
	// Fail, if it returns an error, makes a request fail with it.
	Fail func(*http.Request) *client.Error

	mu        sync.Mutex
	next      int
	sandboxes []client.Sandbox // oldest first
	snapshots []client.Snapshot
	files     map[string]*file // by sandbox ID, a space, and path
	log       []string
	discarded int64
	change    chan struct{} // closed and replaced when log grows
}

// New starts a server with the template base.
func New() *Server {
	s := &Server{PageSize: 100, files: map[string]*file{}, change: make(chan struct{})}
	s.snapshots = []client.Snapshot{{Name: "base", Type: client.SnapshotTypeBase, SizeBytes: 700 << 20, CreatedAt: Epoch}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	s.routes(mux)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.record(r.Method + " " + r.URL.RequestURI())
		if s.Fail != nil {
			if e := s.Fail(r); e != nil {
				writeError(w, e)
				return
			}
		}
		if r.URL.Path != "/healthz" && r.Header.Get("X-API-Key") != Key {
			writeError(w, &client.Error{Status: 401, Code: client.CodeUnauthorized, Message: "the API key is missing or not known"})
			return
		}
		mux.ServeHTTP(w, r)
	}))
	return s
}

func (s *Server) routes(mux *http.ServeMux) {
	handle := func(pattern string, h func(http.ResponseWriter, *http.Request) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := h(w, r); err != nil {
				var e *client.Error
				if !errors.As(err, &e) {
					e = &client.Error{Status: 500, Code: client.CodeInternal, Message: err.Error()}
				}
				writeError(w, e)
			}
		})
	}
	handle("POST /v1/sandboxes", s.create)
	handle("GET /v1/sandboxes", s.list)
	handle("GET /v1/sandboxes/{id}", s.get)
	handle("DELETE /v1/sandboxes/{id}", s.remove)
	handle("POST /v1/sandboxes/{id}/pause", s.move(client.StatusRunning, client.StatusPaused))
	handle("POST /v1/sandboxes/{id}/resume", s.move(client.StatusPaused, client.StatusRunning))
	handle("POST /v1/sandboxes/{id}/timeout", s.timeout)
	handle("POST /v1/sandboxes/{id}/fork", s.fork)
	handle("GET /v1/sandboxes/{id}/metrics", s.metrics)
	handle("POST /v1/sandboxes/{id}/exec", s.execCall)
	handle("GET /v1/sandboxes/{id}/exec/stream", s.execStream)
	handle("GET /v1/sandboxes/{id}/pty", s.pty)
	handle("GET /v1/sandboxes/{id}/files", s.getFile)
	handle("PUT /v1/sandboxes/{id}/files", s.putFile)
	handle("DELETE /v1/sandboxes/{id}/files", s.deleteFile)
	handle("GET /v1/sandboxes/{id}/files/list", s.listFiles)
	handle("POST /v1/sandboxes/{id}/files/mkdir", s.mkdir)
	handle("POST /v1/snapshots", s.snapshot)
	handle("GET /v1/snapshots", s.listSnapshots)
	handle("GET /v1/snapshots/{name}", s.getSnapshot)
	handle("DELETE /v1/snapshots/{name}", s.deleteSnapshot)
}

// record notes something that happened, for Log and Wait.
func (s *Server) record(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, what)
	close(s.change)
	s.change = make(chan struct{})
}

// Log returns what happened: requests as "METHOD path?query", and messages
// that came in streams as "type details".
func (s *Server) Log() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.log)
}

// Wait waits until something happened that begins with prefix, at most limit,
// and tells whether it did.
func (s *Server) Wait(prefix string, limit time.Duration) bool {
	t := time.NewTimer(limit)
	defer t.Stop()
	for {
		s.mu.Lock()
		found := slices.ContainsFunc(s.log, func(l string) bool { return strings.HasPrefix(l, prefix) })
		change := s.change
		s.mu.Unlock()
		if found {
			return true
		}
		select {
		case <-change:
		case <-t.C:
			return false
		}
	}
}

// Add puts a sandbox there as it is; an empty ID or Status gets one.
func (s *Server) Add(sb client.Sandbox) client.Sandbox {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.add(sb)
}

func (s *Server) add(sb client.Sandbox) client.Sandbox {
	s.next++
	if sb.ID == "" {
		sb.ID = fmt.Sprintf("sb%d", s.next)
	}
	if sb.Status == "" {
		sb.Status = client.StatusRunning
	}
	if sb.Template == "" {
		sb.Template = "base"
	}
	if sb.VCPUs == 0 {
		sb.VCPUs, sb.MemoryMB = 1, 512
	}
	if sb.Metadata == nil {
		sb.Metadata = map[string]string{}
	}
	sb.CreatedAt, sb.StartedAt = Epoch, Epoch.Add(time.Second)
	if sb.TimeoutSec > 0 {
		sb.ExpiresAt = sb.StartedAt.Add(time.Duration(sb.TimeoutSec) * time.Second)
	}
	s.sandboxes = append(s.sandboxes, sb)
	return sb
}

// find returns a sandbox of the request's ID; the caller holds mu.
func (s *Server) find(r *http.Request) (*client.Sandbox, error) {
	for i := range s.sandboxes {
		if s.sandboxes[i].ID == r.PathValue("id") {
			return &s.sandboxes[i], nil
		}
	}
	return nil, notFound("there is no sandbox " + r.PathValue("id"))
}

func (s *Server) running(r *http.Request) (client.Sandbox, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sb, err := s.find(r)
	if err != nil {
		return client.Sandbox{}, err
	}
	if sb.Status != client.StatusRunning {
		return client.Sandbox{}, &client.Error{Status: 409, Code: client.CodeInvalidState, Message: "the sandbox is " + sb.Status + "; it must be running"}
	}
	return *sb, nil
}

func (s *Server) create(w http.ResponseWriter, r *http.Request) error {
	var in client.CreateSandboxRequest
	if err := decode(r, &in); err != nil {
		return err
	}
	if in.Template == "" {
		in.Template = "base"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.snapshots, func(t client.Snapshot) bool { return t.Name == in.Template })
	if i < 0 {
		return notFound("there is no template " + in.Template)
	}
	if fixed := s.snapshots[i].MemoryMB; fixed != 0 && in.MemoryMB != 0 && in.MemoryMB != fixed {
		return invalid(fmt.Sprintf("memory_mb: the snapshot fixes it to %d", fixed))
	}
	return reply(w, 201, s.add(client.Sandbox{Template: in.Template, VCPUs: in.VCPUs, MemoryMB: in.MemoryMB,
		TimeoutSec: in.TimeoutSec, AutoPause: in.AutoPause, Metadata: in.Metadata}))
}

func (s *Server) list(w http.ResponseWriter, r *http.Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var match []client.Sandbox
	for _, sb := range s.sandboxes {
		if st := r.URL.Query().Get("status"); st != "" && !slices.Contains(strings.Split(st, ","), sb.Status) {
			continue
		}
		ok := true
		for k, v := range r.URL.Query() {
			if key, is := strings.CutPrefix(k, "metadata."); is && sb.Metadata[key] != v[0] {
				ok = false
			}
		}
		if ok {
			match = append(match, sb)
		}
	}
	page, next, err := paginate(s.PageSize, r, match)
	if err != nil {
		return err
	}
	return reply(w, 200, client.SandboxPage{Sandboxes: page, NextCursor: next})
}

func (s *Server) get(w http.ResponseWriter, r *http.Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	sb, err := s.find(r)
	if err != nil {
		return err
	}
	return reply(w, 200, sb)
}

func (s *Server) remove(w http.ResponseWriter, r *http.Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.find(r); err != nil {
		return err
	}
	s.sandboxes = slices.DeleteFunc(s.sandboxes, func(sb client.Sandbox) bool { return sb.ID == r.PathValue("id") })
	w.WriteHeader(204)
	return nil
}

func (s *Server) move(from, to string) func(http.ResponseWriter, *http.Request) error {
	return func(w http.ResponseWriter, r *http.Request) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		sb, err := s.find(r)
		if err != nil {
			return err
		}
		if sb.Status != from {
			return &client.Error{Status: 409, Code: client.CodeInvalidState, Message: "the sandbox is " + sb.Status + "; it must be " + from}
		}
		sb.Status = to
		return reply(w, 200, sb)
	}
}

func (s *Server) timeout(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		TimeoutSec *int `json:"timeout_sec"`
	}
	if err := decode(r, &in); err != nil {
		return err
	}
	if in.TimeoutSec == nil {
		return invalid("timeout_sec: is missing")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sb, err := s.find(r)
	if err != nil {
		return err
	}
	sb.TimeoutSec, sb.ExpiresAt = *in.TimeoutSec, time.Time{}
	if sb.TimeoutSec > 0 {
		sb.ExpiresAt = Epoch.Add(time.Duration(sb.TimeoutSec) * time.Second)
	}
	return reply(w, 200, sb)
}

func (s *Server) fork(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		Count int `json:"count"`
	}
	if err := decode(r, &in); err != nil {
		return err
	}
	src, err := s.running(r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := struct {
		Sandboxes []client.Sandbox `json:"sandboxes"`
		Errors    []map[string]any `json:"errors,omitempty"`
	}{}
	for i := range in.Count {
		if i >= MaxForks {
			out.Errors = append(out.Errors, map[string]any{"index": i, "code": client.CodeHostUnavailable, "message": "there is no memory left"})
			continue
		}
		out.Sandboxes = append(out.Sandboxes, s.add(client.Sandbox{Template: src.Template, Metadata: src.Metadata}))
	}
	return reply(w, 201, out)
}

func (s *Server) metrics(w http.ResponseWriter, r *http.Request) error {
	if _, err := s.running(r); err != nil {
		return err
	}
	return reply(w, 200, client.Metrics{At: Epoch, CPUCount: 1, CPUUsedPct: 12.5, MemTotal: 512 << 20, Faults: 300})
}

func paginate[T any](size int, r *http.Request, all []T) (page []T, next string, err error) {
	at := 0
	if c := r.URL.Query().Get("cursor"); c != "" {
		if at, err = strconv.Atoi(c); err != nil || at < 0 || at > len(all) {
			return nil, "", invalid("cursor: not one of ours")
		}
	}
	if l := r.URL.Query().Get("limit"); l != "" {
		if size, err = strconv.Atoi(l); err != nil || size < 1 {
			return nil, "", invalid("limit: must be a number from 1")
		}
	}
	end := min(at+size, len(all))
	if end < len(all) {
		next = strconv.Itoa(end)
	}
	return append([]T{}, all[at:end]...), next, nil
}

func decode(r *http.Request, v any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return invalid("body: " + err.Error())
	}
	return nil
}

func reply(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	return json.NewEncoder(w).Encode(v)
}

func writeError(w http.ResponseWriter, e *client.Error) {
	_ = reply(w, e.Status, map[string]any{"error": map[string]string{"code": e.Code, "message": e.Message}})
}

func notFound(msg string) error {
	return &client.Error{Status: 404, Code: client.CodeNotFound, Message: msg}
}

func invalid(msg string) error {
	return &client.Error{Status: 400, Code: client.CodeInvalidRequest, Message: msg}
}
