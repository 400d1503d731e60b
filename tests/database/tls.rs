//! TLS to PostgreSQL, with libpq's words.

use std::path::Path;

use secretier::tiers::database::StoreError;

use crate::{backend::Backend, postgres::Postgres};

/// Opens a new database with these words in its URL; whether its session is encrypted.
async fn opens(host: &str, options: &str) -> Result<bool, StoreError> {
    let server = Postgres::shared();
    let mut backend = Backend::postgres(server).await;
    let name = backend.url().rsplit('/').next().and_then(|end| end.split('?').next()).unwrap().to_owned();
    let url = format!("postgres://postgres@{host}:{}/{name}?application_name={name}&{options}", server.port());
    backend.config.url = url.as_str().into();
    let database = backend.try_open("test").await?;
    database.ping().await?;
    let encrypted =
        "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE ssl AND application_name = ";
    let encrypted = backend.number(&format!("{encrypted}'{name}'")).await;
    Ok(encrypted > 0)
}

fn root(path: &Path) -> String {
    format!("sslrootcert={}", path.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn disable_is_plain_and_prefer_and_require_are_encrypted() {
    assert!(!opens("localhost", "sslmode=disable").await.unwrap());
    assert!(opens("localhost", "sslmode=require").await.unwrap());
    assert!(opens("localhost", "sslmode=prefer").await.unwrap());
    assert!(opens("127.0.0.1", "").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_full_wants_the_right_root_and_the_right_name() {
    let server = Postgres::shared();
    let right = root(&server.root_certificate());
    assert!(opens("localhost", &format!("sslmode=verify-full&{right}")).await.unwrap());
    let wrong_name = opens("127.0.0.1", &format!("sslmode=verify-full&{right}")).await;
    assert!(matches!(wrong_name, Err(StoreError::Unavailable { .. })), "{wrong_name:?}");
    let system = opens("localhost", "sslmode=verify-full").await;
    assert!(matches!(system, Err(StoreError::Unavailable { .. } | StoreError::InvalidUrl(_))), "{system:?}");
    let missing = opens("localhost", "sslmode=verify-full&sslrootcert=/nowhere.pem").await;
    assert!(matches!(missing, Err(StoreError::InvalidUrl(_))), "{missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_ca_wants_the_right_root_and_takes_any_name() {
    let right = root(&Postgres::shared().root_certificate());
    assert!(opens("127.0.0.1", &format!("sslmode=verify-ca&{right}")).await.unwrap());
    assert!(opens("127.0.0.1", &format!("sslmode=require&{right}")).await.unwrap(), "as libpq has it");
    let other = Postgres::start();
    let wrong = root(&other.root_certificate());
    for mode in ["verify-ca", "verify-full", "require"] {
        let refused = opens("localhost", &format!("sslmode={mode}&{wrong}")).await;
        assert!(matches!(refused, Err(StoreError::Unavailable { .. })), "{mode}: {refused:?}");
    }
}
