package store

import (
	"context"
	"errors"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

const answerColumns = `scope, name, digest, status, location, body, created_at`

func scanAnswer(row scanner) (control.Answer, error) {
	var a control.Answer
	var created int64
	err := row.Scan(&a.Scope, &a.Name, &a.Digest, &a.Status, &a.Location, &a.Body, &created)
	a.CreatedAt = fromMicros(created)
	return a, err
}

// ClaimAnswer implements control.Store.
func (d *DB) ClaimAnswer(ctx context.Context, a control.Answer) (control.Answer, error) {
	for {
		_, err := d.exec(ctx, `INSERT INTO idempotency (`+answerColumns+`) VALUES ($1, $2, $3, $4, $5, $6, $7)`,
			a.Scope, a.Name, a.Digest, a.Status, a.Location, a.Body, micros(a.CreatedAt))
		if err := inserted(err); !errors.Is(err, control.ErrExists) {
			return a, err
		}
		old, err := scanAnswer(d.db.QueryRowContext(ctx, `SELECT `+answerColumns+` FROM idempotency WHERE scope = $1 AND name = $2`, a.Scope, a.Name))
		if err = found(err); errors.Is(err, control.ErrNotFound) {
			continue // dropped between the two statements
		}
		if err != nil {
			return old, err
		}
		return old, control.ErrExists
	}
}

// FinishAnswer implements control.Store.
func (d *DB) FinishAnswer(ctx context.Context, a control.Answer) error {
	r, err := d.exec(ctx, `UPDATE idempotency SET status = $1, location = $2, body = $3 WHERE scope = $4 AND name = $5`,
		a.Status, a.Location, a.Body, a.Scope, a.Name)
	return affected(r, err, control.ErrNotFound)
}

// DropAnswer implements control.Store.
func (d *DB) DropAnswer(ctx context.Context, scope, name string) error {
	_, err := d.exec(ctx, `DELETE FROM idempotency WHERE scope = $1 AND name = $2`, scope, name)
	return err
}

// PruneAnswers implements control.Store.
func (d *DB) PruneAnswers(ctx context.Context, t time.Time) (int64, error) {
	r, err := d.exec(ctx, `DELETE FROM idempotency WHERE created_at < $1`, micros(t))
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}
