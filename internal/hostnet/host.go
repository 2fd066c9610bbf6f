package hostnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// runDir holds what all pools of a host share. It must not outlive a boot.
const (
	runDir      = "/run/wrenn"
	forwardFile = "/proc/sys/net/ipv4/ip_forward"
)

func hostLockPath() string   { return filepath.Join(runDir, "hostnet.lock") }
func hostRecordPath() string { return filepath.Join(runDir, "hostnet.json") }

// hostRecord remembers what we changed on the host. It is about the host, not
// about one pool: the last pool to leave restores it. Boot and Netns say which
// host it speaks of, for a /run that outlived it (containers).
type hostRecord struct {
	Boot      string `json:"boot"`
	Netns     uint64 `json:"netns"`
	IPForward string `json:"ip_forward"`
}

// withHostLock serialises changes of what pools share: the table, ip_forward
// and the claiming of slot numbers. The kernel frees the lock of a dead process.
func withHostLock(fn func() error) error {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", runDir, err)
	}
	f, err := flock(hostLockPath(), unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer f.Close()
	return fn()
}

func flock(path string, how int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock %s: %w", path, err)
	}
	for {
		err = unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// enterHost makes the host ready for slots. Held: the host lock. replace loads
// the rules even if there are some (they may be an older version's).
func enterHost(replace bool) error {
	if err := enableForwarding(); err != nil {
		return err
	}
	if !replace {
		ok, err := hostRulesLoaded()
		if ok || err != nil {
			return err
		}
	}
	return loadHostRules()
}

func enableForwarding() error {
	was, err := os.ReadFile(forwardFile)
	if err != nil {
		return fmt.Errorf("read net.ipv4.ip_forward: %w", err)
	}
	if strings.TrimSpace(string(was)) == "1" {
		return nil
	}
	if err := recordForwarding(strings.TrimSpace(string(was))); err != nil {
		return err
	}
	if err := os.WriteFile(forwardFile, []byte("1"), 0); err != nil {
		return fmt.Errorf("net.ipv4.ip_forward is 0 and cannot be set; set it where the host is set up "+
			"(sysctl -w net.ipv4.ip_forward=1; for a container: --sysctl net.ipv4.ip_forward=1): %w", err)
	}
	return nil
}

// recordForwarding keeps the oldest value of this boot: a later one may be a
// reset that somebody did while we were running.
func recordForwarding(was string) error {
	rec, err := thisHost()
	if err != nil {
		return err
	}
	if old, ok := readHostRecord(); ok && old.Boot == rec.Boot && old.Netns == rec.Netns {
		return nil
	}
	rec.IPForward = was
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	tmp := hostRecordPath() + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("record the host's settings: %w", err)
	}
	if err := os.Rename(tmp, hostRecordPath()); err != nil {
		return fmt.Errorf("record the host's settings: %w", err)
	}
	return nil
}

func thisHost() (hostRecord, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return hostRecord{}, fmt.Errorf("read the boot id: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return hostRecord{}, fmt.Errorf("stat the host's network namespace: %w", err)
	}
	return hostRecord{Boot: strings.TrimSpace(string(boot)), Netns: st.Ino}, nil
}

// readHostRecord: a record that cannot be read is none; it was written
// atomically, so that is not by a crash of ours.
func readHostRecord() (hostRecord, bool) {
	var rec hostRecord
	b, err := os.ReadFile(hostRecordPath())
	if err != nil || json.Unmarshal(b, &rec) != nil {
		return hostRecord{}, false
	}
	return rec, rec.IPForward == "0" || rec.IPForward == "1"
}

// leaveHost undoes enterHost if no slot of any pool is left. A pool that has
// none at the moment enters again with its next one. Held: the host lock.
func leaveHost() error {
	names, err := listNetns()
	if err != nil {
		return err
	}
	links, err := listLinks()
	if err != nil {
		return err
	}
	for _, l := range links {
		if _, ok := numbered(l.Attrs().Name, hostPrefix); ok {
			return nil
		}
	}
	if len(names) > 0 {
		return nil
	}
	if err := removeHostRules(); err != nil {
		return err
	}
	rec, ok := readHostRecord()
	now, err := thisHost()
	if err != nil {
		return err
	}
	if ok && rec.Boot == now.Boot && rec.Netns == now.Netns {
		if err := os.WriteFile(forwardFile, []byte(rec.IPForward), 0); err != nil {
			return fmt.Errorf("restore net.ipv4.ip_forward=%s: %w", rec.IPForward, err)
		}
	}
	if err := os.Remove(hostRecordPath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the record of the host's settings: %w", err)
	}
	return nil
}

// listLinks repeats a dump that a change of links interrupted, a few times.
func listLinks() ([]netlink.Link, error) {
	for try := 0; ; try++ {
		links, err := netlink.LinkList()
		if errors.Is(err, netlink.ErrDumpInterrupted) && try < 10 {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list links: %w", err)
		}
		return links, nil
	}
}

// checkPrefix refuses a prefix that the host already uses on another link, or
// that another pool divides differently.
func checkPrefix(l layout) error {
	links, err := listLinks()
	if err != nil {
		return err
	}
	for _, link := range links {
		name := link.Attrs().Name
		addrs, err := listAddrs(link)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if !a.IsValid() || !a.Overlaps(l.prefix) {
				continue
			}
			if n, ok := numbered(name, hostPrefix); ok && n < l.slots() {
				if host, _ := l.addrs(n); host == a {
					continue
				}
			}
			return fmt.Errorf("network prefix %v overlaps %v of %s: choose another", l.prefix, a, name)
		}
	}
	return nil
}
