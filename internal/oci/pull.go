package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"
	"oras.land/oras-go/v2/registry/remote/retry"
)

// Options configure a Puller; the zero value pulls from public registries.
type Options struct {
	// Registries are those that may be at private addresses or without TLS.
	Registries []Registry
	// Mirror, where not nil, has Docker Hub's images for who has no account there.
	Mirror *Registry
	// MaxBytes bounds an image's layers as they are pulled, MaxUnpacked as they
	// are unpacked. 0 is 8 GiB.
	MaxBytes, MaxUnpacked int64
	// Stall ends a download that gets nothing for so long; 0 is a minute.
	Stall time.Duration
}

// Bounds of what is read into memory, and of counts.
const (
	maxManifest = 4 << 20
	maxConfig   = 4 << 20
	maxLayers   = 256
)

// Puller pulls images.
type Puller struct {
	opt    Options
	policy policy
	client *http.Client
}

// NewPuller makes one.
func NewPuller(o Options) *Puller {
	if o.MaxBytes == 0 {
		o.MaxBytes = 8 << 30
	}
	if o.MaxUnpacked == 0 {
		o.MaxUnpacked = 8 << 30
	}
	if o.Stall == 0 {
		o.Stall = time.Minute
	}
	p := policy{named: o.Registries}
	if o.Mirror != nil {
		p.named = append(p.named[:len(p.named):len(p.named)], *o.Mirror)
	}
	t := retry.NewTransport(p.transport())
	t.Policy = func() retry.Policy { return refusalsAreFinal{retry.DefaultPolicy} }
	return &Puller{opt: o, policy: p, client: &http.Client{Transport: t}}
}

// refusalsAreFinal has what the policy refused not tried again.
type refusalsAreFinal struct{ retry.Policy }

func (p refusalsAreFinal) Retry(attempt int, resp *http.Response, err error) (time.Duration, error) {
	if errors.Is(err, errNotAllowed) {
		return -1, nil
	}
	return p.Policy.Retry(attempt, resp, err)
}

// Credentials are for one registry; the zero value is nobody.
type Credentials struct{ Username, Password string }

// Image is an image for this machine, as its registry described it.
type Image struct {
	// Name holds the digest of the manifest.
	Name string
	// Env is NAME=value; User and Workdir are as in the image's configuration.
	Env           []string
	User, Workdir string
	// Size of all layers as they are pulled.
	Size int64

	p       *Puller
	repo    *remote.Repository
	layers  []ocispec.Descriptor
	diffIDs []digest.Digest
	left    int64 // of MaxUnpacked
}

// Layers is their number.
func (im *Image) Layers() int { return len(im.layers) }

// LayerSize is a layer's size as it is pulled.
func (im *Image) LayerSize(i int) int64 { return im.layers[i].Size }

// repository is a client for where the reference's image is.
func (p *Puller) repository(ref Reference, c Credentials) *remote.Repository {
	at := ref.ref
	if m := p.opt.Mirror; m != nil && at.Registry == DockerHub && c == (Credentials{}) {
		at.Registry = m.Host
	}
	plain := false
	for _, r := range p.policy.named {
		plain = plain || r.Plain && r.Host == at.Registry
	}
	client := &auth.Client{
		Client: p.client, Cache: auth.NewCache(),
		// The dialler decides for these too, when the name is resolved.
		BlockedRealmPrefixes: []netip.Prefix{},
		Credential:           auth.StaticCredential(at.Host(), auth.Credential{Username: c.Username, Password: c.Password}),
	}
	client.SetUserAgent("wrenn")
	return &remote.Repository{Client: client, Reference: at, PlainHTTP: plain, MaxMetadataBytes: maxManifest}
}

// Resolve finds the image behind a reference and reads its description.
func (p *Puller) Resolve(ctx context.Context, ref Reference, c Credentials) (*Image, error) {
	im := &Image{p: p, repo: p.repository(ref, c), left: p.opt.MaxUnpacked}
	m, err := im.findManifest(ctx, ref)
	if err != nil {
		return nil, p.explain(ref, c, err)
	}
	if err := im.read(ctx, m); err != nil {
		return nil, p.explain(ref, c, err)
	}
	return im, nil
}

// manifest is what we need of a manifest or an index, in OCI's form and Docker's.
type manifest struct {
	SchemaVersion int                  `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	Config        ocispec.Descriptor   `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
}

// findManifest reads the reference's manifest, or that for this machine out of
// its index.
func (im *Image) findManifest(ctx context.Context, ref Reference) (manifest, error) {
	desc, body, err := im.repo.Manifests().FetchReference(ctx, ref.ref.Reference)
	if err != nil {
		return manifest{}, err
	}
	m, err := readManifest(desc, body)
	if err != nil {
		return m, err
	}
	if len(m.Manifests) > 0 {
		if desc, err = choose(m.Manifests); err != nil {
			return m, err
		}
		if body, err = im.repo.Manifests().Fetch(ctx, desc); err != nil {
			return m, err
		}
		if m, err = readManifest(desc, body); err != nil {
			return m, err
		}
	}
	if m.SchemaVersion != 2 || m.Config.Digest == "" || len(m.Manifests) > 0 {
		return m, fmt.Errorf("its manifest has the form %.60q, which is not read here; push it again by a current tool", desc.MediaType)
	}
	im.Name = ref.repository() + "@" + desc.Digest.String()
	return m, nil
}

func readManifest(desc ocispec.Descriptor, body io.ReadCloser) (m manifest, err error) {
	defer body.Close()
	text, err := readAll(body, desc, maxManifest)
	if err != nil {
		return m, fmt.Errorf("read its manifest: %w", err)
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("read its manifest: %w", err)
	}
	return m, nil
}

// readAll reads what a descriptor describes, which has a bounded size.
func readAll(r io.Reader, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if desc.Size < 0 || desc.Size > limit {
		return nil, fmt.Errorf("it has %d bytes; the most is %d", desc.Size, limit)
	}
	return content.ReadAll(r, desc)
}

// choose takes the image for this kind of machine out of an index.
func choose(list []ocispec.Descriptor) (ocispec.Descriptor, error) {
	var have []string
	var found *ocispec.Descriptor
	for i, d := range list {
		if d.Platform == nil || d.Platform.OS == "unknown" {
			continue
		}
		if d.Platform.OS == "linux" && d.Platform.Architecture == "amd64" && (found == nil || d.Platform.Variant == "") {
			found = &list[i]
		}
		if len(have) < 20 {
			have = append(have, fmt.Sprintf("%.20s/%.20s", d.Platform.OS, d.Platform.Architecture))
		}
	}
	if found == nil {
		return ocispec.Descriptor{}, fmt.Errorf("there is no linux/amd64 among its platforms (%s)", strings.Join(have, ", "))
	}
	return *found, nil
}

// read reads the configuration and holds manifest and configuration to bounds.
func (im *Image) read(ctx context.Context, m manifest) error {
	if len(m.Layers) > maxLayers {
		return fmt.Errorf("it has %d layers; the most is %d", len(m.Layers), maxLayers)
	}
	body, err := im.repo.Blobs().Fetch(ctx, m.Config)
	if err != nil {
		return fmt.Errorf("fetch its configuration: %w", err)
	}
	defer body.Close()
	text, err := readAll(body, m.Config, maxConfig)
	if err != nil {
		return fmt.Errorf("read its configuration: %w", err)
	}
	var c ocispec.Image
	if err := json.Unmarshal(text, &c); err != nil {
		return fmt.Errorf("read its configuration: %w", err)
	}
	if c.OS != "linux" || c.Architecture != "amd64" {
		return fmt.Errorf("it is for %.20s/%.20s; sandboxes are linux/amd64", c.OS, c.Architecture)
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return fmt.Errorf("its configuration names %d layers and its manifest %d", len(c.RootFS.DiffIDs), len(m.Layers))
	}
	for i, l := range m.Layers {
		if err := errors.Join(l.Digest.Validate(), c.RootFS.DiffIDs[i].Validate()); err != nil {
			return fmt.Errorf("layer %d: %w", i+1, err)
		}
		if _, ok := unpackers[l.MediaType]; !ok {
			return fmt.Errorf("layer %d has the form %.80q, which is not known", i+1, l.MediaType)
		}
		if l.Size < 0 || l.Size > im.p.opt.MaxBytes-im.Size {
			return tooLarge("its layers have", im.p.opt.MaxBytes)
		}
		im.Size += l.Size
	}
	im.layers, im.diffIDs = m.Layers, c.RootFS.DiffIDs
	im.Env, im.User, im.Workdir = c.Config.Env, c.Config.User, c.Config.WorkingDir
	return nil
}

func tooLarge(what string, limit int64) error {
	return fmt.Errorf("%s more than %d MiB, which is the most", what, limit>>20)
}

// explain says of a failure what its remedy is.
func (p *Puller) explain(ref Reference, c Credentials, err error) error {
	var answer *errcode.ErrorResponse
	_, broken := errors.AsType[net.Error](err)
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, errNotAllowed):
		return fmt.Errorf("the image %s: %w", ref, err)
	case errors.Is(err, errdef.ErrNotFound):
		return fmt.Errorf("there is no image %s", ref)
	case errors.As(err, &answer) && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden),
		errors.Is(err, auth.ErrBasicCredentialNotFound):
		if c == (Credentials{}) {
			return fmt.Errorf("the registry of %s gives this image to nobody unknown, or has none: check the name, or give credentials (fromImageRegistry)", ref)
		}
		return fmt.Errorf("the registry of %s does not take these credentials (fromImageRegistry) for it", ref)
	case broken:
		return fmt.Errorf("the registry of %s cannot be reached (%w); where there is a registry of one's own, the operator has `wrenn up --registry` and, for Docker Hub's images, `--registry-mirror`", ref, err)
	}
	return fmt.Errorf("the image %s: %w", ref, err)
}
