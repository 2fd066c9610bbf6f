package templatebuild_test

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/templatebuild"
)

func serve(t *testing.T, b *templatebuild.Builder) func(method, path, body string) (int, string) {
	t.Helper()
	api := templatebuild.NewAPI(b, func(w http.ResponseWriter, _ *http.Request, err error) {
		status := map[control.Code]int{control.CodeInvalid: 400, control.CodeUnauthorized: 401, control.CodeNotFound: 404, control.CodeConflict: 409}[control.CodeOf(err)]
		if status == 0 {
			t.Errorf("internal error: %v", err)
			status = 500
		}
		http.Error(w, err.Error(), status)
	})
	r := chi.NewRouter()
	api.Routes(r)
	api.PublicRoutes(r)
	srv := httptest.NewServer(http.StripPrefix("/e2b", r))
	t.Cleanup(srv.Close)
	return func(method, path, body string) (int, string) {
		t.Helper()
		if !strings.HasPrefix(path, "http") {
			path = srv.URL + "/e2b" + path
		}
		req, err := http.NewRequestWithContext(t.Context(), method, path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(text)
	}
}

// The calls in the order of the SDKs, with the codes that they ask for.
func TestSDKCalls(t *testing.T) {
	f := newFake()
	b, _ := open(t, f)
	call := serve(t, b)
	want := func(status int, method, path, body string) (m map[string]any) {
		t.Helper()
		got, text := call(method, path, body)
		if got != status {
			t.Fatalf("%s %s: %d %s; want %d", method, path, got, text, status)
		}
		_ = json.Unmarshal([]byte(text), &m)
		return m
	}
	hash := strings.Repeat("ab", 32)
	want(404, "GET", "/templates/aliases/web", "")
	want(404, "GET", "/templates/web/files/"+hash, "")
	x := want(202, "POST", "/v3/templates", `{"name":"web","tags":["v1"],"cpuCount":1,"memoryMB":512,"unknown":1}`)
	id := x["buildID"].(string)
	if x["templateID"] != "web" || len(id) != 36 || x["public"] != false || len(x["aliases"].([]any)) != 1 {
		t.Errorf("requested: %v", x)
	}
	spec := `{"fromImage":"e2bdev/base","force":false,"steps":[{"type":"COPY","args":["a","/a","",""],"filesHash":"` + hash + `","force":null,"forceUpload":true}]}`
	want(400, "POST", "/v2/templates/web/builds/"+id, spec)
	link := want(201, "GET", "/templates/web/files/"+hash, "")
	url := link["url"].(string)
	if link["present"] != false || !strings.Contains(url, "/e2b/templates/web/files/") {
		t.Errorf("link: %v", link)
	}
	want(401, "PUT", "/templates/web/files/"+hash, "content")
	want(401, "PUT", strings.Replace(url, hash, strings.Repeat("cd", 32), 1), "content")
	want(401, "PUT", strings.Replace(url, "until=", "until=9", 1), "content")
	want(200, "PUT", url, "content")
	if got := want(201, "GET", "/templates/web/files/"+hash, ""); got["present"] != true {
		t.Errorf("after the upload: %v", got)
	}
	want(202, "POST", "/v2/templates/web/builds/"+id, spec)
	wait(t, b, templatebuild.Build{ID: id, Template: "web"})
	if f.files["/var/tmp/wrenn-files-1.tar"] != "content" {
		t.Errorf("files in the sandbox: %v", f.files)
	}
	s := want(200, "GET", "/templates/web/builds/"+id+"/status?logsOffset=0", "")
	if s["status"] != "ready" || s["reason"] != nil || len(s["logEntries"].([]any)) == 0 || s["logs"] == nil {
		t.Errorf("status: %v", s)
	}
	if s := want(200, "GET", "/templates/web/builds/"+id+"/status?logsOffset=1000", ""); len(s["logEntries"].([]any)) != 0 {
		t.Errorf("log behind its end: %v", s)
	}
	want(200, "GET", "/templates/aliases/web", "")
	want(200, "GET", "/templates/aliases/web%3Av1", "")
	want(404, "GET", "/templates/aliases/web%3Av2", "")
	want(200, "GET", "/templates/aliases/base", "")
	want(404, "GET", "/templates/aliases/..%2Fx", "")
	tagged := want(201, "POST", "/templates/tags", `{"target":"web:v1","tags":["prod"]}`)
	if tagged["buildID"] != id {
		t.Errorf("tagged: %v", tagged)
	}
	if _, text := call("GET", "/templates/web/tags", ""); !strings.Contains(text, `"tag":"prod"`) || !strings.Contains(text, `"tag":"v1"`) || !strings.Contains(text, id) {
		t.Errorf("tags: %s", text)
	}
	want(404, "POST", "/templates/tags", `{"target":"web:none","tags":["x"]}`)
	want(400, "POST", "/templates/tags", `{"target":"web:v1","tags":["a b"]}`)
	want(400, "POST", "/templates/tags", `{"target":"web:v1","tags":[]}`)
	want(204, "DELETE", "/templates/tags", `{"name":"web","tags":["v1"]}`)
	want(404, "GET", "/templates/none/tags", "")

	y := want(202, "POST", "/v3/templates", `{"name":"web:v2"}`)
	want(202, "POST", "/v2/templates/web/builds/"+y["buildID"].(string), `{"steps":[{"type":"RUN","args":["fail because"]}]}`)
	wait(t, b, templatebuild.Build{ID: y["buildID"].(string), Template: "web"})
	s = want(200, "GET", "/templates/web/builds/"+y["buildID"].(string)+"/status", "")
	if r, _ := s["reason"].(map[string]any); s["status"] != "error" || r["step"] != "1" || !strings.Contains(r["message"].(string), "because") {
		t.Errorf("a failed build: %v", s)
	}
	want(400, "GET", "/templates/web/builds/"+id+"/status?logsOffset=-1", "")
	want(404, "GET", "/templates/web/builds/none/status", "")
	want(400, "POST", "/v3/templates", `{"name":"web","cpuCount":1000}`)
	want(400, "POST", "/v3/templates", `{"name":"WEB"}`)
	want(400, "POST", "/v3/templates", `{`)
	want(409, "POST", "/v3/templates", `{"name":"base"}`)
	want(400, "GET", "/templates/web/files/..%2F..%2Fetc", "")
	want(204, "DELETE", "/templates/web", "")
	want(404, "DELETE", "/templates/web", "")
	if sb, sn := f.left(); sb+sn != 0 {
		t.Errorf("%d sandboxes and %d snapshots are left", sb, sn)
	}
}
