-- Drawn at random for each change: by it an instance notices that the database was set back to
-- an older state, and that the same numbers were given anew. Nothing where an older version made
-- the change; one may run beside this one.
ALTER TABLE changes ADD COLUMN mark INTEGER;
