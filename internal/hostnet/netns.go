package hostnet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2 keeps named namespaces; `ip netns` sees ours.
const netnsDir = "/run/netns"

// ownerMark is the alias of a namespace's loopback that says whose it is.
const ownerMark = "wrenn hostnet owner="

func netnsPath(n int) string { return filepath.Join(netnsDir, netnsName(n)) }

// inNetns runs fn on an OS thread of its own in namespace target. The thread
// goes back to home afterwards; if it cannot, it dies with its goroutine
// instead of serving others from the wrong namespace.
func inNetns(home, target *os.File, fn func() error) error {
	return onThread(home, func() error {
		if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

func onThread(home *os.File, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := fn()
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// openHome opens the namespace the process is in. O_CLOEXEC keeps it from VMs.
func openHome() (*os.File, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open the host's network namespace: %w", err)
	}
	return f, nil
}

// prepareNetnsDir makes /run/netns what `ip netns` makes it: a shared mount, so
// that the names are seen in other mount namespaces too.
func prepareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", netnsDir, err)
	}
	shared := func() error { return unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "") }
	err := shared()
	if errors.Is(err, unix.EINVAL) { // not a mount point yet
		if err = unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err == nil {
			err = shared()
		}
	}
	if err != nil {
		return fmt.Errorf("make %s a shared mount (needs CAP_SYS_ADMIN): %w", netnsDir, err)
	}
	return nil
}

// createNetns makes the namespace of slot n, marked with its owner before it
// has a name. The caller holds the host lock and knows the name to be unused.
func createNetns(home *os.File, n int, owner string) (ns *os.File, err error) {
	path := netnsPath(n)
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC, 0o444)
	if err != nil {
		return nil, fmt.Errorf("claim %s: %w", path, err)
	}
	f.Close()
	defer func() {
		if err != nil {
			removeNetns(n)
		}
	}()
	err = onThread(home, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("new network namespace (needs CAP_SYS_ADMIN): %w", err)
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("loopback of %s: %w", netnsName(n), err)
		}
		if err := netlink.LinkSetAlias(lo, ownerMark+owner); err != nil {
			return fmt.Errorf("mark %s: %w", netnsName(n), err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("name %s (needs CAP_SYS_ADMIN): %w", path, err)
		}
		ns, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return ns, err
}

var errNoNetns = errors.New("network namespace does not exist")

// openNetns opens slot n's namespace. errNoNetns when the name is free, or is
// the empty file that a creation left which was cut off before its mount.
func openNetns(n int) (*os.File, error) {
	f, err := os.Open(netnsPath(n))
	if errors.Is(err, os.ErrNotExist) {
		return nil, errNoNetns
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", netnsName(n), err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("stat %s: %w", netnsName(n), err)
	}
	if st.Type != unix.NSFS_MAGIC {
		f.Close()
		return nil, errNoNetns
	}
	return f, nil
}

// netnsOwner reads the owner's mark, "" when there is none.
func netnsOwner(home, ns *os.File) (string, error) {
	var alias string
	err := inNetns(home, ns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			alias = lo.Attrs().Alias
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("read the owner of a namespace: %w", err)
	}
	owner, ok := strings.CutPrefix(alias, ownerMark)
	if !ok {
		return "", nil
	}
	return owner, nil
}

// removeNetns takes the name away. The namespace itself ends with its last user.
func removeNetns(n int) error {
	path := netnsPath(n)
	// EINVAL: not mounted, a creation that was cut off.
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}

// listNetns returns the numbers of all names of our form, whoever owns them.
func listNetns() ([]int, error) {
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list %s: %w", netnsDir, err)
	}
	var out []int
	for _, e := range entries {
		if n, ok := numbered(e.Name(), netnsPrefix); ok {
			out = append(out, n)
		}
	}
	return out, nil
}
