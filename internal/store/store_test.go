package store_test

import (
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"database/sql"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/store"
	"git.omukk.dev/wrenn/sandbox/internal/store/storetest"
)

func openAt(t *testing.T, dsn string) *store.DB {
	t.Helper()
	db, err := store.Open(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

func TestSQLite(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t *testing.T) control.Store {
		return openAt(t, filepath.Join(t.TempDir(), "w?r%n#.db"))
	})
}

func TestSQLiteIsPrivateAndReopens(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "wrenn.db")
	db, err := store.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.CreateTemplate(t.Context(), control.Template{Name: "base", Type: control.TemplateBase}); err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		fi, err := os.Stat(path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o; want 600", fi.Name(), fi.Mode().Perm())
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := openAt(t, "sqlite:"+path).GetTemplate(t.Context(), "base"); err != nil {
		t.Fatal(err)
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	notDB := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(notDB, []byte("this is no database, whatever its name says"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dsn := range []string{"", notDB, filepath.Join(t.TempDir(), "no", "such", "dir", "x.db")} {
		if db, err := store.Open(t.Context(), dsn); err == nil {
			t.Errorf("Open(%q) succeeded", dsn)
			_ = db.Close()
		}
	}
}

// TestPostgres runs on the server of WRENN_TEST_POSTGRES (a URL of a user who
// may create databases), or on one that it starts itself.
func TestPostgres(t *testing.T) {
	t.Parallel()
	dsn := os.Getenv("WRENN_TEST_POSTGRES")
	if dsn == "" {
		dsn = startPostgres(t)
	}
	admin, err := sql.Open("pgx", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = admin.Close() })
	var n atomic.Int64
	fresh := func(t *testing.T) *store.DB {
		name := fmt.Sprintf("wrenn_test_%d_%d", os.Getpid(), n.Add(1))
		if _, err := admin.Exec("CREATE DATABASE " + name); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if _, err := admin.Exec("DROP DATABASE " + name); err != nil {
				t.Error(err)
			}
		})
		u, err := url.Parse(dsn)
		if err != nil {
			t.Fatal(err)
		}
		u.Path = "/" + name
		return openAt(t, u.String())
	}
	storetest.Run(t, func(t *testing.T) control.Store { return fresh(t) })
	t.Run("Builds", func(t *testing.T) { checkBuilds(t, fresh(t)) })
}

// findPostgres looks where Debian puts the server.
func findPostgres(t *testing.T) (initdb, postgres string) {
	t.Helper()
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	for i := len(dirs) - 1; i >= 0; i-- {
		initdb, postgres = filepath.Join(dirs[i], "initdb"), filepath.Join(dirs[i], "postgres")
		if _, err := os.Stat(postgres); err == nil {
			return initdb, postgres
		}
	}
	initdb, err := exec.LookPath("initdb")
	if err == nil {
		postgres, err = exec.LookPath("postgres")
	}
	if err != nil {
		t.Skip("no PostgreSQL: WRENN_TEST_POSTGRES is not set and the package postgresql is not installed")
	}
	return initdb, postgres
}

// startPostgres runs a server on a unix socket for the length of the test.
func startPostgres(t *testing.T) string {
	initdb, postgres := findPostgres(t)
	// Not t.TempDir: the socket's path has to be short, and the server's user
	// has to get in.
	dir, err := os.MkdirTemp("", "wrennpg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Getuid() == 0 {
		// The server refuses to run as root.
		u, err := user.Lookup("postgres")
		if err != nil {
			if u, err = user.Lookup("nobody"); err != nil {
				t.Skip("no PostgreSQL: it does not run as root and there is neither a user postgres nor nobody")
			}
		}
		uid, _ := strconv.ParseUint(u.Uid, 10, 32)
		gid, _ := strconv.ParseUint(u.Gid, 10, 32)
		attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(dir, int(uid), int(gid)); err != nil {
			t.Fatal(err)
		}
	}
	data := filepath.Join(dir, "data")
	cmd := exec.Command(initdb, "-D", data, "-U", "wrenn", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
	cmd.SysProcAttr, cmd.Dir = attr, dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	srv := exec.Command(postgres, "-D", data, "-k", dir, "-h", "", "-F", "-c", "max_connections=100")
	srv.SysProcAttr = &syscall.SysProcAttr{Credential: attr.Credential}
	srv.Dir = dir
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	srv.Stdout, srv.Stderr = log, log
	if err := srv.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = srv.Process.Signal(syscall.SIGINT) // fast shutdown
		_ = srv.Wait()
	})
	dsn := "postgres://wrenn@/postgres?host=" + dir
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	// The server has no event for being ready but that it answers.
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range 2400 {
		if err = db.PingContext(t.Context()); err == nil {
			return dsn
		}
		<-tick.C
	}
	text, _ := os.ReadFile(log.Name())
	t.Fatalf("PostgreSQL did not start: %v\n%s", err, text)
	return ""
}
