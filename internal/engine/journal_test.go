package engine

import (
	"encoding/json"
	"os"
	"reflect"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

func fullJournal() journal {
	at := time.Date(2026, 11, 24, 1, 2, 3, 4, time.UTC)
	return journal{
		Version: journalVersion, ID: "abc123", Template: "base", VCPUs: 2, MemoryMB: 512,
		Envs: map[string]string{"A": "b"}, Annotations: []byte("x"), AccessToken: "t", MachineID: "m",
		State: Pausing, Error: "e", CreatedAt: at, StartedAt: &at, Manifest: format.ID{1}, Generation: 7, Pending: format.ID{2},
		Run: &runRecord{Slot: 3, Life: "l", MemoryImage: format.ID{3}, DiskImage: format.ID{4}, LastMemory: format.ID{5},
			LastDisk: format.ID{6}, RAMAddr: 1 << 46, KernelDigest: "k", EnvdVersion: "1.2.3", VM: &vmm.Record{ID: "abc123", Kind: "qemu", PID: 7, StartTime: 8}},
	}
}

func TestJournalIsReadAsItWasWritten(t *testing.T) {
	dir := t.TempDir() + "/abc123"
	mkdir(t, dir)
	want := fullJournal()
	if err := writeJournal(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := readJournal(dir)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
}

func TestJournalCutOrOfAnotherIsRefused(t *testing.T) {
	b, err := json.Marshal(fullJournal())
	if err != nil {
		t.Fatal(err)
	}
	for n := range b {
		if _, err := decodeJournal(b[:n], "abc123"); err == nil {
			t.Fatalf("cut after %d of %d bytes, it is taken", n, len(b))
		}
	}
	for _, id := range []string{"", "abc", "ABC123", "../abc123"} {
		if _, err := decodeJournal(b, id); err == nil {
			t.Errorf("taken for the journal of %q", id)
		}
	}
	newer := fullJournal()
	newer.Version++
	b, _ = json.Marshal(newer)
	if _, err := decodeJournal(b, "abc123"); err == nil {
		t.Error("a journal of a newer program is taken")
	}
}

func FuzzJournal(f *testing.F) {
	b, err := json.Marshal(fullJournal())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1,"id":"abc123","run":{"slot":-1}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		j, err := decodeJournal(b, "abc123")
		if err != nil {
			return
		}
		// What is taken can be written, and is then the same.
		out, err := json.Marshal(j)
		if err != nil {
			t.Fatalf("decoded, but cannot be written: %v", err)
		}
		again, err := decodeJournal(out, "abc123")
		if err != nil {
			t.Fatalf("written, but cannot be read: %v", err)
		}
		if o2, _ := json.Marshal(again); string(o2) != string(out) {
			t.Fatalf("%s became %s", out, o2)
		}
		_ = j.roots()
	})
}

func mkdir(t *testing.T, dir string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
}
