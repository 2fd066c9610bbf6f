package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/templatebuild"
)

var _ templatebuild.Store = (*DB)(nil)

const buildColumns = `id, template, status, reason, step, tags, snapshot, vcpus, memory_mb, created_at, ended_at`

func scanBuild(row scanner) (templatebuild.Build, error) { return scanBuildWith(row) }

func scanBuildWith(row scanner, more ...any) (templatebuild.Build, error) {
	var b templatebuild.Build
	var tags string
	var created, ended int64
	err := row.Scan(append([]any{&b.ID, &b.Template, &b.Status, &b.Reason, &b.Step, &tags, &b.Snapshot, &b.VCPUs, &b.MemoryMB, &created, &ended}, more...)...)
	if err != nil {
		return b, err
	}
	b.CreatedAt, b.EndedAt = fromMicros(created), fromMicros(ended)
	if err := json.Unmarshal([]byte(tags), &b.Tags); err != nil {
		return b, fmt.Errorf("tags of build %s: %w", b.ID, err)
	}
	return b, nil
}

// CreateBuild implements templatebuild.Store.
func (d *DB) CreateBuild(ctx context.Context, b templatebuild.Build) error {
	tags, err := json.Marshal(b.Tags)
	if err != nil {
		return err
	}
	_, err = d.db.ExecContext(ctx, `INSERT INTO template_builds (`+buildColumns+`, log) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, '[]')`,
		b.ID, b.Template, b.Status, b.Reason, b.Step, string(tags), b.Snapshot, b.VCPUs, b.MemoryMB, micros(b.CreatedAt), micros(b.EndedAt))
	return inserted(err)
}

// GetBuild implements templatebuild.Store.
func (d *DB) GetBuild(ctx context.Context, template, id string) (templatebuild.Build, error) {
	var log string
	b, err := scanBuildWith(d.db.QueryRowContext(ctx, `SELECT `+buildColumns+`, log FROM template_builds WHERE template = $1 AND id = $2`, template, id), &log)
	if err != nil {
		return b, found(err)
	}
	if err := json.Unmarshal([]byte(log), &b.Log); err != nil {
		return b, fmt.Errorf("log of build %s: %w", id, err)
	}
	return b, nil
}

// ListBuilds implements templatebuild.Store.
func (d *DB) ListBuilds(ctx context.Context, template string) ([]templatebuild.Build, error) {
	return list(ctx, d, `SELECT `+buildColumns+` FROM template_builds WHERE template = $1 OR $1 = '' ORDER BY created_at DESC, id`, args{template}, scanBuild)
}

// StartBuild implements templatebuild.Store.
func (d *DB) StartBuild(ctx context.Context, template, id string) error {
	r, err := d.db.ExecContext(ctx, `UPDATE template_builds SET status = $1 WHERE template = $2 AND id = $3 AND status = $4`,
		templatebuild.Building, template, id, templatebuild.Waiting)
	return affected(r, inserted(err), control.ErrStale)
}

// FinishBuild implements templatebuild.Store.
func (d *DB) FinishBuild(ctx context.Context, b templatebuild.Build) error {
	log, err := json.Marshal(b.Log)
	if err != nil {
		return err
	}
	if b.Log == nil {
		log = []byte("[]")
	}
	return d.inTx(ctx, func(tx *sql.Tx) error {
		r, err := tx.ExecContext(ctx, `UPDATE template_builds SET status = $1, reason = $2, step = $3, ended_at = $4, log = $5 WHERE id = $6 AND status = $7`,
			b.Status, b.Reason, b.Step, micros(b.EndedAt), string(log), b.ID, templatebuild.Building)
		if err := affected(r, err, control.ErrStale); err != nil {
			return err
		}
		if b.Status != templatebuild.Ready {
			return nil
		}
		return putTags(ctx, tx, b.Template, b.ID, b.Tags, b.EndedAt)
	})
}

// inTx does f in a transaction.
func (d *DB) inTx(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if err := f(tx); err != nil {
		return err
	}
	return written(tx.Commit())
}

func putTags(ctx context.Context, tx *sql.Tx, template, id string, tags []string, at time.Time) error {
	for _, t := range tags {
		if _, err := tx.ExecContext(ctx, `INSERT INTO template_tags (template, tag, build_id, created_at) VALUES ($1, $2, $3, $4)
			ON CONFLICT (template, tag) DO UPDATE SET build_id = excluded.build_id, created_at = excluded.created_at`,
			template, t, id, micros(at)); err != nil {
			return err
		}
	}
	return nil
}

// DeleteBuild implements templatebuild.Store.
func (d *DB) DeleteBuild(ctx context.Context, template, id string) error {
	r, err := d.db.ExecContext(ctx, `DELETE FROM template_builds WHERE template = $1 AND id = $2`, template, id)
	return affected(r, err, control.ErrNotFound)
}

// PutTags implements templatebuild.Store.
func (d *DB) PutTags(ctx context.Context, template, buildID string, tags []string, at time.Time) error {
	return d.inTx(ctx, func(tx *sql.Tx) error {
		var status string
		err := tx.QueryRowContext(ctx, `SELECT status FROM template_builds WHERE template = $1 AND id = $2`, template, buildID).Scan(&status)
		if err != nil {
			return found(err)
		}
		if status != string(templatebuild.Ready) {
			return control.ErrNotFound
		}
		return putTags(ctx, tx, template, buildID, tags, at)
	})
}

// DeleteTags implements templatebuild.Store.
func (d *DB) DeleteTags(ctx context.Context, template string, tags []string) error {
	return d.inTx(ctx, func(tx *sql.Tx) error {
		for _, t := range tags {
			if _, err := tx.ExecContext(ctx, `DELETE FROM template_tags WHERE template = $1 AND tag = $2`, template, t); err != nil {
				return err
			}
		}
		return nil
	})
}

// ListTags implements templatebuild.Store.
func (d *DB) ListTags(ctx context.Context, template string) ([]templatebuild.Tag, error) {
	return list(ctx, d, `SELECT tag, build_id, created_at FROM template_tags WHERE template = $1 ORDER BY tag`, args{template},
		func(row scanner) (templatebuild.Tag, error) {
			var t templatebuild.Tag
			var created int64
			err := row.Scan(&t.Tag, &t.BuildID, &created)
			t.CreatedAt = fromMicros(created)
			return t, err
		})
}

// ResolveTemplate implements templatebuild.Store. "latest" is the default tag
// where there is no tag of that name.
func (d *DB) ResolveTemplate(ctx context.Context, template, tag string) (string, error) {
	var snapshot string
	err := d.db.QueryRowContext(ctx, `SELECT b.snapshot FROM template_tags t JOIN template_builds b ON b.id = t.build_id WHERE t.template = $1 AND t.tag = $2`,
		template, tag).Scan(&snapshot)
	if errors.Is(err, sql.ErrNoRows) && tag == "latest" {
		return d.ResolveTemplate(ctx, template, templatebuild.DefaultTag)
	}
	return snapshot, found(err)
}
