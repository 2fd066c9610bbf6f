// Package oci pulls container images from registries: it finds the image for
// this machine behind a reference, and gives its layers as verified streams.
// internal/templatebuild and cmd/wrenn import it.
//
// Invariants:
//   - Images, their registries and the references to them are hostile. Nothing is
//     unpacked here, nothing is written to disk, and memory does not grow with
//     the image: layers pass through, into the guest that unpacks them.
//   - Whatever name, redirect or token service a registry gives, connections go to
//     public addresses that are not this machine's, by HTTPS. Others, and plain
//     HTTP, are for the registries that the operator names.
//   - A layer that ends without an error has the digest of its manifest and, unpacked,
//     that of its configuration. Sizes and counts are bounded.
package oci
