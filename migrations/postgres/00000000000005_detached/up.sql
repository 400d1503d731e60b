-- The same columns as migrations/sqlite.

ALTER TABLE instances ADD COLUMN max_detached BIGINT;
