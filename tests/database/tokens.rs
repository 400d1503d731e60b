//! Tokens: kept, rotated, revoked, and when they were last used.

use secretier::{
    clock::Timestamp,
    tiers::database::{Database, StoreError, TokenRow},
};

use crate::backend::on_both;

pub(crate) fn token(name: &str, hash: u8) -> TokenRow {
    TokenRow {
        id: format!("id-{name}"),
        name: name.to_owned(),
        hash: [hash; 32],
        tenants: vec!["acme*".to_owned(), "um\"brella".to_owned()],
        keys: vec!["STRIPE_*".to_owned()],
        actions: vec!["read".to_owned()],
        expires_at: None,
        created_at: Timestamp::from_millis(i64::from(hash)),
        revoked_at: None,
        last_used_at: None,
        replaced_by: None,
    }
}

/// One that may take over from it.
fn successor(of: &TokenRow, hash: u8) -> TokenRow {
    TokenRow { id: format!("{}-{hash}", of.id), ..token(&of.name, hash) }
}

/// A token as the database has it.
async fn stored(database: &Database, id: &str) -> TokenRow {
    database.tokens().await.unwrap().into_iter().find(|token| token.id == id).unwrap()
}

const SOON: Timestamp = Timestamp::from_millis(1_000_000);
const LATER: Timestamp = Timestamp::from_millis(2_000_000);

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_kept_until_it_is_revoked_and_its_name_for_ever() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        let (ci, api) = (token("ci", 1), token("api", 2));
        database.insert_token(&ci).await.unwrap();
        database.insert_token(&api).await.unwrap();
        assert_eq!(other.tokens().await.unwrap(), [ci.clone(), api]);
        assert_eq!(other.changes().await.unwrap(), 2);

        assert_eq!(other.revoke_token("ci").await.unwrap(), 1);
        assert_eq!(other.revoke_token("ci").await.unwrap(), 0);
        assert_eq!(other.revoke_token("nobody").await.unwrap(), 0);
        assert_eq!(database.revoke_token("id-api").await.unwrap(), 1);
        assert!(database.tokens().await.unwrap().iter().all(|token| token.revoked_at.is_some()));
        assert_eq!(database.changes().await.unwrap(), 4);

        let again = TokenRow { id: "another".to_owned(), ..token("ci", 3) };
        assert!(matches!(database.insert_token(&again).await, Err(StoreError::NameTaken(name)) if name == "ci"));
        assert_eq!(database.changes().await.unwrap(), 4);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_token_ends_with_its_grace_time_and_never_later_than_it_was_to() {
    on_both(async |backend| {
        let database = backend.open().await;
        for (name, ends, then) in [("none", None, SOON), ("later", Some(LATER), SOON), ("sooner", Some(SOON), SOON)] {
            let old = TokenRow { expires_at: ends, ..token(name, name.len() as u8) };
            let new = successor(&old, 100 + name.len() as u8);
            database.insert_token(&old).await.unwrap();
            let grace_ends = if name == "sooner" { LATER } else { SOON };
            assert!(database.rotate_token(&old.id, Some(grace_ends), &new).await.unwrap());
            let replaced = TokenRow { expires_at: Some(then), replaced_by: Some(new.id.clone()), ..old.clone() };
            assert_eq!(stored(&database, &old.id).await, replaced, "{name}");
            assert_eq!(stored(&database, &new.id).await, new);
        }
        assert_eq!(database.changes().await.unwrap(), 6);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_revoked_or_replaced_is_not_rotated() {
    on_both(async |backend| {
        let database = backend.open().await;
        let (gone, old) = (token("gone", 1), token("old", 2));
        database.insert_token(&gone).await.unwrap();
        database.insert_token(&old).await.unwrap();
        database.revoke_token("gone").await.unwrap();
        assert!(database.rotate_token(&old.id, Some(SOON), &successor(&old, 3)).await.unwrap());
        let before = (database.tokens().await.unwrap(), database.changes().await.unwrap());
        for token in [&gone, &old] {
            assert!(!database.rotate_token(&token.id, Some(SOON), &successor(token, 4)).await.unwrap());
        }
        // Nor is one given another's name.
        assert!(!database.rotate_token("old-3", Some(SOON), &successor(&gone, 5)).await.unwrap());
        assert_eq!((database.tokens().await.unwrap(), database.changes().await.unwrap()), before);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_rotations_at_once_one_wins_and_the_others_are_told() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        let mut current = token("api", 1);
        database.insert_token(&current).await.unwrap();
        for round in 0..5 {
            let rivals: Vec<TokenRow> = (0..4).map(|rival| successor(&current, 10 + round * 4 + rival)).collect();
            let rotations = rivals.iter().enumerate().map(|(index, new)| {
                let database = if index % 2 == 0 { &database } else { &other };
                database.rotate_token(&current.id, Some(SOON), new)
            });
            let won: Vec<bool> = futures_util::future::try_join_all(rotations).await.unwrap();
            assert_eq!(won.iter().filter(|won| **won).count(), 1, "{won:?}");
            let winner = &rivals[won.iter().position(|won| *won).unwrap()];
            assert_eq!(stored(&database, &current.id).await.replaced_by.as_deref(), Some(winner.id.as_str()));
            assert_eq!(database.tokens().await.unwrap().len(), usize::from(round) + 2);
            current = winner.clone();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_revoked_while_it_is_rotated_leaves_no_valid_token() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        for round in 0..10 {
            let old = token(&format!("api{round}"), round);
            let new = successor(&old, 100 + round);
            database.insert_token(&old).await.unwrap();
            let (rotated, revoked) =
                tokio::join!(database.rotate_token(&old.id, Some(SOON), &new), other.revoke_token(&old.name));
            // Whichever of the two came first.
            assert_eq!(revoked.unwrap(), if rotated.unwrap() { 2 } else { 1 });
        }
        assert!(database.tokens().await.unwrap().iter().all(|token| token.revoked_at.is_some()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_revokes_all_of_its_tokens_and_an_id_that_one() {
    on_both(async |backend| {
        let database = backend.open().await;
        for name in ["by-name", "by-id"] {
            let old = token(name, name.len() as u8);
            database.insert_token(&old).await.unwrap();
            assert!(database.rotate_token(&old.id, Some(SOON), &successor(&old, name.len() as u8 + 50)).await.unwrap());
        }
        assert_eq!(database.revoke_token("by-name").await.unwrap(), 2);
        assert_eq!(database.revoke_token("id-by-id").await.unwrap(), 1);
        assert!(stored(&database, "id-by-id").await.revoked_at.is_some());
        assert!(stored(&database, "id-by-id-55").await.revoked_at.is_none());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_taken_back_leaves_everything_as_it_was() {
    on_both(async |backend| {
        let database = backend.open().await;
        let old = TokenRow { expires_at: Some(LATER), ..token("api", 1) };
        let new = successor(&old, 2);
        database.insert_token(&old).await.unwrap();
        for ends in [Some(SOON), None] {
            assert!(database.rotate_token(&old.id, ends, &new).await.unwrap());
            assert!(database.take_back_token(&new.id, Some(&old)).await.unwrap());
            assert_eq!(database.tokens().await.unwrap(), std::slice::from_ref(&old));
        }
        assert_eq!(database.changes().await.unwrap(), 5);
        // It can be rotated again, and what was rotated itself is not taken back.
        assert!(database.rotate_token(&old.id, Some(SOON), &new).await.unwrap());
        assert!(!database.take_back_token(&old.id, None).await.unwrap());
        assert!(!database.take_back_token("nobody", None).await.unwrap());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_without_grace_revokes_the_token_and_to_take_it_back_undoes_nobodys_revocation() {
    on_both(async |backend| {
        let database = backend.open().await;
        for (number, (ends, revoked)) in [(None, "new"), (Some(LATER), "old")].into_iter().enumerate() {
            let name = format!("api-{number}");
            let number = u8::try_from(number).unwrap() * 2;
            let old = token(&name, number + 1);
            let new = successor(&old, number + 2);
            database.insert_token(&old).await.unwrap();
            assert!(database.rotate_token(&old.id, ends, &new).await.unwrap());
            assert_eq!(stored(&database, &old.id).await.revoked_at, ends.is_none().then_some(new.created_at));
            let revoked = if revoked == "new" { &new.id } else { &old.id };
            assert_eq!(database.revoke_token(revoked).await.unwrap(), 1);
            assert!(database.take_back_token(&new.id, Some(&old)).await.unwrap());
            assert!(stored(&database, &old.id).await.revoked_at.is_some(), "{name}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_last_use_never_moves_back_and_is_no_change_to_follow() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        database.insert_token(&token("api", 1)).await.unwrap();
        database.insert_token(&token("ci", 2)).await.unwrap();
        let uses = |at| vec![("id-api".to_owned(), at), ("id-ci".to_owned(), SOON), ("nobody".to_owned(), SOON)];
        database.note_token_uses(uses(LATER)).await.unwrap();
        other.note_token_uses(uses(SOON)).await.unwrap();
        assert_eq!(stored(&database, "id-api").await.last_used_at, Some(LATER));
        assert_eq!(stored(&database, "id-ci").await.last_used_at, Some(SOON));
        assert_eq!(database.changes().await.unwrap(), 2, "those who made them");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uses_are_noted_while_the_same_tokens_are_rotated_and_revoked() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        let mut current = token("api", 0);
        database.insert_token(&current).await.unwrap();
        for round in 1..20 {
            let new = successor(&token("api", 0), round);
            let uses = (0..round).map(|number| (format!("id-api-{number}"), Timestamp::from_millis(i64::from(round))));
            let (uses, rotated) = tokio::join!(
                other.note_token_uses(uses.collect()),
                database.rotate_token(&current.id, Some(SOON), &new)
            );
            uses.unwrap();
            assert!(rotated.unwrap());
            current = new;
        }
        let uses = (0..20).map(|number| (format!("id-api-{number}"), LATER)).rev().collect();
        let (uses, revoked) = tokio::join!(other.note_token_uses(uses), database.revoke_token("api"));
        uses.unwrap();
        assert_eq!(revoked.unwrap(), 20);
    })
    .await;
}
