//! `secretier serve`: with the configuration that people write first, and when it cannot start.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
};

use crate::{
    postgres::Postgres,
    program::{HANGS, Infisical, Place, client, look_up, master_key},
    quick::times,
    within::within,
};

/// The configuration, apart from addresses and ids.
fn everything(infisical: &Infisical, phase: &str, database: &str) -> Place {
    let mut place = Place::new(&format!(
        r#"
environment = "prod"
phase = "{phase}"

[server]
listen = "127.0.0.1:0"

[database]
url = "{database}"

{infisical}tenants_path = "/tenants"
requests_per_minute = 100

[keys]
sources = ["infisical:/hono-api/MASTER_ENCRYPTION_KEY", "file:master.key", "env:SECRETIER_MASTER_KEY"]
"#,
        infisical = infisical.section(),
    ));
    place.set("INFISICAL_CLIENT_SECRET", &infisical.credentials.client_secret);
    place
}

/// A frame of HTTP/2 on the connection itself (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    [&[0, 0, u8::try_from(payload.len()).unwrap(), kind, flags, 0, 0, 0, 0], payload].concat()
}

#[test]
fn what_a_client_has_a_library_say_again_and_again_is_bounded_and_counted() {
    let (settings, ping, ack) = (4, 6, 1);
    let place = Place::new("environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n");
    place.write("master.key", &master_key());
    let (mut serving, url) = place.serve();
    let mut stream = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(HANGS)).unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    stream.write_all(&frame(settings, 0, &[])).unwrap();
    // h2 warns of each answer to a ping that it never sent.
    for _ in 0..1000 {
        stream.write_all(&frame(ping, ack, b"no ping.")).unwrap();
    }
    stream.write_all(&frame(ping, 0, b"the last")).unwrap();
    let (mut read, mut answer) = ([0; 1024], Vec::new());
    while !answer.windows(17).any(|window| window == frame(ping, ack, b"the last")) {
        let length = stream.read(&mut read).unwrap();
        assert!(length > 0, "it was closed: {}", serving.stderr());
        answer.extend_from_slice(&read[..length]);
    }
    drop(stream);
    assert_eq!(serving.terminate(), 0);
    let log = serving.stderr();
    let said = log.lines().filter(|line| line.contains("h2::") && line.contains("never sent")).count();
    assert_eq!(said, 10, "{log}");
    assert!(
        log.lines().any(|line| line.contains("were left out library=\"h2::") && line.contains("left_out=990")),
        "{log}"
    );
}

fn token(place: &Place) -> String {
    let create = ["token", "create", "--name", "api", "--tenants", "*", "--actions", "read,write"];
    place.run(&create).ok().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_configuration_works_in_each_phase_on_both_databases() {
    let server = Postgres::shared();
    for database in ["sqlite", "postgres"] {
        for phase in ["infisical", "hybrid", "database"] {
            let infisical = Infisical::start().await;
            infisical.world().put("prod", "/hono-api", "MASTER_ENCRYPTION_KEY", &master_key());
            infisical.world().put("prod", "/tenants/acme", "STRIPE_KEY", "sk_1");
            let url = match database {
                "sqlite" => "sqlite:secretier.db".to_owned(),
                _ => server.database().await,
            };
            let place = everything(&infisical, phase, &url);
            assert!(place.run(&["config", "check"]).ok().contains("is good"));
            let (mut serving, url) = place.serve();
            let token = token(&place);
            let put = crate::program::client()
                .put(format!("{url}/v1/tenants/acme/secrets/NEW?create_tenant=true"))
                .bearer_auth(&token);
            let put = put.json(&serde_json::json!({ "value": "n" })).send().await.unwrap();
            assert_eq!(put.status(), 201, "{phase} on {database}");
            assert!(look_up(&url, &token, "acme", "NEW").await.2.contains("\"value\":\"n\""));
            let upstream = infisical.world().value("prod", "/tenants/acme", "NEW");
            let (status, _, body) = look_up(&url, &token, "acme", "STRIPE_KEY").await;
            if phase == "database" {
                assert_eq!((status, upstream), (404, None), "Infisical takes no part");
            } else {
                assert_eq!((status, upstream.as_deref()), (200, Some("n")), "{body}");
                assert!(body.contains("sk_1"));
            }
            assert_eq!(serving.terminate(), 0);
            assert_eq!(
                place.path().join("secretier.db").exists(),
                database == "sqlite",
                "paths are relative to where it runs"
            );

            // The same again, with what the first run left; with the key in the file, Infisical is not needed.
            let (mut again, url) = place.serve();
            assert!(look_up(&url, &token, "acme", "NEW").await.2.contains("\"value\":\"n\""), "{phase} on {database}");
            assert_eq!(again.terminate(), 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_same_key_in_a_file_a_start_needs_no_infisical() {
    let mut infisical = Infisical::start().await;
    let key = master_key();
    infisical.world().put("prod", "/hono-api", "MASTER_ENCRYPTION_KEY", &key);
    infisical.world().put("prod", "/tenants/acme", "K", "v");
    let mut place = everything(&infisical, "hybrid", "sqlite:secretier.db");
    let (mut serving, url) = place.serve();
    let token = token(&place);
    assert_eq!(look_up(&url, &token, "acme", "K").await.0, 200);
    assert_eq!(serving.terminate(), 0);
    infisical.server.stop().await;
    place.write("master.key", &key);
    let (mut serving, url) = place.serve();
    assert!(look_up(&url, &token, "acme", "K").await.1.starts_with("database; hit"));
    assert_eq!(serving.terminate(), 0);
    std::fs::remove_file(place.path().join("master.key")).unwrap();
    place.set("SECRETIER_MASTER_KEY", &key);
    let (_serving, url) = place.serve();
    assert!(look_up(&url, &token, "acme", "K").await.1.starts_with("database; hit"));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_master_key_it_does_not_start_and_names_each_source() {
    let infisical = Infisical::start().await;
    let place = everything(&infisical, "hybrid", "sqlite:secretier.db");
    let told = place.run(&["serve"]).failed(2);
    for source in ["infisical:/hono-api/MASTER_ENCRYPTION_KEY", "file:master.key", "env:SECRETIER_MASTER_KEY"] {
        assert!(told.contains(source), "{told}");
    }
}

fn without_infisical(listen: &str) -> Place {
    let place = Place::new(&format!("environment = \"prod\"\n[server]\nlisten = \"{listen}\"\n"));
    place.write("master.key", &master_key());
    place
}

#[test]
fn a_key_file_that_others_can_read_is_refused_with_advice() {
    let place = without_infisical("127.0.0.1:0");
    let key = place.path().join("master.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let told = place.run(&["serve"]).failed(2);
    assert!(told.contains("chmod 600 master.key"), "{told}");
}

#[test]
fn a_key_that_is_none_is_refused_and_not_shown() {
    let place = without_infisical("127.0.0.1:0");
    place.write("master.key", "hunter2hunter2");
    let told = place.run(&["serve"]).failed(2);
    assert!(told.contains("master.key") && !told.contains("hunter2"), "{told}");
}

#[test]
fn a_database_of_another_environment_is_refused() {
    let mut place = without_infisical("127.0.0.1:0");
    place.serve().0.terminate();
    place.set("SECRETIER_ENVIRONMENT", "staging");
    let told = place.run(&["serve"]).failed(1);
    assert!(told.contains("prod") && told.contains("staging"), "{told}");
}

#[test]
fn a_port_in_use_is_told() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let place = without_infisical(&address);
    let told = place.run(&["serve"]).failed(1);
    assert!(told.contains(&address) && told.contains("in use"), "{told}");
}

#[test]
fn a_database_that_cannot_be_reached_is_told_without_its_password() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut place = without_infisical("127.0.0.1:0");
    place.set("SECRETIER_DATABASE__URL", &format!("postgres://u:hunter2@{closed}/d"));
    let told = place.run(&["serve"]).failed(1);
    assert!(told.contains("database") && !told.contains("hunter2"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_was_acknowledged_survives_kill_9_at_any_moment() {
    for database in ["sqlite:secretier.db".to_owned(), Postgres::shared().database().await] {
        let place = Place::new(&format!(
            "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = \"{database}\"\n"
        ));
        place.write("master.key", &master_key());
        let mut last = 0;
        for round in 0..times(8, 2) {
            let (serving, url) = place.serve();
            let token = if round == 0 { place.write("token", &token(&place)) } else { place.path().join("token") };
            let token = std::fs::read_to_string(token).unwrap();
            let (acknowledge, mut acknowledged) = tokio::sync::watch::channel(last);
            let writer = tokio::spawn({
                let (address, token) = (format!("{url}/v1/tenants/acme/secrets/N"), token.clone());
                async move {
                    for number in last + 1.. {
                        let body = serde_json::json!({ "value": number.to_string() });
                        match client()
                            .put(format!("{address}?create_tenant=true"))
                            .bearer_auth(&token)
                            .json(&body)
                            .send()
                            .await
                        {
                            Ok(answer) => assert!(answer.status().is_success(), "{answer:?}"),
                            Err(_) => return,
                        }
                        acknowledge.send_replace(number);
                    }
                }
            });
            within("three writes are acknowledged", acknowledged.wait_for(|number| *number >= last + 3)).await.unwrap();
            // Killed while it writes.
            drop(serving);
            within("the writer is told that nobody listens", writer).await.unwrap();
            last = *acknowledged.borrow();

            let (_serving, url) = place.serve();
            let (status, _, body) = look_up(&url, &token, "acme", "N").await;
            assert_eq!(status, 200, "{body}");
            let held: i32 =
                serde_json::from_str::<serde_json::Value>(&body).unwrap()["value"].as_str().unwrap().parse().unwrap();
            // The one that was under way may have been done, or not.
            assert!(held == last || held == last + 1, "{last} was acknowledged and {held} is held");
            last = held;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_proxy_of_the_environment_is_used_by_a_server_or_a_command() {
    let infisical = Infisical::start().await;
    infisical.world().put("prod", "/tenants/acme", "K", "v");
    let mut place = everything(&infisical, "infisical", "sqlite:secretier.db");
    place.write("master.key", &master_key());
    // Nobody listens there: whoever went by them would fail.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        place.set(name, &format!("http://{nobody}"));
        place.set(&name.to_lowercase(), &format!("http://{nobody}"));
    }
    let (_serving, url) = place.serve();
    let token = token(&place);
    assert_eq!(look_up(&url, &token, "acme", "K").await.0, 200);
    place.set("SECRETIER_TOKEN", &token);
    let got = place.run_with(&["get", "acme", "K", "--url", &url], "");
    assert_eq!(got.ok(), "v");

    // One that is named by its variable is used, and its password is not shown.
    let named = place.path().join("secretier.toml");
    let text = std::fs::read_to_string(&named).unwrap();
    let (site, proxied) = (infisical.server.url(), "https://localhost:1\"\nproxy = { env = \"HTTPS_PROXY\" }\n#");
    place.write("secretier.toml", &text.replace(&format!("{site}\""), proxied));
    place.set("HTTPS_PROXY", &format!("http://me:hunter2@{nobody}"));
    place.run(&["config", "check"]).ok();
    let shown = place.run(&["config", "show"]).ok();
    assert!(shown.contains("HTTPS_PROXY") && !shown.contains("hunter2"), "{shown}");
    let (serving, url) = place.serve();
    let (status, _, body) = look_up(&url, &token, "acme", "K").await;
    assert!(status == 503 && body.contains("proxy_unreachable"), "{body}");
    assert!(!body.contains("hunter2") && !serving.stderr().contains("hunter2"));

    for wrong in ["socks5://hunter2@p:1", "hunter2", "http://", "http://p:1/hunter2", "https://me:hunter2@p:1"] {
        place.set("HTTPS_PROXY", wrong);
        let fault = place.run(&["config", "check"]).failed(2);
        assert!(fault.contains("infisical.proxy") && fault.contains("http://proxy:3128"), "{wrong}: {fault}");
        assert!(!fault.contains("hunter2"), "{fault}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_url_of_the_database_may_stand_in_a_file_for_the_server_and_for_commands() {
    let server = Postgres::shared();
    let place = Place::new(
        "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = { file = \"database.url\" }\n",
    );
    place.write("master.key", &master_key());
    let fault = place.run(&["config", "check"]).failed(2);
    assert!(fault.contains("url: the file database.url cannot be read: No such file"), "{fault}");
    assert_eq!(place.run(&["serve"]).failed(2), fault);

    let url = server.database().await.replace("postgres@", "postgres:hunter2@");
    let file = place.write("database.url", &format!("{url}\n"));
    let shown = place.run(&["config", "show"]).ok();
    assert!(shown.contains("database.url") && !shown.contains("hunter2"), "{shown}");
    let token = token(&place);
    let (mut serving, url) = place.serve();
    assert_eq!(look_up(&url, &token, "acme", "K").await.0, 404);
    assert!(place.run(&["token", "list"]).ok().contains("api"));
    assert_eq!(serving.terminate(), 0);

    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let warned = place.run(&["config", "check"]).stderr;
    assert!(warned.contains("mode 0644") && warned.contains("database.url") && !warned.contains("hunter2"), "{warned}");
}
