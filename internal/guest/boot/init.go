package boot

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// servicePath is the guest agent in the root file system: PID 1 itself, and the
// one service that it keeps running.
const servicePath = "/usr/local/bin/envd"

// baseEnv is the environment of the service before anybody logs in.
var baseEnv = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"HOME=/root",
	"USER=root",
	"LOGNAME=root",
	"SHELL=/bin/bash",
	"LANG=C.UTF-8",
}

// Init is PID 1. It does not return: it prepares the machine, keeps
// "envd serve" running, and ends with the machine.
func Init() {
	die("init", runInit())
}

func runInit() error {
	if os.Getpid() != 1 {
		return fmt.Errorf("init is PID %d, not 1", os.Getpid())
	}
	t := newTrace(os.Stdout, "init", time.Now)
	if err := prepare(t); err != nil {
		return err
	}
	s := newSupervisor(serviceSpec{
		path: servicePath,
		argv: []string{servicePath, "serve"},
		env:  baseEnv,
		warn: t.warn,
	})
	if err := s.start(); err != nil {
		return fmt.Errorf("starting %s serve: %w", servicePath, err)
	}
	t.step("serve")
	t.done()
	return s.run()
}

// prepare makes the machine ready for the service.
func prepare(t *trace) error {
	unix.Umask(0o022)
	if err := mountAll(kernelMounts, t.warn); err != nil {
		return err
	}
	if err := mountAll(rootMounts, t.warn); err != nil {
		return err
	}
	if err := linkDevices(); err != nil {
		return fmt.Errorf("linking devices: %w", err)
	}
	if err := makeRunDirs(); err != nil {
		return fmt.Errorf("making run directories: %w", err)
	}
	t.step("mounts")

	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return fmt.Errorf("reading the kernel parameters: %w", err)
	}
	p, err := parseCmdline(string(line))
	if err != nil {
		return err
	}
	if err := SetHostname(p.Hostname); err != nil {
		return err
	}
	if err := ensureMachineID(machineIDPath); err != nil {
		t.warn("writing the machine id", err)
	}
	t.step("identity")

	if err := setupNetwork(p); err != nil {
		return err
	}
	t.step("network")

	setLimits(t.warn)
	setSysctls(t.warn)
	raiseSoftirqs(t.warn)
	t.step("limits")
	return nil
}
