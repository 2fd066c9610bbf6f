// Package storetest is the conformance suite of control.Store: every
// implementation, on every database, passes Run.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// Run tests a store that open makes anew, empty, for each part.
func Run(t *testing.T, open func(*testing.T) control.Store) {
	parts := map[string]func(*testing.T, control.Store){
		"SandboxRoundTrip":      sandboxRoundTrip,
		"SandboxCompareAndSet":  compareAndSet,
		"OneWinner":             oneWinner,
		"TouchOnlyMovesForward": touch,
		"ListFilters":           listFilters,
		"ListPages":             listPages,
		"PruneAndCount":         pruneAndCount,
		"Templates":             templates,
		"APIKeys":               apiKeys,
		"Events":                events,
		"EventsAreBounded":      eventsAreBounded,
		"Waits":                 waits,
		"EventsAtOnce":          eventsAtOnce,
		"Answers":               answers,
		"EndedContext":          endedContext,
	}
	for name, part := range parts {
		t.Run(name, func(t *testing.T) { part(t, open(t)) })
	}
}

var base = time.Date(2030, 5, 6, 7, 8, 9, 123456000, time.UTC)

func sample(id string) control.Sandbox {
	return control.Sandbox{
		ID: id, Template: "base", Status: control.StatusPending, VCPUs: 2, MemoryMB: 512,
		Metadata:   map[string]string{"owner": "ann", "näme": "'; DROP TABLE sandboxes; --"},
		TimeoutSec: 60, AutoPause: true, CreatedAt: base, ChangedAt: base, Version: 1,
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Fatalf("error %v; want %v", err, target)
	}
}

func same(t *testing.T, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Fatalf("-want +got:\n%s", d)
	}
}

func sandboxRoundTrip(t *testing.T, s control.Store) {
	ctx := t.Context()
	must(t, s.Ping(ctx))
	must(t, s.CheckWritable(ctx))
	_, err := s.GetSandbox(ctx, "a1")
	want(t, err, control.ErrNotFound)
	sb := sample("a1")
	must(t, s.CreateSandbox(ctx, sb))
	want(t, s.CreateSandbox(ctx, sb), control.ErrExists)
	got, err := s.GetSandbox(ctx, "a1")
	must(t, err)
	same(t, got, sb)
	must(t, s.Ping(ctx))
}

func compareAndSet(t *testing.T, s control.Store) {
	ctx := t.Context()
	must(t, s.CreateSandbox(ctx, sample("a1")))
	next := sample("a1")
	next.Status, next.StartedAt, next.LastActiveAt = control.StatusRunning, base.Add(time.Second), base.Add(2*time.Second)
	next.ExpiresAt, next.Error, next.TimeoutSec, next.AutoPause = base.Add(time.Hour), "why", 0, false
	next.ChangedAt = base.Add(time.Minute)
	must(t, s.UpdateSandbox(ctx, next))
	next.Version = 2
	got, err := s.GetSandbox(ctx, "a1")
	must(t, err)
	same(t, got, next)

	old := next
	old.Version, old.Status = 1, control.StatusPausing
	want(t, s.UpdateSandbox(ctx, old), control.ErrStale)
	old.ID = "missing"
	want(t, s.UpdateSandbox(ctx, old), control.ErrStale)
	want(t, s.DeleteSandbox(ctx, "a1", 1), control.ErrStale)
	got, err = s.GetSandbox(ctx, "a1")
	must(t, err)
	same(t, got, next)

	must(t, s.DeleteSandbox(ctx, "a1", 2))
	_, err = s.GetSandbox(ctx, "a1")
	want(t, err, control.ErrNotFound)
	// Its metadata went with it: the same ID can come again.
	must(t, s.CreateSandbox(ctx, sample("a1")))
}

func oneWinner(t *testing.T, s control.Store) {
	ctx := t.Context()
	must(t, s.CreateSandbox(ctx, sample("a1")))
	errs := make([]error, 20)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			sb := sample("a1")
			sb.Status = control.StatusRunning
			errs[i] = s.UpdateSandbox(ctx, sb)
		})
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else {
			want(t, err, control.ErrStale)
		}
	}
	if won != 1 {
		t.Fatalf("%d of %d updates of one version won", won, len(errs))
	}
}

func touch(t *testing.T, s control.Store) {
	ctx := t.Context()
	must(t, s.CreateSandbox(ctx, sample("a1")))
	at := func() time.Time {
		sb, err := s.GetSandbox(ctx, "a1")
		must(t, err)
		if sb.Version != 1 {
			t.Fatalf("version %d after touching; want 1", sb.Version)
		}
		return sb.LastActiveAt
	}
	must(t, s.TouchSandbox(ctx, "a1", base.Add(time.Minute)))
	same(t, at(), base.Add(time.Minute))
	must(t, s.TouchSandbox(ctx, "a1", base))
	same(t, at(), base.Add(time.Minute))
	must(t, s.TouchSandbox(ctx, "missing", base))
	// An update with an older time does not move it back.
	sb := sample("a1")
	sb.LastActiveAt = base
	must(t, s.UpdateSandbox(ctx, sb))
	got, err := s.GetSandbox(ctx, "a1")
	must(t, err)
	same(t, got.LastActiveAt, base.Add(time.Minute))
}

func ids(list []control.Sandbox) []string {
	out := []string{}
	for _, s := range list {
		out = append(out, s.ID)
	}
	return out
}

func listFilters(t *testing.T, s control.Store) {
	ctx := t.Context()
	for i, st := range []control.Status{control.StatusRunning, control.StatusPaused, control.StatusStopped, control.StatusError} {
		sb := sample(fmt.Sprintf("s%d", i))
		sb.Status, sb.CreatedAt = st, base.Add(time.Duration(i)*time.Second)
		sb.Metadata = map[string]string{"owner": "ann", "n": fmt.Sprint(i)}
		must(t, s.CreateSandbox(ctx, sb))
	}
	for _, c := range []struct {
		name string
		f    control.SandboxFilter
		want []string
	}{
		{"all but stopped", control.SandboxFilter{}, []string{"s3", "s1", "s0"}},
		{"stopped", control.SandboxFilter{Statuses: []control.Status{control.StatusStopped}}, []string{"s2"}},
		{"two states", control.SandboxFilter{Statuses: []control.Status{control.StatusRunning, control.StatusPaused}}, []string{"s1", "s0"}},
		{"one pair", control.SandboxFilter{Metadata: map[string]string{"n": "1"}}, []string{"s1"}},
		{"all pairs", control.SandboxFilter{Metadata: map[string]string{"n": "1", "owner": "ann"}}, []string{"s1"}},
		{"a pair that is not there", control.SandboxFilter{Metadata: map[string]string{"n": "1", "owner": "bob"}}, []string{}},
		{"limit", control.SandboxFilter{Limit: 2}, []string{"s3", "s1"}},
	} {
		got, err := s.ListSandboxes(ctx, c.f)
		must(t, err)
		if d := cmp.Diff(c.want, ids(got)); d != "" {
			t.Errorf("%s: -want +got:\n%s", c.name, d)
		}
	}
}

func listPages(t *testing.T, s control.Store) {
	ctx := t.Context()
	var all []string
	for i := range 7 {
		sb := sample(fmt.Sprintf("s%d", i))
		// Equal times: the ID decides.
		sb.CreatedAt = base.Add(time.Duration(i/3) * time.Second)
		must(t, s.CreateSandbox(ctx, sb))
		all = append(all, sb.ID)
	}
	slices.Reverse(all)
	var got []string
	var after control.Cursor
	for range len(all) {
		page, err := s.ListSandboxes(ctx, control.SandboxFilter{After: after, Limit: 2})
		must(t, err)
		if len(page) == 0 {
			break
		}
		got = append(got, ids(page)...)
		last := page[len(page)-1]
		after = control.Cursor{CreatedAt: last.CreatedAt, ID: last.ID}
	}
	same(t, got, all)
}

func pruneAndCount(t *testing.T, s control.Store) {
	ctx := t.Context()
	for i, st := range []control.Status{control.StatusRunning, control.StatusRunning, control.StatusStopped} {
		sb := sample(fmt.Sprintf("s%d", i))
		sb.Status = st
		must(t, s.CreateSandbox(ctx, sb))
	}
	counts, err := s.CountSandboxes(ctx)
	must(t, err)
	same(t, counts, map[control.Status]int{control.StatusRunning: 2, control.StatusStopped: 1})
	n, err := s.PruneStopped(ctx, base)
	must(t, err)
	same(t, n, int64(0))
	n, err = s.PruneStopped(ctx, base.Add(time.Second))
	must(t, err)
	same(t, n, int64(1))
	_, err = s.GetSandbox(ctx, "s2")
	want(t, err, control.ErrNotFound)
	_, err = s.GetSandbox(ctx, "s0")
	must(t, err)
}

func templates(t *testing.T, s control.Store) {
	ctx := t.Context()
	list := []control.Template{
		{Name: "a-b", Type: control.TemplateSnapshot, VCPUs: 1, MemoryMB: 512, SizeBytes: 1 << 40, Generation: 3, Parent: "base", CreatedAt: base},
		{Name: "a.b", Type: control.TemplateSnapshot, VCPUs: 1, MemoryMB: 512, CreatedAt: base},
		{Name: "a_b", Type: control.TemplateBase, CreatedAt: base},
		{Name: "ab", Type: control.TemplateSnapshot, CreatedAt: base},
	}
	for _, i := range []int{2, 0, 3, 1} {
		must(t, s.CreateTemplate(ctx, list[i]))
	}
	want(t, s.CreateTemplate(ctx, list[0]), control.ErrExists)
	got, err := s.GetTemplate(ctx, "a-b")
	must(t, err)
	same(t, got, list[0])
	// In order of bytes, whatever the database's language.
	all, err := s.ListTemplates(ctx, control.TemplateFilter{})
	must(t, err)
	same(t, all, list)
	page, err := s.ListTemplates(ctx, control.TemplateFilter{After: "a-b", Limit: 2})
	must(t, err)
	same(t, page, list[1:3])
	bases, err := s.ListTemplates(ctx, control.TemplateFilter{Type: control.TemplateBase})
	must(t, err)
	same(t, bases, list[2:3])
	changed := list[0]
	changed.SizeBytes, changed.Generation, changed.CreatedAt = 7, 4, base.Add(time.Hour)
	for _, x := range []control.Template{changed, {Name: "new", Type: control.TemplateSnapshot, CreatedAt: base}} {
		must(t, s.PutTemplate(ctx, x))
		got, err := s.GetTemplate(ctx, x.Name)
		must(t, err)
		same(t, got, x)
	}
	must(t, s.DeleteTemplate(ctx, "a-b"))
	want(t, s.DeleteTemplate(ctx, "a-b"), control.ErrNotFound)
	_, err = s.GetTemplate(ctx, "a-b")
	want(t, err, control.ErrNotFound)
}

func apiKeys(t *testing.T, s control.Store) {
	ctx := t.Context()
	k := control.APIKey{ID: "k1", Name: "first", Prefix: "wrn_1234", Hash: "00ff", CreatedAt: base}
	must(t, s.CreateAPIKey(ctx, k))
	k2 := k
	k2.ID = "k2"
	want(t, s.CreateAPIKey(ctx, k2), control.ErrExists)
	got, err := s.GetAPIKeyByHash(ctx, "00ff")
	must(t, err)
	same(t, got, k)
	_, err = s.GetAPIKeyByHash(ctx, "00fe")
	want(t, err, control.ErrNotFound)
	all, err := s.ListAPIKeys(ctx)
	must(t, err)
	same(t, all, []control.APIKey{k})
	must(t, s.DeleteAPIKey(ctx, "k1"))
	want(t, s.DeleteAPIKey(ctx, "k1"), control.ErrNotFound)
}

func endedContext(t *testing.T, s control.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.CreateSandbox(ctx, sample("a1")); err == nil {
		t.Fatal("an insertion under an ended context succeeded")
	}
	_, err := s.GetSandbox(t.Context(), "a1")
	want(t, err, control.ErrNotFound)
}
