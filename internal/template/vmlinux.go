package template

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// maxVmlinux bounds what a kernel may unpack to: Debian's has 45 MiB.
const maxVmlinux = 512 << 20

// payloads are the compressions of a kernel by their first bytes.
var payloads = []struct {
	name, magic string
	open        func(io.Reader) (io.Reader, error)
}{
	{"lz4", "\x02\x21\x4c\x18", func(r io.Reader) (io.Reader, error) { return lz4.NewReader(r), nil }},
	{"gzip", "\x1f\x8b\x08", func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
	{"xz", "\xfd7zXZ\x00", func(r io.Reader) (io.Reader, error) { return xz.NewReader(r) }},
	{"zstd", "\x28\xb5\x2f\xfd", func(r io.Reader) (io.Reader, error) { return zstd.NewReader(r) }},
}

// Vmlinux unpacks the ELF kernel that a bzImage holds: Firecracker boots
// nothing else.
func Vmlinux(bzImage []byte) ([]byte, error) {
	payload, err := kernelPayload(bzImage)
	if err != nil {
		return nil, err
	}
	for _, p := range payloads {
		if !bytes.HasPrefix(payload, []byte(p.magic)) {
			continue
		}
		// The build puts the unpacked size behind the stream.
		r, err := p.open(bytes.NewReader(payload[:len(payload)-4]))
		if err != nil {
			return nil, fmt.Errorf("the kernel's %s payload: %w", p.name, err)
		}
		want := int64(binary.LittleEndian.Uint32(payload[len(payload)-4:]))
		if want > maxVmlinux {
			return nil, fmt.Errorf("the kernel says that it unpacks to %d bytes; the limit is %d", want, int64(maxVmlinux))
		}
		// No more than was announced, and that in one go.
		out := make([]byte, want)
		if _, err := io.ReadFull(r, out); err != nil {
			return nil, fmt.Errorf("unpack the kernel's %s payload: %w", p.name, err)
		}
		f, err := elf.NewFile(bytes.NewReader(out))
		if err != nil || f.Machine != elf.EM_X86_64 {
			return nil, fmt.Errorf("the kernel's payload is no x86-64 ELF file (%v)", err)
		}
		return out, nil
	}
	return nil, fmt.Errorf("the kernel's payload begins with % x, a compression that is not known; lz4, gzip, xz and zstd are", payload[:4])
}

// kernelPayload finds the compressed kernel by the boot protocol's header.
func kernelPayload(b []byte) ([]byte, error) {
	const header = 0x250
	if len(b) < header || string(b[0x202:0x206]) != "HdrS" {
		return nil, errors.New("not a bzImage: it has no Linux boot header")
	}
	if v := binary.LittleEndian.Uint16(b[0x206:]); v < 0x208 {
		return nil, fmt.Errorf("the kernel speaks boot protocol %d.%02d; 2.08 or later says where its payload is", v>>8, v&0xff)
	}
	sectors := int64(b[0x1f1])
	if sectors == 0 {
		sectors = 4
	}
	off := (sectors+1)*512 + int64(binary.LittleEndian.Uint32(b[0x248:]))
	n := int64(binary.LittleEndian.Uint32(b[0x24c:]))
	if n < 16 || off+n > int64(len(b)) {
		return nil, fmt.Errorf("the kernel's header puts %d bytes of payload at %d, beyond its %d bytes", n, off, len(b))
	}
	return b[off : off+n], nil
}

// EnsureVmlinux unpacks the kernel of a template beside it, once, and returns
// the path.
func EnsureVmlinux(bzImage string) (string, error) {
	path := filepath.Join(filepath.Dir(bzImage), "vmlinux")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	b, err := os.ReadFile(bzImage)
	if err != nil {
		return "", fmt.Errorf("read the kernel: %w", err)
	}
	out, err := Vmlinux(b)
	if err != nil {
		return "", fmt.Errorf("%s: %w", bzImage, err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(bzImage), "vmlinux.*")
	if err != nil {
		return "", fmt.Errorf("unpack the kernel: %w", err)
	}
	defer os.Remove(tmp.Name()) // gone after the rename
	_, err = tmp.Write(out)
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return "", fmt.Errorf("unpack the kernel: %w", err)
	}
	return path, nil
}
