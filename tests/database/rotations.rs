//! The rows of rotations: one that runs of each secret, changed by one at a time, with values that open
//! nowhere else.

use std::time::Duration;

use secretier::{
    sealing::{MasterKey, OpenError},
    secret::Version,
    tiers::database::{
        Database, KeptValues, NewRotation, Precondition, Rotation, RotationError, RotationFilter, RotationKind,
        RotationStep, RotationValues, SecretRotationState, StoreError,
    },
};

use crate::backend::{Backend, key, on_both, tenant, value, writer};

const HOUR: Duration = Duration::from_secs(60 * 60);

fn new(old: &str, new: Option<&str>) -> NewRotation {
    NewRotation {
        kind: RotationKind::Value,
        values: RotationValues { old: Some(value(old)), new: new.map(value) },
        old_version: Version::FIRST,
        grace: HOUR,
        by: "ci".to_owned(),
        reason: None,
    }
}

async fn begun(database: &Database, name: &str) -> Rotation {
    database.begin_rotation(&tenant("acme"), &key(name), &new("one", Some("two"))).await.unwrap().unwrap()
}

async fn values(database: &Database, name: &str) -> Option<(String, String)> {
    let (_, values) = database.running_rotation(&tenant("acme"), &key(name)).await.unwrap()?;
    Some((values.old.unwrap().expose().to_owned(), values.new.unwrap().expose().to_owned()))
}

fn both() -> Option<(String, String)> {
    Some(("one".to_owned(), "two".to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn one_rotation_of_a_secret_runs_and_whoever_changes_it_must_have_seen_it_as_it_is() {
    on_both(async |backend: Backend| {
        let database = backend.open().await;
        let before = database.changes().await.unwrap();
        let first = begun(&database, "K").await;
        assert!(first.told_by > before, "instances hear of it");
        let again = database.begin_rotation(&tenant("acme"), &key("K"), &new("x", None)).await.unwrap();
        assert_eq!(again.unwrap_err().id, first.id);
        begun(&database, "OTHER").await;

        let mut mine = first.clone();
        mine.step = RotationStep::Test;
        let changed = database.change_rotation(&mine, KeptValues::AsTheyAre, None, false).await.unwrap();
        assert_eq!((changed.step, changed.told_by), (RotationStep::Test, first.told_by));
        let late = database.change_rotation(&mine, KeptValues::Removed, None, false).await;
        assert!(matches!(late, Err(RotationError::Moved)), "{late:?}");
        assert_eq!(values(&database, "K").await, both(), "who came late has changed nothing");

        let mut ended = changed;
        (ended.state, ended.ended_at, ended.next_try_at) = (SecretRotationState::Aborted, Some(database.now()), None);
        database.change_rotation(&ended, KeptValues::Removed, None, true).await.unwrap();
        assert_eq!(values(&database, "K").await, None);
        assert_eq!(
            database.last_rotation(&tenant("acme"), &key("K")).await.unwrap().unwrap().state,
            SecretRotationState::Aborted
        );
        begun(&database, "K").await;
        let filter = RotationFilter { state: Some(SecretRotationState::Running), after: None };
        assert_eq!(database.rotations(&filter).await.unwrap().0.len(), 2);
        assert_eq!(database.rotations(&RotationFilter::default()).await.unwrap().0.len(), 3);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_whose_lease_was_taken_over_changes_nothing() {
    on_both(async |backend: Backend| {
        let database = backend.open().await;
        let rotation = begun(&database, "K").await;
        let lease = database.lease("rotations", "one", Duration::from_secs(10)).await.unwrap().unwrap();
        backend.clock.advance(Duration::from_secs(11));
        let other = database.lease("rotations", "two", Duration::from_secs(10)).await.unwrap().unwrap();
        let mut promoted = rotation.clone();
        promoted.step = RotationStep::Promote;
        let late = database.change_rotation(&promoted, KeptValues::AsTheyAre, Some(&lease), true).await;
        assert!(matches!(late, Err(RotationError::Store(StoreError::LeaseLost))), "{late:?}");
        assert_eq!(database.last_rotation(&tenant("acme"), &key("K")).await.unwrap(), Some(rotation));
        database.change_rotation(&promoted, KeptValues::AsTheyAre, Some(&other), true).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_values_of_a_rotation_lie_sealed_and_open_in_their_own_place_alone() {
    on_both(async |backend: Backend| {
        let database = backend.open().await;
        let rotation = begun(&database, "K").await;
        let in_clear = "SELECT count(*) FROM {}secret_rotations WHERE old_value LIKE '%one%' OR new_value LIKE '%two%'";
        assert_eq!(backend.number(in_clear).await, 0);
        let is_forged = async || {
            let found = database.running_rotation(&tenant("acme"), &key("K")).await;
            assert!(matches!(found, Err(RotationError::Unreadable(OpenError::Forged))), "{found:?}");
        };
        for (change, back) in [
            ("old_value = new_value, new_value = old_value", "old_value = new_value, new_value = old_value"),
            ("valid_until = 9000000000000", "valid_until = NULL"),
        ] {
            backend.sql(&format!("UPDATE secret_rotations SET {change}")).await;
            is_forged().await;
            backend.sql(&format!("UPDATE secret_rotations SET {back}")).await;
            assert_eq!(values(&database, "K").await, both());
        }
        // With its end, which is sealed with it.
        let (mut waiting, kept) = database.running_rotation(&tenant("acme"), &key("K")).await.unwrap().unwrap();
        assert_eq!(waiting.id, rotation.id);
        waiting.valid_until = Some(database.now().plus(HOUR));
        database.change_rotation(&waiting, KeptValues::Replaced(&kept), None, true).await.unwrap();
        assert_eq!(values(&database, "K").await, both());
        backend.sql("UPDATE secret_rotations SET valid_until = valid_until + 1").await;
        is_forged().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn new_data_keys_seal_the_values_of_rotations_too_and_a_shredding_leaves_none() {
    on_both(async |backend: Backend| {
        let database = backend.open().await;
        begun(&database, "K").await;
        let sealed = |number: i64| {
            format!("SELECT count(*) FROM {{}}secret_rotations WHERE old_value LIKE 'p1.{number}.%' AND new_value LIKE 'p1.{number}.%'")
        };
        assert_eq!(backend.number(&sealed(1)).await, 1);
        let lock = database.rotation_lock("test").await.unwrap().unwrap();
        backend.clock.advance(HOUR);
        let renewed = database.renew_data_key(&lock, &tenant("acme"), database.now()).await.unwrap();
        assert_eq!((renewed.values, renewed.failed), (2, 0));
        assert_eq!(backend.number(&sealed(2)).await, 1);
        assert_eq!(backend.number("SELECT count(*) FROM {}company_data_keys").await, 1, "the old one is destroyed");
        assert_eq!(values(&database, "K").await, both());

        let target = MasterKey::generate().unwrap();
        assert_eq!(database.rewrap(&lock, &target, None).await.unwrap().done, 1);
        database.shred(&tenant("acme")).await.unwrap().unwrap();
        assert_eq!(backend.number("SELECT count(*) FROM {}secret_rotations").await, 0);
        assert_eq!(values(&database, "K").await, None);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_that_has_ended_is_kept_as_long_as_versions_are() {
    on_both(async |backend: Backend| {
        let database = backend.open().await;
        let mut ended = begun(&database, "K").await;
        (ended.state, ended.ended_at, ended.next_try_at) = (SecretRotationState::Completed, Some(database.now()), None);
        database.change_rotation(&ended, KeptValues::Removed, None, true).await.unwrap();
        begun(&database, "OTHER").await;
        assert!(!database.sweep_rotations().await.unwrap());
        backend.clock.advance(HOUR * 24 * 91);
        assert!(database.sweep_rotations().await.unwrap());
        assert_eq!(database.last_rotation(&tenant("acme"), &key("K")).await.unwrap(), None);
        assert!(database.last_rotation(&tenant("acme"), &key("OTHER")).await.unwrap().is_some(), "one that runs stays");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_secret_is_due_is_kept_until_it_is_set_anew_and_goes_with_its_tenant() {
    on_both(async |backend| {
        let database = backend.open().await;
        for of in ["acme", "globex"] {
            database.put(&tenant(of), &key("K"), &value("v"), &Precondition::None, &writer(), None).await.unwrap();
        }
        let (page, next) = database.rotatable(None).await.unwrap();
        assert_eq!((page.len(), next), (2, None));
        assert!(page.iter().all(|secret| secret.due_at.is_none()));
        let at = |hours: u32| Some(database.now().plus(HOUR * hours));
        let (acme, globex) = ((tenant("acme"), key("K")), (tenant("globex"), key("K")));
        let first = [(acme.0.clone(), acme.1.clone(), at(1)), (globex.0.clone(), globex.1.clone(), at(2))];
        database.set_due(&first, None).await.unwrap();
        let due = async |hours: u32| {
            let due = database.due_before(database.now().plus(HOUR * hours), 10).await.unwrap();
            due.into_iter().map(|due| due.tenant.as_str().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(
            (due(0).await, due(1).await, due(3).await),
            (vec![], vec!["acme".to_owned()], vec!["acme".to_owned(), "globex".to_owned()])
        );
        database.set_due(&[(acme.0.clone(), acme.1.clone(), at(5))], None).await.unwrap();
        assert_eq!(due(3).await, ["globex"]);
        assert!(database.due_at(&acme.0, &acme.1).await.unwrap() > first[1].2);
        database.shred(&globex.0).await.unwrap();
        assert_eq!(due(9).await, ["acme"], "what was shredded is not due");
        database.set_due(&[(acme.0.clone(), acme.1.clone(), None)], None).await.unwrap();
        assert_eq!(database.due_at(&acme.0, &acme.1).await.unwrap(), None);
    })
    .await;
}
