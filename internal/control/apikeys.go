package control

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// keyRE is the form of a key. The second one is what the E2B SDKs check for.
var keyRE = regexp.MustCompile(`^(wrn_[0-9a-f]{40}|e2b_[0-9a-f]{40})$`)

// NewAPIKey makes a key of 160 random bits and the row to store for it. The
// key itself is in nobody's hands but the caller's.
func NewAPIKey(name string) (key string, row APIKey) {
	var b [20]byte
	rand.Read(b[:]) // never fails
	key = "wrn_" + hex.EncodeToString(b[:])
	return key, rowOf(key, name)
}

func rowOf(key, name string) APIKey {
	return APIKey{ID: newID(), Name: name, Prefix: key[:8], Hash: hashKey(key), CreatedAt: stamp(time.Now())}
}

func hashKey(key string) string {
	h := sha256.Sum256([]byte(key))
	return hex.EncodeToString(h[:])
}

var errUnauthorized = errorf(CodeUnauthorized, "a valid API key is needed, as X-API-Key or Authorization: Bearer; `wrenn up` writes the first one to the file api-key in its directory")

// Authenticate finds the row of a key. Keys are compared by their hash, so the
// time taken tells nothing about a stored key.
func (s *Service) Authenticate(ctx context.Context, key string) (APIKey, error) {
	if !keyRE.MatchString(key) {
		return APIKey{}, errUnauthorized
	}
	hash := hashKey(key)
	row, err := s.store.GetAPIKeyByHash(ctx, hash)
	if errors.Is(err, ErrNotFound) {
		return APIKey{}, errUnauthorized
	}
	if err != nil {
		return APIKey{}, fmt.Errorf("look up API key: %w", err)
	}
	if subtle.ConstantTimeCompare([]byte(row.Hash), []byte(hash)) != 1 {
		return APIKey{}, errUnauthorized
	}
	return row, nil
}

// EnsureAPIKey sees to it that the file at path holds a key that the store
// knows: it makes both if there is no file (mode 0600), and stores the file's
// key again if the database is a new one.
func EnsureAPIKey(ctx context.Context, store Store, path string) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key, row := NewAPIKey("local")
		if err := store.CreateAPIKey(ctx, row); err != nil {
			return fmt.Errorf("store the first API key: %w", err)
		}
		return writeKey(path, key)
	}
	if err != nil {
		return fmt.Errorf("read API key file: %w", err)
	}
	key := strings.TrimSpace(string(b))
	if !keyRE.MatchString(key) {
		return fmt.Errorf("API key file %s holds no key; remove it to have a new one made", path)
	}
	if err := store.CreateAPIKey(ctx, rowOf(key, "local")); err != nil && !errors.Is(err, ErrExists) {
		return fmt.Errorf("store the API key of %s: %w", path, err)
	}
	return nil
}

// writeKey writes the file whole or not at all.
func writeKey(path, key string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".api-key-*") // mode 0600
	if err != nil {
		return fmt.Errorf("write API key file: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.WriteString(key + "\n")
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write API key file: %w", err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("write API key file: %w", err)
	}
	return nil
}
