//! Many tenants in one transaction, and the phases of all of them in one read: what comes of
//! it is what each by itself would come to.

use std::collections::BTreeMap;

use secretier::{
    clock::Timestamp,
    phase::Phase,
    secret::SecretKey,
    tenant::Tenant,
    tiers::{
        database::{
            Began, Database, Expected, Held, JobLock, Precondition, Refusal, Run, RunKind, Step, StoreOutcome, Switch,
            Taken, TenantState, Told,
        },
        upstream::Snapshot,
    },
};

use crate::backend::{Backend, hand_over, held, key, on_both, own_phases, snapshot, tell, tenant, value, writer};

/// More than the database is asked for by one statement.
const MANY: usize = 1100;

async fn lock_and_run(database: &Database) -> (JobLock, Run) {
    let lock = database.migration_lock("test").await.unwrap().unwrap();
    let run = database.begin_run(&lock, RunKind::Run, "{}", "test", 1).await.unwrap();
    (lock, run)
}

/// Every key of a tenant with its value and version, or why it has none.
async fn content(database: &Database, of: &Tenant) -> BTreeMap<String, String> {
    let listing = database.find_all(of).await.unwrap();
    let told = |(key, held): (SecretKey, Held)| match held {
        Held::Present(stored) => {
            (key.to_string(), format!("{} {} {:?}", stored.value.expose(), stored.version.number(), stored.source))
        }
        other => (key.to_string(), format!("{other:?}")),
    };
    listing.secrets.into_iter().map(told).collect()
}

/// Tenants of every kind that a migration meets, and the folders that are then read of them.
async fn prepared(backend: &Backend, database: &Database) -> Vec<(Tenant, Snapshot, Began, Timestamp)> {
    let first = snapshot(&[("SAME", "1"), ("CHANGED", "1"), ("GONE", "1")]);
    let names =
        ["new", "copied", "owned", "forgotten", "moved", "later", "empty", "own-write", "zero", "denied", "never-seen"];
    for name in ["copied", "forgotten", "later", "empty", "own-write", "denied"] {
        let began = Began { generation: None };
        let at = backend.clock.now();
        let outcome = database.store_snapshot(&tenant(name), &first, began, at, &|_| true).await.unwrap();
        assert!(matches!(outcome, StoreOutcome::Stored { .. }));
    }
    hand_over(database, "owned", Some(Phase::Database)).await;
    tell(database, "forgotten", Told::Copied(&key("CHANGED"), &writer())).await;
    tell(database, "forgotten", Told::Copied(&key("NEVER"), &writer())).await;
    tell(database, "never-seen", Told::Copied(&key("NEVER"), &writer())).await;
    let (of, name, text) = (tenant("own-write"), key("SAME"), value("1"));
    database.put(&of, &name, &text, &Precondition::None, &writer(), None).await.unwrap();
    backend.clock.advance(std::time::Duration::from_secs(1));
    let before = backend.clock.now();
    backend.clock.advance(std::time::Duration::from_secs(1));
    database.deny(&tenant("denied"), backend.clock.now()).await.unwrap();
    let second = [("SAME", "1"), ("CHANGED", "2"), ("NEW", "2")];
    let mut taken = Vec::new();
    // Not in the order of their names, which is what they are stored in.
    for name in names {
        let generation = database.company(&tenant(name)).await.unwrap().map(|company| company.generation);
        let generation = if name == "moved" { Some(7) } else { generation };
        let secrets = if matches!(name, "empty" | "zero") { &[][..] } else { &second[..] };
        let at = if matches!(name, "later" | "denied") { before } else { backend.clock.now() };
        let at = if name == "later" { Timestamp::from_millis(1) } else { at };
        taken.push((tenant(name), snapshot(secrets), Began { generation }, at));
    }
    taken
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_batch_of_folders_makes_is_what_each_by_itself_makes() {
    on_both(async |backend| {
        let together = backend.open().await;
        let folders = prepared(&backend, &together).await;
        let (lock, run) = lock_and_run(&together).await;
        let taken: Vec<Taken<'_>> = folders
            .iter()
            .map(|(tenant, snapshot, began, at)| Taken {
                tenant,
                snapshot,
                began: *began,
                at: *at,
                speaks_for: &|key: &SecretKey| key.as_str() != "NEW",
            })
            .collect();
        let state = |place: usize, company: &secretier::tiers::database::Company| {
            assert_eq!(company.tenant, folders[place].0, "told of each by its place");
            let mut state = TenantState::new(company.tenant.clone(), &run.id, Step::Stored, backend.clock.now());
            state.secrets = place as i64;
            state
        };
        let outcomes = together.store_snapshots(&lock, &taken, &state).await.unwrap();
        together.end_job_lock(lock).await;

        let other = Backend::sqlite();
        let single = other.open().await;
        let alone = prepared(&other, &single).await;
        for ((tenant, snapshot, began, at), outcome) in alone.iter().zip(&outcomes) {
            let speaks_for = |key: &SecretKey| key.as_str() != "NEW";
            let by_itself = single.store_snapshot(tenant, snapshot, *began, *at, &speaks_for).await.unwrap();
            let told = |outcome: &StoreOutcome| match outcome {
                StoreOutcome::Stored { company, secrets } => {
                    let secrets = secrets.iter().map(|current| (current.key.clone(), current.version));
                    let secrets: BTreeMap<_, _> = secrets.collect();
                    Some((company.generation, company.snapshot_whole, company.snapshot_etag.clone(), secrets))
                }
                StoreOutcome::Superseded => None,
            };
            assert_eq!(told(outcome), told(&by_itself), "{tenant}");
            assert_eq!(content(&together, tenant).await, content(&single, tenant).await, "{tenant}");
            for name in ["SAME", "CHANGED", "GONE", "NEVER", "NEW"] {
                let [one, two] = [&together, &single];
                let [one, two] = [held(one, tenant.as_str(), name).await, held(two, tenant.as_str(), name).await];
                assert_eq!(std::mem::discriminant(&one), std::mem::discriminant(&two), "{tenant}/{name}");
            }
        }
        let superseded: Vec<&str> = folders
            .iter()
            .zip(&outcomes)
            .filter(|(_, outcome)| matches!(outcome, StoreOutcome::Superseded))
            .map(|((tenant, ..), _)| tenant.as_str())
            .collect();
        assert_eq!(superseded, ["owned", "moved", "later", "denied"], "and the others are stored beside them");
        let kept = together.migration_states().await.unwrap();
        let kept: BTreeMap<&str, i64> = kept.iter().map(|state| (state.tenant.as_str(), state.secrets)).collect();
        assert_eq!(kept.len(), folders.len() - superseded.len());
        assert_eq!(kept["never-seen"], 10, "each with what is its own");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_tenants_than_one_statement_takes_are_stored_read_back_and_switched_but_for_those_refused() {
    on_both(async |backend| {
        let database = backend.open().await;
        let (lock, run) = lock_and_run(&database).await;
        let tenants: Vec<Tenant> = (0..MANY).map(|number| tenant(&format!("t{number}"))).collect();
        let folders: Vec<Snapshot> =
            (0..MANY).map(|number| snapshot(&[("A", &format!("a{number}")), ("B", &format!("b{number}"))])).collect();
        let taken: Vec<Taken<'_>> = tenants
            .iter()
            .zip(&folders)
            .map(|(tenant, snapshot)| Taken {
                tenant,
                snapshot,
                began: Began { generation: None },
                at: backend.clock.now(),
                speaks_for: &|_: &SecretKey| true,
            })
            .collect();
        let state = |of: &Tenant, step| TenantState::new(of.clone(), &run.id, step, backend.clock.now());
        let outcomes =
            database.store_snapshots(&lock, &taken, &|_, company| state(&company.tenant, Step::Stored)).await.unwrap();
        assert!(outcomes.iter().all(|outcome| matches!(outcome, StoreOutcome::Stored { .. })));

        let listings = database.find_all_of(&tenants).await.unwrap();
        for (number, tenant) in tenants.iter().enumerate() {
            let secrets = &listings[tenant].secrets;
            let value = |place: usize| match &secrets[place].1 {
                Held::Present(stored) => stored.value.expose().to_owned(),
                other => panic!("{other:?}"),
            };
            assert_eq!((secrets.len(), value(0), value(1)), (2, format!("a{number}"), format!("b{number}")));
            assert!(listings[tenant].is_snapshot);
        }

        let companies = database.companies_of(&tenants).await.unwrap();
        // Written to since, being told of a write, and with a secret that was not read back.
        database.put(&tenants[3], &key("A"), &value("x"), &Precondition::None, &writer(), None).await.unwrap();
        let (_, write) = database.begin_upstream_write(&tenants[4], std::time::Duration::from_secs(60)).await.unwrap();
        tell(&database, "t5", Told::Copied(&key("A"), &writer())).await;
        let now = database.companies_of(&tenants[4..6]).await.unwrap();
        let before = database.changes().await.unwrap();
        let switches: Vec<Switch> = tenants
            .iter()
            .map(|tenant| Switch {
                expected: Expected::of_copy(now.get(tenant).unwrap_or(&companies[tenant])),
                to: Some(Phase::Database),
                state: TenantState { switched_at: Some(backend.clock.now()), ..state(tenant, Step::Switched) },
            })
            .collect();
        let refusals = database.switch(&lock, &switches).await.unwrap();
        assert_eq!(refusals[3], Err(Refusal::Changed));
        assert!(matches!(refusals[4], Err(Refusal::WriteUnderWay { .. })), "{:?}", refusals[4]);
        assert_eq!(refusals[5], Err(Refusal::Unverified(vec![key("A")])));
        assert_eq!(refusals.iter().filter(|refusal| refusal.is_ok()).count(), MANY - 3);
        assert!(database.end_upstream_write(&write, Told::Nothing).await.unwrap());
        let switched = database.migration_states().await.unwrap();
        let switched = switched.iter().filter(|state| state.step == Step::Switched).count();
        assert_eq!(switched, MANY - 3, "each with its row, in the same transaction");
        assert_eq!(database.changes().await.unwrap(), before + 1, "one change for all of them");
        assert_eq!(own_phases(&database).await.len(), MANY - 3);
        let (moved, up_to) = database.moved_after(before).await.unwrap();
        assert_eq!((moved.len(), up_to), (MANY - 3, before + 1));
        database.end_job_lock(lock).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_own_phases_are_told_however_many_and_after_that_only_those_that_have_changed() {
    on_both(async |backend| {
        let database = backend.open().await;
        let digits = "(SELECT 0 AS d UNION ALL SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3 UNION ALL SELECT 4 \
                      UNION ALL SELECT 5 UNION ALL SELECT 6 UNION ALL SELECT 7 UNION ALL SELECT 8 UNION ALL SELECT 9)";
        backend
            .sql(&format!(
                "INSERT INTO companies (id, subdomain, phase, phase_change, created_at, updated_at)
                 SELECT 'id-' || n, 't-' || n, CASE WHEN n % 3 = 0 THEN 'hybrid' WHEN n % 3 = 1 THEN 'database' END,
                        0, 0, 0
                 FROM (SELECT a.d * 10000 + b.d * 1000 + c.d * 100 + d.d * 10 + e.d AS n
                       FROM {digits} a, {digits} b, {digits} c, {digits} d, {digits} e) AS numbers
                 WHERE n < 33000"
            ))
            .await;
        let phases: BTreeMap<Tenant, Phase> = own_phases(&database).await.into_iter().collect();
        assert_eq!(phases.len(), 22_000);
        let count = |phase| phases.values().filter(|one| **one == phase).count();
        assert_eq!((count(Phase::Hybrid), count(Phase::Database)), (11_000, 11_000));
        assert_eq!(phases[&tenant("t-32998")], Phase::Database);

        let known = database.own_phases(&mut |_, _| {}).await.unwrap();
        assert_eq!(database.moved_after(known).await.unwrap(), (Vec::new(), known));
        hand_over(&database, "t-32998", Some(Phase::Hybrid)).await;
        hand_over(&database, "t-3", None).await;
        let (mut moved, up_to) = database.moved_after(known).await.unwrap();
        moved.sort_by(|one, other| one.0.cmp(&other.0));
        assert_eq!(moved, [(tenant("t-3"), None), (tenant("t-32998"), Some(Phase::Hybrid))]);
        assert_eq!(up_to, database.changes().await.unwrap());
        assert_eq!(database.moved_after(up_to).await.unwrap(), (Vec::new(), up_to));
    })
    .await;
}
