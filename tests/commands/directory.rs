//! A directory as upstream, with the commands: served, migrated, and given back.

use std::fs;

use reqwest::StatusCode;
use serde_json::json;

use crate::{
    postgres::Postgres,
    program::{Place, keeping_client, look_up, master_key, secret_url},
};

/// A place whose secrets lie in `secrets`, beside the configuration.
fn place(url: Option<&str>, writable: bool) -> Place {
    let place = Place::new("");
    let folder = place.path().display().to_string();
    let url = url.map_or_else(|| format!("sqlite:{folder}/secretier.db"), str::to_owned);
    place.write("master.key", &format!("{}\n", master_key()));
    place.write(
        "secretier.toml",
        &format!(
            "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = \"{url}\"\ntimeout = \"30s\"\n\
             [keys]\nsources = [\"file:{folder}/master.key\"]\n\
             [directory]\npath = \"{folder}/secrets\"\nwritable = {writable}\ntimeout = \"30s\"\n"
        ),
    );
    for (tenant, key, value) in [("acme", "K", "a\n"), ("acme", "REF", "${K}"), ("globex", "K", "g")] {
        let folder = place.path().join("secrets").join(tenant);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(key), value).unwrap();
    }
    place
}

fn token(place: &Place) -> String {
    let create = ["token", "create", "--name", "api", "--tenants", "*", "--actions", "read,write"];
    place.run(&create).ok().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_are_migrated_from_a_directory_while_they_are_served_and_given_back_with_what_was_written() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let place = place(url.as_deref(), true);
        let token = token(&place);
        let (_serving, address) = place.serve();
        let get = async |tenant: &str, key: &str| look_up(&address, &token, tenant, key).await;
        assert_eq!(get("acme", "K").await.0, 200);
        let plan = place.run(&["migrate", "plan"]).ok();
        assert!(plan.contains("2 tenants would be migrated"), "{plan}");
        assert!(plan.contains("reads of folders"), "{plan}");
        for strategy in ["recursive", "folder"] {
            place.run(&["migrate", "run", "--all", "--cutover", "--strategy", strategy]).ok();
        }
        place.run(&["migrate", "verify", "--all"]).ok();

        // The database owns them: the files may go.
        fs::rename(place.path().join("secrets"), place.path().join("away")).unwrap();
        let (status, _, body) = get("acme", "REF").await;
        assert_eq!((status, body.contains("${K}")), (200, true), "{body}");
        let written = keeping_client().put(secret_url(&address, "acme", "NEW")).bearer_auth(&token);
        let written = written.json(&json!({"value": "n"})).send().await.unwrap();
        assert_eq!(written.status(), StatusCode::CREATED);

        fs::rename(place.path().join("away"), place.path().join("secrets")).unwrap();
        let refused = place.run(&["migrate", "rollback", "acme"]);
        assert_ne!(refused.code, 0, "what was written here would be lost");
        place.run(&["migrate", "rollback", "acme", "--push"]).ok();
        assert_eq!(fs::read_to_string(place.path().join("secrets/acme/NEW")).unwrap(), "n");
        assert_eq!(fs::read_to_string(place.path().join("secrets/acme/K")).unwrap(), "a\n");
        assert_eq!(fs::read_to_string(place.path().join("secrets/acme/REF")).unwrap(), "${K}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_is_not_given_back_to_files_that_are_not_written_where_they_would_have_to_be() {
    let place = place(None, false);
    let token = token(&place);
    place.run(&["migrate", "run", "--all", "--cutover"]).ok();
    let (_serving, address) = place.serve();
    let written = keeping_client().put(secret_url(&address, "acme", "NEW")).bearer_auth(&token);
    assert!(written.json(&json!({"value": "n"})).send().await.unwrap().status().is_success());
    let refused = place.run(&["migrate", "rollback", "acme", "--push"]);
    let told = format!("{}{}", refused.stdout, refused.stderr);
    assert!(refused.code != 0 && told.contains("directory.writable"), "{told}");
    assert_eq!(look_up(&address, &token, "acme", "NEW").await.0, 200, "it is as it was");
    // With nothing to write there is nothing in the way.
    place.run(&["migrate", "rollback", "globex"]).ok();
}

#[test]
fn a_configuration_names_one_upstream_and_a_directory_by_an_absolute_path() {
    let both = Place::new(
        "environment = \"prod\"\n[directory]\npath = \"secrets\"\n[infisical]\nsite_url = \"http://127.0.0.1:1\"\n\
         project_id = \"p\"\nclient_id = \"c\"\nclient_secret = \"s\"\n",
    );
    let told = both.run(&["config", "check"]);
    let told = format!("{}{}", told.stdout, told.stderr);
    assert!(told.contains("leave one of the two out"), "{told}");
    let relative = Place::new("environment = \"prod\"\n[directory]\npath = \"secrets\"\n").run(&["config", "check"]);
    let told = format!("{}{}", relative.stdout, relative.stderr);
    assert!(told.contains("directory.path must be an absolute path"), "{told}");
    let place = Place::new("");
    let folder = place.path().display().to_string();
    place.write("master.key", &format!("{}\n", master_key()));
    place.write(
        "secretier.toml",
        &format!("environment = \"prod\"\n[keys]\nsources = [\"file:{folder}/master.key\"]\n[directory]\npath = \"{folder}\"\n"),
    );
    let told = place.run(&["config", "check"]);
    let told = format!("{}{}", told.stdout, told.stderr);
    assert!(told.contains("keys.sources lies in it"), "{told}");
}
