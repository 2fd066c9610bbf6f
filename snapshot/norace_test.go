//go:build !race

package snapshot

const (
	sequences = 10_000
	stride    = 1
)
