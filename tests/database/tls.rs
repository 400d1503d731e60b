//! TLS to PostgreSQL, with libpq's words.

use std::path::Path;

use secretier::tiers::database::StoreError;

use crate::{backend::Backend, postgres::Postgres};

/// Opens a new database with these words in its URL; whether its session is encrypted.
async fn opens(host: &str, options: &str) -> Result<bool, StoreError> {
    opens_at(Postgres::shared(), host, options).await
}

async fn opens_at(server: &Postgres, host: &str, options: &str) -> Result<bool, StoreError> {
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

const EC: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout server.key -subj /CN=localhost";

#[tokio::test(flavor = "multi_thread")]
async fn a_servers_self_signed_certificate_is_its_own_root() {
    let mut server = Postgres::start();
    for constraints in ["CA:TRUE", "CA:FALSE"] {
        let make = format!(
            "req -x509 {EC} -out server.pem -days 2 -addext subjectAltName=DNS:localhost -addext basicConstraints={constraints}"
        );
        server.present(&[&make], &[]);
        let own = root(&server.certificate());
        for mode in ["require", "verify-ca", "verify-full"] {
            assert!(
                opens_at(&server, "localhost", &format!("sslmode={mode}&{own}")).await.unwrap(),
                "{mode} {constraints}"
            );
        }
        assert!(opens_at(&server, "127.0.0.1", &format!("sslmode=verify-ca&{own}")).await.unwrap());
        let other_name = opens_at(&server, "127.0.0.1", &format!("sslmode=verify-full&{own}")).await;
        assert!(matches!(other_name, Err(StoreError::Unavailable { .. })), "{other_name:?}");
        let other = root(&Postgres::shared().root_certificate());
        let untrusted = opens_at(&server, "localhost", &format!("sslmode=verify-ca&{other}")).await;
        assert!(matches!(untrusted, Err(StoreError::Unavailable { .. })), "{untrusted:?}");
    }
    // One that has ended is trusted no more, though the file has it.
    let ended = format!("req {EC} -out server.csr");
    let sign = "x509 -req -in server.csr -signkey server.key -out server.pem -days -1 -extfile server.ext";
    server.present(&[&ended, sign], &[]);
    let own = root(&server.certificate());
    let expired = opens_at(&server, "localhost", &format!("sslmode=verify-ca&{own}")).await;
    assert!(matches!(expired, Err(StoreError::Unavailable { .. })), "{expired:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn require_takes_any_certificate_of_version_1_too() {
    let mut server = Postgres::start();
    for (key, newest) in
        [("ec -pkeyopt ec_paramgen_curve:prime256v1", "TLSv1.3"), ("rsa:2048", "TLSv1.3"), ("rsa:2048", "TLSv1.2")]
    {
        let request = format!("req -newkey {key} -nodes -keyout server.key -subj /CN=localhost -out server.csr");
        let sign = "x509 -req -in server.csr -signkey server.key -out server.pem -days 2";
        server.present(&[&request, sign], &[&format!("ssl_max_protocol_version={newest}")]);
        for mode in ["require", "prefer"] {
            assert!(opens_at(&server, "localhost", &format!("sslmode={mode}")).await.unwrap(), "{mode} {key} {newest}");
        }
        let own = root(&server.certificate());
        let verified = opens_at(&server, "localhost", &format!("sslmode=verify-full&{own}")).await;
        assert!(
            matches!(verified, Err(StoreError::Unavailable { .. })),
            "it has no name that can be verified: {verified:?}"
        );
    }
}
