package store

import (
	"context"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

const templateColumns = `name, type, vcpus, memory_mb, size_bytes, generation, parent, created_at`

func scanTemplate(row scanner) (control.Template, error) {
	var t control.Template
	var created int64
	err := row.Scan(&t.Name, &t.Type, &t.VCPUs, &t.MemoryMB, &t.SizeBytes, &t.Generation, &t.Parent, &created)
	t.CreatedAt = fromMicros(created)
	return t, err
}

// CreateTemplate implements control.Store.
func (d *DB) CreateTemplate(ctx context.Context, t control.Template) error {
	_, err := d.exec(ctx, `INSERT INTO templates (`+templateColumns+`) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)`,
		t.Name, t.Type, t.VCPUs, t.MemoryMB, t.SizeBytes, t.Generation, t.Parent, micros(t.CreatedAt))
	return inserted(err)
}

// PutTemplate implements control.Store.
func (d *DB) PutTemplate(ctx context.Context, t control.Template) error {
	_, err := d.exec(ctx, `INSERT INTO templates (`+templateColumns+`) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
		ON CONFLICT (name) DO UPDATE SET type = excluded.type, vcpus = excluded.vcpus, memory_mb = excluded.memory_mb,
		size_bytes = excluded.size_bytes, generation = excluded.generation, parent = excluded.parent, created_at = excluded.created_at`,
		t.Name, t.Type, t.VCPUs, t.MemoryMB, t.SizeBytes, t.Generation, t.Parent, micros(t.CreatedAt))
	return written(err)
}

// GetTemplate implements control.Store.
func (d *DB) GetTemplate(ctx context.Context, name string) (control.Template, error) {
	t, err := scanTemplate(d.db.QueryRowContext(ctx, `SELECT `+templateColumns+` FROM templates WHERE name = $1`, name))
	return t, found(err)
}

// ListTemplates implements control.Store. Names are compared by bytes in Go's
// sense in both databases, whatever PostgreSQL's locale is.
func (d *DB) ListTemplates(ctx context.Context, f control.TemplateFilter) ([]control.Template, error) {
	collate := ""
	if d.postgres {
		collate = ` COLLATE "C"`
	}
	var a args
	where := []string{"1 = 1"}
	if f.Type != "" {
		where = append(where, "type = "+a.add(f.Type))
	}
	if f.After != "" {
		where = append(where, "name"+collate+" > "+a.add(f.After))
	}
	q := `SELECT ` + templateColumns + ` FROM templates WHERE ` + strings.Join(where, " AND ") + ` ORDER BY name` + collate
	if f.Limit > 0 {
		q += " LIMIT " + a.add(f.Limit)
	}
	return list(ctx, d, q, a, scanTemplate)
}

// DeleteTemplate implements control.Store.
func (d *DB) DeleteTemplate(ctx context.Context, name string) error {
	r, err := d.exec(ctx, `DELETE FROM templates WHERE name = $1`, name)
	return affected(r, err, control.ErrNotFound)
}
