DELETE FROM companies WHERE subdomain GLOB '/*';

PRAGMA writable_schema = ON;

UPDATE sqlite_schema
   SET sql = replace(sql,
           'CHECK (length(ltrim(subdomain, ''/'')) BETWEEN 1 AND 63
                         AND (subdomain GLOB ''[a-z0-9]*'' OR subdomain GLOB ''/[a-z0-9]*'')
                         AND substr(subdomain, 2) NOT GLOB ''*[^a-z0-9_-]*'')',
           'CHECK (length(subdomain) BETWEEN 1 AND 63
                         AND subdomain GLOB ''[a-z0-9]*''
                         AND subdomain NOT GLOB ''*[^a-z0-9_-]*'')')
 WHERE type = 'table' AND name = 'companies';

PRAGMA writable_schema = OFF;

CREATE TABLE changed (unused INTEGER) STRICT;
DROP TABLE changed;

DELETE FROM settings WHERE name = 'readable_from';
