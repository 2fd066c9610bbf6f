package boot

import (
	"fmt"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// powerAction is how PID 1 ends the machine.
type powerAction int

const (
	powerOff powerAction = iota
	powerReboot
)

// Signals by which a program with root's rights asks PID 1 to end the machine.
// The numbers are busybox init's and sysvinit's; the base template's reboot and
// poweroff commands send them.
var powerSignals = map[os.Signal]powerAction{
	unix.SIGTERM: powerReboot, // what busybox's reboot sends
	unix.SIGINT:  powerReboot, // what the kernel sends for Ctrl-Alt-Del
	unix.SIGUSR1: powerOff,    // halt
	unix.SIGUSR2: powerOff,    // poweroff
	unix.SIGPWR:  powerOff,    // power failure
}

// die reports err on the console and ends the machine. If even that is refused,
// PID 1 exits and the kernel panics: the VM still does not hang, given panic=.
func die(phase string, err error) {
	fmt.Fprintf(os.Stdout, "wrenn %s: fatal: %v\nwrenn %s: turning the machine off\n", phase, err, phase)
	endMachine(powerOff)
	os.Exit(1)
}

// endMachine syncs and asks the kernel to power off or reboot.
func endMachine(action powerAction) {
	unix.Sync()
	cmd := unix.LINUX_REBOOT_CMD_RESTART
	if action == powerOff && canPowerOff() {
		cmd = unix.LINUX_REBOOT_CMD_POWER_OFF
	}
	if err := unix.Reboot(cmd); err != nil {
		fmt.Fprintf(os.Stdout, "wrenn: reboot(%#x): %v\n", cmd, err)
	}
}

// canPowerOff reports whether the kernel knows how to cut the power. Without
// ACPI it only halts and the VM would stay forever; a restart instead ends it,
// because the host runs its VMs so that a reset ends them.
func canPowerOff() bool {
	_, err := os.Stat("/sys/firmware/acpi/tables")
	return err == nil
}

// stopAll ends every process but PID 1: politely, then not.
func stopAll(reap func() (left bool), grace time.Duration) {
	signal.Reset()
	fmt.Fprintln(os.Stdout, "wrenn init: stopping all processes")
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		_ = unix.Kill(-1, sig) // ESRCH: nobody is left
		if waitGone(reap, grace) {
			return
		}
	}
}

// closeRoot leaves a clean file system. A root that is still busy is replayed
// from its journal at the next boot.
func closeRoot() {
	unix.Sync()
	_ = unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
}

// waitGone reaps until no child is left or grace is over. It polls: at this
// point nothing else needs the processor.
func waitGone(reap func() (left bool), grace time.Duration) bool {
	deadline := time.Now().Add(grace)
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for reap() {
		if time.Now().After(deadline) {
			return false
		}
		<-ticker.C
	}
	return true
}
