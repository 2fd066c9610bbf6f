package httpapi_test

import (
	"context"
	"database/sql"
	"errors"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
	"git.omukk.dev/wrenn/sandbox/internal/httpapi"
	"git.omukk.dev/wrenn/sandbox/internal/store"
)

// TestReadyNamesWhatIsWrong has one cause after the other.
func TestReadyNamesWhatIsWrong(t *testing.T) {
	t.Parallel()
	full := control.Check{Name: "disk", Do: func(context.Context) error {
		return &control.Error{Code: control.CodeHostUnavailable, Message: "3 MiB are free", Err: errors.New("for the log")}
	}}
	broken := control.Check{Name: "pager", Do: func(context.Context) error { return errors.New("secret detail") }}
	for _, c := range []struct {
		name  string
		cause func(*testing.T, *server)
		extra []control.Check
		// live is the status of /healthz.
		live  int
		check string
		says  string
	}{
		{name: "nothing", live: 200},
		{name: "the host agent", cause: func(_ *testing.T, s *server) { s.host.SetDown(true) }, live: 503, check: "host", says: "host agent"},
		{name: "the database", cause: func(_ *testing.T, s *server) { s.store.Close() }, live: 503, check: "database", says: "does not answer"},
		{name: "a database that is held by another", cause: holdDatabase, live: 200, check: "database", says: "cannot be written"},
		{name: "the start", cause: notStarted, live: 200, check: "start", says: "starting"},
		{name: "the disk", extra: []control.Check{full}, live: 200, check: "disk", says: "3 MiB are free"},
		{name: "an internal error", extra: []control.Check{broken}, live: 200, check: "pager", says: "the server's log"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := setup(t)
			if c.cause != nil {
				c.cause(t, s)
			}
			s.Server = httptest.NewServer(httpapi.New(httpapi.Options{Service: s.svc, Logger: s.log, Checks: c.extra}))
			t.Cleanup(s.Server.Close)
			s.want(t, "GET", "/healthz", nil, c.live)
			status := 503
			if c.check == "" {
				status = 200
			}
			a := s.want(t, "GET", "/readyz", nil, status)
			var body struct {
				Status string
				Checks []struct{ Name, Status, Message string }
				Error  struct{ Code, Message string }
			}
			a.decode(t, &body)
			if (body.Status == "ok") != (status == 200) || len(body.Checks) != 3+len(c.extra) {
				t.Errorf("it says %s", a.body)
			}
			for _, r := range body.Checks {
				if failed := r.Status == "failed"; failed != (r.Name == c.check) || failed && !strings.Contains(r.Message, c.says) {
					t.Errorf("check %+v; want %s to say %q", r, c.check, c.says)
				}
			}
			if c.check != "" && (body.Error.Code != "host_unavailable" || !strings.HasPrefix(body.Error.Message, c.check+": ") || a.header.Get("Retry-After") == "") {
				t.Errorf("the error is %+v", body.Error)
			}
			if strings.Contains(string(a.body), "secret") || strings.Contains(string(a.body), "for the log") {
				t.Errorf("it tells what only the log may have: %s", a.body)
			}
		})
	}
}

// holdDatabase keeps the right to write from everybody else.
func holdDatabase(t *testing.T, s *server) {
	db, err := sql.Open("sqlite", "file:"+s.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	conn, err := db.Conn(t.Context())
	if err == nil {
		_, err = conn.ExecContext(t.Context(), "BEGIN IMMEDIATE")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// notStarted replaces the service by one that has not looked at its host.
func notStarted(t *testing.T, s *server) {
	db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "wrenn.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	s.svc = control.New(control.Options{Store: db, Host: controltest.NewHost(), Logger: s.log})
}

// TestReadyAnswersStand: many who ask at once cost one look.
func TestReadyAnswersStand(t *testing.T) {
	t.Parallel()
	s := setup(t)
	looks := 0 // one look at a time, and no other reader
	s.Server = httptest.NewServer(httpapi.New(httpapi.Options{Service: s.svc, Logger: s.log, Checks: []control.Check{{
		Name: "counted", Do: func(context.Context) error { looks++; return nil },
	}}}))
	t.Cleanup(s.Server.Close)
	for range 20 {
		s.want(t, "GET", "/readyz", nil, 200)
	}
	if looks > 10 {
		t.Errorf("20 requests led to %d looks", looks)
	}
}
