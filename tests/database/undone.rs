//! Operations that PostgreSQL undoes for the sake of others, or refuses.

use std::time::Duration;

use secretier::{
    clock::Timestamp,
    phase::Phase,
    secret::Version,
    tiers::database::{
        AuditChain, AuditRow, Began, Company, Database, Precondition, Step, StoreError, StoreOutcome, Switch, Taken,
        TenantState, TokenRow, Told, WriteError,
    },
};

use crate::{
    backend::{Backend, hand_over, key, look, phase, snapshot, stored, tenant, value, writer},
    lines::{Lines, logging},
    postgres::{self, Postgres},
    within::{HANGS, eventually, within},
};

async fn put(database: &Database, text: &str) -> Result<Version, WriteError> {
    let written = database.put(&tenant("acme"), &key("K"), &value(text), &Precondition::None, &writer(), None).await;
    written.map(|written| written.version)
}

/// Has the server undo what it does first of each operation: by a deadlock, then because it
/// cannot put it in order with others, and then at its commit.
struct Undoing<'b>(&'b Backend);

impl<'b> Undoing<'b> {
    async fn begin(backend: &'b Backend) -> Self {
        backend
            .sql(
                "CREATE SEQUENCE undone; CREATE SEQUENCE undone_late; \
                 CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN CASE nextval('secretier.undone') \
                 WHEN 1 THEN RAISE 'deadlock detected' USING ERRCODE = '40P01'; \
                 WHEN 2 THEN RAISE 'could not serialize access' USING ERRCODE = '40001'; \
                 ELSE RETURN NULL; END CASE; END $$; \
                 CREATE FUNCTION undo_late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                 IF nextval('secretier.undone_late') = 1 THEN RAISE 'could not serialize access' USING ERRCODE = '40001'; \
                 END IF; RETURN NULL; END $$; \
                 DO $$ DECLARE one text; BEGIN FOR one IN SELECT tablename FROM pg_tables \
                 WHERE schemaname = 'secretier' AND tablename NOT LIKE '\\_%' LOOP \
                 EXECUTE format('CREATE TRIGGER undo AFTER INSERT OR UPDATE OR DELETE ON %I EXECUTE FUNCTION undo()', one); \
                 EXECUTE format('CREATE CONSTRAINT TRIGGER undo_late AFTER INSERT OR UPDATE OR DELETE ON %I \
                 DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION undo_late()', one); END LOOP; END $$",
            )
            .await;
        Self(backend)
    }

    /// Gives what an operation gives that was undone three times.
    async fn all_the_same<T>(&self, operation: impl Future<Output = T>) -> T {
        self.0.sql("SELECT setval('undone', 1, false), setval('undone_late', 1, false)").await;
        let done = operation.await;
        for (sequence, least) in [("undone", 3), ("undone_late", 2)] {
            let begun = self.0.number(&format!("SELECT last_value FROM {{}}{sequence}")).await;
            assert!(begun >= least, "{sequence}: {begun}");
        }
        done
    }
}

fn token(id: &str) -> TokenRow {
    TokenRow {
        id: id.to_owned(),
        name: "ci".to_owned(),
        hash: [7; 32],
        tenants: vec!["acme".to_owned()],
        keys: vec!["*".to_owned()],
        actions: vec!["read".to_owned()],
        expires_at: None,
        created_at: Timestamp::from_millis(0),
        revoked_at: None,
        last_used_at: None,
        replaced_by: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_the_server_undoes_is_done_again_and_once() {
    let backend = Backend::postgres(Postgres::shared()).await;
    let database = backend.open().await;
    let undoing = Undoing::begin(&backend).await;
    let (acme, name, by, none) = (tenant("acme"), key("K"), writer(), Precondition::None);

    assert_eq!(undoing.all_the_same(put(&database, "1")).await.unwrap(), Version::FIRST);
    assert_eq!(undoing.all_the_same(put(&database, "2")).await.unwrap().number(), 2);
    let back = database.rollback(&acme, &name, Version::FIRST, &none, &by, None);
    assert_eq!(undoing.all_the_same(back).await.unwrap().version.number(), 3);
    assert_eq!(stored(&database, "acme", "K").await.value.expose(), "1");
    assert!(undoing.all_the_same(database.delete(&acme, &name, &none, &by, None)).await.unwrap());

    let globex = tenant("globex");
    let (_, write) = undoing.all_the_same(database.begin_upstream_write(&globex, HANGS)).await.unwrap();
    assert!(undoing.all_the_same(database.end_upstream_write(&write, Told::Copied(&name, &by))).await.unwrap());
    assert_eq!(backend.number("SELECT count(*) FROM {}upstream_writes").await, 0);
    let began = Began { generation: database.company(&globex).await.unwrap().map(|company| company.generation) };
    let (folder, now) = (snapshot(&[("K", "v")]), backend.clock.now());
    let kept = undoing.all_the_same(database.store_snapshot(&globex, &folder, began, now, &|_| true)).await;
    assert!(matches!(kept.unwrap(), StoreOutcome::Stored { .. }));
    undoing.all_the_same(hand_over(&database, "globex", Some(Phase::Hybrid))).await;
    assert_eq!(phase(&database, "globex").await, Some(Phase::Hybrid));

    undoing.all_the_same(database.insert_token(&token("1"))).await.unwrap();
    let second = TokenRow { hash: [8; 32], ..token("2") };
    let rotated = database.rotate_token("1", Some(backend.clock.now()), &second);
    assert!(undoing.all_the_same(rotated).await.unwrap());
    assert_eq!(undoing.all_the_same(database.revoke_token("ci")).await.unwrap(), 2);

    let lease = undoing.all_the_same(database.lease("work", "a test", HANGS)).await.unwrap().unwrap();
    assert!(undoing.all_the_same(database.keep_lease(&lease)).await.unwrap());
    undoing.all_the_same(database.end_lease(&lease)).await.unwrap();
    assert_eq!(database.lease_holder("work").await.unwrap(), None);

    let link = |mut chains: Vec<AuditChain>, _: Vec<&'static str>, _| {
        let end = &mut chains[0];
        end.seq += 1;
        (vec![record(end.seq)], chains)
    };
    undoing.all_the_same(database.append_audit(&["lookup"], &[], None, link)).await.unwrap();
    assert_eq!(backend.number("SELECT count(*) FROM {}audit_records").await, 1);
    assert_eq!(database.audit_chains().await.unwrap().iter().map(|chain| chain.seq).max(), Some(1));

    let lock = undoing.all_the_same(database.migration_lock("a test")).await.unwrap().unwrap();
    let state = |_: usize, company: &Company| TenantState::new(company.tenant.clone(), "run", Step::Stored, now);
    let initech = tenant("initech");
    let taken = [Taken {
        tenant: &initech,
        snapshot: &folder,
        began: Began { generation: None },
        at: now,
        speaks_for: &|_| true,
    }];
    let kept = undoing.all_the_same(database.store_snapshots(&lock, &taken, &state)).await.unwrap();
    assert!(matches!(kept[..], [StoreOutcome::Stored { .. }]));
    let expected = look(&database, "initech").await;
    let state = TenantState::new(initech, "run", Step::Switched, now);
    let switches = [Switch { expected, to: Some(Phase::Database), state }];
    assert_eq!(undoing.all_the_same(database.switch(&lock, &switches)).await.unwrap(), [Ok(())]);
    database.end_job_lock(lock).await;
    assert!(database.is_up());
    assert!(backend.metrics.render().contains("outcome=\"undone\""));
}

fn record(seq: i64) -> AuditRow {
    AuditRow {
        chain: "lookup".to_owned(),
        seq,
        first_at: 0,
        at: 0,
        count: 1,
        actor_id: None,
        actor_name: None,
        action: "read".to_owned(),
        tenant: None,
        key: None,
        outcome: "ok".to_owned(),
        tier: None,
        detail: String::new(),
        hash: [1; 32],
        signature: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_ends_in_a_deadlock_is_done_once_the_other_is_through() {
    let backend = Backend::postgres(Postgres::shared()).await;
    backend.set_defaults(&[("deadlock_timeout", "10ms")]).await;
    let database = backend.open().await;
    put(&database, "1").await.unwrap();
    backend
        .sql(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_xact_lock(1); \
             RETURN NULL; END $$; CREATE TRIGGER wait AFTER INSERT ON company_secrets EXECUTE FUNCTION wait()",
        )
        .await;
    let waits = |lock: &'static str| {
        let backend = &backend;
        eventually(async move || {
            let waiting = format!(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                 AND wait_event_type = 'Lock' AND wait_event = '{lock}'"
            );
            backend.number(&waiting).await == 1
        })
    };
    let gate = postgres::session(backend.url(), "SELECT pg_advisory_lock(1)").await;
    let other = "SET deadlock_timeout TO '1h'; SET search_path TO secretier; BEGIN; \
                 UPDATE counters SET value = value WHERE name = 'changes'";
    let other = postgres::session(backend.url(), other).await;
    let writing = put(&database, "2");
    let crossing = async {
        // It has the tenant, and is kept from the counter, which the other has.
        waits("advisory").await;
        let wants = other.batch_execute("UPDATE companies SET updated_at = updated_at WHERE subdomain = 'acme'");
        let opens = async {
            waits("transactionid").await;
            gate.batch_execute("SELECT pg_advisory_unlock(1)").await.unwrap();
        };
        let (had, ()) = tokio::join!(wants, opens);
        had.expect("the write gives way");
        other.batch_execute("COMMIT").await.unwrap();
    };
    let (written, ()) = tokio::join!(writing, crossing);
    assert_eq!(written.unwrap().number(), 2);
    assert!(backend.metrics.render().contains("secretier_database_calls_total{call=\"put\",outcome=\"undone\"} 1"));
}

/// Has each write of a secret end with this error of the server, which takes its time.
async fn refuse(backend: &Backend, sqlstate: &str, says: &str, after: f32) {
    let refuse = format!(
        "CREATE SEQUENCE IF NOT EXISTS refused; SELECT setval('refused', 1, false); \
         CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
         PERFORM nextval('secretier.refused'); PERFORM pg_sleep({after}); \
         RAISE '{says}' USING ERRCODE = '{sqlstate}', DETAIL = 'a f00d of details'; \
         END $$; CREATE OR REPLACE TRIGGER refuse AFTER INSERT ON company_secrets EXECUTE FUNCTION refuse()"
    );
    backend.sql(&refuse).await;
}

#[test]
fn what_the_server_does_not_do_is_in_the_log_by_operation_and_sqlstate_and_without_values() {
    let lines = Lines::default();
    logging(&lines, async {
        let backend = Backend::postgres(Postgres::shared()).await;
        backend.open().await;
        let tries = async || backend.number("SELECT last_value FROM {}refused").await;
        let ends_in = async |sqlstate: &str, says: &str| {
            refuse(&backend, sqlstate, says, 0.0).await;
            // Each has its own log of what was said lately.
            let database = backend.open().await;
            let error = put(&database, "a f00d of a value").await.expect_err(sqlstate);
            let WriteError::Store(error) = error else { panic!("{error:?}") };
            let told = format!("call=\"put\" sqlstate=\"{sqlstate}\"");
            assert!(lines.text().contains(&told), "{told}: {}", lines.text());
            assert!(error.is_outage() || database.is_up());
            error
        };
        let undone = ends_in("40P01", "deadlock detected").await;
        assert!(matches!(undone, StoreError::Undone { .. }) && undone.retry_after().is_some(), "{undone:?}");
        assert!((2..=10).contains(&tries().await), "again, and not for ever");
        assert!(matches!(ends_in("42501", "permission denied for table company_secrets").await, StoreError::Broken(_)));
        assert_eq!(tries().await, 1);
        assert!(matches!(ends_in("23514", "a row violates a check constraint").await, StoreError::Broken(_)));
        assert!(ends_in("57014", "canceling statement due to user request").await.is_outage());
        assert!(ends_in("55P03", "canceling statement due to lock timeout").await.is_outage());
    });
    let lines = lines.text();
    assert!(lines.lines().filter(|line| line.contains("sqlstate")).all(|line| line.contains("WARN")), "{lines}");
    assert!(!lines.contains("f00d"), "{lines}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_is_done_again_only_within_its_time() {
    let mut backend = Backend::postgres(Postgres::shared()).await;
    backend.open().await;
    refuse(&backend, "40001", "could not serialize access", 0.4).await;
    backend.config.timeout = Duration::from_secs(1);
    let database = backend.open().await;
    let ended = within("it ends", put(&database, "v")).await;
    assert!(ended.is_err());
    let tries = backend.number("SELECT last_value FROM {}refused").await;
    assert!(tries <= 3, "{tries}");
}
