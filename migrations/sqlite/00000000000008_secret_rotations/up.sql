-- Rotations of secrets, those that run and those that have ended. An older version neither reads nor writes
-- these tables; it follows the changes that a rotation makes, as it follows every change of a secret.
CREATE TABLE secret_rotations (
    id          TEXT PRIMARY KEY NOT NULL,
    company_id  TEXT NOT NULL REFERENCES companies (id) ON DELETE CASCADE,
    secret_key  TEXT NOT NULL CHECK (length(CAST(secret_key AS BLOB)) BETWEEN 1 AND 255),
    -- Who makes the new value valid, and the old one invalid.
    kind        TEXT NOT NULL,
    state       TEXT NOT NULL
                CHECK (state = 'running' OR state = 'completed' OR state = 'failed' OR state = 'aborted'
                       OR state = 'rolled_back'),
    -- The step that has begun: written before anything that it does to others.
    step        TEXT NOT NULL,
    -- Raised by every change of the row: of two processes that have read the same, one changes it.
    turn        INTEGER NOT NULL CHECK (turn >= 0),
    -- When it is to be worked on; NULL where a person must do something first, or where it has ended.
    next_try_at INTEGER,
    -- The version of the value that is replaced.
    old_version INTEGER,
    -- Both values, sealed; NULL once the rotation has ended.
    old_value   TEXT,
    new_value   TEXT,
    -- Until when the old value is valid; NULL before the new one is served.
    valid_until INTEGER,
    -- The last change that told of it: every instance must have followed it before the next step.
    told_by     INTEGER,
    created_at  INTEGER NOT NULL,
    ended_at    INTEGER,
    -- JSON: tries, grace, who began it and why, the last error, and what people are told.
    detail      TEXT NOT NULL,
    CHECK (ended_at IS NULL OR (old_value IS NULL AND new_value IS NULL AND next_try_at IS NULL))
) STRICT;

-- Of each secret one rotation runs at most.
CREATE UNIQUE INDEX secret_rotations_running ON secret_rotations (company_id, secret_key) WHERE ended_at IS NULL;

CREATE INDEX secret_rotations_by_secret ON secret_rotations (company_id, secret_key, created_at);

CREATE INDEX secret_rotations_to_do ON secret_rotations (next_try_at) WHERE next_try_at IS NOT NULL;

CREATE INDEX secret_rotations_by_ended_at ON secret_rotations (ended_at) WHERE ended_at IS NOT NULL;

-- When the secrets that a rule names are to be rotated next.
CREATE TABLE rotation_due (
    company_id TEXT NOT NULL REFERENCES companies (id) ON DELETE CASCADE,
    secret_key TEXT NOT NULL,
    due_at     INTEGER NOT NULL,
    PRIMARY KEY (company_id, secret_key)
) STRICT;

CREATE INDEX rotation_due_by_time ON rotation_due (due_at);

INSERT INTO settings (name, value) VALUES ('readable_from', '00000000000006')
    ON CONFLICT (name) DO UPDATE SET value = excluded.value;
