-- The same column as migrations/sqlite.

ALTER TABLE changes ADD COLUMN mark BIGINT;
