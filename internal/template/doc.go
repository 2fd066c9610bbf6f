// Package template builds what a sandbox boots from: a disk image with Debian
// and the guest agent, its kernel and its initramfs. The engine and cmd/wrenn
// import it; it imports nothing of this project.
//
// A build has two stages, each cached under the digest of its own inputs:
//
//   - packages: mmdebstrap and customize.sh make a root file system, which
//     becomes an ext4 image; kernel image and boot modules are put beside it.
//     This is the stage that needs the network, and half a minute.
//   - template: the packages stage's image plus the envd binary, and the
//     initramfs with the same binary as /init. This is all that runs again when
//     only envd changed.
//
// Invariants:
//   - A directory named by a digest is complete: it is made under a temporary
//     name, its files are synced, and it is renamed into place. Its meta.json
//     names what it holds; what does not fit is built again.
//   - The same inputs give the same bytes, as long as the mirror offers the same
//     packages: identifiers and times in the image are fixed.
//   - At most one build works in a cache directory, across processes (flock).
//     What a killed build left is removed by the next one, mounts first.
//   - The network is used by the packages stage only.
package template
