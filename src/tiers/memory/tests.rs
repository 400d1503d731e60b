use super::*;
use crate::secret::{SecretValue, Version};

const AGES: Ages = Ages {
    ttl: Duration::from_secs(300),
    negative_ttl: Duration::from_secs(30),
    refresh_after: Duration::from_secs(900),
    memory_max_stale: Duration::from_secs(3600),
    database_max_stale: Duration::from_secs(3600),
};

struct Fixture {
    memory: Memory,
    clock: Clock,
    tenant: Tenant,
    key: SecretKey,
}

fn fixture(capacity: u64) -> Fixture {
    let clock = Clock::system();
    let memory = Memory::build(&Config { capacity, ..Config::default() }, clock.clone());
    Fixture { memory, clock, tenant: "acme".parse().unwrap(), key: "KEY".parse().unwrap() }
}

impl Fixture {
    fn entry(&self, value: Option<&str>) -> Arc<Entry> {
        let now = self.clock.confirmed_now();
        let answer = value.map(|value| {
            let value = SecretValue::new(value.to_owned());
            Answer::new(&self.tenant, self.key.clone(), &value, Version::FIRST, now.stamp, "1")
        });
        Arc::new(Entry::new(answer, now, now, AGES))
    }

    fn recalled(&self) -> Option<String> {
        match self.memory.recall("acme", "KEY") {
            Recall::Fresh(entry) | Recall::Stale(entry) => {
                entry.answer.as_ref().map(|answer| answer.expose().to_owned())
            }
            Recall::Nothing => None,
        }
    }
}

#[test]
fn names_that_came_one_by_one_count_against_the_capacity_and_every_entry_has_its_name() {
    let f = fixture(1 << 20);
    let name = |number: usize| format!("KEY_{number}_{}", "x".repeat(64)).parse::<SecretKey>().unwrap();
    for tenant in 0..100 {
        let tenant: Tenant = format!("t{tenant}").parse().unwrap();
        for number in 0..200 {
            f.memory.fill(f.memory.fence(&tenant), &tenant, &name(number), f.entry(Some("v")));
        }
    }
    let strays: usize = f.memory.snapshots.iter().map(|(_, names)| lock(&names.strays).bytes).sum();
    assert!(strays > 0 && strays as u64 <= f.memory.snapshots.weight(), "{strays}");
    assert!(f.memory.weight() <= 1 << 20, "{}", f.memory.weight());
    for (Name(tenant, key), _) in f.memory.entries.iter() {
        let names = f.memory.snapshots.get(&tenant).expect("names");
        assert!(lock(&names.strays).keys.contains(&key), "{tenant:?} {key:?}");
    }
    assert!(!f.memory.is_empty());
}

#[test]
fn a_snapshots_names_stay_when_more_secrets_come_one_by_one() {
    let f = fixture(1 << 20);
    let keys = [f.key.clone()].into_iter().collect();
    let names = Names::new(keys, Arc::default(), Some("etag".to_owned()), f.clock.confirmed_now(), f.clock.moment());
    let entries = HashMap::from([(f.key.clone(), f.entry(Some("v")))]);
    f.memory.fill_snapshot(f.memory.fence(&f.tenant), &f.tenant, &entries, names);
    for number in 0..100 {
        let key = format!("OTHER_{number}").parse().unwrap();
        assert!(f.memory.fill(f.memory.fence(&f.tenant), &f.tenant, &key, f.entry(Some("v"))));
    }
    let names = f.memory.names(&f.tenant).expect("they still prove what is absent");
    assert_eq!((names.etag.as_deref(), names.keys.contains(&f.key)), (Some("etag"), true));
    assert_eq!(lock(&names.strays).keys.len(), 100);
    assert_eq!(f.memory.len(), 101, "none went with names that were replaced");
    f.memory.forget_tenant(f.memory.fence(&f.tenant), &f.tenant);
    assert!(f.memory.is_empty());
}

#[test]
fn a_fill_that_began_before_a_change_never_lands_after_it() {
    let f = fixture(1 << 20);
    let began = f.memory.fence(&f.tenant);
    f.memory.change(&f.tenant, &f.key);
    assert!(!f.memory.fill(began, &f.tenant, &f.key, f.entry(Some("old"))));
    assert_eq!(f.recalled(), None);
    assert!(f.memory.fill(f.memory.fence(&f.tenant), &f.tenant, &f.key, f.entry(Some("new"))));
    assert!(!f.memory.fill(began, &f.tenant, &f.key, f.entry(Some("old"))));
    assert_eq!(f.recalled().as_deref(), Some("new"));
}

#[test]
fn a_copy_that_was_read_before_a_younger_snapshot_landed_takes_nobodys_place() {
    let f = fixture(1 << 20);
    let (began, copy) = (f.memory.fence(&f.tenant), f.entry(Some("old")));
    f.clock.advance(Duration::from_millis(1));
    let snapshot = |value: Option<&str>| {
        let entries: HashMap<_, _> = value.map(|value| (f.key.clone(), f.entry(Some(value)))).into_iter().collect();
        let now = f.clock.confirmed_now();
        let names = Names::new(entries.keys().cloned().collect(), Arc::default(), None, now, now.moment);
        f.memory.fill_snapshot(f.memory.fence(&f.tenant), &f.tenant, &entries, names);
    };
    snapshot(Some("new"));
    assert!(!f.memory.fill(began, &f.tenant, &f.key, Arc::clone(&copy)));
    assert_eq!(f.recalled().as_deref(), Some("new"));
    snapshot(None);
    assert!(!f.memory.fill(began, &f.tenant, &f.key, copy));
    assert_eq!(f.recalled(), None, "what was deleted does not come back");
    f.clock.advance(Duration::from_millis(1));
    assert!(f.memory.fill(began, &f.tenant, &f.key, f.entry(Some("newer"))));
    assert_eq!(f.recalled().as_deref(), Some("newer"));
}

#[test]
fn an_entry_is_fresh_then_stale_then_gone() {
    let f = fixture(1 << 20);
    f.memory.fill(f.memory.fence(&f.tenant), &f.tenant, &f.key, f.entry(Some("v")));
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Fresh(_)));
    f.clock.advance(AGES.ttl);
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Stale(_)));
    f.clock.advance(AGES.memory_max_stale);
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Nothing));
}

#[test]
fn an_absence_is_believed_briefly_and_never_served_stale() {
    let f = fixture(1 << 20);
    f.memory.fill(f.memory.fence(&f.tenant), &f.tenant, &f.key, f.entry(None));
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Fresh(_)));
    f.clock.advance(AGES.negative_ttl);
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Nothing));
}

#[test]
fn a_tenant_that_changed_hands_is_forgotten_whole_and_the_others_are_not() {
    let f = fixture(1 << 20);
    let other: Tenant = "globex".parse().unwrap();
    let absent: SecretKey = "ABSENT".parse().unwrap();
    let began = f.memory.fence(&f.tenant);
    f.memory.fill(began, &f.tenant, &f.key, f.entry(Some("v")));
    f.memory.fill(began, &f.tenant, &absent, f.entry(None));
    f.memory.fill(f.memory.fence(&other), &other, &f.key, f.entry(Some("v")));
    f.memory.forget_tenants(&HashSet::from([f.tenant.clone()]));
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Nothing));
    assert!(matches!(f.memory.recall("acme", "ABSENT"), Recall::Nothing));
    assert!(matches!(f.memory.recall("globex", "KEY"), Recall::Fresh(_)));
    assert!(!f.memory.fill(began, &f.tenant, &f.key, f.entry(Some("v"))), "it began before");
}

#[test]
fn what_stands_in_just_then_does_not_outlive_the_tenant_that_is_forgotten() {
    let f = fixture(64 << 20);
    let fill = |key: &SecretKey| {
        f.memory.fill(f.memory.fence(&f.tenant), &f.tenant, key, f.entry(Some("v")));
    };
    let forgotten = HashSet::from([f.tenant.clone()]);
    for _ in 0..200 {
        fill(&f.key);
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Acquire) {
                    if let Recall::Fresh(entry) = f.memory.recall("acme", "KEY") {
                        f.memory.serve_stale(&f.tenant, &f.key, &entry, Duration::from_secs(5));
                    }
                }
            });
            std::thread::sleep(Duration::from_micros(50));
            f.memory.forget_tenants(&forgotten);
            is_over.store(true, Ordering::Release);
        });
        assert_eq!(f.recalled(), None);
    }
}

#[test]
fn what_was_loaded_by_policies_of_before_neither_lands_nor_stays() {
    let f = fixture(1 << 20);
    let other: Tenant = "globex".parse().unwrap();
    let began = f.memory.fence(&f.tenant);
    f.memory.fill(began, &f.tenant, &f.key, f.entry(Some("v")));
    f.memory.fill(f.memory.fence(&other), &other, &f.key, f.entry(Some("v")));
    let names = Names::new(Keys::default(), Arc::default(), None, f.clock.confirmed_now(), f.clock.moment());
    f.memory.fill_snapshot(f.memory.fence(&other), &other, &HashMap::new(), names);
    let seen = AtomicBool::new(true);
    f.memory.change_policies(Some(&|tenant| tenant.as_str() == "acme"), || {
        seen.store(f.recalled().is_some(), Ordering::Relaxed);
    });
    assert!(!seen.into_inner(), "nothing is left when the new policies come into force");
    assert_eq!(f.recalled(), None);
    assert!(f.memory.names(&f.tenant).is_none() && f.memory.names(&other).is_some());
    assert!(!f.memory.fill(began, &f.tenant, &f.key, f.entry(Some("v"))), "it began before");
    let began = f.memory.fence(&other);
    f.memory.change_policies(None, || {});
    assert!(!f.memory.fill(began, &other, &f.key, f.entry(Some("v"))), "it began before");
}

#[test]
fn other_ages_count_at_once_for_what_is_held_and_believe_nothing_longer() {
    let f = fixture(1 << 20);
    let absent: SecretKey = "ABSENT".parse().unwrap();
    f.memory.fill(f.memory.fence(&f.tenant), &f.tenant, &f.key, f.entry(Some("v")));
    f.memory.fill(f.memory.fence(&f.tenant), &f.tenant, &absent, f.entry(None));
    f.clock.advance(Duration::from_secs(20));
    let under = |ages: Ages| f.memory.age(|_, _| ages);
    let minutes = |minutes: u64| Duration::from_secs(60 * minutes);

    under(Ages { ttl: minutes(1), negative_ttl: Duration::from_secs(10), ..AGES });
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Fresh(_)));
    assert!(matches!(f.memory.recall("acme", "ABSENT"), Recall::Nothing), "it was loaded 20 seconds ago");
    f.clock.advance(Duration::from_secs(40));
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Stale(_)), "a minute is over");
    under(AGES);
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Stale(_)), "it may be in doubt");

    f.clock.advance(minutes(4));
    under(Ages { memory_max_stale: minutes(5), ..AGES });
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Nothing), "five minutes are over");
    under(Ages { memory_max_stale: minutes(6), ..AGES });
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Stale(_)), "six are not");
    f.clock.advance(minutes(1));
    assert!(matches!(f.memory.recall("acme", "KEY"), Recall::Nothing));
}

#[test]
fn what_is_put_in_doubt_while_it_is_aged_keeps_neither_the_doubt_out_nor_its_old_ages() {
    let f = fixture(1 << 20);
    for _ in 0..200 {
        f.memory.fill(f.memory.fence(&f.tenant), &f.tenant, &f.key, f.entry(Some("v")));
        std::thread::scope(|scope| {
            scope.spawn(|| f.memory.soft_invalidate(&f.tenant, &f.key));
            f.memory.age(|_, _| Ages { memory_max_stale: Duration::from_secs(60), ..AGES });
        });
        let Recall::Stale(entry) = f.memory.recall("acme", "KEY") else { panic!("it is in doubt") };
        assert_eq!(entry.servable_until, entry.confirmed_at.moment.plus(Duration::from_secs(60)));
    }
}

#[test]
fn a_capacity_that_shrinks_counts_at_once() {
    let f = fixture(1 << 20);
    for number in 0..5_000 {
        let tenant: Tenant = format!("t{}", number / 50).parse().unwrap();
        let key: SecretKey = format!("KEY_{number}").parse().unwrap();
        f.memory.fill(f.memory.fence(&tenant), &tenant, &key, f.entry(Some("some value")));
    }
    assert!(f.memory.weight() > 256 << 10, "{}", f.memory.weight());
    f.memory.set_capacity(256 << 10);
    assert!(f.memory.weight() <= 256 << 10, "{}", f.memory.weight());
    // How many are left depends on how they hash: from some 95 to 200.
    assert!(f.memory.len() > 50, "{} entries of {} bytes", f.memory.len(), f.memory.weight());
    f.memory.fill(f.memory.fence(&f.tenant), &f.tenant, &f.key, f.entry(Some("v")));
    assert_eq!(f.recalled().as_deref(), Some("v"), "there is room for what comes next");
    f.memory.set_capacity(1 << 20);
    assert_eq!(f.recalled().as_deref(), Some("v"), "it grows without a loss");
}

#[test]
fn a_denied_tenant_is_not_answered_until_a_read_succeeds() {
    let f = fixture(1 << 20);
    f.memory.fill(f.memory.fence(&f.tenant), &f.tenant, &f.key, f.entry(Some("v")));
    f.memory.deny(f.memory.fence(&f.tenant), &f.tenant, f.clock.running());
    assert_eq!(f.recalled(), None);
    f.memory.allow(f.memory.fence(&f.tenant), &f.tenant);
    assert_eq!(f.recalled().as_deref(), Some("v"));
}

#[test]
fn a_denial_that_was_told_is_not_undone_by_a_read_that_began_before() {
    let f = fixture(1 << 20);
    let began = f.memory.fence(&f.tenant);
    f.memory.denied_elsewhere(&f.tenant, f.clock.running());
    let names = Names::new(Keys::default(), Arc::default(), None, f.clock.confirmed_now(), f.clock.moment());
    f.memory.fill_snapshot(began, &f.tenant, &HashMap::new(), names);
    f.memory.allow(began, &f.tenant);
    assert!(f.memory.denied_until("acme").is_some());
    f.memory.allow(f.memory.fence(&f.tenant), &f.tenant);
    assert!(f.memory.denied_until("acme").is_none());
}

#[test]
fn memory_stays_within_its_capacity() {
    let f = fixture(256 << 10);
    for number in 0..10_000 {
        let key: SecretKey = format!("KEY_{number}").parse().unwrap();
        f.memory.fill(f.memory.fence(&f.tenant), &f.tenant, &key, f.entry(Some("some value")));
    }
    assert!(f.memory.weight() <= 256 * 1024, "{}", f.memory.weight());
    assert!(f.memory.len() > 100);
}

#[test]
fn a_snapshot_removes_what_it_lacks_and_is_whole_only_while_all_is_held() {
    let f = fixture(1 << 20);
    let other: SecretKey = "OTHER".parse().unwrap();
    let at = f.clock.confirmed_now();
    let snapshot = |keys: &[&SecretKey]| {
        let entries = keys.iter().map(|key| ((*key).clone(), f.entry(Some("v")))).collect::<HashMap<_, _>>();
        let confirmed_at = entries.values().next().map_or(at, |entry| entry.confirmed_at);
        let entries: HashMap<_, _> = entries
            .into_iter()
            .map(|(key, entry)| {
                let answer = entry.answer.clone();
                (key, Arc::new(Entry::new(answer, confirmed_at, confirmed_at, AGES)))
            })
            .collect();
        let names =
            Names::new(entries.keys().cloned().collect(), Arc::default(), None, confirmed_at, confirmed_at.moment);
        f.memory.fill_snapshot(f.memory.fence(&f.tenant), &f.tenant, &entries, names);
    };
    snapshot(&[&f.key, &other]);
    assert!(f.memory.snapshot(&f.tenant).is_some());
    snapshot(&[&other]);
    assert_eq!(f.recalled(), None);
    f.memory.change(&f.tenant, &other);
    assert!(f.memory.snapshot(&f.tenant).is_none());
}
