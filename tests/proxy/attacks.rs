//! What someone tries who can reach the port, and what comes of it.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use http_body_util::Empty;
use hyper_util::rt::{TokioExecutor, TokioIo};
use reqwest::{Method, RequestBuilder, header};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use secretier::{access::Action, phase::Phase, tiers::upstream::standin::Route};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    app::{Answer, Backend, Setup, TestApp, eventually, secret},
    connections::Wire,
    postgres::Postgres,
    within::within,
};

async fn start(server: &str, more: &str) -> TestApp {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Database).with(more);
    setup.server = server.to_owned();
    let app = setup.start().await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    app
}

fn read(app: &TestApp) -> RequestBuilder {
    app.request(Method::GET, &secret("acme", "K"))
}

async fn metric(app: &TestApp, series: &str) -> f64 {
    let page = app.instance().service.metrics.render();
    let line = page.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok());
    line.unwrap_or(0.0)
}

/// What is sent beside the first request, for it to be taken for one.
const SMUGGLED: &str = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_could_be_read_in_two_ways_hides_no_other() {
    let app = start("", "").await;
    let chunked = "0\r\n\r\n";
    for (headers, body, statuses) in [
        // By the encoding, and no further request is read.
        ("Content-Length: 5\r\nTransfer-Encoding: chunked", chunked, &[405][..]),
        ("Transfer-Encoding: chunked\r\nContent-Length: 5", chunked, &[405]),
        ("Transfer-Encoding: chunked\r\nContent-Length: 0", chunked, &[405]),
        ("Transfer-Encoding: chunked\r\nContent-Length: x", chunked, &[405]),
        ("Content-Length: 0\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive", chunked, &[405]),
        // Lengths that are none, or two.
        ("Content-Length: 5\r\nContent-Length: 50", chunked, &[400]),
        ("Content-Length: 0\r\nContent-Length: 5", chunked, &[400]),
        ("Content-Length: 5, 5", chunked, &[400]),
        ("Content-Length: +5", chunked, &[400]),
        ("Content-Length: 0x5", chunked, &[400]),
        ("Content-Length: -5", chunked, &[400]),
        ("Content-Length: 5 5", chunked, &[400]),
        ("Content-Length:", chunked, &[400]),
        ("Content-Length: 99999999999999999999", chunked, &[400]),
        // Encodings that are none, or more than one.
        ("Transfer-Encoding: xchunked", chunked, &[400]),
        ("Transfer-Encoding: chunked, identity", chunked, &[400]),
        ("Transfer-Encoding: identity, chunked", chunked, &[400]),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", chunked, &[400]),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", chunked, &[400]),
        ("Transfer-Encoding: \u{b}chunked", chunked, &[400]),
        ("Transfer-Encoding : chunked", chunked, &[400]),
        ("Transfer-Encoding:\r\n chunked", chunked, &[400]),
        (" Transfer-Encoding: chunked", chunked, &[400]),
        ("X: a\rTransfer-Encoding: chunked", chunked, &[400]),
        // Chunks that are none.
        ("Transfer-Encoding: chunked", "zz\r\n", &[405]),
        ("Transfer-Encoding: chunked", "-1\r\n", &[405]),
        ("Transfer-Encoding: chunked", "0x0\r\n\r\n", &[405]),
        ("Transfer-Encoding: chunked", "10000000000000000\r\n", &[405]),
        ("Transfer-Encoding: chunked", "1\r\nAB0\r\n\r\n", &[405]),
        ("Transfer-Encoding: chunked", "0\r\nX\r\n\r\n", &[405]),
        ("Transfer-Encoding: chunked", "\r\n0\r\n\r\n", &[405]),
        ("Transfer-Encoding: chunked", "0;a=\n\r\n", &[405]),
    ] {
        let mut wire = Wire::open(&app).await;
        let token = format!("Authorization: Bearer {}", app.token);
        wire.send(&format!(
            "POST /healthz HTTP/1.1\r\nHost: localhost\r\n{token}\r\n{headers}\r\n\r\n{body}{SMUGGLED}"
        ))
        .await;
        let answers = wire.closed().await;
        let found: Vec<u16> = answers.split("HTTP/1.1 ").skip(1).map(|answer| answer[..3].parse().unwrap()).collect();
        assert_eq!(found, statuses, "{headers:?} {body:?}");
    }
    let mut wire = Wire::open(&app).await;
    wire.send(&format!("POST / HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n{chunked}{SMUGGLED}"))
        .await;
    let answer = wire.closed().await;
    assert!(
        answer.starts_with("HTTP/1.") && answer.contains("400") && answer.matches("HTTP/1").count() == 1,
        "{answer}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_lengths_are_one_and_what_follows_the_body_is_the_next_request() {
    let app = start("", "").await;
    let mut wire = Wire::open(&app).await;
    let host = "Host: localhost";
    wire.send(&format!(
        "POST /healthz HTTP/1.1\r\n{host}\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc{SMUGGLED}"
    ))
    .await;
    assert_eq!((wire.answer().await.0, wire.answer().await.0), (401, 200));
    // Lines may end in a bare line feed, for each of them alike.
    wire.send(&SMUGGLED.replace('\r', "")).await;
    assert_eq!(wire.answer().await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_names_its_server_once_and_holds_one_token() {
    let app = start("", "").await;
    let token = format!("Authorization: Bearer {}\r\n", app.token);
    for headers in [
        token.clone(),
        format!("Host: localhost\r\nHost: localhost\r\n{token}"),
        format!("Host: localhost\r\nHost: evil.example\r\n{token}"),
        format!("Host: localhost\r\n{token}Authorization: Bearer other\r\n"),
        format!("Host: localhost\r\n{token}{token}"),
    ] {
        let mut wire = Wire::open(&app).await;
        wire.send(&format!("GET {} HTTP/1.1\r\n{headers}\r\n{SMUGGLED}", secret("acme", "K"))).await;
        let (status, head, body) = wire.answer().await;
        assert_eq!((status, body.contains("invalid_request")), (400, true), "{body}");
        assert!(head.contains("connection: close"), "{head}");
        assert_eq!(wire.closed().await, "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_no_path_is_refused() {
    let app = start("", "").await;
    for (method, target) in [
        ("OPTIONS", "*"),
        ("CONNECT", "localhost:80"),
        ("CONNECT", "evil.example:443"),
        ("GET", "localhost:80"),
        ("GET", "*"),
    ] {
        let mut wire = Wire::open(&app).await;
        wire.ask(method, target).await;
        let (status, _, body) = wire.answer().await;
        assert_eq!((status, body.contains("invalid_request")), (400, true), "{method} {target}: {body}");
        wire.closed().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_sign_in_a_target_is_refused_and_what_stands_before_it_is_left_alone() {
    let app = start("", "").await;
    let key = secret("acme", "K");
    for (method, target) in [
        ("GET", format!("{key}#old")),
        ("DELETE", format!("{key}#old")),
        ("GET", format!("{key}?version=1#x")),
        ("GET", format!("http://localhost{key}#")),
        ("GET", "/healthz#".to_owned()),
        ("GET", "/#".to_owned()),
    ] {
        let mut wire = Wire::open(&app).await;
        wire.ask("GET", "/healthz").await;
        assert_eq!(wire.answer().await.0, 200, "on a connection that was good so far");
        wire.ask(method, &target).await;
        let (status, head, body) = wire.answer().await;
        assert_eq!((status, body.contains("invalid_request")), (400, true), "{target}: {body}");
        assert!(body.contains("%23") && head.contains("connection: close"), "{head}{body}");
    }
    let line = "x\nGET /a#b HTTP/1.1\r\n\r\n";
    assert_eq!(app.put("acme", "K", line).await.status, 200, "a value may look like anything");
    assert_eq!(app.get("acme", "K").await.value(), line);
    assert_eq!(app.put("acme", "K#old", "encoded").await.status, 201);
    assert_eq!(
        (app.get("acme", "K#old").await.value(), app.get("acme", "K").await.value()),
        ("encoded".into(), line.into())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parameter_that_a_request_does_not_take_is_refused_and_nothing_is_done() {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Database);
    setup.infisical = "webhook_secret = \"whsec-of-the-test\"".to_owned();
    let app = setup.start().await;
    for (key, value) in [("K", "v"), ("batch-get", "b")] {
        assert_eq!(app.put("acme", key, value).await.status, 201);
    }
    let body = "{\"value\":\"other\",\"keys\":[],\"version\":1}";
    for (method, path) in [
        (Method::GET, "/healthz"),
        (Method::GET, "/readyz"),
        (Method::GET, "/metrics"),
        (Method::GET, "/openapi.json"),
        (Method::GET, "/v1/whoami"),
        (Method::GET, "/v1/audit"),
        (Method::POST, "/v1/hooks/infisical"),
        (Method::GET, "/v1/tenants"),
        (Method::GET, "/v1/tenants/acme"),
        (Method::POST, "/v1/tenants/acme/refresh"),
        (Method::GET, "/v1/tenants/acme/secrets"),
        (Method::POST, "/v1/tenants/acme/secrets/batch-get"),
        (Method::PUT, "/v1/tenants/acme/secrets/batch-get"),
        (Method::DELETE, "/v1/tenants/acme/secrets/batch-get"),
        (Method::PUT, "/v1/tenants/acme/secrets/K"),
        (Method::DELETE, "/v1/tenants/acme/secrets/K"),
        (Method::GET, "/v1/tenants/acme/secrets/K/explain"),
        (Method::GET, "/v1/tenants/acme/secrets/K/versions"),
        (Method::POST, "/v1/tenants/acme/secrets/K/rollback"),
        (Method::GET, "/v1/tenants/acme/secrets/K/valid"),
        (Method::GET, "/v1/tenants/acme/secrets/K/rotation"),
        (Method::POST, "/v1/tenants/acme/secrets/K/rotate"),
        (Method::POST, "/v1/tenants/acme/secrets/K/rotation/promote"),
        (Method::GET, "/v1/rotations"),
    ] {
        for query in ["version=1", "x", "=", "version=1&values=true"] {
            let answer = Answer::of(app.request(method.clone(), &format!("{path}?{query}")).body(body)).await;
            assert_eq!(answer.problem(), (400, "invalid_query".to_owned()), "{method} {path}?{query}");
        }
    }
    for (path, query) in [
        ("/v1/tenants/acme/secrets/K", "version=1&version=1"),
        ("/v1/tenants/acme/secrets/K", "version=1&x"),
        ("/v1/tenants/acme/secrets", "values=true&values=false"),
        ("/v1/audit", "limit=1&limit=2"),
    ] {
        let answer = app.ask(Method::GET, &format!("{path}?{query}")).await;
        assert_eq!(answer.problem(), (400, "invalid_query".to_owned()), "{path}?{query}");
    }
    for (key, value) in [("K", "v"), ("batch-get", "b")] {
        assert_eq!((app.get("acme", key).await.value(), app.get("acme", key).await.version()), (value.to_owned(), 1));
    }
    assert_eq!(app.ask(Method::PATCH, "/v1/tenants/acme/secrets/K?x").await.status, 405);
    assert_eq!(app.ask(Method::GET, "/nowhere?x").await.status, 404);
    assert_eq!(app.ask(Method::DELETE, "/v1/tenants/acme/secrets/K?").await.status, 204, "an empty query is none");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_addresses_of_this_machine_are_one_peer() {
    let app = start("", "[access]\nrequests_per_second_per_peer = 3\n").await;
    app.advance(Duration::from_secs(10));
    let from = async |last: u8| {
        let client = reqwest::Client::builder().no_proxy().local_address(IpAddr::from([127, 0, 0, last]));
        let client = client.build().unwrap();
        let request = client.get(format!("{}{}", app.url(), secret("acme", "K"))).bearer_auth(&app.token);
        Answer::of(request).await.status
    };
    // Each asks once: as peers of their own all would be let in. A slow machine lets in a few more.
    let mut statuses = Vec::new();
    for first in (1..=91).step_by(10) {
        statuses.extend(join_all((first..first + 10).map(from)).await);
    }
    assert!(statuses.contains(&429) && statuses.iter().filter(|status| **status == 200).count() >= 3, "{statuses:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_rebinds_its_name_to_this_machine_reads_nothing() {
    let app = start("", "").await;
    for path in ["/healthz", "/readyz", "/metrics", &secret("acme", "K")] {
        for host in ["evil.example", "localhost.evil.example:7227", "127.0.0.1.evil.example", "0.0.0.0"] {
            let answer = Answer::of(app.request(Method::GET, path).header(header::HOST, host)).await;
            assert_eq!(answer.problem(), (403, "bad_host".to_owned()), "{path} at {host}");
        }
    }
    let mut wire = Wire::open(&app).await;
    wire.ask("GET", &format!("http://evil.example{}", secret("acme", "K"))).await;
    assert_eq!(wire.answer().await.0, 403, "the target's name counts as well as Host");

    let preflight = app.request(Method::OPTIONS, &secret("acme", "K"));
    let preflight = preflight.header("origin", "https://evil.example").header("access-control-request-method", "GET");
    let answer = Answer::of(preflight).await;
    assert_eq!(answer.status, 405);
    let answers = [answer, Answer::of(read(&app).header("origin", "https://evil.example")).await];
    for answer in answers {
        assert!(answer.headers.keys().all(|name| !name.as_str().starts_with("access-control-")), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_name_is_refused_over_http2_too() {
    let app = start("", "").await;
    let stream = TcpStream::connect(app.url().trim_start_matches("http://")).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    for (authority, host, status) in [
        ("localhost", None, 200),
        ("evil.example", None, 403),
        ("localhost", Some("evil.example"), 403),
        ("evil.example", Some("localhost"), 403),
    ] {
        let mut request = http::Request::get(format!("http://{authority}/healthz"));
        if let Some(host) = host {
            request = request.header("host", host);
        }
        let sent = sender.send_request(request.body(Empty::<bytes::Bytes>::new()).unwrap());
        let answer = within("an answer comes", sent).await.unwrap();
        assert_eq!(answer.status().as_u16(), status, "{authority} {host:?}");
    }
    let long = http::Request::get("http://localhost/healthz").header("x", "x".repeat(64 << 10));
    let answer = sender.send_request(long.body(Empty::<bytes::Bytes>::new()).unwrap()).await;
    let refused = answer.map(|answer| answer.status().as_u16());
    assert!(matches!(refused, Err(_) | Ok(431)), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_was_handed_on_is_refused() {
    let app = start("", "").await;
    for name in ["forwarded", "x-forwarded-for", "x-forwarded-proto", "X-Forwarded-Whatever", "via"] {
        let answer = Answer::of(read(&app).header(name, "for=192.0.2.1")).await;
        assert_eq!(answer.problem(), (403, "forwarded_request".to_owned()), "{name}");
        let health = app.instance().request(Method::GET, "/healthz").header(name, "1.1 proxy");
        assert_eq!(Answer::of(health).await.status, 403, "{name}: health too");
    }
    assert_eq!(Answer::of(read(&app)).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_trusted_proxy_each_client_has_limits_of_its_own() {
    let access = "[access]\ntrusted_proxies = [\"127.0.0.0/8\"]\nrequests_per_second_per_peer = 3\n";
    let app = start("", access).await;
    app.advance(Duration::from_secs(10));
    let from = async |client: &str| Answer::of(read(&app).header("x-forwarded-for", client)).await.status;
    for _ in 0..3 {
        assert_eq!(from("192.0.2.1").await, 200);
    }
    assert_eq!(from("192.0.2.1").await, 429);
    assert_eq!(from("192.0.2.1, 127.0.0.9").await, 429, "the proxies between do not count");
    assert_eq!(from("6.6.6.6, 192.0.2.1").await, 429, "nor does what the client wrote itself");
    assert_eq!(from("192.0.2.2").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_and_a_peer_are_held_to_their_rates() {
    let app = start("", "[access]\nrequests_per_second_per_token = 2\nrequests_per_second_per_peer = 9\n").await;
    let other = app.new_token("other", &["*"], &[Action::Read]).await;
    let with_other = || app.instance().request(Method::GET, &secret("acme", "K")).bearer_auth(&other);
    app.advance(Duration::from_secs(10));
    let mut answers = Vec::new();
    for _ in 0..3 {
        answers.push(Answer::of(read(&app)).await);
    }
    assert_eq!((answers[0].status, answers[1].status), (200, 200));
    assert_eq!(answers[2].problem(), (429, "rate_limited".to_owned()));
    assert_eq!(answers[2].header("retry-after"), "1");
    assert_eq!(Answer::of(with_other()).await.status, 200, "another token has its own");
    // The rate outlives that the tokens are read again.
    app.instance().service.access.reload().await.unwrap();
    assert_eq!(Answer::of(read(&app)).await.status, 429);
    app.advance(Duration::from_secs(1));
    assert_eq!(Answer::of(read(&app)).await.status, 200);
    assert!(metric(&app, "secretier_limited_total{limit=\"token\"}").await >= 2.0);

    let mut last = Answer::of(with_other()).await;
    for _ in 0..20 {
        last = Answer::of(app.instance().request(Method::GET, "/v1/tenants")).await;
    }
    assert_eq!(last.problem(), (429, "rate_limited".to_owned()), "without a token, too");
    assert_eq!(app.ready().await.status, 200, "health is exempt");
    assert!(metric(&app, "secretier_limited_total{limit=\"peer\"}").await >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_tries_tokens_waits_longer_and_longer_and_a_good_token_never() {
    let app = start("", "[access]\npeers = 50\n").await;
    let guess = async |number: usize| {
        let token = format!("st_{number:016x}_{}", "A".repeat(43));
        Answer::of(app.instance().request(Method::GET, &secret("acme", "K")).bearer_auth(token)).await
    };
    for number in 0..10 {
        assert_eq!(guess(number).await.problem(), (401, "token_invalid".to_owned()));
    }
    let mut waited = Vec::new();
    for number in 0..8 {
        let held = guess(number).await;
        assert_eq!(held.problem(), (429, "rate_limited".to_owned()));
        waited.push(held.header("retry-after").parse().unwrap());
        assert_eq!(Answer::of(read(&app)).await.status, 200, "a good token from the same address");
        app.advance(Duration::from_secs(*waited.last().unwrap()));
        assert_eq!(guess(number).await.status, 401, "one try is let through");
    }
    assert_eq!(waited, [1, 2, 4, 8, 16, 32, 60, 60]);
    let wrong_secret = format!("{}_{}", app.token.rsplit_once('_').unwrap().0, "A".repeat(43));
    let wrong = app.instance().request(Method::GET, &secret("acme", "K")).bearer_auth(wrong_secret);
    assert_eq!(Answer::of(wrong).await.status, 429, "the id of a good token does not help");
    app.advance(Duration::from_secs(121));
    assert_eq!(guess(1).await.status, 401, "quiet time heals");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_bad_tokens_disturbs_no_good_one_and_asks_the_database_seldom() {
    let access = "[access]\npeers = 50\ntrusted_proxies = [\"127.0.0.0/8\"]\n";
    let app = start("", access).await;
    let (stop, flooded) = (AtomicBool::new(false), AtomicUsize::new(0));
    let readings = "secretier_database_calls_total{call=\"tokens\",outcome=\"ok\"}";
    let (before, began) = (metric(&app, readings).await, Instant::now());
    let flood = async |worker: usize| {
        let mut wire = Wire::open(&app).await;
        let mut sent = 0_usize;
        while !stop.load(Ordering::Relaxed) {
            sent += 1;
            flooded.fetch_add(1, Ordering::Relaxed);
            let token = format!("st_{:016x}_{}", worker << 32 | sent, "A".repeat(43));
            let from = format!("10.{worker}.{}.{}", sent / 250 % 250, sent % 250);
            let target = secret("acme", "K");
            wire.send(&format!(
                "GET {target} HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: {from}\r\nAuthorization: Bearer {token}\r\n\r\n"
            ))
            .await;
            assert!(matches!(wire.answer().await.0, 401 | 429));
        }
    };
    let good = async {
        while flooded.load(Ordering::Relaxed) <= 100 {
            assert_eq!(Answer::of(read(&app)).await.status, 200);
        }
        stop.store(true, Ordering::Relaxed);
    };
    tokio::join!(flood(1), flood(2), within("a hundred bad tokens are sent", good));
    let (asked, most) = (metric(&app, readings).await - before, began.elapsed().as_secs_f64() / 0.2 + 3.0);
    assert!(before >= 1.0 && asked <= most, "{asked} times");
    assert!(app.instance().service.access.peers() <= 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_database_hangs_unknown_tokens_take_no_place_from_good_ones() {
    let backend = Backend::Postgres(Postgres::shared().database().await);
    let mut setup = Setup::new(backend, Phase::Database).with("[access]\ntrusted_proxies = [\"127.0.0.0/8\"]\n");
    setup.server = "max_in_flight = 1".to_owned();
    let app = setup.start().await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    let lock = app.setup.backend.hold("access_tokens").await;

    let mut waiting = Vec::new();
    for number in 0..300 {
        let mut wire = Wire::open(&app).await;
        let token = format!("st_{number:016x}_{}", "A".repeat(43));
        let from = format!("10.0.{}.{}", number / 250, number % 250);
        let target = secret("acme", "K");
        wire.send(&format!(
            "GET {target} HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: {from}\r\nAuthorization: Bearer {token}\r\n\r\n"
        ))
        .await;
        waiting.push(wire);
    }
    let held = async || metric(&app, "secretier_limited_total{limit=\"strangers\"}").await;
    eventually(async || held().await >= 44.0).await;
    assert_eq!(Answer::of(read(&app)).await.status, 200);
    assert!(held().await <= 44.0, "the others wait");
    drop(lock);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_in_progress_are_bounded_and_health_is_not_among_them() {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Hybrid);
    setup.server = "max_in_flight = 1".to_owned();
    let app = setup.start().await;
    app.holds("acme", &[("K", "v")]);
    let gate = app.world().gate(Route::List);
    let mut waiting = Wire::open(&app).await;
    waiting.ask("GET", &secret("acme", "K")).await;
    gate.arrived(1).await;
    let refused = Answer::of(app.request(Method::GET, "/v1/tenants")).await;
    assert_eq!(refused.problem(), (503, "unavailable".to_owned()));
    assert_eq!(refused.header("retry-after"), "1");
    assert_eq!(app.ready().await.status, 200);
    gate.open();
    assert_eq!(waiting.answer().await.0, 200);
    eventually(async || Answer::of(read(&app)).await.status == 200).await;
    assert!(metric(&app, "secretier_limited_total{limit=\"in_flight\"}").await >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_too_long_is_431() {
    let app = start("max_header = \"8KiB\"", "").await;
    for (value, status) in [("x".repeat(6 << 10), 200), ("x".repeat(9 << 10), 431)] {
        let mut wire = Wire::open(&app).await;
        wire.send(&format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: {value}\r\n\r\n")).await;
        assert_eq!(wire.answer().await.0, status);
    }
    let mut wire = Wire::open(&app).await;
    let many: String = (0..101).map(|number| format!("X-{number}: x\r\n")).collect();
    wire.send(&format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\n{many}\r\n")).await;
    assert_eq!(wire.answer().await.0, 431);
}

/// Opens connections that say nothing, while one client has its connection and another
/// comes anew each time; how many of the idle ones were closed for others.
async fn besieged(server: &str, idle: usize) -> f64 {
    let app = start(&format!("{server}\nheader_timeout = \"10m\"\nidle_timeout = \"10m\""), "").await;
    let mut kept = Wire::open(&app).await;
    let mut connections = Vec::with_capacity(idle);
    let address = app.url().trim_start_matches("http://").to_owned();
    for number in 0..idle {
        connections.push(within("it is let in", TcpStream::connect(&address)).await.unwrap());
        if number % (idle / 20) == 0 {
            kept.ask("GET", &secret("acme", "K")).await;
            assert_eq!(kept.answer().await.0, 200, "after {number}");
            let mut comes = Wire::open(&app).await;
            comes.ask("GET", &secret("acme", "K")).await;
            assert_eq!(comes.answer().await.0, 200, "after {number}");
        }
    }
    metric(&app, "secretier_connections_closed_for_others_total").await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_idle_connections_where_there_is_room_for_two_hundred_keep_nobody_out() {
    let closed = besieged("max_connections = 200", 2_000).await;
    assert!(closed >= 1_700.0, "{closed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_idle_connections_keep_nobody_out() {
    // Both ends are in this process.
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let possible = limit.maximum.map_or(usize::MAX, |most| usize::try_from(most).unwrap());
    let idle = if possible >= 16_000 { 10_000 } else { possible / 3 };
    let closed = besieged(&format!("max_connections = {}", idle * 2 / 5), idle).await;
    assert!(closed >= idle as f64 / 2.0, "{closed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_brought_a_good_token_is_closed_after_those_who_did_not() {
    let app = start("max_connections = 3", "").await;
    let mut good = Wire::open(&app).await;
    good.ask("GET", &secret("acme", "K")).await;
    assert_eq!(good.answer().await.0, 200);
    let mut strangers = [Wire::open(&app).await, Wire::open(&app).await];
    for stranger in &mut strangers {
        stranger.ask("GET", "/healthz").await;
        assert_eq!(stranger.answer().await.0, 200);
    }
    // It is older than the strangers, and idle for longer.
    let mut came = Vec::new();
    for stranger in &mut strangers {
        let mut comes = Wire::open(&app).await;
        comes.ask("GET", &secret("acme", "K")).await;
        assert_eq!(comes.answer().await.0, 200);
        assert_eq!(stranger.closed().await, "");
        came.push(comes);
    }
    good.ask("GET", &secret("acme", "K")).await;
    assert_eq!(good.answer().await.0, 200);
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_who_ping_over_http2_keep_nobody_out() {
    let app = start("max_connections = 3\nidle_timeout = \"10m\"", "").await;
    let (headers, settings, ping) = (1, 4, 6);
    let path = b"\x82\x86\x04\x08/healthz\x01\x09localhost";
    let mut strangers = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(app.url().trim_start_matches("http://")).await.unwrap();
        let ask =
            [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(settings, 0, 0, &[]), frame(headers, 5, 1, path)];
        stream.write_all(&ask.concat()).await.unwrap();
        let reading = async {
            let mut answer = Vec::new();
            while !answer.ends_with(b"ok\n") {
                answer.push(stream.read_u8().await.unwrap());
            }
        };
        within("it is answered", reading).await;
        let (mut read, mut write) = stream.into_split();
        strangers.spawn(async move {
            while write.write_all(&frame(ping, 0, 0, &[0; 8])).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        strangers.spawn(async move { drop(tokio::io::copy(&mut read, &mut tokio::io::sink()).await) });
    }
    let mut comes = Wire::open(&app).await;
    comes.ask("GET", &secret("acme", "K")).await;
    assert_eq!(comes.answer().await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_audit_hangs_those_who_are_denied_take_no_place_from_good_ones_and_are_on_record() {
    let backend = Backend::Postgres(Postgres::shared().database().await);
    let mut setup = Setup::new(backend, Phase::Database);
    setup.server = "max_connections = 8".to_owned();
    setup.database_timeout = "10m";
    let app = setup.start().await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    let narrow = app.new_token("narrow", &["globex"], &[Action::Read]).await;
    let lock = app.setup.backend.hold("audit_records").await;

    let mut strangers = Vec::new();
    for number in 0..16 {
        let mut wire = Wire::open(&app).await;
        // Some without a token, and more than there are connections with one that does not reach there.
        let bearer = if number % 4 == 0 { String::new() } else { format!("Authorization: Bearer {narrow}\r\n") };
        wire.send(&format!("GET {} HTTP/1.1\r\nHost: localhost\r\n{bearer}\r\n", secret("acme", "K"))).await;
        strangers.push(wire);
    }
    assert_eq!(Answer::of(read(&app)).await.status, 200);

    drop(lock);
    let denials = "SELECT count(*) FROM {}audit_records WHERE chain = 'denial'";
    eventually(async || app.setup.backend.number(denials).await == 16).await;
}
