//! Writes, against the stand-in.

use super::{there::There, there::on_old_and_new, *};

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
    let there = There::start(false).await;
    for value in ["1", "2"] {
        there.world.duplicate("prod", FOLDER, "..", value);
    }
    let before = there.held();
    for error in [there.put("..", "3").await.expect_err("twice"), there.delete("..").await.expect_err("twice")] {
        assert!(error.to_string().contains("several secrets"), "{error}");
    }
    assert_eq!(there.held(), before);
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
