package snapshot

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// A manifest as the first release wrote it. The file is never changed: every
// later program must read it as what it was.
func TestReleasedManifestIsReadAsItWas(t *testing.T) {
	digest := func(c byte) string { return string(bytes.Repeat([]byte{c}, 64)) }
	want := Manifest{
		ID: format.ID{1, 2, 3}, Name: "warm-python", Kind: KindSnapshot, SandboxID: "abc123", Parent: "base", Generation: 7,
		CreatedAt: time.Date(2026, 11, 24, 1, 2, 3, 456_000_000, time.UTC),
		Memory:    ImageRef{ID: format.ID{4}, Size: 256 << 20, HeaderSHA256: digest('a')},
		Disk:      ImageRef{ID: format.ID{5}, Size: 4 << 30, HeaderSHA256: digest('b')},
		State:     FileRef{Size: 52_600, SHA256: digest('c')},
		VMM: VMMInfo{Kind: "qemu", Version: "7.2.22", MachineType: "microvm", CPUModel: "Westmere-v1", Accel: "tcg",
			TSCKHz: 2_400_000, KernelDigest: digest('d'), VCPUs: 2, MemoryMB: 256},
		EnvdVersion: "0.6.13", NetworkLayout: "1", Annotations: []byte(`{"a":"ü"}`), Size: 1 << 20,
	}
	path := filepath.Join("testdata", "manifest-v1.json")
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && os.Getenv("WRENN_GOLDEN") == "new" {
		b, err = encodeManifest(&want)
		err = errors.Join(err, os.MkdirAll("testdata", 0o755), os.WriteFile(path, b, 0o644))
	}
	must(t, err)
	got, err := decodeManifest(b)
	must(t, err)
	again, err := encodeManifest(got)
	must(t, err)
	if !bytes.Equal(again, b) {
		t.Error("the same manifest is written in other bytes; that is a new version")
	}
	if fresh, err := encodeManifest(&want); err != nil || !bytes.Equal(fresh, b) {
		t.Errorf("read as %+v, was %+v (%v)", *got, want, err)
	}
}

func TestManifestCutOrChangedIsAnError(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("testdata", "manifest-v1.json"))
	must(t, err)
	for n := range b {
		if _, err := decodeManifest(b[:n]); err == nil {
			t.Errorf("cut after %d of %d bytes, it is taken", n, len(b))
		}
		for bit := range 8 {
			c := bytes.Clone(b)
			c[n] ^= 1 << bit
			if _, err := decodeManifest(c); err == nil {
				t.Errorf("with bit %d of byte %d changed, it is taken", bit, n)
			}
		}
	}
}
