package storage_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"strings"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// Objects in a directory, behind what a store far away would need: a cache on
// the local disk, tries again, a limit and a time limit, in the one right order.
func ExampleNewStack() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example")
	check(err)
	defer os.RemoveAll(dir)
	files, err := storage.NewFiles(storage.OS{}, filepath.Join(dir, "objects"))
	check(err)
	objects, err := storage.NewStack(files, storage.StackOptions{
		Cache: storage.CacheOptions{Dir: filepath.Join(dir, "cache")},
	})
	check(err)
	defer objects.Close()

	check(objects.Put(ctx, "greetings/first", strings.NewReader("hello, store"), 12))
	p := make([]byte, 5)
	_, err = objects.ReadAt(ctx, "greetings/first", p, 7)
	check(err)
	fmt.Printf("%s\n", p)
	_, err = objects.ReadAt(ctx, "greetings/second", p, 0)
	fmt.Println(errors.Is(err, fs.ErrNotExist))
	// Output:
	// store
	// true
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
