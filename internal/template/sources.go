package template

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const (
	defaultMirror   = "http://deb.debian.org/debian"
	defaultSecurity = "http://deb.debian.org/debian-security"
	debianKeyring   = "/usr/share/keyrings/debian-archive-keyring.gpg"
)

// source is one place packages come from.
type source struct {
	uri      string
	suite    string
	signedBy string // path of a keyring; "" leaves the choice to mmdebstrap
	trusted  bool
}

func (s source) line() string {
	var options []string
	if s.signedBy != "" {
		options = append(options, "signed-by="+s.signedBy)
	}
	if s.trusted {
		options = append(options, "trusted=yes")
	}
	o := ""
	if len(options) > 0 {
		o = "[" + strings.Join(options, " ") + "] "
	}
	return fmt.Sprintf("deb %s%s %s main\n", o, s.uri, s.suite)
}

// aptSources is what mmdebstrap reads: the host's mirrors of Debian where the
// host is a Debian (its administrator chose them, and they are reachable), else
// Debian's own. etc is the host's /etc.
func aptSources(etc, suite string) (string, error) {
	var b strings.Builder
	for _, s := range hostSources(etc, suite) {
		b.WriteString(s.line())
	}
	if b.Len() > 0 {
		return b.String(), nil
	}
	if _, err := os.Stat(debianKeyring); err != nil {
		return "", fmt.Errorf("Debian's archive keys are missing (%w): apt-get install debian-archive-keyring", err)
	}
	for _, s := range []source{
		{uri: defaultMirror, suite: suite},
		{uri: defaultMirror, suite: suite + "-updates"},
		{uri: defaultSecurity, suite: suite + "-security"},
	} {
		s.signedBy = debianKeyring
		b.WriteString(s.line())
	}
	return b.String(), nil
}

// hostSources are the host's entries for its own release of Debian, with the
// release replaced by suite. Entries of anybody else are not Debian's archive
// and are left out; so are backports.
func hostSources(etc, suite string) []source {
	host := debianCodename(filepath.Join(etc, "os-release"))
	if host == "" {
		return nil
	}
	files, _ := filepath.Glob(filepath.Join(etc, "apt/sources.list.d/*"))
	files = append([]string{filepath.Join(etc, "apt/sources.list")}, files...)
	var found []source
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // not there, or not ours to read: Debian's own serve
		}
		var list []source
		switch filepath.Ext(f) {
		case ".list":
			list = parseOneLine(string(text))
		case ".sources":
			list = parseDeb822(string(text))
		}
		for _, s := range list {
			part, ok := strings.CutPrefix(s.suite, host)
			if !ok || !slices.Contains([]string{"", "-updates", "-security"}, part) {
				continue
			}
			s.suite = suite + part
			if !slices.Contains(found, s) {
				found = append(found, s)
			}
		}
	}
	if !slices.ContainsFunc(found, func(s source) bool { return s.suite == suite }) {
		return nil
	}
	return found
}

// debianCodename is the release name in an os-release file of Debian itself, ""
// for everything else.
func debianCodename(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	id, codename := "", ""
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, `"`)
		switch name {
		case "ID":
			id = value
		case "VERSION_CODENAME":
			codename = value
		}
	}
	if id != "debian" {
		return ""
	}
	return codename
}

// parseOneLine reads "deb [options] uri suite components…" lines that offer
// main.
func parseOneLine(text string) []source {
	var list []source
	sc := bufio.NewScanner(strings.NewReader(text))
	for sc.Scan() {
		line, _, _ := strings.Cut(sc.Text(), "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
		if !ok {
			continue
		}
		var s source
		rest = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "[") {
			options, after, ok := strings.Cut(rest[1:], "]")
			if !ok {
				continue
			}
			for _, o := range strings.Fields(options) {
				name, value, _ := strings.Cut(o, "=")
				s.option(name, value)
			}
			rest = after
		}
		f := strings.Fields(rest)
		if len(f) < 3 || !slices.Contains(f[2:], "main") {
			continue
		}
		s.uri, s.suite = f[0], f[1]
		list = append(list, s)
	}
	return list
}

// parseDeb822 reads the stanzas of a .sources file that offer binary packages
// of main.
func parseDeb822(text string) []source {
	var list []source
	for stanza := range strings.SplitSeq(dropComments(text), "\n\n") {
		fields := map[string]string{}
		name := ""
		for line := range strings.Lines(stanza) {
			if strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t") {
				fields[name] += "\n" + strings.TrimSpace(line)
				continue
			}
			n, v, ok := strings.Cut(line, ":")
			if ok {
				name = strings.ToLower(n)
				fields[name] = strings.TrimSpace(v)
			}
		}
		if !slices.Contains(strings.Fields(fields["types"]), "deb") ||
			!slices.Contains(strings.Fields(fields["components"]), "main") ||
			strings.EqualFold(fields["enabled"], "no") {
			continue
		}
		for _, uri := range strings.Fields(fields["uris"]) {
			for _, suite := range strings.Fields(fields["suites"]) {
				s := source{uri: uri, suite: suite}
				s.option("signed-by", fields["signed-by"])
				s.option("trusted", fields["trusted"])
				list = append(list, s)
			}
		}
	}
	return list
}

// option takes the options that matter for a build; a key given inline instead
// of by path is left to mmdebstrap, which knows Debian's keyrings.
func (s *source) option(name, value string) {
	switch name {
	case "signed-by":
		if strings.HasPrefix(value, "/") && !strings.ContainsAny(value, " \n,") {
			s.signedBy = value
		}
	case "trusted":
		s.trusted = value == "yes"
	}
}

func dropComments(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "#") {
			b.WriteString(strings.TrimRight(line, " \t\r\n") + "\n")
		}
	}
	return b.String()
}
