-- The same tables as migrations/postgres. Times are milliseconds since 1970 (UTC),
-- ids are UUIDs as text.

CREATE TABLE settings (
    name  TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
) STRICT;

CREATE TABLE counters (
    name  TEXT PRIMARY KEY NOT NULL,
    value INTEGER NOT NULL CHECK (value >= 0)
) STRICT;

-- Raised by every change of tokens and phases: one row to poll for all instances.
INSERT INTO counters (name, value) VALUES ('changes', 0);

CREATE TABLE companies (
    id            TEXT PRIMARY KEY NOT NULL,
    subdomain     TEXT NOT NULL UNIQUE
                  CHECK (length(subdomain) BETWEEN 1 AND 63
                         AND subdomain GLOB '[a-z0-9]*'
                         AND subdomain NOT GLOB '*[^a-z0-9_-]*'),
    -- The tenant's own phase; without one, the configuration decides.
    phase         TEXT CHECK (phase IN ('infisical', 'hybrid', 'database')),
    snapshot_at   INTEGER,
    snapshot_etag TEXT,
    -- Whether every key of the snapshot was copied, rather than some left to others.
    snapshot_whole INTEGER NOT NULL DEFAULT 0 CHECK (snapshot_whole IN (0, 1)),
    denied_at     INTEGER,
    -- Raised by every write and invalidation: a fill that began before one is refused.
    generation    INTEGER NOT NULL DEFAULT 0 CHECK (generation >= 0),
    created_at    INTEGER NOT NULL,
    updated_at    INTEGER NOT NULL
) STRICT;

CREATE TABLE company_data_keys (
    id            TEXT PRIMARY KEY NOT NULL,
    company_id    TEXT NOT NULL REFERENCES companies (id) ON DELETE CASCADE,
    version       INTEGER NOT NULL CHECK (version >= 1),
    wrapped_key   TEXT NOT NULL,
    master_key_id TEXT NOT NULL,
    created_at    INTEGER NOT NULL,
    UNIQUE (company_id, version)
) STRICT;

CREATE INDEX company_data_keys_by_master_key ON company_data_keys (master_key_id);

CREATE TABLE company_secrets (
    id                     TEXT PRIMARY KEY NOT NULL,
    company_id             TEXT NOT NULL REFERENCES companies (id) ON DELETE CASCADE,
    secret_key             TEXT NOT NULL CHECK (length(CAST(secret_key AS BLOB)) BETWEEN 1 AND 255),
    -- NULL is a tombstone: no value here, and the versions before are not used again.
    secret_value_encrypted TEXT,
    version                INTEGER NOT NULL CHECK (version >= 1),
    previous_version_id    TEXT REFERENCES company_secrets (id) ON DELETE SET NULL,
    -- Who gave the value, or deleted it. What was 'forgotten' is upstream's, which was
    -- told to change it: what it has now is not known here.
    source                 TEXT NOT NULL CHECK (source IN ('infisical', 'database', 'forgotten')),
    created_at             INTEGER NOT NULL,
    updated_at             INTEGER NOT NULL,
    UNIQUE (company_id, secret_key, version),
    CHECK (source <> 'forgotten' OR secret_value_encrypted IS NULL)
) STRICT;

-- Deleting a row looks for those that name it as their previous version.
CREATE INDEX company_secrets_by_previous_version ON company_secrets (previous_version_id);

CREATE TABLE access_tokens (
    id         TEXT PRIMARY KEY NOT NULL,
    name       TEXT NOT NULL UNIQUE,
    hash       BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
    -- JSON arrays.
    tenants    TEXT NOT NULL,
    actions    TEXT NOT NULL,
    expires_at INTEGER,
    created_at INTEGER NOT NULL,
    revoked_at INTEGER
) STRICT;
