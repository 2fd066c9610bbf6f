package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// Descriptor numbers inside QEMU. Those that are always there come first, so
// that their numbers never move.
const (
	fdMemory  = 3
	fdQMP     = 4
	fdConsole = 5
	fdExtra   = 6 // tap, /dev/userfaultfd, kernel, initrd, where given
)

// logLimit bounds the console and QEMU's own messages, bytes each.
const logLimit = 4 << 20

// wrapper sets what Go cannot set for a child alone. With SIGXFSZ ignored a
// write beyond the limit fails, and QEMU drops the text, instead of dying.
// The limit counts 512-byte units. Guest RAM is mapped, not written, and is
// not concerned.
var wrapper = []string{"/bin/sh", "-c",
	`trap '' XFSZ && ulimit -c 0 && ulimit -f ` + strconv.Itoa(logLimit/512) + ` && exec "$0" "$@"`}

// nbdReconnect is how long disk requests wait for a restarted NBD server
// before the guest sees errors, seconds.
const nbdReconnect = "300"

// launch collects one command line and the descriptors that go with it.
type launch struct {
	o      Options
	info   vmm.Info
	host   vmm.HostArgs
	spec   vmm.Spec
	binary string
	args   []string

	console, stderr string
	tapFD, uffdFD   int
	nextFD          int
	boot            []*os.File // kernel and initrd, ours to close
}

// newLaunch builds all but how the guest comes to be (kernel or state).
func newLaunch(o Options, info vmm.Info, binary string, h vmm.HostArgs, s vmm.Spec) *launch {
	l := &launch{o: o, info: info, host: h, spec: s, binary: binary, tapFD: -1, uffdFD: -1,
		console: h.ConsolePath, stderr: filepath.Join(h.Dir, "qemu.log")}
	if l.console == "" {
		l.console = filepath.Join(h.Dir, "console.log")
	}
	l.nextFD = fdExtra
	if h.Tap != nil {
		l.tapFD = l.nextFD
		l.nextFD++
	}
	if h.UffdDev != nil {
		l.uffdFD = l.nextFD
		l.nextFD++
	}
	l.args = l.base()
	l.args = append(l.args, l.devices()...)
	return l
}

func (l *launch) base() []string {
	a := []string{
		"-name", "wrenn-" + l.host.ID,
		"-nodefaults", "-no-user-config", "-display", "none",
		"-machine", machineType + ",acpi=on,rtc=on,pit=on,pic=on,isa-serial=on,usb=off,mem-merge=off,dump-guest-core=off,memory-backend=ram",
		"-accel", accelArg(l.info.Accel),
		"-cpu", l.info.CPUModel,
		"-smp", strconv.Itoa(l.spec.VCPUs),
		"-m", strconv.Itoa(l.spec.MemoryMB),
		"-object", fmt.Sprintf("memory-backend-file,id=ram,mem-path=/proc/self/fd/%d,size=%dM,share=on,dump=off,merge=off,prealloc=off",
			fdMemory, l.spec.MemoryMB),
		// A reset ends the machine: nothing may run on that no manifest knows.
		"-no-reboot",
		// Modern virtio only: the legacy layout has a 32-bit page number.
		"-global", "virtio-mmio.force-legacy=false",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", fdQMP),
		"-mon", "chardev=qmp,mode=control",
		"-add-fd", fmt.Sprintf("fd=%d,set=1", fdConsole),
		"-chardev", "file,id=console,path=/dev/fdset/1,append=on",
		"-serial", "chardev:console",
	}
	if !l.o.NoSandbox {
		a = append(a, "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	}
	return a
}

func accelArg(accel string) string {
	if accel == vmm.AccelKVM {
		return "kvm"
	}
	// The buffer of translated code is host memory that each machine may
	// fill; the default is 1 GiB.
	return "tcg,thread=multi,tb-size=256"
}

// devices puts each on a named bus, so that the guest finds the same device
// in the same place whatever else the machine has. Bus 0 stays empty: with
// ACPI its interrupt never reaches the guest, and a disk there hangs the boot.
func (l *launch) devices() []string {
	var a []string
	if l.host.DiskSocket != "" {
		a = append(a,
			"-blockdev", "driver=nbd,node-name=disk0,server.type=unix,server.path="+optEscape(l.host.DiskSocket)+
				",reconnect-delay="+nbdReconnect+",discard=unmap",
			"-device", "virtio-blk-device,id=vda,drive=disk0,bus=virtio-mmio-bus.1,"+
				"num-queues=1,physical_block_size=4096,werror=enospc,rerror=report")
	}
	if l.tapFD >= 0 {
		a = append(a,
			"-netdev", fmt.Sprintf("tap,id=net0,fd=%d", l.tapFD),
			"-device", "virtio-net-device,id=eth0,netdev=net0,bus=virtio-mmio-bus.2,mac="+l.spec.MAC)
	}
	return a
}

// optEscape doubles the commas of a value, which QEMU would take for the next
// option.
func optEscape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// cmdline is the driver's part of the kernel command line.
//
//   - tsc_early_khz: emulation cannot calibrate the TSC on a busy host; with
//     the frequency given the kernel does not try. tsc=reliable keeps its
//     watchdog from comparing it with timers that come late there.
//   - no_timer_check: the check panics where ten timer interrupts do not
//     arrive in time, for the same reason.
//   - edd=off: there is no BIOS disk to ask.
//   - panic=-1 and -no-reboot: a panic ends the machine.
//   - mitigations=off, for emulation only: the leaks they close are those of
//     real pipelines; page table isolation costs TCG dearly and hides nothing.
func cmdline(info vmm.Info) string {
	s := "console=ttyS0 quiet panic=-1 reboot=t edd=off random.trust_cpu=on no_timer_check tsc=reliable tsc_early_khz=" +
		strconv.FormatInt(info.TSCKHz, 10)
	if info.Accel == vmm.AccelTCG {
		s += " mitigations=off"
	}
	return s
}

// load adds an option whose value is a file to read. QEMU gets it as a
// descriptor, since its user may not be allowed to walk to the path.
func (l *launch) load(option, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	l.boot = append(l.boot, f)
	l.args = append(l.args, option, "/proc/self/fd/"+strconv.Itoa(l.nextFD))
	l.nextFD++
	return nil
}

// close closes what load opened.
func (l *launch) close() {
	for _, f := range l.boot {
		f.Close()
	}
}

// start runs QEMU and shakes hands. On failure no process is left.
func (l *launch) start(ctx context.Context) (*machine, error) {
	var closers []*os.File
	defer func() {
		for _, f := range closers {
			f.Close()
		}
	}()
	files := []*os.File{l.host.Memory}
	sock := filepath.Join(l.host.Dir, "qmp.sock")
	listener, err := listenUnix(sock)
	if err != nil {
		return nil, err
	}
	closers = append(closers, listener)
	console, err := vmm.OpenLog(l.console, logLimit)
	if err != nil {
		return nil, err
	}
	closers = append(closers, console)
	// The reason of a failed start is looked for in it: nothing old there.
	if err := os.Remove(l.stderr); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing an old log: %w", err)
	}
	stderr, err := vmm.OpenLog(l.stderr, logLimit)
	if err != nil {
		return nil, err
	}
	closers = append(closers, stderr)
	if err := l.o.own(sock, l.console, l.stderr); err != nil {
		return nil, err
	}
	files = append(files, listener, console)
	if l.host.Tap != nil {
		files = append(files, l.host.Tap)
	}
	if l.host.UffdDev != nil {
		files = append(files, l.host.UffdDev)
	}
	files = append(files, l.boot...)
	boot, err := vmm.BootID()
	if err != nil {
		return nil, err
	}
	argv := append(append(append([]string{}, wrapper...), l.binary), l.args...)
	p, err := vmm.StartProcess(vmm.ProcessSpec{
		Args: argv, Env: environment(), Dir: "/", Stderr: stderr, Files: files, UID: l.o.UID, GID: l.o.GID,
	})
	if err != nil {
		return nil, err
	}
	// While this process holds the listening socket too, a QEMU that dies
	// before it greets would go unnoticed.
	listener.Close()
	m := newMachine(vmm.Record{
		ID: l.host.ID, Kind: Name, PID: p.PID(), StartTime: p.StartTime(), BootID: boot,
		Control: sock, ConsolePath: l.console, StderrPath: l.stderr,
		MemoryFD: fdMemory, UffdDevFD: l.uffdFD, Spec: l.spec, Info: l.info,
	}, p, l.o.Logger)
	if err := m.connect(ctx); err != nil {
		return nil, m.abandon(err)
	}
	return m, nil
}

// listenUnix makes the control socket before QEMU starts, so that connecting
// to it needs no waiting, and returns its descriptor.
func listenUnix(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing an old control socket: %w", err)
	}
	addr, done, err := vmm.SockAddr(path)
	if err != nil {
		return nil, err
	}
	defer done()
	l, err := net.ListenUnix("unix", addr)
	if err != nil {
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	f, err := l.File()
	if err != nil {
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	return f, nil
}
