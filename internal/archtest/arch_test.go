// Package archtest holds the direction of imports: what ARCHITECTURE.md says in
// its table of packages is checked here against what the code imports.
package archtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "git.omukk.dev/wrenn/sandbox/"

// rule says what a package may import: packages of ours by path (a path that
// ends in "/" stands for all below it), and modules of others. The standard
// library is everybody's.
type rule struct {
	ours   []string
	others []string
	// anyOther: which library an upper layer uses is its own affair, as
	// docs/dependencies.md records it. The layers below have a fixed list.
	anyOther bool
}

func only(ours ...string) rule { return rule{ours: ours} }

func with(others []string, ours ...string) rule { return rule{ours: ours, others: others} }

func free(ours ...string) rule { return rule{ours: ours, anyOther: true} }

var sys = []string{"golang.org/x/sys"}

// rules has a line for every package, lowest first, as the table in
// ARCHITECTURE.md. A new package needs a line in both.
var rules = map[string]rule{
	"snapshot/format":   only(),
	"snapshot/storage":  with(sys),
	"snapshot/block":    only("snapshot/format", "snapshot/storage"),
	"snapshot":          only("snapshot/block", "snapshot/format", "snapshot/storage"),
	"snapshot/uffd":     with(sys, "snapshot/format"),
	"snapshot/nbd":      with([]string{"golang.org/x/sync"}),
	"snapshot/snaptest": only("snapshot/"),

	"snapshot/storage/s3":          with([]string{"github.com/minio/minio-go"}, "snapshot/storage"),
	"snapshot/storage/storagetest": only("snapshot/storage"),
	"snapshot/storage/zstd":        with([]string{"github.com/klauspost/compress", "golang.org/x/sync"}, "snapshot/storage"),
	"snapshot/remote":              with([]string{"golang.org/x/sync"}, "snapshot", "snapshot/format", "snapshot/storage"),

	"internal/gen/":            with([]string{"connectrpc.com/connect", "google.golang.org/protobuf"}, "internal/gen/"),
	"internal/vmm":             with(sys),
	"internal/vmm/qemu":        with(sys, "internal/vmm"),
	"internal/vmm/firecracker": with(sys, "internal/vmm"),

	"internal/vmm/firecracker/fctest": with(sys),

	"internal/kernelnbd":         with(append([]string{"github.com/vishvananda/netlink"}, sys...)),
	"internal/vmm/vmmtest":       with(append([]string{"github.com/cavaliergopher/cpio"}, sys...), "internal/vmm", "internal/template"),
	"internal/vmm/vmmtest/":      with(sys),
	"internal/hostnet":           free(),
	"internal/egress":            with([]string{"golang.org/x/net"}, "internal/hostnet"),
	"internal/pager":             with(append([]string{"connectrpc.com/connect"}, sys...), "snapshot/", "internal/vmm", "internal/gen/pager/"),
	"internal/logctx":            with([]string{"connectrpc.com/connect"}),
	"internal/engine":            with(append([]string{"connectrpc.com/connect", "golang.org/x/sync"}, sys...), "internal/logctx", "snapshot/", "internal/vmm", "internal/hostnet", "internal/pager", "internal/gen/", "internal/egress", "internal/localca"),
	"internal/engine/enginetest": free("internal/engine", "internal/vmm/", "internal/hostnet", "internal/localca", "snapshot/", "internal/gen/"),

	"internal/agent":         free("internal/engine", "internal/logctx", "snapshot", "internal/gen/"),
	"internal/control":       free("internal/logctx", "internal/gen/hostagent/"),
	"internal/store":         free("internal/control", "internal/templatebuild", "snapshot/storage"),
	"internal/oci":           free(),
	"internal/oci/ocitest":   free(),
	"internal/templatebuild": free("internal/control", "internal/oci"),
	"internal/httpapi":       free("internal/control", "internal/logctx"),
	"internal/e2bapi":        free("internal/control"),
	"internal/proxy":         free("internal/control"),
	"internal/localca":       only(),
	"internal/guest":         free("internal/gen/", "internal/guest/boot"),
	"internal/guest/rootfs":  with(sys),
	"internal/guest/boot":    free("internal/guest/rootfs"),
	"internal/template":      free(),
	"client":                 with([]string{"github.com/coder/websocket"}),
	"internal/mcpserver":     with([]string{"github.com/modelcontextprotocol/go-sdk"}, "client"),
	"cmd/envd":               free("internal/guest", "internal/guest/boot", "internal/guest/rootfs"),
	"cmd/wrenn":              free("internal/", "snapshot/", "client"),
	"test/":                  free("client", "test/"),
	"test/nested":            free("test/", "internal/vmm/vmmtest", "internal/template"),
	"internal/archtest":      only(),
	"internal/guest/boot/":   free("internal/guest/boot"),
	"internal/store/":        free("internal/store", "internal/control"),
	"internal/control/":      free("internal/control"),
	"client/":                free("client"),
}

// imports lists what each package imports, its tests left out.
func imports(t *testing.T) map[string][]string {
	t.Helper()
	cmd := exec.Command("go", "list", "-f", `{{.ImportPath}}{{range .Imports}} {{.}}{{end}}`, "./...")
	cmd.Dir = filepath.Join("..", "..")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	m := map[string][]string{}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		m[strings.TrimPrefix(f[0], module)] = f[1:]
	}
	if len(m) < 20 {
		t.Fatalf("go list found only %d packages", len(m))
	}
	return m
}

// ruleOf finds the rule of a package: its own, or the longest of a directory
// above it.
func ruleOf(pkg string) (rule, bool) {
	if r, ok := rules[pkg]; ok {
		return r, true
	}
	for dir := pkg; strings.Contains(dir, "/"); {
		dir = dir[:strings.LastIndex(dir, "/")]
		if r, ok := rules[dir+"/"]; ok {
			return r, true
		}
	}
	return rule{}, false
}

// covers says whether path is one of those allowed, or lies below one that
// ends in "/".
func covers(allowed []string, path string) bool {
	return slices.ContainsFunc(allowed, func(a string) bool {
		return path == a || strings.HasSuffix(a, "/") && (strings.HasPrefix(path, a) || path+"/" == a)
	})
}

func (r rule) allows(path string) bool {
	if own, ok := strings.CutPrefix(path, module); ok {
		return covers(r.ours, own)
	}
	first, _, _ := strings.Cut(path, "/")
	if !strings.Contains(first, ".") { // the standard library
		return true
	}
	return r.anyOther || slices.ContainsFunc(r.others, func(o string) bool {
		return path == o || strings.HasPrefix(path, o+"/")
	})
}

func TestImportsKeepTheirDirection(t *testing.T) {
	for pkg, list := range imports(t) {
		r, ok := ruleOf(pkg)
		if !ok {
			t.Errorf("%s: has no rule; add it here and to the table in ARCHITECTURE.md", pkg)
			continue
		}
		for _, i := range list {
			if !r.allows(i) {
				t.Errorf("%s imports %s, which its rule does not allow", pkg, strings.TrimPrefix(i, module))
			}
		}
	}
}

func TestTheLibraryKnowsNothingAboveIt(t *testing.T) {
	for pkg, list := range imports(t) {
		if !strings.HasPrefix(pkg+"/", "snapshot/") {
			continue
		}
		for _, i := range list {
			if own, ok := strings.CutPrefix(i, module); ok && !strings.HasPrefix(own+"/", "snapshot/") {
				t.Errorf("%s imports %s", pkg, own)
			}
		}
	}
}

func TestEveryPackageIsInTheTable(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range rules {
		top := strings.TrimSuffix(pkg, "/")
		if strings.HasSuffix(pkg, "/") || strings.HasSuffix(pkg, "test") {
			continue // helpers of a package that has a line
		}
		if !strings.Contains(string(b), "`"+top+"`") && !strings.Contains(string(b), "`"+filepath.Base(top)+"`") {
			t.Errorf("ARCHITECTURE.md has no line for %s", top)
		}
	}
}

func TestRulesWouldFindAViolation(t *testing.T) {
	for _, c := range []struct {
		pkg, path string
		want      bool
	}{
		{"snapshot/format", module + "snapshot/storage", false},
		{"snapshot/format", "encoding/binary", true},
		{"snapshot", "github.com/aws/aws-sdk-go-v2/aws", false},
		{"snapshot/uffd", "golang.org/x/sys/unix", true},
		{"internal/engine", module + "internal/control", false},
		{"internal/engine", module + "snapshot/block", true},
		{"internal/httpapi", module + "internal/engine", false},
		{"internal/gen/process", "google.golang.org/protobuf/proto", true},
		{"test/e2e", module + "internal/engine", false},
	} {
		r, ok := ruleOf(c.pkg)
		if !ok || r.allows(c.path) != c.want {
			t.Errorf("%s importing %s: allowed %v, want %v", c.pkg, c.path, !c.want, c.want)
		}
	}
}
