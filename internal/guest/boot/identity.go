package boot

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	hostnamePath   = "/etc/hostname"
	hostsPath      = "/etc/hosts"
	machineIDPath  = "/etc/machine-id"
	resolvConfPath = "/etc/resolv.conf"
)

// SetHostname gives the machine its name: the kernel's host name, /etc/hostname
// and the name's line in /etc/hosts (without which sudo asks the name servers
// on every call). Other lines of /etc/hosts stay. It is also what a fork's
// confirmation calls.
func SetHostname(name string) error {
	if err := CheckHostname(name); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("setting the host name: %w", err)
	}
	if err := writeIfChanged(hostnamePath, name+"\n"); err != nil {
		return fmt.Errorf("writing the host name: %w", err)
	}
	old, err := os.ReadFile(hostsPath)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading the hosts file: %w", err)
	}
	if err := writeIfChanged(hostsPath, hostsFile(string(old), name)); err != nil {
		return fmt.Errorf("writing the hosts file: %w", err)
	}
	return nil
}

// ownNameAddr is Debian's address for the machine's own name, so that it does
// not depend on the network.
const ownNameAddr = "127.0.1.1"

// hostsFile returns old with the line of the machine's own name replaced, or a
// fresh file when old has nothing in it.
func hostsFile(old, name string) string {
	own := ownNameAddr + "\t" + name + "\n"
	if strings.TrimSpace(old) == "" {
		return "127.0.0.1\tlocalhost\n" + own +
			"::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
	}
	var b strings.Builder
	replaced := false
	for line := range strings.Lines(old) {
		f := strings.Fields(line)
		if len(f) > 0 && f[0] == ownNameAddr {
			if !replaced {
				b.WriteString(own)
				replaced = true
			}
			continue
		}
		b.WriteString(line)
		if !strings.HasSuffix(line, "\n") {
			b.WriteByte('\n')
		}
	}
	if !replaced {
		b.WriteString(own)
	}
	return b.String()
}

// ensureMachineID fills an empty or missing machine id. The base template ships
// an empty one so that no two machines share it.
func ensureMachineID(path string) error {
	old, err := os.ReadFile(path)
	if err == nil && len(strings.TrimSpace(string(old))) == 32 {
		return nil
	}
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return fmt.Errorf("reading randomness: %w", err)
	}
	return os.WriteFile(path, []byte(hex.EncodeToString(id[:])+"\n"), 0o444)
}

// resolvConf is the resolver's configuration for the given name servers.
func resolvConf(servers []netip.Addr) string {
	var b strings.Builder
	for _, a := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	return b.String()
}

// writeIfChanged writes a small configuration file unless it already holds
// text: an unchanged block is a block less in the next snapshot.
func writeIfChanged(path, text string) error {
	if old, err := os.ReadFile(path); err == nil && string(old) == text {
		return nil
	}
	return os.WriteFile(path, []byte(text), 0o644)
}
