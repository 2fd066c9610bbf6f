-- What other surfaces than our own ask for a sandbox: JSON of SandboxOptions.

-- +goose Up
ALTER TABLE sandboxes ADD COLUMN options TEXT NOT NULL DEFAULT '{}';
