//! What requests may hold at once, with a good token and without: places, bodies that are read,
//! answers that are not taken. Beyond it somebody is refused, at once, and nobody else.

use std::{pin::pin, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use h2::{RecvStream, client::SendRequest};
use http::{Request, StatusCode};
use reqwest::Method;
use secretier::{access::Action, phase::Phase};
use tokio::net::{TcpSocket, TcpStream};

use crate::{
    app::{Answer, Backend, Instance, Setup, TestApp, eventually, secret},
    connections::Wire,
    postgres::Postgres,
    within::within,
};

async fn start(server: &str) -> TestApp {
    start_with(Backend::sqlite(), server, "").await
}

async fn start_with(backend: Backend, server: &str, more: &str) -> TestApp {
    let mut setup = Setup::new(backend, Phase::Database).patient().with(more);
    setup.server = server.to_owned();
    setup.start().await
}

async fn metric(app: &TestApp, series: &str) -> f64 {
    let page = app.instance().service.metrics.render();
    page.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok()).unwrap_or(0.0)
}

/// What is held, as the metrics tell it.
async fn held(app: &TestApp, budget: &str) -> f64 {
    let page = app.metrics().await;
    let unit = if matches!(budget, "answers" | "bodies") { "bytes" } else { "requests" };
    let series = format!("secretier_held_{unit}{{budget=\"{budget}\"}}");
    page.lines().find_map(|line| line.strip_prefix(series.as_str())?.trim().parse().ok()).expect("a series")
}

/// An HTTP/2 connection whose client takes no byte of a body unless it says so.
struct Unread {
    client: SendRequest<Bytes>,
    token: String,
}

impl Unread {
    /// It sends a ping as soon as the last was answered, so that it is never idle.
    async fn open(instance: &Instance, token: &str) -> Self {
        let stream = TcpStream::connect(instance.url.trim_start_matches("http://")).await.unwrap();
        let (client, mut connection) =
            h2::client::Builder::new().initial_window_size(0).handshake(stream).await.unwrap();
        let mut pings = connection.ping_pong().unwrap();
        tokio::spawn(async move {
            let pinging = async move {
                while pings.ping(h2::Ping::opaque()).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            let (mut connection, mut pinging) = (pin!(connection), pin!(pinging));
            tokio::select! {
                _ = &mut connection => {}
                () = &mut pinging => {}
            }
        });
        Self { client, token: token.to_owned() }
    }

    async fn ask(&self, path: &str) -> http::Response<RecvStream> {
        let request = Request::get(format!("http://localhost{path}"));
        let request = request.header("authorization", format!("Bearer {}", self.token)).body(()).unwrap();
        let mut client = within("a stream is free", self.client.clone().ready()).await.unwrap();
        let (answer, _) = client.send_request(request, true).unwrap();
        within("an answer comes", answer).await.unwrap()
    }
}

/// A tenant whose list with values has so many bytes, and a few more.
async fn large(app: &TestApp, tenant: &str, bytes: usize) {
    const VALUE: usize = 256 << 10;
    for number in 0..bytes.div_ceil(VALUE) {
        assert_eq!(app.put(tenant, &format!("K{number}"), &"v".repeat(VALUE)).await.status, 201);
    }
}

fn list(tenant: &str) -> String {
    format!("/v1/tenants/{tenant}/secrets?values=true")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_taken_holds_its_place_and_its_bytes_and_is_given_up_at_idle_timeout() {
    let app = start("idle_timeout = \"2s\"").await;
    large(&app, "acme", 1 << 20).await;
    let unread = Unread::open(app.instance(), &app.token).await;
    let mut answer = unread.ask(&list("acme")).await;
    assert_eq!(answer.status(), StatusCode::OK);
    // The page of the metrics is an answer as well, in progress while it is made.
    assert_eq!(held(&app, "in_flight").await, 2.0);
    assert!(held(&app, "answers").await >= f64::from(1 << 20));
    let end = within("the stream ends, pings or not", answer.body_mut().data()).await;
    assert!(end.expect("an end").unwrap_err().is_reset(), "it was not taken");
    eventually(async || held(&app, "answers").await == 0.0 && held(&app, "in_flight").await == 1.0).await;
    assert_eq!(unread.ask("/healthz").await.status(), StatusCode::OK, "the connection is as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_answers_that_are_not_taken_are_bounded_by_token_and_in_all_and_come_back_when_they_are() {
    let app = start("max_answers = \"8MiB\"\nmax_answers_per_token = \"3MiB\"\n").await;
    large(&app, "acme", 2 << 20).await;
    let mut tokens = Vec::new();
    for number in 0..4 {
        tokens.push(app.new_token(&number.to_string(), &["acme"], &[Action::Read]).await);
    }
    let greedy = Unread::open(app.instance(), &tokens[0]).await;
    let first = greedy.ask(&list("acme")).await;
    assert_eq!(first.status(), StatusCode::OK);
    let refused = greedy.ask(&list("acme")).await;
    assert_eq!(
        (refused.status(), refused.headers()["retry-after"].as_bytes()),
        (StatusCode::TOO_MANY_REQUESTS, &b"1"[..])
    );
    let mut others = Vec::new();
    for token in &tokens[1..3] {
        let unread = Unread::open(app.instance(), token).await;
        let answer = unread.ask(&list("acme")).await;
        assert_eq!(answer.status(), StatusCode::OK, "another token has bytes of its own");
        others.push((unread, answer));
    }
    let last = Unread::open(app.instance(), &tokens[3]).await;
    assert_eq!(last.ask(&list("acme")).await.status(), StatusCode::SERVICE_UNAVAILABLE, "and there are no more in all");
    // A hit of ordinary size needs none of them.
    assert_eq!(app.put("globex", "A", "v").await.status, 201);
    assert_eq!(app.get("globex", "A").await.value(), "v");
    // A value of memory that is large does: who holds it holds it out of memory's bounds.
    let value = Answer::of(app.request(Method::GET, &secret("acme", "K0"))).await;
    assert_eq!(value.status, 200, "as far as there is room");
    drop(first);
    eventually(async || greedy.ask(&list("acme")).await.status() == StatusCode::OK).await;
    drop((greedy, others, last));
    eventually(async || held(&app, "answers").await == 0.0).await;
    assert!(metric(&app, "secretier_limited_total{limit=\"answers\"}").await >= 2.0);
    let listed = app.ask(Method::GET, &list("acme")).await;
    assert_eq!((listed.status, listed.json()["keys"].as_array().unwrap().len()), (200, 8));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_token_takes_not_all_the_places() {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Hybrid).patient();
    setup.server = "max_in_flight_per_token = 2".to_owned();
    let app = setup.start().await;
    app.holds("acme", &[("K", "v")]);
    let (greedy, other) =
        (app.new_token("greedy", &["*"], &[Action::Read]).await, app.new_token("other", &["*"], &[Action::Read]).await);
    let gate = app.world().gate(secretier::tiers::upstream::standin::Route::List);
    let mut waiting = Vec::new();
    for _ in 0..2 {
        let mut wire = Wire::open(&app).await;
        wire.token.clone_from(&greedy);
        wire.ask("GET", &secret("acme", "K")).await;
        waiting.push(wire);
    }
    gate.arrived(1).await;
    eventually(async || held(&app, "in_flight").await == 3.0).await;
    let ask =
        async |token: &str, path: &str| Answer::of(app.instance().request(Method::GET, path).bearer_auth(token)).await;
    assert_eq!(ask(&greedy, "/v1/tenants/acme").await.problem(), (429, "rate_limited".to_owned()));
    assert_eq!(ask(&other, "/v1/whoami").await.status, 200, "the others have places");
    gate.open();
    for mut wire in waiting {
        assert_eq!(wire.answer().await.0, 200);
    }
    eventually(async || ask(&greedy, "/v1/whoami").await.status == 200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_come_by_half_are_bounded_by_token_and_hold_back_no_other() {
    let app = start("max_value = \"64KiB\"\nmax_bodies = \"1MiB\"\nmax_bodies_per_token = \"128KiB\"\n").await;
    let slow = app.new_token("slow", &["*"], &[Action::Write]).await;
    let mut wires = Vec::new();
    // Each takes 16 KiB with its first byte: eight are as many as one token may have.
    for number in 0..10 {
        let mut wire = Wire::open(&app).await;
        let target = secret("acme", &format!("K{number}"));
        wire.send(&format!(
            "PUT {target}?create_tenant=true HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {slow}\r\n\
             Content-Length: 40000\r\n\r\n{{"
        ))
        .await;
        wires.push(wire);
    }
    eventually(async || metric(&app, "secretier_limited_total{limit=\"bodies\"}").await >= 2.0).await;
    assert_eq!(held(&app, "bodies").await, f64::from(8 * (16 << 10)));
    assert_eq!(app.put("acme", "K", &"v".repeat(40_000)).await.status, 201, "another token has its own");
    drop(wires);
    eventually(async || held(&app, "bodies").await == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_audit_hangs_strangers_are_refused_at_once_beyond_their_places_and_the_good_are_served() {
    let backend = Backend::Postgres(Postgres::shared().database().await);
    let app = start_with(backend, "max_strangers = 8\nmax_strangers_per_peer = 4\n", "").await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    assert_eq!(app.get("acme", "K").await.value(), "v");
    let lock = app.setup.backend.hold("audit_records").await;
    let ask = async || {
        let refused = app.instance().request(Method::GET, "/v1/tenants").header("authorization", "Basic eDp4");
        Answer::of(refused).await.status
    };
    // Four wait for their records; whoever comes beside them is told at once.
    let mut waiting = pin!(join_all((0..4).map(|_| ask())));
    let told = async {
        eventually(async || held(&app, "strangers").await == 4.0).await;
        for _ in 0..100 {
            assert_eq!(ask().await, 401);
        }
        assert_eq!(app.get("acme", "K").await.value(), "v");
    };
    tokio::select! {
        () = told => {}
        answers = &mut waiting => panic!("they were told before it was on record: {answers:?}"),
    }
    drop(lock);
    assert_eq!(within("their records are written", waiting).await, [401; 4]);
    eventually(async || held(&app, "strangers").await == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_guard_refuses_is_charged_to_its_peer_and_known_by_no_text_of_its_own() {
    let app =
        start_with(Backend::sqlite(), "", "[access]\nrequests_per_second_per_peer = 1\nburst_per_peer = 3\n").await;
    let ask = async |number: u32| {
        let mut wire = Wire::open(&app).await;
        wire.send(&format!("GET /{number} HTTP/1.1\r\nHost: evil-{number}.example\r\n\r\n")).await;
        wire.answer().await.0
    };
    let mut told = Vec::new();
    for number in 0..10 {
        told.push(ask(number).await);
    }
    assert_eq!(told[..2], [403, 403], "{told:?}");
    assert!(told.contains(&429), "{told:?}");
    assert_eq!(app.ready().await.status, 200, "health is told to everybody");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_has_so_many_streams_and_no_more() {
    let app = start("max_streams = 4").await;
    large(&app, "acme", 256 << 10).await;
    let unread = Unread::open(app.instance(), &app.token).await;
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(unread.ask(&list("acme")).await);
    }
    let fifth = tokio::time::timeout(Duration::from_millis(200), unread.ask("/healthz")).await;
    assert!(fifth.is_err(), "a fifth waits for one of them");
    drop(answers);
    assert_eq!(unread.ask("/healthz").await.status(), StatusCode::OK);
}

/// What is on record of connections that were misused.
async fn misuses(app: &TestApp, code: &str) -> i64 {
    let is_meant = match app.setup.backend {
        Backend::Sqlite(_) => format!("detail LIKE '%\"{code}\"%'"),
        Backend::Postgres(_) => format!("detail::text LIKE '%\"{code}\"%'"),
    };
    app.setup.backend.number(&format!("SELECT count(*) FROM {{}}audit_records WHERE {is_meant}")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_resets_streams_without_end_loses_the_connection_and_is_on_record() {
    let app = start_with(Backend::sqlite(), "", "[audit]\nwindow = \"100ms\"\n").await;
    let unread = Unread::open(app.instance(), &app.token).await;
    let storm = async {
        for _ in 0..100_000 {
            let Ok(mut client) = unread.client.clone().ready().await else { return };
            let request = Request::get("http://localhost/v1/tenants").body(()).unwrap();
            let Ok((answer, mut stream)) = client.send_request(request, false) else { return };
            stream.send_reset(h2::Reason::CANCEL);
            drop(answer);
        }
    };
    within("the connection ends", storm).await;
    assert!(unread.client.clone().ready().await.is_err(), "it was closed");
    eventually(async || misuses(&app, "rapid_resets").await >= 1).await;
    assert_eq!(app.ready().await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_no_answer_is_on_record_by_http_1_and_2() {
    let app = start_with(Backend::sqlite(), "idle_timeout = \"1s\"", "[audit]\nwindow = \"100ms\"\n").await;
    large(&app, "acme", 8 << 20).await;
    let unread = Unread::open(app.instance(), &app.token).await;
    let answer = unread.ask(&list("acme")).await;
    assert_eq!(answer.status(), StatusCode::OK);
    eventually(async || misuses(&app, "unread_answer").await == 1).await;
    drop(answer);
    // Else the system takes it all.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = socket.connect(app.url().trim_start_matches("http://").parse().unwrap()).await.unwrap();
    let mut wire = Wire { stream, token: app.token.clone() };
    wire.ask("GET", &list("acme")).await;
    eventually(async || misuses(&app, "unread_answer").await == 2).await;
    eventually(async || held(&app, "answers").await == 0.0).await;
}
