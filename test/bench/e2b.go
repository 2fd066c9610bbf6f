package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/test/sdk"
)

// e2b measures what the published E2B SDKs (here the Python one) add to our own
// API, and how they move files. Its script takes the measurements.
func (b *bench) e2b(ctx context.Context) error {
	sdks, err := sdk.Install(ctx)
	if err != nil {
		return fmt.Errorf("install the SDKs: %w", err)
	}
	key, err := os.ReadFile(filepath.Join(b.s.Dir, "api-key"))
	if err != nil {
		return err
	}
	k := strings.TrimSpace(string(key))
	cmd := exec.CommandContext(ctx, sdks.Python(), "test/sdk/py/bench.py", strconv.Itoa(b.rounds))
	cmd.Env = append(os.Environ(), "E2B_API_URL="+b.s.URL+"/e2b", "E2B_SANDBOX_URL="+b.s.URL,
		"E2B_API_KEY=e2b_"+strings.TrimPrefix(k, "wrn_"), "WRENN_URL="+b.s.URL, "WRENN_API_KEY="+k)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	got := map[string]samples{}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var f struct {
			Name string    `json:"name"`
			MS   []float64 `json:"ms"`
		}
		if err := json.Unmarshal(lines.Bytes(), &f); err != nil {
			return fmt.Errorf("%q: %w", lines.Text(), err)
		}
		for _, ms := range f.MS {
			got[f.Name] = append(got[f.Name], time.Duration(ms*float64(time.Millisecond)))
		}
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	return b.e2bRows(got)
}

func (b *bench) e2bRows(got map[string]samples) error {
	for _, name := range []string{"create by sdk", "create by own api", "sdk down", "plain down", "sdk up", "plain up", "watch event"} {
		if len(got[name]) == 0 {
			return fmt.Errorf("the script measured no %q", name)
		}
	}
	sdk, own := got["create by sdk"], got["create by own api"]
	r := ratio(sdk, own)
	b.out.row("E2B SDK, create to first command, from a warm snapshot", sdk.String(), "", true)
	b.out.row("the same by our own API", own.String(), "", true)
	b.out.row("E2B SDK against our own API", fmt.Sprintf("%.2f×", r), "≤ 1.2×", r <= 1.2)
	for _, way := range []string{"up", "down"} {
		sdk, plain := got["sdk "+way], got["plain "+way]
		share := 100 / ratio(sdk, plain)
		b.out.row("E2B SDK, 100 MiB "+way, sdk.String(), "", true)
		b.out.row("a plain HTTP copy "+way+" by a server in the sandbox, through the same proxy", plain.String(), "", true)
		b.out.row("speed of the SDK's copy "+way+" against the plain one", fmt.Sprintf("%.0f %%", share), "≥ 50 %", share >= 50)
	}
	w := got["watch event"]
	b.out.row("E2B SDK, from a write's call to its watch event", w.String(), "≤ 100 ms", w.median() <= 100*time.Millisecond)
	return nil
}
