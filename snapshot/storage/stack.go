package storage

import (
	"errors"
	"fmt"
)

// StackOptions are what stands between a program and a remote store.
type StackOptions struct {
	Cache CacheOptions // an empty Dir: no cache
	// Encode changes how objects are stored, such as compressed
	// (snapshot/storage/zstd); nil: they are stored as they are.
	Encode  func(Objects) (Objects, error)
	Retry   RetryOptions
	Limit   LimitOptions
	Timeout TimeoutOptions
}

// A Stack is a store with its decorators; close it in the end.
type Stack struct {
	Objects
	// Cache is nil where there is none.
	Cache *Cache
}

// NewStack puts the decorators around o, in the one order that is right:
//
//	cache → encode → retry → limit → timeout → o
//
// What is in the cache costs no call, and is kept there as it is read. A call that waits to be tried again holds
// no slot of the limit, and pays for each try. The time limit is for the store
// alone, not for the waiting.
func NewStack(o Objects, options StackOptions) (*Stack, error) {
	if o == nil {
		return nil, errors.New("object store: it is nil")
	}
	s := &Stack{Objects: Retry(Limit(Timeout(o, options.Timeout), options.Limit), options.Retry)}
	var err error
	if options.Encode != nil {
		if s.Objects, err = options.Encode(s.Objects); err != nil {
			return nil, fmt.Errorf("object store: %w", err)
		}
	}
	if options.Cache.Dir == "" {
		return s, nil
	}
	if s.Cache, err = NewCache(s.Objects, options.Cache); err != nil {
		return nil, fmt.Errorf("object store: %w", err)
	}
	s.Objects = s.Cache
	return s, nil
}

// Close ends the cache's work; the store itself stays as it is.
func (s *Stack) Close() error {
	if s.Cache == nil {
		return nil
	}
	return s.Cache.Close()
}
