// Package hostnet gives every sandbox a network of its own: a network
// namespace with a tap for the VM, a veth pair to the host, addresses, NAT and
// the rules that keep the guest away from the host and from other sandboxes.
//
// A Pool prepares slots ahead, because making a namespace takes milliseconds
// that a resume does not have. Only internal/engine may import this package.
//
// A slot n is, all of it:
//
//	/run/netns/wrenn-<n>      the namespace
//	  tap0     172.30.0.1/30  persistent tap; the guest is 172.30.0.2 behind it
//	  uplink0  second address of the slot's /30
//	  nftables netdev wrenn, inet wrenn
//	wrn<n>                    host end of the veth, first address of the /30
//
// Invariants:
//
//  1. Guest address, guest MAC, gateway address and gateway MAC are the same in
//     every slot: a snapshot holds the guest's half of them, its ARP cache
//     included, and must find the other half wherever it is restored.
//  2. Rules fail closed: chains that see the guest's packets drop by policy, and
//     a slot whose rules could not be loaded is never handed out.
//  3. The kernel objects are the record. A namespace carries its owner and its
//     egress setting as interface aliases, so there is no file that could
//     disagree with what exists, and both vanish together at a reboot.
//  4. A slot is never used twice: a released one is destroyed, with its
//     connection tracking and neighbours, and a new one is made.
//  5. Nothing that carries another owner's mark is ever changed or removed.
//     Several pools (state directories) may share a host; slot numbers, and so
//     names and addresses, are claimed host-wide.
//  6. A guest with names in its egress has its DNS queries answered by this
//     process, for these names alone; an address is open once it was answered.
//  7. A Web gets those web connections of a guest that the guest may make, and
//     what it sends on is held to the guest's rules by the kernel.
//  8. An OS thread that cannot be switched back to the host's namespace is
//     never given back to the Go scheduler.
package hostnet
