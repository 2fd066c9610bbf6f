//go:build race

package snapshot

// The race detector slows the exhaustive tests down tenfold: under it they do a
// part of their work, and all of it in the run without, which `make unit` does
// too.
const (
	sequences = 300 // of TestManySequencesEqualOracle
	stride    = 5   // of the tests that try every operation
)
