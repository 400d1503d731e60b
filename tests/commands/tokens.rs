//! `secretier token create|list|revoke`.

use std::time::Instant;

use serde_json::Value;

use crate::program::{HANGS, Place, look_up, master_key};

fn place() -> Place {
    let place = Place::new(
        "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = \"sqlite:secretier.db\"\n",
    );
    place.write("master.key", &master_key());
    place
}

fn create(place: &Place, name: &str, tenants: &str, actions: &str) -> String {
    let printed = place.run(&["token", "create", "--name", name, "--tenants", tenants, "--actions", actions]).ok();
    let (token, rest) = printed.split_once('\n').unwrap();
    assert!(rest.is_empty() && !token.is_empty(), "the token alone stands on standard output");
    token.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_good_at_once_where_the_proxy_runs_and_refused_soon_after_it_was_revoked() {
    let place = place();
    let (mut serving, url) = place.serve();
    let token = create(&place, "api", "acme*", "read");
    assert_eq!(look_up(&url, &token, "acme", "K").await.0, 404, "let in, and nothing there");
    assert_eq!(look_up(&url, &token, "globex", "K").await.0, 403);
    assert_eq!(look_up(&url, "st_made_up", "acme", "K").await.0, 401);

    let listed = place.run(&["token", "list"]).ok();
    assert!(listed.contains("api") && listed.contains("acme*") && listed.contains("valid"), "{listed}");
    let json: Value = serde_json::from_str(&place.run(&["token", "list", "--json"]).ok()).unwrap();
    assert_eq!((&json[0]["name"], &json[0]["state"]), (&Value::from("api"), &Value::from("valid")));
    for listed in [listed, json.to_string()] {
        assert!(!listed.contains(&token), "a token is shown once");
    }

    place.run(&["token", "revoke", "api"]).ok();
    let began = Instant::now();
    while look_up(&url, &token, "acme", "K").await.0 != 401 {
        assert!(began.elapsed() < HANGS, "a revoked token is still let in");
    }
    assert!(place.run(&["token", "list"]).ok().contains("revoked"));
    let told = place.run(&["token", "revoke", "api"]).failed(1);
    assert!(told.contains("token list"), "{told}");
    assert_eq!(serving.terminate(), 0);
}

#[test]
fn a_token_may_be_printed_as_json_and_revoked_by_its_id() {
    let place = place();
    let create = ["token", "create", "--name", "ci", "--tenants", "*", "--actions", "read,write", "--json"];
    let made: Value = serde_json::from_str(&place.run(&create).ok()).unwrap();
    assert_eq!(made["name"], "ci");
    assert!(!made["token"].as_str().unwrap().is_empty());
    place.run(&["token", "revoke", made["id"].as_str().unwrap()]).ok();
}

#[test]
fn a_token_that_cannot_be_made_is_told_with_exit_code_2() {
    let place = place();
    create(&place, "api", "*", "read");
    for (name, tenants, actions, part) in [
        ("api", "*", "read", "exists already"),
        ("other", "*", "read,fly", "fly"),
        ("other", "a[", "read", "a["),
        ("", "*", "read", "name"),
    ] {
        let create = ["token", "create", "--name", name, "--tenants", tenants, "--actions", actions];
        let told = place.run(&create).failed(2);
        assert!(told.contains(part), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_ends_when_it_was_to_end() {
    let place = place();
    let (_serving, url) = place.serve();
    let create = ["token", "create", "--name", "short", "--tenants", "*", "--actions", "read", "--expires-in", "1s"];
    let token = place.run(&create).ok();
    let began = Instant::now();
    let body = loop {
        let (status, _, body) = look_up(&url, token.trim(), "acme", "K").await;
        if status == 401 {
            break body;
        }
        assert!(began.elapsed() < HANGS, "it is still let in");
    };
    assert!(body.contains("token_expired"), "{body}");
    assert!(place.run(&["token", "list"]).ok().contains("expired"));
}
