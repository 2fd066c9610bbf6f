package boot

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// limits are inherited by every process of the sandbox.
var limits = []struct {
	name       string
	resource   int
	soft, hard uint64
}{
	// The soft limit stays where programs that loop over all descriptors, or
	// use select, remain correct and fast; the hard limit lets servers raise it.
	{"open files", unix.RLIMIT_NOFILE, 65536, 1048576},
	{"core size", unix.RLIMIT_CORE, 0, unix.RLIM_INFINITY},
	{"locked memory", unix.RLIMIT_MEMLOCK, 8 << 20, unix.RLIM_INFINITY},
}

func setLimits(warn func(doing string, err error)) {
	for _, l := range limits {
		if err := unix.Setrlimit(l.resource, &unix.Rlimit{Cur: l.soft, Max: l.hard}); err != nil {
			warn("limit of "+l.name, err)
		}
	}
}

// sysctls, each with the reason it differs from the kernel's default.
var sysctls = []struct{ name, value string }{
	{"fs.inotify.max_user_watches", "1048576"},    // watching a whole source tree
	{"fs.inotify.max_user_instances", "1024"},     // one per watcher
	{"net.ipv4.ping_group_range", "0 2147483647"}, // ping without privileges
	{"net.ipv4.ip_unprivileged_port_start", "80"}, // a web server as the user
	{"kernel.core_pattern", "core"},               // never a pipe to a missing program
	{"kernel.sched_autogroup_enabled", "0"},       // it would void priorities between sessions, and every command is one
}

func setSysctls(warn func(doing string, err error)) {
	for _, s := range sysctls {
		path := filepath.Join("/proc/sys", strings.ReplaceAll(s.name, ".", "/"))
		if err := os.WriteFile(path, []byte(s.value), 0o644); err != nil {
			warn("sysctl", err)
		}
	}
}

// raiseSoftirqs puts the kernel's threads for what interrupts leave to do, the
// network's packets among them, beside the service: it cannot answer what does
// not reach it. They are found by name; there is one for each processor.
func raiseSoftirqs(warn func(doing string, err error)) {
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		warn("finding the kernel's threads", err)
	}
	for _, name := range names {
		comm, err := os.ReadFile(name)
		if err != nil || !strings.HasPrefix(string(comm), "ksoftirqd/") {
			continue // it has ended, or is another one
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err == nil {
			err = unix.Setpriority(unix.PRIO_PROCESS, pid, serviceNice)
		}
		if err != nil {
			warn("raising "+strings.TrimSpace(string(comm)), err)
		}
	}
}
