package main

import (
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// diskUsage is what the snapshot store takes.
func diskUsage(s *harness.Server) int64 {
	return harness.DiskUsage(filepath.Join(s.Dir, "store"))
}
