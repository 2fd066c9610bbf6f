package control

import "context"

type reserveKey struct{}

// WithReserve marks what is done under ctx as what must not fail for want of room
// on the database's disk: deletes, which make room, and looks at the host, which
// make the rows say what is. A Store that keeps room for such writes gives it.
func WithReserve(ctx context.Context) context.Context {
	return context.WithValue(ctx, reserveKey{}, true)
}

// MayUseReserve tells whether ctx is so marked.
func MayUseReserve(ctx context.Context) bool {
	may, _ := ctx.Value(reserveKey{}).(bool)
	return may
}
