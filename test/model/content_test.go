package model

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"maps"
	"slices"
)

const blockSize = 4096

// content is what the oracle knows of blocks: their seeds. Seed 0 is zeros.
type content []uint64

// block is the ledger's block of a seed at a place.
func block(seed uint64, place int) []byte {
	if seed == 0 {
		return make([]byte, blockSize)
	}
	d := sha256.Sum256(fmt.Appendf(nil, "%d:%d", seed, place))
	return bytes.Repeat(d[:], blockSize/len(d))
}

// digest is the MD5 of all blocks, as the ledger computes it.
func (c content) digest() string {
	h := md5.New()
	for i, seed := range c {
		h.Write(block(seed, i))
	}
	return hex.EncodeToString(h.Sum(nil))
}

// differences tells which blocks are not what they must be, and what they are
// instead as far as one of the seeds in use explains it.
func (c content) differences(have []uint32, seeds map[uint64]bool) string {
	var b bytes.Buffer
	if len(have) != len(c) {
		fmt.Fprintf(&b, "%d blocks, want %d; ", len(have), len(c))
	}
	bad := 0
	for i := range min(len(have), len(c)) {
		if have[i] == crc32.ChecksumIEEE(block(c[i], i)) {
			continue
		}
		if bad++; bad > 16 {
			continue
		}
		is := "unknown bytes"
		for seed := range seeds {
			if have[i] == crc32.ChecksumIEEE(block(seed, i)) {
				is = fmt.Sprintf("seed %d", seed)
			}
		}
		fmt.Fprintf(&b, "block %d: want seed %d, is %s; ", i, c[i], is)
	}
	fmt.Fprintf(&b, "%d blocks are wrong", bad)
	return b.String()
}

// span is a run of blocks.
type span [2]int // start, count

// put writes a seed over spans.
func (c content) put(at []span, seed uint64) {
	for _, s := range at {
		for i := s[0]; i < s[0]+s[1]; i++ {
			c[i] = seed
		}
	}
}

// holding is what one sandbox, or one snapshot, holds.
type holding struct {
	memory content
	files  map[string]content
	// done is the number of the last change.
	done uint64
}

func newHolding(blocks int) holding {
	return holding{memory: make(content, blocks), files: map[string]content{}}
}

func (h holding) clone() holding {
	c := holding{memory: slices.Clone(h.memory), files: map[string]content{}, done: h.done}
	for name, f := range h.files {
		c.files[name] = slices.Clone(f)
	}
	return c
}

// seeds are all that occur, zeros included.
func (h holding) seeds(into map[uint64]bool) {
	into[0] = true
	for _, c := range append(slices.Collect(maps.Values(h.files)), h.memory) {
		for _, s := range c {
			into[s] = true
		}
	}
}

// change is one request to the ledger that changes something, and what it makes
// of a holding.
type change struct {
	Do     string `json:"do"`
	Number uint64 `json:"number"`
	Seed   uint64 `json:"seed"`
	Drop   bool   `json:"drop"`
	Name   string `json:"name,omitempty"`
	Blocks int    `json:"blocks"`
	At     []span `json:"at"`
	Sync   bool   `json:"sync"`
}

func (c change) String() string {
	n := 0
	for _, s := range c.At {
		n += s[1]
	}
	switch {
	case c.Do == "file":
		return fmt.Sprintf("file %s: %d of %d blocks of seed %d, sync %v", c.Name, n, c.Blocks, c.Seed, c.Sync)
	case c.Do == "memory":
		return fmt.Sprintf("memory: %d blocks of seed %d, drop %v", n, c.Seed, c.Drop)
	}
	return c.Do + " " + c.Name
}

// apply does to the holding what the ledger does to the guest.
func (h *holding) apply(c change) {
	h.done = c.Number
	switch c.Do {
	case "memory":
		h.memory.put(c.At, c.Seed)
	case "file":
		f := make(content, c.Blocks)
		copy(f, h.files[c.Name])
		f.put(c.At, c.Seed)
		h.files[c.Name] = f
	case "remove":
		delete(h.files, c.Name)
	}
}
