//! The executable started from what it served last, with its PostgreSQL really gone.

use crate::{
    postgres::Postgres,
    program::{Place, client, look_up, master_key},
    within::until,
};

fn place(url: &str, keys: &str) -> Place {
    let place = Place::new(&format!(
        "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = \"{url}\"\ntimeout = \"30s\"\n\
         [memory]\noffline_file = \"offline\"\noffline_every = \"1s\"\n[keys]\n{keys}\n"
    ));
    place.write("master.key", &master_key());
    place
}

fn token(place: &Place) -> String {
    let made = place.run(&["token", "create", "--name", "t", "--tenants", "*", "--actions", "read,write"]);
    made.ok().trim().to_owned()
}

async fn put(url: &str, token: &str, key: &str, value: &str) {
    let path = format!("{url}/v1/tenants/acme/secrets/{key}?create_tenant=true");
    let body = serde_json::json!({ "value": value });
    let answer = client().put(path).bearer_auth(token).json(&body).send().await.unwrap();
    assert!(answer.status().is_success(), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_9_in_the_middle_of_writing_leaves_the_file_of_before_whole() {
    let mut postgres = Postgres::start();
    let place = place(&postgres.database().await, "sources = [\"file:master.key\"]");
    let (serving, url) = place.serve();
    let token = token(&place);
    let large = "x".repeat(1 << 20);
    for number in 0..12 {
        put(&url, &token, &format!("LARGE_{number}"), &large).await;
        assert_eq!(look_up(&url, &token, "acme", &format!("LARGE_{number}")).await.0, 200);
    }
    let (file, beside) = (place.path().join("offline"), place.path().join(".offline.new"));
    until(|| std::fs::metadata(&file).is_ok_and(|file| file.len() > 12 << 20) && !beside.exists());
    let before = std::fs::read(&file).unwrap();
    // The next one is under way, and not nearly done.
    put(&url, &token, "LATER", "l").await;
    assert_eq!(look_up(&url, &token, "acme", "LATER").await.0, 200);
    until(|| beside.exists());
    drop(serving);
    assert!(beside.exists(), "it was in the middle of writing");
    assert_eq!(std::fs::read(&file).unwrap(), before);

    postgres.stop();
    let (mut alone, url) = place.serve();
    assert_eq!(look_up(&url, &token, "acme", "LARGE_7").await.0, 200);
    assert_eq!(look_up(&url, &token, "acme", "LATER").await.0, 503);
    assert_eq!(alone.terminate(), 0);
    postgres.start_again();
    let (mut serving, url) = place.serve();
    assert_eq!(look_up(&url, &token, "acme", "LATER").await.0, 200);
    until(|| !beside.exists());
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_from_a_passphrase_is_derived_without_the_database_and_the_log_says_where_from_it_was_started() {
    let mut postgres = Postgres::start();
    let keys = "sources = [\"passphrase\"]\npassphrase = { file = \"passphrase\" }";
    let place = place(&postgres.database().await, keys);
    place.write("passphrase", "correct horse battery staple");
    let (mut serving, url) = place.serve();
    let token = token(&place);
    put(&url, &token, "K", "v").await;
    assert_eq!(look_up(&url, &token, "acme", "K").await.0, 200);
    until(|| place.path().join("offline").exists());
    assert_eq!(serving.terminate(), 0);
    postgres.stop();

    let (mut alone, url) = place.serve();
    alone.stderr_line("started from memory.offline_file");
    assert!(look_up(&url, &token, "acme", "K").await.2.contains("\"value\":\"v\""));
    postgres.start_again();
    alone.stderr_line("goes on with all of its tiers");
    put(&url, &token, "K", "w").await;
    assert_eq!(alone.terminate(), 0);
    postgres.stop();

    place.write("passphrase", "another horse battery staple");
    let told = place.run(&["serve"]).failed(1);
    assert!(told.contains("memory.offline_file offline") && told.contains("master key"), "{told}");
    std::fs::remove_file(place.path().join("offline")).unwrap();
    let told = place.run(&["serve"]).failed(1);
    assert!(told.contains("memory.offline_file offline") && told.contains("no such file"), "{told}");
}

#[test]
fn a_database_of_another_environment_is_met_with_the_end_of_the_process() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut postgres = Postgres::start();
    let url = runtime.block_on(postgres.database());
    let place = place(&url, "sources = [\"file:master.key\"]");
    let (mut serving, _) = place.serve();
    until(|| place.path().join("offline").exists());
    assert_eq!(serving.terminate(), 0);
    let renamed = "UPDATE secretier.settings SET value = 'dev' WHERE name = 'environment'";
    runtime.block_on(crate::postgres::execute(&url, renamed));
    postgres.stop();
    let (mut alone, _) = place.serve();
    postgres.start_again();
    assert_eq!(alone.wait(), 1);
    assert!(alone.stderr().contains("\"dev\""), "{}", alone.stderr());
}
