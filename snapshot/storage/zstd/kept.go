package zstd

import "sync"

// kept holds indexes of objects that do not change, as many as fit. Which one
// makes room is left to chance: to read one again costs one call.
type kept struct {
	mu    sync.Mutex
	limit int
	bytes int
	byKey map[string]*index
}

func newKept(limit int) *kept { return &kept{limit: limit, byKey: map[string]*index{}} }

// costOf is about what an index takes in memory.
func costOf(key string, x *index) int { return 128 + len(key) + 16*len(x.entries) }

func (k *kept) get(key string) *index {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.byKey[key]
}

func (k *kept) put(key string, x *index) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.remove(key)
	for other := range k.byKey {
		if k.bytes+costOf(key, x) <= k.limit {
			break
		}
		k.remove(other)
	}
	if k.bytes+costOf(key, x) <= k.limit {
		k.byKey[key] = x
		k.bytes += costOf(key, x)
	}
}

func (k *kept) drop(key string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.remove(key)
}

func (k *kept) remove(key string) {
	if x, ok := k.byKey[key]; ok {
		delete(k.byKey, key)
		k.bytes -= costOf(key, x)
	}
}
