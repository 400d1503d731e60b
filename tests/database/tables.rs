//! The tables of an application, read and nothing else.

use std::{collections::BTreeMap, time::Duration};

use secretier::{
    clock::{Clock, Timestamp},
    migration::tables::legacy::{LegacyFormat, LegacyKey},
    migration::{
        origin::{Content, Origin as _, OriginError, Problem, ProblemKind},
        tables::{Layout, Tables, TablesConfig, TablesError},
    },
    tenant::Tenant,
};
use serde::Deserialize;
use tokio_postgres::SimpleQueryMessage;

use crate::{
    backend::tenant,
    pgbouncer::Pgbouncer,
    postgres::{self, Postgres},
    within::{eventually, within},
};

#[derive(Deserialize)]
struct Vectors {
    key: String,
    wrong_key: String,
    opens: Vec<Sealed>,
}

#[derive(Deserialize)]
struct Sealed {
    name: String,
    format: String,
    sealed: String,
    value: String,
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../vectors/legacy.json")).unwrap()
}

/// A sealed text and its value.
fn sealed(name: &str) -> (String, String) {
    let found = vectors().opens.into_iter().find(|sealed| sealed.name == name).unwrap();
    (found.sealed, found.value)
}

/// An application's database, with what the statements make in it.
async fn source(layout: Layout, sql: &str) -> TablesConfig {
    let url = Postgres::shared().database().await;
    postgres::execute(&url, sql).await;
    TablesConfig::new(url.as_str().into(), layout)
}

fn open(config: &TablesConfig) -> Tables {
    open_with(config, &vectors().key, LegacyFormat::Auto)
}

fn open_with(config: &TablesConfig, key: &str, format: LegacyFormat) -> Tables {
    Tables::new(config, LegacyKey::parse(key).unwrap(), format, Clock::system()).unwrap()
}

async fn read(tables: &Tables, name: &str) -> Result<Content, OriginError> {
    let mut contents = tables.read(&[tenant(name)]).await;
    assert_eq!(contents.len(), 1);
    contents.pop().unwrap()
}

async fn content(tables: &Tables, name: &str) -> Content {
    read(tables, name).await.unwrap()
}

fn values(content: &Content) -> BTreeMap<&str, &str> {
    let secrets = &content.snapshot.secrets;
    let values: BTreeMap<_, _> = secrets.iter().map(|secret| (secret.key.as_str(), secret.value.expose())).collect();
    assert_eq!(values.len(), secrets.len(), "each key once");
    values
}

fn problems(content: &Content) -> Vec<(&str, ProblemKind)> {
    content.problems.iter().map(|Problem { name, kind, .. }| (name.as_str(), *kind)).collect()
}

fn names(tenants: &[Tenant]) -> Vec<&str> {
    tenants.iter().map(Tenant::as_str).collect()
}

/// The layout `company_secrets`, ids of that type.
fn company_tables(id: &str) -> String {
    format!(
        "CREATE TABLE companies (id {id} PRIMARY KEY, subdomain text);
         CREATE TABLE company_secrets (company_id {id}, secret_key text, secret_value_encrypted text,
                                       updated_at timestamptz);"
    )
}

const TENANT_TABLE: &str = "CREATE TABLE tenant_secrets (tenant_id text, key text, value_encrypted text);";

#[tokio::test(flavor = "multi_thread")]
async fn what_an_application_sealed_is_read_back_in_both_layouts_and_every_format() {
    let all = vectors();
    for (id, acme, other) in [
        ("uuid", "'6f1fe0a2-9f0b-4d1c-8d5e-2d6f3a1b7c90'", "'0b4a8e57-33cf-4a38-9a86-9a4b8d7e1f20'"),
        ("integer", "1", "2"),
        ("bigint", "9007199254740993", "2"),
        ("text", "'Acme Inc.'", "'2'"),
    ] {
        let mut sql = company_tables(id);
        sql += &format!("INSERT INTO companies VALUES ({acme}, 'acme'), ({other}, 'other');");
        for Sealed { name, format, sealed, .. } in &all.opens {
            sql += &format!("INSERT INTO company_secrets VALUES ({acme}, '{format} {name}', '{sealed}');");
        }
        sql += &format!("INSERT INTO company_secrets VALUES ({other}, 'ONE', '{}');", sealed("ascii").0);
        let by_id = source(Layout::CompanySecrets, &sql).await;
        assert_vectors(&open(&by_id), &all).await;
    }

    let mut sql = TENANT_TABLE.to_owned();
    for Sealed { name, format, sealed, .. } in &all.opens {
        sql += &format!("INSERT INTO tenant_secrets VALUES ('acme', '{format} {name}', '{sealed}');");
    }
    sql += &format!("INSERT INTO tenant_secrets VALUES ('other', 'ONE', '{}');", sealed("ascii").0);
    let by_name = source(Layout::TenantSecrets, &sql).await;
    assert_vectors(&open(&by_name), &all).await;

    // Told the format, it takes no other.
    for format in [LegacyFormat::GcmTagFirst, LegacyFormat::GcmTagLast, LegacyFormat::Cbc] {
        let acme = content(&open_with(&by_name, &all.key, format), "acme").await;
        let of_format = |name: &str| name.starts_with(&format.to_string());
        assert!(values(&acme).keys().all(|name| of_format(name)), "{format}: {:?}", values(&acme).keys());
        assert!(problems(&acme).iter().all(|(name, kind)| !of_format(name) && *kind == ProblemKind::Value));
        assert_eq!(values(&acme).len() + problems(&acme).len(), all.opens.len());
    }
}

async fn assert_vectors(tables: &Tables, all: &Vectors) {
    let listed = tables.tenants().await.unwrap();
    assert_eq!((names(&listed.tenants), listed.unusable.len()), (vec!["acme", "other"], 0));
    let read = tables.read(&[tenant("other"), tenant("nobody"), tenant("acme"), tenant("other")]).await;
    let [other, nobody, acme, again] = &read.into_iter().map(Result::unwrap).collect::<Vec<_>>()[..] else {
        panic!("not one for each")
    };
    let expected: BTreeMap<String, &str> =
        all.opens.iter().map(|sealed| (format!("{} {}", sealed.format, sealed.name), &*sealed.value)).collect();
    assert_eq!(values(acme), expected.iter().map(|(name, value)| (&**name, *value)).collect());
    assert_eq!(problems(acme), []);
    assert!(acme.snapshot.secrets.iter().all(|secret| secret.version.number() == 1 && secret.updated_at.is_none()));
    assert_eq!(values(nobody), BTreeMap::new());
    assert_eq!(values(other), [("ONE", sealed("ascii").1.as_str())].into());
    assert_eq!(values(again), values(other), "asked for twice, told twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_given_may_be_any_that_postgresql_takes() {
    let (text, value) = sealed("unicode");
    let sql = format!(
        r#"CREATE SCHEMA "My App";
           CREATE TABLE "My App"."Group" ("ID" int, "sub""domain" text);
           CREATE TABLE "My App"."x""; DROP TABLE secrets; --" ("where" int, "select" text, "välue" text, "At" timestamp);
           INSERT INTO "My App"."Group" VALUES (7, 'acme');
           INSERT INTO "My App"."x""; DROP TABLE secrets; --" VALUES (7, 'K', '{text}', '2026-03-01 12:00:00.25');"#
    );
    let name = |name: &str| Some(name.to_owned());
    let config = TablesConfig {
        schema: name("My App"),
        table_name: name("x\"; DROP TABLE secrets; --"),
        tenant_column: name("where"),
        key_column: name("select"),
        value_column: name("välue"),
        updated_column: name("At"),
        tenants_table: name("Group"),
        tenants_id_column: name("ID"),
        tenants_name_column: name("sub\"domain"),
        ..source(Layout::TenantSecrets, &sql).await
    };
    let tables = open(&config);
    assert_eq!(names(&tables.tenants().await.unwrap().tenants), ["acme"]);
    let acme = content(&tables, "acme").await;
    assert_eq!(values(&acme), [("K", value.as_str())].into());
    assert_eq!(acme.snapshot.secrets[0].updated_at, Timestamp::from_rfc3339("2026-03-01T12:00:00.250Z"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_or_column_that_is_not_there_is_named_with_the_option_that_names_another() {
    let told = async |config: &TablesConfig| {
        let tables = open(config);
        let listed = tables.tenants().await.expect_err("the tables are not so").to_string();
        let read = read(&tables, "acme").await.expect_err("the tables are not so").to_string();
        assert_eq!(listed, read);
        listed
    };
    let mut config = source(Layout::CompanySecrets, &company_tables("int")).await;
    assert!(open(&config).tenants().await.is_ok());
    config.key_column = Some("Secret_Key".to_owned());
    assert!(told(&config).await.contains("no column \"Secret_Key\" (--key-column"));
    config.tenants_table = Some("tenants".to_owned());
    assert!(told(&config).await.contains("no table \"public\".\"tenants\" (--tenants-table and --schema"));
    config.schema = Some("elsewhere".to_owned());
    assert!(told(&config).await.contains("no table \"elsewhere\".\"company_secrets\" (--table-name and --schema"));
    // Not cut to the length of a name and then found.
    let config = source(Layout::TenantSecrets, &format!("CREATE TABLE {} (key text)", "x".repeat(63))).await;
    let config = TablesConfig { table_name: Some("x".repeat(64)), ..config };
    assert!(told(&config).await.contains("there is no table"));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_wrong_key_every_secret_is_a_problem_and_none_has_a_value() {
    let all = vectors();
    let mut sql = TENANT_TABLE.to_owned();
    for Sealed { name, format, sealed, .. } in &all.opens {
        sql += &format!("INSERT INTO tenant_secrets VALUES ('acme', '{format} {name}', '{sealed}');");
    }
    let config = source(Layout::TenantSecrets, &sql).await;
    let acme = content(&open_with(&config, &all.wrong_key, LegacyFormat::Auto), "acme").await;
    assert_eq!(values(&acme), BTreeMap::new());
    assert_eq!(acme.problems.len(), all.opens.len());
    assert!(problems(&acme).iter().all(|(_, kind)| *kind == ProblemKind::Value));
    let told = format!("{:?} {}", acme.problems, acme.problems[0]);
    assert!(all.opens.iter().all(|sealed| !told.contains(&sealed.sealed)), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_only_read_is_enough_unless_rows_are_hidden_from_it() {
    let (text, value) = sealed("ascii");
    let config = source(
        Layout::CompanySecrets,
        &format!(
            "{} INSERT INTO companies VALUES (1, 'acme');
             INSERT INTO company_secrets VALUES (1, 'K', '{text}');
             CREATE ROLE tables_reader LOGIN;
             GRANT SELECT ON company_secrets TO tables_reader;",
            company_tables("int")
        ),
    )
    .await;
    let mine = Postgres::shared();
    let owner = config.url.to_string();
    let database = owner.rsplit('/').next().unwrap();
    let url = format!("postgres://tables_reader@127.0.0.1:{}/{database}?sslmode=disable", mine.port());
    let tables = open(&TablesConfig { url: url.as_str().into(), ..config });
    let refused = tables.tenants().await.expect_err("it may not read one of the two").to_string();
    assert!(refused.contains("permission denied for table companies"), "{refused}");

    let owner = mine.url(database);
    postgres::execute(&owner, "GRANT SELECT ON companies TO tables_reader").await;
    assert_eq!(names(&tables.tenants().await.unwrap().tenants), ["acme"]);
    assert_eq!(values(&content(&tables, "acme").await), [("K", value.as_str())].into());

    let policy = "ALTER TABLE company_secrets ENABLE ROW LEVEL SECURITY;
                  CREATE POLICY own ON company_secrets USING (secret_key = 'ANOTHER')";
    postgres::execute(&owner, policy).await;
    let refused = read(&tables, "acme").await.expect_err("a part would pass for the whole").to_string();
    assert!(refused.contains("row-level security"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_can_be_written_and_nothing_is_left_in_the_session() {
    // Views, so that what is read tells of the session that reads it.
    let config = source(
        Layout::TenantSecrets,
        "CREATE TABLE touched (at timestamptz);
         CREATE FUNCTION touch() RETURNS text LANGUAGE sql VOLATILE
             AS 'INSERT INTO public.touched VALUES (now()) RETURNING ''K''';
         CREATE VIEW writes AS SELECT 'acme' AS tenant_id, touch() AS key, '' AS value_encrypted;
         CREATE VIEW tenant_secrets AS
             SELECT 'acme' AS tenant_id, name || '=' || setting AS key, '' AS value_encrypted FROM (
                 SELECT 'outside:' || name AS name, reset_val AS setting FROM pg_settings
                 UNION ALL SELECT name, setting FROM pg_settings
                 UNION ALL SELECT 'application', application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()
             ) settings;",
    )
    .await;
    let url = Postgres::shared().url(config.url.to_string().rsplit('/').next().unwrap());
    let tables = open(&config);
    let settings = content(&tables, "acme").await;
    let sessions = "SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND application_name = 'secretier' AND state = ";
    assert_eq!(postgres::number(&url, &format!("{sessions}'idle'")).await, 1, "and no transaction stays open");
    let settings: Vec<&str> = settings.problems.iter().map(|problem| problem.name.as_str()).collect();
    for expected in [
        "transaction_read_only=on",
        "statement_timeout=30000",
        "row_security=off",
        "application=secretier",
        "default_transaction_read_only=off",
        "outside:default_transaction_read_only=off",
    ] {
        assert!(settings.contains(&expected), "{expected}: {settings:?}");
    }

    let tables = open(&TablesConfig { table_name: Some("writes".to_owned()), ..config });
    for _ in 0..2 {
        let refused = read(&tables, "acme").await.expect_err("it would write").to_string();
        assert!(refused.contains("cannot execute INSERT in a read-only transaction"), "{refused}");
    }
    assert_eq!(postgres::number(&url, "SELECT count(*) FROM touched").await, 0);
    postgres::execute(&url, "SELECT * FROM writes").await;
    assert_eq!(postgres::number(&url, "SELECT count(*) FROM touched").await, 1, "anyone else would write so");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_read_through_an_applications_pooler_which_gives_its_next_client_nothing_of_ours() {
    let (text, value) = sealed("ascii");
    let url = Postgres::shared().database().await;
    let name = url.rsplit_once('/').unwrap().1.split('?').next().unwrap();
    postgres::execute(&url, &format!("{TENANT_TABLE} INSERT INTO tenant_secrets VALUES ('acme', 'ONE', '{text}')"))
        .await;
    postgres::execute(&url, &format!("ALTER DATABASE {name} SET default_transaction_isolation TO 'serializable'"))
        .await;
    let pooler = Pgbouncer::start(Postgres::shared(), "pool_mode = transaction\ndefault_pool_size = 1");
    let url = pooler.url(&format!("{name}?sslmode=disable"));
    let tables = open(&TablesConfig::new(url.as_str().into(), Layout::TenantSecrets));
    for _ in 0..2 {
        assert_eq!(names(&tables.tenants().await.unwrap().tenants), ["acme"]);
        assert_eq!(values(&content(&tables, "acme").await), BTreeMap::from([("ONE", value.as_str())]));
        let next = postgres::session(&url, "CREATE TABLE IF NOT EXISTS may_write ()").await;
        let settings = "SELECT current_setting('statement_timeout'), current_setting('row_security')";
        let told = next.simple_query(settings).await.unwrap();
        let told = told.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some((row.get(0), row.get(1))),
            _ => None,
        });
        assert_eq!(told, Some((Some("0"), Some("on"))));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_secrets_of_one_name_the_one_changed_last_is_taken_if_that_can_be_told() {
    let ((old, _), (new, value)) = (sealed("ascii"), sealed("unicode"));
    let config = source(
        Layout::CompanySecrets,
        &format!(
            "{} INSERT INTO companies VALUES (1, 'acme');
             INSERT INTO company_secrets VALUES
                 (1, 'LATER', '{new}', '2026-01-02 00:00:00.0005Z'), (1, 'LATER', '{old}', '2026-01-02Z'),
                 (1, 'TIED', '{old}', '2026-01-02'), (1, 'TIED', '{new}', '2026-01-02'), (1, 'TIED', '{new}', '2026-01-01'),
                 (1, 'UNTOLD', '{old}', '2026-01-02'), (1, 'UNTOLD', '{new}', NULL),
                 (1, 'BROKEN', '{old}', '2026-01-02'), (1, 'BROKEN', 'no text', '2026-01-03'),
                 (1, 'ONCE', '{old}', NULL);",
            company_tables("int")
        ),
    )
    .await;
    let acme = content(&open(&config), "acme").await;
    let once = sealed("ascii").1;
    assert_eq!(values(&acme), [("LATER", value.as_str()), ("ONCE", once.as_str())].into());
    use ProblemKind::{Duplicate, Value};
    assert_eq!(
        problems(&acme),
        [("BROKEN", Duplicate), ("BROKEN", Value), ("LATER", Duplicate), ("TIED", Duplicate), ("UNTOLD", Duplicate)]
    );

    let rows = format!("INSERT INTO tenant_secrets VALUES ('acme', 'K', '{old}'), ('acme', 'K', '{new}');");
    let undated =
        content(&open(&source(Layout::TenantSecrets, &(TENANT_TABLE.to_owned() + &rows)).await), "acme").await;
    assert_eq!((values(&undated), problems(&undated)), (BTreeMap::new(), vec![("K", Duplicate)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_no_secret_is_a_problem_of_its_tenant() {
    let (text, value) = sealed("long");
    let config = source(
        Layout::TenantSecrets,
        &format!(
            "{TENANT_TABLE} INSERT INTO tenant_secrets VALUES
                 ('acme', 'GOOD', ' {text}'||chr(10)), ('acme', 'NONE', NULL), ('acme', 'EMPTY', ''),
                 ('acme', 'HUGE', repeat('0', (4 << 20) + 1)), ('acme', 'TEXT', 'hunter2'),
                 ('acme', '', '{text}'), ('acme', NULL, '{text}'), ('acme', 'a'||chr(10)||'b', '{text}'),
                 ('acme', repeat('ä', 128), '{text}'), ('acme', repeat('k', 255), '{text}'),
                 ('acme', repeat('m', 10000), '{text}');"
        ),
    )
    .await;
    let acme = content(&open(&config), "acme").await;
    let (longest, umlauts, cut) = ("k".repeat(255), "ä".repeat(128), "m".repeat(256));
    assert_eq!(values(&acme), [("GOOD", value.as_str()), (longest.as_str(), value.as_str())].into());
    use ProblemKind::{Name, Value};
    let expected = [
        ("", Name),
        ("a\nb", Name),
        (cut.as_str(), Name),
        (umlauts.as_str(), Name),
        ("EMPTY", Value),
        ("HUGE", Value),
        ("NONE", Value),
        ("TEXT", Value),
    ];
    assert_eq!(problems(&acme), expected);
    assert!(!format!("{acme:?}").contains("hunter2"));

    let size = value.len() as u64;
    let limited = |max_value| open(&TablesConfig { max_value, ..config.clone() });
    assert!(values(&content(&limited(size), "acme").await).contains_key("GOOD"));
    let acme = content(&limited(size - 1), "acme").await;
    assert!(values(&acme).is_empty() && problems(&acme).contains(&("GOOD", Value)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_company_that_is_missing_or_has_no_usable_name_is_listed_and_not_read() {
    let (text, value) = sealed("ascii");
    let config = source(
        Layout::CompanySecrets,
        &format!(
            "{} INSERT INTO companies VALUES (1, 'acme'), (2, 'Acme'), (3, NULL), (5, 'twin'), (6, 'twin'), (7, 'unused');
             INSERT INTO company_secrets SELECT id, 'K', '{text}' FROM unnest(ARRAY[1, 2, 3, 4, 5, 6, NULL]) id;",
            company_tables("int")
        ),
    )
    .await;
    let tables = open(&config);
    let listed = tables.tenants().await.unwrap();
    assert_eq!(names(&listed.tenants), ["acme"]);
    assert_eq!(listed.unusable, ["(no company_id)", "3", "4", "Acme", "twin (the name of 2 ids)"]);
    let read = tables.read(&[tenant("acme"), tenant("twin"), tenant("unused")]).await;
    let [Ok(acme), Err(twin), Ok(unused)] = &read[..] else { panic!("{read:?}") };
    assert_eq!(values(acme), [("K", value.as_str())].into());
    assert!(values(unused).is_empty());
    let told = "\"public\".\"companies\" gives the name \"twin\" to several ids: {\"5\", \"6\"}";
    assert!(twin.to_string().contains(told), "{twin}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_never_taken_for_the_name_of_a_tenant() {
    let (text, value) = sealed("ascii");
    let sql = format!(
        "{TENANT_TABLE} CREATE TABLE tenants (id int, subdomain text);
         INSERT INTO tenants VALUES (1, '2'), (2, 'acme');
         INSERT INTO tenant_secrets VALUES ('2', 'K', '{text}'), ('3', 'K', '{text}');"
    );
    let config =
        TablesConfig { tenants_table: Some("tenants".to_owned()), ..source(Layout::TenantSecrets, &sql).await };
    let tables = open(&config);
    let listed = tables.tenants().await.unwrap();
    assert_eq!((names(&listed.tenants), &listed.unusable[..]), (vec!["acme"], &["3".to_owned()][..]));
    assert_eq!(values(&content(&tables, "acme").await), [("K", value.as_str())].into());
    assert!(values(&content(&tables, "2").await).is_empty(), "that is the company with the id 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_company_with_two_names_has_its_secrets_under_both() {
    let (text, value) = sealed("ascii");
    let sql = format!(
        "{TENANT_TABLE} CREATE TABLE domains (id text, subdomain text);
         INSERT INTO domains VALUES ('x', 'one'), ('x', 'two'), ('x', 'two');
         INSERT INTO tenant_secrets VALUES ('x', 'K', '{text}');"
    );
    let config =
        TablesConfig { tenants_table: Some("domains".to_owned()), ..source(Layout::TenantSecrets, &sql).await };
    let tables = open(&config);
    assert_eq!(names(&tables.tenants().await.unwrap().tenants), ["one", "two"]);
    for name in ["one", "two"] {
        let content = content(&tables, name).await;
        assert_eq!((values(&content), problems(&content)), ([("K", value.as_str())].into(), vec![]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_told_apart_whatever_the_columns_rules_are() {
    let (text, value) = sealed("ascii");
    let sql = format!(
        "CREATE COLLATION any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
         CREATE TABLE companies (id text COLLATE any_case, subdomain text COLLATE any_case);
         CREATE TABLE company_secrets (company_id varchar(20) COLLATE \"POSIX\", secret_key text COLLATE any_case,
                                       secret_value_encrypted text);
         INSERT INTO companies VALUES ('a', 'acme'), ('b', 'ACME');
         INSERT INTO company_secrets VALUES ('a', 'K', '{text}'), ('b', 'k', '{text}'), ('A', 'L', '{text}');"
    );
    let tables = open(&source(Layout::CompanySecrets, &sql).await);
    let listed = tables.tenants().await.unwrap();
    assert_eq!((names(&listed.tenants), listed.unusable), (vec!["acme"], vec!["A".to_owned(), "ACME".to_owned()]));
    assert_eq!(values(&content(&tables, "acme").await), [("K", value.as_str())].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_of_a_change_is_taken_from_any_kind_of_date() {
    let (text, _) = sealed("ascii");
    for (kind, date, taken) in [
        ("timestamptz", "2026-03-01 12:00:00.123+02", Some("2026-03-01T10:00:00.123Z")),
        ("timestamp", "2026-03-01 12:00:00.123", Some("2026-03-01T12:00:00.123Z")),
        ("date", "2026-03-01", Some("2026-03-01T00:00:00Z")),
        ("timestamptz", "infinity", None),
        ("text", "2026-03-01", None),
    ] {
        let sql = format!(
            "{TENANT_TABLE} ALTER TABLE tenant_secrets ADD updated_at {kind};
             ALTER DATABASE {{}} SET timezone TO 'Asia/Tokyo';
             INSERT INTO tenant_secrets VALUES ('acme', 'K', '{text}', '{date}');"
        );
        let url = Postgres::shared().database().await;
        let name = url.rsplit('/').next().unwrap().split('?').next().unwrap();
        postgres::execute(&url, &sql.replace("{}", name)).await;
        let acme = content(&open(&TablesConfig::new(url.as_str().into(), Layout::TenantSecrets)), "acme").await;
        let taken = taken.map(|taken| Timestamp::from_rfc3339(taken).unwrap());
        assert_eq!(acme.snapshot.secrets[0].updated_at, taken, "{kind} {date}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_secrets_of_fifty_tenants_are_read_in_one_go() {
    let (text, value) = sealed("unicode");
    let sql = format!(
        "{TENANT_TABLE} INSERT INTO tenant_secrets
             SELECT 't' || number % 50, 'KEY_' || number, '{text}' FROM generate_series(1, 5000) number;"
    );
    let tables = open(&source(Layout::TenantSecrets, &sql).await);
    let listed = tables.tenants().await.unwrap();
    assert_eq!(listed.tenants.len(), 50);
    assert!(listed.tenants.is_sorted());
    let read = tables.read(&listed.tenants).await;
    for (tenant, content) in listed.tenants.iter().zip(read) {
        let content = content.unwrap();
        let values = values(&content);
        assert_eq!((values.len(), content.problems.len()), (100, 0), "{tenant}");
        assert!(values.values().all(|opened| *opened == value));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_tells_when_it_began_and_sees_what_was_written_until_then() {
    let (text, value) = sealed("ascii");
    let sql = format!("{TENANT_TABLE} INSERT INTO tenant_secrets VALUES ('acme', 'K', '{text}');");
    let config = source(Layout::TenantSecrets, &sql).await;
    let url = Postgres::shared().url(config.url.to_string().rsplit('/').next().unwrap());
    let clock = Clock::system();
    let key = LegacyKey::parse(&vectors().key).unwrap();
    let tables = Tables::new(&config, key, LegacyFormat::Auto, clock.clone()).unwrap();

    let (application, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    within("the table is locked", application.batch_execute("BEGIN; LOCK TABLE tenant_secrets")).await.unwrap();
    let reading = tokio::spawn(async move { content(&tables, "acme").await });
    let waits = "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database
                 WHERE NOT granted AND datname = current_database()";
    eventually(async || postgres::number(&url, waits).await > 0).await;
    let began = clock.now();
    clock.advance(Duration::from_secs(3600));
    application.batch_execute("UPDATE tenant_secrets SET key = 'L'; COMMIT").await.unwrap();
    let acme = within("it is read", reading).await.unwrap();
    assert!(acme.began <= began);
    assert_eq!(values(&acme), [("L", value.as_str())].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_went_away_is_an_error_without_the_url_and_is_found_again() {
    let mut server = Postgres::start();
    let (text, value) = sealed("ascii");
    let url = server.database().await;
    postgres::execute(&url, &format!("{TENANT_TABLE} INSERT INTO tenant_secrets VALUES ('acme', 'K', '{text}')")).await;
    let url = url.replace("postgres@", "postgres:hunter2@");
    let tables = open(&TablesConfig::new(url.as_str().into(), Layout::TenantSecrets));
    let acme = async || values(&content(&tables, "acme").await).get("K").map(|found| (*found).to_owned());
    assert_eq!(acme().await.as_ref(), Some(&value));

    server.stop();
    let listed = tables.tenants().await.expect_err("nobody is there");
    let read = tables.read(&[tenant("acme"), tenant("other")]).await;
    assert_eq!(read.len(), 2);
    for error in read.into_iter().map(Result::unwrap_err).chain([listed]) {
        let told = format!("{error} {error:?} {tables:?}");
        assert!(told.contains("error connecting to server") && !told.contains("hunter2"), "{told}");
    }

    server.start_again();
    assert_eq!(acme().await.as_ref(), Some(&value));
    // A connection that died while it was kept is no error: another takes its place.
    server.restart();
    assert_eq!(acme().await.as_ref(), Some(&value));
    let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'secretier'";
    postgres::execute(&server.url("postgres"), others).await;
    assert_eq!(acme().await.as_ref(), Some(&value));
    let ours = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'secretier'";
    assert!(postgres::number(&server.url("postgres"), ours).await <= 1, "one connection at a time");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_goes_away_takes_the_connection_along_and_the_next_has_another() {
    use futures_util::FutureExt as _;
    let (text, value) = sealed("ascii");
    let sql = format!("{TENANT_TABLE} INSERT INTO tenant_secrets VALUES ('acme', 'K', '{text}');");
    let tables = open(&source(Layout::TenantSecrets, &sql).await);
    for polls in 0..30 {
        let acme = [tenant("acme")];
        let mut read = tables.read(&acme);
        for _ in 0..polls {
            if read.as_mut().now_or_never().is_some() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(read);
        assert_eq!(values(&content(&tables, "acme").await), [("K", value.as_str())].into());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_url_has_the_meaning_that_our_own_has() {
    let server = Postgres::shared();
    let config = source(Layout::TenantSecrets, TENANT_TABLE).await;
    let database = config.url.to_string();
    let database = database.rsplit('/').next().unwrap();
    let at = |host: &str, options: &str| {
        let url = format!("postgres://postgres@{host}:{}/{database}?{options}", server.port());
        open(&TablesConfig { url: url.as_str().into(), ..config.clone() })
    };
    let verified = format!("sslmode=verify-full&sslrootcert={}", server.root_certificate().display());
    assert!(at("localhost", &verified).tenants().await.is_ok());
    let refused = at("127.0.0.1", &verified).tenants().await.expect_err("the certificate is for another name");
    assert!(refused.to_string().contains("certificate"), "{refused}");

    let refused = |url: &str| {
        let config = TablesConfig { url: url.into(), ..config.clone() };
        let (key, clock) = (LegacyKey::parse(&vectors().key).unwrap(), Clock::system());
        match Tables::new(&config, key, LegacyFormat::Auto, clock).expect_err(url) {
            TablesError::Url(told) => told,
            other => panic!("{url}: {other}"),
        }
    };
    assert!(refused("sqlite:app.db").contains("postgres://"));
    assert!(refused("postgres://app:hunter2@db/app?sslmode=maybe").contains("verify-full"));
    assert!(!refused("postgres://app:hunter2@db/app?unheard=of").contains("hunter2"));
}
