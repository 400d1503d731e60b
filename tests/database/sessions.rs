//! Sessions at PostgreSQL, whatever the database has for defaults.

use futures_util::future::join_all;
use secretier::{
    secret::Version,
    tiers::database::{Database, Precondition, WriteError},
};

use crate::{
    backend::{Backend, key, tenant, value, writer},
    postgres::Postgres,
    within::eventually,
};

async fn put(database: &Database, of: &str, text: &str) -> Result<Version, WriteError> {
    let written = database.put(&tenant(of), &key("K"), &value(text), &Precondition::None, &writer(), None).await;
    written.map(|written| written.version)
}

#[tokio::test(flavor = "multi_thread")]
async fn six_writers_are_refused_nothing_whatever_isolation_the_database_has_for_a_default() {
    const WRITES: usize = 84;
    for level in ["repeatable read", "serializable"] {
        let backend = Backend::postgres(Postgres::shared()).await;
        backend.set_defaults(&[("default_transaction_isolation", level)]).await;
        let database = [backend.open().await, backend.open().await];
        let refused = join_all((0..6).map(async |number: usize| {
            let mut refused = 0;
            for _ in 0..WRITES {
                let of = ["acme", "globex", "initech"][number / 2];
                refused += usize::from(put(&database[number % 2], of, "v").await.is_err());
            }
            refused
        }));
        assert_eq!(refused.await, [0; 6], "{level}");
        let last = database[0].changes().await.unwrap();
        assert_eq!(last, 6 * WRITES as i64, "each of them is there");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_relied_on_holds_in_a_session_and_other_defaults_of_the_database_do_not() {
    for (commits, kept) in [("off", "on"), ("local", "local")] {
        let backend = Backend::postgres(Postgres::shared()).await;
        drop(backend.open().await);
        let relied_on = format!(
            "VALUES ('default_transaction_isolation', 'read committed'), ('transaction_isolation', 'read committed'), \
             ('default_transaction_read_only', 'off'), ('lock_timeout', '0'), ('idle_session_timeout', '0'), \
             ('transaction_timeout', '0'), ('statement_timeout', '30000'), ('synchronous_commit', '{kept}')"
        );
        backend
            .sql(&format!(
                "CREATE TABLE seen (name text, setting text); \
                 CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO secretier.seen \
                 SELECT name, setting FROM pg_settings JOIN ({relied_on}) AS relied_on (name, value) USING (name); \
                 RETURN NULL; END $$; \
                 CREATE TRIGGER see AFTER INSERT ON company_secrets EXECUTE FUNCTION see()"
            ))
            .await;
        backend
            .set_defaults(&[
                ("default_transaction_isolation", "serializable"),
                ("default_transaction_read_only", "on"),
                ("lock_timeout", "1ms"),
                ("statement_timeout", "1h"),
                ("idle_session_timeout", "1500ms"),
                ("synchronous_commit", commits),
            ])
            .await;
        let database = backend.open().await;
        assert_eq!(put(&database, "acme", "v").await.unwrap(), Version::FIRST);
        assert!(backend.number("SELECT count(*) FROM {}seen").await >= 6);
        let others = format!("SELECT count(*) FROM {{}}seen WHERE (name, setting) NOT IN ({relied_on})");
        assert_eq!(backend.number(&others).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_only_listens_is_kept_where_the_database_ends_idle_ones() {
    let backend = Backend::postgres(Postgres::shared()).await;
    // Long enough to set a session up on a busy machine.
    backend.set_defaults(&[("idle_session_timeout", "1500ms"), ("default_transaction_read_only", "on")]).await;
    let database = backend.open().await;
    let long_idle = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND state = 'idle' \
                     AND datname = current_database() AND clock_timestamp() - state_change > '3s'";
    tokio::select! {
        ended = database.listen(|| ()) => panic!("{:?}", ended.err()),
        () = eventually(async || backend.number(long_idle).await == 1) => {}
    }
}
