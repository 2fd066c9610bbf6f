package control

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"sync"
	"time"
)

// KeepAnswers is how long the answer of a request with an idempotency key is
// given again.
const KeepAnswers = 24 * time.Hour

// Answer is what a request with an idempotency key was answered with. Status 0
// says that it has not been answered yet.
type Answer struct {
	// Scope is the ID of the API key; Name is the idempotency key.
	Scope, Name string
	// Digest tells the request from another one under the same name.
	Digest    string
	Status    int
	Location  string
	Body      string
	CreatedAt time.Time
}

// answering are the requests with idempotency keys that this process is at
// work on. Its channels close when the answer is there.
type answering struct {
	mu sync.Mutex
	m  map[[2]string]chan struct{}
}

func (a *answering) begin(key [2]string) (wait <-chan struct{}, end func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c, ok := a.m[key]; ok {
		return c, nil
	}
	c := make(chan struct{})
	a.m[key] = c
	return nil, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.m, key)
		close(c)
	}
}

var answerNameRE = regexp.MustCompile(`^[\x21-\x7e]{1,255}$`)

// RequestDigest is the Digest of a request.
func RequestDigest(method, path string, body []byte) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s %q %d\n", method, path, len(body))
	h.Write(body)
	return hex.EncodeToString(h.Sum(nil))
}

// Once carries out do at most once for scope and name within KeepAnswers, and
// gives its answer again, replayed, to whoever asks again with the same digest.
// Two at once: the second waits for the first. Only success is kept: after an
// error the request may be sent again under the same name.
func (s *Service) Once(ctx context.Context, a Answer, do func() Answer) (_ Answer, replayed bool, err error) {
	if !answerNameRE.MatchString(a.Name) {
		return a, false, Invalid("Idempotency-Key", "must be 1 to 255 visible ASCII characters, such as a UUID")
	}
	key := [2]string{a.Scope, a.Name}
	wait, end := s.answering.begin(key)
	for wait != nil {
		select {
		case <-wait:
		case <-ctx.Done():
			return a, false, context.Cause(ctx)
		}
		wait, end = s.answering.begin(key)
	}
	defer end()
	a.CreatedAt = s.now()
	old, err := s.store.ClaimAnswer(ctx, a)
	switch {
	case errors.Is(err, ErrExists):
		return s.again(old, a)
	case err != nil:
		return a, false, fmt.Errorf("claim an idempotency key: %w", err)
	}
	return s.answer(ctx, a, do)
}

// again gives a kept answer.
func (s *Service) again(old, a Answer) (Answer, bool, error) {
	switch {
	case old.Digest != a.Digest:
		return a, false, errorf(CodeConflict, "Idempotency-Key: was used for another request within the last 24 hours; take a new one")
	case old.Status == 0:
		// Nobody is at work on it, so a process that was ended was.
		return a, false, errorf(CodeConflict, "Idempotency-Key: the server was ended while it worked on this request; look at what there is, then take a new key")
	}
	return old, true, nil
}

// answer does the work and keeps its answer.
func (s *Service) answer(ctx context.Context, a Answer, do func() Answer) (_ Answer, _ bool, err error) {
	kept := false
	defer func() { // also when do panics
		if kept {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), noteTimeout)
		defer cancel()
		err := s.store.DropAnswer(ctx, a.Scope, a.Name)
		if err != nil {
			s.log.WarnContext(ctx, "take back an idempotency key", "err", err)
		}
	}()
	got := do()
	a.Status, a.Location, a.Body = got.Status, got.Location, got.Body
	if a.Status/100 != 2 {
		return a, false, nil
	}
	kept = true
	fctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), noteTimeout)
	defer cancel()
	if err := s.store.FinishAnswer(fctx, a); err != nil {
		// It was done: the caller gets the answer, a repetition a conflict.
		s.log.WarnContext(ctx, "keep an answer", "err", err)
	}
	return a, false, nil
}
