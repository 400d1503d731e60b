//! Another configuration for an instance that serves: what counts at once, and for whom.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use http::HeaderValue;
use reqwest::Method;
use secretier::{
    access::{Action, Caller, Known, Peer},
    phase::Phase,
    tiers::upstream::standin::{Fault, Route},
};

use crate::{
    app::{Answer, Backend, ENV, Setup, TestApp, on_both, secret},
    connections::Wire,
};

const MINUTE: Duration = Duration::from_secs(60);
const ACME: &str = "/tenants/acme";

/// Gives the database some of acme's keys.
const MOVED: &str = "[[rules]]\ntenants = \"ac*\"\nkeys = \"W*\"\nphase = \"database\"\n";

fn names(names: &BTreeSet<String>) -> String {
    names.iter().cloned().collect::<Vec<_>>().join(" ")
}

/// Infisical owns the rest of the keys, and has those that the rule gives to the database too.
async fn two_owners(backend: Backend) -> Arc<TestApp> {
    let app = Setup::new(backend, Phase::Infisical).start().await;
    app.reload(|setup| setup.more = MOVED.to_owned()).await.unwrap();
    assert_eq!(app.put("acme", "W", "the database's").await.status, 201);
    app.holds("acme", &[("A", "1"), ("W", "Infisical's"), ("W_UPSTREAM", "u")]);
    Arc::new(app)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_moves_keys_applies_at_once_while_requests_are_served() {
    on_both(async |backend| {
        let app = two_owners(backend).await;
        let is_over = Arc::new(AtomicBool::new(false));
        let readers = ["A", "W", "W_UPSTREAM"].map(|key| {
            let (app, is_over) = (Arc::clone(&app), Arc::clone(&is_over));
            tokio::spawn(async move {
                while !is_over.load(Ordering::Relaxed) {
                    for answer in [app.get("acme", key).await, app.get_fresh("acme", key).await] {
                        match key {
                            "A" => assert_eq!(answer.value(), "1"),
                            "W" => assert!(["the database's", "Infisical's"].contains(&&*answer.value()), "{answer:?}"),
                            _ => assert!(answer.status == 404 || answer.value() == "u", "{answer:?}"),
                        }
                    }
                }
            })
        });
        for _ in 0..20 {
            app.reload(|_| {}).await.unwrap();
            assert_eq!(app.get("acme", "W_UPSTREAM").await.value(), "u");
            assert_eq!(app.get("acme", "W").await.value(), "Infisical's");
            let listed = app.ask_tenant("acme", "/secrets?values=true").await;
            assert_eq!(listed.json()["keys"].as_array().unwrap().len(), 3, "{listed:?}");

            app.reload(|setup| setup.more = MOVED.to_owned()).await.unwrap();
            assert_eq!(app.get("acme", "W").await.value(), "the database's");
            assert_eq!(app.get("acme", "W_UPSTREAM").await.problem(), (404, "secret_not_found".to_owned()));
            assert_eq!(app.get("acme", "A").await.value(), "1");
            let listed = app.ask_tenant("acme", "/secrets?values=true").await;
            assert_eq!(listed.json()["keys"][1]["value"], "the database's", "{listed:?}");
        }
        is_over.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.await.unwrap();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_being_loaded_when_keys_moved_is_told_by_one_owner_and_kept_by_nobody() {
    let app = two_owners(Backend::sqlite()).await;
    let reading = |key: &'static str| {
        let app = Arc::clone(&app);
        tokio::spawn(async move { app.get("acme", key).await })
    };
    // A read of the folder that leaves the database's keys out, held back at Infisical.
    let gate = app.world().gate_next_answers(1, Route::List);
    let early = reading("A");
    gate.arrived(1).await;
    app.reload(|_| {}).await.unwrap();
    // It proves nothing about a key that is Infisical's by now.
    assert_eq!(app.get("acme", "W_UPSTREAM").await.value(), "u");
    gate.open();
    assert_eq!(early.await.unwrap().value(), "1");
    assert_eq!(app.get("acme", "W_UPSTREAM").await.value(), "u");

    // The other way round: what Infisical tells is the database's to tell by then.
    app.reload(|setup| setup.more = "[memory]\nttl = \"1s\"\n".to_owned()).await.unwrap();
    app.advance(MINUTE);
    let gate = app.world().gate_next_answers(1, Route::List);
    let early = Arc::clone(&app);
    let early = tokio::spawn(async move { early.get_fresh("acme", "W_UPSTREAM").await });
    gate.arrived(1).await;
    app.reload(|setup| setup.more = MOVED.to_owned()).await.unwrap();
    assert_eq!(app.get("acme", "W_UPSTREAM").await.status, 404);
    gate.open();
    assert_eq!(early.await.unwrap().status, 404);
    let again = app.get("acme", "W_UPSTREAM").await;
    assert_eq!((again.status, app.get("acme", "W").await.value().as_str()), (404, "the database's"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_for_one_tenant_leaves_the_others_in_memory() {
    let app = two_owners(Backend::sqlite()).await;
    app.holds("globex", &[("A", "2")]);
    for tenant in ["acme", "globex"] {
        app.get(tenant, "A").await;
        assert_eq!(app.get(tenant, "A").await.tier(), "memory");
    }
    app.reload(|_| {}).await.unwrap();
    assert_eq!(app.get("globex", "A").await.tier(), "memory");
    assert_eq!(app.get("acme", "A").await.tier(), "infisical");
    let changes = app.reload(|_| {}).await.unwrap();
    assert_eq!((names(&changes.applied), names(&changes.waiting)), (String::new(), String::new()));
    assert_eq!(app.get("acme", "A").await.tier(), "memory", "nothing has changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_default_phase_is_in_force_for_reads_and_writes_when_the_reload_is_done() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Infisical).start().await;
        app.holds("acme", &[("A", "1")]);
        assert_eq!(app.get("acme", "A").await.tier(), "infisical");
        let changes = app.reload(|setup| setup.phase = Phase::Hybrid).await.unwrap();
        assert_eq!(names(&changes.applied), "phase");
        assert_eq!(app.get("acme", "A").await.value(), "1");
        app.stored(1).await;
        app.reload(|setup| setup.phase = Phase::Database).await.unwrap();
        assert_eq!(app.put("acme", "B", "2").await.status, 201);
        assert_eq!(app.world().value(ENV, ACME, "B"), None);
        assert_eq!(app.get("acme", "A").await.tier(), "database");
        app.reload(|_| {}).await.unwrap();
        assert_eq!(app.get("acme", "B").await.status, 404);
        assert_eq!(app.put("acme", "B", "3").await.status, 201);
        assert_eq!(app.world().value(ENV, ACME, "B").as_deref(), Some("3"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_owner_changes_meanwhile_is_not_acknowledged_as_done() {
    let app = Arc::new(Setup::new(Backend::sqlite(), Phase::Hybrid).start().await);
    app.holds("acme", &[("A", "1")]);
    let gate = app.world().gate_next_answers(1, Route::Write);
    let writing = {
        let app = Arc::clone(&app);
        tokio::spawn(async move { app.put("acme", "A", "2").await })
    };
    gate.arrived(1).await;
    app.reload(|setup| setup.phase = Phase::Database).await.unwrap();
    gate.open();
    assert_eq!(writing.await.unwrap().problem(), (503, "unavailable".to_owned()));
    // Under the owner of now, it is done as ever.
    assert_eq!(app.put("acme", "A", "3").await.status / 100, 2);
    assert_eq!(app.get("acme", "A").await.value(), "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shortened_max_stale_counts_for_what_memory_holds_and_a_longer_one_too() {
    let app = Setup::new(Backend::sqlite(), Phase::Infisical).start().await;
    app.holds("acme", &[("A", "1")]);
    app.get("acme", "A").await;
    app.advance(2 * MINUTE);
    app.world().fault(Fault::Down);
    assert_eq!(app.get("acme", "A").await.tier(), "memory", "it is fresh");

    let ages = async |ages: &str| {
        let more = format!("[memory]\n{ages}");
        app.reload(|setup| setup.more = more).await.unwrap()
    };
    assert_eq!(names(&ages("ttl = \"1m\"").await.applied), "memory.ttl");
    let stale = app.get("acme", "A").await;
    assert!(stale.header("cache-status").contains("fwd=stale"), "{stale:?}");
    assert_eq!(stale.value(), "1");
    ages("ttl = \"1m\"\nmax_stale = \"90s\"").await;
    assert_eq!(app.get("acme", "A").await.problem().0, 503);
    ages("ttl = \"1m\"\nmax_stale = \"1h\"").await;
    assert_eq!(app.get("acme", "A").await.value(), "1", "an outage may be bridged for longer after all");
    app.advance(60 * MINUTE);
    assert_eq!(app.get("acme", "A").await.problem().0, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ages_of_copies_in_the_database_count_at_once() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).with("[memory]\nttl = \"0s\"\nmax_stale = \"1s\"\n").start().await;
        app.holds("acme", &[("A", "1")]);
        app.get("acme", "A").await;
        app.stored(1).await;
        app.advance(5 * MINUTE);
        app.world().fault(Fault::Down);
        assert_eq!(app.get("acme", "A").await.tier(), "database");
        app.reload(|setup| setup.database = "max_stale = \"4m\"".to_owned()).await.unwrap();
        assert_eq!(app.get("acme", "A").await.problem().0, 503);
        app.reload(|_| {}).await.unwrap();
        assert_eq!(app.get("acme", "A").await.value(), "1");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_smaller_capacity_counts_at_once() {
    let app = Setup::new(Backend::sqlite(), Phase::Infisical).start().await;
    let large = "x".repeat(10_000);
    let secrets: Vec<(String, &str)> = (0..60).map(|number| (format!("K{number}"), large.as_str())).collect();
    app.holds("acme", &secrets.iter().map(|(key, value)| (key.as_str(), *value)).collect::<Vec<_>>());
    app.get("acme", "K0").await;
    let memory = app.instance().service.resolver.memory();
    assert!(memory.weight() > 600_000, "{}", memory.weight());
    app.reload(|setup| setup.more = "[memory]\ncapacity = \"128KiB\"\n".to_owned()).await.unwrap();
    assert!(memory.weight() <= 128 << 10, "{}", memory.weight());
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_and_proxies_and_limits_count_on_connections_that_are_open() {
    let app = Setup::new(Backend::sqlite(), Phase::Database).start().await;
    app.put("acme", "K", "v").await;
    let mut wire = Wire::open(&app).await;
    let mut status = async |more: &str| {
        let (token, path) = (&app.token, secret("acme", "K"));
        wire.send(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n{more}\r\n"))
            .await;
        let (status, _, body) = wire.answer().await;
        (status, ["bad_host", "forwarded_request", "rate_limited"].into_iter().find(|code| body.contains(code)))
    };
    let access = async |access: &str| {
        let more = format!("[access]\n{access}\n");
        app.reload(|setup| setup.more = more).await.unwrap()
    };
    assert_eq!(status("").await, (200, None));
    access("hosts = [\"secrets.example\"]").await;
    assert_eq!(status("").await, (403, Some("bad_host")));
    access("").await;
    assert_eq!(status("").await, (200, None));

    let forwarded = "X-Forwarded-For: 192.0.2.1\r\n";
    assert_eq!(status(forwarded).await, (403, Some("forwarded_request")));
    access("trusted_proxies = [\"127.0.0.0/8\"]").await;
    assert_eq!(status(forwarded).await, (200, None));
    access("").await;
    assert_eq!(status(forwarded).await, (403, Some("forwarded_request")));

    for limit in ["peer", "token"] {
        let one = format!("requests_per_second_per_{limit} = 1");
        assert_eq!(names(&access(&one).await.applied), format!("access.{}", one.split(' ').next().unwrap()));
        assert_eq!(status("").await, (200, None), "{limit}");
        assert_eq!(status("").await, (429, Some("rate_limited")), "{limit}");
        // Nothing has changed, so nothing begins anew.
        access(&one).await;
        assert_eq!(status("").await, (429, Some("rate_limited")), "{limit}");
        access("").await;
        assert_eq!(status("").await, (200, None), "{limit}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_outlive_other_settings_and_processes_come_and_go() {
    let app = Setup::new(Backend::sqlite(), Phase::Database).start().await;
    let other = app.new_token("other", &["acme"], &[Action::Read]).await;
    let access = &app.instance().service.access;
    let process = access.caller(Peer::Process { uid: 4711, gid: 1 });
    let anyone = access.caller(Peer::Ip(IpAddr::from([192, 0, 2, 1])));
    let clock = &app.instance().clock;
    let known =
        async |caller: &Caller, header: Option<&HeaderValue>| match access.recognise(caller, header, clock.moment())? {
            Known::As(grant) => Ok(grant),
            Known::NotYet => access.ask(caller, header).await,
        };
    assert!(known(&process, None).await.is_err());
    let peer = "[[access.unix_peers]]\nname = \"api\"\nuid = 4711\ntenants = [\"*\"]\nactions = [\"read\"]\n";
    for settings in [peer.to_owned(), format!("{peer}[access]\nrequests_per_second_per_token = 3\npeers = 1\n")] {
        app.reload(|setup| setup.more = settings).await.unwrap();
        assert_eq!(known(&process, None).await.unwrap().name, "api");
        assert!(known(&anyone, None).await.is_err());
        let header = format!("Bearer {other}").parse().unwrap();
        assert_eq!(known(&anyone, Some(&header)).await.unwrap().name, "other");
    }
    app.reload(|_| {}).await.unwrap();
    assert!(known(&process, None).await.is_err());
    assert!(access.peers() <= 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn how_large_a_value_may_be_counts_for_the_next_write() {
    let app = Setup::new(Backend::sqlite(), Phase::Database).start().await;
    assert_eq!(app.put("acme", "K", "a longer value").await.status, 201);
    app.reload(|setup| setup.server = "max_value = 4\nmax_in_flight = 1".to_owned()).await.unwrap();
    assert_eq!(app.put("acme", "K", "a longer value").await.problem().0, 413);
    assert_eq!(app.put("acme", "K", "four").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn however_often_it_is_reloaded_the_upstream_budget_is_not_refilled() {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Infisical);
    (setup.requests_per_minute, setup.upstream_timeout) = (8, "100ms");
    let app = setup.start().await;
    app.holds("acme", &[("A", "1")]);
    let began = Instant::now();
    app.world().mark();
    for round in 0..40 {
        for _ in 0..3 {
            app.get_fresh("acme", "A").await;
        }
        app.reload(|setup| setup.requests_per_minute = [8, 12, 8, 1][round % 4]).await.unwrap();
    }
    let minutes = began.elapsed().as_secs() / 60 + 1;
    let calls = app.world().calls_since_mark().total();
    assert!((1..=12 * minutes).contains(&calls), "{calls} calls in {minutes} minutes");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_credentials_are_logged_in_with_at_once() {
    let mut app = Setup::new(Backend::sqlite(), Phase::Infisical).with("[memory]\nmax_stale = \"1s\"\n").start().await;
    app.holds("acme", &[("A", "1")]);
    assert_eq!(app.get("acme", "A").await.value(), "1");
    app.world().set_client_secret(&app.identity.client_id, "another");
    app.world().revoke_tokens();
    app.advance(MINUTE);
    assert_eq!(app.get_fresh("acme", "A").await.status, 503);
    app.identity.client_secret = "another".to_owned();
    app.world().mark();
    // A refused login is left alone for a minute; another one is not the refused one.
    let changes = app.reload(|_| {}).await.unwrap();
    assert_eq!(names(&changes.applied), "infisical.client_secret");
    assert_eq!(app.get_fresh("acme", "A").await.value(), "1");
    for _ in 0..5 {
        assert_eq!(names(&app.reload(|_| {}).await.unwrap().applied), "");
        assert_eq!(app.get_fresh("acme", "A").await.value(), "1");
    }
    assert_eq!(app.world().calls_since_mark().login, 1, "the same login is not made anew");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shorter_timeout_ends_the_next_wait() {
    let app = Setup::new(Backend::sqlite(), Phase::Infisical).start().await;
    app.holds("acme", &[("A", "1")]);
    app.world().fault(Fault::Hang);
    app.reload(|setup| setup.upstream_timeout = "50ms").await.unwrap();
    let began = Instant::now();
    assert_eq!(app.get("acme", "A").await.problem().0, 503);
    assert!(began.elapsed() < Duration::from_secs(25), "the timeout of before is 30 s");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_restart_is_named_and_the_rest_is_applied() {
    let app = Setup::new(Backend::sqlite(), Phase::Hybrid).start().await;
    let waits = |setup: &mut Setup| {
        setup.server = "idle_timeout = \"1m\"\nmax_value = \"2MiB\"".to_owned();
        setup.database = "pool_size = 3\nrefresh_after = \"1m\"".to_owned();
        setup.more = "[audit]\nwindow = \"1s\"\nif_unavailable = \"go_on\"\n".to_owned();
    };
    let changes = app.reload(waits).await.unwrap();
    assert_eq!(names(&changes.applied), "audit.if_unavailable database.refresh_after server.max_value");
    assert_eq!(names(&changes.waiting), "audit.window database.pool_size server.idle_timeout");
    let again = app.reload(waits).await.unwrap();
    assert_eq!((names(&again.applied), again.waiting), (String::new(), changes.waiting));
    let audited = Answer::of(app.request(Method::GET, "/v1/whoami")).await;
    assert_eq!(audited.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn reloads_at_the_same_time_come_one_after_the_other() {
    let app = Arc::new(Setup::new(Backend::sqlite(), Phase::Hybrid).start().await);
    app.holds("acme", &[("A", "1")]);
    let reloads: Vec<_> = (0..40)
        .map(|number| {
            let app = Arc::clone(&app);
            tokio::spawn(async move {
                let phase = [Phase::Hybrid, Phase::Infisical][number % 2];
                app.reload(|setup| setup.phase = phase).await.unwrap();
                // Whose owner changes again and again gives up at some point.
                let answer = app.get("acme", "A").await;
                assert!(answer.status == 503 || answer.value() == "1", "{answer:?}");
            })
        })
        .collect();
    for reload in reloads {
        reload.await.unwrap();
    }
    app.reload(|setup| setup.phase = Phase::Database).await.unwrap();
    assert_eq!(app.explain("acme", "A").await["phase"], "database");
}
