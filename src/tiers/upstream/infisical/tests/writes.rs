//! Writes, against the stand-in.

use super::{there::There, there::on_old_and_new, *};
use crate::tiers::upstream::standin::{Readable, Rights, Route};

const FOLDER: &str = "/tenants/acme";

/// Names that no route of their own leads to.
fn unaddressable() -> [String; 6] {
    let keys = "\u{1f511}".repeat(51);
    [".", "..", "batch", "move", &"n".repeat(255), &keys].map(str::to_owned)
}

impl There {
    async fn put(&self, key: &str, value: &str) -> Result<bool, UpstreamError> {
        self.upstream.put(&tenant(), &key.parse().unwrap(), &SecretValue::new(value.to_owned())).await
    }

    async fn delete(&self, key: &str) -> Result<bool, UpstreamError> {
        self.upstream.delete(&tenant(), &key.parse().unwrap()).await
    }

    fn held(&self) -> Vec<(String, String)> {
        self.world.secrets("prod", FOLDER)
    }
}

#[tokio::test]
async fn a_name_that_no_route_leads_to_is_created_changed_and_deleted_like_any_other() {
    on_old_and_new(async |there| {
        there.world.put("prod", FOLDER, "OTHER", "o");
        for name in unaddressable() {
            let with = |value: &str| {
                let mut held = vec![(name.clone(), value.to_owned()), ("OTHER".to_owned(), "o".to_owned())];
                held.sort();
                held
            };
            assert!(!there.delete(&name).await.unwrap(), "{name}");
            assert!(there.put(&name, "1").await.unwrap(), "{name}");
            assert_eq!(there.held(), with("1"));
            assert!(!there.put(&name, "2").await.unwrap(), "{name}");
            assert_eq!(there.held(), with("2"));
            assert!(there.delete(&name).await.unwrap(), "{name}");
            assert_eq!(there.held(), [("OTHER".to_owned(), "o".to_owned())]);
        }
    })
    .await;
}

#[tokio::test]
async fn a_name_that_no_route_leads_to_gets_its_folder_too() {
    on_old_and_new(async |there| {
        for name in unaddressable() {
            assert!(!there.delete(&name).await.unwrap());
            assert!(there.put(&name, "1").await.unwrap());
            assert_eq!(there.held(), [(name, "1".to_owned())]);
            assert!(there.world.delete_folder("prod", FOLDER));
        }
    })
    .await;
}

#[tokio::test]
async fn of_a_name_that_is_there_twice_nothing_is_written_by_a_batch_and_nothing_denied() {
    on_old_and_new(async |there| {
        for value in ["1", "2"] {
            there.world.duplicate("prod", FOLDER, "..", value);
        }
        let before = there.held();
        let deleting = there.delete("..").await.expect_err("it is there twice");
        assert!(deleting.to_string().contains("several secrets"), "{deleting}");
        let putting = there.put("..", "3").await.expect_err("it is there twice");
        assert!(matches!(putting, UpstreamError::Rejected { .. }), "{putting}");
        assert_eq!(there.held(), before);
    })
    .await;
}

#[tokio::test]
async fn a_folder_is_created_once_with_what_lies_above_it() {
    on_old_and_new(async |there| {
        for _ in 0..2 {
            there.upstream.create_folder(&tenant()).await.unwrap();
            assert_eq!(there.upstream.tenants(Lane::Interactive).await.unwrap().tenants, [tenant()]);
            there.world.put("prod", FOLDER, "A", "1");
        }
        assert_eq!(there.held(), [("A".to_owned(), "1".to_owned())]);
    })
    .await;
}

#[tokio::test]
async fn a_secret_is_created_changed_and_deleted_and_what_is_missing_is_told() {
    on_old_and_new(async |there| {
        assert!(!there.delete("A").await.unwrap(), "there is not even a folder");
        assert!(there.put("A", "1").await.unwrap());
        assert!(!there.put("A", "2").await.unwrap());
        assert!(there.put("a b/c", "3").await.unwrap());
        let held = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<Vec<_>>()
        };
        assert_eq!(there.held(), held(&[("A", "2"), ("a b/c", "3")]));
        for _ in 0..5 {
            assert!(!there.delete("NONE").await.unwrap());
        }
        assert!(there.delete("A").await.unwrap());
        assert_eq!(there.held(), held(&[("a b/c", "3")]));
        assert_eq!(there.upstream.health().state, UpstreamState::Up);
    })
    .await;
}

#[tokio::test]
async fn a_write_that_the_identity_may_not_do_is_denied_and_costs_no_second_login() {
    on_old_and_new(async |there| {
        there.world.put("prod", FOLDER, "A", "1");
        for rights in [Rights::ReadAll, Rights::Read(vec![Readable::new("prod", FOLDER)]), Rights::NoAccess] {
            there.world.set_rights(&there.credentials, rights);
            for name in ["A", "NEW", ".."] {
                assert!(there.put(name, "2").await.expect_err(name).is_denial());
                assert!(there.delete(name).await.expect_err(name).is_denial());
            }
        }
        assert_eq!(there.held(), [("A".to_owned(), "1".to_owned())]);
        assert_eq!(there.world.calls().to(Route::Login), 1);
    })
    .await;
}

#[tokio::test]
async fn what_is_too_large_for_the_server_never_reaches_it() {
    on_old_and_new(async |there| {
        there.world.put("prod", FOLDER, "A", "1");
        let storable = |length: usize| there.upstream.check(&"A".parse().unwrap(), Some(&longest(length))).is_ok();
        let largest = (1_000_000..1 << 20).rev().find(|length| storable(*length)).unwrap();
        there.world.mark();
        for name in ["A", ".."] {
            let error = there.put(name, longest(1 << 20).expose()).await.expect_err("too large");
            assert!(matches!(error, UpstreamError::Unstorable(Unstorable::Size)), "{error}");
        }
        assert_eq!(there.world.calls_since_mark().total(), 0);
        // The answer to a write repeats the value.
        let upstream = there.another(|config| config.max_response = 2 << 20);
        assert!(!upstream.put(&tenant(), &"A".parse().unwrap(), &longest(largest)).await.unwrap());
    })
    .await;
}

fn longest(length: usize) -> SecretValue {
    SecretValue::new("x".repeat(length))
}

#[tokio::test]
async fn a_padded_name_never_reaches_the_server() {
    on_old_and_new(async |there| {
        there.world.put("prod", FOLDER, "PLAIN", "1");
        for name in ["PLAIN ", "\u{a0}PLAIN", "PLAIN\u{feff}"] {
            assert!(matches!(there.put(name, "2").await, Err(UpstreamError::Unstorable(Unstorable::Name(_)))));
            assert!(matches!(there.delete(name).await, Err(UpstreamError::Unstorable(Unstorable::Name(_)))));
        }
        assert_eq!((there.held().len(), there.world.calls().total()), (1, 0));
    })
    .await;
}
