-- Which sandboxes stand still is asked of all logs at once, at each start.

-- +goose Up
CREATE INDEX events_waits ON events (sandbox_id, seq) WHERE type IN ('wait', 'go_on');

-- +goose Down
DROP INDEX events_waits;
