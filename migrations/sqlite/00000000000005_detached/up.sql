-- How long an instance answers after it has lost the database, in milliseconds; nothing of a
-- version that does not tell. Where it is told, 'seen_at' is by the database's clock, which on
-- SQLite is the machine's. An older version neither reads nor writes it.
ALTER TABLE instances ADD COLUMN max_detached INTEGER;
