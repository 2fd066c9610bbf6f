package httpapi_test

import (
	"testing"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
)

func TestGarbageIsToldAndFreed(t *testing.T) {
	t.Parallel()
	s := setup(t)
	s.host.SetGarbage(control.GarbageItem{Kind: "image", ID: "aa", Bytes: 7})
	c, err := client.New(client.Options{BaseURL: s.URL, APIKey: s.key})
	if err != nil {
		t.Fatal(err)
	}
	for _, dry := range []bool{true, true, false} {
		g, err := c.CollectGarbage(t.Context(), dry)
		if err != nil || g.DryRun != dry || g.Bytes != 7 || len(g.Items) != 1 || g.Items[0] != (client.GarbageItem{Kind: "image", ID: "aa", Bytes: 7}) {
			t.Fatalf("dry run %v: %+v, %v", dry, g, err)
		}
	}
	// Checked against the document, with an empty list.
	s.want(t, "POST", "/v1/store/gc", map[string]bool{"dry_run": true}, 200)
	s.want(t, "POST", "/v1/store/gc", `{"dry_run":"yes"}`, 400)
	s.want(t, "POST", "/v1/store/gc", `{"force":true}`, 400)
	s.host.Fail("collect_garbage", controltest.Err(control.CodeInvalidState, "a pause is under way"))
	if code, _ := s.want(t, "POST", "/v1/store/gc", `{}`, 409).code(t); code != "invalid_state" {
		t.Fatalf("busy: %s", code)
	}
}
