package e2bapi

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// The number of entries on a page.
const (
	defaultLimit = 100
	maxLimit     = 100
)

// listed is a sandbox in a list.
type listed struct {
	TemplateID  string            `json:"templateID"`
	Alias       string            `json:"alias,omitempty"`
	SandboxID   string            `json:"sandboxID"`
	ClientID    string            `json:"clientID"`
	StartedAt   time.Time         `json:"startedAt"`
	EndAt       time.Time         `json:"endAt"`
	CPUCount    int               `json:"cpuCount"`
	MemoryMB    int               `json:"memoryMB"`
	DiskSizeMB  int               `json:"diskSizeMB"`
	State       string            `json:"state"`
	EnvdVersion string            `json:"envdVersion"`
	Metadata    map[string]string `json:"metadata"`
}

// detail is all of a sandbox.
type detail struct {
	listed
	EnvdAccessToken string    `json:"envdAccessToken"`
	Domain          string    `json:"domain,omitempty"`
	AllowInternet   *bool     `json:"allowInternetAccess"`
	Network         *network  `json:"network,omitempty"`
	Lifecycle       lifecycle `json:"lifecycle"`
	PauseMode       string    `json:"pauseMode,omitempty"`
}

type lifecycle struct {
	AutoResume bool   `json:"autoResume"`
	OnTimeout  string `json:"onTimeout"`
}

// diskSizeMB is the size of every sandbox's disk: that of the base template.
const diskSizeMB = 8192

const (
	stateRunning = "running"
	statePaused  = "paused"
)

// stateOf is the SDKs' word for a status; "" for what they do not see.
func stateOf(s control.Status) string {
	switch s {
	case control.StatusRunning:
		return stateRunning
	case control.StatusPausing, control.StatusPaused, control.StatusResuming:
		return statePaused
	}
	return ""
}

func startOf(sb control.Sandbox) time.Time {
	if sb.StartedAt.IsZero() {
		return sb.CreatedAt
	}
	return sb.StartedAt
}

func endOf(sb control.Sandbox) time.Time {
	switch {
	case !sb.ExpiresAt.IsZero():
		return sb.ExpiresAt
	case sb.Status != control.StatusRunning:
		return sb.ChangedAt
	}
	return never
}

// templateOf is the template as the caller named it: a built one's own name, not
// that of the snapshot it led to.
func templateOf(sb control.Sandbox) string {
	return cmp.Or(sb.Options.Alias, sb.Template)
}

func listedOf(sb control.Sandbox) listed {
	md := sb.Metadata
	if md == nil {
		md = map[string]string{}
	}
	return listed{
		TemplateID: templateOf(sb), Alias: templateOf(sb), SandboxID: sb.ID, ClientID: clientID, StartedAt: startOf(sb), EndAt: endOf(sb),
		CPUCount: sb.VCPUs, MemoryMB: sb.MemoryMB, DiskSizeMB: diskSizeMB,
		State: stateOf(sb.Status), EnvdVersion: EnvdVersion, Metadata: md,
	}
}

func (a *api) get(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	sb, err := a.svc.Get(r.Context(), id)
	if err != nil {
		return err
	}
	if stateOf(sb.Status) == "" {
		return &control.Error{Code: control.CodeNotFound, Message: fmt.Sprintf("sandbox %s is %s", id, sb.Status)}
	}
	token, err := a.svc.AccessToken(r.Context(), id)
	if err != nil {
		return err
	}
	d := detail{
		listed: listedOf(sb), EnvdAccessToken: token, Domain: a.Domain, Network: networkOf(sb.Options),
		Lifecycle: lifecycle{sb.Options.AutoResume, "kill"},
	}
	if sb.Options.Egress != nil {
		d.AllowInternet = sb.Options.Egress.Internet
	}
	if sb.AutoPause {
		d.Lifecycle.OnTimeout = "pause"
	}
	if sb.Status == control.StatusPaused {
		d.PauseMode = "full"
		if sb.Options.DiskOnly {
			d.PauseMode = "filesystem"
		}
	}
	reply(w, http.StatusOK, d)
	return nil
}

// metadataQuery reads the pairs of a query, which are encoded twice: the pairs
// as a query of their own, and each name and value once more.
func metadataQuery(s string) (map[string]string, error) {
	if s == "" {
		return nil, nil
	}
	pairs, err := url.ParseQuery(s)
	if err != nil {
		return nil, control.Invalid("metadata", "must be name=value pairs, encoded as a query: %v", err)
	}
	m := map[string]string{}
	for k, vs := range pairs {
		name, err := url.PathUnescape(k)
		if err != nil {
			return nil, control.Invalid("metadata", "the name %.64q is not percent-encoded", k)
		}
		value, err := url.PathUnescape(vs[0])
		if err != nil {
			return nil, control.Invalid("metadata", "the value %.64q is not percent-encoded", vs[0])
		}
		m[name] = value
	}
	return m, control.ValidateMetadata(m)
}

// listQuery selects sandboxes.
type listQuery struct {
	metadata map[string]string
	states   []string
	after    time.Time
	template string
	asc      bool
	page     page
}

func listQueryOf(r *http.Request) (q listQuery, err error) {
	v := r.URL.Query()
	if q.metadata, err = metadataQuery(v.Get("metadata")); err != nil {
		return q, err
	}
	q.states = []string{stateRunning, statePaused}
	if s := strings.Join(v["state"], ","); s != "" {
		q.states = strings.Split(s, ",")
		for _, s := range q.states {
			if s != stateRunning && s != statePaused {
				return q, control.Invalid("state", "must be running, paused or both with a comma; got %.32q", s)
			}
		}
	}
	if s := v.Get("startedAfter"); s != "" {
		if q.after, err = time.Parse(time.RFC3339Nano, strings.ReplaceAll(s, " ", "+")); err != nil {
			return q, control.Invalid("startedAfter", "must be a time such as 2030-01-02T03:04:05Z")
		}
	}
	switch v.Get("order") {
	case "", "desc":
	case "asc":
		q.asc = true
	default:
		return q, control.Invalid("order", "must be asc or desc")
	}
	q.template = templateName(v.Get("template"))
	q.page, err = pageOf(v)
	return q, err
}

func (q listQuery) takes(sb control.Sandbox) bool {
	return slices.Contains(q.states, stateOf(sb.Status)) && (q.template == "" || q.template == sb.Template || q.template == sb.Options.Alias) &&
		(q.after.IsZero() || startOf(sb).After(q.after))
}

func (a *api) list(w http.ResponseWriter, r *http.Request) error {
	q, err := listQueryOf(r)
	if err != nil {
		return err
	}
	rows, err := a.svc.List(r.Context(), control.SandboxFilter{Metadata: q.metadata, Statuses: []control.Status{
		control.StatusRunning, control.StatusPausing, control.StatusPaused, control.StatusResuming,
	}})
	if err != nil {
		return err
	}
	rows = slices.DeleteFunc(rows, func(sb control.Sandbox) bool { return !q.takes(sb) })
	out := []listed{}
	for _, sb := range paged(w, rows, q.page, q.asc, func(sb control.Sandbox) place { return place{startOf(sb), sb.ID} }) {
		out = append(out, listedOf(sb))
	}
	reply(w, http.StatusOK, out)
	return nil
}

// listRunning is the older list: what runs, without pages.
func (a *api) listRunning(w http.ResponseWriter, r *http.Request) error {
	m, err := metadataQuery(r.URL.Query().Get("metadata"))
	if err != nil {
		return err
	}
	rows, err := a.svc.List(r.Context(), control.SandboxFilter{Metadata: m, Statuses: []control.Status{control.StatusRunning}})
	if err != nil {
		return err
	}
	out := []listed{}
	for _, sb := range rows {
		out = append(out, listedOf(sb))
	}
	reply(w, http.StatusOK, out)
	return nil
}

// place is where an entry stands in a list.
type place struct {
	at time.Time
	id string
}

func (p place) compare(o place) int {
	if c := p.at.Compare(o.at); c != 0 {
		return c
	}
	return cmp.Compare(p.id, o.id)
}

// page is the part of a list that a caller asks for.
type page struct {
	limit int
	after *place
}

func pageOf(v url.Values) (page, error) {
	p := page{limit: defaultLimit}
	if s := v.Get("limit"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > maxLimit {
			return p, control.Invalid("limit", "must be 1 to %d", maxLimit)
		}
		p.limit = n
	}
	s := v.Get("nextToken")
	if s == "" {
		return p, nil
	}
	bad := control.Invalid("nextToken", "is not one that a list gave")
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		return p, bad
	}
	us, id, ok := strings.Cut(string(b), " ")
	n, err := strconv.ParseInt(us, 10, 64)
	if !ok || err != nil {
		return p, bad
	}
	p.after = &place{time.UnixMicro(n), id}
	return p, nil
}

// paged sorts rows, newest first unless asc, and gives the page; the header
// names the next one.
func paged[T any](w http.ResponseWriter, rows []T, p page, asc bool, at func(T) place) []T {
	order := func(a, b place) int {
		if asc {
			return a.compare(b)
		}
		return b.compare(a)
	}
	slices.SortFunc(rows, func(x, y T) int { return order(at(x), at(y)) })
	if p.after != nil {
		rows = slices.DeleteFunc(rows, func(x T) bool { return order(at(x), *p.after) <= 0 })
	}
	if len(rows) > p.limit {
		rows = rows[:p.limit]
		last := at(rows[p.limit-1])
		token := strconv.FormatInt(last.at.UnixMicro(), 10) + " " + last.id
		w.Header().Set("X-Next-Token", base64.RawURLEncoding.EncodeToString([]byte(token)))
	}
	return rows
}
