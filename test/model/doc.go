// Package model is the model test: random operations and faults against real
// VMs, and an oracle that knows what every sandbox and snapshot must hold.
//
// In each guest a process, the ledger, holds blocks of memory and files; each
// block is made of a seed and its place, so that the oracle knows each by one
// number, in clones and forks too. Checksums are made in the guest.
//
// Every step draws from its own generator, made of the run's seed and the
// step's number. The same seed gives the same steps, as long as operations that
// a fault interrupted come to the same end.
package model
