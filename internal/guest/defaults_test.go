package guest

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestTemplateDefaults(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "template.json")
	s, err := New(Options{DefaultsFile: file, RunDir: dir, System: &fakeSystem{}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if d := s.defaults(); d.Envs != nil || d.User != "" || d.Workdir != "" {
		t.Errorf("no file: %+v", d)
	}
	write(`{"envs":{"A":"b"},"user":"root","workdir":"` + dir + `"}`)
	if d := s.defaults(); d.Envs["A"] != "b" || d.User != "root" || d.Workdir != dir {
		t.Errorf("got %+v", d)
	}
	// What a guest may put there must not keep processes from starting.
	for name, text := range map[string]string{
		"no JSON": "{", "wrong type": `{"envs":[1]}`, "bad variable": `{"envs":{"A=B":"c"}}`,
		"no directory": `{"workdir":"/none"}`, "relative": `{"workdir":"."}`, "too large": `{"user":"` + strings.Repeat("x", maxDefaultsFile) + `"}`,
	} {
		write(text)
		if d := s.defaults(); len(d.Envs) != 0 || d.User != "" || d.Workdir != "" {
			t.Errorf("%s: %+v", name, d)
		}
	}
	os.Remove(file)
	if err := syscall.Mkfifo(file, 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(file, os.O_RDWR, 0) // so that opening it does not wait
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if d := s.defaults(); d.User != "" {
		t.Errorf("a FIFO: %+v", d)
	}
}
