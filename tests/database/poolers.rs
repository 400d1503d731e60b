//! PgBouncer between us and PostgreSQL. Where it gives each connection a session of its own, all
//! is as without it; where it does not, that is found out, and nothing is left behind.

use std::sync::Arc;

use futures_util::future::join_all;
use secretier::tiers::database::{Config, Database, Precondition, StoreError};
use tokio::sync::mpsc;
use tokio_postgres::SimpleQueryMessage;

use crate::{
    backend::{Backend, key, stored, tenant, value, writer},
    pgbouncer::Pgbouncer,
    postgres::{self, Postgres},
    within::{eventually, within},
};

/// A new database behind a pooler.
struct Pooled {
    /// Straight to it.
    direct: Backend,
    /// Through the pooler.
    through: Backend,
    pooler: Pgbouncer,
}

impl Pooled {
    async fn start(settings: &str) -> Self {
        Self::start_before(Postgres::shared(), settings).await
    }

    async fn start_before(server: &Postgres, settings: &str) -> Self {
        let direct = Backend::postgres(server).await;
        let pooler = Pgbouncer::start(server, settings);
        let mut through = Backend::sqlite();
        through.ring = Arc::clone(&direct.ring);
        through.config = Config { url: pooler.url(&name(&direct)).as_str().into(), ..direct.config.clone() };
        Self { direct, through, pooler }
    }

    /// What so many other clients of the pooler are told, each in a session that no other has.
    async fn others_are_told(&self, clients: usize, ask: &str) -> Vec<String> {
        let url = self.pooler.url(&name(&self.direct));
        let clients = join_all((0..clients).map(|_| postgres::session(&url, "BEGIN"))).await;
        let mut told = Vec::new();
        for client in &clients {
            // Simply asked: in these modes a prepared statement is lost to who prepared it.
            for message in client.simple_query(ask).await.unwrap() {
                if let SimpleQueryMessage::Row(row) = message {
                    told.push(row.get(0).unwrap().to_owned());
                }
            }
        }
        for client in clients {
            client.batch_execute("COMMIT").await.unwrap();
        }
        told
    }

    async fn others_find_nothing_of_ours(&self) {
        for (ask, usual) in [
            ("SHOW search_path", "\"$user\", public"),
            ("SHOW statement_timeout", "0"),
            ("SHOW idle_in_transaction_session_timeout", "0"),
            ("SHOW default_transaction_isolation", "read committed"),
            ("SELECT count(*) FROM pg_prepared_statements", "0"),
            ("SELECT count(*) FROM pg_listening_channels()", "0"),
        ] {
            assert_eq!(self.others_are_told(6, ask).await, [usual; 6], "{ask}");
        }
    }

    async fn locks(&self) -> i64 {
        let here = "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database \
                    WHERE locktype = 'advisory' AND datname = current_database()";
        self.direct.number(here).await
    }
}

fn name(backend: &Backend) -> String {
    let (_, name) = backend.url().rsplit_once('/').unwrap();
    name.to_owned()
}

async fn put(database: &Database, text: &str) {
    database.put(&tenant("acme"), &key("K"), &value(text), &Precondition::None, &writer(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_whose_clients_take_turns_in_sessions_is_refused_and_nothing_is_left_in_them() {
    for (settings, sessions) in [
        ("pool_mode = transaction", 6),
        ("pool_mode = transaction", 0),
        ("pool_mode = transaction\nserver_round_robin = 1", 6),
        ("pool_mode = transaction\nserver_round_robin = 1", 0),
        ("pool_mode = transaction\nserver_round_robin = 1\ndefault_pool_size = 2", 2),
        ("pool_mode = transaction\ndefault_pool_size = 2", 2),
        ("pool_mode = transaction\ndefault_pool_size = 1", 1),
        ("pool_mode = statement", 0),
        ("pool_mode = statement\ndefault_pool_size = 1", 0),
    ] {
        let pooled = Pooled::start(settings).await;
        // So many wait in the pool.
        pooled.others_are_told(sessions, "SELECT 1").await;
        let refused = pooled.through.try_open("test").await.expect_err(settings);
        assert!(matches!(refused, StoreError::SharedSessions), "{settings}: {refused:?}");
        let says = refused.to_string();
        assert!(says.contains("pool_mode = session") && says.contains("[database] url"), "{says}");

        assert_eq!(pooled.locks().await, 0, "{settings}");
        let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'secretier'";
        assert_eq!(pooled.direct.number(schemas).await, 0, "{settings}");
        if sessions == 6 {
            pooled.others_find_nothing_of_ours().await;
        }
        let direct = pooled.direct.open().await;
        put(&direct, "v").await;
        assert_eq!(stored(&direct, "acme", "K").await.value.expose(), "v", "{settings}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_gives_each_connection_its_session_is_as_good_as_none() {
    let pooled = Pooled::start("pool_mode = session").await;
    let (database, direct) = (pooled.through.open().await, pooled.direct.open().await);
    let (told, mut hears) = mpsc::channel(8);
    let listening = database.listen(move || _ = told.try_send(()));
    let working = async {
        hears.recv().await.unwrap();
        put(&direct, "v").await;
        hears.recv().await.unwrap();
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "v");
        join_all((0..20).map(async |number| {
            let (acme, name) = (tenant("acme"), key(&format!("K{number}")));
            database.put(&acme, &name, &value("v"), &Precondition::None, &writer(), None).await.unwrap();
        }))
        .await;
        assert_eq!(direct.find_all(&tenant("acme")).await.unwrap().secrets.len(), 21);

        let turn = database.migration_lock("behind the pooler").await.unwrap().unwrap();
        let holder = direct.migration_lock("another").await.unwrap().err().expect("it is alone");
        assert_eq!(holder.shown, "behind the pooler");
        database.end_job_lock(turn).await;
        let turn = direct.migration_lock("another").await.unwrap().unwrap();
        direct.end_job_lock(turn).await;
    };
    let both = async {
        tokio::select! {
            ended = listening => panic!("{:?}", ended.err()),
            () = working => {}
        }
    };
    within("all is done", both).await;
    drop(database);
    pooled.others_find_nothing_of_ours().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_process_had_behind_a_pooler_is_free_at_once() {
    let Pooled { direct, through, pooler } = Pooled::start("pool_mode = session").await;
    // What ends with its runtime says nothing to anybody: as a process that is killed.
    let killed = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let had = killed.spawn(async move {
        let database = through.open().await;
        put(&database, "v").await;
        let turn = database.migration_lock("killed").await.unwrap().unwrap();
        (database, turn, through)
    });
    let (database, turn, through) = had.await.unwrap();
    let pooled = Pooled { direct, through, pooler };
    assert_eq!(pooled.locks().await, 1);
    killed.shutdown_background();
    let free = async {
        let next = pooled.direct.open().await;
        let turn = loop {
            match next.migration_lock("next").await.unwrap() {
                Ok(turn) => break turn,
                Err(holder) => assert_eq!(holder.shown, "killed"),
            }
        };
        next.end_job_lock(turn).await;
    };
    within("the pooler takes the lock back", free).await;
    pooled.others_find_nothing_of_ours().await;
    drop((database, turn));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_behind_a_pooler_the_database_is_found_again() {
    let mut server = Postgres::start();
    let pooled = Pooled::start_before(&server, "pool_mode = session\nserver_login_retry = 0").await;
    let database = pooled.through.open().await;
    put(&database, "v").await;
    join_all((0..5).map(|_| stored(&database, "acme", "K"))).await;
    server.restart();
    eventually(async || database.ping().await.is_ok()).await;
    put(&database, "w").await;
    assert_eq!(stored(&database, "acme", "K").await.value.expose(), "w");
}
