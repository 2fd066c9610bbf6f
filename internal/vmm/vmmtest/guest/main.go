// Command guest is the whole user space of the virtual machines that the
// conformance suite boots: /init of a tiny initrd. It speaks through the
// console only, one line per fact:
//
//	READY clocksource=<name> uptime=<ms>
//	tick <n> mono=<ns> sum=ok           every 50 ms; n lives in memory only
//	disk ok <n>                         with vmmtest.disk: block n written and read back
//
// The kernel command line steers it: vmmtest.modules loads /modules/*.ko in
// the order of their names, vmmtest.disk=1 works on /dev/vda,
// vmmtest.end=<poweroff|reboot|panic>@<tick> ends the machine.
package main

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	ballast = 4 << 20 // bytes of memory whose checksum is proved at each tick
)

// period is the time between two ticks, vmmtest.period milliseconds.
var period = 50 * time.Millisecond

func main() {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		_ = os.MkdirAll(m[1], 0o755)
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil && err != unix.EBUSY {
			fmt.Println("mount", m[1], err)
		}
	}
	args := cmdline()
	if args["vmmtest.modules"] != "" {
		loadModules()
	}
	if con, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
		os.Stdout = con
	}
	cs, _ := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	fmt.Printf("READY clocksource=%s uptime=%d\n", strings.TrimSpace(string(cs)), monotonic()/1e6)
	ends, _ := os.ReadFile("/proc/net/dev")
	fmt.Printf("NET eth0=%t\n", bytes.Contains(ends, []byte("eth0")))

	if ms, err := strconv.Atoi(args["vmmtest.period"]); err == nil {
		period = time.Duration(ms) * time.Millisecond
	}
	end, at := "", 0
	if what, n, ok := strings.Cut(args["vmmtest.end"], "@"); ok {
		end = what
		at, _ = strconv.Atoi(n)
	}
	if args["vmmtest.disk"] != "" {
		go disk()
	}
	tick(end, at)
}

// tick counts in memory for ever; the ballast proves that memory came back.
func tick(end string, at int) {
	mem := make([]byte, ballast)
	x := uint32(1)
	for i := range mem {
		x = x*1664525 + 1013904223
		mem[i] = byte(x >> 24)
	}
	want := crc32.ChecksumIEEE(mem)
	for n := 1; ; n++ {
		sum := "ok"
		if n%10 == 0 && crc32.ChecksumIEEE(mem) != want {
			sum = "WRONG"
		}
		fmt.Printf("tick %d mono=%d sum=%s\n", n, monotonic(), sum)
		if end != "" && n >= at {
			finish(end)
		}
		time.Sleep(period)
	}
}

func finish(how string) {
	switch how {
	case "poweroff":
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "panic":
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
	fmt.Println("end failed:", how)
}

func disk() {
	f, err := os.OpenFile("/dev/vda", os.O_RDWR|unix.O_DIRECT|unix.O_SYNC, 0)
	if err != nil {
		fmt.Println("disk", err)
		return
	}
	buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		fmt.Println("disk", err)
		return
	}
	for n := int64(1); ; n++ {
		for i := range buf {
			buf[i] = byte(n)
		}
		if _, err := f.WriteAt(buf, n%64*4096); err != nil {
			fmt.Println("disk write", err)
		}
		clear(buf)
		if _, err := f.ReadAt(buf, n%64*4096); err != nil || buf[0] != byte(n) || buf[4095] != byte(n) {
			fmt.Println("disk read", err, buf[0], byte(n))
		}
		fmt.Println("disk ok", n)
		time.Sleep(period)
	}
}

func loadModules() {
	names, _ := filepath.Glob("/modules/*.ko")
	for _, name := range names { // Glob sorts
		f, err := os.Open(name)
		if err != nil {
			fmt.Println("module", name, err)
			continue
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
			fmt.Println("module", name, err)
		}
		f.Close()
	}
}

func cmdline() map[string]string {
	b, _ := os.ReadFile("/proc/cmdline")
	args := map[string]string{}
	for _, f := range strings.Fields(string(b)) {
		k, v, _ := strings.Cut(f, "=")
		args[k] = v
	}
	return args
}

func monotonic() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}
