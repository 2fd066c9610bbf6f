package templatebuild_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/templatebuild"
)

func TestBuildRunsItsStepsAndTagsItsSnapshot(t *testing.T) {
	f := newFake()
	f.notReady = 3
	b, db := open(t, f)
	s := run("one")
	s.Steps = append(s.Steps,
		templatebuild.Step{Type: "ENV", Args: []string{"A", "b", "PATH", "/x'y"}},
		templatebuild.Step{Type: "WORKDIR", Args: []string{"app"}},
		templatebuild.Step{Type: "USER", Args: []string{"root"}},
		templatebuild.Step{Type: "RUN", Args: []string{"two", "web"}})
	s.StartCmd, s.ReadyCmd = "serve", "ready"
	x := build(t, b, "web:v1", []string{"stable"}, s)
	if x.Status != templatebuild.Ready || !slices.Equal(x.Tags, []string{"stable", "v1"}) {
		t.Fatalf("build %+v\n%s", x, text(x.Log))
	}
	if want := []string{"one", "root: user", "root: root", "web: two", "serve"}; !slices.Equal(f.ran, want) {
		t.Errorf("ran %q, want %q", f.ran, want)
	}
	var d templatebuild.Defaults
	if err := json.Unmarshal([]byte(f.files[templatebuild.DefaultsPath]), &d); err != nil || d.Envs["A"] != "b" || d.User != "root" || d.Workdir != "/home/user/app" {
		t.Errorf("defaults %+v, %v", d, err)
	}
	if got := f.files["/etc/profile.d/zz-wrenn-path.sh"]; got != `export PATH='/x'\''y'`+"\n" {
		t.Errorf("profile %q", got)
	}
	for _, tag := range []string{"v1", "stable"} {
		if got, err := db.ResolveTemplate(t.Context(), "web", tag); err != nil || got != x.Snapshot || !f.snapshots[got] {
			t.Errorf("%s stands for %q, %v; want %q", tag, got, err, x.Snapshot)
		}
	}
	if sb, sn := f.left(); sb != 0 || sn != 1 {
		t.Errorf("%d sandboxes and %d snapshots are left", sb, sn)
	}
}

func TestRebuildMovesTheTagAndRemovesTheOldBuild(t *testing.T) {
	f := newFake()
	b, db := open(t, f)
	first := build(t, b, "web", nil, run("one"))
	second := build(t, b, "web", nil, run("two"))
	if got, err := db.ResolveTemplate(t.Context(), "web", "latest"); got != second.Snapshot || err != nil {
		t.Errorf("the name stands for %q, %v", got, err)
	}
	if f.snapshots[first.Snapshot] {
		t.Error("the replaced build's snapshot is left")
	}
	if _, _, err := b.Status(t.Context(), "web", first.ID, 0, 1); control.CodeOf(err) != control.CodeNotFound {
		t.Errorf("the replaced build: %v", err)
	}
	if err := b.Delete(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if sb, sn := f.left(); sb+sn != 0 {
		t.Errorf("%d sandboxes and %d snapshots are left of a deleted template", sb, sn)
	}
	if err := b.Delete(t.Context(), "web"); control.CodeOf(err) != control.CodeNotFound {
		t.Errorf("second delete: %v", err)
	}
}

// Whatever fails, nothing is left, the reason is told and the old build stays.
func TestFailedBuildLeavesNothing(t *testing.T) {
	for name, tc := range map[string]struct {
		failOn string
		spec   templatebuild.Spec
		step   string
		want   string
	}{
		"command":  {spec: run("one", "fail no such package"), step: "2", want: "exited with 3\nno such package"},
		"start":    {spec: templatebuild.Spec{StartCmd: "fail port taken", ReadyCmd: "never"}, step: "finalize", want: "port taken"},
		"create":   {failOn: "create", spec: run("one"), step: "base", want: "create broke"},
		"write":    {failOn: "write", spec: templatebuild.Spec{Steps: []templatebuild.Step{{Type: "ENV", Args: []string{"A", "b"}}}}, step: "1", want: "write broke"},
		"exec":     {failOn: "exec", spec: templatebuild.Spec{ReadyCmd: "x"}, step: "finalize", want: "exec broke"},
		"snapshot": {failOn: "snapshot", spec: run("one"), step: "finalize", want: "snapshot broke"},
		"template": {spec: templatebuild.Spec{FromTemplate: "none"}, step: "base", want: "no template none"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake()
			b, db := open(t, f)
			old := build(t, b, "web", nil, run("old"))
			f.failOn = tc.failOn
			if name == "start" {
				f.notReady = 1 << 30
			}
			x := build(t, b, "web", nil, tc.spec)
			if x.Status != templatebuild.Failed || x.Step != tc.step || !strings.Contains(x.Reason, tc.want) {
				t.Errorf("status %s, step %q, reason %q; want step %q and %q", x.Status, x.Step, x.Reason, tc.step, tc.want)
			}
			if !strings.Contains(text(x.Log), "Build failed: ") {
				t.Errorf("log:\n%s", text(x.Log))
			}
			if got, err := db.ResolveTemplate(t.Context(), "web", "default"); got != old.Snapshot || err != nil {
				t.Errorf("the name stands for %q, %v; want the old build", got, err)
			}
			if sb, sn := f.left(); sb != 0 || sn != 1 {
				t.Errorf("%d sandboxes and %d snapshots are left", sb, sn)
			}
		})
	}
}

func TestOneBuildOfANameAtATime(t *testing.T) {
	f := newFake()
	b, _ := open(t, f)
	first, err := b.Request(t.Context(), "web", nil, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Start(t.Context(), "web", first.ID, run("hang")); err != nil {
		t.Fatal(err)
	}
	<-f.hung
	if err := b.Start(t.Context(), "web", first.ID, run("x")); control.CodeOf(err) != control.CodeConflict {
		t.Errorf("second start: %v", err)
	}
	other, err := b.Request(t.Context(), "web", nil, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Start(t.Context(), "web", other.ID, run("x")); control.CodeOf(err) != control.CodeConflict || !strings.Contains(err.Error(), "under way") {
		t.Errorf("a second build: %v", err)
	}
	if x := build(t, b, "another", nil, run("x")); x.Status != templatebuild.Ready {
		t.Errorf("a build of another name: %+v", x)
	}
	if err := b.Cancel(t.Context(), "web", first.ID); err != nil {
		t.Fatal(err)
	}
	if x := wait(t, b, first); x.Status != templatebuild.Failed || !strings.Contains(x.Reason, "cancelled") || x.Step != "1" {
		t.Errorf("cancelled: %+v", x)
	}
	if sb, sn := f.left(); sb != 0 || sn != 1 {
		t.Errorf("%d sandboxes and %d snapshots are left", sb, sn)
	}
	if err := b.Start(t.Context(), "web", other.ID, run("x")); err != nil {
		t.Errorf("the second build after the first: %v", err)
	}
	wait(t, b, other)
}

func TestBuildsEndWithTheServer(t *testing.T) {
	f := newFake()
	b, db := open(t, f)
	x, _ := b.Request(t.Context(), "web", nil, 0, 0)
	if err := b.Start(t.Context(), "web", x.ID, run("hang")); err != nil {
		t.Fatal(err)
	}
	<-f.hung
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if got, _, err := b.Status(t.Context(), "web", x.ID, 0, 0); err != nil || got.Status != templatebuild.Failed || !strings.Contains(got.Reason, "stopped") {
		t.Errorf("after a stop: %+v, %v", got, err)
	}
	// A crash: the row says building, sandbox and snapshot are there.
	y, waiting := templatebuild.Build{ID: "y", Template: "web", Status: templatebuild.Building, Snapshot: "web.y"}, templatebuild.Build{ID: "w", Template: "web", Status: templatebuild.Waiting}
	for _, z := range []templatebuild.Build{y, waiting} {
		if err := db.CreateBuild(t.Context(), z); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Create(t.Context(), control.CreateParams{Template: "base", Metadata: map[string]string{"wrenn.template-build": "y"}}); err != nil {
		t.Fatal(err)
	}
	f.snapshots["web.y"] = true
	b = reopen(t, f, db)
	if got, _, err := b.Status(t.Context(), "web", "y", 0, 0); err != nil || got.Status != templatebuild.Failed || !strings.Contains(got.Reason, "restarted") {
		t.Errorf("after a crash: %+v, %v", got, err)
	}
	if got, _, err := b.Status(t.Context(), "web", "w", 0, 0); err != nil || got.Status != templatebuild.Waiting {
		t.Errorf("one that waits: %+v, %v", got, err)
	}
	if sb, sn := f.left(); sb+sn != 0 {
		t.Errorf("%d sandboxes and %d snapshots are left", sb, sn)
	}
}

func TestLogIsBoundedAndPaged(t *testing.T) {
	f := newFake()
	b, _ := open(t, f)
	x := build(t, b, "web", nil, run("loud", "flood", "fail the reason"))
	size, n := 0, 0
	for offset := 0; ; {
		_, page, err := b.Status(t.Context(), "web", x.ID, offset, 1000)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		offset += len(page)
		for _, e := range page {
			size += len(e.Message)
			n++
		}
	}
	if n > 8100 || size > 1<<20+64<<10 {
		t.Errorf("%d entries of %d bytes", n, size)
	}
	if last := x.Log[len(x.Log)-1].Message; !strings.Contains(last, "the reason") {
		t.Errorf("the last entry is %q", last)
	}
	if _, page, err := b.Status(t.Context(), "web", x.ID, 1<<40, 100); err != nil || len(page) != 0 {
		t.Errorf("behind the end: %v, %v", page, err)
	}
}

func TestBadBuildsAreRefused(t *testing.T) {
	f := newFake()
	f.snapshots["by-hand"] = true
	b, _ := open(t, f)
	for _, name := range []string{"", "Upper", "../x", "a/b", strings.Repeat("a", 49), "by-hand", "ok:bad tag", "ok:"} {
		if _, err := b.Request(t.Context(), name, nil, 0, 0); err == nil {
			t.Errorf("the name %q was taken", name)
		}
	}
	x, err := b.Request(t.Context(), "web", nil, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	step := func(kind string, args ...string) templatebuild.Spec {
		return templatebuild.Spec{Steps: []templatebuild.Step{{Type: kind, Args: args, FilesHash: strings.Repeat("0", 64)}}}
	}
	for want, s := range map[string]templatebuild.Spec{
		"no reference to an image": {FromImage: "not an image"},
		"exclude each other":       {FromImage: "debian", FromTemplate: "base"},
		"type aws is not done":     {FromImageRegistry: templatebuild.ImageRegistry{Type: "aws"}},
		"type is missing":          {FromImageRegistry: templatebuild.ImageRegistry{Username: "x"}},
		`type "x" is not known`:    {FromImageRegistry: templatebuild.ImageRegistry{Type: "x"}},
		"both a user and a secret": {FromImageRegistry: templatebuild.ImageRegistry{Type: "registry", Username: "x"}},
		"type gcp wants":           {FromImageRegistry: templatebuild.ImageRegistry{Type: "gcp"}},
		"no name of a template":    {FromTemplate: "../x"},
		"wants a command":          step("RUN"),
		"no user's name":           step("RUN", "x", "a b"),
		"wants one user":           step("USER", "a", "b"),
		"wants one directory":      step("WORKDIR"),
		"wants pairs":              step("ENV", "A"),
		"no name of a variable":    step("ENV", "A=B", "c"),
		"lie in the build":         step("COPY", "../x", "/x"),
		"the source \"/etc/passwd": step("COPY", "/etc/passwd", "/x"),
		"user:group":               step("COPY", "x", "/x", "a b"),
		"octal":                    step("COPY", "x", "/x", "", "rwx"),
		"were not uploaded":        step("COPY", "x", "/x"),
		"there are RUN":            step("ADD", "x"),
		"an argument must be":      step("RUN", strings.Repeat("x", 1<<20)),
		"startCmd":                 {StartCmd: "a\x00"},
		"must be at most 500":      run(make([]string, 501)...),
	} {
		err := b.Start(t.Context(), "web", x.ID, s)
		if control.CodeOf(err) != control.CodeInvalid || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	if err := b.Start(t.Context(), "web", "none", run("x")); control.CodeOf(err) != control.CodeNotFound {
		t.Errorf("a build that is not there: %v", err)
	}
	if err := b.Start(t.Context(), "other", x.ID, run("x")); control.CodeOf(err) != control.CodeNotFound {
		t.Errorf("a build of another template: %v", err)
	}
	if len(f.ran) != 0 || len(f.sandboxes) != 0 {
		t.Errorf("refused builds ran %v", f.ran)
	}
}
