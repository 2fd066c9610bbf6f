package storage

import (
	"path"
	"strings"
	"testing"
)

// A key that is taken names a place below the directory, and only one.
func FuzzValidKey(f *testing.F) {
	for _, k := range []string{"a", "images/0a/data", "..", "a/../b", "/a", "a//b", ".tmp-x", "a/.b", "a\x00"} {
		f.Add(k)
	}
	f.Fuzz(func(t *testing.T, key string) {
		if ValidKey(key) != nil {
			return
		}
		joined := path.Join("/dir", key)
		if joined != "/dir/"+key || !strings.HasPrefix(joined, "/dir/") || len(key) > MaxKey || strings.Contains(key, "/.") || strings.ContainsAny(key, "\\\x00 ") {
			t.Fatalf("%q was taken and names %q", key, joined)
		}
		if ValidPrefix(key+"/") != nil {
			t.Fatalf("%q is a key, but %q no prefix", key, key+"/")
		}
	})
}
