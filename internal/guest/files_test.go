package guest

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/filesystem"
)

// post uploads a text as it is.
func (a *agent) post(t *testing.T, path, text string, headers ...string) (int, string) {
	t.Helper()
	headers = append([]string{tokenHeader, testToken, "Content-Type", "application/octet-stream"}, headers...)
	return a.do(t, "POST", "/files?path="+url.QueryEscape(path), strings.NewReader(text), headers...)
}

func (a *agent) get(t *testing.T, path string, headers ...string) (int, string) {
	t.Helper()
	headers = append([]string{tokenHeader, testToken, "Accept-Encoding", "identity"}, headers...)
	return a.do(t, "GET", "/files?path="+url.QueryEscape(path), nil, headers...)
}

func zipped(text string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write([]byte(text))
	_ = w.Close()
	return b.String()
}

func TestFileRoundTrip(t *testing.T) {
	a := confirmed(t)
	for name, text := range map[string]string{"empty": "", "text": "hello\x00\xff", "a name, with: «ünïcode» %41+ &": "x", "deep/er/file": "y"} {
		status, body := a.post(t, name, text)
		want, _ := json.Marshal([]map[string]string{{"name": filepath.Base(name), "path": filepath.Join(a.home, name), "type": "file"}})
		var got, wanted any
		_ = json.Unmarshal([]byte(body), &got)
		_ = json.Unmarshal(want, &wanted)
		if status != http.StatusOK || fmt.Sprint(got) != fmt.Sprint(wanted) {
			t.Errorf("%s: %d %s, want %s", name, status, body, want)
		}
		if status, got := a.get(t, name); status != http.StatusOK || got != text {
			t.Errorf("%s: %d %q", name, status, got)
		}
	}
	res := a.doRaw(t, "GET", "/files?path=empty", nil, tokenHeader, testToken)
	_ = res.Body.Close()
	if res.Header.Get("Content-Length") != "0" {
		t.Errorf("an empty file has the length %q", res.Header.Get("Content-Length"))
	}
	if status, got := a.get(t, "text", "Range", "bytes=1-2"); status != http.StatusPartialContent || got != "el" {
		t.Errorf("range: %d %q", status, got)
	}
	if status, got := a.get(t, "/proc/self/status"); status != http.StatusOK || !strings.HasPrefix(got, "Name:") {
		t.Errorf("a file without a size: %d %q", status, got)
	}
}

func TestFileGzip(t *testing.T) {
	a := confirmed(t)
	text := strings.Repeat("the same again ", 10_000)
	if status, body := a.post(t, "f", zipped(text), "Content-Encoding", "gzip"); status != http.StatusOK {
		t.Fatalf("%d %s", status, body)
	}
	if _, got := a.get(t, "f"); got != text {
		t.Errorf("stored %d bytes", len(got))
	}
	res := a.doRaw(t, "GET", "/files?path=f", nil, tokenHeader, testToken, "Accept-Encoding", "gzip")
	defer res.Body.Close()
	zr, err := gzip.NewReader(res.Body)
	if err != nil || res.Header.Get("Content-Encoding") != "gzip" {
		t.Fatalf("%v %v", res.Header, err)
	}
	if got, err := io.ReadAll(zr); err != nil || string(got) != text {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	// A library's own list does not ask for it.
	res = a.doRaw(t, "GET", "/files?path=f", nil, tokenHeader, testToken, "Accept-Encoding", "gzip, deflate, br")
	defer res.Body.Close()
	if got, _ := io.ReadAll(res.Body); string(got) != text || res.Header.Get("Content-Encoding") != "" {
		t.Errorf("%d bytes, %v", len(got), res.Header)
	}
	for name, tc := range map[string]struct{ body, coding string }{
		"not gzip":  {"plain", "gzip"},
		"cut":       {zipped(text)[:50], "gzip"},
		"corrupted": {zipped(text)[:100] + "xxxx" + zipped(text)[104:], "gzip"},
		"unknown":   {"x", "br"},
	} {
		status, body := a.post(t, "new-"+name, tc.body, "Content-Encoding", tc.coding)
		if status != http.StatusBadRequest || !strings.Contains(body, `"code":400`) {
			t.Errorf("%s: %d %s", name, status, body)
		}
		if _, err := os.Stat(filepath.Join(a.home, "new-"+name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: something is left: %v", name, err)
		}
	}
}

func multipartBody(t *testing.T, files ...[2]string) (body *bytes.Buffer, contentType string) {
	t.Helper()
	body = &bytes.Buffer{}
	w := multipart.NewWriter(body)
	for _, f := range files {
		h := textproto.MIMEHeader{}
		h.Set("Content-Disposition", fmt.Sprintf(`form-data; name="file"; filename="%s"`, f[0]))
		p, err := w.CreatePart(h)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = p.Write([]byte(f[1]))
	}
	_ = w.Close()
	return body, w.FormDataContentType()
}

func TestMultipart(t *testing.T) {
	a := confirmed(t)
	abs := filepath.Join(a.home, "x/ünï 1")
	body, ct := multipartBody(t, [2]string{abs, "one"}, [2]string{"rel/2", "two"})
	status, text := a.do(t, "POST", "/files", body, tokenHeader, testToken, "Content-Type", ct)
	if status != http.StatusOK || strings.Count(text, `"type":"file"`) != 2 {
		t.Fatalf("%d %s", status, text)
	}
	for path, want := range map[string]string{abs: "one", "rel/2": "two"} {
		if _, got := a.get(t, path); got != want {
			t.Errorf("%s: %q", path, got)
		}
	}
	// The query's path is the one file's.
	body, ct = multipartBody(t, [2]string{"blob", "three"})
	if status, text := a.do(t, "POST", "/files?path=named", body, tokenHeader, testToken, "Content-Type", ct); status != http.StatusOK {
		t.Fatalf("%d %s", status, text)
	}
	if _, got := a.get(t, "named"); got != "three" {
		t.Errorf("named: %q", got)
	}
	for name, files := range map[string][][2]string{"none": nil, "twice": {{"a", "1"}, {"./a", "2"}}, "no name": {{"", "x"}}} {
		body, ct := multipartBody(t, files...)
		if status, text := a.do(t, "POST", "/files", body, tokenHeader, testToken, "Content-Type", ct); status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", name, status, text)
		}
	}
	body, ct = multipartBody(t, [2]string{"cut", strings.Repeat("z", 1000)})
	status, text = a.do(t, "POST", "/files", bytes.NewReader(body.Bytes()[:500]), tokenHeader, testToken, "Content-Type", ct)
	if status != http.StatusBadRequest {
		t.Errorf("cut: %d %s", status, text)
	}
	if _, err := os.Stat(filepath.Join(a.home, "cut")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("cut: something is left: %v", err)
	}
}

func TestFileRefusals(t *testing.T) {
	a := confirmed(t)
	writeFile(t, filepath.Join(a.home, "file"), "x")
	if err := unix.Mkfifo(filepath.Join(a.home, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		path      string
		get, post int
	}{
		"directory":    {".", 400, 400},
		"pipe":         {"pipe", 400, 400},
		"device":       {"/dev/zero", 400, 400},
		"none":         {"", 400, 400},
		"NUL":          {"a\x00", 400, 400},
		"long":         {strings.Repeat("a/", 3000), 400, 400},
		"under a file": {"file/x", 400, 400},
		"missing":      {"missing", 404, 200},
	} {
		if status, text := a.get(t, tc.path); status != tc.get || !strings.Contains(text, fmt.Sprintf(`"code":%d`, tc.get)) {
			t.Errorf("get, %s: %d %s", name, status, text)
		}
		if status, text := a.post(t, tc.path, "y"); status != tc.post {
			t.Errorf("post, %s: %d %s", name, status, text)
		}
	}
	for _, ct := range []string{"", "text/plain", "multipart/form-data", "///"} {
		if status, text := a.post(t, "f", "x", "Content-Type", ct); status != http.StatusBadRequest {
			t.Errorf("Content-Type %q: %d %s", ct, status, text)
		}
	}
	if status, text := a.do(t, "GET", "/files?path=file&username=ghost", nil, tokenHeader, testToken); status != 401 || !strings.Contains(text, "invalid username: 'ghost'") {
		t.Errorf("unknown user: %d %s", status, text)
	}
	if status, _ := a.do(t, "DELETE", "/files?path=file", nil, tokenHeader, testToken); status != http.StatusMethodNotAllowed {
		t.Errorf("DELETE: %d", status)
	}
}

func TestNoSpace(t *testing.T) {
	a := confirmed(t)
	writeFile(t, filepath.Join(a.home, "f"), "old")
	// The length alone decides; the body is never sent.
	conn := a.dial(t)
	fmt.Fprintf(conn, "POST /files?path=f HTTP/1.1\r\nHost: x\r\n%s: %s\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\nfirst",
		tokenHeader, testToken, int64(1)<<60)
	buf := make([]byte, 4096)
	n, _ := conn.Read(buf)
	if !strings.HasPrefix(string(buf[:n]), "HTTP/1.1 507 ") {
		t.Errorf("answer %q", buf[:n])
	}
	if b, _ := os.ReadFile(filepath.Join(a.home, "f")); string(b) != "old" {
		t.Errorf("the file is %q", b)
	}
}

// Who sends a refused upload to its end reads why it was refused.
func TestARefusedUploadIsTakenToItsEnd(t *testing.T) {
	a := confirmed(t)
	conn := a.dial(t)
	const size = 32 << 20
	fmt.Fprintf(conn, "POST /files?path=%s HTTP/1.1\r\nHost: x\r\n%s: %s\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n",
		a.home, tokenHeader, testToken, size)
	if n, err := io.CopyN(conn, zeros{}, size); err != nil {
		t.Fatalf("after %d bytes: %v", n, err)
	}
	buf := make([]byte, 4096)
	n, err := conn.Read(buf)
	if !strings.HasPrefix(string(buf[:n]), "HTTP/1.1 400 ") {
		t.Errorf("answer %q, %v", buf[:n], err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// An upload that breaks off leaves no new file.
func TestUploadCut(t *testing.T) {
	a := confirmed(t)
	conn := a.dial(t)
	fmt.Fprintf(conn, "POST /files?path=new HTTP/1.1\r\nHost: x\r\n%s: %s\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\nfirst",
		tokenHeader, testToken)
	path := filepath.Join(a.home, "new")
	eventually(t, "the file is begun", func() bool {
		fi, err := os.Stat(path)
		return err == nil && fi.Size() == 5
	})
	_ = conn.Close()
	eventually(t, "the file is gone", func() bool {
		_, err := os.Stat(path)
		return errors.Is(err, os.ErrNotExist)
	})
}

// Writing over a file keeps what it is: its inode, and who links to it.
func TestOverwriteInPlace(t *testing.T) {
	a := confirmed(t)
	file, link := filepath.Join(a.home, "f"), filepath.Join(a.home, "l")
	writeFile(t, file, "a longer text than the next")
	if err := os.Chmod(file, 0o751); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("f", link); err != nil {
		t.Fatal(err)
	}
	before, _ := os.Stat(file)
	if status, text := a.post(t, "l", "short"); status != http.StatusOK {
		t.Fatalf("%d %s", status, text)
	}
	after, err := os.Stat(file)
	if err != nil || !os.SameFile(before, after) || after.Mode() != before.Mode() || after.Size() != 5 {
		t.Errorf("%v %v", after, err)
	}
}

func TestMetadata(t *testing.T) {
	a := confirmed(t)
	if err := unix.Setxattr(a.home, "user.probe", []byte("x"), 0); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("the file system of %s has no extended attributes", a.home)
	}
	meta := func() map[string]string {
		t.Helper()
		r, err := a.filesystem().Stat(t.Context(), connect.NewRequest(&pb.StatRequest{Path: "f"}))
		if err != nil {
			t.Fatal(err)
		}
		return r.Msg.GetEntry().GetMetadata()
	}
	status, text := a.post(t, "f", "x", "X-Metadata-Author", "me", "X-Metadata-long-key", "1 2")
	if status != http.StatusOK || !strings.Contains(text, `"metadata":{"author":"me","long-key":"1 2"}`) {
		t.Fatalf("%d %s", status, text)
	}
	if got := fmt.Sprint(meta()); got != "map[author:me long-key:1 2]" {
		t.Errorf("metadata %s", got)
	}
	if status, text := a.post(t, "f", "y", "X-Metadata-Author", "you"); status != http.StatusOK {
		t.Fatalf("%d %s", status, text)
	}
	if got := fmt.Sprint(meta()); got != "map[author:you]" {
		t.Errorf("after an overwrite: %s", got)
	}
	a.post(t, "f", "z")
	if got := meta(); len(got) != 0 {
		t.Errorf("after a plain overwrite: %v", got)
	}
	if status, text := a.post(t, "g", "x", "X-Metadata-k", strings.Repeat("v", maxMetadataValue+1)); status != http.StatusBadRequest {
		t.Errorf("a long value: %d %s", status, text)
	}
}

// counted is a reader of n generated bytes.
type counted struct {
	left int
	sum  hash.Hash
}

func (c *counted) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p), c.left)
	for i := range p[:n] {
		p[i] = byte((c.left - i) * 7 >> 3)
	}
	c.left -= n
	c.sum.Write(p[:n])
	return n, nil
}

func TestLargeFile(t *testing.T) {
	a := confirmed(t)
	const size = 64 << 20
	src := &counted{size, sha256.New()}
	status, text := a.do(t, "POST", "/files?path=big", io.NopCloser(src), tokenHeader, testToken, "Content-Type", "application/octet-stream")
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, text)
	}
	res := a.doRaw(t, "GET", "/files?path=big", nil, tokenHeader, testToken, "Accept-Encoding", "identity")
	defer res.Body.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, res.Body)
	if err != nil || n != size || !bytes.Equal(sum.Sum(nil), src.sum.Sum(nil)) {
		t.Errorf("%d bytes, %v, equal: %v", n, err, bytes.Equal(sum.Sum(nil), src.sum.Sum(nil)))
	}
}

func TestTwoHundredAtOnce(t *testing.T) {
	a := confirmed(t)
	c := a.filesystem()
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			name := fmt.Sprintf("dir%d/file", i%10)
			if _, err := c.Stat(t.Context(), connect.NewRequest(&pb.StatRequest{Path: "/"})); err != nil {
				t.Error(err)
			}
			req, _ := http.NewRequestWithContext(t.Context(), "POST", a.http.URL+"/files?path="+name, strings.NewReader("x"))
			req.Header.Set(tokenHeader, testToken)
			req.Header.Set("Content-Type", "application/octet-stream")
			res, err := a.http.Client().Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			_ = res.Body.Close()
			if res.StatusCode != http.StatusOK {
				t.Errorf("%s: %d", name, res.StatusCode)
			}
		})
	}
	wg.Wait()
}
