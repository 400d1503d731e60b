//! Everything at once, on PostgreSQL: who locks rows in another order than others ends in a
//! deadlock there. On SQLite one writes at a time.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use secretier::{
    clock::Timestamp,
    phase::Phase,
    sealing::{KeyRing, MasterKey},
    secret::{Version, Writer},
    tenant::Tenant,
    tiers::{
        database::{
            Began, Company, Database, Expected, Held, Import, JobLock, Precondition, RotationState, Step, Switch,
            Taken, TenantState, Told, WriteError,
        },
        upstream::{Snapshot, UpstreamSecret},
    },
};

use crate::{
    backend::{Backend, key, tenant, value, writer},
    postgres::Postgres,
    within::HANGS,
};

const TENANTS: usize = 12;
/// The last ones are shredded all the while, which loses what was written.
const SHREDDED: usize = 3;
/// An even number: the last thing that each writer does is a deletion.
const WRITES: usize = 2;
/// Longer than the test takes, and than PostgreSQL waits before it looks for a deadlock.
const LASTS: Duration = Duration::from_secs(60);

/// What upstream has of each tenant.
type World = Mutex<HashMap<Tenant, BTreeMap<String, String>>>;

struct Everything {
    database: [Database; 2],
    /// One that migrates, one that rotates: what they do at once is more than either would.
    locks: [JobLock; 2],
    world: World,
    tenants: Vec<Tenant>,
    moved: AtomicUsize,
    over: AtomicBool,
}

impl Everything {
    /// Does it again and again until the last writer is done, and twice after that: whoever
    /// was slow has taken part all the same, and tenants have moved whatever was in the way.
    async fn meanwhile(&self, work: impl AsyncFn(usize)) {
        let (mut round, mut after) = (0, 0);
        let began = Instant::now();
        while after < 2 {
            assert!(began.elapsed() < 5 * HANGS, "the writers are not done");
            after += usize::from(self.over.load(Ordering::Relaxed));
            work(round).await;
            round += 1;
            tokio::task::yield_now().await;
        }
    }

    fn upstream(&self, tenant: &Tenant) -> BTreeMap<String, String> {
        self.world.lock().unwrap().get(tenant).cloned().unwrap_or_default()
    }

    fn tell(&self, tenant: &Tenant, name: &str, text: Option<&str>) {
        let mut world = self.world.lock().unwrap();
        let folder = world.entry(tenant.clone()).or_default();
        match text {
            Some(text) => folder.insert(name.to_owned(), text.to_owned()),
            None => folder.remove(name),
        };
    }

    fn snapshot(&self, tenant: &Tenant) -> Snapshot {
        let secret = |(name, text): (String, String)| UpstreamSecret {
            key: key(&name),
            value: value(&text),
            text: None,
            version: Version::FIRST,
            updated_at: None,
        };
        Snapshot { secrets: self.upstream(tenant).into_iter().map(secret).collect(), ..Snapshot::default() }
    }

    /// Writes, or deletes, at whoever owns the tenant.
    async fn write(&self, database: &Database, tenant: &Tenant, name: &str, text: Option<&str>) {
        let (key, writer) = (key(name), writer());
        loop {
            let own = database.company(tenant).await.unwrap().and_then(|company| company.phase);
            if own == Some(Phase::Database) {
                let condition = Precondition::None;
                let done = match text {
                    Some(text) => database.put(tenant, &key, &value(text), &condition, &writer, own).await.map(drop),
                    None => database.delete(tenant, &key, &condition, &writer, own).await.map(drop),
                };
                match done {
                    Ok(()) => return,
                    Err(WriteError::Moved) => continue,
                    Err(error) => panic!("{error:?}"),
                }
            }
            let (company, write) = database.begin_upstream_write(tenant, LASTS).await.unwrap();
            if company.and_then(|company| company.phase) != own {
                database.end_upstream_write(&write, Told::Nothing).await.unwrap();
                continue;
            }
            tokio::task::yield_now().await;
            self.tell(tenant, name, text);
            assert!(database.end_upstream_write(&write, Told::Copied(&key, &writer)).await.unwrap());
            return;
        }
    }

    /// Gives tenants to the database, as a migration does, or back to upstream.
    async fn move_all(&self, database: &Database, tenants: &[Tenant], to: Phase) {
        let companies = database.companies_of(tenants).await.unwrap();
        let generation = |tenant| companies.get(tenant).map(|company: &Company| company.generation);
        let state =
            |tenant: &Tenant| TenantState::new(tenant.clone(), "run", Step::Switched, Timestamp::from_millis(0));
        if to == Phase::Database {
            let snapshots: Vec<Snapshot> = tenants.iter().map(|tenant| self.snapshot(tenant)).collect();
            let taken = tenants.iter().zip(&snapshots).map(|(tenant, snapshot)| Taken {
                tenant,
                snapshot,
                began: Began { generation: generation(tenant) },
                at: Timestamp::from_millis(0),
                speaks_for: &|_| true,
            });
            let taken: Vec<Taken<'_>> = taken.collect();
            database.store_snapshots(&self.locks[0], &taken, &|_, company| state(&company.tenant)).await.unwrap();
        } else {
            for tenant in tenants {
                if companies.get(tenant).and_then(|company| company.phase) != Some(Phase::Database) {
                    continue;
                }
                let listing = database.find_all(tenant).await.unwrap();
                let held = listing.secrets.into_iter().map(|(key, held)| match held {
                    Held::Present(stored) => (key.as_str().to_owned(), stored.value.expose().to_owned()),
                    other => panic!("{tenant}/{key}: {other:?}"),
                });
                let listed: BTreeMap<String, String> = held.collect();
                // Nobody else tells upstream while the database is the owner.
                if listing.company.is_some_and(|company| company.phase == Some(Phase::Database)) {
                    self.world.lock().unwrap().insert(tenant.clone(), listed);
                }
            }
        }
        let switches: Vec<Switch> = tenants
            .iter()
            .filter(|tenant| companies.get(*tenant).and_then(|company| company.phase) != Some(to))
            .map(|tenant| Switch { expected: Expected::of(companies.get(tenant)), to: Some(to), state: state(tenant) })
            .collect();
        let outcomes = database.switch(&self.locks[0], &switches).await.unwrap();
        self.moved.fetch_add(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), Ordering::Relaxed);
    }

    fn backwards(&self) -> Vec<Tenant> {
        self.tenants.iter().rev().cloned().collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_all_that_locks_tenants_nothing_waits_for_another_for_ever_and_no_write_is_lost() {
    let mut backend = Backend::postgres(Postgres::shared()).await;
    backend.config.pool_size = 30;
    let masters = [MasterKey::generate().unwrap(), MasterKey::generate().unwrap()];
    backend.ring = Arc::new(KeyRing::new(masters.to_vec()));
    let database = [backend.open().await, backend.open().await];
    let locks = [
        database[0].migration_lock("a test").await.unwrap().unwrap(),
        database[0].rotation_lock("a test").await.unwrap().unwrap(),
    ];
    let all = Everything {
        database,
        locks,
        world: World::default(),
        tenants: (0..TENANTS).map(|number| tenant(&format!("t{number:02}"))).collect(),
        moved: AtomicUsize::new(0),
        over: AtomicBool::new(false),
    };
    let all = &all;
    let [here, there] = &all.database;
    let [migration, rotation] = &all.locks;
    // Each has a data key, and the rows of these are in no order of the tenants' names.
    for tenant in all.backwards() {
        for name in ["K", "D"] {
            here.put(&tenant, &key(name), &value("0"), &Precondition::None, &writer(), None).await.unwrap();
            all.tell(&tenant, name, Some("0"));
        }
    }
    let writers = all.tenants.iter().map(async |tenant| {
        for number in 1..=WRITES {
            let database = if number % 2 == 0 { here } else { there };
            all.write(database, tenant, "K", Some(&number.to_string())).await;
            let text = number.to_string();
            all.write(database, tenant, "D", Some(&*text).filter(|_| number % 2 == 1)).await;
        }
    });
    let writing = async {
        join_all(writers).await;
        all.over.store(true, Ordering::Relaxed);
    };
    let moving = all.meanwhile(async |round| {
        all.move_all(here, &all.tenants, if round % 2 == 0 { Phase::Database } else { Phase::Hybrid }).await;
    });
    // What stores nothing locks what it looks at all the same.
    let looking = all.meanwhile(async |_| {
        let (tenants, nothing) = (all.backwards(), Snapshot::default());
        let late = |tenant| Taken {
            tenant,
            snapshot: &nothing,
            began: Began { generation: Some(i64::MAX) },
            at: Timestamp::from_millis(0),
            speaks_for: &|_| true,
        };
        let taken: Vec<Taken<'_>> = tenants.iter().map(late).collect();
        there.store_snapshots(migration, &taken, &|_, _| unreachable!("nothing is stored")).await.unwrap();
    });
    let importing = all.meanwhile(async |round| {
        let secrets = [UpstreamSecret {
            key: key("IMPORTED"),
            value: value(&round.to_string()),
            text: None,
            version: Version::FIRST,
            updated_at: None,
        }];
        // Tenants that nobody else writes to: what they take, they take as the owner.
        let names: Vec<Tenant> = (0..TENANTS).rev().map(|number| tenant(&format!("import{number:02}"))).collect();
        let import = |tenant| Import { tenant, secrets: &secrets, owned_in: None, overwrite: true };
        let imports: Vec<Import<'_>> = names.iter().map(import).collect();
        let state = |_: usize, company: &Company| {
            TenantState::new(company.tenant.clone(), "run", Step::Verified, Timestamp::from_millis(0))
        };
        there.import(migration, &imports, &Writer::new("import"), &state).await.unwrap();
    });
    let wrapping = all.meanwhile(async |round| {
        let mut after = None;
        loop {
            let wrapped = here.rewrap(rotation, &masters[round % 2], after.as_deref()).await.unwrap();
            assert!(wrapped.failed.is_empty());
            let Some(last) = wrapped.after else { break };
            after = Some(last);
        }
    });
    let renewing = all.meanwhile(async |round| {
        let tenant = &all.tenants[round % TENANTS];
        assert_eq!(there.renew_data_key(rotation, tenant, backend.clock.now()).await.unwrap().failed, 0);
    });
    let spreading = all.meanwhile(async |_| {
        let state = RotationState {
            replaces: None,
            key: None,
            data_keys: false,
            started_at: 0,
            spread: true,
            renews_before: None,
            by: "test".to_owned(),
        };
        here.spread_rotation(rotation, &state).await.unwrap();
        there.announce_master_key(rotation).await.unwrap();
        there.end_rotation(rotation).await.unwrap();
    });
    let shredding = all.meanwhile(async |round| {
        there.shred(&all.tenants[TENANTS - 1 - round % SHREDDED]).await.unwrap();
    });
    let asking_for_nobody = all.meanwhile(async |round| {
        let nobody = tenant(if round % 3 == 0 { "nobody" } else { "noone" });
        let database = &all.database[round % 2];
        let (company, write) = database.begin_upstream_write(&nobody, LASTS).await.unwrap();
        assert_eq!(company, None);
        assert!(database.end_upstream_write(&write, Told::Nothing).await.unwrap());
        let condition = Precondition::None;
        assert!(!database.delete(&nobody, &key("K"), &condition, &writer(), None).await.unwrap());
    });
    let sweeping = all.meanwhile(async |_| while here.sweep_versions().await.unwrap() {});
    tokio::join!(
        writing,
        moving,
        looking,
        importing,
        wrapping,
        renewing,
        spreading,
        shredding,
        asking_for_nobody,
        sweeping,
    );

    let moved = all.moved.load(Ordering::Relaxed);
    assert!(moved > 0, "they were written, and stayed where they were");
    for tenant in &all.tenants[..TENANTS - SHREDDED] {
        let own = here.company(tenant).await.unwrap().unwrap().phase;
        let now = match own {
            Some(Phase::Database) => {
                let mut now = BTreeMap::new();
                for (key, held) in there.find_all(tenant).await.unwrap().secrets {
                    let Held::Present(stored) = held else { panic!("{tenant}/{key}: {held:?}") };
                    now.insert(key.as_str().to_owned(), stored.value.expose().to_owned());
                }
                now
            }
            _ => all.upstream(tenant),
        };
        assert_eq!(now, BTreeMap::from([("K".to_owned(), WRITES.to_string())]), "{tenant} of {own:?}");
    }
    let nobody = "SELECT count(*) FROM {}companies WHERE subdomain LIKE 'no%'";
    assert_eq!(backend.number(nobody).await, 0, "who was asked for has left nothing");
    assert_eq!(backend.number("SELECT count(*) FROM {}upstream_writes").await, 0);
}
