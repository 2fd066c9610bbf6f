package templatebuild

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// Bounds of uploaded files, in bytes.
const (
	maxUpload  = 2 << 30
	maxUploads = 8 << 30
	// uploadFor is how long a link may be used.
	uploadFor = time.Hour
)

// uploads keeps archives by template and hash: <dir>/<template>/<hash>. A file
// appears whole or not at all. Beyond maxUploads the oldest go.
type uploads struct {
	dir    string
	now    func() time.Time
	secret []byte // of the links; a new one with each start
	most   int64  // maxUpload
	mu     sync.Mutex
}

func openUploads(dir string, now func() time.Time) (*uploads, error) {
	u := &uploads{dir: dir, now: now, secret: make([]byte, 32), most: maxUpload}
	rand.Read(u.secret) // never fails
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// What an upload left that a crash cut off.
	old, err := filepath.Glob(filepath.Join(dir, "*", ".part-*"))
	for _, f := range old {
		err = errors.Join(err, os.Remove(f))
	}
	return u, err
}

// path is the file's; both parts have been checked, and are again.
func (u *uploads) path(template, hash string) (string, error) {
	if checkName("templateID", template) != nil || !hashRE.MatchString(hash) {
		return "", control.Invalid("hash", "must be 64 hex digits, of a template's files")
	}
	return filepath.Join(u.dir, template, hash), nil
}

func (u *uploads) has(template, hash string) bool {
	p, err := u.path(template, hash)
	if err != nil {
		return false
	}
	_, err = os.Stat(p)
	return err == nil
}

func (u *uploads) open(template, hash string) (*os.File, error) {
	p, err := u.path(template, hash)
	if err != nil {
		return nil, err
	}
	t := u.now()
	_ = os.Chtimes(p, t, t) // what is used is kept longest
	return os.Open(p)
}

func (u *uploads) remove(template string) {
	if checkName("", template) == nil {
		_ = os.RemoveAll(filepath.Join(u.dir, template)) // what stays is pruned by size
	}
}

// sign gives the right to upload one file until a time.
func (u *uploads) sign(template, hash string, until int64) string {
	m := hmac.New(sha256.New, u.secret)
	fmt.Fprintf(m, "%s/%s/%d", template, hash, until)
	return hex.EncodeToString(m.Sum(nil))
}

func (u *uploads) allowed(template, hash, until, signature string) bool {
	t, err := strconv.ParseInt(until, 10, 64)
	return err == nil && u.now().Unix() < t && hmac.Equal([]byte(signature), []byte(u.sign(template, hash, t)))
}

// put keeps what r gives.
func (u *uploads) put(template, hash string, r io.Reader) (err error) {
	p, err := u.path(template, hash)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(p), ".part-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	n, err := io.Copy(f, io.LimitReader(r, u.most+1))
	if err == nil && n > u.most {
		err = &control.Error{Code: control.CodeTooLarge, Message: fmt.Sprintf("the files of one COPY must have at most %d MiB; split it, or leave out what is not needed with .dockerignore", u.most>>20)}
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), p); err != nil {
		return err
	}
	return u.prune(p)
}

// prune removes the files that were not used for longest, but for the newest,
// until all together fit.
func (u *uploads) prune(keep string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	all, err := filepath.Glob(filepath.Join(u.dir, "*", "*"))
	if err != nil {
		return err
	}
	type file struct {
		path string
		at   time.Time
		size int64
	}
	var files []file
	var total int64
	for _, p := range all {
		if fi, err := os.Stat(p); err == nil {
			files = append(files, file{p, fi.ModTime(), fi.Size()})
			total += fi.Size()
		}
	}
	sort.Slice(files, func(i, j int) bool { return files[i].at.Before(files[j].at) })
	for _, f := range files {
		if total <= maxUploads {
			break
		}
		if f.path != keep && os.Remove(f.path) == nil {
			total -= f.size
		}
	}
	return nil
}
