package client_test

import (
	"bytes"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/client"
)

func TestFiles(t *testing.T) {
	s, c := start(t)
	id := s.Add(client.Sandbox{}).ID
	ctx := t.Context()
	name := "/work/a b?&=ü%2F.txt"
	if err := c.MakeDir(ctx, id, "/work/sub", ""); err != nil {
		t.Fatal(err)
	}
	if err := c.PutFile(ctx, id, name, strings.NewReader("content"), client.PutOptions{Size: 7, Mode: 0o751}); err != nil {
		t.Fatal(err)
	}
	if got, mode, ok := s.Content(id, name); got != "content" || mode != 0o751 || !ok {
		t.Errorf("the server has %q, %o, %v", got, mode, ok)
	}
	f, err := c.GetFile(ctx, id, name, "")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(f)
	if string(got) != "content" || err != nil || f.Size != 7 || f.Close() != nil {
		t.Errorf("get: %q, %v, size %d", got, err, f.Size)
	}
	entries, err := c.ListFiles(ctx, id, "/work", client.ListFilesOptions{Depth: 1})
	if err != nil || len(entries) != 2 || entries[0].Size != 7 || entries[1].Type != client.FileTypeDir {
		t.Errorf("list: %+v, %v", entries, err)
	}
	if err := c.DeleteFile(ctx, id, "/work", ""); err != nil {
		t.Error(err)
	}
	for what, err := range map[string]error{
		"get":    second(c.GetFile(ctx, id, name, "")),
		"list":   second(c.ListFiles(ctx, id, "/work", client.ListFilesOptions{})),
		"delete": c.DeleteFile(ctx, id, name, ""),
		"put":    c.PutFile(ctx, "nobody", name, strings.NewReader("x"), client.PutOptions{}),
	} {
		if !client.IsNotFound(err) {
			t.Errorf("%s of what is gone: %v", what, err)
		}
	}
}

func TestEmptyFileAndUnknownSize(t *testing.T) {
	s, c := start(t)
	id := s.Add(client.Sandbox{}).ID
	for _, content := range []string{"", "x"} {
		if err := c.PutFile(t.Context(), id, "/f", io.MultiReader(strings.NewReader(content)), client.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		if got, _, ok := s.Content(id, "/f"); got != content || !ok {
			t.Errorf("got %q, %v, want %q", got, ok, content)
		}
	}
}

// A file must not become something else than what the caller promised.
func TestBrokenTransfers(t *testing.T) {
	s, c := start(t)
	id := s.Add(client.Sandbox{}).ID
	ctx := t.Context()
	for name, err := range map[string]error{
		"short":  c.PutFile(ctx, id, "/f", strings.NewReader("four"), client.PutOptions{Size: 5}),
		"broken": c.PutFile(ctx, id, "/f", io.MultiReader(strings.NewReader("x"), errReader{}), client.PutOptions{}),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if got, _, ok := s.Content(id, "/f"); ok {
		t.Errorf("the server has %q", got)
	}
	err := c.PutFile(ctx, id, "/growing", strings.NewReader("four"), client.PutOptions{Size: 3})
	if got, _, _ := s.Content(id, "/growing"); got != "fou" || err != nil {
		t.Errorf("of a growing file the server has %q, %v", got, err)
	}
	f, err := c.GetFile(ctx, id, "/big/100000x", "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n, err := io.Copy(io.Discard, f); err == nil {
		t.Errorf("a cut transfer passed for a file of %d bytes", n)
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errors.New("disk broke") }

// The refusal comes before the content: nothing of it is read.
func TestRefusedUploadIsNotSent(t *testing.T) {
	_, c := start(t)
	r := &countReader{r: bytes.NewReader(make([]byte, 1<<20))}
	if err := c.PutFile(t.Context(), "nobody", "/f", r, client.PutOptions{Size: 1 << 20}); !client.IsNotFound(err) {
		t.Fatal(err)
	}
	if r.n != 0 {
		t.Errorf("%d bytes were read", r.n)
	}
}

type countReader struct {
	r io.Reader
	n int
}

func (r *countReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.n += n
	return n, err
}

func TestTransfersUseLittleMemory(t *testing.T) {
	s, c := start(t)
	id := s.Add(client.Sandbox{}).ID
	const size = 64 << 20
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f, err := c.GetFile(t.Context(), id, "/big/67108864", "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := c.PutFile(t.Context(), id, "/discard/f", f, client.PutOptions{Size: size}); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if s.Discarded() != size {
		t.Errorf("%d bytes arrived", s.Discarded())
	}
	// All that was allocated, also what was freed again.
	if n := after.TotalAlloc - before.TotalAlloc; n > 16<<20 {
		t.Errorf("copying %d MiB allocated %d MiB", size>>20, n>>20)
	}
}
