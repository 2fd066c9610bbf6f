package hostnet

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	childEnv = "WRENN_HOSTNET_TEST_CHILD"
	churnEnv = "WRENN_HOSTNET_TEST_CHURN" // its value: a state directory
)

// inHost is true in the child that has a network of its own to play host with.
var inHost bool

// TestMain runs the tests a second time in a process with its own network and
// mount namespaces and an empty /run. That process's network is "the host" to
// every test: nothing of the real host is changed, whatever a test does.
func TestMain(m *testing.M) {
	if dir := os.Getenv(churnEnv); dir != "" {
		if err := churn(dir); err != nil {
			fmt.Fprintln(os.Stderr, "churn:", err)
			os.Exit(1)
		}
		return
	}
	if os.Getenv(childEnv) != "" {
		if err := prepareChild(); err != nil {
			fmt.Fprintln(os.Stderr, "prepare the test's host:", err)
			os.Exit(1)
		}
		inHost = true
		os.Exit(m.Run())
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "not root: tests that need a network of their own are skipped")
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	signal.Ignore(os.Interrupt) // the child gets it too
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit):
		os.Exit(max(1, exit.ExitCode()))
	default:
		fmt.Fprintln(os.Stderr, "start the test's host:", err)
		os.Exit(1)
	}
}

func prepareChild() error {
	if err := unix.Mount("", "/", "none", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("empty /run: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	// New namespaces take the initial one's value.
	return os.WriteFile(forwardFile, []byte("0"), 0)
}

func needHost(t testing.TB) {
	t.Helper()
	if !inHost {
		t.Skip("needs root, for network namespaces")
	}
}
