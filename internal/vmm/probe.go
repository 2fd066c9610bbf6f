package vmm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// ProbeWord is what the probe's user space says on the console.
const ProbeWord = "WRENN-PROBE-OK"

// ProbeInitrd is an initial RAM disk with one static program: it writes
// ProbeWord to the console and resets the machine, and so proves that the
// kernel booted, went to user mode and took system calls.
func ProbeInitrd() []byte {
	var b bytes.Buffer
	entry := func(name string, mode, data int) {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			0, mode, 0, 0, 1, 0, data, 0, 0, 0, 0, len(name)+1, 0, name)
		pad(&b)
	}
	prog := probeProgram()
	entry("init", 0o100755, len(prog))
	b.Write(prog)
	pad(&b)
	entry("TRAILER!!!", 0, 0)
	return b.Bytes()
}

// pad fills up to four bytes, as the cpio format "newc" wants.
func pad(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

// probeProgram is an ELF executable of x86-64 with one loadable segment.
func probeProgram() []byte {
	const base, headers = 0x400000, 64 + 56
	word := ProbeWord + "\n"
	code := []byte{
		0xb8, 1, 0, 0, 0, // mov eax, 1 (write)
		0xbf, 1, 0, 0, 0, // mov edi, 1
		0x48, 0x8d, 0x35, 0, 0, 0, 0, // lea rsi, [rip+word]; filled in below
		0xba, byte(len(word)), 0, 0, 0, // mov edx, len
		0x0f, 0x05, // syscall
		0xb8, 169, 0, 0, 0, // mov eax, 169 (reboot)
		0xbf, 0xad, 0xde, 0xe1, 0xfe, // mov edi, LINUX_REBOOT_MAGIC1
		0xbe, 0x69, 0x19, 0x12, 0x28, // mov esi, LINUX_REBOOT_MAGIC2
		0xba, 0x67, 0x45, 0x23, 0x01, // mov edx, LINUX_REBOOT_CMD_RESTART
		0x0f, 0x05, // syscall
		0xeb, 0xfe, // jmp to itself
	}
	binary.LittleEndian.PutUint32(code[13:], uint32(len(code)-17)) // rip is behind the lea
	size := uint64(headers + len(code) + len(word))
	var b bytes.Buffer
	b.WriteString("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	put := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) } // a Buffer takes everything
	put([]uint16{2, 62})                                                // executable, x86-64
	put(uint32(1))                                                      // version
	put([]uint64{base + headers, 64, 0})                                // entry, program headers, no sections
	put(uint32(0))                                                      // flags
	put([]uint16{64, 56, 1, 0, 0, 0})                                   // sizes and counts
	put([]uint32{1, 5})                                                 // PT_LOAD, readable and executable
	put([]uint64{0, base, base, size, size, 0x1000})
	b.Write(code)
	b.WriteString(word)
	return b.Bytes()
}

// FileDigest is the SHA-256 of a file, 64 hex digits.
func FileDigest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// HostFlagsDigest is over the CPU's model and its sorted flags: what a guest
// of the host's own model sees.
func HostFlagsDigest() (string, error) {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", fmt.Errorf("reading the host's CPU flags: %w", err)
	}
	h := sha256.New()
	for line := range strings.Lines(string(b)) {
		key, val, ok := strings.Cut(line, ":")
		if !ok { // the first CPU is enough
			break
		}
		switch strings.TrimSpace(key) {
		case "vendor_id", "cpu family", "model":
			fmt.Fprintln(h, strings.Fields(val))
		case "flags":
			f := strings.Fields(val)
			slices.Sort(f)
			fmt.Fprintln(h, f)
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
