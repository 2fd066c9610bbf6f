package main

import (
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/oci"
)

func TestRegistriesOfUp(t *testing.T) {
	o, err := registryFlags{named: []string{"a:5000", "http://10.0.0.1"}, mirror: "http://m:1"}.options()
	if err != nil || len(o.Registries) != 2 || o.Registries[1] != (oci.Registry{Host: "10.0.0.1", Plain: true}) || *o.Mirror != (oci.Registry{Host: "m:1", Plain: true}) {
		t.Errorf("%+v, %v", o, err)
	}
	for flag, f := range map[string]registryFlags{"--registry ": {named: []string{"a/b"}}, "--registry-mirror ": {mirror: "ftp://x"}} {
		if _, err := f.options(); err == nil || !strings.Contains(err.Error(), flag) || exitCode(err) != exitUsage {
			t.Errorf("%s: %v", flag, err)
		}
	}
}
