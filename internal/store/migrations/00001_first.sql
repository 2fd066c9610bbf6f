-- Written in what SQLite and PostgreSQL both take. Times are microseconds since
-- 1970 UTC, 0 for not known; booleans are 0 and 1. Migrations are append-only.

-- +goose Up
CREATE TABLE sandboxes (
    id             TEXT PRIMARY KEY,
    template       TEXT NOT NULL,
    status         TEXT NOT NULL,
    vcpus          BIGINT NOT NULL,
    memory_mb      BIGINT NOT NULL,
    metadata       TEXT NOT NULL,
    timeout_sec    BIGINT NOT NULL,
    auto_pause     BIGINT NOT NULL,
    created_at     BIGINT NOT NULL,
    started_at     BIGINT NOT NULL,
    last_active_at BIGINT NOT NULL,
    expires_at     BIGINT NOT NULL,
    changed_at     BIGINT NOT NULL,
    error          TEXT NOT NULL,
    version        BIGINT NOT NULL
);
CREATE INDEX sandboxes_newest ON sandboxes (created_at, id);
CREATE INDEX sandboxes_status ON sandboxes (status);

-- The pairs of sandboxes.metadata, for look-up: neither JSON operators nor
-- their indexes are the same in both databases.
CREATE TABLE sandbox_metadata (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    name       TEXT NOT NULL,
    value      TEXT NOT NULL,
    PRIMARY KEY (sandbox_id, name)
);
CREATE INDEX sandbox_metadata_name ON sandbox_metadata (name);

CREATE TABLE templates (
    name       TEXT PRIMARY KEY,
    type       TEXT NOT NULL,
    vcpus      BIGINT NOT NULL,
    memory_mb  BIGINT NOT NULL,
    size_bytes BIGINT NOT NULL,
    generation BIGINT NOT NULL,
    parent     TEXT NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE api_keys (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL,
    prefix     TEXT NOT NULL,
    hash       TEXT NOT NULL UNIQUE,
    created_at BIGINT NOT NULL
);

-- +goose Down
DROP TABLE api_keys;
DROP TABLE templates;
DROP TABLE sandbox_metadata;
DROP TABLE sandboxes;
