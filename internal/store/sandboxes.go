package store

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

const sandboxColumns = `id, template, status, vcpus, memory_mb, metadata, timeout_sec, auto_pause,
	created_at, started_at, last_active_at, expires_at, changed_at, error, version, options`

type scanner interface{ Scan(...any) error }

func scanSandbox(row scanner) (control.Sandbox, error) {
	var s control.Sandbox
	var metadata, options string
	var autoPause, created, started, active, expires, changed int64
	err := row.Scan(&s.ID, &s.Template, &s.Status, &s.VCPUs, &s.MemoryMB, &metadata, &s.TimeoutSec, &autoPause,
		&created, &started, &active, &expires, &changed, &s.Error, &s.Version, &options)
	if err != nil {
		return s, err
	}
	s.AutoPause = autoPause != 0
	s.CreatedAt, s.StartedAt = fromMicros(created), fromMicros(started)
	s.LastActiveAt, s.ExpiresAt = fromMicros(active), fromMicros(expires)
	s.ChangedAt = fromMicros(changed)
	if err := json.Unmarshal([]byte(metadata), &s.Metadata); err != nil {
		return s, fmt.Errorf("metadata of sandbox %s: %w", s.ID, err)
	}
	if err := json.Unmarshal([]byte(options), &s.Options); err != nil {
		return s, fmt.Errorf("options of sandbox %s: %w", s.ID, err)
	}
	return s, nil
}

// CreateSandbox implements control.Store.
func (d *DB) CreateSandbox(ctx context.Context, s control.Sandbox) error {
	return d.withRoom(ctx, func() error { return d.createSandbox(ctx, s) })
}

func (d *DB) createSandbox(ctx context.Context, s control.Sandbox) error {
	metadata, err := json.Marshal(s.Metadata)
	if err != nil {
		return fmt.Errorf("encode metadata: %w", err)
	}
	options, err := json.Marshal(s.Options)
	if err != nil {
		return fmt.Errorf("encode options: %w", err)
	}
	tx, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // does nothing after Commit
	_, err = tx.ExecContext(ctx, `INSERT INTO sandboxes (`+sandboxColumns+`)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)`,
		s.ID, s.Template, string(s.Status), s.VCPUs, s.MemoryMB, string(metadata), s.TimeoutSec, flag(s.AutoPause),
		micros(s.CreatedAt), micros(s.StartedAt), micros(s.LastActiveAt), micros(s.ExpiresAt),
		micros(s.ChangedAt), s.Error, 1, string(options))
	if err != nil {
		return inserted(err)
	}
	for k, v := range s.Metadata {
		_, err := tx.ExecContext(ctx, `INSERT INTO sandbox_metadata (sandbox_id, name, value) VALUES ($1, $2, $3)`, s.ID, k, v)
		if err != nil {
			return written(err)
		}
	}
	return written(tx.Commit())
}

// GetSandbox implements control.Store.
func (d *DB) GetSandbox(ctx context.Context, id string) (control.Sandbox, error) {
	s, err := scanSandbox(d.db.QueryRowContext(ctx, `SELECT `+sandboxColumns+` FROM sandboxes WHERE id = $1`, id))
	return s, found(err)
}

// ListSandboxes implements control.Store.
func (d *DB) ListSandboxes(ctx context.Context, f control.SandboxFilter) ([]control.Sandbox, error) {
	var a args
	where := []string{"1 = 1"}
	if len(f.Statuses) == 0 {
		where = append(where, "status <> "+a.add(string(control.StatusStopped)))
	} else {
		var in []string
		for _, st := range f.Statuses {
			in = append(in, a.add(string(st)))
		}
		where = append(where, "status IN ("+strings.Join(in, ", ")+")")
	}
	for k, v := range f.Metadata {
		where = append(where, `EXISTS (SELECT 1 FROM sandbox_metadata m WHERE m.sandbox_id = sandboxes.id
			AND m.name = `+a.add(k)+` AND m.value = `+a.add(v)+`)`)
	}
	if f.After.ID != "" {
		at := micros(f.After.CreatedAt)
		where = append(where, "(created_at < "+a.add(at)+" OR (created_at = "+a.add(at)+" AND id < "+a.add(f.After.ID)+"))")
	}
	q := `SELECT ` + sandboxColumns + ` FROM sandboxes WHERE ` + strings.Join(where, " AND ") + ` ORDER BY created_at DESC, id DESC`
	if f.Limit > 0 {
		q += " LIMIT " + a.add(f.Limit)
	}
	return list(ctx, d, q, a, scanSandbox)
}

func list[T any](ctx context.Context, d *DB, q string, a args, scan func(scanner) (T, error)) ([]T, error) {
	rows, err := d.db.QueryContext(ctx, q, a...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []T
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return slices.Clip(out), rows.Err()
}

// UpdateSandbox implements control.Store.
func (d *DB) UpdateSandbox(ctx context.Context, s control.Sandbox) error {
	options, err := json.Marshal(s.Options)
	if err != nil {
		return fmt.Errorf("encode options: %w", err)
	}
	r, err := d.exec(ctx, `UPDATE sandboxes SET status = $1, timeout_sec = $2, auto_pause = $3,
		started_at = $4, expires_at = $5, error = $6, changed_at = $7, version = version + 1,
		last_active_at = CASE WHEN last_active_at < $8 THEN $9 ELSE last_active_at END,
		options = $10 WHERE id = $11 AND version = $12`,
		string(s.Status), s.TimeoutSec, flag(s.AutoPause), micros(s.StartedAt), micros(s.ExpiresAt), s.Error,
		micros(s.ChangedAt), micros(s.LastActiveAt), micros(s.LastActiveAt), string(options), s.ID, s.Version)
	return affected(r, err, control.ErrStale)
}

// TouchSandbox implements control.Store.
func (d *DB) TouchSandbox(ctx context.Context, id string, at time.Time) error {
	_, err := d.exec(ctx, `UPDATE sandboxes SET last_active_at = $1 WHERE id = $2 AND last_active_at < $3`,
		micros(at), id, micros(at))
	return written(err)
}

// DeleteSandbox implements control.Store.
func (d *DB) DeleteSandbox(ctx context.Context, id string, version int64) error {
	r, err := d.exec(ctx, `DELETE FROM sandboxes WHERE id = $1 AND version = $2`, id, version)
	return affected(r, err, control.ErrStale)
}

// PruneStopped implements control.Store.
func (d *DB) PruneStopped(ctx context.Context, t time.Time) (int64, error) {
	r, err := d.exec(ctx, `DELETE FROM sandboxes WHERE status = $1 AND changed_at < $2`,
		string(control.StatusStopped), micros(t))
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}

// CountSandboxes implements control.Store.
func (d *DB) CountSandboxes(ctx context.Context) (map[control.Status]int, error) {
	rows, err := d.db.QueryContext(ctx, `SELECT status, COUNT(*) FROM sandboxes GROUP BY status`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out := map[control.Status]int{}
	for rows.Next() {
		var st control.Status
		var n int
		if err := rows.Scan(&st, &n); err != nil {
			return nil, err
		}
		out[st] = n
	}
	return out, rows.Err()
}
