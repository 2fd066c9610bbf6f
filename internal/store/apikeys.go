package store

import (
	"context"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

const keyColumns = `id, name, prefix, hash, created_at`

func scanKey(row scanner) (control.APIKey, error) {
	var k control.APIKey
	var created int64
	err := row.Scan(&k.ID, &k.Name, &k.Prefix, &k.Hash, &created)
	k.CreatedAt = fromMicros(created)
	return k, err
}

// CreateAPIKey implements control.Store.
func (d *DB) CreateAPIKey(ctx context.Context, k control.APIKey) error {
	_, err := d.db.ExecContext(ctx, `INSERT INTO api_keys (`+keyColumns+`) VALUES ($1, $2, $3, $4, $5)`,
		k.ID, k.Name, k.Prefix, k.Hash, micros(k.CreatedAt))
	return inserted(err)
}

// GetAPIKeyByHash implements control.Store.
func (d *DB) GetAPIKeyByHash(ctx context.Context, hash string) (control.APIKey, error) {
	k, err := scanKey(d.db.QueryRowContext(ctx, `SELECT `+keyColumns+` FROM api_keys WHERE hash = $1`, hash))
	return k, found(err)
}

// ListAPIKeys implements control.Store.
func (d *DB) ListAPIKeys(ctx context.Context) ([]control.APIKey, error) {
	return list(ctx, d, `SELECT `+keyColumns+` FROM api_keys ORDER BY created_at, id`, nil, scanKey)
}

// DeleteAPIKey implements control.Store.
func (d *DB) DeleteAPIKey(ctx context.Context, id string) error {
	r, err := d.db.ExecContext(ctx, `DELETE FROM api_keys WHERE id = $1`, id)
	return affected(r, err, control.ErrNotFound)
}
