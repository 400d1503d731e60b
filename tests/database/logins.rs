//! A login whose password is replaced while an instance runs.

use std::{path::Path, time::Instant};

use secretier::tiers::database::{Config, StoreError};

use crate::{
    backend::Backend,
    lines::{Lines, logging},
    postgres::{self, Postgres},
    within::eventually,
};

/// A role of its own that may make tables, and is let in by its password only.
async fn let_in(server: &Postgres, backend: &Backend, role: &str, password: &str) {
    let database = database_of(backend);
    let sql = format!("CREATE ROLE {role} LOGIN PASSWORD '{password}'; GRANT CREATE ON DATABASE {database} TO {role}");
    postgres::execute(backend.url(), &sql).await;
    server.ask_for_password(role).await;
}

fn database_of(backend: &Backend) -> String {
    let (_, end) = backend.url().rsplit_once('/').unwrap();
    end.split('?').next().unwrap().to_owned()
}

/// Gives the role another password, and ends the sessions that it has.
async fn replace_password(backend: &Backend, role: &str, password: &str) {
    let ended = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'");
    postgres::execute(backend.url(), &format!("ALTER ROLE {role} PASSWORD '{password}'; {ended}")).await;
}

fn url(server: &Postgres, backend: &Backend, role: &str, password: &str) -> String {
    let database = database_of(backend);
    format!("postgres://{role}:{password}@127.0.0.1:{}/{database}?sslmode=disable\n", server.port())
}

fn in_file(backend: &Backend, path: &Path) -> Config {
    let config: Config = toml::from_str(&format!("url = {{ file = {path:?} }}")).unwrap();
    Config { url: config.url, ..backend.config.clone() }
}

#[test]
fn a_password_that_is_replaced_in_its_file_is_used_without_a_restart() {
    let lines = Lines::default();
    logging(&lines, is_used_without_a_restart(&lines));
}

async fn is_used_without_a_restart(lines: &Lines) {
    let server = Postgres::start();
    let mut backend = Backend::postgres(&server).await;
    let_in(&server, &backend, "app", "first-password").await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("url");
    std::fs::write(&file, url(&server, &backend, "app", "first-password")).unwrap();
    backend.config = in_file(&backend, &file);
    let database = backend.open().await;
    database.ping().await.unwrap();

    replace_password(&backend, "app", "second-password").await;
    eventually(async || database.ping().await.is_err()).await;
    let refused = database.ping().await.unwrap_err();
    assert!(matches!(refused, StoreError::Unavailable { .. }), "{refused:?}");
    let began = Instant::now();
    std::fs::write(&file, "postgres://app:second-pass").unwrap();
    eventually(async || database.ping().await.is_err() && lines.text().contains("database.url cannot be read again"))
        .await;
    // However often a login is tried, the file is read once a second at most.
    let tried = || lines.text().matches("database.url cannot be read again").count();
    eventually(async || database.ping().await.is_err() && tried() >= 2).await;
    assert!(tried() as u64 <= began.elapsed().as_secs() + 1, "{}", lines.text());
    std::fs::write(&file, url(&server, &backend, "app", "second-password")).unwrap();
    eventually(async || database.ping().await.is_ok()).await;
    assert!(lines.text().contains("another one was read"), "{}", lines.text());

    // By turns with another role, as managed databases rotate.
    let_in(&server, &backend, "other", "third-password").await;
    backend.sql("GRANT app TO other").await;
    std::fs::write(&file, url(&server, &backend, "other", "third-password")).unwrap();
    replace_password(&backend, "app", "nobody knows").await;
    eventually(async || database.ping().await.is_ok()).await;
    for password in ["first-password", "second-pass", "third-password"] {
        assert!(!lines.text().contains(password) && !format!("{database:?} {refused:?}").contains(password));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_stays_refused_is_no_other_database() {
    let server = Postgres::start();
    let mut backend = Backend::postgres(&server).await;
    let_in(&server, &backend, "app", "first-password").await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("url");
    std::fs::write(&file, url(&server, &backend, "app", "first-password")).unwrap();
    backend.config = in_file(&backend, &file);
    let database = backend.open().await;

    // A file that names another database with the new login: only the login is taken.
    let elsewhere = url(&server, &backend, "app", "second-password").replace(&database_of(&backend), "postgres");
    std::fs::write(&file, elsewhere).unwrap();
    replace_password(&backend, "app", "second-password").await;
    eventually(async || database.ping().await.is_ok()).await;
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND datname <> current_database()";
    assert_eq!(backend.number(sessions).await, 0);
}
