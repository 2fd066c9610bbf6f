package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/filesystem"
)

// xattrPrefix is where the metadata of an upload is kept.
const xattrPrefix = "user.e2b."

// lister makes EntryInfo values; it reads the user database once.
type lister struct {
	users, groups map[uint32]string
}

func (s *Server) newLister() *lister {
	l := &lister{}
	l.users, l.groups = s.accounts.names()
	return l
}

// entry describes a path without following a link at its end, except for the
// type and the permission bits, which are those of what it leads to.
func (l *lister) entry(path string) (*pb.EntryInfo, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, pathError(path, err)
	}
	return l.describe(path, fi), nil
}

func (l *lister) describe(path string, fi fs.FileInfo) *pb.EntryInfo {
	e := &pb.EntryInfo{
		Name:         filepath.Base(path),
		Path:         path,
		Type:         fileType(fi.Mode()),
		Size:         fi.Size(),
		Mode:         uint32(fi.Mode().Perm()),
		Permissions:  fi.Mode().String(),
		ModifiedTime: timestamppb.New(fi.ModTime()),
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		e.Owner, e.Group = nameOf(l.users, st.Uid), nameOf(l.groups, st.Gid)
	}
	if fi.Mode()&fs.ModeSymlink != 0 {
		if target, err := filepath.EvalSymlinks(path); err == nil {
			e.SymlinkTarget = &target
			if ti, err := os.Stat(target); err == nil {
				e.Type, e.Mode = fileType(ti.Mode()), uint32(ti.Mode().Perm())
			}
		} else if target, err := os.Readlink(path); err == nil {
			e.SymlinkTarget = &target
		}
	}
	if fi.Mode().IsRegular() {
		e.Metadata = readMetadata(path)
	}
	return e
}

func nameOf(names map[uint32]string, id uint32) string {
	if n, ok := names[id]; ok {
		return n
	}
	return strconv.FormatUint(uint64(id), 10)
}

func fileType(m fs.FileMode) pb.FileType {
	switch {
	case m.IsRegular():
		return pb.FileType_FILE_TYPE_FILE
	case m.IsDir():
		return pb.FileType_FILE_TYPE_DIRECTORY
	case m&fs.ModeSymlink != 0:
		return pb.FileType_FILE_TYPE_SYMLINK
	default:
		return pb.FileType_FILE_TYPE_UNSPECIFIED
	}
}

// pathError gives a file-system error the code that clients tell apart.
func pathError(path string, err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, fs.ErrNotExist):
		code = connect.CodeNotFound
	case errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENOTEMPTY):
		code = connect.CodeAlreadyExists
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		code = connect.CodePermissionDenied
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		code = connect.CodeResourceExhausted
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ENAMETOOLONG),
		errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.EINVAL):
		code = connect.CodeInvalidArgument
	case errors.Is(err, syscall.EBUSY), errors.Is(err, syscall.ETXTBSY), errors.Is(err, syscall.EXDEV):
		code = connect.CodeFailedPrecondition
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		err = errno // without the names of temporary or internal paths
	}
	return connect.NewError(code, fmt.Errorf("path '%s': %w", clip(path), err))
}

// makeDirs makes a directory and its missing parents, all of them the user's.
// Existing ones are left as they are.
func makeDirs(path string, u account) error {
	var missing []string
	for p := path; ; p = filepath.Dir(p) {
		fi, err := os.Stat(p)
		if err == nil {
			if !fi.IsDir() {
				return invalidf("path '%s' is not a directory", clip(p))
			}
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return pathError(p, err)
		}
		missing = append(missing, p)
	}
	for i := len(missing) - 1; i >= 0; i-- {
		p := missing[i]
		if err := os.Mkdir(p, 0o755); err != nil {
			if errors.Is(err, fs.ErrExist) {
				continue // somebody else was as fast
			}
			return pathError(p, err)
		}
		if err := own(p, u); err != nil {
			return err
		}
	}
	return nil
}

// own gives a new file to the user.
func own(path string, u account) error {
	if os.Geteuid() != 0 {
		return nil
	}
	if err := os.Lchown(path, int(u.uid), int(u.gid)); err != nil {
		return pathError(path, err)
	}
	return nil
}

// readMetadata returns the metadata of a file; a file system without extended
// attributes has none.
func readMetadata(path string) map[string]string {
	n, err := unix.Llistxattr(path, nil)
	if err != nil || n == 0 {
		return nil
	}
	list := make([]byte, n)
	if n, err = unix.Llistxattr(path, list); err != nil {
		return nil
	}
	var out map[string]string
	for name := range strings.SplitSeq(string(list[:n]), "\x00") {
		key, ok := strings.CutPrefix(name, xattrPrefix)
		if !ok || key == "" {
			continue
		}
		value := make([]byte, maxMetadataValue)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[key] = strings.ToValidUTF8(string(value[:n]), "�")
	}
	return out
}

// writeMetadata replaces a file's metadata.
func writeMetadata(f *os.File, path string, md map[string]string) error {
	for key := range readMetadata(path) {
		if _, keep := md[key]; !keep {
			if err := unix.Fremovexattr(int(f.Fd()), xattrPrefix+key); err != nil && !errors.Is(err, unix.ENODATA) {
				return pathError(path, fmt.Errorf("removing metadata: %w", err))
			}
		}
	}
	for key, value := range md {
		err := unix.Fsetxattr(int(f.Fd()), xattrPrefix+key, []byte(value), 0)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("path '%s': this file system has no metadata", clip(path)))
		}
		if err != nil {
			return pathError(path, fmt.Errorf("writing metadata: %w", err))
		}
	}
	return nil
}
