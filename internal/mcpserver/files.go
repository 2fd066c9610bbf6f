package mcpserver

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"git.omukk.dev/wrenn/sandbox/client"
)

const (
	defaultRead, maxRead = 64 << 10, 1 << 20
	// maxWrite bounds what write_file takes, in bytes.
	maxWrite = 4 << 20
	// maxEntries and maxNames (bytes) bound a list: names are the guest's.
	maxEntries, maxNames = 1000, 128 << 10
	maxDepth             = 8
	encUTF8              = "utf-8"
	encBase64            = "base64"
)

type fileInput struct {
	ID   string `json:"sandbox_id" jsonschema:"as create_sandbox or list_sandboxes gave it"`
	Path string `json:"path" jsonschema:"absolute, or from the user's home"`
	User string `json:"user,omitempty" jsonschema:"user to act as, such as root; default user"`
}

type readInput struct {
	fileInput
	Offset   int64 `json:"offset,omitempty" jsonschema:"byte to begin at; default 0"`
	MaxBytes int   `json:"max_bytes,omitempty" jsonschema:"read at most so many bytes; default 65536, greatest 1048576"`
}

type readOutput struct {
	Content    string `json:"content"`
	Encoding   string `json:"encoding" jsonschema:"utf-8, or base64 where the bytes are no text"`
	Size       int64  `json:"size,omitempty" jsonschema:"of the whole file, in bytes"`
	NextOffset int64  `json:"next_offset,omitempty" jsonschema:"present when there is more: pass it as offset"`
}

type writeInput struct {
	fileInput
	Content  string `json:"content"`
	Encoding string `json:"encoding,omitempty" jsonschema:"how content is given: utf-8 (default) or base64"`
	Mode     string `json:"mode,omitempty" jsonschema:"permission bits in octal, such as 755; default 644"`
}

type writeOutput struct {
	Path  string `json:"path"`
	Bytes int    `json:"bytes"`
}

type listFilesInput struct {
	fileInput
	Depth int `json:"depth,omitempty" jsonschema:"levels of directories to go down; default 1, greatest 8"`
}

type fileEntry struct {
	Path       string    `json:"path"`
	Type       string    `json:"type" jsonschema:"file, dir, symlink or other"`
	Size       int64     `json:"size"`
	Mode       string    `json:"mode"`
	ModifiedAt time.Time `json:"modified_at,omitzero"`
	LinksTo    string    `json:"links_to,omitempty"`
}

type listFilesOutput struct {
	Entries []fileEntry `json:"entries"`
	LeftOut int         `json:"left_out,omitempty" jsonschema:"so many more are there; list a directory below"`
}

func (t *tools) addFiles(s *mcp.Server) {
	add(s, "read_file", reads, "Read a file of a running sandbox, or a part of it.", t.read)
	add(s, "write_file", destroys,
		"Write a file in a running sandbox, and the directories above it. A file that exists is replaced.", t.write)
	add(s, "list_files", reads, "List a directory of a running sandbox.", t.listFiles)
}

func (t *tools) read(ctx context.Context, in readInput) (readOutput, error) {
	if in.MaxBytes == 0 {
		in.MaxBytes = defaultRead
	}
	if in.MaxBytes < 1 || in.MaxBytes > maxRead {
		return readOutput{}, refuse("max_bytes %d: must be from 1 to %d; read the rest from next_offset", in.MaxBytes, maxRead)
	}
	if in.Offset < 0 {
		return readOutput{}, refuse("offset %d: must not be negative", in.Offset)
	}
	f, err := t.c.GetFile(ctx, in.ID, in.Path, in.User)
	if err != nil {
		return readOutput{}, err
	}
	defer f.Close()
	if n, err := io.CopyN(io.Discard, f, in.Offset); err != nil {
		if errors.Is(err, io.EOF) {
			return readOutput{}, refuse("offset %d: is behind the end; the file has %d bytes", in.Offset, n)
		}
		return readOutput{}, fmt.Errorf("read %s: %w", in.Path, err)
	}
	data, err := io.ReadAll(io.LimitReader(f, int64(in.MaxBytes)+1))
	if err != nil {
		return readOutput{}, fmt.Errorf("read %s: %w", in.Path, err)
	}
	more := len(data) > in.MaxBytes
	if more {
		data = wholeRunes(data[:in.MaxBytes])
	}
	out := readOutput{Content: string(data), Encoding: encUTF8, Size: max(f.Size, 0)}
	if !utf8.Valid(data) {
		out.Content, out.Encoding = base64.StdEncoding.EncodeToString(data), encBase64
	}
	if more {
		out.NextOffset = in.Offset + int64(len(data))
	}
	return out, nil
}

// wholeRunes drops a character that was cut in the middle, so that text stays
// text.
func wholeRunes(p []byte) []byte {
	for n := 1; n < utf8.UTFMax && n < len(p); n++ {
		if q := p[len(p)-n:]; utf8.RuneStart(q[0]) {
			if !utf8.FullRune(q) {
				return p[:len(p)-n]
			}
			break
		}
	}
	return p
}

func (t *tools) write(ctx context.Context, in writeInput) (writeOutput, error) {
	data := []byte(in.Content)
	switch in.Encoding {
	case "", encUTF8:
	case encBase64:
		var err error
		if data, err = base64.StdEncoding.DecodeString(in.Content); err != nil {
			return writeOutput{}, refuse("content: is no base64 (%v)", err)
		}
	default:
		return writeOutput{}, refuse("encoding %.40q: must be utf-8 or base64", in.Encoding)
	}
	if len(data) > maxWrite {
		return writeOutput{}, refuse("content: has %d bytes, at most %d; let the sandbox fetch it with run_command, or write parts and join them", len(data), maxWrite)
	}
	mode, err := strconv.ParseUint(strings.TrimPrefix(in.Mode, "0o"), 8, 12)
	if in.Mode == "" {
		mode, err = 0, nil
	}
	if err != nil {
		return writeOutput{}, refuse("mode %.40q: must be octal, such as 644 or 755", in.Mode)
	}
	o := client.PutOptions{Size: int64(len(data)), Mode: uint32(mode), User: in.User}
	if err := t.c.PutFile(ctx, in.ID, in.Path, bytes.NewReader(data), o); err != nil {
		return writeOutput{}, err
	}
	return writeOutput{Path: in.Path, Bytes: len(data)}, nil
}

func (t *tools) listFiles(ctx context.Context, in listFilesInput) (listFilesOutput, error) {
	if in.Depth == 0 {
		in.Depth = 1
	}
	if in.Depth < 1 || in.Depth > maxDepth {
		return listFilesOutput{}, refuse("depth %d: must be from 1 to %d", in.Depth, maxDepth)
	}
	entries, err := t.c.ListFiles(ctx, in.ID, in.Path, client.ListFilesOptions{User: in.User, Depth: in.Depth})
	if err != nil {
		return listFilesOutput{}, err
	}
	out := listFilesOutput{Entries: []fileEntry{}}
	names := 0
	for i, e := range entries {
		names += len(e.Path) + len(e.SymlinkTarget)
		if i == maxEntries || names > maxNames {
			out.LeftOut = len(entries) - i
			break
		}
		out.Entries = append(out.Entries, fileEntry{Path: e.Path, Type: e.Type, Size: e.Size,
			Mode: fmt.Sprintf("%04o", e.Mode), ModifiedAt: e.ModifiedAt, LinksTo: e.SymlinkTarget})
	}
	return out, nil
}
