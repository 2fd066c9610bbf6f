package mcpserver

import (
	"context"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"git.omukk.dev/wrenn/sandbox/client"
)

const (
	// defaultTimeout limits the run of a sandbox whose creator names no limit:
	// agents forget.
	defaultTimeout = 3600
	// defaultList and maxList bound a list.
	defaultList, maxList = 50, 200
)

// sandbox is what a model needs to know of one.
type sandbox struct {
	ID        string            `json:"sandbox_id"`
	Template  string            `json:"template"`
	Status    string            `json:"status" jsonschema:"running, paused, or a state between; error with the reason in error"`
	VCPUs     int               `json:"vcpus"`
	MemoryMB  int               `json:"memory_mb"`
	Metadata  map[string]string `json:"metadata,omitempty"`
	AutoPause bool              `json:"auto_pause" jsonschema:"whether the time limit pauses it (true) or destroys it (false)"`
	CreatedAt time.Time         `json:"created_at,omitzero"`
	ExpiresAt time.Time         `json:"expires_at,omitzero" jsonschema:"when the time limit is reached; absent without one"`
	Error     string            `json:"error,omitempty"`
}

func toSandbox(s *client.Sandbox) sandbox {
	return sandbox{ID: s.ID, Template: s.Template, Status: s.Status, VCPUs: s.VCPUs, MemoryMB: s.MemoryMB,
		Metadata: s.Metadata, AutoPause: s.AutoPause, CreatedAt: s.CreatedAt, ExpiresAt: s.ExpiresAt, Error: s.Error}
}

// sandboxOr passes a client's answer on.
func sandboxOr(s *client.Sandbox, err error) (sandbox, error) {
	if err != nil {
		return sandbox{}, err
	}
	return toSandbox(s), nil
}

// life is what both ways of creating have in common.
type life struct {
	TimeoutSec *int              `json:"timeout_sec,omitempty" jsonschema:"how long it may run, in seconds; default 3600; 0 is no limit"`
	AutoPause  *bool             `json:"auto_pause,omitempty" jsonschema:"true (default): pause it at the time limit, so that nothing is lost; false: destroy it"`
	Envs       map[string]string `json:"envs,omitempty" jsonschema:"environment variables of every process in it"`
	Metadata   map[string]string `json:"metadata,omitempty" jsonschema:"labels to find it again with list_sandboxes"`
}

func (l life) request(template string) client.CreateSandboxRequest {
	req := client.CreateSandboxRequest{Template: template, TimeoutSec: defaultTimeout, AutoPause: true, Envs: l.Envs, Metadata: l.Metadata}
	if l.TimeoutSec != nil {
		req.TimeoutSec = *l.TimeoutSec
	}
	if l.AutoPause != nil {
		req.AutoPause = *l.AutoPause
	}
	return req
}

type createInput struct {
	Template string `json:"template,omitempty" jsonschema:"name of the base template; default base (Debian with Python, git and curl)"`
	VCPUs    int    `json:"vcpus,omitempty" jsonschema:"number of CPUs; left out: the server's default"`
	MemoryMB int    `json:"memory_mb,omitempty" jsonschema:"memory in MiB; left out: the server's default"`
	life
}

type fromSnapshotInput struct {
	Snapshot string `json:"snapshot" jsonschema:"name that snapshot_sandbox gave, or one of list_snapshots"`
	life
}

type idInput struct {
	ID string `json:"sandbox_id" jsonschema:"as create_sandbox or list_sandboxes gave it"`
}

type timeoutInput struct {
	ID         string `json:"sandbox_id" jsonschema:"as create_sandbox or list_sandboxes gave it"`
	TimeoutSec int    `json:"timeout_sec" jsonschema:"seconds from now; 0 takes the limit away"`
}

type listInput struct {
	Status   []string          `json:"status,omitempty" jsonschema:"only these: running, paused, error, …; default all that exist"`
	Metadata map[string]string `json:"metadata,omitempty" jsonschema:"only those with all of these labels"`
	Limit    int               `json:"limit,omitempty" jsonschema:"at most so many, newest first; default 50, greatest 200"`
}

type listOutput struct {
	Sandboxes []sandbox `json:"sandboxes"`
	More      bool      `json:"more" jsonschema:"whether there are more than these; narrow it by status or metadata"`
}

type destroyOutput struct {
	Destroyed string `json:"destroyed"`
}

func (t *tools) addSandboxes(s *mcp.Server) {
	add(s, "create_sandbox", adds,
		"Create a sandbox: a small virtual machine of its own, with a disk, root rights and the internet. "+
			"Answers when it takes commands. Use the sandbox_id in the other tools.",
		func(ctx context.Context, in createInput) (sandbox, error) {
			req := in.request(in.Template)
			req.VCPUs, req.MemoryMB = in.VCPUs, in.MemoryMB
			return sandboxOr(t.c.CreateSandbox(ctx, req))
		})
	add(s, "create_from_snapshot", adds,
		"Create a sandbox that starts in exactly the state that a snapshot froze: files, memory and running processes. "+
			"The snapshot fixes its CPUs and memory. The snapshot can be used any number of times.",
		func(ctx context.Context, in fromSnapshotInput) (sandbox, error) {
			return sandboxOr(t.c.CreateSandbox(ctx, in.request(in.Snapshot)))
		})
	add(s, "list_sandboxes", reads, "List the sandboxes, newest first.", t.list)
	add(s, "get_sandbox", reads, "Tell the state of a sandbox.",
		func(ctx context.Context, in idInput) (sandbox, error) { return sandboxOr(t.c.GetSandbox(ctx, in.ID)) })
	add(s, "set_timeout", adds, "Give a sandbox a new time limit, counted from now.",
		func(ctx context.Context, in timeoutInput) (sandbox, error) {
			return sandboxOr(t.c.SetTimeout(ctx, in.ID, time.Duration(in.TimeoutSec)*time.Second))
		})
	add(s, "pause_sandbox", adds,
		"Write a sandbox's whole state to disk and free its memory and CPU. Nothing is lost; resume_sandbox brings it back.",
		func(ctx context.Context, in idInput) (sandbox, error) { return sandboxOr(t.c.PauseSandbox(ctx, in.ID)) })
	add(s, "resume_sandbox", adds,
		"Bring a paused sandbox back, with every process still running. Its time limit begins anew.",
		func(ctx context.Context, in idInput) (sandbox, error) {
			return sandboxOr(t.c.ResumeSandbox(ctx, in.ID))
		})
	add(s, "destroy_sandbox", destroys,
		"Destroy a sandbox in any state, with all its files and processes. This cannot be undone; "+
			"snapshots made of it stay.",
		func(ctx context.Context, in idInput) (destroyOutput, error) {
			return destroyOutput{in.ID}, t.c.DeleteSandbox(ctx, in.ID)
		})
}

func (t *tools) list(ctx context.Context, in listInput) (listOutput, error) {
	limit, err := listLimit(in.Limit)
	if err != nil {
		return listOutput{}, err
	}
	out := listOutput{Sandboxes: []sandbox{}}
	for sb, err := range t.c.Sandboxes(ctx, client.ListSandboxesOptions{Status: in.Status, Metadata: in.Metadata, Limit: limit + 1}) {
		if err != nil {
			return listOutput{}, err
		}
		if out.More = len(out.Sandboxes) == limit; out.More {
			break
		}
		out.Sandboxes = append(out.Sandboxes, toSandbox(&sb))
	}
	return out, nil
}

func listLimit(limit int) (int, error) {
	if limit == 0 {
		return defaultList, nil
	}
	if limit < 1 || limit > maxList {
		return 0, refuse("limit %d: must be from 1 to %d", limit, maxList)
	}
	return limit, nil
}
