package store

import (
	"context"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// AddEvent implements control.Store.
func (d *DB) AddEvent(ctx context.Context, e control.Event) error {
	return d.withRoom(ctx, func() error { return d.addEvent(ctx, e) })
}

func (d *DB) addEvent(ctx context.Context, e control.Event) error {
	tx, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // does nothing after Commit
	// The row is written first, so that two events of one sandbox wait for
	// each other in both databases and no number is given twice.
	r, err := tx.ExecContext(ctx, `UPDATE sandboxes SET version = version WHERE id = $1`, e.SandboxID)
	if err := affected(r, err, control.ErrNotFound); err != nil {
		return err
	}
	var seq int64
	if err := tx.QueryRowContext(ctx, `SELECT COALESCE(MAX(seq), 0) + 1 FROM events WHERE sandbox_id = $1`, e.SandboxID).Scan(&seq); err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `INSERT INTO events (sandbox_id, seq, at, type, status, duration_us, detail, error, request_id)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)`,
		e.SandboxID, seq, micros(e.At), string(e.Type), string(e.Status), e.Duration.Microseconds(), e.Detail, e.Error, e.RequestID)
	if err != nil {
		return written(err)
	}
	_, err = tx.ExecContext(ctx, `DELETE FROM events WHERE sandbox_id = $1 AND seq <= $2`, e.SandboxID, seq-control.MaxEvents)
	if err != nil {
		return written(err)
	}
	return written(tx.Commit())
}

// ListEvents implements control.Store.
func (d *DB) ListEvents(ctx context.Context, sandboxID string, after int64, limit int) ([]control.Event, error) {
	return list(ctx, d, `SELECT sandbox_id, seq, at, type, status, duration_us, detail, error, request_id
		FROM events WHERE sandbox_id = $1 AND seq > $2 ORDER BY seq LIMIT $3`, args{sandboxID, after, limit}, scanEvent)
}

// ListWaits implements control.Store. The types stand in it as they do in the
// index that it goes by.
func (d *DB) ListWaits(ctx context.Context) ([]control.Event, error) {
	return list(ctx, d, `SELECT sandbox_id, seq, at, type, status, duration_us, detail, error, request_id
		FROM events AS e WHERE type = 'wait' AND seq = (
			SELECT MAX(seq) FROM events WHERE sandbox_id = e.sandbox_id AND type IN ('wait', 'go_on'))
		ORDER BY sandbox_id`, nil, scanEvent)
}

func scanEvent(row scanner) (control.Event, error) {
	var e control.Event
	var at, took int64
	err := row.Scan(&e.SandboxID, &e.Seq, &at, &e.Type, &e.Status, &took, &e.Detail, &e.Error, &e.RequestID)
	e.At, e.Duration = fromMicros(at), time.Duration(took)*time.Microsecond
	return e, err
}
