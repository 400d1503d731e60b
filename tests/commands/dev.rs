//! `secretier dev`, which needs nothing, and `completions`.

use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};

use crate::program::{Place, client, look_up};

#[tokio::test(flavor = "multi_thread")]
async fn dev_answers_from_infisical_then_memory_then_after_a_restart_from_the_database() {
    let place = Place::new("");
    let arguments = ["dev", "--json", "--data-dir", "data", "--listen", "127.0.0.1:0"];
    let mut dev = place.start(&arguments);
    let ready: Value = serde_json::from_str(&dev.stdout_line()).expect("one line of JSON");
    let word = |name: &str| ready[name].as_str().unwrap().to_owned();
    let (url, token) = (word("url"), word("token"));
    assert!(word("infisical_url").starts_with("http://127.0.0.1:"));
    assert_eq!(ready["tenants"], serde_json::json!(["acme", "globex", "initech"]));
    let project = ready["project_id"].clone();
    let log_in = json!({ "clientId": word("client_id"), "clientSecret": word("client_secret") });
    let log_in = client().post(format!("{url}/api/v1/auth/universal-auth/login")).json(&log_in);
    assert_eq!(log_in.send().await.unwrap().status(), 200, "an Infisical SDK can be tried");
    let first = look_up(&url, &token, "acme", "STRIPE_SECRET_KEY").await;
    assert_eq!((first.0, first.1.starts_with("infisical; fwd=miss; fwd-status=200")), (200, true), "{}", first.1);
    let second = look_up(&url, &token, "acme", "STRIPE_SECRET_KEY").await;
    assert!(second.1.starts_with("memory; hit"), "{}", second.1);
    for file in std::fs::read_dir(place.path().join("data")).unwrap() {
        let file = file.unwrap();
        let mode = file.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{:?}", file.file_name());
    }
    assert_eq!(dev.terminate(), 0);

    let mut again = place.start(&[&arguments[..], &["--without-infisical"]].concat());
    let ready: Value = serde_json::from_str(&again.stdout_line()).unwrap();
    assert_eq!((ready["token"].as_str(), &ready["infisical_url"]), (Some(token.as_str()), &Value::Null));
    assert_eq!(ready["project_id"], project, "an SDK goes on with what it has");
    let third = look_up(ready["url"].as_str().unwrap(), &token, "acme", "STRIPE_SECRET_KEY").await;
    assert!(third.1.starts_with("database; hit"), "{}", third.1);
    assert_eq!([&second.2, &third.2], [&first.2; 2], "the same body from everywhere");
    assert_eq!(again.terminate(), 0);
}

#[test]
fn completions_are_a_script_for_the_shell() {
    let place = Place::new("");
    let script = place.run_with(&["completions", "bash"], "").ok();
    assert!(script.contains("complete -F") && script.contains("secretier"), "{script}");
    for shell in ["zsh", "fish"] {
        assert!(place.run_with(&["completions", shell], "").ok().contains("secretier"));
    }
    let told = place.run_with(&["completions", "cmd"], "").failed(2);
    assert!(told.contains("bash"), "{told}");
}

#[test]
fn a_wrong_command_line_is_told_with_exit_code_2() {
    let place = Place::new("");
    for arguments in [&["serv"][..], &["get", "acme"], &["get", "acme", "K", "--no-such-option"], &[]] {
        let told = place.run_with(arguments, "").failed(2);
        assert!(told.contains("Usage"), "{told}");
    }
}
