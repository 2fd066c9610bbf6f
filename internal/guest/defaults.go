package guest

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
)

// templateDefaults are what a template says of the processes of its sandboxes.
// They lie on the disk, so that they are in every sandbox made from it. They
// belong to the guest: it may change them, for itself.
type templateDefaults struct {
	Envs    map[string]string `json:"envs"`
	User    string            `json:"user"`
	Workdir string            `json:"workdir"`
}

const maxDefaultsFile = 1 << 20

// defaults reads them; what is no use is passed over, since it must not keep
// every process from starting.
func (s *Server) defaults() templateDefaults {
	f, err := os.Open(s.opt.DefaultsFile)
	if err != nil {
		return templateDefaults{}
	}
	defer f.Close()
	// Of a FIFO or a device in its place the read would not end.
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return templateDefaults{}
	}
	text, err := io.ReadAll(io.LimitReader(f, maxDefaultsFile+1))
	var d templateDefaults
	if err != nil || len(text) > maxDefaultsFile || json.Unmarshal(text, &d) != nil {
		s.log.Warn("the template's defaults cannot be used", "file", s.opt.DefaultsFile)
		return templateDefaults{}
	}
	if _, err := checkEnvs("envs", d.Envs); err != nil {
		d.Envs = nil
	}
	if fi, err := os.Stat(d.Workdir); err != nil || !fi.IsDir() || !filepath.IsAbs(d.Workdir) {
		d.Workdir = ""
	}
	return d
}
