-- What happened to each sandbox, and answers kept for requests that are sent
-- again. Both go with time; neither is needed to run anything.

-- +goose Up
CREATE TABLE events (
    sandbox_id  TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    seq         BIGINT NOT NULL,
    at          BIGINT NOT NULL,
    type        TEXT NOT NULL,
    status      TEXT NOT NULL,
    duration_us BIGINT NOT NULL,
    detail      TEXT NOT NULL,
    error       TEXT NOT NULL,
    request_id  TEXT NOT NULL,
    PRIMARY KEY (sandbox_id, seq)
);

CREATE TABLE idempotency (
    scope      TEXT NOT NULL,
    name       TEXT NOT NULL,
    digest     TEXT NOT NULL,
    status     BIGINT NOT NULL,
    location   TEXT NOT NULL,
    body       TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (scope, name)
);
CREATE INDEX idempotency_age ON idempotency (created_at);

-- +goose Down
DROP TABLE idempotency;
DROP TABLE events;
