package engine

import (
	"fmt"
	"regexp"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// envdSeries is the first number of the versions of the guest agent that this
// host can speak to.
const envdSeries = "0"

var versionPattern = regexp.MustCompile(`^[0-9]{1,6}(\.[0-9]{1,6}){1,3}(-[a-z0-9.]{1,20})?$`)

// knownVersion keeps a version that a guest tells if it has the shape of one:
// guests are hostile and the manifest is read by people.
func knownVersion(s string) string {
	if versionPattern.MatchString(s) {
		return s
	}
	return ""
}

// fits tells, for the user and in one sentence, whether this host can restore
// what a manifest names. The kernel is in the memory and need not be here. What
// an older manifest does not say is not held against it.
func (e *Engine) fits(m snapshot.Manifest) error {
	if err := e.info.Fits(infoOf(m.VMM)); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	if m.NetworkLayout != "" && m.NetworkLayout != networkLayout {
		return fmt.Errorf("%w: %w: its network layout is %q and this host's is %q", ErrState, vmm.ErrIncompatible, m.NetworkLayout, networkLayout)
	}
	if series, _, _ := strings.Cut(m.EnvdVersion, "."); m.EnvdVersion != "" && series != envdSeries {
		return fmt.Errorf("%w: %w: its guest agent is version %q and this host speaks to versions %s.x", ErrState, vmm.ErrIncompatible, m.EnvdVersion, envdSeries)
	}
	return nil
}
