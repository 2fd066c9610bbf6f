package rootfs

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Where the new root is made.
const (
	stage   = "/.wrenn-new"
	NewRoot = stage + "/root"
)

// maxEntries bounds one layer.
const maxEntries = 500_000

// Unpacked counts what was done with a layer.
type Unpacked struct{ Entries, Devices int }

// Unpack applies a layer to the directory root. The process has root as its "/"
// from then on.
func Unpack(root string, layer io.Reader) (Unpacked, error) {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return Unpacked{}, fmt.Errorf("make the new root: %w", err)
	}
	if err := enter(root); err != nil {
		return Unpacked{}, err
	}
	unix.Umask(0)
	u := &unpacker{made: map[string]bool{}, buf: make([]byte, 1<<20)}
	in := tar.NewReader(layer)
	for {
		h, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return u.n, fmt.Errorf("read the layer: %w", err)
		}
		if u.n.Entries++; u.n.Entries > maxEntries {
			return u.n, fmt.Errorf("the layer has more than %d entries", maxEntries)
		}
		if err := u.entry(h, in); err != nil {
			return u.n, fmt.Errorf("entry %.200q: %w", h.Name, explain(err))
		}
	}
	u.setTimes()
	// The sender wants to be read to its end, padding included.
	if _, err := io.Copy(io.Discard, layer); err != nil {
		return u.n, fmt.Errorf("read the layer to its end: %w", err)
	}
	return u.n, nil
}

func explain(err error) error {
	if errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("the image does not fit on the sandbox's disk: %w", err)
	}
	return err
}

// enter makes a directory this process's "/".
func enter(root string) error {
	if err := unix.Chroot(root); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	return os.Chdir("/")
}

type unpacker struct {
	n Unpacked
	// made are the paths of this layer, which its own whiteouts do not take away.
	made map[string]bool
	dirs []dirTime
	buf  []byte
}

// dirTime is set at the end: what is made in a directory changes it.
type dirTime struct {
	path string
	at   time.Time
}

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	metadata = ".wh..wh."
)

func (u *unpacker) entry(h *tar.Header, in io.Reader) error {
	p := path.Clean("/" + h.Name)
	dir, base := path.Split(p)
	switch {
	case p == "/":
		return nil // its owner and mode are ours to say
	case base == opaque:
		return u.clear(path.Clean(dir))
	case strings.HasPrefix(base, metadata):
		return nil
	case strings.HasPrefix(base, whiteout):
		return u.whiteOut(dir, base[len(whiteout):])
	}
	if err := u.parents(path.Clean(dir)); err != nil {
		return err
	}
	u.made[p] = true
	if err := u.replace(p, h); err != nil {
		return err
	}
	return u.create(p, h, in)
}

// whiteOut removes what a lower layer has under a name.
func (u *unpacker) whiteOut(dir, name string) error {
	if name == "" || name == "." || name == ".." {
		return errors.New("is no valid whiteout")
	}
	p := path.Join(dir, name)
	if u.made[p] {
		return nil
	}
	return os.RemoveAll(p)
}

// clear removes what lower layers have in a directory.
func (u *unpacker) clear(dir string) error {
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range list {
		p := path.Join(dir, e.Name())
		switch {
		case !u.made[p]:
			err = os.RemoveAll(p)
		case e.IsDir():
			err = u.clear(p)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// parents makes the directories above an entry that the layer does not name.
func (u *unpacker) parents(dir string) error {
	if dir == "/" || u.made[dir] {
		return nil
	}
	for d := dir; d != "/"; d = path.Dir(d) {
		u.made[d] = true
	}
	return os.MkdirAll(dir, 0o755)
}

// replace removes what is under a name; a directory stays for a directory.
func (u *unpacker) replace(p string, h *tar.Header) error {
	fi, err := os.Lstat(p)
	if errors.Is(err, fs.ErrNotExist) || err == nil && fi.IsDir() && h.Typeflag == tar.TypeDir {
		return nil
	}
	if err != nil {
		return err
	}
	return os.RemoveAll(p)
}

func (u *unpacker) create(p string, h *tar.Header, in io.Reader) (err error) {
	switch h.Typeflag {
	case tar.TypeDir:
		if err = os.Mkdir(p, 0o755); errors.Is(err, fs.ErrExist) {
			err = nil
		}
		u.dirs = append(u.dirs, dirTime{p, h.ModTime})
	case tar.TypeReg:
		err = u.file(p, in)
	case tar.TypeSymlink:
		err = os.Symlink(h.Linkname, p)
	case tar.TypeLink:
		// Its owner and mode are the other's, which has them already.
		return os.Link(path.Clean("/"+h.Linkname), p)
	case tar.TypeFifo:
		err = unix.Mkfifo(p, 0o600)
	case tar.TypeChar, tar.TypeBlock:
		u.n.Devices++
		return nil
	default:
		return fmt.Errorf("has the type %q, which is not known", h.Typeflag)
	}
	if err != nil {
		return err
	}
	return u.attributes(p, h)
}

func (u *unpacker) file(p string, in io.Reader) (err error) {
	f, err := os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// Without the wrapper the file would read for itself, in small pieces.
	_, err = io.CopyBuffer(struct{ io.Writer }{f}, in, u.buf)
	return err
}

// attributes sets owner, mode, extended attributes and time, in the order in
// which one does not undo another.
func (u *unpacker) attributes(p string, h *tar.Header) error {
	if err := os.Lchown(p, h.Uid, h.Gid); err != nil {
		return err
	}
	link := h.Typeflag == tar.TypeSymlink
	if !link {
		if err := unix.Chmod(p, uint32(h.Mode&0o7777)); err != nil {
			return err
		}
	}
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, "SCHILY.xattr.")
		if !ok || !strings.HasPrefix(name, "user.") && name != "security.capability" {
			continue
		}
		if err := unix.Lsetxattr(p, name, []byte(v), 0); err != nil {
			return fmt.Errorf("set %.80s: %w", name, err)
		}
	}
	if h.Typeflag == tar.TypeDir {
		return nil
	}
	return setTime(p, h.ModTime)
}

func setTime(p string, at time.Time) error {
	t := unix.NsecToTimespec(at.UnixNano())
	return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW)
}

// setTimes sets those of directories, as far as they are still there.
func (u *unpacker) setTimes() {
	for _, d := range u.dirs {
		_ = setTime(d.path, d.at)
	}
}
