package templatebuild

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/go-chi/chi/v5"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

const (
	// maxBody bounds a request's JSON: the steps of a build.
	maxBody = 16 << 20
	// logPage is the most entries in one answer; the SDKs ask until there are
	// none.
	logPage = 100
)

// API answers the SDKs' calls about templates.
type API struct {
	b *Builder
	// fail writes an error in the form of the surface that mounts it.
	fail func(http.ResponseWriter, *http.Request, error)
}

// NewAPI makes it; fail writes errors.
func NewAPI(b *Builder, fail func(http.ResponseWriter, *http.Request, error)) *API {
	return &API{b, fail}
}

// Routes adds what needs a key.
func (a *API) Routes(r chi.Router) {
	r.Post("/v3/templates", a.do(a.request))
	r.Post("/v2/templates/{templateID}/builds/{buildID}", a.do(a.start))
	r.Delete("/templates/{templateID}/builds/{buildID}", a.do(a.cancel))
	r.Get("/templates/{templateID}/builds/{buildID}/status", a.do(a.status))
	r.Get("/templates/{templateID}/files/{hash}", a.do(a.link))
	r.Get("/templates/aliases/{alias}", a.do(a.alias))
	r.Post("/templates/tags", a.do(a.putTags))
	r.Delete("/templates/tags", a.do(a.deleteTags))
	r.Get("/templates/{templateID}/tags", a.do(a.tags))
	r.Delete("/templates/{templateID}", a.do(a.remove))
}

// PublicRoutes adds the upload, which a signature allows and no key.
func (a *API) PublicRoutes(r chi.Router) {
	r.Put("/templates/{templateID}/files/{hash}", a.do(a.upload))
}

func (a *API) do(h func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			a.fail(w, r, err)
		}
	}
}

func reply(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // a client that has gone needs no answer
	return nil
}

func decode(w http.ResponseWriter, r *http.Request, v any) error {
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(v)
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return &control.Error{Code: control.CodeTooLarge, Message: fmt.Sprintf("the body must have at most %d bytes", maxBody)}
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return control.Invalid("body", "is not the JSON that is wanted: %v", err)
	}
	return nil
}

// param is a part of the path, which may be percent-encoded.
func param(r *http.Request, name string) string {
	s := chi.URLParam(r, name)
	if r.URL.RawPath != "" {
		if p, err := url.PathUnescape(s); err == nil {
			return p
		}
	}
	return s
}

// template is the path's template; a tag after it does not matter here.
func template(r *http.Request) string {
	name, _ := SplitName(param(r, "templateID"))
	return name
}

func (a *API) request(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		Name     string   `json:"name"`
		Alias    string   `json:"alias"`
		Tags     []string `json:"tags"`
		CPUCount int64    `json:"cpuCount"`
		MemoryMB int64    `json:"memoryMB"`
	}
	if err := decode(w, r, &in); err != nil {
		return err
	}
	if in.Name == "" {
		in.Name = in.Alias
	}
	for field, v := range map[string]struct{ v, low, high int64 }{
		"cpuCount": {in.CPUCount, control.MinVCPUs, control.MaxVCPUs},
		"memoryMB": {in.MemoryMB, control.MinMemoryMB, control.MaxMemoryMB},
	} {
		if v.v != 0 && (v.v < v.low || v.v > v.high) {
			return control.Invalid(field, "must be from %d to %d; got %d", v.low, v.high, v.v)
		}
	}
	x, err := a.b.Request(r.Context(), in.Name, in.Tags, in.CPUCount, in.MemoryMB)
	if err != nil {
		return err
	}
	return reply(w, http.StatusAccepted, map[string]any{
		"templateID": x.Template, "buildID": x.ID, "public": false,
		"names": []string{x.Template}, "aliases": []string{x.Template}, "tags": x.Tags,
	})
}

func (a *API) start(w http.ResponseWriter, r *http.Request) error {
	var s Spec
	if err := decode(w, r, &s); err != nil {
		return err
	}
	if err := a.b.Start(r.Context(), template(r), param(r, "buildID"), s); err != nil {
		return err
	}
	w.WriteHeader(http.StatusAccepted)
	return nil
}

func (a *API) cancel(w http.ResponseWriter, r *http.Request) error {
	if err := a.b.Cancel(r.Context(), template(r), param(r, "buildID")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *API) status(w http.ResponseWriter, r *http.Request) error {
	offset, n := 0, logPage
	for field, p := range map[string]*int{"logsOffset": &offset, "limit": &n} {
		if v := r.URL.Query().Get(field); v != "" {
			i, err := strconv.Atoi(v)
			if err != nil || i < 0 {
				return control.Invalid(field, "must be a number from 0; got %.40q", v)
			}
			*p = i
		}
	}
	x, entries, err := a.b.Status(r.Context(), template(r), param(r, "buildID"), offset, min(n, logPage))
	if err != nil {
		return err
	}
	out := map[string]any{"templateID": x.Template, "buildID": x.ID, "status": x.Status, "logs": []string{}, "logEntries": entries}
	if x.Status == Failed {
		reason := map[string]any{"message": x.Reason, "logEntries": []Entry{}}
		if x.Step != "" {
			reason["step"] = x.Step
		}
		out["reason"] = reason
	}
	return reply(w, http.StatusOK, out)
}

// link tells whether the files are here, and where to upload them. The link is
// on the address by which the caller reached us.
func (a *API) link(w http.ResponseWriter, r *http.Request) error {
	name, hash := template(r), param(r, "hash")
	if _, err := a.b.files.path(name, hash); err != nil {
		return err
	}
	if builds, err := a.b.opt.Store.ListBuilds(r.Context(), name); err != nil {
		return err
	} else if len(builds) == 0 {
		return &control.Error{Code: control.CodeNotFound, Message: fmt.Sprintf("there is no template %.80q", name)}
	}
	until := a.b.opt.Now().Add(uploadFor).Unix()
	scheme := "http"
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
		scheme = "https"
	}
	// A prefix that was stripped is still in the request line.
	path, _, _ := strings.Cut(r.RequestURI, "?")
	q := url.Values{"until": {strconv.FormatInt(until, 10)}, "signature": {a.b.files.sign(name, hash, until)}}
	return reply(w, http.StatusCreated, map[string]any{
		"present": a.b.files.has(name, hash), "url": scheme + "://" + r.Host + path + "?" + q.Encode(),
	})
}

func (a *API) upload(w http.ResponseWriter, r *http.Request) error {
	name, hash, q := template(r), param(r, "hash"), r.URL.Query()
	if !a.b.files.allowed(name, hash, q.Get("until"), q.Get("signature")) {
		return &control.Error{Code: control.CodeUnauthorized, Message: "the upload link is not valid, or not any more; ask for a new one"}
	}
	if err := a.b.files.put(name, hash, r.Body); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

func (a *API) alias(w http.ResponseWriter, r *http.Request) error {
	name, tag := SplitName(param(r, "alias"))
	if _, err := a.b.opt.Store.ResolveTemplate(r.Context(), name, tag); errors.Is(err, control.ErrNotFound) {
		// A name whose default tag was never given exists by its other tags.
		tags, err := a.b.opt.Store.ListTags(r.Context(), name)
		if err != nil {
			return err
		}
		if len(tags) == 0 || tag != DefaultTag {
			if control.ValidateName("alias", name) != nil || tag != DefaultTag {
				return &control.Error{Code: control.CodeNotFound, Message: "there is no template of this name"}
			}
			if _, err := a.b.opt.Sandboxes.GetSnapshot(r.Context(), name); err != nil {
				return err
			}
		}
	} else if err != nil {
		return err
	}
	return reply(w, http.StatusOK, map[string]any{"templateID": name, "public": false})
}

func (a *API) putTags(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		Target string   `json:"target"`
		Tags   []string `json:"tags"`
	}
	if err := decode(w, r, &in); err != nil {
		return err
	}
	if err := checkTags(in.Tags); err != nil {
		return err
	}
	if len(in.Tags) == 0 {
		return control.Invalid("tags", "must name one at least")
	}
	name, tag := SplitName(in.Target)
	all, err := a.b.opt.Store.ListTags(r.Context(), name)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(t Tag) bool { return t.Tag == tag || t.BuildID == tag })
	if i < 0 {
		return &control.Error{Code: control.CodeNotFound, Message: fmt.Sprintf("target: there is no ready build %.120q", in.Target)}
	}
	if err := a.b.opt.Store.PutTags(r.Context(), name, all[i].BuildID, in.Tags, a.b.opt.Now()); err != nil {
		return err
	}
	a.b.prune(r.Context(), name)
	return reply(w, http.StatusCreated, map[string]any{"buildID": all[i].BuildID, "tags": in.Tags})
}

func (a *API) deleteTags(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}
	if err := decode(w, r, &in); err != nil {
		return err
	}
	name, _ := SplitName(in.Name)
	all, err := a.b.opt.Store.ListTags(r.Context(), name)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return &control.Error{Code: control.CodeNotFound, Message: fmt.Sprintf("name: there is no template %.80q", name)}
	}
	if err := a.b.opt.Store.DeleteTags(r.Context(), name, in.Tags); err != nil {
		return err
	}
	a.b.prune(r.Context(), name)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *API) tags(w http.ResponseWriter, r *http.Request) error {
	name := template(r)
	all, err := a.b.opt.Store.ListTags(r.Context(), name)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return &control.Error{Code: control.CodeNotFound, Message: fmt.Sprintf("there is no template %.80q", name)}
	}
	out := []map[string]any{}
	for _, t := range all {
		out = append(out, map[string]any{"tag": t.Tag, "buildID": t.BuildID, "createdAt": t.CreatedAt})
	}
	return reply(w, http.StatusOK, out)
}

// remove deletes a template, or a snapshot, which to the SDKs is one too.
func (a *API) remove(w http.ResponseWriter, r *http.Request) error {
	name, tag := SplitName(param(r, "templateID"))
	err := a.b.Delete(r.Context(), name)
	if control.CodeOf(err) == control.CodeNotFound && err != nil {
		if control.ValidateName("", name) != nil || tag != DefaultTag && tag != "latest" {
			return err
		}
		err = a.b.opt.Sandboxes.DeleteSnapshot(r.Context(), name)
	}
	if err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
