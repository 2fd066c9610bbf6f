package mcpserver

import (
	"context"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"git.omukk.dev/wrenn/sandbox/client"
)

type snapshotInput struct {
	ID   string `json:"sandbox_id" jsonschema:"the sandbox to freeze, running or paused"`
	Name string `json:"name" jsonschema:"1 to 63 of a-z 0-9 . _ - beginning with a letter or digit; must be free"`
}

type snapshotsInput struct {
	Limit int `json:"limit,omitempty" jsonschema:"at most so many; default 50, greatest 200"`
}

type snapshotsOutput struct {
	Snapshots []client.Snapshot `json:"snapshots" jsonschema:"type base: a template to boot; type snapshot: a frozen sandbox"`
	More      bool              `json:"more"`
}

type deleteSnapshotInput struct {
	Name string `json:"name" jsonschema:"one of list_snapshots with type snapshot"`
}

type deletedOutput struct {
	Deleted string `json:"deleted"`
}

func (t *tools) addSnapshots(s *mcp.Server) {
	add(s, "snapshot_sandbox", adds,
		"Freeze a sandbox (files, memory, running processes) under a name. The sandbox goes on as before. "+
			"create_from_snapshot starts new sandboxes in this state.",
		func(ctx context.Context, in snapshotInput) (client.Snapshot, error) {
			sn, err := t.c.CreateSnapshot(ctx, in.ID, in.Name)
			if err != nil {
				return client.Snapshot{}, err
			}
			return *sn, nil
		})
	add(s, "list_snapshots", reads, "List what sandboxes can be created from: base templates and snapshots.", t.listSnapshots)
	add(s, "delete_snapshot", destroys,
		"Delete a snapshot. Sandboxes made from it go on. This cannot be undone.",
		func(ctx context.Context, in deleteSnapshotInput) (deletedOutput, error) {
			return deletedOutput{in.Name}, t.c.DeleteSnapshot(ctx, in.Name)
		})
}

func (t *tools) listSnapshots(ctx context.Context, in snapshotsInput) (snapshotsOutput, error) {
	limit, err := listLimit(in.Limit)
	if err != nil {
		return snapshotsOutput{}, err
	}
	out := snapshotsOutput{Snapshots: []client.Snapshot{}}
	for sn, err := range t.c.Snapshots(ctx, client.ListSnapshotsOptions{Limit: limit + 1}) {
		if err != nil {
			return snapshotsOutput{}, err
		}
		if out.More = len(out.Snapshots) == limit; out.More {
			break
		}
		out.Snapshots = append(out.Snapshots, sn)
	}
	return out, nil
}
