package mcpserver

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

// However an output is cut into writes, its beginning and end are kept.
func TestExcerptKeepsBothEnds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := &excerpt{limit: rapid.IntRange(1, 20).Draw(t, "limit")}
		var all []byte
		for _, n := range rapid.SliceOf(rapid.IntRange(0, 30)).Draw(t, "writes") {
			p := make([]byte, n)
			for i := range p {
				p[i] = 'a' + byte((len(all)+i)%26)
			}
			all = append(all, p...)
			e.write(p)
		}
		want := string(all)
		if left := len(all) - e.limit; left > 0 {
			head := e.limit / 2
			want = fmt.Sprintf("%s\n[… %d bytes left out …]\n%s", all[:head], left, all[len(all)-(e.limit-head):])
		}
		if got := e.String(); got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
	})
}
