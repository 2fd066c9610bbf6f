package template

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// bzImageOf wraps a payload, and the size it unpacks to, as a kernel build does.
func bzImageOf(payload []byte, size int) []byte {
	b := make([]byte, 1024)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x20f)
	b[0x1f1] = 1
	payload = binary.LittleEndian.AppendUint32(bytes.Clone(payload), uint32(size))
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)))
	return append(b, payload...)
}

func smallELF() []byte {
	var b bytes.Buffer
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	_ = binary.Write(&b, binary.LittleEndian, h)
	return b.Bytes()
}

func pack(t *testing.T, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

func TestVmlinuxUnpacksTheKernel(t *testing.T) {
	want := smallELF()
	got, err := Vmlinux(bzImageOf(pack(t, want), len(want)))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("got %d bytes, %v", len(got), err)
	}
	dir := t.TempDir()
	kernel := filepath.Join(dir, "vmlinuz")
	if err := os.WriteFile(kernel, bzImageOf(pack(t, want), len(want)), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		path, err := EnsureVmlinux(kernel)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, want) {
			t.Fatalf("%s holds %d bytes, %v", path, len(b), err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "vmlinux.*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestVmlinuxRefusesWhatIsNoKernel(t *testing.T) {
	e := smallELF()
	good := bzImageOf(pack(t, e), len(e))
	old := bytes.Clone(good)
	binary.LittleEndian.PutUint16(old[0x206:], 0x207)
	beyond := bytes.Clone(good)
	binary.LittleEndian.PutUint32(beyond[0x248:], 1<<31)
	huge := bzImageOf(pack(t, e), 1<<30)
	for _, c := range []struct {
		name, want string
		in         []byte
	}{
		{"empty", "no Linux boot header", nil},
		{"text", "no Linux boot header", bytes.Repeat([]byte("text"), 1000)},
		{"old protocol", "boot protocol 2.07", old},
		{"payload beyond the end", "beyond its", beyond},
		{"unknown compression", "not known", bzImageOf([]byte("BZh91AY&SY, with more"), 10)},
		{"larger than allowed", "the limit is", huge},
		{"shorter than announced", "unpack the kernel", bzImageOf(pack(t, e), len(e)+1)},
		{"no ELF", "no x86-64 ELF", bzImageOf(pack(t, []byte("no ELF at all")), 13)},
	} {
		if _, err := Vmlinux(c.in); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}
