package logctx

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

func TestLinesTellWhatTheirContextCarries(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(Handler(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})))
	ctx := WithSandbox(WithRequest(t.Context(), "r1"), "s1")
	for _, c := range []struct {
		say  func()
		want []string
		not  string
	}{
		{func() { log.InfoContext(ctx, "m") }, []string{"request_id=r1", "sandbox=s1"}, ""},
		{func() { log.InfoContext(ctx, "m", "sandbox", "s2") }, []string{"request_id=r1", "sandbox=s2"}, "s1"},
		{func() { log.With("sandbox", "s3").With("a", 1).InfoContext(ctx, "m") }, []string{"request_id=r1", "sandbox=s3", "a=1"}, "s1"},
		{func() { log.Info("m") }, []string{"msg=m"}, "request_id"},
	} {
		out.Reset()
		c.say()
		for _, want := range c.want {
			if strings.Count(out.String(), want) != 1 {
				t.Errorf("%q has no %s, or twice", out.String(), want)
			}
		}
		if c.not != "" && strings.Contains(out.String(), c.not) {
			t.Errorf("%q has %s", out.String(), c.not)
		}
	}
}

func TestOnlySoundIDsAreTakenOver(t *testing.T) {
	for id, sound := range map[string]bool{
		"a": true, "A-b_c.9": true, strings.Repeat("x", 64): true,
		"": false, strings.Repeat("x", 65): false, "a b": false, "a\nb": false, `a"`: false, "ä": false,
	} {
		if Sound(id) != sound {
			t.Errorf("%q: %v", id, !sound)
		}
	}
}
