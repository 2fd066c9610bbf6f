package firecracker

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
)

// fake answers as Firecracker 1.12 does, as far as the tests ask.
type fake struct {
	socket, version string
	config          struct {
		VCPUs    int  `json:"vcpu_count"`
		MemoryMB int  `json:"mem_size_mib"`
		SMT      bool `json:"smt"`
		Track    bool `json:"track_dirty_pages"`
	}
}

func newFake(t *testing.T, version string) *fake {
	t.Helper()
	f := &fake{socket: filepath.Join(t.TempDir(), "fc.sock"), version: version}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: f}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return f
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer, err := f.answer(r)
	switch {
	case err != nil:
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(map[string]string{"fault_message": err.Error()})
	case answer != nil:
		_ = json.NewEncoder(w).Encode(answer)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

const tooEarly = "The requested operation is not supported before starting the microVM."

func (f *fake) answer(r *http.Request) (any, error) {
	switch r.Method + " " + r.URL.Path {
	case "GET /version":
		return map[string]string{"firecracker_version": f.version}, nil
	case "GET /":
		return map[string]string{"state": "Not started"}, nil
	case "GET /machine-config":
		return f.config, nil
	case "PUT /machine-config":
		c := f.config
		if err := decode(r, &c); err != nil {
			return nil, err
		}
		if c.VCPUs < 1 || c.VCPUs > 32 {
			return nil, fmt.Errorf("The vCPU number is invalid!")
		}
		f.config = c
		return nil, nil
	case "PUT /boot-source":
		return nil, decodeExisting(r, "kernel_image_path")
	case "PUT /drives/rootfs":
		return nil, decodeExisting(r, "path_on_host")
	case "PUT /network-interfaces/eth0":
		var n map[string]string
		if err := decode(r, &n); err != nil {
			return nil, err
		}
		_, err := net.ParseMAC(n["guest_mac"])
		return nil, err
	case "PUT /entropy":
		return nil, nil
	case "PUT /actions":
		return nil, fmt.Errorf("Cannot start microvm without kernel configuration.")
	case "PATCH /vm", "PUT /snapshot/create":
		return nil, errors.New(tooEarly)
	case "PUT /snapshot/load":
		var l struct {
			Snapshot string            `json:"snapshot_path"`
			Diff     bool              `json:"enable_diff_snapshots"`
			Resume   bool              `json:"resume_vm"`
			Backend  map[string]string `json:"mem_backend"`
		}
		if err := decode(r, &l); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("Load snapshot error")
	}
	return nil, fmt.Errorf("Invalid request method and/or path: %s %s.", r.Method, r.URL.Path)
}

func decode(r *http.Request, into any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("An error occurred when deserializing the json body of a request: %s.", bytes.ReplaceAll([]byte(err.Error()), []byte("json: "), nil))
	}
	return nil
}

func decodeExisting(r *http.Request, field string) error {
	var o map[string]any
	if err := decode(r, &o); err != nil {
		return err
	}
	path, _ := o[field].(string)
	_, err := os.Stat(path)
	return err
}
