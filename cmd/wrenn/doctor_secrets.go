package main

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// shortSecret is the length below which a value is not looked for in texts: it
// would be found everywhere. Such values are kept out by not being read.
const shortSecret = 8

// secretsOf makes what removes the secrets of a state directory from a text: the
// API key, sandboxes' tokens, environments, metadata and headers for hosts.
func secretsOf(dir string) *strings.Replacer {
	var secrets []string
	hide := func(secret string) {
		if len(secret) >= shortSecret {
			secrets = append(secrets, secret, base64.StdEncoding.EncodeToString([]byte(secret)))
		}
	}
	if key, err := keyIn(filepath.Join(dir, "api-key")); err == nil {
		hide(key)
	}
	paths, _ := filepath.Glob(filepath.Join(dir, "sandboxes", "*", "journal.json"))
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err == nil { // else nothing of it goes into a bundle either
			hideJournal(text, hide)
		}
	}
	// Pauses keep a journal too.
	paths, _ = filepath.Glob(filepath.Join(dir, "store", "snapshots", "*", "manifest.json"))
	for _, path := range paths {
		var m struct {
			Manifest struct {
				Kind        string `json:"kind"`
				Annotations []byte `json:"annotations"`
			} `json:"manifest"`
		}
		text, err := os.ReadFile(path)
		if err == nil && json.Unmarshal(text, &m) == nil && m.Manifest.Kind == snapshot.KindPause {
			hideJournal(m.Manifest.Annotations, hide)
		}
	}
	// The longest first: one may begin with another.
	slices.SortFunc(secrets, func(a, b string) int { return cmp.Compare(len(b), len(a)) })
	var pairs []string
	for _, secret := range secrets {
		pairs = append(pairs, secret, "[removed]")
	}
	return strings.NewReplacer(pairs...)
}

func hideJournal(text []byte, hide func(string)) {
	var j struct {
		Envs        map[string]string `json:"envs"`
		Annotations []byte            `json:"annotations"`
		AccessToken string            `json:"access_token"`
		MachineID   string            `json:"machine_id"`
		Egress      struct {
			Headers map[string]map[string]string `json:"headers"`
		} `json:"egress"`
	}
	if json.Unmarshal(text, &j) != nil {
		return
	}
	hide(j.AccessToken)
	hide(j.MachineID)
	for _, v := range j.Envs {
		hide(v)
	}
	for _, headers := range j.Egress.Headers {
		for _, v := range headers {
			hide(v)
		}
	}
	var notes any
	if json.Unmarshal(j.Annotations, &notes) == nil {
		hideStrings(notes, map[string]bool{"template": true, "created_at": true}, hide)
	}
}

// hideStrings hides every string in a JSON value but those under some keys.
func hideStrings(v any, but map[string]bool, hide func(string)) {
	switch v := v.(type) {
	case string:
		hide(v)
	case []any:
		for _, e := range v {
			hideStrings(e, but, hide)
		}
	case map[string]any:
		for k, e := range v {
			if !but[k] {
				hideStrings(e, nil, hide)
			}
		}
	}
}
