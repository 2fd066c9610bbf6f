package qemu

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// probeWord is what the probe's user space says on the console.
const probeWord = "WRENN-PROBE-OK"

// probeInitrd is an initial RAM disk with one static program: it writes
// probeWord to the console and resets the machine, and so proves that the
// kernel booted, went to user mode and took system calls.
func probeInitrd() []byte {
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
	word := probeWord + "\n"
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
