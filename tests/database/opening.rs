//! Opening a database.

use secretier::tiers::database::{Config, Precondition, StoreError};

use crate::backend::{Backend, key, on_both, stored, tenant, value, writer};

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_of_another_environment_is_refused() {
    on_both(async |backend| {
        backend.try_open("prod").await.unwrap();
        let error = backend.try_open("dev").await.unwrap_err().to_string();
        assert!(error.contains("\"prod\"") && error.contains("\"dev\""), "{error}");
        backend.try_open("prod").await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_instances_can_open_an_empty_database_at_once() {
    on_both(async |backend| {
        let opened = futures_util::future::join_all((0..8).map(|_| backend.try_open("test"))).await;
        for database in opened {
            database.unwrap().ping().await.unwrap();
        }
        assert_eq!(backend.number("SELECT count(*) FROM {}counters").await, 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_of_two_schemas_share_a_postgresql_database() {
    let backend = Backend::postgres(crate::postgres::Postgres::shared()).await;
    let mut second = Backend::sqlite();
    second.config = Config { schema: "another".to_owned(), ..backend.config.clone() };
    let (one, two) = (backend.open().await, second.try_open("dev").await.unwrap());
    one.put(&tenant("acme"), &key("K"), &value("1"), &Precondition::None, &writer(), None).await.unwrap();
    two.put(&tenant("acme"), &key("K"), &value("2"), &Precondition::None, &writer(), None).await.unwrap();
    assert_eq!(stored(&one, "acme", "K").await.value.expose(), "1");
    assert_eq!(stored(&two, "acme", "K").await.value.expose(), "2");
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn the_file_and_its_companions_are_their_owners_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let backend = Backend::sqlite();
    let database = backend.open().await;
    database.put(&tenant("acme"), &key("K"), &value("v"), &Precondition::None, &writer(), None).await.unwrap();
    let file = backend.file().unwrap();
    for suffix in ["", "-wal", "-shm"] {
        let path = format!("{}{suffix}", file.display());
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_folder_is_named() {
    let mut backend = Backend::sqlite();
    backend.config.url = "sqlite:/nowhere/at/all/secretier.db".into();
    let error = backend.try_open("test").await.unwrap_err();
    assert!(matches!(error, StoreError::InvalidUrl(_)));
    assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_not_create_schemas_can_use_one_that_is_there() {
    let server = crate::postgres::Postgres::shared();
    let mut backend = Backend::postgres(server).await;
    backend.sql("CREATE ROLE modest LOGIN; CREATE SCHEMA secretier AUTHORIZATION modest").await;
    let url = backend.url().replacen("postgres@", "modest@", 1);
    backend.config.url = url.as_str().into();
    backend.open().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_a_newer_version_are_used_where_they_say_that_this_one_can_and_refused_otherwise() {
    on_both(async |backend| {
        let (of, name) = (tenant("acme"), key("A"));
        drop(backend.open().await);
        backend.sql("INSERT INTO __diesel_schema_migrations (version) VALUES ('00000000009001')").await;
        let read = "UPDATE settings SET value = '00000000009001' WHERE name = 'readable_from'";
        // What the migrations have written; an earlier one; nothing, as the oldest have it.
        for before in [
            "",
            "UPDATE settings SET value = '00000000000003' WHERE name = 'readable_from'",
            "DELETE FROM settings WHERE name = 'readable_from'",
        ] {
            if !before.is_empty() {
                backend.sql(before).await;
            }
            let database = backend.open().await;
            database.put(&of, &name, &value("1"), &Precondition::None, &writer(), None).await.unwrap();
            assert_eq!(stored(&database, "acme", "A").await.value.expose(), "1");
        }
        backend.sql("INSERT INTO settings (name, value) VALUES ('readable_from', '')").await;
        backend.sql(read).await;
        let refused = backend.try_open("test").await.expect_err("it must know more");
        let told = refused.to_string();
        assert!(matches!(refused, StoreError::NewerTables { .. }), "{told}");
        assert!(told.contains("number 9001") && told.contains("newer version"), "{told}");
        let versions = backend.number("SELECT count(*) FROM {}company_secrets").await;
        assert_eq!(versions, 3, "and nothing was touched");
    })
    .await;
}
