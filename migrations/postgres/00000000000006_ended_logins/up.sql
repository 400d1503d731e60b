-- Logins with a token's client credentials that were ended before their time, by their own ids, until they
-- would have ended by themselves. An older version neither reads nor writes them.
CREATE TABLE ended_logins (
    id TEXT PRIMARY KEY NOT NULL,
    token_id TEXT NOT NULL,
    until BIGINT NOT NULL
);

CREATE INDEX ended_logins_by_token ON ended_logins (token_id);
