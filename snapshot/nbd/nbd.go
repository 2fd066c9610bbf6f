// Package nbd serves a block device to one VMM (or several readers) over the
// NBD protocol, on a listener that is usually a unix socket: fixed newstyle
// negotiation, simple replies, no TLS. Specification:
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
//
// It stands on a Device, which snapshot/block's Overlay implements, and on the
// standard library. Whoever runs sandboxes may import it; it knows nothing of
// images, sandboxes or processes.
//
// Invariants:
//
//  1. A reply to FLUSH, or to a write with FUA, is sent only after
//     Device.Flush returned without error and after every write that was
//     answered before.
//  2. A write reaches the Device only when its whole payload has arrived: a
//     client that dies in mid-request changes nothing.
//  3. No length of a request is trusted before it is checked against
//     MaxRequest and the size of the device; memory in flight per connection
//     is bounded.
//  4. A client that sends garbage, stalls or dies loses its own connection and
//     nothing else.
//  5. With Options.Exclusive a request of a replaced client never takes effect
//     after the first request of its successor.
package nbd

import (
	"log/slog"
	"time"
)

// MaxRequest is the largest READ or WRITE, in bytes: the limit that the
// specification lets clients rely on. TRIM and WRITE_ZEROES carry no payload
// and are bounded by the device only.
const MaxRequest = 32 << 20

// Device is what is served. Offsets and lengths are in bytes, any alignment,
// already checked against Size, which must not change. All methods are called
// from several goroutines at once. An error wrapping syscall.ENOSPC, EPERM or
// ENOMEM reaches the client as such, any other as EIO.
type Device interface {
	Size() int64
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	// Zero makes [off, off+n) read as zeros and frees its storage.
	Zero(off, n int64) error
	// Flush makes everything written before it durable.
	Flush() error
}

// Options are the knobs of Serve. The zero value is usable.
type Options struct {
	// Name is the export's name; clients must ask for exactly this.
	Name string
	// ReadOnly refuses WRITE, TRIM and WRITE_ZEROES with EPERM.
	ReadOnly bool
	// Exclusive is for a device with one rightful client: a client that
	// finishes negotiation replaces the one before, after that one's
	// requests have ended. It is what a VMM that reconnects needs, because a
	// request of the lost connection must not overtake its repetition.
	Exclusive bool
	// MaxConns bounds the connections at a time, more are closed at once.
	// Default 16.
	MaxConns int
	// MaxInflight bounds the requests at work per connection. Default 16.
	MaxInflight int
	// NegotiationTimeout bounds the time a client may take before its
	// transmission phase. Default 10 s.
	NegotiationTimeout time.Duration
	// Logger gets one line per connection that ended for a reason other than
	// the client's wish, and one per failed request. Default: none.
	Logger *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.MaxConns <= 0 {
		o.MaxConns = 16
	}
	if o.MaxInflight <= 0 {
		o.MaxInflight = 16
	}
	if o.NegotiationTimeout <= 0 {
		o.NegotiationTimeout = 10 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}
