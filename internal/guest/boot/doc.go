// Package boot is what runs in a sandbox before and around the guest agent:
// the initramfs and PID 1. Only cmd/envd and internal/guest import it; nothing of it runs on the
// host.
//
// The way of a cold boot:
//
//  1. The kernel starts /init of our initramfs, which is the envd binary:
//     [Initrd] mounts the kernel file systems, loads the modules that
//     /modules/order lists, waits for the root disk, mounts it and executes
//     /usr/local/bin/envd init of the root file system.
//  2. [Init] is PID 1 from then on: mounts, host name, network from the wrenn.*
//     kernel parameters, limits; then it keeps "envd serve" running, reaps
//     orphans, and turns the machine off when told to.
//
// Invariants:
//   - Neither function returns. What cannot be continued is printed on the
//     console and the machine is turned off: a sandbox that cannot boot must
//     be seen by the host as a VM that ended, never as one that hangs.
//   - Only what later steps need is fatal. A sysctl or a mount that a reduced
//     kernel refuses is reported and boot goes on.
//   - Nothing here listens or speaks to the network.
package boot
