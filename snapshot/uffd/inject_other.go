//go:build linux && !amd64

package uffd

import (
	"context"
	"fmt"
	"runtime"
)

func injectInto(context.Context, *process, *Shared, int) (*Attachment, error) {
	return nil, fmt.Errorf("attaching to a running process is not implemented on %s, only on amd64", runtime.GOARCH)
}
