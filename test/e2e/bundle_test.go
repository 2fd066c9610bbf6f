package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// TestABundleHoldsNoSecretOfALiveServer looks in a bundle for everything that
// nobody else may know.
func TestABundleHoldsNoSecretOfALiveServer(t *testing.T) {
	s := server(t)
	const env, meta, spoken = "env-91c2ab77-secret", "meta-55e0f3aa-secret", "spoken-03d2cc41-secret"
	with := client.CreateSandboxRequest{
		Template: warm, Envs: map[string]string{"TOKEN": env}, Metadata: map[string]string{"customer": meta},
	}
	running, paused := create(t, s, with), create(t, s, with)
	sh(t, s, running.ID, "echo "+spoken+" | sudo tee /dev/console /home/user/f; echo $TOKEN | sudo tee /dev/console; sync")
	pause(t, s, paused.ID)
	snapshot(t, s, running.ID, "bundled")
	secrets := map[string]string{"API key": apiKey(t, s), "environment": env, "metadata": meta, "the guest's own": spoken}
	for _, id := range []string{running.ID, paused.ID} {
		for name, secret := range journalSecrets(t, s, id) {
			secrets[name+" of "+id] = secret
		}
	}
	name := filepath.Join(t.TempDir(), "bundle.tar.gz")
	if out, code := cli(t, s, "doctor", "--dir", s.Dir, "--bundle", name); code != 0 {
		t.Fatalf("doctor: exit code %d: %s", code, out)
	}
	entries := unpack(t, name)
	for entry, content := range entries {
		for what, secret := range secrets {
			for _, form := range []string{secret, base64.StdEncoding.EncodeToString([]byte(secret)), base64.RawURLEncoding.EncodeToString([]byte(secret))} {
				if bytes.Contains(content, []byte(form)) {
					t.Errorf("%s holds %s", entry, what)
				}
			}
		}
	}
	// It is of use, too.
	manifests := 0
	for entry, content := range entries {
		if strings.HasPrefix(entry, "manifests/") && strings.Contains(string(content), paused.ID) {
			manifests++
		}
	}
	if manifests != 1 {
		t.Errorf("%d manifests name the paused sandbox, want 1", manifests)
	}
	for entry, has := range map[string]string{
		"about.json": "--on-exit=destroy", "journals/" + paused.ID + ".json": `"paused"`, "metrics.txt": "wrenn_sandboxes",
		"readyz.json": `"ok"`, "logs/run-pager.log": "", "findings.json": "qemu",
	} {
		if content, ok := entries[entry]; !ok || !strings.Contains(string(content), has) {
			t.Errorf("%s has no %q: %.400s", entry, has, content)
		}
	}
}

// journalSecrets reads what a sandbox's journal keeps from others.
func journalSecrets(t *testing.T, s *harness.Server, id string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(s.Dir, "sandboxes", id, "journal.json"))
	if err != nil {
		t.Fatal(err)
	}
	var j struct {
		AccessToken string `json:"access_token"`
		MachineID   string `json:"machine_id"`
		Annotations string `json:"annotations"` // in base64
	}
	if err := json.Unmarshal(text, &j); err != nil {
		t.Fatal(err)
	}
	if j.AccessToken == "" || j.MachineID == "" || j.Annotations == "" {
		t.Fatalf("the journal of %s has other names for its secrets: %s", id, text)
	}
	return map[string]string{"token": j.AccessToken, "machine id": j.MachineID, "annotations": j.Annotations}
}

// unpack reads a tar.gz into memory.
func unpack(t *testing.T, name string) map[string][]byte {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		out[strings.TrimPrefix(h.Name, "wrenn-doctor/")] = content
	}
}
