-- The same tables as migrations/postgres. Times are milliseconds since 1970 (UTC),
-- ids are UUIDs as text. Checks say OR: for IN with more than two, SQLite would fill a table of
-- its own with each row that is inserted.

CREATE TABLE settings (
    name  TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
) STRICT;

CREATE TABLE counters (
    name  TEXT PRIMARY KEY NOT NULL,
    value INTEGER NOT NULL CHECK (value >= 0)
) STRICT;

-- The number of the last row of 'changes'. Whoever changes something holds it from the raise
-- to the commit, so that numbers are given in the order of the commits, without gaps.
INSERT INTO counters (name, value) VALUES ('changes', 0);
-- Locked by who makes a data key, raised by who rotates the master key: a data key that is
-- being made with the old master key is waited for.
INSERT INTO counters (name, value) VALUES ('rotations', 0);

-- What has changed, for running instances to follow: the last ten thousand changes.
CREATE TABLE changes (
    number     INTEGER PRIMARY KEY NOT NULL,
    what       TEXT NOT NULL
               CHECK (what = 'tokens' OR what = 'tenants' OR what = 'migration' OR what = 'master_keys'
                      OR what = 'secret' OR what = 'folder' OR what = 'denial' OR what = 'notice'),
    -- Of which tenant, and of which of its secrets.
    subdomain  TEXT,
    secret_key TEXT,
    -- The process that made it, which knows already.
    made_by    TEXT NOT NULL
) STRICT;

-- Before the first change, for who follows from there.
INSERT INTO changes (number, what, made_by) VALUES (0, 'tokens', '');

CREATE TABLE companies (
    id            TEXT PRIMARY KEY NOT NULL,
    subdomain     TEXT NOT NULL UNIQUE
                  CHECK (length(subdomain) BETWEEN 1 AND 63
                         AND subdomain GLOB '[a-z0-9]*'
                         AND subdomain NOT GLOB '*[^a-z0-9_-]*'),
    -- The tenant's own phase; without one, the configuration decides.
    phase         TEXT CHECK (phase = 'infisical' OR phase = 'hybrid' OR phase = 'database'),
    snapshot_at   INTEGER,
    snapshot_etag TEXT,
    -- Whether every key of the snapshot was copied, rather than some left to others.
    snapshot_whole INTEGER NOT NULL DEFAULT 0 CHECK (snapshot_whole IN (0, 1)),
    denied_at     INTEGER,
    -- When its data keys and secrets were last destroyed.
    shredded_at   INTEGER,
    -- The change by which it last got or lost a phase of its own.
    phase_change  INTEGER,
    -- Raised by every write and invalidation: a fill that began before one is refused.
    generation    INTEGER NOT NULL DEFAULT 0 CHECK (generation >= 0),
    created_at    INTEGER NOT NULL,
    updated_at    INTEGER NOT NULL
) STRICT;

CREATE INDEX companies_by_shredded_at ON companies (shredded_at) WHERE shredded_at IS NOT NULL;

-- Who has a phase of its own, all of which an instance reads when it starts, without the rows.
CREATE INDEX companies_with_phase ON companies (subdomain, phase) WHERE phase IS NOT NULL;

CREATE INDEX companies_by_phase_change ON companies (phase_change) WHERE phase_change IS NOT NULL;

CREATE TABLE company_data_keys (
    id            TEXT PRIMARY KEY NOT NULL,
    company_id    TEXT NOT NULL REFERENCES companies (id) ON DELETE CASCADE,
    version       INTEGER NOT NULL CHECK (version >= 1),
    wrapped_key   TEXT NOT NULL,
    master_key_id TEXT NOT NULL,
    -- Values sealed with it so far.
    sealings      INTEGER NOT NULL DEFAULT 0 CHECK (sealings >= 0),
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
    source                 TEXT NOT NULL CHECK (source = 'infisical' OR source = 'database' OR source = 'forgotten'),
    -- The token that wrote it; NULL where upstream's folder was read.
    written_by             TEXT,
    created_at             INTEGER NOT NULL,
    updated_at             INTEGER NOT NULL,
    -- Since when there is a newer version; NULL is the newest.
    superseded_at          INTEGER,
    UNIQUE (company_id, secret_key, version),
    CHECK (source <> 'forgotten' OR secret_value_encrypted IS NULL)
) STRICT;

-- Of each secret one version is the newest.
CREATE UNIQUE INDEX company_secrets_newest ON company_secrets (company_id, secret_key) WHERE superseded_at IS NULL;

CREATE INDEX company_secrets_by_superseded_at ON company_secrets (superseded_at) WHERE superseded_at IS NOT NULL;

-- Deleting a row looks for those that name it as their previous version.
CREATE INDEX company_secrets_by_previous_version ON company_secrets (previous_version_id)
    WHERE previous_version_id IS NOT NULL;

CREATE TABLE access_tokens (
    id           TEXT PRIMARY KEY NOT NULL,
    -- Used once, but for the tokens that one takes over from by rotation.
    name         TEXT NOT NULL,
    hash         BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
    -- JSON arrays of globs and words.
    tenants      TEXT NOT NULL,
    keys         TEXT NOT NULL,
    actions      TEXT NOT NULL,
    expires_at   INTEGER,
    created_at   INTEGER NOT NULL,
    revoked_at   INTEGER,
    -- Told every minute or so, not at every use.
    last_used_at INTEGER,
    -- The token that has taken over from this one; until it expires, both are valid.
    replaced_by  TEXT
) STRICT;

CREATE UNIQUE INDEX access_tokens_by_name ON access_tokens (name) WHERE replaced_by IS NULL;

-- Master keys that some instance has held: their ids, never the keys.
CREATE TABLE master_keys (
    id            TEXT PRIMARY KEY NOT NULL,
    -- Where it was last seen, as the configuration writes it.
    source        TEXT NOT NULL,
    first_seen_at INTEGER NOT NULL,
    last_seen_at  INTEGER NOT NULL
) STRICT;

-- Running instances: what each holds and how far it has followed the changes.
CREATE TABLE instances (
    id          TEXT PRIMARY KEY NOT NULL,
    -- Host and process, for people.
    name        TEXT NOT NULL,
    -- Ids of the master keys it holds, separated by spaces; the first wraps.
    master_keys TEXT NOT NULL,
    -- The counter 'changes' that it has brought into force.
    changes     INTEGER NOT NULL,
    seen_at     INTEGER NOT NULL
) STRICT;

-- When some secret of a tenant was last asked for, to the minute or so: what a new instance
-- has to know first.
CREATE TABLE tenant_uses (
    subdomain TEXT PRIMARY KEY NOT NULL,
    used_at   INTEGER NOT NULL
) STRICT;

CREATE INDEX tenant_uses_by_used_at ON tenant_uses (used_at);

-- Work that one process does at a time, for all.
CREATE TABLE leases (
    name   TEXT PRIMARY KEY NOT NULL,
    -- The process, and its name for people.
    holder TEXT NOT NULL,
    shown  TEXT NOT NULL,
    -- Raised whenever it changes hands: what was begun under an older one is refused.
    token  INTEGER NOT NULL CHECK (token >= 1),
    -- When it ends, unless it is renewed.
    until  INTEGER NOT NULL,
    -- Whether the holder had the lock of that name too, which is taken back from one that dies.
    locked INTEGER NOT NULL DEFAULT 0 CHECK (locked IN (0, 1))
) STRICT;

-- Notices of upstream that were taken, by the hash of their signatures: none is taken twice.
CREATE TABLE notices (
    digest      BLOB PRIMARY KEY NOT NULL CHECK (length(digest) = 32),
    received_at INTEGER NOT NULL
) STRICT;

CREATE INDEX notices_by_received_at ON notices (received_at);

-- Writes that upstream is being told of: while there is one, its tenant does not change hands.
CREATE TABLE upstream_writes (
    id        TEXT PRIMARY KEY NOT NULL,
    subdomain TEXT NOT NULL,
    -- When it has ended at the latest, whatever became of who told it.
    until     INTEGER NOT NULL
) STRICT;

CREATE INDEX upstream_writes_by_subdomain ON upstream_writes (subdomain);

-- Runs of `migrate run` and `migrate import`, the one that goes on and those before.
CREATE TABLE migration_runs (
    id         TEXT PRIMARY KEY NOT NULL,
    kind       TEXT NOT NULL CHECK (kind IN ('run', 'import')),
    -- JSON: what makes a command the same command, which goes on with the run.
    options    TEXT NOT NULL,
    -- Host and process, for people.
    started_by TEXT NOT NULL,
    -- Tenants that it takes on.
    total      INTEGER NOT NULL CHECK (total >= 0),
    started_at INTEGER NOT NULL,
    seen_at    INTEGER NOT NULL,
    ended_at   INTEGER
) STRICT;

-- How far each tenant has come, in the run that took it on last.
CREATE TABLE migration_tenants (
    subdomain           TEXT PRIMARY KEY NOT NULL,
    run_id              TEXT NOT NULL,
    step                TEXT NOT NULL
                        CHECK (step = 'stored' OR step = 'verified' OR step = 'switched'
                               OR step = 'failed' OR step = 'rolled_back' OR step = 'archived'),
    secrets             INTEGER NOT NULL DEFAULT 0 CHECK (secrets >= 0),
    -- Keyed, of all names and values.
    digest              TEXT,
    -- Why it failed: a word, and a sentence.
    reason              TEXT,
    error               TEXT,
    -- The phase of its own that it had before it was switched.
    phase_before        TEXT CHECK (phase_before = 'infisical' OR phase_before = 'hybrid' OR phase_before = 'database'),
    verified_at         INTEGER,
    switched_at         INTEGER,
    updated_at          INTEGER NOT NULL,
    -- Lookups that were compared with upstream since the switch, and those that differed.
    shadow_compared     INTEGER NOT NULL DEFAULT 0,
    shadow_different    INTEGER NOT NULL DEFAULT 0,
    shadow_different_at INTEGER
) STRICT;

CREATE INDEX migration_tenants_by_run ON migration_tenants (run_id, step);

-- Records of who asked for what. Each kind is a chain of its own: a record's hash covers the
-- hash before it, so that one kind can be kept for longer than another.
CREATE TABLE audit_records (
    chain       TEXT NOT NULL CHECK (chain = 'lookup' OR chain = 'write' OR chain = 'denial' OR chain = 'admin'),
    seq         INTEGER NOT NULL CHECK (seq >= 1),
    -- When it happened; of several alike, the first and the last time.
    first_at    INTEGER NOT NULL,
    at          INTEGER NOT NULL,
    count       INTEGER NOT NULL CHECK (count >= 1),
    -- A token's id and name; uid:N for who came by the Unix socket or ran a command.
    actor_id    TEXT,
    actor_name  TEXT,
    action      TEXT NOT NULL,
    tenant      TEXT,
    secret_key  TEXT,
    outcome     TEXT NOT NULL,
    tier        TEXT,
    -- JSON, as it was hashed: error code, peer, agent, request id, X-Audit-* fields, and which
    -- instance or command recorded it.
    detail      TEXT NOT NULL,
    hash        BLOB NOT NULL,
    -- At checkpoints: the master key whose derived key signs, and the signature.
    signed_with TEXT,
    signature   BLOB,
    PRIMARY KEY (chain, seq)
) STRICT;

CREATE INDEX audit_records_by_at ON audit_records (at);
CREATE INDEX audit_records_by_tenant ON audit_records (tenant, at);

-- Where each chain begins and ends. What is too old is removed from the beginning.
CREATE TABLE audit_chains (
    chain             TEXT PRIMARY KEY NOT NULL,
    -- The last record that was removed, or 0, and its hash.
    start_seq         INTEGER NOT NULL,
    start_hash        BLOB NOT NULL,
    start_signed_with TEXT,
    start_signature   BLOB,
    -- The last record.
    seq               INTEGER NOT NULL,
    hash              BLOB NOT NULL,
    -- The last record that someone with a master key vouches for, and the signature. What
    -- comes behind it was written by a command without one.
    vouched_seq       INTEGER,
    vouched_hash      BLOB,
    signed_with       TEXT,
    signature         BLOB
) STRICT;

INSERT INTO audit_chains (chain, start_seq, start_hash, seq, hash) VALUES
    ('lookup', 0, zeroblob(32), 0, zeroblob(32)),
    ('write', 0, zeroblob(32), 0, zeroblob(32)),
    ('denial', 0, zeroblob(32), 0, zeroblob(32)),
    ('admin', 0, zeroblob(32), 0, zeroblob(32));
