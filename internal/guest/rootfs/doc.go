// Package rootfs makes the file system of a container image the guest's own. It
// runs in the guest alone, as verbs of envd that a template's build calls one
// after the other; cmd/envd and internal/guest/boot import it.
//
//  1. "envd unpack-layer", once for each layer: [Unpack] reads a tar and applies
//     it to [NewRoot].
//  2. "envd adopt-root": [Adopt] puts into the new root what makes it a sandbox's
//     (the agent, the kernel's modules, the user), and marks it ready.
//  3. The sandbox boots from its disk again. The initramfs calls [Switch], which
//     moves the new root's entries to the top, and the old ones aside.
//  4. "envd drop-old-root": [Drop] removes those.
//
// Invariants:
//   - Layers are hostile, to their own guest at most. Their paths and links are
//     resolved with the new root as "/" (chroot), so nothing leads out of it.
//   - Devices are left out. Names, numbers of entries and what is kept in memory
//     are bounded; sizes are by the guest's disk.
//   - A switch that is cut off goes on where it was at the next boot.
package rootfs
