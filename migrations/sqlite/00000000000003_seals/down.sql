ALTER TABLE instances DROP COLUMN version;
ALTER TABLE company_secrets DROP COLUMN counted;
ALTER TABLE companies DROP COLUMN head;
ALTER TABLE access_tokens DROP COLUMN seal;
