package sdk

import (
	"path/filepath"
	"testing"
)

func TestPythonSync(t *testing.T)  { script(t, modeA(t), sdk.python(), "py/sync.py") }
func TestPythonAsync(t *testing.T) { script(t, modeA(t), sdk.python(), "py/async_.py") }
func TestJavaScript(t *testing.T)  { script(t, modeA(t), sdk.node(), "js/all.mjs") }

// TestTraps holds what is easily got wrong: what becomes of streams, pauses
// without memory, waking on traffic, snapshots, forks, walls.
func TestTraps(t *testing.T) { script(t, modeA(t), sdk.python(), "py/traps.py") }

// The tests by domain find everything by names below it, over TLS with a
// certificate of the local authority and HTTP/2.
func TestPythonByDomain(t *testing.T)     { byDomain(t, sdk.python(), "py/domain.py") }
func TestJavaScriptByDomain(t *testing.T) { byDomain(t, sdk.node(), "js/domain.mjs") }

func byDomain(t *testing.T, args ...string) {
	ca := filepath.Join(server.Dir, "ca", "ca.pem")
	env := append(modeA(t)[2:], "E2B_DOMAIN="+published(), "NODE_EXTRA_CA_CERTS="+ca, "SSL_CERT_FILE="+ca)
	args = asIfByDNS(t, args...)
	script(t, env, args[0], args[1:]...)
}
