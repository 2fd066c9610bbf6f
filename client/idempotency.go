package client

import (
	"context"
	"crypto/rand"
)

type idempotencyKey struct{}

// WithIdempotencyKey makes the calls under ctx that change something carry key,
// so that sending one again, after a connection broke or in another process,
// does its work once and returns the first answer. A key is for one request.
// Creating, forking and snapshotting have a random one where ctx has none.
func WithIdempotencyKey(ctx context.Context, key string) context.Context {
	return context.WithValue(ctx, idempotencyKey{}, key)
}

func idempotencyKeyOf(ctx context.Context) string {
	key, _ := ctx.Value(idempotencyKey{}).(string)
	return key
}

// once gives ctx a random key, unless it has one.
func once(ctx context.Context) context.Context {
	if idempotencyKeyOf(ctx) != "" {
		return ctx
	}
	return WithIdempotencyKey(ctx, rand.Text())
}
