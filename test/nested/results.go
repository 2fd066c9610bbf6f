package nested

import (
	"bufio"
	"bytes"
	"regexp"
	"strings"
	"testing"
)

var (
	beginLine  = regexp.MustCompile(`^=== RUN\s+(\S+)`)
	resumeLine = regexp.MustCompile(`^=== (?:CONT|NAME)\s+(\S*)`)
	endLine    = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+) \(`)
	stepLine   = regexp.MustCompile(`^--- STEP  (\S+) (\S+) (.*)`)
)

// result is one test that ran in the machine.
type result struct {
	name, verdict string
	log           strings.Builder
}

// Report turns what the steps printed into subtests of t: one for each step and
// one for each test in it. A step that did not end well fails, and so does one
// that never ran, or ran no test.
func Report(t *testing.T, steps []Step, out []byte) {
	t.Helper()
	parts := bytes.Split(out, []byte("=== STEP  "))
	for _, s := range steps {
		t.Run(s.Name, func(t *testing.T) {
			for _, p := range parts {
				if body, ok := bytes.CutPrefix(p, []byte(s.Name+"\n")); ok {
					reportStep(t, body)
					return
				}
			}
			t.Error("it did not run")
		})
	}
}

func reportStep(t *testing.T, out []byte) {
	results, rest, verdict := parse(out)
	for _, r := range results {
		t.Run(r.name, func(t *testing.T) {
			switch {
			case r.verdict == "SKIP":
				t.Skip(r.log.String())
			case r.verdict != "PASS":
				t.Errorf("%s\n%s", r.verdict, r.log.String())
			case r.log.Len() > 0:
				t.Log("\n" + r.log.String())
			}
		})
	}
	if verdict != "ok" {
		t.Errorf("it ended with: %s\n%s", verdict, tail([]byte(rest), 8<<10))
	}
	if len(results) == 0 {
		t.Error("it ran no test")
	}
}

// parse reads the output of `go test -v`. Subtests are kept with the test that
// they belong to, and their failure is its.
func parse(out []byte) (results []*result, rest, verdict string) {
	byName := map[string]*result{}
	var cur *result
	var other strings.Builder
	verdict = "the machine stopped in the middle of it"
	top := func(name string) *result {
		name, _, _ = strings.Cut(name, "/")
		r := byName[name]
		if r == nil {
			r = &result{name: name, verdict: "it did not end"}
			byName[name] = r
			results = append(results, r)
		}
		return r
	}
	lines := bufio.NewScanner(bytes.NewReader(out))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		if m := stepLine.FindStringSubmatch(line); m != nil {
			verdict = m[3]
			break
		}
		if m := beginLine.FindStringSubmatch(line); m != nil {
			cur = top(m[1])
			continue
		}
		if m := resumeLine.FindStringSubmatch(line); m != nil && m[1] != "" {
			cur = top(m[1])
			continue
		}
		if m := endLine.FindStringSubmatch(line); m != nil {
			cur = top(m[2])
			if strings.Contains(m[2], "/") {
				cur.log.WriteString(line + "\n")
				continue
			}
			cur.verdict = m[1]
		}
		if cur != nil {
			cur.log.WriteString(line + "\n")
		}
		other.WriteString(line + "\n")
	}
	return results, other.String(), verdict
}
