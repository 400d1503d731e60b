-- The same as migrations/sqlite.

ALTER TABLE companies DROP CONSTRAINT companies_subdomain_check;
ALTER TABLE companies
    ADD CONSTRAINT companies_subdomain_check CHECK (subdomain ~ '^/?[a-z0-9][a-z0-9_-]{0,62}$');

INSERT INTO settings (name, value) VALUES ('readable_from', '00000000000001')
    ON CONFLICT (name) DO UPDATE SET value = excluded.value;
