package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage/storagetest"
)

var bg = context.Background()

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func options(s storagetest.S3Server, bucket, prefix string) Options {
	return Options{
		Endpoint: s.Endpoint, Bucket: bucket, Prefix: prefix,
		AccessKey: s.AccessKey, SecretKey: s.SecretKey, PartSize: minPart,
	}
}

func TestS3Conforms(t *testing.T) {
	server := storagetest.StartS3(t)
	var buckets atomic.Int32
	open := func(prefix string) func(t *testing.T) storage.Objects {
		return func(t *testing.T) storage.Objects {
			o, err := New(options(server, fmt.Sprintf("bucket-%d", buckets.Add(1)), prefix))
			must(t, err)
			must(t, o.MakeBucket(bg))
			must(t, o.MakeBucket(bg))
			return o
		}
	}
	t.Run("bucket", func(t *testing.T) { storagetest.RunObjects(t, open("")) })
	t.Run("prefix", func(t *testing.T) { storagetest.RunObjects(t, open("some/where/")) })
	t.Run("decorators", func(t *testing.T) {
		storagetest.RunObjects(t, func(t *testing.T) storage.Objects {
			s, err := storage.NewStack(open("x/")(t), storage.StackOptions{Cache: storage.CacheOptions{
				Dir: t.TempDir(),
				// The suite changes this one while it is being read.
				Cacheable: func(key string) bool { return key != "dir/k" },
			}})
			must(t, err)
			t.Cleanup(func() { must(t, s.Close()) })
			return s
		})
	})
}

// Two prefixes of one bucket do not see each other.
func TestPrefixesAreApart(t *testing.T) {
	server := storagetest.StartS3(t)
	a, err := New(options(server, "shared", "a/"))
	must(t, err)
	must(t, a.MakeBucket(bg))
	b, err := New(options(server, "shared", "b/"))
	must(t, err)
	must(t, a.Put(bg, "k", strings.NewReader("1"), 1))
	_, err = b.Head(bg, "k")
	if !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Head in the other prefix: %v", err)
	}
	if page, _, err := b.List(bg, "", ""); err != nil || len(page) != 0 {
		t.Fatalf("List in the other prefix: %v, %v", page, err)
	}
}

// What will not pass by itself is not called transient, and says why.
func TestRefusalsArePermanent(t *testing.T) {
	server := storagetest.StartS3(t)
	good := options(server, "bucket", "")
	for name, change := range map[string]func(*Options){
		"no such bucket": func(*Options) {},
		"wrong secret":   func(o *Options) { o.SecretKey = "wrong" },
		"unknown key":    func(o *Options) { o.AccessKey = "unknown" },
	} {
		o := good
		change(&o)
		s, err := New(o)
		must(t, err)
		_, rerr := s.ReadAt(bg, "k", make([]byte, 1), 0)
		_, _, lerr := s.List(bg, "", "")
		for op, err := range map[string]error{"put": s.Put(bg, "k", strings.NewReader("x"), 1), "read": rerr, "list": lerr} {
			if err == nil || errors.Is(err, storage.ErrTransient) || errors.Is(err, storage.ErrThrottled) || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %s: %v", name, op, err)
			}
		}
	}
}

func TestNewRefusesBadOptions(t *testing.T) {
	good := Options{Endpoint: "http://127.0.0.1:1", Bucket: "bucket"}
	for field, change := range map[string]func(*Options){
		"Endpoint":  func(o *Options) { o.Endpoint = "127.0.0.1:1" },
		"Bucket":    func(o *Options) { o.Bucket = "" },
		"Prefix":    func(o *Options) { o.Prefix = "no-slash" },
		"SecretKey": func(o *Options) { o.AccessKey = "a" },
		"PartSize":  func(o *Options) { o.PartSize = 1 },
	} {
		o := good
		change(&o)
		if _, err := New(o); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("want an error about %s, got %v", field, err)
		}
	}
}

// answering returns a client of a server that answers as told.
func answering(t *testing.T, h http.HandlerFunc) *Objects {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	o, err := New(Options{Endpoint: s.URL, Bucket: "bucket", AccessKey: "a", SecretKey: "b"})
	must(t, err)
	return o
}

func TestAnswersHaveTheirClass(t *testing.T) {
	for _, c := range []struct {
		status int
		code   string
		want   error
	}{
		{503, "SlowDown", storage.ErrThrottled},
		{429, "TooManyRequests", storage.ErrThrottled},
		{500, "InternalError", storage.ErrTransient},
		{502, "", storage.ErrTransient},
		{400, "RequestTimeout", storage.ErrTransient},
		{404, "NoSuchKey", fs.ErrNotExist},
		{403, "AccessDenied", nil},
	} {
		o := answering(t, func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(c.status)
			if c.code != "" && r.Method != http.MethodHead {
				fmt.Fprintf(w, "<Error><Code>%s</Code><Message>m</Message></Error>", c.code)
			}
		})
		_, err := o.ReadAt(bg, "k", make([]byte, 1), 0)
		for _, class := range []error{storage.ErrThrottled, storage.ErrTransient, fs.ErrNotExist} {
			if err == nil || errors.Is(err, class) != (class == c.want) {
				t.Errorf("%d %s: error %v, want class %v", c.status, c.code, err, c.want)
			}
		}
	}
	// Nobody listens.
	o, err := New(Options{Endpoint: "http://127.0.0.1:1", Bucket: "bucket"})
	must(t, err)
	if _, err := o.Head(bg, "k"); !errors.Is(err, storage.ErrTransient) {
		t.Errorf("nobody listens: %v", err)
	}
}

// A service or a proxy that sends other bytes than those asked for is found.
func TestWrongRangesAreRefused(t *testing.T) {
	for _, c := range []struct{ contentRange, body string }{
		{"", "0123456789"},                     // it ignored the range
		{"bytes 0-3/10", "0123"},               // another range
		{"bytes 2-9/10", "23456789"},           // more
		{"bytes 2-3/10", "23"},                 // less
		{"bytes 2-5/4", "2345"},                // beyond the end
		{"bytes 2-5/10", "23"},                 // cut off
		{"bytes 5-2/10", "2345"},               // backwards
		{"bytes a-b/c", "2345"},                // nonsense
		{"bytes -2-1/9223372036854775807", ""}, // negative
	} {
		o := answering(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Last-Modified", "Mon, 02 Jan 2006 15:04:05 GMT")
			if c.contentRange != "" {
				w.Header().Set("Content-Range", c.contentRange)
				w.WriteHeader(http.StatusPartialContent)
			}
			_, _ = io.WriteString(w, c.body)
		})
		p := make([]byte, 4)
		if n, err := o.ReadAt(bg, "k", p, 2); err == nil || err == io.EOF {
			t.Errorf("%q: read %q, %v", c.contentRange, p[:n], err)
		}
	}
}
