package format_test

import (
	"fmt"
	"log"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// An image of eight blocks has four of them in a first build; a second one
// writes one and makes another zero. The second header is complete: whoever
// reads it needs to know nothing of the first.
func Example() {
	first := format.BuildRef{ID: format.NewID(), Blocks: 4}
	base, err := format.New(8*format.BlockSize, first, []format.Extent{
		{Start: 1, Length: 4, Kind: format.Data, Offset: 0},
	})
	check(err)
	second := format.BuildRef{ID: format.NewID(), Blocks: 1}
	h, err := format.Merge(base, second, []format.Extent{
		{Start: 2, Length: 1, Kind: format.Data, Offset: 0},
		{Start: 3, Length: 1, Kind: format.Zero},
	})
	check(err)

	encoded, err := format.Encode(h)
	check(err)
	h, err = format.Decode(encoded) // as another process does
	check(err)
	names := map[format.ID]string{first.ID: "first", second.ID: "second"}
	for block := uint64(0); block < h.Blocks(); {
		m, kind, run := h.Lookup(block)
		if kind == format.Data {
			fmt.Printf("block %d, %d of them: block %d of the %s build\n", block, run, m.Offset+block-m.Start, names[h.Builds[m.Build].ID])
		} else {
			fmt.Printf("block %d, %d of them: %v\n", block, run, kind)
		}
		block += run
	}

	encoded[50] ^= 1
	_, err = format.Decode(encoded)
	fmt.Println(err != nil)
	// Output:
	// block 0, 1 of them: zero
	// block 1, 1 of them: block 0 of the first build
	// block 2, 1 of them: block 0 of the second build
	// block 3, 1 of them: zero
	// block 4, 1 of them: block 3 of the first build
	// block 5, 3 of them: zero
	// true
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
