package store_test

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/store"
	"git.omukk.dev/wrenn/sandbox/internal/templatebuild"
)

func TestBuilds(t *testing.T) {
	checkBuilds(t, openAt(t, filepath.Join(t.TempDir(), "db")))
}

// checkBuilds is run on SQLite here, and on whatever database a caller has.
func checkBuilds(t *testing.T, db *store.DB) {
	ctx, at := t.Context(), time.UnixMicro(1e15).UTC()
	is := func(err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Fatalf("error %v; want %v", err, want)
		}
	}
	one := templatebuild.Build{ID: "1", Template: "web", Status: templatebuild.Waiting, Tags: []string{"default", "v1"}, Snapshot: "web.1", VCPUs: 2, MemoryMB: 512, CreatedAt: at}
	two := templatebuild.Build{ID: "2", Template: "web", Status: templatebuild.Waiting, Tags: []string{"default"}, Snapshot: "web.2", CreatedAt: at.Add(time.Second)}
	is(db.CreateBuild(ctx, one), nil)
	is(db.CreateBuild(ctx, one), control.ErrExists)
	is(db.CreateBuild(ctx, two), nil)
	got, err := db.GetBuild(ctx, "web", "1")
	is(err, nil)
	want := one
	want.Log = []templatebuild.Entry{}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("round trip (-want +got):\n%s", d)
	}
	_, err = db.GetBuild(ctx, "other", "1")
	is(err, control.ErrNotFound)

	is(db.StartBuild(ctx, "web", "1"), nil)
	is(db.StartBuild(ctx, "web", "1"), control.ErrStale)
	is(db.StartBuild(ctx, "web", "2"), control.ErrExists) // one of a name at a time
	is(db.StartBuild(ctx, "web", "3"), control.ErrStale)
	is(db.PutTags(ctx, "web", "1", []string{"x"}, at), control.ErrNotFound)
	one.Status, one.EndedAt, one.Log = templatebuild.Ready, at, []templatebuild.Entry{{Time: at, Level: "info", Message: "m", Step: "1"}}
	is(db.FinishBuild(ctx, one), nil)
	is(db.FinishBuild(ctx, one), control.ErrStale)
	got, err = db.GetBuild(ctx, "web", "1")
	is(err, nil)
	if d := cmp.Diff(one, got); d != "" {
		t.Errorf("ended (-want +got):\n%s", d)
	}
	for tag, want := range map[string]string{"default": "web.1", "v1": "web.1", "latest": "web.1"} {
		if got, err := db.ResolveTemplate(ctx, "web", tag); got != want || err != nil {
			t.Errorf("%s is %q, %v; want %q", tag, got, err, want)
		}
	}
	_, err = db.ResolveTemplate(ctx, "web", "v2")
	is(err, control.ErrNotFound)

	// A failed build moves no tag; the next ready one does.
	is(db.StartBuild(ctx, "web", "2"), nil)
	failed := two
	failed.Status, failed.Reason, failed.Step = templatebuild.Failed, "r", "2"
	is(db.FinishBuild(ctx, failed), nil)
	if got, _ := db.ResolveTemplate(ctx, "web", "default"); got != "web.1" {
		t.Errorf("after a failed build the name is %q", got)
	}
	three := templatebuild.Build{ID: "3", Template: "web", Status: templatebuild.Waiting, Tags: []string{"default"}, Snapshot: "web.3", CreatedAt: at.Add(2 * time.Second)}
	is(db.CreateBuild(ctx, three), nil)
	is(db.StartBuild(ctx, "web", "3"), nil)
	three.Status = templatebuild.Ready
	is(db.FinishBuild(ctx, three), nil)
	tags, err := db.ListTags(ctx, "web")
	is(err, nil)
	if len(tags) != 2 || tags[0].BuildID != "3" || tags[1].BuildID != "1" {
		t.Errorf("tags %+v", tags)
	}
	is(db.PutTags(ctx, "web", "3", []string{"v1", "v3"}, at), nil)
	is(db.DeleteTags(ctx, "web", []string{"v3", "none"}), nil)
	all, err := db.ListBuilds(ctx, "web")
	is(err, nil)
	if len(all) != 3 || all[0].ID != "3" || all[2].ID != "1" {
		t.Errorf("builds %+v", all)
	}
	is(db.DeleteBuild(ctx, "web", "3"), nil)
	is(db.DeleteBuild(ctx, "web", "3"), control.ErrNotFound)
	if tags, err := db.ListTags(ctx, "web"); err != nil || len(tags) != 0 {
		t.Errorf("tags of a deleted build: %+v, %v", tags, err)
	}
}
