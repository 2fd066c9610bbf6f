package proxy

import (
	"io"
	"net/http"
	"sync"
	"time"
)

// pacedBody ends a request's body that stands still for idleBody.
type pacedBody struct {
	io.ReadCloser
	rc *http.ResponseController
}

func (b *pacedBody) Read(p []byte) (int, error) {
	// Where the connection has no deadlines the body is not paced.
	paced := b.rc.SetReadDeadline(time.Now().Add(idleBody)) == nil
	n, err := b.ReadCloser.Read(p)
	if paced && err == nil {
		_ = b.rc.SetReadDeadline(time.Time{})
	}
	if err == io.EOF && paced {
		// What is read from now on is the next request.
		_ = b.rc.SetReadDeadline(time.Time{})
	}
	return n, err
}

// buffers lends the buffers that bodies pass through.
type buffers struct{ pool sync.Pool }

func newBuffers() *buffers {
	return &buffers{sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}}
}

func (b *buffers) Get() []byte  { return *b.pool.Get().(*[]byte) }
func (b *buffers) Put(p []byte) { b.pool.Put(&p) }
