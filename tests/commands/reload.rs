//! SIGHUP, and a file that is watched: `serve` goes by another configuration.

use std::{
    fs,
    os::unix::fs::symlink,
    time::{Duration, Instant},
};

use secretier::tiers::upstream::standin::Route;

use crate::{
    program::{HANGS, Infisical, Place, Running, client, look_up, master_key},
    within::eventually,
};

const GOOD: &str = "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n";

/// What is said of each outcome.
const APPLIED: &str = "is in force";
const REFUSED: &str = "nothing has changed error=";
const UNCHANGED: &str = "nothing has changed that can be";

fn place(config: &str) -> Place {
    let place = Place::new(config);
    place.write("master.key", &master_key());
    place
}

fn token(place: &Place) -> String {
    let create = ["token", "create", "--name", "api", "--tenants", "*", "--actions", "read,write"];
    place.run(&create).ok().trim().to_owned()
}

/// A write's status.
async fn put(url: &str, token: &str, key: &str, value: &str) -> u16 {
    let request = client().put(format!("{url}/v1/tenants/acme/secrets/{key}?create_tenant=true")).bearer_auth(token);
    request.json(&serde_json::json!({ "value": value })).send().await.unwrap().status().as_u16()
}

async fn metric(url: &str, token: &str, name: &str) -> String {
    let page = client().get(format!("{url}/metrics")).bearer_auth(token).send().await.unwrap().text().await.unwrap();
    let line = page.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in\n{page}"));
    line.trim().to_owned()
}

async fn reloads(url: &str, token: &str, outcome: &str) -> String {
    metric(url, token, &format!("secretier_config_reloads_total{{outcome=\"{outcome}\"}}")).await
}

/// Has it read this, and waits until it has said what came of it, for the so many-th time.
fn reload(place: &Place, serving: &Running, config: &str, said: &str, times: usize) {
    place.write("secretier.toml", config);
    serving.signal("HUP");
    serving.until_said_times(said, times);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_file_changes_nothing_and_names_key_and_file_and_one_put_right_is_applied() {
    let place = place(&format!("{GOOD}max_value = 8\n"));
    let (mut serving, url) = place.serve();
    let token = token(&place);
    assert_eq!(put(&url, &token, "K", "12345678").await, 201);
    let wrong = [
        (format!("{GOOD}max_value = 4\nmax_in_flight = 0\n"), "server.max_in_flight"),
        (format!("{GOOD}max_value = 4\n[memory]\nttll = \"1s\"\n"), "ttll"),
        (format!("{GOOD}max_value = 4\n[[rules]]\ntenants = \"a[\"\nttl = \"1s\"\n"), "rules[0].tenants"),
        (format!("{GOOD}max_value = 4\nphase = \n"), "line 5"),
        (format!("{GOOD}max_value = 4\n[memory]\nmax_stale = \"0s\"\n[keys]\nsources = []\n"), "keys.sources"),
        // What it would take is there only after a restart.
        (
            format!(
                "phase = \"hybrid\"\n{GOOD}max_value = 4\n[infisical]\nsite_url = \"http://127.0.0.1:9\"\nproject_id = \"p\"\n\
                 client_id = \"c\"\nclient_secret = \"s\"\n"
            ),
            "phase: hybrid needs an [infisical] or a [directory] section",
        ),
    ];
    for (number, (config, key)) in wrong.iter().enumerate() {
        reload(&place, &serving, config, REFUSED, number + 1);
        let log = serving.stderr();
        let line = log.lines().rfind(|line| line.contains(REFUSED)).unwrap();
        assert!(line.contains(key) && line.contains("secretier.toml") && line.contains("ERROR"), "{key}: {line}");
        // The same that `config check` tells, which does not know what is running.
        let checked = place.run(&["config", "check"]);
        for fault in checked.stderr.lines().skip(1) {
            assert!(line.replace('\\', "").contains(&fault.replace('\\', "")), "{fault}\nin\n{line}");
        }
        assert_eq!(put(&url, &token, "K", "12345678").await, 200, "{key}: the settings of before go on");
    }
    fs::remove_file(place.path().join("secretier.toml")).unwrap();
    serving.signal("HUP");
    serving.until_said_times("there is no such file", 1);
    assert_eq!(put(&url, &token, "K", "12345678").await, 200);
    assert_eq!(reloads(&url, &token, "refused").await, (wrong.len() + 1).to_string());

    reload(&place, &serving, &format!("{GOOD}max_value = 4\n"), APPLIED, 1);
    assert!(serving.stderr_line(APPLIED).contains("server.max_value"));
    assert_eq!(put(&url, &token, "K", "12345678").await, 413);
    assert_eq!(put(&url, &token, "K", "1234").await, 200);
    reload(&place, &serving, &format!("{GOOD}max_value = \"4B\"\n"), UNCHANGED, 1);
    assert_eq!((reloads(&url, &token, "applied").await, reloads(&url, &token, "unchanged").await).0, "1");
    assert!(metric(&url, &token, "secretier_config_reloaded_timestamp_seconds").await.parse::<f64>().unwrap() > 1.7e9);
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_a_restart_is_named_without_its_value_and_the_rest_is_in_force() {
    let place = place(GOOD);
    let (mut serving, url) = place.serve();
    let token = token(&place);
    let config = "environment = \"prod\"\n[server]\nlisten = \"127.0.0.2:4242\"\nmax_value = 4\n[database]\n\
                  url = \"postgres://u:hunter2@127.0.0.3/d\"\n[log]\nformat = \"json\"\n";
    reload(&place, &serving, config, APPLIED, 1);
    let warned = serving.stderr_line("wait for a restart");
    for name in ["server.listen", "database.url", "log.format"] {
        assert!(warned.contains(name), "{name}: {warned}");
    }
    assert!(warned.contains("WARN") && !warned.contains("max_value"), "{warned}");
    for value in ["127.0.0.2", "4242", "hunter2", "127.0.0.3"] {
        assert!(!serving.stderr().contains(value), "{value}: {}", serving.stderr());
    }
    assert_eq!(put(&url, &token, "K", "12345678").await, 413);
    assert_eq!(put(&url, &token, "K", "1234").await, 201);
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_and_the_level_of_the_log_are_in_force_after_sighup() {
    let infisical = Infisical::start().await;
    infisical.world().put("prod", "/tenants/acme", "A", "a");
    let config = format!("phase = \"database\"\n{GOOD}{}", infisical.section());
    let mut place = place(&config);
    place.set("INFISICAL_CLIENT_SECRET", &infisical.credentials.client_secret);
    let (mut serving, url) = place.serve();
    let token = token(&place);
    assert_eq!(look_up(&url, &token, "acme", "A").await.0, 404);
    let ruled = format!("{config}[[rules]]\ntenants = \"acme\"\nphase = \"infisical\"\n");
    reload(&place, &serving, &ruled, APPLIED, 1);
    let (status, answered_by, body) = look_up(&url, &token, "acme", "A").await;
    assert_eq!((status, body.contains("\"value\":\"a\"")), (200, true), "{body}");
    assert!(answered_by.starts_with("infisical"), "{answered_by}");
    assert!(!serving.stderr().contains("DEBUG"));

    reload(&place, &serving, &format!("{ruled}[log]\nlevel = \"debug\"\n"), APPLIED, 2);
    let refresh = client().post(format!("{url}/v1/tenants/acme/refresh")).bearer_auth(&token).send().await.unwrap();
    assert_eq!(refresh.status(), 200);
    assert!(serving.stderr_line("DEBUG").contains("secretier::"));
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_by_the_hundred_neither_end_it_nor_pile_up() {
    let place = place(GOOD);
    let (mut serving, url) = place.serve();
    let token = token(&place);
    put(&url, &token, "K", "v").await;
    let status = |name: &str| -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", serving.id())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        line.split(' ').next().unwrap().parse().unwrap()
    };
    let storm = |signals: usize| {
        for number in 0..signals {
            place.write("secretier.toml", &format!("{GOOD}max_value = {}\n", 100 + number % 2));
            serving.signal("HUP");
        }
    };
    storm(100);
    assert_eq!(look_up(&url, &token, "acme", "K").await.0, 200);
    let resident = status("VmRSS:");
    storm(300);
    reload(
        &place,
        &serving,
        &format!("{GOOD}max_value = 4\n[log]\nlevel = \"warn\"\nformat = \"json\"\n"),
        "log.format",
        1,
    );
    assert_eq!(put(&url, &token, "K", "12345").await, 413);
    assert_eq!(look_up(&url, &token, "acme", "K").await.0, 200);
    let grown = status("VmRSS:").saturating_sub(resident);
    assert!(grown < 16 << 10, "{grown} KiB more than before");
    assert!(status("Threads:") < 100);
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_watched_is_applied_through_a_swapped_link_and_a_wrong_one_told_once() {
    let place = place("");
    let watching = format!("{GOOD}watch_config = \"100ms\"\n");
    // As Kubernetes mounts a ConfigMap: a link to a file, behind a link to a folder that is swapped.
    let swap = |name: &str, config: &str| {
        let folder = place.path().join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("secretier.toml"), config).unwrap();
        symlink(name, place.path().join("..new")).unwrap();
        fs::rename(place.path().join("..new"), place.path().join("..data")).unwrap();
    };
    fs::remove_file(place.path().join("secretier.toml")).unwrap();
    symlink("..data/secretier.toml", place.path().join("secretier.toml")).unwrap();
    swap("1", &watching);
    let (mut serving, url) = place.serve();
    let token = token(&place);
    assert_eq!(put(&url, &token, "K", "12345678").await, 201);

    swap("2", &format!("{watching}max_value = 4\n"));
    serving.until_said_times(APPLIED, 1);
    assert_eq!(put(&url, &token, "K", "12345678").await, 413);

    swap("3", &format!("{watching}max_value = \"many\"\n"));
    serving.until_said_times(REFUSED, 1);
    // It is looked at again and again meanwhile.
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(put(&url, &token, "K", "12345678").await, 413);

    swap("4", &format!("{GOOD}max_value = 8\n"));
    serving.until_said_times(APPLIED, 2);
    assert_eq!(put(&url, &token, "K", "12345678").await, 200);
    assert_eq!(reloads(&url, &token, "refused").await, "1", "{}", serving.stderr());
    assert_eq!(reloads(&url, &token, "applied").await, "2", "{}", serving.stderr());

    // That was the end of watching; SIGHUP is left.
    swap("5", &format!("{GOOD}max_value = 4\n"));
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(reloads(&url, &token, "applied").await, "2", "{}", serving.stderr());
    serving.signal("HUP");
    serving.until_said_times(APPLIED, 3);
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_that_comes_before_it_serves_ends_nothing() {
    let infisical = Infisical::start().await;
    infisical.world().put("prod", "/keys", "MASTER_KEY", &master_key());
    let config =
        format!("{GOOD}{}timeout = \"1m\"\n[keys]\nsources = [\"infisical:/keys/MASTER_KEY\"]\n", infisical.section());
    let mut place = Place::new(&config);
    place.set("INFISICAL_CLIENT_SECRET", &infisical.credentials.client_secret);
    let gate = infisical.world().gate(Route::List);
    let mut serving = place.start(&["serve", "--config", "secretier.toml"]);
    // It waits for its master key.
    gate.arrived(1).await;
    place.write("secretier.toml", &config.replace("[keys]", "[memory]\nttl = \"1m\"\n[keys]"));
    for _ in 0..5 {
        serving.signal("HUP");
    }
    gate.open();
    serving.stderr_line("serving");
    // What came meanwhile is done then.
    assert!(serving.stderr_line(APPLIED).contains("memory.ttl"));
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_reload_says_holds_a_secret() {
    let infisical = Infisical::start().await;
    infisical.world().put("prod", "/tenants/acme", "A", "a");
    let with = |secret: &str, more: &str| {
        let section = infisical.section().replace("{ env = \"INFISICAL_CLIENT_SECRET\" }", secret);
        format!("phase = \"infisical\"\n{GOOD}{section}{more}")
    };
    let secret = infisical.credentials.client_secret.clone();
    let place = place(&with("{ file = \"secret\" }", ""));
    place.write("secret", "hunter2-of-yesterday");
    let (mut serving, url) = place.serve();
    let token = token(&place);
    assert_eq!(look_up(&url, &token, "acme", "A").await.0, 503);

    // The same setting, and another secret behind it.
    place.write("secret", &secret);
    reload(&place, &serving, &with("{ file = \"secret\" }", ""), APPLIED, 1);
    assert!(serving.stderr_line(APPLIED).contains("infisical.client_secret"));
    let began = Instant::now();
    // What just failed is told again for a second.
    while look_up(&url, &token, "acme", "A").await.0 != 200 {
        assert!(began.elapsed() < HANGS, "{}", serving.stderr());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let in_place = format!("\"{secret}\"");
    let wrong = [
        with("47114711", ""),
        with("\"hunter2\" hunter2", ""),
        with(&in_place, "clientsecret = \"hunter2\"\n"),
        with(&in_place, "[database]\nurl = \"mysql://u:hunter2@h/d\"\n"),
        with(&in_place, "[keys]\nsources = [\"hunter2\"]\n"),
        with("{ file = \"hidden\" }", ""),
        with("\"\"", ""),
    ];
    for (number, config) in wrong.iter().enumerate() {
        reload(&place, &serving, config, REFUSED, number + 1);
    }
    let waiting = "[log]\nlevel = \"trace\"\n[keys]\nsources = [\"passphrase\"]\npassphrase = \"hunter2\"\n[database]\n\
                   url = \"postgres://u:hunter2@h/d\"\n";
    reload(&place, &serving, &with(&in_place, waiting), APPLIED, 2);
    assert!(serving.stderr_line("wait for a restart").contains("keys.passphrase"));
    assert_eq!(look_up(&url, &token, "acme", "A").await.0, 200);
    assert_eq!(serving.terminate(), 0);
    let said = serving.stderr() + &serving.stdout();
    for secret in [secret.as_str(), "hunter2", "47114711", token.as_str()] {
        assert!(!said.contains(secret), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_again_and_again_is_said_as_often_as_is_configured_and_the_rest_is_counted() {
    let place = place(&format!("{GOOD}[log]\nlines_per_minute = 2\n"));
    let (mut serving, url) = place.serve();
    let token = token(&place);
    place.write("secretier.toml", "environment = \n");
    for number in 1..=5 {
        serving.signal("HUP");
        eventually(async || reloads(&url, &token, "refused").await == number.to_string()).await;
    }
    assert_eq!(metric(&url, &token, "secretier_log_lines_left_out_total{by=\"secretier\"}").await, "3");
    assert_eq!(serving.terminate(), 0);
    let log = serving.stderr();
    assert_eq!(log.matches(REFUSED).count(), 2, "{log}");
    let told = serving.stderr_line("said again and again");
    assert!(told.contains("place=\"secretier::cli::reload:") && told.contains("left_out=3"), "{told}");
    assert_eq!(log.matches("SIGHUP: reading").count(), 5, "what was done is said each time: {log}");
}
