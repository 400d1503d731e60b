DELETE FROM companies WHERE subdomain LIKE '/%';

ALTER TABLE companies DROP CONSTRAINT companies_subdomain_check;
ALTER TABLE companies
    ADD CONSTRAINT companies_subdomain_check CHECK (subdomain ~ '^[a-z0-9][a-z0-9_-]{0,62}$');

DELETE FROM settings WHERE name = 'readable_from';
