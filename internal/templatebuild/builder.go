package templatebuild

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/oci"
)

// Options configure a Builder. Store, Sandboxes and Dir are required.
type Options struct {
	Store     Store
	Sandboxes Sandboxes
	// Images pulls what builds start from; nil pulls from public registries.
	Images *oci.Puller
	// Dir keeps uploaded files.
	Dir string
	// Limit bounds one build; 0 is an hour.
	Limit time.Duration
	// ReadyEvery is the pause between two tries of a ready command; 0 is half a
	// second.
	ReadyEvery time.Duration
	// Now: nil is time.Now.
	Now func() time.Time
	// Logger: nil discards.
	Logger *slog.Logger
}

// Builder runs builds. Close ends them.
type Builder struct {
	opt    Options
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	files  *uploads

	mu     sync.Mutex
	closed bool
	active map[string]*active // by build ID
}

// active is a build under way.
type active struct {
	log    *buildLog
	cancel context.CancelCauseFunc
	done   chan struct{}
}

var (
	errCancelled = errors.New("the build was cancelled")
	errStopped   = errors.New("the server was stopped while the build was under way; build again")
	errRestarted = "the server was restarted while the build was under way; build again"
)

// New makes a Builder and clears away what builds of an earlier process left.
func New(ctx context.Context, o Options) (*Builder, error) {
	if o.Limit == 0 {
		o.Limit = time.Hour
	}
	if o.ReadyEvery == 0 {
		o.ReadyEvery = time.Second / 2
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Images == nil {
		o.Images = oci.NewPuller(oci.Options{})
	}
	files, err := openUploads(o.Dir, o.Now)
	if err != nil {
		return nil, fmt.Errorf("open the uploaded files: %w", err)
	}
	b := &Builder{opt: o, log: o.Logger, files: files, active: map[string]*active{}}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	if err := b.recover(ctx); err != nil {
		return nil, fmt.Errorf("clear away interrupted builds: %w", err)
	}
	return b, nil
}

// Close cancels the builds under way and waits until they have cleared away.
func (b *Builder) Close() error {
	b.mu.Lock()
	b.closed = true
	for _, a := range b.active {
		a.cancel(errStopped)
	}
	b.mu.Unlock()
	b.wg.Wait()
	b.cancel()
	return nil
}

// recover fails the builds that an earlier process began. Those that wait for
// their start go on waiting: their client may still be uploading.
func (b *Builder) recover(ctx context.Context) error {
	all, err := b.opt.Store.ListBuilds(ctx, "")
	if err != nil {
		return err
	}
	for _, x := range all {
		if x.Status != Building {
			continue
		}
		b.removeSandboxes(ctx, x.ID)
		b.removeSnapshot(ctx, x.Snapshot)
		x.Status, x.Reason, x.EndedAt = Failed, errRestarted, b.opt.Now()
		if err := b.opt.Store.FinishBuild(ctx, x); err != nil {
			return err
		}
	}
	return nil
}

// buildKey marks the sandbox of a build.
const buildKey = "wrenn.template-build"

func (b *Builder) removeSandboxes(ctx context.Context, buildID string) {
	list, err := b.opt.Sandboxes.List(ctx, control.SandboxFilter{Metadata: map[string]string{buildKey: buildID}})
	if err != nil {
		b.log.Error("find the sandbox of a build", "build", buildID, "err", err)
	}
	for _, sb := range list {
		if err := b.opt.Sandboxes.Delete(ctx, sb.ID); err != nil && control.CodeOf(err) != control.CodeNotFound {
			b.log.Error("remove the sandbox of a build", "build", buildID, "sandbox", sb.ID, "err", err)
		}
	}
}

func (b *Builder) removeSnapshot(ctx context.Context, name string) {
	if err := b.opt.Sandboxes.DeleteSnapshot(ctx, name); err != nil && control.CodeOf(err) != control.CodeNotFound {
		b.log.Error("remove the snapshot of a build", "snapshot", name, "err", err)
	}
}

// Request makes a build that waits for its files and its start. A tag may be in
// the name; without any the build gets DefaultTag.
func (b *Builder) Request(ctx context.Context, name string, tags []string, vcpus, memoryMB int64) (Build, error) {
	name, tag := SplitName(name)
	if err := checkName("name", name); err != nil {
		return Build{}, err
	}
	if tag != DefaultTag || len(tags) == 0 {
		tags = append(slices.Clone(tags), tag)
	}
	if err := checkTags(tags); err != nil {
		return Build{}, err
	}
	// A snapshot that was made by hand would hide the template.
	if _, err := b.opt.Sandboxes.GetSnapshot(ctx, name); err == nil {
		return Build{}, &control.Error{Code: control.CodeConflict, Message: fmt.Sprintf("name: there is a template or snapshot %q that was not built this way; choose another name or delete it first", name)}
	} else if control.CodeOf(err) != control.CodeNotFound {
		return Build{}, err
	}
	id := newUUID()
	slices.Sort(tags)
	x := Build{ID: id, Template: name, Status: Waiting, Tags: slices.Compact(tags), Snapshot: name + "." + id[24:],
		VCPUs: vcpus, MemoryMB: memoryMB, CreatedAt: b.opt.Now()}
	return x, b.opt.Store.CreateBuild(ctx, x)
}

func newUUID() string {
	var u [16]byte
	rand.Read(u[:]) // never fails
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

func noBuild(id string) error {
	return &control.Error{Code: control.CodeNotFound, Message: fmt.Sprintf("there is no build %.64q of this template", id)}
}

// Start begins a build that waits; it goes on when ctx ends.
func (b *Builder) Start(ctx context.Context, template, id string, s Spec) error {
	x, err := b.opt.Store.GetBuild(ctx, template, id)
	if errors.Is(err, control.ErrNotFound) {
		return noBuild(id)
	}
	if err != nil {
		return fmt.Errorf("read build %s: %w", id, err)
	}
	if err := s.check(); err != nil {
		return err
	}
	for i, st := range s.Steps {
		if st.Type == "COPY" && !b.files.has(template, st.FilesHash) {
			return control.Invalid("steps", "number %d: the files of COPY %.80s were not uploaded", i+1, st.Args[0])
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return &control.Error{Code: control.CodeHostUnavailable, Message: "the server is stopping"}
	}
	switch err := b.opt.Store.StartBuild(ctx, template, id); {
	case errors.Is(err, control.ErrExists):
		return &control.Error{Code: control.CodeConflict, Message: fmt.Sprintf("another build of %q is under way; wait for its end", template)}
	case errors.Is(err, control.ErrStale):
		return &control.Error{Code: control.CodeConflict, Message: "the build was started already"}
	case err != nil:
		return fmt.Errorf("start build %s: %w", id, err)
	}
	bctx, cancel := context.WithCancelCause(b.ctx)
	a := &active{log: &buildLog{now: b.opt.Now}, cancel: cancel, done: make(chan struct{})}
	b.active[id] = a
	b.wg.Go(func() {
		defer close(a.done)
		defer cancel(nil)
		b.build(bctx, x, s, a.log)
		b.mu.Lock()
		delete(b.active, id)
		b.mu.Unlock()
	})
	return nil
}

// Cancel ends a build under way and waits until nothing is left of it.
func (b *Builder) Cancel(ctx context.Context, template, id string) error {
	x, err := b.opt.Store.GetBuild(ctx, template, id)
	if errors.Is(err, control.ErrNotFound) {
		return noBuild(id)
	}
	if err != nil {
		return err
	}
	b.mu.Lock()
	a := b.active[x.ID]
	b.mu.Unlock()
	if a == nil {
		if x.Status == Waiting {
			return b.opt.Store.DeleteBuild(ctx, template, id)
		}
		return nil // it has ended
	}
	a.cancel(errCancelled)
	select {
	case <-a.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Status reads a build and at most n entries of its log from an offset on.
func (b *Builder) Status(ctx context.Context, template, id string, offset, n int) (Build, []Entry, error) {
	b.mu.Lock()
	a := b.active[id]
	b.mu.Unlock()
	x, err := b.opt.Store.GetBuild(ctx, template, id)
	if errors.Is(err, control.ErrNotFound) {
		return x, nil, noBuild(id)
	}
	if err != nil {
		return x, nil, fmt.Errorf("read build %s: %w", id, err)
	}
	if a != nil {
		return x, a.log.from(offset, n), nil
	}
	return x, page(x.Log, offset, n), nil
}

// Delete removes a template: its builds, cancelled where one is under way,
// their snapshots and its tags.
func (b *Builder) Delete(ctx context.Context, template string) error {
	list, err := b.opt.Store.ListBuilds(ctx, template)
	if err != nil {
		return fmt.Errorf("list builds: %w", err)
	}
	if len(list) == 0 {
		return &control.Error{Code: control.CodeNotFound, Message: fmt.Sprintf("there is no template %.80q", template)}
	}
	for _, x := range list {
		if err := b.Cancel(ctx, template, x.ID); err != nil && control.CodeOf(err) != control.CodeNotFound {
			return err
		}
		if err := b.opt.Sandboxes.DeleteSnapshot(ctx, x.Snapshot); err != nil && control.CodeOf(err) != control.CodeNotFound {
			return err
		}
		if err := b.opt.Store.DeleteBuild(ctx, template, x.ID); err != nil && !errors.Is(err, control.ErrNotFound) {
			return err
		}
	}
	b.files.remove(template)
	return nil
}

// prune removes the ready builds that no tag points at, and failed ones but for
// the last few, whose logs people still look at.
func (b *Builder) prune(ctx context.Context, template string) {
	builds, err := b.opt.Store.ListBuilds(ctx, template)
	tags, err2 := b.opt.Store.ListTags(ctx, template)
	if err := errors.Join(err, err2); err != nil {
		b.log.Error("find builds to remove", "template", template, "err", err)
		return
	}
	failed := 0
	for _, x := range builds {
		tagged := slices.ContainsFunc(tags, func(t Tag) bool { return t.BuildID == x.ID })
		if x.Status == Failed {
			failed++
		}
		if x.Status == Ready && !tagged || x.Status == Failed && failed > 5 {
			b.removeSnapshot(ctx, x.Snapshot)
			if err := b.opt.Store.DeleteBuild(ctx, template, x.ID); err != nil {
				b.log.Error("remove a build", "build", x.ID, "err", err)
			}
		}
	}
}

// Wait waits for a build's end, if it is under way.
func (b *Builder) Wait(ctx context.Context, id string) error {
	b.mu.Lock()
	a := b.active[id]
	b.mu.Unlock()
	if a == nil {
		return nil
	}
	select {
	case <-a.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
