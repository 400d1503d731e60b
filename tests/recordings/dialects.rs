//! What the stand-in was not recorded to do, and other servers do.

use std::time::Duration;

use secretier::tiers::upstream::standin::{Dialect, Readable, Rights, Unreadable};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{faults::Here, wire::Answer};

const SINGLE: &str = "/api/v3/secrets/raw";
const BATCH: &str = "/api/v3/secrets/batch/raw";

impl Here {
    async fn write(&self, method: &str, target: &str, more: Value) -> Answer {
        let mut body = json!({
            "workspaceId": self.world.project_id(), "environment": "dev", "secretPath": "/tenants/acme",
        });
        for (name, value) in more.as_object().expect("fields") {
            body[name] = value.clone();
        }
        self.ask(method, target, Some(&body.to_string())).await.expect("an answer")
    }

    async fn expanded(&self, name: &str) -> (u16, Value) {
        let listed = self.list_of("/tenants/acme&expandSecretReferences=true").await.expect("an answer");
        let secrets = listed.json()["secrets"].as_array().cloned().unwrap_or_default();
        let value =
            secrets.iter().find(|secret| secret["secretKey"] == name).map(|secret| secret["secretValue"].clone());
        (listed.status, value.unwrap_or(listed.json()["message"].clone()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_october_2024_says_the_same_with_other_statuses() {
    let here = Here::start().await;
    let value = || json!({"secretValue": "x"});
    let too_long = json!({"secretValue": "x".repeat(1 << 20)});
    let single = |name: &str| format!("{SINGLE}/{name}");
    for (dialect, missing, too_long_is, malformed, denied) in
        [(Dialect::August2024, 400, 413, 403, 401), (Dialect::October2024, 404, 500, 401, 403)]
    {
        here.world.speak(dialect);
        here.world.set_rights(&here.credentials, Rights::Full);
        assert_eq!(here.write("PATCH", &single("NONE"), value()).await.status, missing, "{dialect:?}");
        let elsewhere = json!({"secretValue": "x", "secretPath": "/nowhere"});
        assert_eq!(here.write("POST", &single("NONE"), elsewhere).await.status, missing, "{dialect:?}");
        let batch = json!({"secrets": [{"secretKey": "NONE", "secretValue": "x"}]});
        assert_eq!(here.write("PATCH", BATCH, batch).await.status, missing, "{dialect:?}");
        let refused = here.write("POST", &single("LONG"), too_long.clone()).await;
        assert_eq!(refused.status, too_long_is, "{dialect:?}");
        let refused = here.write("POST", &single("NONE"), json!({"secretValue": 1})).await;
        assert_eq!((refused.status, refused.json()["error"].as_str()), (malformed, Some("ValidationFailure")));
        here.world.set_rights(&here.credentials, Rights::ReadAll);
        let refused = here.write("PATCH", &single("KEY"), value()).await;
        assert_eq!((refused.status, refused.json()["error"].as_str()), (denied, Some("PermissionDenied")));
    }
    assert_eq!(here.world.secrets("dev", "/tenants/acme"), [("KEY".to_owned(), "old".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_trimmed_when_they_are_written() {
    for dialect in [Dialect::August2024, Dialect::October2024] {
        let here = Here::start().await;
        here.world.speak(dialect);
        let padded = format!("{SINGLE}/KEY%20");
        assert_eq!(here.write("PATCH", &padded, json!({"secretValue": "new"})).await.status, 200);
        assert_eq!(here.world.value("dev", "/tenants/acme", "KEY").as_deref(), Some("new"));
        let batch = json!({"secrets": [{"secretKey": "\u{feff}KEY\u{a0}"}]});
        assert_eq!(here.write("DELETE", BATCH, batch).await.status, 200);
        assert_eq!(here.world.value("dev", "/tenants/acme", "KEY"), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_no_route_leads_to_are_written_by_a_batch() {
    let here = Here::start().await;
    for name in [".", "..", &"n".repeat(255)] {
        let secrets = |value: &str| json!({"secrets": [{"secretKey": name, "secretValue": value}]});
        assert_eq!(here.write("POST", BATCH, secrets("1")).await.status, 200, "{name}");
        assert_eq!(here.write("PATCH", BATCH, secrets("2")).await.status, 200, "{name}");
        assert_eq!(here.world.value("dev", "/tenants/acme", name).as_deref(), Some("2"));
        assert_eq!(here.write("DELETE", BATCH, secrets("")).await.status, 200, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_that_its_reader_may_not_follow_is_followed_left_or_the_end_of_the_list() {
    let here = Here::start().await;
    here.world.put("dev", "/tenants/globex", "KEY", "globex's");
    here.world.put("dev", "/tenants/acme", "REF", "<${dev.tenants.globex.KEY}>");
    here.world.set_rights(&here.credentials, Rights::Read(vec![Readable::new("dev", "/tenants/acme")]));
    assert_eq!(here.expanded("REF").await, (200, json!("<globex's>")), "as recorded");
    here.world.speak(Dialect::October2024);
    assert_eq!(here.expanded("REF").await, (200, json!("<${dev.tenants.globex.KEY}>")));
    here.world.unreadable(Unreadable::Refused);
    assert_eq!(here.expanded("REF").await, (403, json!("Failed to expand one or more secret references")));
    let unexpanded = here.list_of("/tenants/acme&expandSecretReferences=false").await.unwrap();
    assert_eq!(unexpanded.status, 200);
    here.world.set_rights(&here.credentials, Rights::ReadAll);
    assert_eq!(here.expanded("REF").await, (200, json!("<globex's>")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stands_for_something_in_a_javascript_pattern_is_mangled_by_october_2024() {
    let here = Here::start().await;
    here.world.put("dev", "/tenants/acme", "ODD", "a$&b$$c");
    here.world.put("dev", "/tenants/acme", "REF", "<${ODD}>");
    assert_eq!(here.expanded("REF").await.1, "<a$&b$$c>");
    here.world.speak(Dialect::October2024);
    assert_eq!(here.expanded("REF").await.1, "<a${ODD}b$c>");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_name_is_no_reference_until_the_folder_has_it_itself() {
    let here = Here::start().await;
    here.world.put("dev", "/shared", "HOST", "db");
    here.world.import("dev", "/tenants/acme", "dev", "/shared");
    here.world.put("dev", "/tenants/acme", "URL", "pg://${HOST}");
    assert_eq!(here.expanded("URL").await.1, "pg://${HOST}");
    here.world.put("dev", "/tenants/acme", "HOST", "own");
    assert_eq!(here.expanded("URL").await.1, "pg://own");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hidden_value_is_marked_and_the_text_alone_is_not() {
    let here = Here::start().await;
    here.world.put("dev", "/tenants/acme", "TEXT", "<hidden-by-infisical>");
    assert!(here.world.hide("dev", "/tenants/acme", "KEY"));
    let listed = here.list().await.unwrap().json();
    let secrets = listed["secrets"].as_array().unwrap();
    for (name, hidden) in [("KEY", json!(true)), ("TEXT", Value::Null)] {
        let secret = secrets.iter().find(|secret| secret["secretKey"] == name).unwrap();
        assert_eq!((&secret["secretValue"], &secret["secretValueHidden"]), (&json!("<hidden-by-infisical>"), &hidden));
    }
    assert_eq!(here.get("KEY").await.unwrap().json()["secret"]["secretValueHidden"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_surrogate_pair_can_be_stored_and_is_listed_as_an_escape() {
    let here = Here::start().await;
    here.world.put_half_a_pair("dev", "/tenants/acme", "HALF", "a", "b");
    let listed = here.list().await.unwrap();
    assert!(listed.body.contains(r"a\ud800b"), "{}", listed.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_at_a_folder_holds_lists_of_just_that_folder() {
    let here = Here::start().await;
    here.world.put("dev", "/tenants/globex", "KEY", "x");
    let gate = here.world.gate_at("/tenants/acme");
    let listing = here.list();
    tokio::pin!(listing);
    tokio::select! {
        () = gate.arrived(1) => {}
        _ = &mut listing => panic!("it is held"),
    }
    assert_eq!(here.list_of("/tenants/globex").await.unwrap().status, 200);
    assert_eq!(here.get("KEY").await.unwrap().status, 200);
    gate.open();
    assert_eq!(timeout(Duration::from_secs(30), listing).await.unwrap().unwrap().status, 200);
}
