package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// FileEntry describes one file of a sandbox.
type FileEntry struct {
	Name string `json:"name"`
	Path string `json:"path"`
	// Type is one of the FileType constants. Type and Mode of a link are those
	// of what it leads to; FileTypeSymlink is a link that leads nowhere.
	Type string `json:"type"`
	// Size is in bytes; of a link, its own.
	Size int64 `json:"size"`
	// Mode holds the permission bits.
	Mode       uint32    `json:"mode"`
	Owner      string    `json:"owner,omitempty"`
	Group      string    `json:"group,omitempty"`
	ModifiedAt time.Time `json:"modified_at,omitzero"`
	// SymlinkTarget is where a link leads; empty: it is no link.
	SymlinkTarget string `json:"symlink_target,omitempty"`
}

// Types of a FileEntry.
const (
	FileTypeFile    = "file"
	FileTypeDir     = "dir"
	FileTypeSymlink = "symlink"
	FileTypeOther   = "other"
)

// PutOptions says how a file is written.
type PutOptions struct {
	// Size is the number of bytes that will come; 0 when not known. A reader
	// that gives fewer makes the call fail; what it has beyond is not read, so
	// that a growing file is copied as it was when its size was taken.
	Size int64
	// Mode holds the permission bits; 0 means 0644.
	Mode uint32
	// User owns the file; empty means the template's default user.
	User string
}

func (c *Client) fileURL(id, op, path string, extra url.Values) (string, error) {
	if err := checkID(id); err != nil {
		return "", err
	}
	if path == "" || strings.ContainsRune(path, 0) {
		return "", invalid("path %q: must not be empty and must not hold a NUL", path)
	}
	q := url.Values{"path": {path}}
	for k, v := range extra {
		q[k] = v
	}
	if op == "" {
		return c.sandboxURL(q, id, "files"), nil
	}
	return c.sandboxURL(q, id, "files", op), nil
}

// File is the content of a file on its way from a sandbox.
type File struct {
	io.ReadCloser
	// Size is in bytes; negative when the server did not say.
	Size int64
	// Mode holds the permission bits; 0 when the server did not say.
	Mode uint32
}

// GetFile opens a file for reading as a user (empty: the template's default);
// the caller closes it. A transfer that is cut short makes Read fail, with
// something other than io.EOF.
func (c *Client) GetFile(ctx context.Context, id, path, user string) (*File, error) {
	u, err := c.fileURL(id, "", path, userQuery(user))
	if err != nil {
		return nil, err
	}
	res, err := c.send(ctx, http.MethodGet, u, nil)
	if err != nil {
		return nil, err
	}
	f := &File{ReadCloser: res.Body, Size: res.ContentLength}
	if m, err := strconv.ParseUint(res.Header.Get(headerMode), 8, 12); err == nil {
		f.Mode = uint32(m)
	}
	return f, nil
}

// headerMode carries a file's permission bits in octal.
const headerMode = "X-File-Mode"

func userQuery(user string) url.Values {
	if user == "" {
		return nil
	}
	return url.Values{"user": {user}}
}

// PutFile creates or replaces a file with what r gives until io.EOF. After a
// failure r may be read once more for a moment, so do not use it again. The end
// of ctx does not interrupt a Read of r that has begun: it is waited for.
func (c *Client) PutFile(ctx context.Context, id, path string, r io.Reader, o PutOptions) error {
	q := url.Values{}
	if o.Mode != 0 {
		if o.Mode > 0o7777 {
			return invalid("mode %o: must be at most 7777", o.Mode)
		}
		q.Set("mode", strconv.FormatUint(uint64(o.Mode), 8))
	}
	if o.User != "" {
		q.Set("user", o.User)
	}
	u, err := c.fileURL(id, "", path, q)
	if err != nil {
		return err
	}
	if o.Size < 0 {
		return invalid("size %d: must not be negative", o.Size)
	}
	if o.Size > 0 {
		r = io.LimitReader(r, o.Size)
	}
	// NopCloser: the transport must not close the caller's reader.
	req, err := c.newRequest(ctx, http.MethodPut, u, io.NopCloser(r))
	if err != nil {
		return err
	}
	req.ContentLength = o.Size // 0 with a body means that the length is not known
	req.Header.Set("Content-Type", "application/octet-stream")
	// A refusal then comes before the body is sent, not as a broken pipe in
	// the middle of it.
	req.Header.Set("Expect", "100-continue")
	res, err := c.do(req)
	if err != nil {
		return err
	}
	_, _ = io.CopyN(io.Discard, res.Body, maxErrorBody)
	return res.Body.Close()
}

// DeleteFile removes a file or a directory with all it holds, as a user
// (empty: the template's default).
func (c *Client) DeleteFile(ctx context.Context, id, path, user string) error {
	u, err := c.fileURL(id, "", path, userQuery(user))
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodDelete, u, nil, nil)
}

// ListFilesOptions says how a directory is listed.
type ListFilesOptions struct {
	// Depth is how many levels down; 0 means 1.
	Depth int
	// User lists it; empty means the template's default user.
	User string
}

// ListFiles lists a directory.
func (c *Client) ListFiles(ctx context.Context, id, path string, o ListFilesOptions) ([]FileEntry, error) {
	if o.Depth < 0 {
		return nil, invalid("depth %d: must not be negative", o.Depth)
	}
	q := url.Values{}
	if o.User != "" {
		q.Set("user", o.User)
	}
	if o.Depth > 0 {
		q.Set("depth", strconv.Itoa(o.Depth))
	}
	u, err := c.fileURL(id, "list", path, q)
	if err != nil {
		return nil, err
	}
	var out struct {
		Entries []FileEntry `json:"entries"`
	}
	if err := c.call(ctx, http.MethodGet, u, nil, &out); err != nil {
		return nil, fmt.Errorf("listing %s: %w", path, err)
	}
	return out.Entries, nil
}

// MakeDir creates a directory and those above it, as a user (empty: the
// template's default); one that exists is fine.
func (c *Client) MakeDir(ctx context.Context, id, path, user string) error {
	u, err := c.fileURL(id, "mkdir", path, userQuery(user))
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodPost, u, nil, nil)
}
