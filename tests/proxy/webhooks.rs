//! Changes in Infisical that are heard of: by a signed notice, or because somebody asks.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use hmac::{Hmac, KeyInit as _, Mac as _};
use reqwest::Method;
use secretier::{
    phase::Phase,
    tiers::upstream::standin::{Fault, Rights, Route},
};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    app::{Answer, Backend, ENV, Instance, Setup, TestApp, eventually, on_both},
    within::within,
};

const ACME: &str = "/tenants/acme";
const SECRET: &str = "whsec-of-the-test";
pub(crate) const MINUTE: Duration = Duration::from_secs(61);

fn setup(backend: Backend, phase: Phase) -> Setup {
    let mut setup = Setup::new(backend, phase);
    setup.infisical = format!("webhook_secret = \"{SECRET}\"");
    setup
}

async fn started(backend: Backend, phase: Phase) -> TestApp {
    let app = setup(backend, phase).start().await;
    app.holds("acme", &[("A", "old")]);
    assert_eq!(app.get("acme", "A").await.value(), "old");
    if phase == Phase::Hybrid {
        app.stored(1).await;
    }
    app.world().mark();
    app
}

fn body(app: &TestApp, path: &str, at: i64) -> Value {
    let project = json!({
        "workspaceId": app.world().project_id(),
        "projectName": "Sample",
        "environment": ENV,
        "secretPath": path,
        "changedBy": "someone",
    });
    json!({"event": "secrets.modified", "project": project, "timestamp": at})
}

fn signature(at: i64, body: &str, secret: &str) -> String {
    let mut mac = <Hmac<Sha256>>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(body.as_bytes());
    format!("t={at};{}", hex::encode(mac.finalize().into_bytes()))
}

fn now(app: &TestApp) -> i64 {
    app.instance().clock.now().as_millis()
}

async fn send(instance: &Instance, body: String, signature: Option<String>) -> Answer {
    let mut request = instance.request(Method::POST, "/v1/hooks/infisical").body(body);
    if let Some(signature) = signature {
        request = request.header("x-infisical-signature", signature);
    }
    Answer::of(request).await
}

async fn send_signed(app: &TestApp, instance: &Instance, body: &Value) -> Answer {
    let text = body.to_string();
    let signature = signature(now(app), &text, SECRET);
    send(instance, text, Some(signature)).await
}

/// What Infisical sends when something in a folder has changed.
async fn notify(app: &TestApp, path: &str) -> Answer {
    send_signed(app, app.instance(), &body(app, path, now(app))).await
}

fn refreshing(answer: &Answer) -> Value {
    assert_eq!(answer.status, 202, "{answer:?}");
    answer.json()["refreshing"].clone()
}

pub(crate) async fn metric(instance: &Instance, series: &str) -> f64 {
    let page = instance.service.metrics.render();
    page.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok()).unwrap_or(0.0)
}

/// Folders that were read because they were said to have changed, or let go of, whatever came of it.
async fn settled(instance: &Instance) -> f64 {
    let mut sum = 0.0;
    for outcome in ["read", "nothing_held", "left"] {
        sum += metric(instance, &format!("secretier_refresh_queue_reads_total{{outcome=\"{outcome}\"}}")).await;
    }
    sum
}

async fn polls(instance: &Instance) -> f64 {
    let mut sum = 0.0;
    for outcome in ["told", "read", "compared", "failed", "no_budget"] {
        sum += metric(instance, &format!("secretier_change_polls_total{{outcome=\"{outcome}\"}}")).await;
    }
    sum
}

/// How often an instance has looked whose turn it is to do something.
async fn lease_looks(instance: &Instance) -> f64 {
    let mut sum = 0.0;
    for call in ["lease_holder", "renew_lease"] {
        sum += metric(instance, &format!("secretier_database_calls_total{{call=\"{call}\",outcome=\"ok\"}}")).await;
    }
    sum
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_notice_makes_the_new_value_served_here_and_on_another_instance() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = started(backend, phase).await;
            let beside = app.another().await;
            assert_eq!(app.get_from(&beside, "acme", "A").await.value(), "old");
            app.holds("acme", &[("A", "new"), ("B", "added")]);
            assert_eq!(app.get("acme", "A").await.value(), "old", "nobody has heard of it");
            assert_eq!(refreshing(&notify(&app, ACME).await), json!(["acme"]));
            for instance in [app.instance(), &beside] {
                eventually(async || app.get_from(instance, "acme", "A").await.value() == "new").await;
                assert_eq!(app.get_from(instance, "acme", "B").await.value(), "added");
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_that_comes_to_an_instance_without_the_tenant_reaches_the_one_that_has_it() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = started(backend, phase).await;
            let beside = app.another().await;
            app.holds("acme", &[("A", "new")]);
            send_signed(&app, &beside, &body(&app, ACME, now(&app))).await;
            eventually(async || app.get("acme", "A").await.value() == "new").await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_that_comes_while_the_folder_is_read_is_followed_by_one_more_read() {
    on_both(async |backend| {
        let app = started(backend, Phase::Infisical).await;
        // This read tells of the world as it is before the change.
        let gate = app.world().gate_next_answers(1, Route::List);
        notify(&app, ACME).await;
        gate.arrived(1).await;
        app.holds("acme", &[("A", "new")]);
        notify(&app, &format!("{ACME}/below")).await;
        gate.open();
        eventually(async || app.get("acme", "A").await.value() == "new").await;
        assert_eq!(app.world().calls_since_mark().list, 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_that_is_forged_unsigned_old_or_ahead_is_refused_and_nothing_is_read() {
    on_both(async |backend| {
        let app = started(backend, Phase::Hybrid).await;
        let good = body(&app, ACME, now(&app)).to_string();
        let aged = |seconds: i64| body(&app, ACME, now(&app) + seconds * 1000).to_string();
        let timeless = json!({"event": "secrets.modified", "project": {"secretPath": ACME}}).to_string();
        let old_for_today = aged(-3600);
        for (body, signature, code) in [
            (&good, None, "signature_invalid"),
            (&good, Some(signature(now(&app), &good, "another secret")), "signature_invalid"),
            (&good, Some(signature(now(&app), &aged(1), SECRET)), "signature_invalid"),
            (&good, Some("t=1;00".to_owned()), "signature_invalid"),
            (&good, Some(signature(now(&app) - 301_000, &good, SECRET)), "signature_expired"),
            (&good, Some(signature(now(&app) + 120_000, &good, SECRET)), "signature_expired"),
            // Signed once, and sent again under the time of today.
            (&old_for_today, Some(signature(now(&app), &old_for_today, SECRET)), "signature_expired"),
            (&timeless, Some(signature(now(&app), &timeless, SECRET)), "signature_expired"),
        ] {
            let answer = send(app.instance(), body.clone(), signature.clone()).await;
            assert_eq!(answer.problem(), (401, code.to_owned()), "{signature:?}");
            assert!(!answer.text.contains(SECRET));
        }
        let ahead = aged(120);
        let refused = send(app.instance(), ahead.clone(), Some(signature(now(&app), &ahead, SECRET))).await;
        assert_eq!(refused.problem(), (401, "signature_expired".to_owned()));
        let long = format!("{good}{}", " ".repeat(64 << 10));
        let refused = send(app.instance(), long.clone(), Some(signature(now(&app), &long, SECRET))).await;
        assert_eq!(refused.problem(), (413, "value_too_large".to_owned()));
        let no_json = "{".to_owned();
        let refused = send(app.instance(), no_json.clone(), Some(signature(now(&app), &no_json, SECRET))).await;
        assert_eq!(refused.problem(), (400, "invalid_body".to_owned()));
        assert_eq!(app.world().calls_since_mark().total(), 0);
        assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}notices").await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_notice_is_on_record_and_costs_its_peer_growing_delays_that_hold_back_no_good_one() {
    on_both(async |backend| {
        let app = started(backend, Phase::Hybrid).await;
        let forged = body(&app, ACME, now(&app)).to_string();
        let mut answers = Vec::new();
        for _ in 0..12 {
            answers.push(send(app.instance(), forged.clone(), Some("t=1;00".to_owned())).await.problem().0);
        }
        assert_eq!(answers[..10], [401; 10]);
        assert!(answers[10..].contains(&429), "{answers:?}");
        assert_eq!(refreshing(&notify(&app, ACME).await), json!(["acme"]));
        let page = app.ask(Method::GET, "/v1/audit?outcome=denied").await.json();
        let records = page["records"].as_array().unwrap();
        assert!(records.len() >= 10, "{page}");
        assert!(records.iter().all(|record| record["action"] == "notice"), "{page}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_is_taken_once_by_whatever_instance_and_after_a_restart_too() {
    on_both(async |backend| {
        let mut app = started(backend, Phase::Hybrid).await;
        let beside = app.another().await;
        let at = now(&app);
        let text = body(&app, ACME, at).to_string();
        let signed = signature(at, &text, SECRET);
        assert_eq!(send(app.instance(), text.clone(), Some(signed.clone())).await.status, 202);
        eventually(async || settled(app.instance()).await >= 1.0).await;
        app.world().mark();
        let replayed = (409, "webhook_replayed".to_owned());
        // The time in the header is signed by nobody, and digits can be written in two ways.
        let dressed_up = signature(at + 1, &text, SECRET).to_uppercase().replace("T=", "t=");
        for signature in [signed.clone(), dressed_up] {
            assert_eq!(send(app.instance(), text.clone(), Some(signature.clone())).await.problem(), replayed);
            assert_eq!(send(&beside, text.clone(), Some(signature)).await.problem(), replayed);
        }
        app.restart().await;
        assert_eq!(send(app.instance(), text.clone(), Some(signed.clone())).await.problem(), replayed);
        assert_eq!(app.world().calls_since_mark().total(), 0);
        // It is remembered for longer than it would be believed, and no longer.
        app.advance(Duration::from_secs(5 * 60 + 1));
        assert_eq!(send(app.instance(), text.clone(), Some(signed)).await.problem().1, "signature_expired");
        app.advance(Duration::from_secs(15 * 60));
        notify(&app, ACME).await;
        assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}notices").await, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_notices_than_can_be_remembered_are_not_taken() {
    on_both(async |backend| {
        let app = started(backend, Phase::Hybrid).await;
        let at = now(&app);
        let digest = match &app.setup.backend {
            Backend::Sqlite(_) => "randomblob(32)",
            Backend::Postgres(_) => "sha256(n::text::bytea)",
        };
        let many = format!(
            "WITH RECURSIVE many(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM many WHERE n < 20000) \
             INSERT INTO notices (digest, received_at) SELECT {digest}, {at} FROM many"
        );
        app.setup.backend.sql(&many).await;
        let refused = notify(&app, ACME).await;
        assert_eq!(refused.problem(), (503, "unavailable".to_owned()));
        assert!(!refused.header("retry-after").is_empty());
        assert_eq!(app.world().calls_since_mark().total(), 0);
        app.advance(Duration::from_secs(16 * 60));
        assert_eq!(refreshing(&notify(&app, ACME).await), json!(["acme"]));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_about_another_project_environment_folder_or_event_is_taken_and_nothing_is_read() {
    on_both(async |backend| {
        let app = started(backend, Phase::Hybrid).await;
        for change in [
            (|body| body["project"]["workspaceId"] = json!("another")) as fn(&mut Value),
            |body| body["project"]["environment"] = json!("dev"),
            |body| body["project"]["secretPath"] = json!("/hono-api"),
            |body| body["event"] = json!("test"),
            |body| body["event"] = json!("secrets.rotation-failed"),
        ] {
            let mut body = body(&app, ACME, now(&app));
            change(&mut body);
            assert_eq!(refreshing(&send_signed(&app, app.instance(), &body).await), json!([]), "{body}");
        }
        assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}notices").await, 0);
        // What nobody holds is not read either.
        assert_eq!(refreshing(&notify(&app, "/tenants/unheard-of").await), json!(["unheard-of"]));
        eventually(async || settled(app.instance()).await == 1.0).await;
        assert_eq!(app.world().calls_since_mark().total(), 0);
        // Nor is what the database owns.
        app.set_phase("acme", Some(Phase::Database)).await;
        assert_eq!(refreshing(&notify(&app, ACME).await), json!([]));
        assert_eq!(app.world().calls_since_mark().total(), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_secret_there_is_no_such_route() {
    let app = Setup::new(Backend::sqlite(), Phase::Hybrid).start().await;
    assert_eq!(notify(&app, ACME).await.problem(), (401, "token_missing".to_owned()));
    let posted = app.ask(Method::POST, "/v1/hooks/infisical").await;
    assert_eq!(posted.problem(), (404, "route_not_found".to_owned()));
    let app = setup(Backend::sqlite(), Phase::Hybrid).start().await;
    assert_eq!(app.ask(Method::GET, "/v1/hooks/infisical").await.problem(), (405, "method_not_allowed".to_owned()));
    // A token is no signature.
    assert_eq!(app.ask(Method::POST, "/v1/hooks/infisical").await.problem(), (401, "signature_invalid".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_that_cannot_be_remembered_is_not_taken_and_infisical_is_told_to_come_again() {
    on_both(async |backend| {
        let app = started(backend, Phase::Hybrid).await;
        app.setup.backend.sql("ALTER TABLE notices RENAME TO hidden").await;
        let refused = notify(&app, ACME).await;
        assert_eq!(refused.problem(), (503, "unavailable".to_owned()));
        assert!(!refused.header("retry-after").is_empty());
        assert_eq!(app.world().calls_since_mark().total(), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_read_costs_no_good_value_and_the_new_one_comes_later() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = started(backend, phase).await;
            app.holds("acme", &[("A", "new")]);
            app.world().fault_on(Route::List, Fault::Status(500));
            notify(&app, ACME).await;
            app.world().wait_for_calls_to(Route::List, 4).await;
            let answer = app.get("acme", "A").await;
            assert_eq!((answer.value().as_str(), answer.tier()), ("old", "memory"));
            app.world().clear_faults();
            // Nobody waits for the breaker in real time; but not until the value is too old anyway.
            let advanced = Cell::new(0);
            eventually(async || {
                if advanced.replace(advanced.get() + 1) < 120 {
                    app.advance(Duration::from_millis(500));
                }
                app.get("acme", "A").await.value() == "new"
            })
            .await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_about_a_folder_that_upstream_denies_by_now_stops_its_copies() {
    on_both(async |backend| {
        let app = started(backend, Phase::Hybrid).await;
        app.world().set_rights(&app.identity, Rights::NoAccess);
        notify(&app, ACME).await;
        eventually(async || app.get("acme", "A").await.status == 503).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_notices_stays_within_the_budget_of_refreshes_and_leaves_lookups_theirs() {
    let mut setup = setup(Backend::sqlite(), Phase::Infisical);
    setup.requests_per_minute = 40;
    let app = setup.start().await;
    app.holds("acme", &[("A", "old")]);
    app.holds("globex", &[("A", "theirs")]);
    assert_eq!(app.get("acme", "A").await.value(), "old");
    app.world().mark();
    // By the resolver's own door, so that the test is not about the speed of HTTP.
    let resolver = &app.instance().service.resolver;
    let began = Instant::now();
    for number in 0..20_000 {
        resolver.queue_refresh(&format!("t{number}").parse().unwrap());
    }
    for _ in 0..100 {
        notify(&app, ACME).await;
    }
    let full = "secretier_refresh_queue_reads_total{outcome=\"full\"}";
    eventually(async || settled(app.instance()).await + metric(app.instance(), full).await >= 20_000.0).await;
    let read = app.world().calls_since_mark().total();
    let minutes = began.elapsed().as_secs() / 60 + 1;
    assert!(read <= 20 * minutes, "{read} requests in {minutes} minutes, of which refreshes may make 20 each");
    assert_eq!(app.get("globex", "A").await.value(), "theirs", "a lookup finds its share");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_direct_edit_is_found_on_a_server_that_tells_and_on_one_that_does_not() {
    for (tells, newer) in [(true, false), (true, true), (false, false), (false, true)] {
        for phase in [Phase::Infisical, Phase::Hybrid] {
            on_both(async |backend| {
                let mut setup = Setup::new(backend, phase);
                setup.poll_interval = "1m";
                let app = setup.start().await;
                app.world().tells_changes(tells);
                app.world().v4_only(newer);
                app.world().set_clock(app.instance().clock.clone());
                app.holds("acme", &[("A", "old")]);
                app.holds("globex", &[("A", "same")]);
                let beside = app.another().await;
                for instance in [app.instance(), &beside] {
                    assert_eq!(app.get_from(instance, "acme", "A").await.value(), "old");
                    assert_eq!(app.get_from(instance, "globex", "A").await.value(), "same");
                }
                app.holds("acme", &[("A", "new")]);
                app.advance(MINUTE);
                for instance in [app.instance(), &beside] {
                    eventually(async || app.get_from(instance, "acme", "A").await.value() == "new").await;
                    assert_eq!(app.get_from(instance, "globex", "A").await.value(), "same");
                }
                let word = if tells { "told" } else { "read" };
                let series = format!("secretier_change_polls_total{{outcome=\"{word}\"}}");
                // It is counted when the turn is over, which may be after the first value is there.
                eventually(async || metric(app.instance(), &series).await + metric(&beside, &series).await >= 1.0)
                    .await;
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_was_told_of_is_read_once() {
    on_both(async |backend| {
        let mut setup = Setup::new(backend, Phase::Hybrid);
        setup.poll_interval = "1m";
        let app = setup.start().await;
        app.world().tells_changes(true);
        app.world().set_clock(app.instance().clock.clone());
        app.holds("acme", &[("A", "old")]);
        assert_eq!(app.get("acme", "A").await.value(), "old");
        app.holds("acme", &[("A", "new")]);
        app.advance(MINUTE);
        eventually(async || app.get("acme", "A").await.value() == "new").await;
        app.world().mark();
        // It is told of again for as long as clocks may differ.
        for turn in 2..=4 {
            app.advance(MINUTE);
            eventually(async || polls(app.instance()).await >= f64::from(turn)).await;
        }
        // All folders in one read each time, which is not sent again.
        let calls = app.world().calls_since_mark();
        assert!(calls.list <= 4 && calls.folders >= 6, "{calls:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_folder_is_noticed_and_its_secrets_are_gone() {
    for tells in [true, false] {
        for phase in [Phase::Infisical, Phase::Hybrid] {
            on_both(async |backend| {
                let mut setup = Setup::new(backend, phase);
                setup.poll_interval = "1m";
                let app = setup.start().await;
                app.world().tells_changes(tells);
                app.holds("acme", &[("A", "old")]);
                app.holds("globex", &[("A", "stays")]);
                assert_eq!(app.get("acme", "A").await.value(), "old");
                assert_eq!(app.get("globex", "A").await.value(), "stays");
                assert!(app.world().delete_folder(ENV, ACME));
                app.advance(MINUTE);
                eventually(async || app.get("acme", "A").await.status == 404).await;
                assert_eq!(app.get("globex", "A").await.value(), "stays");
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_about_the_folder_of_the_tenants_makes_it_look_which_there_are() {
    on_both(async |backend| {
        let app = started(backend, Phase::Hybrid).await;
        assert!(app.world().delete_folder(ENV, ACME));
        assert_eq!(refreshing(&notify(&app, "/tenants").await), json!([]));
        eventually(async || app.get("acme", "A").await.status == 404).await;
        // However often: once in a while.
        app.world().mark();
        for _ in 0..20 {
            notify(&app, "/").await;
        }
        app.advance(Duration::from_secs(11));
        eventually(async || polls(app.instance()).await >= 2.0).await;
        assert!(polls(app.instance()).await < 5.0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_instance_asks_for_all_and_where_it_is_killed_another_takes_over() {
    on_both(async |backend| {
        let mut setup = Setup::new(backend, Phase::Hybrid);
        setup.poll_interval = "1m";
        let mut app = setup.start().await;
        app.world().tells_changes(true);
        app.holds("acme", &[("A", "1")]);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        let beside = app.another().await;
        let before = [lease_looks(app.instance()).await, lease_looks(&beside).await];
        let looked = async |app: &TestApp, turns: f64| {
            let now = [lease_looks(app.instance()).await, lease_looks(&beside).await];
            now.iter().zip(before).all(|(now, before)| now - before >= turns)
        };
        let sum = async |app: &TestApp| polls(app.instance()).await + polls(&beside).await;
        for turn in 1..=3 {
            app.advance(MINUTE);
            // Its turn comes to the other one too, who finds that it is not the one to ask.
            eventually(async || sum(&app).await >= f64::from(turn) && looked(&app, f64::from(turn)).await).await;
            assert_eq!(sum(&app).await, f64::from(turn));
        }
        let one_asked = polls(app.instance()).await == 3.0;
        assert_eq!(one_asked, polls(&beside).await == 0.0, "always the same");
        assert!(one_asked || polls(&beside).await == 3.0);

        let (survivor, killed) = if one_asked { (beside, app.take()) } else { (app.take(), beside) };
        let before = polls(&survivor).await;
        killed.kill().await;
        // Beyond the lease of who was killed.
        survivor.clock.advance(Duration::from_secs(3 * 60));
        eventually(async || polls(&survivor).await > before).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_that_fails_costs_nothing_and_what_it_missed_is_found_by_the_next() {
    on_both(async |backend| {
        let mut setup = Setup::new(backend, Phase::Hybrid);
        setup.poll_interval = "1m";
        let app = setup.start().await;
        app.world().tells_changes(true);
        app.world().set_clock(app.instance().clock.clone());
        app.holds("acme", &[("A", "old")]);
        assert_eq!(app.get("acme", "A").await.value(), "old");
        app.holds("acme", &[("A", "new")]);
        app.world().fault_on(Route::Folders, Fault::Status(500));
        app.advance(MINUTE);
        eventually(async || polls(app.instance()).await == 1.0).await;
        assert_eq!(app.get("acme", "A").await.value(), "old");
        app.world().clear_faults();
        app.advance(MINUTE);
        eventually(async || app.get("acme", "A").await.value() == "new").await;
    })
    .await;
}

/// A notice that begins to be sent and does not go on.
async fn slow(app: &TestApp, signature: &str) -> TcpStream {
    let mut stream = TcpStream::connect(app.url().trim_start_matches("http://")).await.unwrap();
    let head = format!(
        "POST /v1/hooks/infisical HTTP/1.1\r\nHost: localhost\r\nx-infisical-signature: {signature}\r\n\
         Content-Length: 1000\r\n\r\n{{"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_sent_slowly_keep_no_true_notice_out() {
    let app = started(Backend::sqlite(), Phase::Hybrid).await;
    let mut slow_ones = Vec::new();
    for round in 0..4 {
        for _ in 0..20 {
            slow_ones.push(slow(&app, &format!("t={};{}", now(&app), "ab".repeat(32))).await);
        }
        // One is begun each time before it is seen, so that each has its place.
        for _ in 0..5 {
            let mut signed = body(&app, ACME, now(&app));
            signed["round"] = json!([round, slow_ones.len()]);
            slow_ones.push(slow(&app, &format!("t={};{}", now(&app), "cd".repeat(32))).await);
            signed["number"] = json!(slow_ones.len());
            assert_eq!(send_signed(&app, app.instance(), &signed).await.status, 202, "round {round}");
        }
    }
    let given_up = "secretier_limited_total{limit=\"webhooks\"}";
    eventually(async || metric(app.instance(), given_up).await >= 40.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_whose_signature_can_be_none_is_refused_before_its_body_is_read() {
    let app = started(Backend::sqlite(), Phase::Hybrid).await;
    for signature in ["", "t=1", "t=1;ab", "abcd", "t=x;00"] {
        let mut stream = slow(&app, signature).await;
        let mut status = [0; 12];
        within("it is refused with half of its body", stream.read_exact(&mut status)).await.unwrap();
        assert_eq!(&status, b"HTTP/1.1 401", "{signature}");
    }
}
