package oci

import (
	"fmt"
	"regexp"
	"strings"

	"oras.land/oras-go/v2/registry"
)

// DockerHub is where images are that name no registry.
const DockerHub = "docker.io"

// Reference names an image: registry, repository, and a tag or digest.
type Reference struct{ ref registry.Reference }

// maxReference bounds a reference's text.
const maxReference = 1024

var startRE = regexp.MustCompile(`^[A-Za-z0-9\[]`)

// ParseReference reads a reference as Docker does: without a registry it is of
// Docker Hub, without a tag or digest it is "latest".
func ParseReference(s string) (Reference, error) {
	if len(s) > maxReference {
		return Reference{}, fmt.Errorf("must have at most %d bytes", maxReference)
	}
	if !startRE.MatchString(s) || strings.HasSuffix(s, ":") {
		return Reference{}, fmt.Errorf("%.120q is no reference to an image", s)
	}
	full := s
	first, rest, slash := strings.Cut(s, "/")
	switch {
	case !slash:
		full = DockerHub + "/library/" + s
	case !strings.ContainsAny(first, ".:") && first != "localhost":
		full = DockerHub + "/" + s
	case first == DockerHub || first == "index.docker.io":
		if !strings.Contains(rest, "/") {
			rest = "library/" + rest
		}
		full = DockerHub + "/" + rest
	}
	ref, err := registry.ParseReference(full)
	if err != nil {
		return Reference{}, fmt.Errorf("%.120q is no reference to an image: %w", s, err)
	}
	ref.Reference = ref.ReferenceOrDefault()
	return Reference{ref}, nil
}

// String gives the full form.
func (r Reference) String() string {
	if _, err := r.ref.Digest(); err == nil {
		return r.repository() + "@" + r.ref.Reference
	}
	return r.repository() + ":" + r.ref.Reference
}

func (r Reference) repository() string { return r.ref.Registry + "/" + r.ref.Repository }
