ALTER TABLE instances DROP COLUMN max_detached;
