package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// limits bound the waits for an answer. Saving writes all the memory that
// changed, and loading may fault pages in from a slow store.
type limits struct{ call, save time.Duration }

const (
	callLimit = 30 * time.Second
	saveLimit = 5 * time.Minute
	maxAnswer = 1 << 20
)

// api speaks to one Firecracker over its socket.
type api struct {
	path string
	// pid is who must answer: the socket lies where the jailed process can
	// replace it. 0: whoever does.
	pid  int
	lim  limits
	http *http.Client
	// known is the machine's state after the last call that changed it, empty
	// where that is not known. Whoever has the machine's turn uses it.
	known string
}

// The states of a machine, as Firecracker calls them.
const (
	stateRunning = "Running"
	statePaused  = "Paused"
)

func newAPI(path string, pid int, lim limits) *api {
	a := &api{path: path, pid: pid, lim: lim}
	a.http = &http.Client{Transport: &http.Transport{
		DialContext: a.dial, MaxIdleConns: 1, DisableCompression: true,
	}}
	return a
}

func (a *api) close() { a.http.CloseIdleConnections() }

func (a *api) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	addr, done, err := vmm.SockAddr(a.path)
	if err != nil {
		return nil, err
	}
	defer done()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", addr.Name)
	if err != nil {
		return nil, err
	}
	if err := a.checkPeer(c.(*net.UnixConn)); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (a *api) checkPeer(c *net.UnixConn) error {
	if a.pid == 0 {
		return nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return err
	}
	if int(cred.Pid) != a.pid {
		return fmt.Errorf("process %d answers on Firecracker's socket, not %d", cred.Pid, a.pid)
	}
	return nil
}

// call sends one request. body and answer may be nil.
func (a *api) call(ctx context.Context, limit time.Duration, method, path string, body, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := a.exchange(ctx, method, path, body, answer)
	if err != nil {
		return fmt.Errorf("firecracker %s %s: %w", method, path, err)
	}
	return nil
}

func (a *api) exchange(ctx context.Context, method, path string, body, answer any) error {
	var in io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		in = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://firecracker"+path, in)
	if err != nil {
		return err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := a.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("no answer: %w", ctx.Err())
		}
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%w: reading the answer: %w", errBroken, err)
	}
	if res.StatusCode >= 300 {
		var fault struct {
			Message string `json:"fault_message"`
		}
		if json.Unmarshal(b, &fault); fault.Message == "" {
			fault.Message = string(clip(b))
		}
		return faultError{res.StatusCode, fault.Message}
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(b, answer); err != nil {
		return fmt.Errorf("decoding the answer: %w", err)
	}
	return nil
}

// faultError is an answer that is an error.
type faultError struct {
	status  int
	message string
}

func (e faultError) Error() string { return fmt.Sprintf("status %d: %s", e.status, e.message) }

// Is tells a full disk, on which there is something to do, by Firecracker's
// words for it.
func (e faultError) Is(target error) bool {
	return target == unix.ENOSPC && strings.Contains(e.message, "No space left on device")
}

// errBroken: there is no connection, or not any more.
var errBroken = errors.New("the connection broke")

type object map[string]any

func (a *api) put(ctx context.Context, path string, body object) error {
	return a.call(ctx, a.lim.call, http.MethodPut, path, body, nil)
}

// version asks who is there: the first call of every conversation.
func (a *api) version(ctx context.Context) (version, error) {
	var v struct {
		Version string `json:"firecracker_version"`
	}
	if err := a.call(ctx, a.lim.call, http.MethodGet, "/version", nil, &v); err != nil {
		return version{}, err
	}
	got, err := parseVersion(numbers.FindSubmatch([]byte(v.Version)))
	if err != nil {
		return got, fmt.Errorf("firecracker GET /version: %w", err)
	}
	return got, got.check()
}

func (a *api) machineConfig(ctx context.Context, s vmm.Spec) error {
	return a.put(ctx, "/machine-config", object{
		"vcpu_count": s.VCPUs, "mem_size_mib": s.MemoryMB, "smt": false, "track_dirty_pages": true,
	})
}

// spec asks what machine this is.
func (a *api) spec(ctx context.Context) (s vmm.Spec, err error) {
	var c struct {
		VCPUs    int `json:"vcpu_count"`
		MemoryMB int `json:"mem_size_mib"`
	}
	err = a.call(ctx, a.lim.call, http.MethodGet, "/machine-config", nil, &c)
	return vmm.Spec{VCPUs: c.VCPUs, MemoryMB: c.MemoryMB}, err
}

func (a *api) bootSource(ctx context.Context, kernel, initrd, cmdline string) error {
	o := object{"kernel_image_path": kernel, "boot_args": cmdline}
	if initrd != "" {
		o["initrd_path"] = initrd
	}
	return a.put(ctx, "/boot-source", o)
}

func (a *api) drive(ctx context.Context, path string) error {
	return a.put(ctx, "/drives/rootfs", object{
		"drive_id": "rootfs", "path_on_host": path, "is_root_device": false, "is_read_only": false,
		"cache_type": "Writeback", // the guest's flushes reach the overlay
	})
}

func (a *api) network(ctx context.Context, tap, mac string) error {
	return a.put(ctx, "/network-interfaces/eth0", object{"iface_id": "eth0", "host_dev_name": tap, "guest_mac": mac})
}

func (a *api) entropy(ctx context.Context) error { return a.put(ctx, "/entropy", object{}) }

func (a *api) start(ctx context.Context) error {
	err := a.put(ctx, "/actions", object{"action_type": "InstanceStart"})
	if err == nil {
		a.known = stateRunning
	}
	return err
}

// state is "Not started", "Running" or "Paused".
func (a *api) state(ctx context.Context) (string, error) {
	var s struct {
		State string `json:"state"`
	}
	err := a.call(ctx, a.lim.call, http.MethodGet, "/", nil, &s)
	return s.State, err
}

// become pauses or resumes a machine that is not in that state yet. It asks for
// the state where that is not known from the last call.
func (a *api) become(ctx context.Context, state string) (err error) {
	if a.known == "" {
		if a.known, err = a.state(ctx); err != nil {
			return err
		}
	}
	if a.known == state {
		return nil
	}
	a.known = "" // a call without an answer may have taken effect
	verb := map[string]string{stateRunning: "Resumed", statePaused: "Paused"}[state]
	if err := a.call(ctx, a.lim.call, http.MethodPatch, "/vm", object{"state": verb}, nil); err != nil {
		return err
	}
	a.known = state
	return nil
}

func (a *api) save(ctx context.Context, kind, state, memory string) error {
	return a.call(ctx, a.lim.save, http.MethodPut, "/snapshot/create", object{
		"snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory,
	}, nil)
}

func (a *api) load(ctx context.Context, v version, state, backend, path string) error {
	err := a.call(ctx, a.lim.save, http.MethodPut, "/snapshot/load", object{
		"snapshot_path": state, v.dirtyField(): true, "resume_vm": false,
		"mem_backend": object{"backend_type": backend, "backend_path": path},
	}, nil)
	if err == nil {
		a.known = statePaused
	}
	return err
}

// await asks for the version as soon as there is a socket: it appears some
// milliseconds after the process, without an event. To look for it costs next to
// nothing, which matters while a process starts beside it.
func (a *api) await(ctx context.Context, ended <-chan struct{}) (version, error) {
	ctx, cancel := context.WithTimeout(ctx, a.lim.call)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	var st unix.Stat_t
	for {
		if unix.Lstat(a.path, &st) == nil {
			v, err := a.version(ctx)
			if err == nil || ctx.Err() == nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED) {
				return v, err
			}
		}
		select {
		case <-tick.C:
		case <-ended:
			return version{}, errors.New("firecracker ended before it took calls")
		case <-ctx.Done():
			return version{}, fmt.Errorf("firecracker does not answer: %w", ctx.Err())
		}
	}
}
