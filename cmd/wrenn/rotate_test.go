package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestALogIsBoundedAndKeepsItsEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	const most = 1000
	opened := 0
	var l *rotatingLog
	open := func() {
		var err error
		if l, err = openRotatingLog(path, most, func(*os.File) error { opened++; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	open()
	last := 0
	for i := range 1000 {
		line := fmt.Sprintf("line %d of some length\n", i)
		if n, err := l.Write([]byte(line)); err != nil || n != len(line) {
			t.Fatalf("%d, %v", n, err)
		}
		last = i
		if i == 500 {
			open() // the process was started again
		}
		for _, p := range []string{path, path + ".1"} {
			if st, err := os.Stat(p); err == nil && st.Size() > most {
				t.Fatalf("after line %d %s has %d bytes", i, filepath.Base(p), st.Size())
			}
		}
	}
	files, _ := filepath.Glob(path + "*")
	if len(files) != 2 {
		t.Errorf("files: %v", files)
	}
	before, _ := os.ReadFile(path + ".1")
	now, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Split(strings.TrimSpace(string(before)+string(now)), "\n")
	for i, line := range all { // whole, in order, to the last
		if want := fmt.Sprintf("line %d of some length", last-len(all)+1+i); line != want {
			t.Fatalf("%q, want %q", line, want)
		}
	}
	if opened < 10 {
		t.Errorf("told of %d files", opened)
	}
}

func TestALogThatCannotBeRotatedIsBoundedToo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := openRotatingLog(path, 1000, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(path+".1", "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	var lost error
	for range 100 {
		if _, err := l.Write(bytes.Repeat([]byte("x"), 50)); err != nil {
			lost = err
		}
	}
	if st, err := os.Stat(path); err != nil || st.Size() > 2000 || st.Size() < 1000 || lost == nil {
		t.Errorf("%v, %v; lost lines: %v", st.Size(), err, lost)
	}
	if err := os.RemoveAll(path + ".1"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Write([]byte("y")); err != nil {
		t.Errorf("with nothing in the way: %v", err)
	}
}

func TestManyWriteOneLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := openRotatingLog(path, 1000, nil)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				if _, err := l.Write([]byte("0123456789\n")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	text, err := os.ReadFile(path)
	if err != nil || len(text) > 1000 || strings.ReplaceAll(string(text), "0123456789\n", "") != "" {
		t.Errorf("%d bytes, %v", len(text), err)
	}
}
