package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/filesystem"
	"git.omukk.dev/wrenn/sandbox/internal/gen/filesystem/filesystemconnect"
)

const (
	// maxDepth and maxEntries bound one ListDir.
	maxDepth   = 256
	maxEntries = 100_000
)

// filesystemService is filesystem.Filesystem.
type filesystemService struct{ s *Server }

var _ filesystemconnect.FilesystemHandler = filesystemService{}

// resolve is the user of a call and the absolute form of a path it names.
func (f filesystemService) resolve(req connect.AnyRequest, field, path string) (account, string, error) {
	u, err := f.s.callUser("", req.Header())
	if err != nil {
		return account{}, "", err
	}
	p, err := resolvePath(field, path, u.home, u)
	return u, p, err
}

func (f filesystemService) Stat(_ context.Context, req *connect.Request[pb.StatRequest]) (*connect.Response[pb.StatResponse], error) {
	_, path, err := f.resolve(req, "path", req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	e, err := f.s.newLister().entry(path)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.StatResponse{Entry: e}), nil
}

func (f filesystemService) MakeDir(_ context.Context, req *connect.Request[pb.MakeDirRequest]) (*connect.Response[pb.MakeDirResponse], error) {
	u, path, err := f.resolve(req, "path", req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if fi, err := os.Stat(path); err == nil {
		if fi.IsDir() {
			return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("directory already exists: %s", clip(path)))
		}
		return nil, invalidf("path already exists but it is not a directory: %s", clip(path))
	}
	if err := makeDirs(path, u); err != nil {
		return nil, err
	}
	e, err := f.s.newLister().entry(path)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.MakeDirResponse{Entry: e}), nil
}

func (f filesystemService) Move(_ context.Context, req *connect.Request[pb.MoveRequest]) (*connect.Response[pb.MoveResponse], error) {
	if req.Msg.GetSource() == "" || req.Msg.GetDestination() == "" {
		return nil, invalidf("source and destination must be given")
	}
	u, src, err := f.resolve(req, "source", req.Msg.GetSource())
	if err != nil {
		return nil, err
	}
	dst, err := resolvePath("destination", req.Msg.GetDestination(), "", u)
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(src); err != nil {
		return nil, pathError(src, err)
	}
	if err := makeDirs(filepath.Dir(dst), u); err != nil {
		return nil, err
	}
	if err := os.Rename(src, dst); err != nil {
		return nil, pathError(dst, err)
	}
	e, err := f.s.newLister().entry(dst)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.MoveResponse{Entry: e}), nil
}

func (f filesystemService) Remove(_ context.Context, req *connect.Request[pb.RemoveRequest]) (*connect.Response[pb.RemoveResponse], error) {
	if req.Msg.GetPath() == "" {
		return nil, invalidf("path: missing")
	}
	_, path, err := f.resolve(req, "path", req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if path == "/" {
		return nil, invalidf("path: the root directory cannot be removed")
	}
	if err := os.RemoveAll(path); err != nil {
		return nil, pathError(path, err)
	}
	return connect.NewResponse(&pb.RemoveResponse{}), nil
}

func (f filesystemService) ListDir(ctx context.Context, req *connect.Request[pb.ListDirRequest]) (*connect.Response[pb.ListDirResponse], error) {
	_, path, err := f.resolve(req, "path", req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	depth := int(min(req.Msg.GetDepth(), maxDepth+1))
	if depth > maxDepth {
		return nil, invalidf("depth: %d is more than %d", req.Msg.GetDepth(), maxDepth)
	}
	root, err := checkDir(path)
	if err != nil {
		return nil, err
	}
	res := &pb.ListDirResponse{}
	l := f.s.newLister()
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, werr error) error {
		if ctx.Err() != nil {
			return contextError(ctx)
		}
		if p == root {
			return werr
		}
		// What goes away while it is being listed is not there, and neither is
		// what is under it.
		if werr != nil {
			return nil
		}
		rel := p[len(strings.TrimSuffix(root, "/"))+1:]
		if fi, err := d.Info(); err == nil {
			if len(res.Entries) == maxEntries {
				return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("'%s' has more than %d entries", clip(path), maxEntries))
			}
			res.Entries = append(res.Entries, l.describe(filepath.Join(path, rel), fi))
		}
		if d.IsDir() && strings.Count(rel, "/")+1 >= max(depth, 1) {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		var ce *connect.Error
		if errors.As(err, &ce) {
			return nil, ce
		}
		return nil, pathError(path, err)
	}
	return connect.NewResponse(res), nil
}

// checkDir returns the directory that path is or leads to.
func checkDir(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", pathError(path, err)
	}
	fi, err := os.Stat(real)
	if err != nil {
		return "", pathError(path, err)
	}
	if !fi.IsDir() {
		return "", invalidf("path is not a directory: %s", clip(path))
	}
	return real, nil
}
