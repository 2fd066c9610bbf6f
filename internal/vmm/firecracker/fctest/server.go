// Package fctest is a Firecracker without virtual machines: a server that
// answers as Firecracker 1.12 does, as far as our driver asks, and a program
// that runs it in Firecracker's place and fails where it is told to. The
// driver's tests have the same conversation with it and with the real one.
//
// Only tests import it.
package fctest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
)

// Server answers one machine's API.
type Server struct {
	// Version is what it says it is.
	Version string
	// Before is called before each call is carried out, with "PUT /actions"
	// and its body; an error is the answer. Nil: none does.
	Before func(call string, body []byte) error

	mu     sync.Mutex
	config config
	kernel bool
	state  string // empty: not started
	memory []byte // of a machine that was loaded from a server of pages
}

type config struct {
	VCPUs    int  `json:"vcpu_count"`
	MemoryMB int  `json:"mem_size_mib"`
	SMT      bool `json:"smt"`
	Track    bool `json:"track_dirty_pages"`
}

const (
	running = "Running"
	paused  = "Paused"
)

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body bytes.Buffer
	if _, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, 1<<20)); err != nil {
		return
	}
	call := r.Method + " " + r.URL.Path
	var answer any
	var err error
	if s.Before != nil {
		err = s.Before(call, body.Bytes())
	}
	if err == nil {
		s.mu.Lock()
		answer, err = s.answer(call, body.Bytes())
		s.mu.Unlock()
	}
	switch {
	case err == errDone:
		w.WriteHeader(http.StatusNoContent)
	case err != nil:
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(map[string]string{"fault_message": err.Error()})
	case answer != nil:
		_ = json.NewEncoder(w).Encode(answer)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

var (
	errDone  = errors.New("done") // of Before: it is carried out already
	errEarly = errors.New("The requested operation is not supported before starting the microVM.")
	errLate  = errors.New("The requested operation is not supported after starting the microVM.")
)

func (s *Server) answer(call string, body []byte) (any, error) {
	switch call {
	case "GET /version":
		return map[string]string{"firecracker_version": s.Version}, nil
	case "GET /":
		state := s.state
		if state == "" {
			state = "Not started"
		}
		return map[string]string{"state": state}, nil
	case "GET /machine-config":
		return s.config, nil
	case "PATCH /vm":
		return nil, s.change(body)
	case "PUT /snapshot/create":
		return nil, s.create(body)
	}
	if s.state != "" {
		return nil, errLate
	}
	switch call {
	case "PUT /machine-config":
		return nil, s.configure(body)
	case "PUT /boot-source":
		err := decodeExisting(body, "kernel_image_path")
		s.kernel = s.kernel || err == nil
		return nil, err
	case "PUT /drives/rootfs":
		return nil, decodeExisting(body, "path_on_host")
	case "PUT /network-interfaces/eth0":
		var n map[string]string
		if err := decode(body, &n); err != nil {
			return nil, err
		}
		_, err := net.ParseMAC(n["guest_mac"])
		return nil, err
	case "PUT /entropy":
		return nil, nil
	case "PUT /actions":
		if !s.kernel {
			return nil, errors.New("Cannot start microvm without kernel configuration.")
		}
		s.state = running
		return nil, nil
	case "PUT /snapshot/load":
		return nil, s.load(body)
	}
	return nil, fmt.Errorf("Invalid request method and/or path: %s.", call)
}

func (s *Server) configure(body []byte) error {
	c := s.config
	if err := decode(body, &c); err != nil {
		return err
	}
	if c.VCPUs < 1 || c.VCPUs > 32 {
		return errors.New("The vCPU number is invalid!")
	}
	s.config = c
	return nil
}

func (s *Server) change(body []byte) error {
	var c struct {
		State string `json:"state"`
	}
	if err := decode(body, &c); err != nil {
		return err
	}
	next, ok := map[string]string{"Paused": paused, "Resumed": running}[c.State]
	switch {
	case !ok:
		return fmt.Errorf("unknown variant `%s`", c.State)
	case s.state == "":
		return errEarly
	}
	s.state = next
	if next == running && s.memory != nil && s.memory[touched] == 0 {
		return errors.New("the memory is lost")
	}
	return nil
}

// saved is the fake's device state.
type saved struct {
	Fake   bool
	Config config
}

// create writes what the driver reads back: the state, and memory in which one
// page has changed.
func (s *Server) create(body []byte) error {
	var c struct {
		Type   string `json:"snapshot_type"`
		State  string `json:"snapshot_path"`
		Memory string `json:"mem_file_path"`
	}
	if err := decode(body, &c); err != nil {
		return err
	}
	switch s.state {
	case "":
		return errEarly
	case running:
		return errors.New("Create snapshot error: the microVM is running")
	}
	b, err := json.Marshal(saved{true, s.config})
	if err == nil {
		err = os.WriteFile(c.State, b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("Create snapshot error: %w", err)
	}
	f, err := os.Create(c.Memory)
	if err != nil {
		return fmt.Errorf("Create snapshot error: %w", err)
	}
	_, err = f.WriteAt(bytes.Repeat([]byte(c.Type), 1024), touched)
	return errors.Join(err, f.Truncate(int64(s.config.MemoryMB)<<20), f.Close())
}

func (s *Server) load(body []byte) error {
	var l struct {
		Snapshot string `json:"snapshot_path"`
		Diff     bool   `json:"enable_diff_snapshots"`
		Resume   bool   `json:"resume_vm"`
		Backend  struct {
			Type string `json:"backend_type"`
			Path string `json:"backend_path"`
		} `json:"mem_backend"`
	}
	if err := decode(body, &l); err != nil {
		return err
	}
	if t := l.Backend.Type; t != "File" && t != "Uffd" {
		return fmt.Errorf("An error occurred when deserializing the json body of a request: unknown variant `%s`, expected `File` or `Uffd`.", t)
	}
	b, err := os.ReadFile(l.Snapshot)
	var state saved
	if err == nil {
		err = json.Unmarshal(b, &state)
	}
	if err != nil || !state.Fake {
		return fmt.Errorf("Load snapshot error: %v", err)
	}
	if st, err := os.Stat(l.Backend.Path); l.Backend.Type == "File" && (err != nil || st.Size() != int64(state.Config.MemoryMB)<<20) {
		return fmt.Errorf("Load snapshot error: the memory file: %v", err)
	}
	if l.Backend.Type == "Uffd" {
		if s.memory, err = handOver(l.Backend.Path, state.Config.MemoryMB<<20); err != nil {
			return fmt.Errorf("Load snapshot error: handing the memory over: %w", err)
		}
	}
	s.config, s.state = state.Config, paused
	return nil
}

func decode(body []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("An error occurred when deserializing the json body of a request: %s.", bytes.ReplaceAll([]byte(err.Error()), []byte("json: "), nil))
	}
	return nil
}

func decodeExisting(body []byte, field string) error {
	var o map[string]any
	if err := decode(body, &o); err != nil {
		return err
	}
	path, _ := o[field].(string)
	_, err := os.Stat(path)
	return err
}
