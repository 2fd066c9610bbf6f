package egress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

const (
	// peekWait is how long a guest may take to say which host it wants. One that
	// waits for the host to speak first is passed on then.
	peekWait = 5 * time.Second
	// maxPeek bounds what is read of a request before it is passed on.
	maxPeek = 64 << 10
)

// rewound is a connection whose first bytes are read again.
type rewound struct {
	net.Conn
	first []byte
}

func (c *rewound) Read(p []byte) (int, error) {
	if len(c.first) == 0 {
		return c.Conn.Read(p)
	}
	n := copy(p, c.first)
	c.first = c.first[n:]
	return n, nil
}

func (c *rewound) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return c.Close()
}

// recorder keeps what is read, up to maxPeek, and writes nothing.
type recorder struct {
	net.Conn
	got []byte
}

var errPeeked = errors.New("enough was read")

func (r *recorder) Read(p []byte) (int, error) {
	if len(r.got) >= maxPeek {
		return 0, errPeeked
	}
	n, err := r.Conn.Read(p[:min(len(p), maxPeek-len(r.got))])
	r.got = append(r.got, p[:n]...)
	return n, err
}

func (r *recorder) Write(p []byte) (int, error) { return len(p), nil }

// peek reads the host that a connection's first bytes name, and whether by TLS;
// none where they name none. Then they are read again from the result.
func peek(c net.Conn) (conn *rewound, host string, secure bool) {
	r := &recorder{Conn: c}
	_ = c.SetReadDeadline(time.Now().Add(peekWait))
	defer func() {
		_ = c.SetReadDeadline(time.Time{})
		conn.first = r.got
	}()
	conn = &rewound{Conn: c}
	in := bufio.NewReader(r)
	head, err := in.Peek(1)
	if err != nil {
		return conn, "", false
	}
	const handshake = 22 // the type of a TLS record
	if head[0] == handshake {
		return conn, hello(in, r), true
	}
	return conn, requestHost(in), false
}

// hello reads a ClientHello and gives its server name.
func hello(in io.Reader, r *recorder) (name string) {
	_ = tls.Server(readConn{r, in}, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		name = h.ServerName
		return nil, errPeeked
	}}).Handshake()
	return strings.ToLower(strings.TrimSuffix(name, "."))
}

type readConn struct {
	net.Conn
	in io.Reader
}

func (c readConn) Read(p []byte) (int, error) { return c.in.Read(p) }

// requestHost reads a request's head and gives its host.
func requestHost(in *bufio.Reader) string {
	var head bytes.Buffer
	for {
		line, err := in.ReadSlice('\n')
		head.Write(line)
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return ""
		}
		// What begins like no request is none, and may wait for an answer now.
		if head.Len() > 0 && (head.Bytes()[0] < 'A' || head.Bytes()[0] > 'Z') {
			return ""
		}
		if len(bytes.TrimRight(line, "\r\n")) == 0 && err == nil {
			break
		}
	}
	req, err := http.ReadRequest(bufio.NewReader(&head))
	if err != nil {
		return ""
	}
	return hostOf(req.Host)
}

// hostOf is the name of a Host header, without port.
func hostOf(s string) string {
	if h, _, err := net.SplitHostPort(s); err == nil {
		s = h
	}
	return strings.ToLower(strings.TrimSuffix(s, "."))
}
