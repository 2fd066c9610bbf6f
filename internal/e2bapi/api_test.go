package e2bapi_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/go-chi/chi/v5"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
	"git.omukk.dev/wrenn/sandbox/internal/e2bapi"
	"git.omukk.dev/wrenn/sandbox/internal/store"
)

type server struct {
	*httptest.Server
	svc     *control.Service
	host    *controltest.Host
	history *e2bapi.History
	key     string
}

func setup(t *testing.T) *server {
	t.Helper()
	db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "wrenn.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	s := &server{host: controltest.NewHost()}
	s.svc = control.New(control.Options{Store: db, Host: s.host, Logger: log})
	key, row := control.NewAPIKey("test")
	s.key = key
	if err := db.CreateAPIKey(t.Context(), row); err != nil {
		t.Fatal(err)
	}
	if _, err := s.svc.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.history = e2bapi.NewHistory(s.svc)
	s.Server = httptest.NewServer(http.StripPrefix("/e2b", e2bapi.New(e2bapi.Options{
		Service: s.svc, History: s.history, Domain: "wrenn.test:8443", Logger: log,
		More: func(r chi.Router, _ func(http.ResponseWriter, *http.Request, error)) {
			r.Get("/v3/more", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) })
		},
	})))
	t.Cleanup(s.Close)
	return s
}

// do sends a request and returns the status, the headers and the body.
func (s *server) do(t *testing.T, method, path, body string) (int, http.Header, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, s.URL+"/e2b"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-KEY", s.key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode >= 400 {
		var e struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		}
		if err := json.Unmarshal(b, &e); err != nil || e.Code != resp.StatusCode || e.Message == "" {
			t.Errorf("%s %s: %d, and the error's body is %s", method, path, resp.StatusCode, b)
		}
	}
	return resp.StatusCode, resp.Header, b
}

// want is do that checks the status and decodes the body.
func (s *server) want(t *testing.T, status int, method, path, body string) map[string]any {
	t.Helper()
	code, _, b := s.do(t, method, path, body)
	if code != status {
		t.Fatalf("%s %s %s: %d %s, want %d", method, path, body, code, b, status)
	}
	var m map[string]any
	if len(b) > 0 && b[0] == '{' {
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func (s *server) create(t *testing.T, body string) string {
	t.Helper()
	return s.want(t, 201, "POST", "/v2/sandboxes", body)["sandboxID"].(string)
}

func TestTheSmallestFlow(t *testing.T) {
	s := setup(t)
	sb := s.want(t, 201, "POST", "/v2/sandboxes", `{"templateID":"base"}`)
	id := sb["sandboxID"].(string)
	for k, v := range map[string]any{
		"templateID": "base", "envdVersion": "0.6.13", "domain": "wrenn.test:8443", "envdAccessToken": controltest.Token(id),
	} {
		if sb[k] != v {
			t.Errorf("%s is %v, want %v", k, sb[k], v)
		}
	}
	if sb["clientID"] == nil || sb["trafficAccessToken"] != nil {
		t.Errorf("%v", sb)
	}
	s.want(t, 204, "POST", "/sandboxes/"+id+"/pause", "")
	s.want(t, 409, "POST", "/sandboxes/"+id+"/pause", `{"memory":true}`)
	if d := s.want(t, 200, "GET", "/sandboxes/"+id, ""); d["state"] != "paused" || d["pauseMode"] != "full" {
		t.Errorf("paused: %v", d)
	}
	if again := s.want(t, 201, "POST", "/v2/sandboxes/"+id+"/connect", `{}`); again["envdAccessToken"] != sb["envdAccessToken"] {
		t.Error("the token has changed")
	}
	s.want(t, 200, "POST", "/v2/sandboxes/"+id+"/connect", `{"timeout":10}`)
	snap := s.want(t, 201, "POST", "/sandboxes/"+id+"/snapshots", `{"name":"mine:default"}`)
	if snap["snapshotID"] != "mine" {
		t.Errorf("%v", snap)
	}
	s.create(t, `{"templateID":"mine:default","unknown":{"field":1}}`)
	s.want(t, 204, "DELETE", "/templates/mine", "")
	s.want(t, 404, "DELETE", "/templates/mine", "")
	s.want(t, 404, "DELETE", "/templates/team%2Fmine%3Av2", "")
	s.want(t, 204, "DELETE", "/sandboxes/"+id, "")
	s.want(t, 404, "DELETE", "/sandboxes/"+id, "")
	s.want(t, 404, "GET", "/sandboxes/"+id, "")
	s.want(t, 202, "GET", "/v3/more", "")
}

func TestBothFormsOfAKeyOpenAndNothingElseDoes(t *testing.T) {
	s := setup(t)
	for _, key := range []string{s.key, "e2b_" + strings.TrimPrefix(s.key, "wrn_")} {
		s.key = key
		s.want(t, 200, "GET", "/v2/sandboxes", "")
	}
	for _, key := range []string{"", "e2b_", "e2b_" + strings.Repeat("0", 40), "wrn_x", strings.TrimPrefix(s.key, "e2b_")} {
		s.key = key
		for _, r := range []string{"GET /v2/sandboxes", "POST /v2/sandboxes", "GET /v3/more", "DELETE /templates/base"} {
			method, path, _ := strings.Cut(r, " ")
			if code, _, _ := s.do(t, method, path, ""); code != 401 {
				t.Errorf("key %q: %s: %d", key, r, code)
			}
		}
	}
}

func TestTheLimitsAreTheSDKs(t *testing.T) {
	s := setup(t)
	for path, sec := range map[string]time.Duration{"/v2/sandboxes": 300, "/sandboxes": 15} {
		id := s.want(t, 201, "POST", path, `{"templateID":"base"}`)["sandboxID"].(string)
		sb, err := s.svc.Get(t.Context(), id)
		if err != nil || sb.ExpiresAt.Sub(sb.CreatedAt).Round(time.Second) != sec*time.Second {
			t.Errorf("%s: %v, %v", path, sb.ExpiresAt.Sub(sb.CreatedAt), err)
		}
		end := s.want(t, 200, "GET", "/sandboxes/"+id, "")["endAt"]
		s.want(t, 200, "POST", "/sandboxes/"+id+"/connect", `{"timeout":1}`)
		if again := s.want(t, 200, "GET", "/sandboxes/"+id, "")["endAt"]; again != end {
			t.Errorf("endAt changed from %v to %v", end, again)
		}
		s.want(t, 204, "POST", "/sandboxes/"+id+"/timeout", `{"timeout":1}`)
		if again := s.want(t, 200, "GET", "/sandboxes/"+id, "")["endAt"].(string); again >= end.(string) {
			t.Errorf("the limit was not shortened: %v to %v", end, again)
		}
	}
}

func TestBadInputNamesItsField(t *testing.T) {
	s := setup(t)
	id := s.create(t, `{"templateID":"base"}`)
	for _, c := range []struct{ method, path, body, want string }{
		{"POST", "/v2/sandboxes", `{`, "body"},
		{"POST", "/v2/sandboxes", `{} {}`, "templateID|body"},
		{"POST", "/v2/sandboxes", ``, "templateID"},
		{"POST", "/v2/sandboxes", `{"templateID":5}`, "templateID"},
		{"POST", "/v2/sandboxes", `{"templateID":"../x"}`, "template"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":0}`, "timeout"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":99999999999}`, "timeout"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","timeout":"1"}`, "timeout"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","metadata":{"":"x"}}`, "metadata"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","envVars":{"1 x":"x"}}`, "envs"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","mcp":{"a":1}}`, "mcp"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","iam":{"tokens":{"a":1}}}`, "iam"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","volumeMounts":[{"name":"v","path":"/v"}]}`, "volumeMounts"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"rules":{"a":[]}}}`, "rules"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"allowOut":["a.example"]}}`, "allowOut"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"denyOut":["::/0"]}}`, "denyOut"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"httpsPorts":[49983]}}`, "httpsPorts"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"httpsPorts":[70000]}}`, "httpsPorts"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","network":{"httpsPorts":["a"]}}`, "httpsPorts"},
		{"PUT", "/sandboxes/" + id + "/network", `{"httpsPorts":[3000]}`, "httpsPorts"},
		{"PUT", "/sandboxes/" + id + "/network", `{"dnsServers":["dns.example"]}`, "dnsServers"},
		{"PUT", "/sandboxes/" + id + "/network", `{"dnsServers":["1.1.1.1","1.1.1.2","1.1.1.3","1.1.1.4","1.1.1.5","1.1.1.6","1.1.1.7","1.1.1.8","1.1.1.9","1.1.1.10","1.1.1.11"]}`, "dnsServers"},
		{"POST", "/v2/sandboxes", `{"templateID":"base","autoPause":true,"autoPauseMemory":false,"autoResume":{"enabled":true}}`, "autoResume"},
		{"POST", "/v2/sandboxes/" + id + "/connect", `{"timeout":-1}`, "timeout"},
		{"POST", "/sandboxes/" + id + "/timeout", `{}`, "timeout"},
		{"POST", "/sandboxes/" + id + "/timeout", `{"timeout":-1}`, "timeout"},
		{"POST", "/sandboxes/" + id + "/fork", `{"count":0}`, "count"},
		{"POST", "/sandboxes/" + id + "/fork", `{"timeout":0}`, "timeout"},
		{"POST", "/sandboxes/" + id + "/snapshots", `{"name":"No Name"}`, "name"},
		{"POST", "/sandboxes/" + id + "/snapshots", `{"memory":false}`, "memory"},
		{"PUT", "/sandboxes/" + id + "/network", `{"egressProxy":{"address":"a:1"}}`, "egressProxy"},
		{"GET", "/v2/sandboxes?limit=0", "", "limit"},
		{"GET", "/v2/sandboxes?state=dead", "", "state"},
		{"GET", "/v2/sandboxes?order=up", "", "order"},
		{"GET", "/v2/sandboxes?nextToken=x", "", "nextToken"},
		{"GET", "/v2/sandboxes?startedAfter=now", "", "startedAfter"},
		{"GET", "/v2/sandboxes?metadata=%25zz", "", "metadata"},
		{"GET", "/sandboxes/" + id + "/metrics?start=x", "", "start"},
		{"GET", "/sandboxes/" + id + "/metrics?start=9&end=1", "", "end"},
	} {
		code, _, b := s.do(t, c.method, c.path, c.body)
		named := false
		for _, w := range strings.Split(c.want, "|") {
			named = named || strings.Contains(string(b), w)
		}
		if code != 400 || !named {
			t.Errorf("%s %s %s: %d %s; want a 400 that names %s", c.method, c.path, c.body, code, b, c.want)
		}
	}
	if code, _, _ := s.do(t, "POST", "/v2/sandboxes", `{"templateID":"`+strings.Repeat("x", 2<<20)+`"}`); code != 413 {
		t.Errorf("a body of 2 MiB: %d", code)
	}
	if len(s.host.IDs()) != 1 {
		t.Errorf("bad input made sandboxes: %v", s.host.IDs())
	}
}

func TestWhatIsNotThereIs404(t *testing.T) {
	s := setup(t)
	for _, r := range []string{
		"GET /sandboxes/x", "DELETE /sandboxes/x", "POST /sandboxes/x/timeout {\"timeout\":1}", "POST /sandboxes/x/pause",
		"POST /v2/sandboxes/x/connect", "POST /sandboxes/x/snapshots", "POST /sandboxes/x/fork", "PUT /sandboxes/x/network {}",
		"GET /sandboxes/x/metrics", "GET /sandboxes/%2e%2e", "GET /nothing", "POST /v2/sandboxes {\"templateID\":\"nosuch\"}",
	} {
		part := strings.SplitN(r, " ", 3)
		if code, _, b := s.do(t, part[0], part[1], strings.Join(part[2:], "")); code != 404 {
			t.Errorf("%s: %d %s", r, code, b)
		}
	}
}

func TestErrorsOfTheHostHaveTheirStatus(t *testing.T) {
	s := setup(t)
	noRoom := &control.Error{Code: control.CodeHostUnavailable, Message: "no room", Err: connect.NewError(connect.CodeResourceExhausted, errors.New("no room"))}
	for _, c := range []struct {
		err  error
		want int
	}{
		{noRoom, 429},
		{controltest.Err(control.CodeHostUnavailable, "away"), 503},
		{controltest.Err(control.CodeInternal, "secret"), 500},
		{errors.New("secret"), 500},
	} {
		s.host.Fail("create", c.err)
		code, h, b := s.do(t, "POST", "/v2/sandboxes", `{"templateID":"base"}`)
		if code != c.want || strings.Contains(string(b), "secret") {
			t.Errorf("%v: %d %s", c.err, code, b)
		}
		if retry := h.Get("Retry-After"); (retry == "1") != (c.want == 429 || c.want == 503) {
			t.Errorf("%v: Retry-After %q", c.err, retry)
		}
	}
}

func TestListing(t *testing.T) {
	s := setup(t)
	var ids []string
	for i := range 5 {
		ids = append(ids, s.create(t, fmt.Sprintf(`{"templateID":"base","metadata":{"k é&=":"v +%d","all":"1"}}`, i)))
	}
	s.want(t, 204, "POST", "/sandboxes/"+ids[0]+"/pause", "")
	list := func(query string) []string {
		t.Helper()
		var got []string
		for token := ""; ; {
			code, h, b := s.do(t, "GET", "/v2/sandboxes?"+query+token, "")
			var rows []map[string]any
			if err := json.Unmarshal(b, &rows); code != 200 || err != nil {
				t.Fatalf("%s: %d %s", query, code, b)
			}
			for _, r := range rows {
				got = append(got, r["sandboxID"].(string))
			}
			if h.Get("X-Next-Token") == "" {
				return got
			}
			token = "&nextToken=" + url.QueryEscape(h.Get("X-Next-Token"))
		}
	}
	newest := []string{ids[4], ids[3], ids[2], ids[1], ids[0]}
	for query, want := range map[string][]string{
		"":                               newest,
		"limit=2":                        newest,
		"order=asc&limit=2":              ids,
		"state=paused":                   {ids[0]},
		"state=running&limit=1":          newest[:4],
		"state=running,paused":           newest,
		"template=nosuch":                nil,
		"template=base&limit=3":          newest,
		"startedAfter=2100-01-01T00:00Z": nil,
		// Encoded twice, as the SDKs do.
		"metadata=" + url.QueryEscape(url.QueryEscape("k%20%C3%A9%26%3D")+"="+url.QueryEscape("v%20%2B3")): {ids[3]},
		"metadata=" + url.QueryEscape("all=1&k=2"):                                                         nil,
	} {
		if strings.HasPrefix(query, "startedAfter") {
			query = "startedAfter=2100-01-01T00:00:00Z"
		}
		if got := list(query); strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("%s: %v, want %v", query, got, want)
		}
	}
}

func TestSnapshotsForksAndNetwork(t *testing.T) {
	s := setup(t)
	id := s.create(t, `{"templateID":"base","network":{"allowPublicTraffic":false,"denyOut":["0.0.0.0/0"],"httpsPorts":[3000]},"allow_internet_access":true}`)
	other := s.create(t, `{"templateID":"base"}`)
	for _, name := range []string{"a", "b", "c"} {
		s.want(t, 201, "POST", "/sandboxes/"+id+"/snapshots", `{"name":"`+name+`"}`)
	}
	// A name that is there stands for the new snapshot from then on.
	s.want(t, 201, "POST", "/sandboxes/"+id+"/snapshots", `{"name":"a"}`)
	s.want(t, 409, "POST", "/sandboxes/"+id+"/snapshots", `{"name":"base"}`)
	for query, want := range map[string]int{"sandboxID=" + id: 3, "sandboxID=" + other: 0, "name=b": 1, "": 3} {
		var rows []any
		if _, _, b := s.do(t, "GET", "/snapshots?"+query, ""); json.Unmarshal(b, &rows) != nil || len(rows) != want {
			t.Errorf("snapshots?%s: %s", query, b)
		}
	}
	var children []struct{ Sandbox map[string]any }
	_, _, b := s.do(t, "POST", "/sandboxes/"+id+"/fork", `{"count":2,"timeout":60}`)
	if err := json.Unmarshal(b, &children); err != nil || len(children) != 2 {
		t.Fatalf("fork: %s", b)
	}
	source, err := s.svc.Get(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range children {
		if tok := c.Sandbox["trafficAccessToken"]; tok == nil || tok == source.Options.TrafficToken {
			t.Errorf("a child's ports are opened by %v", tok)
		}
		child, err := s.svc.Get(t.Context(), c.Sandbox["sandboxID"].(string))
		if left := time.Until(child.ExpiresAt); err != nil || left > time.Minute || left < 50*time.Second {
			t.Errorf("a child's limit: %v, %v", left, err)
		}
	}
	s.want(t, 204, "PUT", "/sandboxes/"+id+"/network", `{"allowOut":["192.0.2.1"],"allow_internet_access":false}`)
	if _, _, b := s.do(t, "GET", "/sandboxes/"+id, ""); !strings.Contains(string(b), `"httpsPorts":[3000]`) {
		t.Errorf("detail: %s", b)
	}
	e := s.host.Egress(id)
	if e == nil || e.Internet == nil || *e.Internet || len(e.Deny) != 0 || e.Allow[0] != "192.0.2.1/32" {
		t.Errorf("egress: %+v", e)
	}
	s.want(t, 204, "PUT", "/sandboxes/"+id+"/network", `{"allowOut":["a.example"],"denyOut":["0.0.0.0/0"],"dnsServers":[]}`)
	if _, _, b := s.do(t, "GET", "/sandboxes/"+id, ""); !strings.Contains(string(b), `"dnsServers":[]`) {
		t.Errorf("detail: %s", b)
	}
	s.want(t, 204, "PUT", "/sandboxes/"+id+"/network", `{"rules":{"*.API.example":[{"transform":{"headers":{"X-Key":"k"}}},{}]}}`)
	if e := s.host.Egress(id); e == nil || len(e.Allow) != 0 || len(e.Rules["*.api.example"]) != 2 || e.Rules["*.api.example"][0].Headers["X-Key"] != "k" {
		t.Errorf("rules: %+v", e)
	}
	if _, _, b := s.do(t, "GET", "/sandboxes/"+id, ""); !strings.Contains(string(b), `"rules":{"*.api.example":[{"transform":{"headers":{"X-Key":"k"}}},{}]}`) {
		t.Errorf("detail: %s", b)
	}
	s.want(t, 204, "PUT", "/sandboxes/"+id+"/network", `{}`)
	if e := s.host.Egress(id); e != nil {
		t.Errorf("an update replaces all: %+v", e)
	}
}

func TestMetricsAreRemembered(t *testing.T) {
	s := setup(t)
	id := s.create(t, `{"templateID":"base"}`)
	rows := func(query string) (out []map[string]any) {
		t.Helper()
		if _, _, b := s.do(t, "GET", "/sandboxes/"+id+"/metrics"+query, ""); json.Unmarshal(b, &out) != nil {
			t.Fatalf("%s", b)
		}
		return out
	}
	if got := rows(""); len(got) != 0 {
		t.Errorf("before the first sample: %v", got)
	}
	s.history.Sample(t.Context())
	s.history.Sample(t.Context())
	got := rows("")
	if len(got) != 2 {
		t.Fatalf("%v", got)
	}
	for _, f := range []string{"timestamp", "timestampUnix", "cpuCount", "cpuUsedPct", "memUsed", "memTotal", "memCache", "diskUsed", "diskTotal"} {
		if _, ok := got[0][f]; !ok {
			t.Errorf("no %s", f)
		}
	}
	now := time.Now().Unix()
	if n := len(rows(fmt.Sprintf("?start=%d&end=%d", now-60, now))); n != 2 {
		t.Errorf("within a minute: %d", n)
	}
	if n := len(rows(fmt.Sprintf("?start=%d", now+60))); n != 0 {
		t.Errorf("in the future: %d", n)
	}
	s.host.Fail("metrics", errors.New("the guest is stuck"))
	s.history.Sample(t.Context())
	if n := len(rows("")); n != 2 {
		t.Errorf("a guest that does not answer gave a sample: %d", n)
	}
	s.want(t, 204, "DELETE", "/sandboxes/"+id, "")
	if code, _, _ := s.do(t, "GET", "/sandboxes/"+id+"/metrics", ""); code != 404 {
		t.Errorf("of one that is gone: %d", code)
	}
}
