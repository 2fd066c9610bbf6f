package guest

import "sync"

// Bounds of one process's output in memory.
const (
	// outputLimit is how much output that nobody has taken yet is kept, in
	// bytes, each piece counted with its bookkeeping.
	outputLimit = 256 << 10
	// pieceSize is the largest piece, and so the largest data event.
	pieceSize     = 32 << 10
	pieceOverhead = 64
)

// channel tells where a piece of output was written to.
type channel uint8

const (
	chanStdout channel = iota
	chanStderr
	chanPTY
)

type piece struct {
	from channel
	data []byte
}

// output is what a process wrote and no client has taken yet.
//
// While clients are attached, a full buffer holds the process up: the slowest
// of them sets the pace and nothing is lost. While none is, the process runs
// on and the oldest output is dropped. A client that attaches goes on where
// the last piece handed to any client ended.
type output struct {
	mu    sync.Mutex
	space *sync.Cond // signalled when pieces go or clients detach
	// pieces[0] has the number first.
	pieces []piece
	first  uint64
	size   int
	// taken is the number after the last piece that reached some client.
	taken   uint64
	readers map[*reader]struct{}
	ended   bool
	end     endState
}

// endState is how a process ended.
type endState struct {
	code     int
	exited   bool
	status   string
	timedOut bool
}

// reader is one attached client.
type reader struct {
	out  *output
	next uint64
	// wake has a token when there may be something new.
	wake chan struct{}
}

func newOutput() *output {
	o := &output{readers: map[*reader]struct{}{}}
	o.space = sync.NewCond(&o.mu)
	return o
}

// write adds what a process wrote; it copies data and waits for the slowest
// client. After finish it discards.
func (o *output) write(from channel, data []byte) {
	cost := len(data) + pieceOverhead
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.size+cost > outputLimit && len(o.readers) > 0 && !o.ended {
		o.space.Wait()
	}
	if o.ended {
		return
	}
	for o.size+cost > outputLimit {
		o.drop()
	}
	o.pieces = append(o.pieces, piece{from, append([]byte(nil), data...)})
	o.size += cost
	o.wakeAll()
}

func (o *output) drop() {
	o.size -= len(o.pieces[0].data) + pieceOverhead
	o.pieces[0] = piece{}
	o.pieces = o.pieces[1:]
	o.first++
}

func (o *output) wakeAll() {
	for r := range o.readers {
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
}

// finish ends the output: clients get what is left, then the end.
func (o *output) finish(end endState) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended, o.end = true, end
	o.space.Broadcast()
	o.wakeAll()
}

// ending is how the process ended; only after peek said that it has.
func (o *output) ending() endState {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.end
}

func (o *output) attach() *reader {
	r := &reader{out: o, wake: make(chan struct{}, 1)}
	o.mu.Lock()
	defer o.mu.Unlock()
	r.next = max(o.first, o.taken)
	o.readers[r] = struct{}{}
	return r
}

func (r *reader) detach() {
	o := r.out
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.readers, r)
	o.trim()
	o.space.Broadcast()
}

// trim forgets what every attached client has, and nobody else can want.
func (o *output) trim() {
	low := o.taken
	for r := range o.readers {
		low = min(low, r.next)
	}
	for o.first < low && len(o.pieces) > 0 {
		o.drop()
	}
}

// peek returns the next output of one channel, joined up to pieceSize, and how
// many pieces that is; none and ended means that the end is reached. Call ack
// with the count when the client has it.
func (r *reader) peek() (from channel, data []byte, n int, ended bool) {
	o := r.out
	o.mu.Lock()
	defer o.mu.Unlock()
	rest := o.pieces[r.next-o.first:]
	if len(rest) == 0 {
		return 0, nil, 0, o.ended
	}
	from, data, n = rest[0].from, rest[0].data, 1
	for _, p := range rest[1:] {
		if p.from != from || len(data)+len(p.data) > pieceSize {
			break
		}
		if n == 1 {
			// The piece itself is shared with the other clients.
			data = append(make([]byte, 0, pieceSize), data...)
		}
		data = append(data, p.data...)
		n++
	}
	return from, data, n, false
}

func (r *reader) ack(n int) {
	o := r.out
	o.mu.Lock()
	defer o.mu.Unlock()
	r.next += uint64(n)
	o.taken = max(o.taken, r.next)
	o.trim()
	o.space.Broadcast()
}
