//! `secretier tenant shred`.

use std::time::{SystemTime, UNIX_EPOCH};

use diesel::{Connection as _, SqliteConnection, connection::SimpleConnection as _};
use serde_json::{Value, json};

use crate::{
    postgres::Postgres,
    program::{Infisical, Place, client, look_up, master_key},
};

fn place(database: &str, more: &str) -> Place {
    let place = Place::new(&format!(
        "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = \"{database}\"\n{more}"
    ));
    place.write("master.key", &master_key());
    place
}

fn token(place: &Place) -> String {
    let create = ["token", "create", "--name", "api", "--tenants", "*", "--actions", "read,write"];
    place.run(&create).ok().trim().to_owned()
}

async fn put(url: &str, token: &str, tenant: &str, key: &str, value: &str) -> u64 {
    let request =
        client().put(format!("{url}/v1/tenants/{tenant}/secrets/{key}?create_tenant=true")).bearer_auth(token);
    let answer = request.json(&json!({ "value": value })).send().await.unwrap();
    answer.json::<Value>().await.unwrap()["version"].as_u64().unwrap()
}

async fn status(url: &str, token: &str, tenant: &str, key: &str) -> u16 {
    look_up(url, token, tenant, key).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shredded_tenant_is_gone_from_every_running_instance_when_the_command_ends() {
    for database in ["sqlite:secretier.db".to_owned(), Postgres::shared().database().await] {
        let place = place(&database, "");
        let ((mut one, first), (mut two, second)) = (place.serve(), place.serve());
        let token = token(&place);
        for tenant in ["acme", "globex"] {
            for value in ["s3cr3t-1", "s3cr3t-2"] {
                put(&first, &token, tenant, "K", value).await;
            }
            for url in [&first, &second] {
                assert_eq!(status(url, &token, tenant, "K").await, 200);
            }
        }
        // No master key is needed.
        std::fs::remove_file(place.path().join("master.key")).unwrap();
        let shredded = place.run(&["tenant", "shred", "acme", "--yes"]);
        let told = shredded.stderr.clone();
        let shown = shredded.ok();
        for part in
            ["acme: destroyed 1 data key, 1 secret", "cleared from the memory of 2 running instances", "backups"]
        {
            assert!(shown.contains(part), "{shown}");
        }
        assert_eq!(shown.contains("VACUUM FULL"), database.starts_with("postgres"), "{shown}");
        assert!(!shown.contains("Infisical") && !format!("{shown}{told}").contains("s3cr3t"), "{shown}{told}");
        for url in [&first, &second] {
            assert_eq!(status(url, &token, "acme", "K").await, 404);
            assert_eq!(status(url, &token, "globex", "K").await, 200);
        }
        assert_eq!(put(&second, &token, "acme", "K", "new").await, 1, "a new life");

        assert_eq!(two.terminate(), 0);
        let again = place.run(&["tenant", "shred", "acme", "--yes", "--json"]).ok();
        let again: Value = serde_json::from_str(&again).unwrap();
        assert_eq!(again["destroyed"], json!({ "data_keys": 1, "secrets": 1, "versions": 1 }));
        let instances = &again["instances"];
        assert_eq!(instances["cleared"].as_array().unwrap().len(), 1, "the other has withdrawn: {again}");
        assert_eq!((&instances["unconfirmed"], &instances["lost"]), (&json!([]), &json!([])));
        let files = if database.starts_with("postgres") { "until_vacuum" } else { "clear" };
        assert_eq!((&again["database_files"], &again["infisical_folder"]), (&json!(files), &json!("not_configured")));
        assert_eq!(status(&first, &token, "acme", "K").await, 404);
        assert_eq!(one.terminate(), 0);
        let nobody = place.run(&["tenant", "shred", "acme", "--yes"]).ok();
        assert!(nobody.contains("0 secrets") && nobody.contains("of 0 running instances"), "{nobody}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_left_in_infisical_is_told() {
    let mut infisical = Infisical::start().await;
    infisical.world().put("prod", "/tenants/acme", "K", "upstream");
    let rule = "[[rules]]\ntenants = \"owned\"\nphase = \"database\"\n";
    let mut place = place("sqlite:secretier.db", &format!("{}timeout = \"2s\"\n{rule}", infisical.section()));
    place.set("INFISICAL_CLIENT_SECRET", &infisical.credentials.client_secret);
    let (_serving, url) = place.serve();
    let token = token(&place);
    assert_eq!(status(&url, &token, "acme", "K").await, 200);
    put(&url, &token, "owned", "K", "own").await;
    infisical.world().put("prod", "/tenants/owned", "K", "of before");
    let shred = |tenant: &str| place.run(&["tenant", "shred", tenant, "--yes"]).ok();

    let shown = shred("acme");
    let advice = "its folder /tenants/acme in Infisical is still there; delete it, or lookups bring the secrets back";
    assert!(shown.contains(advice), "{shown}");
    assert_eq!(status(&url, &token, "acme", "K").await, 200, "as was told");
    let shown = shred("owned");
    assert!(
        shown.contains("its folder /tenants/owned in Infisical is still there; lookups do not go to it"),
        "{shown}"
    );
    assert_eq!(status(&url, &token, "owned", "K").await, 404);

    infisical.world().delete_folder("prod", "/tenants/acme");
    let shown = shred("acme");
    assert!(!shown.contains("Infisical"), "{shown}");
    infisical.server.stop().await;
    let shown = shred("acme");
    assert!(shown.contains("its folder /tenants/acme in Infisical, which could not be looked up"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_terminal_and_without_yes_nothing_is_shredded() {
    let place = place("sqlite:secretier.db", "");
    let (_serving, url) = place.serve();
    let token = token(&place);
    put(&url, &token, "acme", "K", "v").await;
    let shred = ["tenant", "shred", "acme", "--config", "secretier.toml"];
    let told = place.run_with(&shred, "acme\n").failed(2);
    assert!(told.contains("--yes") && told.contains("terminal"), "{told}");
    assert_eq!(status(&url, &token, "acme", "K").await, 200);
}

#[test]
fn what_cannot_be_shredded_is_told() {
    let mut place = place("sqlite:secretier.db", "");
    let told = place.run(&["tenant", "shred", "nobody", "--yes"]).failed(1);
    assert!(told.contains("no tenant nobody"), "{told}");
    let told = place.run(&["tenant", "shred", "No Body", "--yes"]).failed(2);
    assert!(told.contains("lower-case"), "{told}");
    place.run(&["tenant", "shred", "--yes"]).failed(2);
    place.set("SECRETIER_DATABASE__URL", "postgres://u:hunter2@127.0.0.1:9/d");
    let told = place.run(&["tenant", "shred", "acme", "--yes"]).failed(1);
    assert!(told.contains("database") && !told.contains("hunter2"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_does_not_confirm_is_named_and_the_data_is_gone_all_the_same() {
    let place = place("sqlite:secretier.db", "");
    let (_serving, url) = place.serve();
    let token = token(&place);
    put(&url, &token, "acme", "K", "v").await;
    // One was heard of just now and never again, one a minute ago.
    let file = place.path().join("secretier.db");
    let mut rows = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    rows.batch_execute(&format!(
        "PRAGMA busy_timeout = 5000; INSERT INTO instances (id, name, master_keys, changes, seen_at) \
         VALUES ('x', 'stuck/1', '', 0, {}), ('y', 'crashed/2', '', 0, {})",
        now - 10_000,
        now - 60_000,
    ))
    .unwrap();
    drop(rows);
    let ended = place.run(&["tenant", "shred", "acme", "--yes", "--wait", "2s"]);
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stdout.contains("destroyed 1 data key") && ended.stdout.contains("of 1 running instance\n"));
    let told = ended.stderr;
    assert!(told.contains("are destroyed") && told.contains("waiting for instances to follow: "), "{told}");
    for name in ["stuck/1", "crashed/2"] {
        assert!(told.contains(&format!("- {name} ")), "{told}");
    }
    assert!(told.contains("does not tell for how long"), "{told}");
    assert_eq!(status(&url, &token, "acme", "K").await, 404);
}
