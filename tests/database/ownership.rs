//! A tenant changes hands: only when no write is under way, and when nothing has changed.

use std::time::Duration;

use secretier::{
    phase::Phase,
    secret::Version,
    tiers::database::{Began, Company, Database, Expected, Precondition, Refusal, StoreOutcome, Told, WriteError},
};

use crate::{
    backend::{
        Backend, hand_over, held, key, look, on_both, own_phases, snapshot, stored, tell, tenant, try_hand_over, value,
        writer,
    },
    postgres::Postgres,
    within::within,
};

/// How long upstream is waited for.
const LASTS: Duration = Duration::from_secs(12);
const DATABASE: Option<Phase> = Some(Phase::Database);
const HYBRID: Option<Phase> = Some(Phase::Hybrid);

async fn store(backend: &Backend, database: &Database, secrets: &[(&str, &str)]) {
    let company = database.company(&tenant("acme")).await.unwrap();
    let began = Began { generation: company.map(|company| company.generation) };
    let (acme, snapshot) = (tenant("acme"), snapshot(secrets));
    let outcome = database.store_snapshot(&acme, &snapshot, began, backend.clock.now(), &|_| true).await.unwrap();
    assert!(matches!(outcome, StoreOutcome::Stored { .. }));
}

async fn company(database: &Database) -> Company {
    database.company(&tenant("acme")).await.unwrap().unwrap()
}

async fn put(database: &Database, text: &str, owned_in: Option<Phase>) {
    database.put(&tenant("acme"), &key("K"), &value(text), &Precondition::None, &writer(), owned_in).await.unwrap();
}

async fn registered(backend: &Backend) -> i64 {
    backend.number("SELECT count(*) FROM {}upstream_writes").await
}

/// Everything that a change of hands may touch.
async fn traces(backend: &Backend) -> [i64; 4] {
    let of = async |sql: &str| backend.number(sql).await;
    [
        of("SELECT count(*) FROM {}companies").await,
        of("SELECT CAST(coalesce(sum(generation), 0) AS BIGINT) FROM {}companies").await,
        of("SELECT CAST(coalesce(sum(updated_at + coalesce(snapshot_at, 0)), 0) AS BIGINT) FROM {}companies").await,
        of("SELECT value FROM {}counters WHERE name = 'changes'").await,
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_does_not_change_hands_while_upstream_is_told_of_a_write() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        store(&backend, &database, &[("K", "1")]).await;
        let (company, write) = database.begin_upstream_write(&tenant("acme"), LASTS).await.unwrap();
        assert_eq!(company, Some(self::company(&database).await));
        let (_, beside) = other.begin_upstream_write(&tenant("acme"), 2 * LASTS).await.unwrap();
        let before = traces(&backend).await;
        backend.clock.advance(Duration::from_secs(1));
        let Err(Refusal::WriteUnderWay { until }) = try_hand_over(&other, "acme", DATABASE).await else {
            panic!("a write is under way");
        };
        assert!(until > backend.clock.now().plus(LASTS), "the time of the last");
        assert_eq!(traces(&backend).await, before, "a refusal changes nothing");
        assert!(try_hand_over(&other, "globex", DATABASE).await.is_ok(), "another tenant's is no matter");

        assert!(other.end_upstream_write(&beside, Told::Nothing).await.unwrap());
        let refused = try_hand_over(&other, "acme", DATABASE).await;
        assert!(matches!(refused, Err(Refusal::WriteUnderWay { .. })), "one is left: {refused:?}");
        assert!(database.end_upstream_write(&write, Told::Nothing).await.unwrap());
        hand_over(&other, "acme", DATABASE).await;
        assert_eq!(registered(&backend).await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_ended_since_the_look_is_noticed() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        for told in [Told::Nothing, Told::Uncopied(&key("OTHER")), Told::Copied(&key("K"), &writer())] {
            store(&backend, &database, &[("K", "1")]).await;
            let before = look(&database, "acme").await;
            let (_, write) = other.begin_upstream_write(&tenant("acme"), LASTS).await.unwrap();
            // A look after its begin is one before its end.
            let between = look(&database, "acme").await;
            assert!(other.end_upstream_write(&write, told).await.unwrap());
            for expected in [before, between] {
                for to in [DATABASE, HYBRID, None] {
                    let refused = database.hand_over(&tenant("acme"), expected, to).await.unwrap();
                    assert_eq!(refused, Err(Refusal::Changed));
                }
            }
        }
        store(&backend, &database, &[("K", "1")]).await;
        hand_over(&database, "acme", DATABASE).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_was_never_ended_ends_by_itself_and_is_cleared_away() {
    on_both(async |backend| {
        let database = backend.open().await;
        let (_, lost) = database.begin_upstream_write(&tenant("acme"), LASTS).await.unwrap();
        drop(lost);
        let Err(Refusal::WriteUnderWay { until }) = try_hand_over(&database, "acme", DATABASE).await else {
            panic!("a write is under way");
        };
        backend.clock.advance(until.since(backend.clock.now()));
        hand_over(&database, "acme", DATABASE).await;
        // It tells that copies from before may not have what it made, for as long as there can be any.
        backend.clock.advance(Duration::from_secs(6 * 24 * 60 * 60));
        tell(&database, "globex", Told::Nothing).await;
        assert_eq!(registered(&backend).await, 1);
        backend.clock.advance(Duration::from_secs(24 * 60 * 60));
        tell(&database, "globex", Told::Nothing).await;
        assert_eq!(registered(&backend).await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_outlasted_its_registration_is_told_so() {
    on_both(async |backend| {
        let (database, acme) = (backend.open().await, tenant("acme"));
        store(&backend, &database, &[("K", "1")]).await;
        for back in [false, true] {
            let (_, write) = database.begin_upstream_write(&acme, LASTS).await.unwrap();
            backend.clock.advance(LASTS + backend.config.timeout + Duration::from_secs(1));
            hand_over(&database, "acme", DATABASE).await;
            if back {
                hand_over(&database, "acme", None).await;
            }
            assert!(!database.end_upstream_write(&write, Told::Copied(&key("K"), &writer())).await.unwrap());
            // What the database owns by then is not forgotten.
            let forgotten = backend.number("SELECT count(*) FROM {}company_secrets WHERE source = 'forgotten'").await;
            assert_eq!(forgotten, i64::from(back));
            hand_over(&database, "acme", None).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_chose_its_owner_before_the_switch_is_told_so_and_changes_nothing() {
    on_both(async |backend| {
        let (database, acme, name) = (backend.open().await, tenant("acme"), key("K"));
        hand_over(&database, "acme", DATABASE).await;
        put(&database, "one", DATABASE).await;
        put(&database, "two", DATABASE).await;
        hand_over(&database, "acme", HYBRID).await;
        let before = traces(&backend).await;
        // Also where the condition does not hold: that is for the owner to say.
        for condition in [Precondition::None, Precondition::IfMatchAny, Precondition::IfNoneMatchAny] {
            for owned_in in [DATABASE, None] {
                let refusals = [
                    database.put(&acme, &name, &value("x"), &condition, &writer(), owned_in).await.map(|_| ()),
                    database.delete(&acme, &name, &condition, &writer(), owned_in).await.map(|_| ()),
                    database.rollback(&acme, &name, Version::FIRST, &condition, &writer(), owned_in).await.map(|_| ()),
                ];
                for refused in refusals {
                    assert!(matches!(refused, Err(WriteError::Moved)), "{condition:?}, {owned_in:?}: {refused:?}");
                }
            }
        }
        assert_eq!(traces(&backend).await, before);
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "two");

        let (nobody, new) = (tenant("nobody"), value("x"));
        let made_up = database.put(&nobody, &name, &new, &Precondition::None, &writer(), DATABASE).await;
        assert!(matches!(made_up, Err(WriteError::Moved)));
        assert_eq!(traces(&backend).await, before, "and leaves no tenant");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_does_not_become_the_owner_of_what_was_not_read_back() {
    on_both(async |backend| {
        let database = backend.open().await;
        store(&backend, &database, &[("K", "1"), ("L", "1"), ("M", "1")]).await;
        for name in ["M", "K"] {
            tell(&database, "acme", Told::Copied(&key(name), &writer())).await;
        }
        let before = traces(&backend).await;
        let refused = try_hand_over(&database, "acme", DATABASE).await;
        assert_eq!(refused, Err(Refusal::Unverified(vec![key("K"), key("M")])));
        assert_eq!(traces(&backend).await, before);
        hand_over(&database, "acme", HYBRID).await;
        store(&backend, &database, &[("K", "2"), ("L", "1")]).await;
        hand_over(&database, "acme", DATABASE).await;
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "2");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_looked_before_another_phase_or_another_life_looks_again() {
    on_both(async |backend| {
        let database = backend.open().await;
        store(&backend, &database, &[("K", "1")]).await;
        let early = look(&database, "acme").await;
        let other_phase = Expected { phase: HYBRID, ..early };
        assert_eq!(database.hand_over(&tenant("acme"), other_phase, DATABASE).await.unwrap(), Err(Refusal::Changed));
        hand_over(&database, "acme", HYBRID).await;
        assert_eq!(database.hand_over(&tenant("acme"), early, DATABASE).await.unwrap(), Err(Refusal::Changed));
        let early = look(&database, "acme").await;
        database.shred(&tenant("acme")).await.unwrap().unwrap();
        assert_eq!(database.hand_over(&tenant("acme"), early, DATABASE).await.unwrap(), Err(Refusal::Changed));
        hand_over(&database, "acme", DATABASE).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_hands_is_counted_and_refuses_the_fills_under_way() {
    on_both(async |backend| {
        let (database, acme) = (backend.open().await, tenant("acme"));
        for to in [HYBRID, Some(Phase::Infisical), None] {
            store(&backend, &database, &[("K", "1")]).await;
            let (expected, before) = (look(&database, "acme").await, database.changes().await.unwrap());
            let change = database.hand_over(&acme, expected, to).await.unwrap().unwrap();
            assert_eq!((change, database.changes().await.unwrap()), (before + 1, before + 1));
            let (late, began) = (snapshot(&[("K", "old")]), Began { generation: Some(expected.generation) });
            let outcome = database.store_snapshot(&acme, &late, began, backend.clock.now(), &|_| true).await.unwrap();
            assert!(matches!(outcome, StoreOutcome::Superseded));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_goes_on_in_phase_hybrid_where_nothing_but_upstream_made_it() {
    on_both(async |backend| {
        let (database, acme) = (backend.open().await, tenant("acme"));
        let proof = async || {
            let company = company(&database).await;
            (company.snapshot_at.is_some(), company.snapshot_whole, company.snapshot_etag.is_some())
        };
        let nothing = (false, false, false);
        store(&backend, &database, &[("K", "1")]).await;
        hand_over(&database, "acme", HYBRID).await;
        assert_eq!(proof().await, (true, true, true));

        // The database has a secret of its own, or has deleted one.
        put(&database, "own", HYBRID).await;
        hand_over(&database, "acme", HYBRID).await;
        assert_eq!(proof().await, nothing);
        store(&backend, &database, &[("K", "1")]).await;
        assert!(database.delete(&acme, &key("K"), &Precondition::None, &writer(), HYBRID).await.unwrap());
        hand_over(&database, "acme", HYBRID).await;
        assert_eq!(proof().await, nothing);

        // One was written upstream that the copy was to leave alone.
        store(&backend, &database, &[("K", "1")]).await;
        tell(&database, "acme", Told::Uncopied(&key("OTHER"))).await;
        hand_over(&database, "acme", HYBRID).await;
        assert_eq!(proof().await, nothing);

        // From the database the copy goes on, and its validator does not.
        store(&backend, &database, &[("K", "1")]).await;
        backend.sql("UPDATE companies SET phase = 'database'").await;
        hand_over(&database, "acme", HYBRID).await;
        assert_eq!(proof().await, (true, true, false));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_without_a_row_changes_hands_too_and_not_while_it_is_written() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        let unknown = look(&database, "acme").await;
        assert_eq!(unknown, Expected::of(None));
        let (company, write) = other.begin_upstream_write(&tenant("acme"), LASTS).await.unwrap();
        assert_eq!((company, traces(&backend).await), (None, [0; 4]), "no row is made for it");
        for made in [false, true] {
            if made {
                store(&backend, &database, &[("K", "1")]).await;
            }
            let before = traces(&backend).await;
            let refused = database.hand_over(&tenant("acme"), unknown, DATABASE).await.unwrap();
            assert!(matches!(refused, Err(Refusal::WriteUnderWay { .. })), "{made}: {refused:?}");
            assert_eq!(traces(&backend).await, before);
        }
        assert!(other.end_upstream_write(&write, Told::Copied(&key("K"), &writer())).await.unwrap());
        assert_eq!(database.hand_over(&tenant("acme"), unknown, DATABASE).await.unwrap(), Err(Refusal::Changed));

        // Nor is one that left no copy forgotten.
        tell(&other, "globex", Told::Uncopied(&key("OTHER"))).await;
        assert_eq!(database.hand_over(&tenant("globex"), unknown, DATABASE).await.unwrap(), Err(Refusal::Changed));
        tell(&other, "umbrella", Told::Nothing).await;
        assert!(database.hand_over(&tenant("umbrella"), unknown, DATABASE).await.unwrap().is_ok());
        assert_eq!(own_phases(&database).await, [(tenant("umbrella"), Phase::Database)]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_is_shredded_while_upstream_is_told_of_a_write() {
    on_both(async |backend| {
        let database = backend.open().await;
        store(&backend, &database, &[("K", "1"), ("L", "1")]).await;
        let (_, write) = database.begin_upstream_write(&tenant("acme"), LASTS).await.unwrap();
        database.shred(&tenant("acme")).await.unwrap().unwrap();
        let refused = try_hand_over(&database, "acme", DATABASE).await;
        assert!(matches!(refused, Err(Refusal::WriteUnderWay { .. })), "{refused:?}");
        assert!(database.end_upstream_write(&write, Told::Copied(&key("K"), &writer())).await.unwrap());
        assert!(matches!(held(&database, "acme", "K").await, secretier::tiers::database::Held::Unknown));
        store(&backend, &database, &[("K", "2")]).await;
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "2");
    })
    .await;
}

/// On SQLite nobody else writes between a transaction's begin and its end.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_waits_for_the_switch_that_is_just_making_the_tenants_row() {
    let backend = Backend::postgres(Postgres::shared()).await;
    let database = backend.open().await;
    // What a change of hands does, slowly: it has found no registration by the time it sleeps.
    let switching = backend.sql(
        "BEGIN; \
         INSERT INTO companies (id, subdomain, phase, created_at, updated_at) VALUES ('id', 'acme', 'database', 0, 0); \
         SELECT pg_sleep(1); \
         COMMIT",
    );
    let writing = async {
        asleep(&backend).await;
        database.begin_upstream_write(&tenant("acme"), LASTS).await.unwrap()
    };
    let (_, (company, write)) = tokio::join!(switching, writing);
    assert_eq!(company.and_then(|company| company.phase), DATABASE);
    assert!(database.end_upstream_write(&write, Told::Nothing).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_waits_for_the_write_that_is_just_registered_for_a_tenant_without_a_row() {
    let backend = Backend::postgres(Postgres::shared()).await;
    let database = backend.open().await;
    // What a write does as it begins, slowly.
    let registering = backend.sql(
        "BEGIN; \
         INSERT INTO companies (id, subdomain, created_at, updated_at) VALUES ('id', 'acme', 0, 0); \
         DELETE FROM companies WHERE id = 'id'; \
         SELECT pg_sleep(1); \
         INSERT INTO upstream_writes (id, subdomain, until) VALUES ('id', 'acme', 9000000000000); \
         COMMIT",
    );
    let switching = async {
        asleep(&backend).await;
        try_hand_over(&database, "acme", DATABASE).await
    };
    let (_, refused) = tokio::join!(registering, switching);
    assert!(matches!(refused, Err(Refusal::WriteUnderWay { .. })), "{refused:?}");
    assert_eq!(traces(&backend).await, [0; 4]);
}

/// Waits until the transaction that sleeps does so.
async fn asleep(backend: &Backend) {
    let sleeping =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";
    let falling_asleep = async {
        while backend.number(sleeping).await == 0 {
            tokio::task::yield_now().await;
        }
    };
    within("the transaction sleeps", falling_asleep).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_takes_the_place_of_the_one_that_was_compared_is_not_switched() {
    on_both(async |backend| {
        let (database, acme) = (backend.open().await, tenant("acme"));
        store(&backend, &database, &[("K", "2")]).await;
        let compared = Expected::of_copy(&company(&database).await);
        // It was asked for later, and told of what was there before; a fill counts for no change.
        backend.clock.advance(Duration::from_secs(1));
        store(&backend, &database, &[("K", "1")]).await;
        assert_eq!(database.hand_over(&acme, compared, DATABASE).await.unwrap(), Err(Refusal::Changed));
        let compared = Expected::of_copy(&company(&database).await);
        assert!(database.hand_over(&acme, compared, DATABASE).await.unwrap().is_ok());
    })
    .await;
}
