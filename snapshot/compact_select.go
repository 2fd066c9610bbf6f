package snapshot

import (
	"iter"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// clusterBlocks is what one page fault reads: 64 KiB.
const clusterBlocks = 16

// selection says which blocks of an image a compaction copies: those of some
// builds, and those of clusters that lie in more than pieces pieces of storage
// (0: no cluster for that reason).
type selection struct {
	builds []bool
	pieces int
}

// parts divides an image's mappings where a cluster begins or ends, unless one
// holds whole clusters, and tells of each part whether it is copied.
func (sel selection) parts(h *format.Header) iter.Seq2[format.Mapping, bool] {
	return func(yield func(format.Mapping, bool) bool) {
		var open [clusterBlocks]format.Mapping // the parts of one cluster
		n, pieces := 0, 0
		flush := func() bool {
			scattered := sel.pieces > 0 && pieces > sel.pieces
			for _, m := range open[:n] {
				if !yield(m, scattered || sel.builds[m.Build]) {
					return false
				}
			}
			n, pieces = 0, 0
			return true
		}
		for _, m := range h.Mappings.All() {
			for m.Length > 0 {
				if n > 0 && open[0].Start/clusterBlocks != m.Start/clusterBlocks && !flush() {
					return
				}
				whole := m.Length / clusterBlocks * clusterBlocks
				if n == 0 && m.Start%clusterBlocks == 0 && whole > 0 {
					if !yield(head(m, whole), sel.builds[m.Build]) {
						return
					}
					m = rest(m, whole)
					continue
				}
				part := head(m, min(m.Length, clusterBlocks-m.Start%clusterBlocks))
				if n == 0 || !continues(open[n-1], part) {
					pieces++
				}
				open[n] = part
				n++
				m = rest(m, part.Length)
			}
		}
		flush()
	}
}

func head(m format.Mapping, n uint64) format.Mapping {
	m.Length = n
	return m
}

func rest(m format.Mapping, n uint64) format.Mapping {
	return format.Mapping{Start: m.Start + n, Length: m.Length - n, Build: m.Build, Offset: m.Offset + n}
}

// continues reports whether b lies right behind a in the storage.
func continues(a, b format.Mapping) bool {
	return a.Build == b.Build && a.Offset+a.Length == b.Offset
}

// layout is what an image is made of.
type layout struct {
	builds    int
	fragments int    // mappings
	clusters  int    // that hold data
	pieces    int    // of storage, cluster by cluster
	copied    uint64 // blocks
}

// layout tells what the image is made of once the selection has been copied
// into one new build, in the order of the image.
func (sel selection) layout(h *format.Header) layout {
	var l layout
	used := make([]bool, len(h.Builds)+1)
	var last format.Mapping
	for m, copied := range sel.parts(h) {
		if copied {
			m.Build, m.Offset = uint32(len(h.Builds)), l.copied
			l.copied += m.Length
		}
		used[m.Build] = true
		joined := l.fragments > 0 && continues(last, m)
		if !joined || last.End() != m.Start {
			l.fragments++
		}
		switch same := l.fragments > 0 && l.clusters > 0 && (last.End()-1)/clusterBlocks == m.Start/clusterBlocks; {
		case !same:
			n := int((m.Length + clusterBlocks - 1) / clusterBlocks)
			l.clusters += n
			l.pieces += n
		case !joined:
			l.pieces++
		}
		last = m
	}
	for _, u := range used {
		if u {
			l.builds++
		}
	}
	return l
}
