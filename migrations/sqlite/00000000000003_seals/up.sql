-- What proves that rows are as somebody with a master key left them. An older version neither
-- reads nor writes these columns, and may run beside this one.

-- A token's row: see tiers/database/seals.rs.
ALTER TABLE access_tokens ADD COLUMN seal TEXT;

-- A tenant's newest versions, all of them: see tiers/database/heads.rs.
ALTER TABLE companies ADD COLUMN head TEXT;

-- Whether the head of its tenant counts a version: nothing where an older program wrote it.
ALTER TABLE company_secrets ADD COLUMN counted INTEGER CHECK (counted IN (0, 1));

-- The program's version; nothing where that is one that seals nothing.
ALTER TABLE instances ADD COLUMN version TEXT;
