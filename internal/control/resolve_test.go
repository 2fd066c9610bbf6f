package control_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
	"git.omukk.dev/wrenn/sandbox/internal/store"
)

// A built template's name and tag stand for a snapshot; a snapshot's own name
// comes first.
func TestNamesWithTags(t *testing.T) {
	db, err := store.Open(t.Context(), t.TempDir()+"/db")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	broken := errors.New("the database broke")
	s := control.New(control.Options{Store: db, Host: controltest.NewHost(), Resolve: func(_ context.Context, name, tag string) (string, error) {
		switch name + ":" + tag {
		case "web:default", "own:default":
			return "base", nil
		case "web:v1":
			return "gone", nil
		case "broken:default":
			return "", broken
		}
		return "", control.ErrNotFound
	}})
	src, err := s.Create(t.Context(), control.CreateParams{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.CreateSnapshot(t.Context(), src.ID, "own"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"web": "base", "web:default": "base", "own": "own", "own:default": "own", "own:latest": "own", "base": "base", "base:latest": "base",
	} {
		if sb, err := s.Create(t.Context(), control.CreateParams{Template: name}); err != nil || sb.Template != want {
			t.Errorf("%s: from %q, %v; want %q", name, sb.Template, err, want)
		} else if alias := strings.HasPrefix(name, "web"); (sb.Options.Alias == "web") != alias || !alias && sb.Options.Alias != "" {
			t.Errorf("%s: the alias is %q", name, sb.Options.Alias)
		}
	}
	for name, want := range map[string]control.Code{
		"web:v1": control.CodeNotFound, "web:v2": control.CodeNotFound, "none": control.CodeNotFound, "own:v1": control.CodeNotFound,
		"broken": control.CodeInternal, "web:": control.CodeInvalid, ":v1": control.CodeInvalid, "web:a:b": control.CodeInvalid, "web:../x": control.CodeInvalid,
	} {
		if _, err := s.Create(t.Context(), control.CreateParams{Template: name}); err == nil || control.CodeOf(err) != want {
			t.Errorf("%s: %v; want %s", name, err, want)
		}
	}
}
