package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// DefaultBaseURL is where `wrenn up` listens when it is not told otherwise.
const DefaultBaseURL = "http://127.0.0.1:8000"

const (
	// maxResponse bounds a JSON answer; the largest are pages of lists and the
	// captured output of Exec.
	maxResponse = 64 << 20
	// maxErrorBody bounds what is read of an answer that reports an error.
	maxErrorBody = 64 << 10
)

// retryDelays are the waits before the second and third try of a GET.
var retryDelays = []time.Duration{100 * time.Millisecond, 300 * time.Millisecond}

// Options configures a Client.
type Options struct {
	// BaseURL is the API's root, http or https; empty means DefaultBaseURL.
	BaseURL string
	// APIKey is sent as X-API-Key; empty sends none.
	APIKey string
	// HTTPClient carries all requests; nil means one of our own without an
	// overall time limit (contexts limit calls; transfers may take long).
	HTTPClient *http.Client
	// UserAgent is sent with each request; empty means "wrenn-go".
	UserAgent string
}

// Client calls one Wrenn server.
type Client struct {
	base      *url.URL
	key       string
	http      *http.Client
	userAgent string
}

// New checks the options and makes a client. It does not talk to the server.
func New(o Options) (*Client, error) {
	if o.BaseURL == "" {
		o.BaseURL = DefaultBaseURL
	}
	u, err := url.Parse(o.BaseURL)
	if err != nil {
		return nil, fmt.Errorf("base URL %q: %w", o.BaseURL, err)
	}
	if (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("base URL %q: want http://HOST[:PORT] or https://HOST[:PORT]", o.BaseURL)
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("base URL %q: must have no query and no fragment", o.BaseURL)
	}
	if strings.ContainsFunc(o.APIKey, func(r rune) bool { return r <= ' ' || r > '~' }) {
		// Go's HTTP client would refuse it too, quoting the key in its error.
		return nil, errors.New("API key: holds a character that cannot be in a header")
	}
	if o.HTTPClient == nil {
		o.HTTPClient = &http.Client{}
		if t, ok := http.DefaultTransport.(*http.Transport); ok {
			o.HTTPClient.Transport = t.Clone()
		}
	}
	if o.UserAgent == "" {
		o.UserAgent = "wrenn-go"
	}
	return &Client{base: u, key: o.APIKey, http: o.HTTPClient, userAgent: o.UserAgent}, nil
}

// BaseURL is the server this client calls.
func (c *Client) BaseURL() string { return c.base.String() }

// Health asks the server whether it can take work; nil means yes. It needs no
// API key.
func (c *Client) Health(ctx context.Context) error {
	return c.call(ctx, http.MethodGet, c.url(nil, "healthz"), nil, nil)
}

// url joins path elements, each escaped, under the base URL.
func (c *Client) url(query url.Values, elem ...string) string {
	esc := make([]string, len(elem))
	for i, e := range elem {
		esc[i] = url.PathEscape(e)
	}
	u := *c.base
	u.RawQuery = query.Encode()
	// JoinPath keeps the escaping of its elements.
	return u.JoinPath(esc...).String()
}

func (c *Client) newRequest(ctx context.Context, method, url string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, url, err)
	}
	c.setHeaders(req.Header)
	return req, nil
}

func (c *Client) setHeaders(h http.Header) {
	h.Set("User-Agent", c.userAgent)
	if c.key != "" {
		h.Set("X-API-Key", c.key)
	}
}

// call sends in as JSON (nil: no body) and decodes the answer into out (nil:
// the body is dropped).
func (c *Client) call(ctx context.Context, method, url string, in, out any) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return fmt.Errorf("%s: encoding the request: %w", method, err)
		}
	}
	res, err := c.send(ctx, method, url, body)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if out == nil {
		// Read what is left so that the connection can be used again.
		_, _ = io.CopyN(io.Discard, res.Body, maxErrorBody)
		return nil
	}
	lr := &io.LimitedReader{R: res.Body, N: maxResponse + 1}
	if err := json.NewDecoder(lr).Decode(out); err != nil {
		if lr.N <= 0 {
			return fmt.Errorf("%s %s: answer is larger than %d bytes", method, url, maxResponse)
		}
		return fmt.Errorf("%s %s: reading the answer: %w", method, url, err)
	}
	return nil
}

// send does one JSON exchange, tries a GET, or what carries an idempotency key,
// again whose connection failed, and
// turns an answer outside 2xx into an *Error. The caller closes the body.
func (c *Client) send(ctx context.Context, method, url string, body []byte) (*http.Response, error) {
	for try := 0; ; try++ {
		var r io.Reader
		if body != nil {
			r = bytes.NewReader(body)
		}
		req, err := c.newRequest(ctx, method, url, r)
		if err != nil {
			return nil, err
		}
		if body != nil {
			req.Header.Set("Content-Type", "application/json")
		}
		again := method == http.MethodGet
		if key := idempotencyKeyOf(ctx); key != "" && method == http.MethodPost {
			req.Header.Set("Idempotency-Key", key)
			again = true
		}
		res, err := c.do(req)
		var apiErr *Error
		if err == nil || errors.As(err, &apiErr) || !again ||
			try >= len(retryDelays) || ctx.Err() != nil {
			return res, err
		}
		if wait(ctx, retryDelays[try]) != nil {
			return nil, err
		}
	}
}

// do sends one request and turns an answer outside 2xx into an *Error.
func (c *Client) do(req *http.Request) (*http.Response, error) {
	res, err := c.http.Do(req)
	if err != nil {
		return nil, err // a *url.Error: it names the method and the URL
	}
	if res.StatusCode < 200 || res.StatusCode > 299 {
		defer res.Body.Close()
		return nil, responseError(res)
	}
	return res, nil
}

// wait sleeps for d or until ctx ends.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
