//! `secretier health`, as a container or a service manager runs it: exit code and one line.

use std::{net::TcpListener, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use crate::{
    postgres::Postgres,
    program::{Ended, Infisical, Place, Running, client, look_up, master_key, secret_url},
    relay::Relay,
    within::{eventually, output},
};

const SERVER: &str = "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n";

fn place(config: &str) -> Place {
    let place = Place::new(config);
    place.write("master.key", &master_key());
    place
}

/// Serves at a port that the system chooses, and tells it to the commands that come.
fn serve(place: &mut Place) -> (Running, String) {
    let (running, url) = place.serve();
    place.set("SECRETIER_SERVER__LISTEN", url.trim_start_matches("http://"));
    (running, url)
}

fn state(ended: &Ended) -> (i32, String) {
    assert_eq!(ended.stdout.lines().count(), 1, "{ended:?}");
    (ended.code, ended.stdout.trim_end().to_owned())
}

#[test]
fn an_instance_that_answers_is_healthy_and_one_that_has_ended_is_not() {
    let mut place = place(SERVER);
    let (mut serving, url) = serve(&mut place);
    assert_eq!(state(&place.run(&["health"])), (0, "ready database=up upstream=off audit=up".to_owned()));
    assert_eq!(state(&place.run(&["health", "--live"])), (0, "alive".to_owned()));
    let json = place.run(&["health", "--json"]).ok();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["tiers"]["database"]["state"], "up");
    assert_eq!(serving.terminate(), 0);
    for arguments in [&["health"][..], &["health", "--live"]] {
        let told = place.run(arguments).failed(1);
        assert!(told.contains("no answer") && told.contains(&url) && told.lines().count() == 1, "{told}");
    }
}

#[test]
fn what_has_become_wrong_in_the_file_leaves_a_running_instance_healthy() {
    let mut place = place(SERVER);
    let (_serving, _) = serve(&mut place);
    place.write("secretier.toml", &format!("{SERVER}max_value = \"much\"\nnonsense = 1\n[infisical]\n"));
    place.run(&["config", "check"]).failed(2);
    assert_eq!(state(&place.run(&["health"])).0, 0);
}

#[test]
fn the_unix_socket_is_asked_where_there_is_one() {
    let place = place(&format!("{SERVER}unix_socket = \"secretier.sock\"\n"));
    let (mut serving, _) = place.serve();
    assert_eq!(state(&place.run(&["health"])), (0, "ready database=up upstream=off audit=up".to_owned()));
    assert_eq!(serving.terminate(), 0);
    let told = place.run(&["health"]).failed(1);
    assert!(told.contains("no answer from secretier.sock"), "{told}");
}

#[test]
fn an_instance_is_asked_by_a_name_that_it_answers_to() {
    let mut place =
        place("environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[access]\nhosts = [\"proxy.internal\"]\n");
    let (_serving, _) = serve(&mut place);
    assert_eq!(state(&place.run(&["health"])).0, 0);
}

const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";

/// Puts a new certificate and its key into the files of an instance.
fn certify(place: &Path, name: &str) {
    let words = format!("req -x509 {KEY} -keyout key.new -out cert.new -days 2 -subj /CN={name}");
    let done = output(Command::new("openssl").args(words.split(' ')).current_dir(place));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    std::fs::set_permissions(place.join("key.new"), std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::rename(place.join("cert.new"), place.join("cert.pem")).unwrap();
    std::fs::rename(place.join("key.new"), place.join("key.pem")).unwrap();
}

#[test]
fn over_tls_the_name_in_the_certificate_does_not_matter_and_another_one_is_told_of() {
    let tls = "[server.tls]\ncertificate = \"cert.pem\"\nprivate_key = \"key.pem\"\n";
    let mut place = place(&format!("{SERVER}{tls}"));
    certify(place.path(), "proxy.example.org");
    let (_serving, url) = serve(&mut place);
    let ended = place.run(&["health"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");
    assert!(ended.stdout.starts_with("ready "), "{ended:?}");
    // As when a renewal has failed: the one before is served on.
    place.write("cert.pem", "no certificate\n");
    let ended = place.run(&["health"]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stderr.contains("another certificate than cert.pem holds"), "{ended:?}");
    assert!(ended.stderr.contains(&url.replace("http:", "https:")), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tier_that_is_down_degrades_it_and_with_the_last_one_it_is_not_healthy() {
    let mut infisical = Infisical::start().await;
    infisical.world().put("prod", "/tenants/acme", "K", "v");
    let server = Postgres::shared();
    let relay = Relay::to(server.port()).await;
    let url = server.database().await.replace(&format!(":{}/", server.port()), &format!(":{}/", relay.port()));
    let mut place = place(&format!(
        "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = \"{url}\"\n{}[keys]\n\
         sources = [\"file:master.key\"]\n",
        infisical.section()
    ));
    place.set("INFISICAL_CLIENT_SECRET", &infisical.credentials.client_secret);
    let (_serving, address) = serve(&mut place);
    let create = ["token", "create", "--name", "api", "--tenants", "*", "--actions", "read"];
    let token = place.run(&create).ok().trim().to_owned();
    assert_eq!(look_up(&address, &token, "acme", "K").await.0, 200);
    assert_eq!(state(&place.run(&["health"])), (0, "ready database=up upstream=up audit=up".to_owned()));

    infisical.server.stop().await;
    // Past memory: upstream is asked, and the copy is served.
    let fresh = client().get(secret_url(&address, "acme", "K")).bearer_auth(&token).header("cache-control", "no-cache");
    assert_eq!(fresh.send().await.unwrap().status(), 200);
    let (code, line) = state(&place.run(&["health"]));
    assert_eq!(code, 0, "{line}");
    assert!(line.starts_with("degraded database=up upstream=down cause="), "{line}");

    relay.cut().await;
    eventually(async || state(&place.run(&["health"])).0 == 1).await;
    let (_, line) = state(&place.run(&["health"]));
    assert!(line.starts_with("unavailable database=down upstream=down"), "{line}");
    assert_eq!(state(&place.run(&["health", "--live"])), (0, "alive".to_owned()), "to start it anew mends nothing");
}

#[test]
fn a_listener_that_never_answers_is_given_up() {
    let mut place = place(SERVER);
    // It takes connections into its queue and reads none, as an instance does that hangs.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    place.set("SECRETIER_SERVER__LISTEN", &silent.local_addr().unwrap().to_string());
    let told = place.run(&["health", "--live"]).failed(1);
    assert!(told.contains("no answer") && told.contains("within 2 s"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_server_at_the_address_is_not_taken_for_the_instance() {
    let infisical = Infisical::start().await;
    let mut place = place(SERVER);
    place.set("SECRETIER_SERVER__LISTEN", infisical.server.url().trim_start_matches("http://"));
    for arguments in [&["health"][..], &["health", "--live"]] {
        let told = place.run(arguments).failed(1);
        assert!(told.contains("tells no state"), "{told}");
    }
}

#[test]
fn what_names_no_listener_that_can_be_asked_is_wrong_usage() {
    let told = place(SERVER).run(&["health"]).failed(2);
    assert!(told.contains("server.listen"), "{told}");
    let tls = "[server.tls]\ncertificate = \"c\"\nprivate_key = \"k\"\nclient_ca = \"a\"\n";
    let told = place(&format!("environment = \"prod\"\n{tls}")).run(&["health"]).failed(2);
    assert!(told.contains("server.tls.client_ca") && told.contains("server.unix_socket"), "{told}");
    let told = place(SERVER).run_with(&["health", "--config", "nowhere.toml"], "").failed(2);
    assert!(told.contains("nowhere.toml"), "{told}");
    let told = place("[server]\nlisten = \"here\"\n").run(&["health"]).failed(2);
    assert!(told.contains("server.listen"), "{told}");
}
