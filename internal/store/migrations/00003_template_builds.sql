-- Builds of templates and the tags that point at them. Tags and logs are JSON.

-- +goose Up
CREATE TABLE template_builds (
    id         TEXT PRIMARY KEY,
    template   TEXT NOT NULL,
    status     TEXT NOT NULL,
    reason     TEXT NOT NULL,
    step       TEXT NOT NULL,
    tags       TEXT NOT NULL,
    snapshot   TEXT NOT NULL,
    vcpus      BIGINT NOT NULL,
    memory_mb  BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    ended_at   BIGINT NOT NULL,
    log        TEXT NOT NULL
);
CREATE INDEX template_builds_template ON template_builds (template);
-- One build of a template at a time.
CREATE UNIQUE INDEX template_builds_one ON template_builds (template) WHERE status = 'building';

CREATE TABLE template_tags (
    template   TEXT NOT NULL,
    tag        TEXT NOT NULL,
    build_id   TEXT NOT NULL REFERENCES template_builds (id) ON DELETE CASCADE,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (template, tag)
);

-- +goose Down
DROP TABLE template_tags;
DROP TABLE template_builds;
