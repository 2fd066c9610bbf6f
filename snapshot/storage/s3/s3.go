// Package s3 keeps objects in a bucket of Amazon S3 or of anything that speaks
// its protocol. It imports storage and one SDK, minio-go; nothing else of the
// engine may import that.
//
// What is relied upon: a PUT appears whole or not at all; reads, listings and
// HEADs see the last completed PUT or DELETE; keys are listed in the order of
// their bytes. The SDK's own retries are off: see storage.Retry.
package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// Options say which bucket, and how to reach it.
type Options struct {
	// Endpoint is the URL of the service, "https://s3.eu-central-1.amazonaws.com"
	// or "http://127.0.0.1:9000".
	Endpoint string
	// Region is what requests are signed for; empty: us-east-1.
	Region string
	Bucket string
	// Prefix, "" or ending in "/", comes before every key.
	Prefix string
	// AccessKey, SecretKey and SessionToken are the credentials. Both of the
	// first empty: requests are not signed.
	AccessKey, SecretKey, SessionToken string
	// PartSize is above which a Put goes in parts, of this many bytes; default
	// 16 MiB, at least 5 MiB. A part is held in memory while it is sent.
	PartSize int64
	// Transport carries the requests; nil: the SDK's default.
	Transport http.RoundTripper
}

// Objects is a bucket, or the part of one below a prefix.
type Objects struct {
	core   minio.Core
	bucket string
	prefix string
	part   uint64
}

var _ storage.Objects = (*Objects)(nil)

const (
	defaultPart = 16 << 20
	minPart     = 5 << 20 // S3's own limit
)

// New makes the client. It does not call the service.
func New(o Options) (*Objects, error) {
	u, err := url.Parse(o.Endpoint)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") || strings.Trim(u.Path, "/") != "" {
		return nil, fmt.Errorf("s3: Endpoint: %q is not like https://host[:port]", o.Endpoint)
	}
	if o.Bucket == "" {
		return nil, errors.New("s3: Bucket: is empty")
	}
	if err := storage.ValidPrefix(o.Prefix); err != nil {
		return nil, fmt.Errorf("s3: Prefix: %w", err)
	}
	if (o.AccessKey == "") != (o.SecretKey == "") {
		return nil, errors.New("s3: AccessKey and SecretKey: give both or none")
	}
	if o.PartSize == 0 {
		o.PartSize = defaultPart
	}
	if o.PartSize < minPart {
		return nil, fmt.Errorf("s3: PartSize: %d is less than %d", o.PartSize, minPart)
	}
	if o.Region == "" {
		o.Region = "us-east-1" // else the SDK asks the service, once for each client
	}
	creds := credentials.NewStaticV4(o.AccessKey, o.SecretKey, o.SessionToken)
	if o.AccessKey == "" {
		creds = credentials.NewStatic("", "", "", credentials.SignatureAnonymous)
	}
	core, err := minio.NewCore(u.Host, &minio.Options{
		Creds: creds, Secure: u.Scheme == "https", Region: o.Region,
		Transport: o.Transport, MaxRetries: 1,
	})
	if err != nil {
		return nil, fmt.Errorf("s3: %w", err)
	}
	return &Objects{core: *core, bucket: o.Bucket, prefix: o.Prefix, part: uint64(o.PartSize)}, nil
}

// MakeBucket makes the bucket; one that is ours already is no error.
func (o *Objects) MakeBucket(ctx context.Context) error {
	err := o.core.MakeBucket(ctx, o.bucket, minio.MakeBucketOptions{})
	switch minio.ToErrorResponse(err).Code {
	case minio.BucketAlreadyOwnedByYou:
		return nil
	}
	return wrap("make bucket", o.bucket, err)
}

// Put implements storage.Objects.
func (o *Objects) Put(ctx context.Context, key string, body io.ReaderAt, size int64) error {
	if err := check(ctx, "put", key); err != nil {
		return err
	}
	if size < 0 {
		return wrap("put", key, fmt.Errorf("size %d: %w", size, fs.ErrInvalid))
	}
	src := &bodyReader{r: io.NewSectionReader(body, 0, size)}
	info, err := o.core.Client.PutObject(ctx, o.bucket, o.prefix+key, src, size, minio.PutObjectOptions{
		PartSize: o.part, ContentType: "application/octet-stream",
	})
	if src.err != nil {
		err = fmt.Errorf("read the body: %w", src.err) // not a failure of the service
		return &storage.ObjectError{Op: "put", Key: key, Err: err}
	}
	if err == nil && info.Size != size {
		err = io.ErrUnexpectedEOF
	}
	return wrap("put", key, err)
}

// bodyReader remembers the body's own error, which no retry will cure. It is
// no io.ReaderAt, so that the SDK holds one part at a time.
type bodyReader struct {
	r   *io.SectionReader
	err error
}

func (b *bodyReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err == nil || err == io.EOF && b.at() == b.r.Size() {
		return n, err
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF // the body is shorter than the caller said
	}
	b.err = err
	return n, err
}

func (b *bodyReader) at() int64 {
	n, _ := b.r.Seek(0, io.SeekCurrent)
	return n
}

// ReadAt implements storage.Objects.
func (o *Objects) ReadAt(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if err := check(ctx, "read", key); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, wrap("read", key, fmt.Errorf("offset %d: %w", off, fs.ErrInvalid))
	}
	if len(p) == 0 {
		_, err := o.Head(ctx, key)
		return 0, err
	}
	var get minio.GetObjectOptions
	if err := get.SetRange(off, off+int64(len(p))-1); err != nil {
		return 0, wrap("read", key, err)
	}
	body, _, header, err := o.core.GetObject(ctx, o.bucket, o.prefix+key, get)
	if err != nil {
		if minio.ToErrorResponse(err).StatusCode == http.StatusRequestedRangeNotSatisfiable {
			return 0, io.EOF // at or beyond the end
		}
		return 0, wrap("read", key, err)
	}
	defer body.Close()
	want, end, err := expect(header, off, int64(len(p)))
	if err != nil {
		return 0, wrap("read", key, err)
	}
	n, err := io.ReadFull(body, p[:want])
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return n, wrap("read", key, err)
	}
	if end {
		return n, io.EOF
	}
	return n, nil
}

// expect says how many bytes must come for a range of n bytes at off, and
// whether they are fewer because the object ends there. The service's word is
// checked: a proxy that ignores ranges would give us other bytes.
func expect(h http.Header, off, n int64) (want int64, end bool, err error) {
	r := h.Get("Content-Range")
	if r == "" && off == 0 {
		// The whole object, where a range of it was asked for, is allowed.
		size, err := strconv.ParseInt(h.Get("Content-Length"), 10, 64)
		if err != nil || size < 0 {
			return 0, false, fmt.Errorf("the service sent neither a range nor a length: %q", h.Get("Content-Length"))
		}
		return min(size, n), size < n, nil
	}
	var first, last, size int64
	if _, err := fmt.Sscanf(r, "bytes %d-%d/%d", &first, &last, &size); err != nil {
		return 0, false, fmt.Errorf("the service sent the range %.80q for bytes %d-%d", r, off, off+n-1)
	}
	if first != off || last < first || last >= size || last-first+1 != min(n, size-off) {
		return 0, false, fmt.Errorf("the service sent the range %.80q for bytes %d-%d", r, off, off+n-1)
	}
	return last - first + 1, last-first+1 < n, nil
}

// Head implements storage.Objects.
func (o *Objects) Head(ctx context.Context, key string) (storage.ObjectInfo, error) {
	if err := check(ctx, "head", key); err != nil {
		return storage.ObjectInfo{}, err
	}
	info, err := o.core.StatObject(ctx, o.bucket, o.prefix+key, minio.StatObjectOptions{})
	if err != nil {
		return storage.ObjectInfo{}, wrap("head", key, err)
	}
	return storage.ObjectInfo{Key: key, Size: info.Size}, nil
}

// List implements storage.Objects. Keys that no Put can have made are left out.
func (o *Objects) List(ctx context.Context, prefix, after string) ([]storage.ObjectInfo, bool, error) {
	if err := storage.ValidPrefix(prefix); err != nil {
		return nil, false, wrap("list", prefix, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the SDK's iteration
	list := minio.ListObjectsOptions{Prefix: o.prefix + prefix, Recursive: true, MaxKeys: storage.MaxList}
	if after != "" {
		list.StartAfter = o.prefix + after
	}
	var page []storage.ObjectInfo
	for info := range o.core.ListObjectsIter(ctx, o.bucket, list) {
		if info.Err != nil {
			return nil, false, wrap("list", prefix, info.Err)
		}
		key, ok := strings.CutPrefix(info.Key, o.prefix)
		if !ok || storage.ValidKey(key) != nil || key <= after {
			continue
		}
		if len(page) == storage.MaxList {
			return page, true, nil
		}
		page = append(page, storage.ObjectInfo{Key: key, Size: info.Size})
	}
	if err := ctx.Err(); err != nil {
		return nil, false, wrap("list", prefix, err)
	}
	return page, false, nil
}

// Delete implements storage.Objects.
func (o *Objects) Delete(ctx context.Context, key string) error {
	if err := check(ctx, "delete", key); err != nil {
		return err
	}
	err := o.core.RemoveObject(ctx, o.bucket, o.prefix+key, minio.RemoveObjectOptions{})
	if minio.ToErrorResponse(err).Code == minio.NoSuchKey {
		return nil // some services say so
	}
	return wrap("delete", key, err)
}

func check(ctx context.Context, op, key string) error {
	if err := storage.ValidKey(key); err != nil {
		return storage.NewObjectError(op, key, nil, err)
	}
	return storage.NewObjectError(op, key, nil, ctx.Err())
}

// wrap gives the SDK's error its class.
func wrap(op, key string, err error) error {
	if err == nil {
		return nil
	}
	return storage.NewObjectError(op, key, classOf(err), err)
}

func classOf(err error) error {
	r := minio.ToErrorResponse(err)
	switch {
	case r.Code == minio.NoSuchKey:
		return fs.ErrNotExist
	case r.Code == "SlowDown" || r.StatusCode == http.StatusTooManyRequests || r.StatusCode == http.StatusServiceUnavailable:
		return storage.ErrThrottled
	case r.Code == "RequestTimeout" || r.Code == "InternalError" || r.StatusCode >= 500:
		return storage.ErrTransient
	case r.StatusCode >= 400:
		return nil
	}
	// No answer of the service: the network.
	var ne net.Error
	var oe *net.OpError
	switch {
	case errors.As(err, &ne), errors.As(err, &oe),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EPIPE):
		return storage.ErrTransient
	}
	return nil
}
