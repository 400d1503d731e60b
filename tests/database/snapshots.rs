//! The copy of an upstream folder.

use std::time::Duration;

use secretier::{
    phase::Phase,
    secret::SecretKey,
    tiers::database::{Began, Company, Current, Database, Held, Precondition, Source, StoreOutcome, Told},
};

use crate::backend::{Backend, hand_over, held, key, on_both, snapshot, stored, tell, tenant, value, writer};

async fn began(database: &Database) -> Began {
    let company = database.company(&tenant("acme")).await.unwrap();
    Began { generation: company.map(|company| company.generation) }
}

async fn store(
    backend: &Backend,
    database: &Database,
    secrets: &[(&str, &str)],
    began: Began,
) -> Option<(Company, Vec<Current>)> {
    store_for(backend, database, secrets, began, &|_| true).await
}

async fn store_for(
    backend: &Backend,
    database: &Database,
    secrets: &[(&str, &str)],
    began: Began,
    speaks_for: &(dyn Fn(&SecretKey) -> bool + Sync),
) -> Option<(Company, Vec<Current>)> {
    let (acme, snapshot) = (tenant("acme"), snapshot(secrets));
    match database.store_snapshot(&acme, &snapshot, began, backend.clock.now(), speaks_for).await.unwrap() {
        StoreOutcome::Stored { company, secrets, .. } => Some((company, secrets)),
        StoreOutcome::Superseded => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_becomes_the_copy_and_only_what_changed_gets_a_new_version() {
    on_both(async |backend| {
        let database = backend.open().await;
        let first = [("SAME", "1"), ("CHANGED", "1"), ("GONE", "1")];
        let (company, secrets) = store(&backend, &database, &first, Began { generation: None }).await.unwrap();
        assert_eq!(secrets.len(), 3);
        assert_eq!(database.company(&tenant("acme")).await.unwrap(), Some(company));
        let before = stored(&database, "acme", "SAME").await;
        assert_eq!((before.value.expose(), before.source), ("1", Source::Infisical));

        backend.clock.advance(Duration::from_secs(60));
        let second = [("SAME", "1"), ("CHANGED", "2"), ("NEW", "1")];
        let (company, secrets) = store(&backend, &database, &second, began(&database).await).await.unwrap();
        assert!(company.snapshot_at.is_some_and(|at| backend.clock.now().since(at) < Duration::from_secs(60)));
        assert_eq!(company.snapshot_etag.as_deref(), Some("W/\"1\""));
        let after = stored(&database, "acme", "SAME").await;
        assert_eq!((after.version, after.updated_at), (before.version, before.updated_at));
        assert_eq!(after.etag, before.etag);
        let changed = stored(&database, "acme", "CHANGED").await;
        assert_eq!((changed.value.expose(), changed.version.number()), ("2", 2));
        assert!(matches!(held(&database, "acme", "GONE").await, Held::Absent));
        for current in &secrets {
            let found = stored(&database, "acme", current.key.as_str()).await;
            assert_eq!((found.version, found.updated_at), (current.version, current.updated_at));
            assert_eq!(found.etag, current.etag);
        }

        let third = [("SAME", "1"), ("GONE", "1")];
        store(&backend, &database, &third, began(&database).await).await.unwrap();
        assert_eq!(stored(&database, "acme", "GONE").await.version.number(), 3, "a tombstone keeps its version");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_began_before_an_invalidation_never_lands() {
    on_both(async |backend| {
        let database = backend.open().await;
        let other = backend.open().await;
        let early = began(&database).await;
        tell(&other, "acme", Told::Uncopied(&key("OTHER"))).await;
        assert!(store(&backend, &database, &[("K", "old")], early).await.is_none(), "there was no tenant yet");
        assert!(matches!(held(&database, "acme", "K").await, Held::Absent));

        store(&backend, &database, &[("K", "1")], began(&database).await).await.unwrap();
        let early = began(&database).await;
        other.put(&tenant("acme"), &key("K"), &value("2"), &Precondition::None, &writer(), None).await.unwrap();
        assert!(store(&backend, &database, &[("K", "1")], early).await.is_none());
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "2");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_never_lands_where_the_database_owns_the_tenant() {
    on_both(async |backend| {
        let database = backend.open().await;
        hand_over(&database, "acme", Some(Phase::Database)).await;
        assert!(store(&backend, &database, &[("K", "v")], began(&database).await).await.is_none());
        let company = database.company(&tenant("acme")).await.unwrap().unwrap();
        assert!(!database.confirm_snapshot(&tenant("acme"), &company, backend.clock.now()).await.unwrap());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_snapshot_does_not_replace_a_newer_one() {
    on_both(async |backend| {
        let database = backend.open().await;
        let early = backend.clock.now();
        backend.clock.advance(Duration::from_secs(1));
        store(&backend, &database, &[("K", "new")], Began { generation: None }).await.unwrap();
        let late = snapshot(&[("K", "old")]);
        let outcome = database.store_snapshot(&tenant("acme"), &late, began(&database).await, early, &|_| true).await;
        assert!(matches!(outcome.unwrap(), StoreOutcome::Superseded));
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "new");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_a_snapshot_does_not_speak_for_are_left_alone() {
    on_both(async |backend| {
        let database = backend.open().await;
        for name in ["OWN_A", "OWN_B"] {
            database
                .put(&tenant("acme"), &key(name), &value("own"), &Precondition::None, &writer(), None)
                .await
                .unwrap();
        }
        let speaks_for = |key: &SecretKey| !key.as_str().starts_with("OWN_");
        let secrets = [("OWN_A", "theirs"), ("OWN_C", "theirs"), ("K", "v")];
        let (_, current) = store_for(&backend, &database, &secrets, began(&database).await, &speaks_for).await.unwrap();
        assert_eq!(current.iter().map(|current| current.key.as_str()).collect::<Vec<_>>(), ["OWN_A", "K"]);
        for name in ["OWN_A", "OWN_B"] {
            assert_eq!(stored(&database, "acme", name).await.value.expose(), "own");
        }
        assert!(matches!(held(&database, "acme", "OWN_C").await, Held::Absent));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_is_kept_until_a_later_snapshot_and_deletes_nothing() {
    on_both(async |backend| {
        let database = backend.open().await;
        let (acme, early) = (tenant("acme"), backend.clock.now());
        store(&backend, &database, &[("K", "v")], Began { generation: None }).await.unwrap();
        let generation = began(&database).await.generation.unwrap();
        backend.clock.advance(Duration::from_secs(1));
        let denied = backend.clock.now();
        database.deny(&acme, denied).await.unwrap();
        assert_eq!(database.company(&acme).await.unwrap().unwrap().denied_at, Some(denied));
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "v");

        let late = snapshot(&[("K", "v")]);
        let outcome = database.store_snapshot(&acme, &late, Began { generation: Some(generation) }, early, &|_| true);
        assert!(matches!(outcome.await.unwrap(), StoreOutcome::Superseded), "it was asked for before the denial");
        let copy = database.company(&acme).await.unwrap().unwrap();
        assert!(!database.confirm_snapshot(&acme, &copy, early).await.unwrap());

        backend.clock.advance(Duration::from_secs(1));
        assert!(database.confirm_snapshot(&acme, &copy, backend.clock.now()).await.unwrap());
        assert_eq!(database.company(&acme).await.unwrap().unwrap().denied_at, None);
        database.deny(&acme, denied).await.unwrap();
        assert_eq!(database.company(&acme).await.unwrap().unwrap().denied_at, None, "an older denial is over");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_confirms_one_copy_confirms_no_other_and_takes_none_back_in_time() {
    on_both(async |backend| {
        let database = backend.open().await;
        let acme = tenant("acme");
        store(&backend, &database, &[("K", "old")], Began { generation: None }).await.unwrap();
        let copy = database.company(&acme).await.unwrap().unwrap();
        backend.clock.advance(Duration::from_secs(1));
        let early = backend.clock.now();
        backend.clock.advance(Duration::from_secs(1));
        // Another instance has read the folder meanwhile: neither is a write, and the generation stays.
        let (changed, late) = (snapshot(&[("K", "new")]), backend.clock.now());
        let changed = secretier::tiers::upstream::Snapshot { etag: Some("W/\"2\"".to_owned()), ..changed };
        let outcome = database.store_snapshot(&acme, &changed, began(&database).await, late, &|_| true).await.unwrap();
        assert!(matches!(outcome, StoreOutcome::Stored { .. }));
        assert!(!database.confirm_snapshot(&acme, &copy, backend.clock.now()).await.unwrap());

        let copy = database.company(&acme).await.unwrap().unwrap();
        assert!(database.confirm_snapshot(&acme, &copy, early).await.unwrap());
        assert_eq!(database.company(&acme).await.unwrap().unwrap().snapshot_at, Some(late));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_confirmed_snapshot_is_as_fresh_as_a_new_one_unless_something_was_written() {
    on_both(async |backend| {
        let database = backend.open().await;
        let acme = tenant("acme");
        store(&backend, &database, &[("K", "v")], Began { generation: None }).await.unwrap();
        let copy = database.company(&acme).await.unwrap().unwrap();
        backend.clock.advance(Duration::from_secs(60));
        let now = backend.clock.now();
        assert!(database.confirm_snapshot(&acme, &copy, now).await.unwrap());
        assert_eq!(database.company(&acme).await.unwrap().unwrap().snapshot_at, Some(now));
        tell(&database, "acme", Told::Nothing).await;
        assert!(!database.confirm_snapshot(&acme, &copy, now).await.unwrap());
        assert!(!database.confirm_snapshot(&tenant("nobody"), &copy, now).await.unwrap());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_secret_has_no_value_and_its_absence_proves_nothing() {
    on_both(async |backend| {
        let database = backend.open().await;
        store(&backend, &database, &[("K", "v"), ("L", "w")], Began { generation: None }).await.unwrap();
        tell(&database, "acme", Told::Copied(&key("K"), &writer())).await;
        assert!(matches!(held(&database, "acme", "K").await, Held::Unknown));
        tell(&database, "acme", Told::Copied(&key("NEW"), &writer())).await;
        assert!(matches!(held(&database, "acme", "NEW").await, Held::Unknown), "also where there was no copy");
        assert!(matches!(held(&database, "acme", "OTHER").await, Held::Absent));
        assert!(!database.find_all(&tenant("acme")).await.unwrap().is_snapshot);
        store(&backend, &database, &[("K", "v"), ("L", "w")], began(&database).await).await.unwrap();
        assert_eq!(stored(&database, "acme", "K").await.version.number(), 2, "it takes the place that was kept for it");
        assert!(matches!(held(&database, "acme", "NEW").await, Held::Absent), "the snapshot proves it");
        store(&backend, &database, &[("NEW", "n")], began(&database).await).await.unwrap();
        assert_eq!(stored(&database, "acme", "NEW").await.version.number(), 1, "there was none before");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forgetting_one_secret_leaves_the_tenants_other_copies_servable() {
    on_both(async |backend| {
        let database = backend.open().await;
        let acme = tenant("acme");
        let first = [("K", "v"), ("L", "w")];
        let (before, _) = store(&backend, &database, &first, Began { generation: None }).await.unwrap();
        tell(&database, "acme", Told::Copied(&key("K"), &writer())).await;
        let after = database.company(&acme).await.unwrap().unwrap();
        assert_eq!((after.snapshot_at, after.snapshot_whole), (before.snapshot_at, true));
        assert_eq!((after.snapshot_etag, after.generation), (None, before.generation + 2));
        assert_eq!(stored(&database, "acme", "L").await.value.expose(), "w");

        store(&backend, &database, &first, began(&database).await).await.unwrap();
        hand_over(&database, "acme", Some(Phase::Database)).await;
        let own = Some(Phase::Database);
        database.put(&acme, &key("K"), &value("own"), &Precondition::None, &writer(), own).await.unwrap();
        tell(&database, "acme", Told::Copied(&key("K"), &writer())).await;
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "own", "what the database owns is the truth");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_database_deleted_as_owner_is_absent_once_a_snapshot_lacks_it_too() {
    on_both(async |backend| {
        let database = backend.open().await;
        database.put(&tenant("acme"), &key("K"), &value("own"), &Precondition::None, &writer(), None).await.unwrap();
        database.delete(&tenant("acme"), &key("K"), &Precondition::None, &writer(), None).await.unwrap();
        assert!(matches!(held(&database, "acme", "K").await, Held::Unknown));
        store(&backend, &database, &[], began(&database).await).await.unwrap();
        assert!(matches!(held(&database, "acme", "K").await, Held::Absent));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_validator_is_kept_only_for_a_copy_that_is_whole() {
    on_both(async |backend| {
        let database = backend.open().await;
        let acme = tenant("acme");
        let secrets = [("OWN_A", "theirs"), ("K", "v")];
        let speaks_for = |key: &SecretKey| !key.as_str().starts_with("OWN_");
        let none = Began { generation: None };
        let (company, _) = store_for(&backend, &database, &secrets, none, &speaks_for).await.unwrap();
        assert_eq!((company.snapshot_whole, &company.snapshot_etag), (false, &None));
        assert_eq!(database.company(&acme).await.unwrap(), Some(company));

        let (company, _) =
            store_for(&backend, &database, &secrets[1..], began(&database).await, &speaks_for).await.unwrap();
        assert_eq!((company.snapshot_whole, company.snapshot_etag.as_deref()), (true, Some("W/\"1\"")));
        assert_eq!(database.company(&acme).await.unwrap().as_ref(), Some(&company));
        assert!(database.confirm_snapshot(&acme, &company, backend.clock.now()).await.unwrap());
        let confirmed = database.company(&acme).await.unwrap().unwrap();
        assert_eq!((confirmed.snapshot_whole, confirmed.snapshot_etag), (true, company.snapshot_etag));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_a_copy_takes_its_validator_and_a_new_phase_the_snapshot_too() {
    on_both(async |backend| {
        let database = backend.open().await;
        let acme = tenant("acme");
        let proof = async || {
            let company = database.company(&acme).await.unwrap().unwrap();
            (company.snapshot_at.is_some(), company.snapshot_whole, company.snapshot_etag.is_some())
        };
        let again = async || {
            store(&backend, &database, &[("K", "v")], began(&database).await).await.unwrap();
            assert_eq!(proof().await, (true, true, true));
        };
        again().await;
        tell(&database, "acme", Told::Nothing).await;
        assert_eq!(proof().await, (true, true, true), "nothing but fills under way is refused");
        database.put(&acme, &key("L"), &value("own"), &Precondition::None, &writer(), None).await.unwrap();
        assert_eq!(proof().await, (true, true, false));
        again().await;
        assert!(
            database.put(&acme, &key("K"), &value("w"), &Precondition::IfNoneMatchAny, &writer(), None).await.is_err()
        );
        assert_eq!(proof().await, (true, true, true), "a write that was refused changed nothing");
        assert!(database.delete(&acme, &key("K"), &Precondition::None, &writer(), None).await.unwrap());
        assert_eq!(proof().await, (true, true, false));
        for phase in [Some(Phase::Infisical), None, Some(Phase::Database)] {
            again().await;
            hand_over(&database, "acme", phase).await;
            assert_eq!(proof().await, (false, false, false));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_five_thousand_secrets_is_stored_and_stored_again() {
    on_both(async |backend| {
        let database = backend.open().await;
        let names: Vec<String> = (0..5_000).map(|number| format!("KEY_{number}")).collect();
        let secrets: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "value")).collect();
        let (_, first) = store(&backend, &database, &secrets, Began { generation: None }).await.unwrap();
        let (_, second) = store(&backend, &database, &secrets, began(&database).await).await.unwrap();
        assert_eq!(first.len(), 5_000);
        assert_eq!(first, second);
        store(&backend, &database, &[], began(&database).await).await.unwrap();
        let listing = database.find_all(&tenant("acme")).await.unwrap();
        assert_eq!((listing.secrets.len(), listing.is_snapshot), (0, true));
    })
    .await;
}
