package block_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// A disk of zeros is written to; what changed is all that its files have, and
// is there again when another process opens them.
func Example() {
	dir, err := os.MkdirTemp("", "example")
	check(err)
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk")
	base := block.Zeros(64 * block.BlockSize) // or an image of a snapshot.Store

	disk, err := block.OpenOverlay(storage.OS{}, path, base)
	check(err)
	_, err = disk.WriteAt([]byte("hello"), 3*block.BlockSize+100)
	check(err)
	check(disk.Zero(10*block.BlockSize, 2*block.BlockSize)) // as TRIM does
	check(disk.Flush())                                     // survives a loss of power from here on
	check(disk.Close())

	disk, err = block.OpenOverlay(storage.OS{}, path, base)
	check(err)
	p := make([]byte, 5)
	_, err = disk.ReadAt(p, 3*block.BlockSize+100)
	check(err)
	fmt.Printf("%s\n", p)
	disk.Dirty(func(off, n int64, kind format.Kind) bool {
		fmt.Printf("blocks from %d, %d of them: %v\n", off/block.BlockSize, n/block.BlockSize, kind)
		return true
	})
	check(disk.Close())
	check(block.RemoveOverlay(storage.OS{}, path))
	// Output:
	// hello
	// blocks from 3, 1 of them: data
	// blocks from 10, 2 of them: zero
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
