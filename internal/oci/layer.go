package oci

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
)

// unpackers are the forms of layers, OCI's and Docker's.
var unpackers = map[string]func(io.Reader) (io.ReadCloser, error){
	"application/vnd.oci.image.layer.v1.tar":                       plain,
	"application/vnd.oci.image.layer.v1.tar+gzip":                  gunzip,
	"application/vnd.oci.image.layer.v1.tar+zstd":                  unzstd,
	"application/vnd.docker.image.rootfs.diff.tar":                 plain,
	"application/vnd.docker.image.rootfs.diff.tar.gzip":            gunzip,
	"application/vnd.docker.image.rootfs.diff.tar.zstd":            unzstd,
	"application/vnd.oci.image.layer.nondistributable.v1.tar":      plain,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": gunzip,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": unzstd,
}

func plain(r io.Reader) (io.ReadCloser, error)  { return io.NopCloser(r), nil }
func gunzip(r io.Reader) (io.ReadCloser, error) { return gzip.NewReader(r) }

func unzstd(r io.Reader) (io.ReadCloser, error) {
	d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(64<<20))
	if err != nil {
		return nil, err
	}
	return d.IOReadCloser(), nil
}

// Layer opens a layer, unpacked: a tar. A reader that has met io.EOF has seen
// what the digests say; before that nothing of it can be relied on.
func (im *Image) Layer(ctx context.Context, i int) (io.ReadCloser, error) {
	desc := im.layers[i]
	blob := &blobReader{ctx: ctx, im: im, desc: desc}
	verify := content.NewVerifyReader(blob, desc)
	unpacked, err := unpackers[desc.MediaType](verify)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open layer %d: %w", i+1, err), blob.Close())
	}
	want := im.diffIDs[i]
	return &layerReader{im: im, n: i + 1, blob: blob, verify: verify, unpacked: unpacked,
		hash: want.Algorithm().Hash(), want: want.Encoded()}, nil
}

// layerReader unpacks a layer and checks it at its end.
type layerReader struct {
	im       *Image
	n        int
	blob     *blobReader
	verify   *content.VerifyReader
	unpacked io.ReadCloser
	hash     hash.Hash
	want     string
}

func (l *layerReader) Read(p []byte) (int, error) {
	n, err := l.unpacked.Read(p)
	l.hash.Write(p[:n])
	if l.im.left -= int64(n); l.im.left < 0 {
		return 0, tooLarge("its layers have, unpacked,", l.im.p.opt.MaxUnpacked)
	}
	if err == io.EOF {
		err = l.check()
	} else if err != nil {
		err = fmt.Errorf("layer %d: %w", l.n, err)
	}
	return n, err
}

// check gives io.EOF where the layer is what its digests say.
func (l *layerReader) check() error {
	if err := l.verify.Verify(); err != nil {
		return fmt.Errorf("layer %d is not what its digest says: %w", l.n, err)
	}
	if got := fmt.Sprintf("%x", l.hash.Sum(nil)); got != l.want {
		return fmt.Errorf("layer %d has, unpacked, the digest %s; the image's configuration says %s", l.n, got, l.want)
	}
	return io.EOF
}

func (l *layerReader) Close() error { return errors.Join(l.unpacked.Close(), l.blob.Close()) }

// A download is taken up again so often, unless it has come on well meanwhile: a
// slow guest makes a large layer last, and registries do not wait for ever.
const (
	maxBreaks = 4
	comeOn    = 1 << 20
)

var errStalled = errors.New("nothing came for too long")

// blobReader reads a blob, and goes on after a broken connection where it was.
type blobReader struct {
	ctx    context.Context
	im     *Image
	desc   ocispec.Descriptor
	body   io.ReadCloser
	stop   context.CancelCauseFunc // of body
	at     int64
	broke  int64 // at, when it broke the last time
	breaks int
}

func (b *blobReader) Read(p []byte) (int, error) {
	for {
		n, err := b.readOnce(p)
		// A connection that ends early is a broken one too.
		if err == io.EOF && b.at < b.desc.Size {
			err = io.ErrUnexpectedEOF
		}
		if n > 0 || err == nil || err == io.EOF {
			if err != io.EOF {
				err = nil // it comes again
			}
			return n, err
		}
		if b.at-b.broke >= comeOn {
			b.breaks = 0
		}
		b.broke = b.at
		if b.breaks++; b.breaks > maxBreaks || b.ctx.Err() != nil || errors.Is(err, errNotAllowed) {
			return 0, err
		}
		if cerr := b.Close(); cerr != nil {
			return 0, errors.Join(err, cerr)
		}
	}
}

func (b *blobReader) readOnce(p []byte) (int, error) {
	if b.body == nil {
		if err := b.open(); err != nil {
			return 0, err
		}
	}
	watch := time.AfterFunc(b.im.p.opt.Stall, func() { b.stop(errStalled) })
	defer watch.Stop()
	n, err := b.body.Read(p)
	b.at += int64(n)
	return n, err
}

// open asks for the blob, from where we are.
func (b *blobReader) open() error {
	ctx, stop := context.WithCancelCause(b.ctx)
	body, err := b.im.repo.Blobs().Fetch(ctx, b.desc)
	if err != nil {
		stop(nil)
		return err
	}
	b.body, b.stop = body, stop
	if b.at == 0 {
		return nil
	}
	if s, ok := body.(io.Seeker); ok {
		_, err = s.Seek(b.at, io.SeekStart)
	} else {
		_, err = io.CopyN(io.Discard, body, b.at)
	}
	if err != nil {
		return errors.Join(err, b.Close())
	}
	return nil
}

// Close lets go of the connection.
func (b *blobReader) Close() error {
	if b.body == nil {
		return nil
	}
	err := b.body.Close()
	b.stop(nil)
	b.body = nil
	return err
}
