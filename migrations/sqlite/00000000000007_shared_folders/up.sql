-- A shared folder is a row of 'companies' whose subdomain is its name behind a slash. SQLite changes a check in
-- no other way (https://sqlite.org/lang_altertable.html, section 7); every row that fitted fits on.
PRAGMA writable_schema = ON;

UPDATE sqlite_schema
   SET sql = replace(sql,
           'CHECK (length(subdomain) BETWEEN 1 AND 63
                         AND subdomain GLOB ''[a-z0-9]*''
                         AND subdomain NOT GLOB ''*[^a-z0-9_-]*'')',
           'CHECK (length(ltrim(subdomain, ''/'')) BETWEEN 1 AND 63
                         AND (subdomain GLOB ''[a-z0-9]*'' OR subdomain GLOB ''/[a-z0-9]*'')
                         AND substr(subdomain, 2) NOT GLOB ''*[^a-z0-9_-]*'')')
 WHERE type = 'table' AND name = 'companies';

PRAGMA writable_schema = OFF;

-- Every connection reads the tables again after a change of them. Fails where the check was another one.
CREATE TABLE changed (is_changed INTEGER NOT NULL CHECK (is_changed = 1)) STRICT;
INSERT INTO changed SELECT instr(sql, 'GLOB ''/[a-z0-9]*') > 0 FROM sqlite_schema WHERE name = 'companies';
DROP TABLE changed;

-- A program of version 1 to 6 works beside this one until the first shared folder is stored.
INSERT INTO settings (name, value) VALUES ('readable_from', '00000000000001')
    ON CONFLICT (name) DO UPDATE SET value = excluded.value;
