//go:build !amd64

package vmm

import (
	"context"
	"errors"
)

// HostTSCKHz exists on x86-64 only.
func HostTSCKHz(context.Context) (int64, error) {
	return 0, errors.New("this CPU has no x86 time stamp counter")
}
