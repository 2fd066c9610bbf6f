package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fakeTool puts a script into dir that prints a version.
func fakeTool(t *testing.T, dir, name, says string) {
	t.Helper()
	script := fmt.Sprintf("#!/bin/sh\necho '%s'\n", says)
	if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestDoctorTellsWhichFirecrackerIsThere(t *testing.T) {
	for name, c := range map[string]struct {
		firecracker, jailer string // what they say; empty: not there
		status, found       string
	}{
		"none":           {"", "", "note", "firecracker is not installed"},
		"too old":        {"Firecracker v1.4.0", "Jailer v1.4.0", "note", "1.4.0 is not supported"},
		"too new":        {"Firecracker v2.0.0", "Jailer v2.0.0", "note", "2.0.0 is not supported"},
		"no jailer":      {"Firecracker v1.12.1", "", "note", "jailer is not installed"},
		"another jailer": {"Firecracker v1.12.1", "Jailer v1.11.0", "note", "they must come from one release"},
		"something else": {"hello", "Jailer v1.12.1", "note", "says no version"},
		"both":           {"Firecracker v1.12.1", "Jailer v1.12.1", "ok", "1.12.1: "},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			t.Setenv("PATH", dir)
			if c.firecracker != "" {
				fakeTool(t, dir, "firecracker", c.firecracker)
			}
			if c.jailer != "" {
				fakeTool(t, dir, "jailer", c.jailer)
			}
			f := checkFirecrackerPrograms(t.Context())
			if f.Status != c.status || !strings.Contains(f.Found, c.found) || (f.Remedy == "") != (c.status == "ok") {
				t.Errorf("got %+v, want %s with %q", f, c.status, c.found)
			}
		})
	}
}

// TestDoctorAsksNothingOfAMissingFirecracker: there is one line on it and one
// on block devices, and neither says that sandboxes cannot run.
func TestDoctorAsksNothingOfAMissingFirecracker(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	all := checkFirecracker(t.Context(), t.TempDir())
	if len(all) != 2 || all[0].Status != "note" || all[1].Check != nbdDevices || all[1].Status == "bad" {
		t.Errorf("got %+v", all)
	}
	if nbd := all[1]; nbd.Status == "note" && !strings.Contains(nbd.Remedy, "modprobe nbd") {
		t.Errorf("block devices are missing, and the remedy is %q", nbd.Remedy)
	}
}

func TestDoctorExcusesQEMUOnlyWhereFirecrackerRuns(t *testing.T) {
	report := func(nbd, kvm string) []finding {
		all := []finding{{qemuProgram, "bad", "not found", ""}, {acceleration, "bad", "no qemu", ""}, {nbdDevices, nbd, "", ""}, {"disk", "bad", "full", ""}}
		if kvm != "" {
			all = append(all, finding{firecrackerKVM, kvm, "", ""})
		}
		return all
	}
	for _, c := range []struct{ nbd, kvm, want string }{
		{"ok", "ok", "note"}, {"note", "ok", "bad"}, {"ok", "note", "bad"}, {"ok", "", "bad"},
	} {
		all := report(c.nbd, c.kvm)
		excuseQEMU(all)
		if all[0].Status != c.want || all[1].Status != c.want || all[3].Status != "bad" {
			t.Errorf("nbd %s, kvm %q: %+v", c.nbd, c.kvm, all)
		}
	}
}
