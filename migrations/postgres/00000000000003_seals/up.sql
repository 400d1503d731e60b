-- The same columns as migrations/sqlite.

ALTER TABLE access_tokens ADD COLUMN seal TEXT;
ALTER TABLE companies ADD COLUMN head TEXT;
ALTER TABLE company_secrets ADD COLUMN counted BOOLEAN;
ALTER TABLE instances ADD COLUMN version TEXT;
