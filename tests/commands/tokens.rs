//! `secretier token create|list|rotate|revoke`.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Instant};

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
    let again = place.run(&["token", "revoke", "api"]);
    assert!(again.stderr.contains("revoked before"), "{again:?}");
    again.ok();
    let told = place.run(&["token", "revoke", "nobody"]).failed(1);
    assert!(told.contains("token list"), "{told}");
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_given_as_client_credentials_where_that_is_asked_for() {
    let place = place();
    let config = fs::read_to_string(place.path().join("secretier.toml")).unwrap();
    place.write("secretier.toml", &format!("{config}[server.infisical_api]\nenabled = true\n"));
    let (mut serving, url) = place.serve();
    let create = ["token", "create", "--name", "app", "--tenants", "acme", "--actions", "read", "--universal-auth"];
    let made: Value = serde_json::from_str(&place.run(&[&create[..], &["--json"]].concat()).ok()).unwrap();
    let word = |name: &str| made[name].as_str().unwrap().to_owned();
    let (id, secret) = (word("client_id"), word("client_secret"));
    assert!(made["token"].is_null() && word("name") == "app" && word("id").len() == 16, "{made}");
    assert_eq!(id.len(), 36);
    let log_in = async |id: &str, secret: &str| {
        let body = serde_json::json!({ "clientId": id, "clientSecret": secret });
        let request = crate::program::client().post(format!("{url}/api/v1/auth/universal-auth/login")).json(&body);
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let (status, login) = log_in(&id, &secret).await;
    assert_eq!(status, 200, "{login}");
    assert_eq!(look_up(&url, login["accessToken"].as_str().unwrap(), "acme", "K").await.0, 404);

    let rotate = ["token", "rotate", "app", "--universal-auth", "--grace", "0s", "--file", "credentials"];
    place.run(&rotate).ok();
    let file = fs::read_to_string(place.path().join("credentials")).unwrap();
    let mut lines = file.lines().map(|line| line.split_once('=').unwrap());
    let (new_id, new_secret) = (lines.next().unwrap(), lines.next().unwrap());
    assert_eq!(
        (new_id.0, new_secret.0),
        ("INFISICAL_UNIVERSAL_AUTH_CLIENT_ID", "INFISICAL_UNIVERSAL_AUTH_CLIENT_SECRET")
    );
    assert_eq!(log_in(new_id.1, new_secret.1).await.0, 200);
    assert_eq!(log_in(&id, &secret).await.0, 401, "the one before has ended");
    assert_eq!(look_up(&url, login["accessToken"].as_str().unwrap(), "acme", "K").await.0, 401);
    assert_eq!(serving.terminate(), 0);
}

#[test]
fn a_glob_that_takes_in_more_than_it_seems_to_is_told_of() {
    let place = place();
    let told = |name: &str, tenants: &str| {
        let create = ["token", "create", "--name", name, "--tenants", tenants, "--actions", "read"];
        let made = place.run(&create);
        assert_eq!(made.code, 0, "{}", made.stderr);
        made.stderr
    };
    let note = told("one", "acme*,globex");
    assert!(note.contains("acme-evil") && note.contains("acme,acme-*"), "{note}");
    assert!(told("two", "team-7*").contains("team-7,team-7-*"));
    for (name, plain) in [("three", "acme,acme-*"), ("four", "*"), ("five", "acme_*"), ("six", "*-prod")] {
        assert!(!told(name, plain).contains("note:"), "{plain}");
    }
    let help = place.run_with(&["token", "create", "--help"], "").ok();
    assert!(help.contains("acme-evil") && help.contains("acme,acme-*"), "{help}");
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

fn listed(place: &Place) -> Vec<Value> {
    serde_json::from_str(&place.run(&["token", "list", "--json"]).ok()).unwrap()
}

/// The files of a folder, by name.
fn files(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with("secretier.db")).collect();
    names.sort();
    names
}

const API: [&str; 8] = ["token", "create", "--name", "api", "--tenants", "*", "--actions", "read"];

#[tokio::test(flavor = "multi_thread")]
async fn a_token_reaches_the_keys_that_its_globs_name() {
    let place = place();
    let (_serving, url) = place.serve();
    let token = place.run(&[&API[..], &["--keys", "STRIPE_*,DB_URL"]].concat()).ok();
    for (key, status) in [("STRIPE_A", 404), ("DB_URL", 404), ("DB_URL_2", 403), ("SMTP", 403)] {
        assert_eq!(look_up(&url, token.trim(), "acme", key).await.0, status, "{key}");
    }
    assert_eq!(listed(&place)[0]["keys"], serde_json::json!(["STRIPE_*", "DB_URL"]));
    assert!(place.run(&["token", "list"]).ok().contains("STRIPE_*,DB_URL"));
    let told = place.run(&[&API[..], &["--keys", "a["]].concat()).failed(2);
    assert!(told.contains("a["), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_token_and_the_one_before_are_both_good_for_the_grace_time() {
    let place = place();
    let (_serving, url) = place.serve();
    let first = place.run(&[&API[..], &["--keys", "A*", "--expires-in", "30d"]].concat()).ok();
    let rotated = place.run(&["token", "rotate", "api"]);
    assert!(rotated.stderr.contains("stays valid until"), "{}", rotated.stderr);
    let second = rotated.ok();
    assert_ne!(first, second);
    until_let_in(&url, &second).await;
    for token in [&first, &second] {
        assert_eq!(look_up(&url, token.trim(), "acme", "A").await.0, 404, "let in");
        assert_eq!(look_up(&url, token.trim(), "acme", "B").await.0, 403);
    }
    let [old, new] = &listed(&place)[..] else { panic!("two tokens") };
    assert_eq!((&old["state"], &new["state"]), (&"replaced".into(), &"valid".into()));
    assert_eq!(old["replaced_by"], new["id"]);
    for same in ["name", "tenants", "keys", "actions"] {
        assert_eq!(old[same], new[same]);
    }
    let time = |token: &Value, name: &str| humantime::parse_rfc3339(token[name].as_str().unwrap()).unwrap();
    let day = std::time::Duration::from_hours(24);
    assert_eq!(time(new, "expires_at"), time(new, "created_at") + day * 30, "as long a life as the old one's");
    assert_eq!(time(old, "expires_at"), time(new, "created_at") + day);
    assert!(place.run(&["token", "list"]).ok().contains("replaced, valid until 2"));

    // The old one has done its part; an id is of one token.
    let old_id = old["id"].as_str().unwrap();
    let told = place.run(&["token", "rotate", old_id]).failed(1);
    assert!(told.contains(new["id"].as_str().unwrap()), "{told}");
    place.run(&["token", "revoke", old_id]).ok();
    until_refused(&url, &first).await;
    assert_eq!(look_up(&url, second.trim(), "acme", "A").await.0, 404);
}

/// A new token is let in at once, but where the instance has looked for another one just before.
async fn until_let_in(url: &str, token: &str) {
    let began = Instant::now();
    while look_up(url, token.trim(), "acme", "A").await.0 != 404 {
        assert!(began.elapsed() < HANGS, "it is not let in");
    }
}

async fn until_refused(url: &str, token: &str) {
    let began = Instant::now();
    while look_up(url, token.trim(), "acme", "A").await.0 != 401 {
        assert!(began.elapsed() < HANGS, "it is still let in");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_without_grace_ends_the_token_before_and_a_revoked_name_all_of_its_tokens() {
    let place = place();
    let (_serving, url) = place.serve();
    let first = place.run(&API).ok();
    let rotated = place.run(&["token", "rotate", "api", "--grace", "0s", "--expires-in", "1h", "--json"]).ok();
    let rotated: Value = serde_json::from_str(&rotated).unwrap();
    until_refused(&url, &first).await;
    let second = rotated["token"].as_str().unwrap();
    until_let_in(&url, second).await;
    assert_eq!(listed(&place)[0]["state"], "revoked");
    assert_eq!((&listed(&place)[1]["id"], &listed(&place)[1]["expires_at"]), (&rotated["id"], &rotated["expires_at"]));

    let third = place.run(&["token", "rotate", "api", "--grace", "1h"]).ok();
    let revoked = place.run(&["token", "revoke", "api"]);
    assert!(revoked.stderr.contains("revoked 2 tokens"), "{}", revoked.stderr);
    for token in [second, &third] {
        until_refused(&url, token).await;
    }
    for (token, part) in [("api", "was revoked"), ("nobody", "token list")] {
        let told = place.run(&["token", "rotate", token]).failed(1);
        assert!(told.contains(part), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_file_is_for_its_owner_alone_and_goes_on_serving_when_it_is_rotated() {
    let place = place();
    let (_serving, url) = place.serve();
    fs::create_dir(place.path().join("run")).unwrap();
    let path = place.path().join("run/token");
    let file = ["--file", "run/token"];
    let created = place.run(&[&API[..7], &["read,write"], &file].concat());
    assert!(created.stdout.is_empty() && created.stderr.contains("run/token"), "{created:?}");
    let ask = |arguments: &[&str], input: &str| {
        place.run_with(&[arguments, &["--url", &url, "--token-file", "run/token"]].concat(), input)
    };
    ask(&["set", "acme", "A", "--create-tenant"], "value").ok();
    let first = fs::read_to_string(&path).unwrap();
    assert!(first.ends_with('\n') && !created.stderr.contains(first.trim()));

    let rotate = ["token", "rotate", "api", "--grace", "0s", "--json"];
    let rotated: Value = serde_json::from_str(&place.run(&[&rotate[..], &file].concat()).ok()).unwrap();
    let second = fs::read_to_string(&path).unwrap();
    assert_ne!(first, second);
    assert_eq!((&rotated["file"], rotated.get("token")), (&"run/token".into(), None));
    assert!(!rotated.to_string().contains(second.trim()));
    // The instance may have looked for another new token just before.
    let began = Instant::now();
    while ask(&["get", "acme", "A"], "").code != 0 {
        assert!(began.elapsed() < HANGS, "the new token is not let in");
    }
    until_refused(&url, &first).await;
    assert_eq!(ask(&["get", "acme", "A"], "").ok(), "value");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(files(&place.path().join("run")), ["token"], "nothing is left beside it");
}

#[test]
fn a_token_that_cannot_be_put_into_its_file_is_not_valid() {
    let place = place();
    place.write("mine", "do not touch");
    let mine = place.run(&[&API[..], &["--file", "mine"]].concat()).failed(2);
    assert!(mine.contains("mine exists already"), "{mine}");
    let nowhere = place.run(&[&API[..], &["--file", "no/where"]].concat()).failed(1);
    assert!(nowhere.contains("no/where"), "{nowhere}");
    assert_eq!(listed(&place), Vec::<Value>::new());

    place.run(&API).ok();
    let before = listed(&place);
    // It can be written beside this, and not be put in its place.
    fs::create_dir(place.path().join("folder")).unwrap();
    fs::write(place.path().join("folder/full"), "").unwrap();
    for (path, part) in [("no/where", "no/where"), ("folder", "folder")] {
        let told = place.run(&["token", "rotate", "api", "--file", path]).failed(1);
        assert!(told.contains(part) && told.contains("no token was made"), "{told}");
        assert_eq!(listed(&place), before, "{path}");
    }
    assert_eq!(files(place.path()), ["folder", "master.key", "mine", "secretier.toml"]);
    assert_eq!(fs::read_to_string(place.path().join("mine")).unwrap(), "do not touch");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_ends_has_told_when_its_tokens_were_used() {
    let place = place();
    let (mut serving, url) = place.serve();
    let token = create(&place, "api", "*", "read");
    create(&place, "idle", "*", "read");
    assert_eq!(look_up(&url, &token, "acme", "A").await.0, 404);
    assert_eq!(serving.terminate(), 0);
    let tokens = listed(&place);
    let of = |name: &str| tokens.iter().find(|token| token["name"] == name).unwrap()["last_used_at"].clone();
    assert!(of("api").is_string() && of("idle").is_null(), "{tokens:?}");
}
