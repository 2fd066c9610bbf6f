// Package store keeps the control plane's rows in SQLite (one machine) or
// PostgreSQL: one implementation of control.Store over database/sql, in SQL
// that both take, with embedded migrations.
//
// Imported by cmd; the conformance suite that both databases pass is storetest.
//
// Invariants:
//
//  1. A method that returns nil has its change on disk (SQLite: WAL with
//     synchronous=FULL).
//  2. A row of sandboxes changes only by a statement that compares its version.
//  3. Migrations are append-only and run before Open returns.
//  4. Beside an SQLite file room is kept for the writes of control.WithReserve.
package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	_ "github.com/jackc/pgx/v5/stdlib" // driver "pgx"
	"github.com/pressly/goose/v3"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

//go:embed migrations/*.sql
var migrations embed.FS

// DB is a control.Store.
type DB struct {
	db       *sql.DB
	postgres bool
	reserve  *reserve // of SQLite; nil: a PostgreSQL server sees to its own disk
}

var _ control.Store = (*DB)(nil)

// Open connects to the database of dsn, a postgres:// URL or the path of an
// SQLite file (made with mode 0600 if it is missing), and brings its tables up
// to date.
func Open(ctx context.Context, dsn string) (*DB, error) {
	d := &DB{postgres: strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://")}
	var err error
	if d.postgres {
		d.db, err = sql.Open("pgx", dsn)
	} else {
		err = d.openSQLite(strings.TrimPrefix(dsn, "sqlite:"))
	}
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	d.db.SetMaxOpenConns(8)
	d.db.SetMaxIdleConns(8)
	if err := d.migrate(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("migrate database: %w", err), d.Close())
	}
	return d, nil
}

func (d *DB) openSQLite(path string) error {
	if path == "" {
		return errors.New("the path of the SQLite file is empty")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	// SQLite would make it with the umask's mode; its side files take this one's.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if d.reserve, err = openReserve(path + "-reserve"); err != nil {
		return err
	}
	q := url.Values{"_pragma": {
		"busy_timeout(10000)", "journal_mode(WAL)", "foreign_keys(1)", "synchronous(FULL)",
	}}
	// A transaction takes the write lock at once: one that begins by reading
	// could not wait for it later.
	q.Set("_txlock", "immediate")
	u := url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}
	d.db, err = sql.Open("sqlite", u.String())
	return err
}

func (d *DB) migrate(ctx context.Context) error {
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	dialect := goose.DialectSQLite3
	if d.postgres {
		dialect = goose.DialectPostgres
	}
	p, err := goose.NewProvider(dialect, d.db, dir)
	if err != nil {
		return err
	}
	_, err = p.Up(ctx)
	return err
}

// Close closes the connections.
func (d *DB) Close() error {
	if d.reserve != nil {
		d.reserve.close()
	}
	return d.db.Close()
}

// withRoom does a write. One that must not fail for want of room gets some of the
// reserve and is done again; nothing of the first attempt is there.
func (d *DB) withRoom(ctx context.Context, write func() error) error {
	for {
		err := write()
		if !isFull(err) || !control.MayUseReserve(ctx) || d.reserve == nil || !d.reserve.spend() {
			return err
		}
	}
}

// exec is withRoom for one statement.
func (d *DB) exec(ctx context.Context, q string, a ...any) (r sql.Result, err error) {
	err = d.withRoom(ctx, func() error {
		r, err = d.db.ExecContext(ctx, q, a...)
		return err
	})
	return r, err
}

// Ping tells whether the database answers.
func (d *DB) Ping(ctx context.Context) error {
	var one int
	return d.db.QueryRowContext(ctx, "SELECT 1").Scan(&one)
}

// CheckWritable takes the right to write and gives it back: a database that is
// read-only, or held by another, refuses.
func (d *DB) CheckWritable(ctx context.Context) error {
	tx, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin to write: %w", err)
	}
	_, err = tx.ExecContext(ctx, "DELETE FROM sandboxes WHERE id = ''") // nothing has no ID
	if err != nil {
		err = fmt.Errorf("write: %w", err)
	}
	return errors.Join(err, tx.Rollback())
}

// duplicate reports a violated primary key or unique constraint.
func duplicate(err error) bool {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code == "23505"
	}
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY || e.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE
	}
	return false
}

func inserted(err error) error {
	if duplicate(err) {
		return control.ErrExists
	}
	return written(err)
}

// written tells the caller of a write what to do where the database has no room
// for it; nothing of the write is there then.
func written(err error) error {
	if !isFull(err) {
		return err
	}
	return &control.Error{Code: control.CodeHostUnavailable, Message: "the disk of the database is full; make room on it, then ask again", Err: err}
}

// isFull tells whether a write found no room.
func isFull(err error) bool {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code == "53100" // disk_full
	}
	e, ok := errors.AsType[*sqlite.Error](err)
	// The second is the index of the log that its connections share in memory.
	return ok && (e.Code()&0xff == sqlite3.SQLITE_FULL || e.Code() == sqlite3.SQLITE_IOERR_SHMSIZE)
}

// affected turns a statement that changed no row into none.
func affected(r sql.Result, err, none error) error {
	if err != nil {
		return written(err)
	}
	n, err := r.RowsAffected()
	if err != nil {
		return err
	}
	if n == 0 {
		return none
	}
	return nil
}

func found(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return control.ErrNotFound
	}
	return err
}

func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func fromMicros(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.UnixMicro(n).UTC()
}

func flag(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// args numbers the values of a statement that is put together in parts.
type args []any

func (a *args) add(v any) string {
	*a = append(*a, v)
	return fmt.Sprintf("$%d", len(*a))
}
