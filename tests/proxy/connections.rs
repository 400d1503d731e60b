//! What clients' connections may do, how long they may take about it, and how they end.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use reqwest::Method;
use secretier::{config::Loaded, phase::Phase, server::Listeners, tiers::upstream::standin::Route};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
};

use crate::{
    app::{Answer, Backend, Instance, Setup, TestApp, secret},
    within::within,
};

async fn start(server: &str) -> TestApp {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Hybrid);
    setup.server = server.to_owned();
    let app = setup.start().await;
    app.holds("acme", &[("K", "v")]);
    app
}

/// A connection, spoken by hand.
pub(crate) struct Wire<S> {
    pub(crate) stream: S,
    pub(crate) token: String,
}

impl Wire<TcpStream> {
    pub(crate) async fn to(app: &TestApp, instance: &Instance) -> Self {
        let stream = TcpStream::connect(instance.url.trim_start_matches("http://")).await.unwrap();
        Self { stream, token: app.token.clone() }
    }

    pub(crate) async fn open(app: &TestApp) -> Self {
        Self::to(app, app.instance()).await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub(crate) async fn send(&mut self, text: &str) {
        within("what is sent is taken", self.stream.write_all(text.as_bytes())).await.unwrap();
    }

    /// Sends a request without a body; `target` as it is to stand in the request line.
    pub(crate) async fn ask(&mut self, method: &str, target: &str) {
        let head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n", self.token);
        self.send(&format!("{head}\r\n")).await;
    }

    /// The next answer's status, head and body.
    pub(crate) async fn answer(&mut self) -> (u16, String, String) {
        self.read_answer(true).await
    }

    async fn read_answer(&mut self, has_body: bool) -> (u16, String, String) {
        let read = async {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(self.stream.read_u8().await.expect("an answer"));
            }
            let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
            let mut body = vec![0; if has_body { length.parse().unwrap() } else { 0 }];
            self.stream.read_exact(&mut body).await.unwrap();
            (status, head, String::from_utf8(body).unwrap())
        };
        within("an answer comes", read).await
    }

    /// Waits until the other side closes, and gives what it said before.
    pub(crate) async fn closed(&mut self) -> String {
        let mut rest = Vec::new();
        // A reset closes as well.
        let _ = within("the connection is closed", self.stream.read_to_end(&mut rest)).await;
        String::from_utf8_lossy(&rest).into_owned()
    }

    /// Nothing is said and nothing closed for a while.
    async fn stays(&mut self, time: Duration) {
        let mut byte = [0];
        let read = tokio::time::timeout(time, self.stream.read(&mut byte)).await;
        assert!(read.is_err(), "the connection did not stay as it is: {read:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_carries_one_request_after_the_other() {
    let app = start("").await;
    let mut wire = Wire::open(&app).await;
    for _ in 0..50 {
        wire.ask("GET", &secret("acme", "K")).await;
        let (status, _, body) = wire.answer().await;
        assert_eq!((status, body.contains("\"value\":\"v\"")), (200, true));
    }
    // Errors do not end it.
    wire.ask("GET", &secret("acme", "NONE")).await;
    assert_eq!(wire.answer().await.0, 404);
    wire.ask("GET", "/healthz").await;
    assert_eq!(wire.answer().await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_sent_together_are_answered_in_order() {
    let app = start("").await;
    let mut wire = Wire::open(&app).await;
    for path in ["/healthz", "/nowhere", "/readyz"] {
        wire.ask("GET", path).await;
    }
    assert_eq!([wire.answer().await.0, wire.answer().await.0, wire.answer().await.0], [200, 404, 200]);
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_is_spoken_to_whoever_begins_with_it() {
    let app = start("").await;
    let stream = TcpStream::connect(app.url().trim_start_matches("http://")).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (sender, connection) = handshake.await.unwrap();
    let connection = tokio::spawn(connection);
    let ask = || {
        let mut sender = sender.clone();
        let request = http::Request::get(format!("{}{}", app.url(), secret("acme", "K")))
            .header("authorization", format!("Bearer {}", app.token))
            .body(Empty::<bytes::Bytes>::new());
        async move {
            let answer = sender.send_request(request.unwrap()).await.unwrap();
            (answer.status().as_u16(), answer.into_body().collect().await.unwrap().to_bytes())
        }
    };
    // Who has heard how many streams there may be waits with what is more; before, it is refused them.
    within("the first is answered", ask()).await;
    let answers = join_all((0..100).map(|_| ask()));
    for (status, body) in within("all are answered", answers).await {
        assert_eq!(status, 200);
        assert!(String::from_utf8_lossy(&body).contains("\"value\":\"v\""));
    }
    drop(sender);
    within("the connection ends", connection).await.unwrap().unwrap();
}

fn socket_in(app: &TestApp) -> PathBuf {
    app.folder().join("secretier.sock")
}

/// One more instance, which listens on this Unix socket too.
async fn on_socket(app: &mut TestApp, path: &Path) -> Instance {
    app.setup.server = format!("unix_socket = \"{}\"", path.display());
    app.another().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_is_its_owners_alone_answers_and_is_removed_at_the_end() {
    let mut app = start("").await;
    let path = socket_in(&app);
    let instance = on_socket(&mut app, &path).await;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut wire = Wire { stream: UnixStream::connect(&path).await.unwrap(), token: app.token.clone() };
    wire.ask("GET", &secret("acme", "K")).await;
    assert!(wire.answer().await.2.contains("\"value\":\"v\""));
    drop(wire);
    instance.stop().await;
    assert!(!path.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_socket_file_is_replaced_a_live_one_and_another_file_are_not() {
    let mut app = start("").await;
    let path = socket_in(&app);
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a file nobody listens at");
    let instance = on_socket(&mut app, &path).await;
    UnixStream::connect(&path).await.expect("it was replaced");

    let server = |path: &Path| {
        let toml = format!("environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\nunix_socket = {path:?}\n");
        Loaded::from_table(toml::from_str(&toml).unwrap()).unwrap().config.server
    };
    let error = Listeners::bind(&server(&path)).await.expect_err("it is in use").to_string();
    assert!(error.contains(&path.display().to_string()), "{error}");
    UnixStream::connect(&path).await.expect("the live one still answers");
    instance.stop().await;

    std::fs::write(&path, "mine").unwrap();
    let error = Listeners::bind(&server(&path)).await.expect_err("it is no socket").to_string();
    assert!(error.contains("no socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_socket_that_takes_no_more_connections_just_now_is_not_replaced() {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("secretier.sock");
    let socket = tokio::net::UnixSocket::new_stream().unwrap();
    socket.bind(&path).unwrap();
    let listener = socket.listen(1).unwrap();
    let mut waiting = Vec::new();
    let filling = async {
        while let Ok(stream) = UnixStream::connect(&path).await {
            waiting.push(stream);
        }
    };
    within("it takes no more connections", filling).await;
    let toml = format!("environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\nunix_socket = {path:?}\n");
    let config = Loaded::from_table(toml::from_str(&toml).unwrap()).unwrap().config.server;
    Listeners::bind(&config).await.expect_err("somebody listens there");
    listener.accept().await.unwrap();
    UnixStream::connect(&path).await.expect("it is where it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_do_not_come_in_time_end_the_connection() {
    let app = start("header_timeout = \"200ms\"\nidle_timeout = \"10m\"").await;
    let mut slow = Wire::open(&app).await;
    slow.send("GET /healthz HTTP/1.1\r\nHost: localhost\r\n").await;
    slow.closed().await;
    let mut later = Wire::open(&app).await;
    later.ask("GET", "/healthz").await;
    later.answer().await;
    later.send("GET /healthz").await;
    later.closed().await;
    // Trickling does not help.
    let Wire { stream, .. } = Wire::open(&app).await;
    let (mut read, mut write) = stream.into_split();
    let trickle = tokio::spawn(async move {
        while write.write_all(b"G").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await
        }
    });
    let mut rest = Vec::new();
    let _ = within("it is closed", read.read_to_end(&mut rest)).await;
    trickle.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_never_sends_a_byte_is_closed() {
    let app = start("header_timeout = \"200ms\"\nidle_timeout = \"10m\"").await;
    assert_eq!(Wire::open(&app).await.closed().await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_at_idle_timeout() {
    let app = start("header_timeout = \"10m\"\nidle_timeout = \"300ms\"").await;
    let mut wire = Wire::open(&app).await;
    wire.ask("GET", "/healthz").await;
    assert_eq!(wire.answer().await.0, 200);
    assert_eq!(wire.closed().await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_and_reads_no_answer_is_closed_at_idle_timeout() {
    let app = start("header_timeout = \"10m\"\nidle_timeout = \"300ms\"").await;
    let mut wire = Wire::open(&app).await;
    let requests = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(1000);
    // Until neither side has room for more.
    let sent = async { while wire.stream.write_all(requests.as_bytes()).await.is_ok() {} };
    within("it is closed", sent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_outlives_header_timeout() {
    let app = start("header_timeout = \"200ms\"\nidle_timeout = \"10m\"").await;
    let mut wire = Wire::open(&app).await;
    for _ in 0..2 {
        wire.ask("GET", "/healthz").await;
        assert_eq!(wire.answer().await.0, 200);
        wire.stays(Duration::from_millis(800)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_progress_is_not_idle() {
    let app = start("header_timeout = \"10m\"\nidle_timeout = \"200ms\"").await;
    let gate = app.world().gate(Route::List);
    let mut wire = Wire::open(&app).await;
    wire.ask("GET", &secret("acme", "K")).await;
    gate.arrived(1).await;
    wire.stays(Duration::from_millis(800)).await;
    gate.open();
    assert_eq!(wire.answer().await.0, 200);
    assert_eq!(wire.closed().await, "", "and then it is");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_took_longer_than_idleness_to_make_is_taken_whole() {
    let app = start("header_timeout = \"10m\"\nidle_timeout = \"1s\"").await;
    let value = "x".repeat(400_000);
    let keys: Vec<String> = (0..20).map(|number| format!("LARGE_{number}")).collect();
    app.holds("acme", &keys.iter().map(|key| (key.as_str(), value.as_str())).collect::<Vec<_>>());
    let gate = app.world().gate(Route::List);
    // So little is taken at once that the answer cannot be written without a wait.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(128 << 10).unwrap();
    let stream = socket.connect(app.url().trim_start_matches("http://").parse().unwrap()).await.unwrap();
    let mut wire = Wire { stream, token: app.token.clone() };
    wire.ask("GET", "/v1/tenants/acme/secrets?values=true").await;
    gate.arrived(1).await;
    wire.stays(Duration::from_millis(1500)).await;
    gate.open();
    let (status, _, body) = wire.answer().await;
    assert_eq!((status, body.len() > 20 * value.len()), (200, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_end_is_refused_at_body_timeout() {
    let app = start("body_timeout = \"200ms\"").await;
    let target = secret("acme", "NEW");
    let head = format!("PUT {target} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n", app.token);
    for body in ["Content-Length: 100\r\n\r\n{\"value\":", "Transfer-Encoding: chunked\r\n\r\n9\r\n{\"value\":\r\n"] {
        let mut wire = Wire::open(&app).await;
        wire.send(&format!("{head}{body}")).await;
        let (status, _, body) = wire.answer().await;
        assert_eq!((status, body.contains("invalid_body")), (400, true), "{body}");
        wire.closed().await;
    }
    assert_eq!(app.world().value("prod", "/tenants/acme", "NEW"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_too_large_is_refused_before_it_has_been_read() {
    let app = start("max_value = \"1KiB\"").await;
    let target = secret("acme", "NEW");
    let head = format!("PUT {target} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n", app.token);
    let mut announced = Wire::open(&app).await;
    announced.send(&format!("{head}Content-Length: 1000000000000\r\n\r\n{{\"value\":\"")).await;
    let (status, _, body) = announced.answer().await;
    assert_eq!((status, body.contains("value_too_large")), (413, true), "{body}");
    announced.closed().await;

    let mut endless = Wire::open(&app).await;
    endless.send(&format!("{head}Transfer-Encoding: chunked\r\n\r\n")).await;
    let Wire { stream, .. } = endless;
    let (read, mut write) = tokio::io::split(stream);
    let chunk = format!("400\r\n{}\r\n", "x".repeat(1024));
    let sending = tokio::spawn(async move { while write.write_all(chunk.as_bytes()).await.is_ok() {} });
    let mut status = [0; 12];
    within("an answer comes", tokio::io::BufReader::new(read).read_exact(&mut status)).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 413");
    sending.abort();
    let value = "x".repeat(1025);
    assert_eq!(app.put("acme", "NEW", &value).await.problem(), (413, "value_too_large".to_owned()));
    assert_eq!(app.world().value("prod", "/tenants/acme", "NEW"), None);
    assert_eq!(app.put("acme", "NEW", &value[..1024]).await.status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_may_be_a_whole_address() {
    let app = start("").await;
    let mut wire = Wire::open(&app).await;
    wire.ask("GET", &format!("{}{}", app.url(), secret("acme", "K"))).await;
    assert_eq!(wire.answer().await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_method_is_405_and_told_which_are_known() {
    let app = start("").await;
    let key = secret("acme", "K");
    for (method, target, allow) in [
        ("PATCH", key.as_str(), "get, head, put, delete"),
        ("BREW", &key, "get, head, put, delete"),
        ("POST", &key, "get, head, put, delete"),
        ("DELETE", "/v1/tenants/acme/secrets", "get, head"),
        ("GET", "/v1/tenants/acme/refresh", "post"),
        ("POST", "/healthz", "get, head"),
        ("PUT", "/metrics", "get, head"),
    ] {
        let mut wire = Wire::open(&app).await;
        wire.ask(method, target).await;
        let (status, head, body) = wire.answer().await;
        assert_eq!(status, 405, "{method} {target}");
        assert!(head.contains(&format!("allow: {allow}\r\n")), "{method} {target}: {head}");
        assert!(body.contains("method_not_allowed"), "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_route_is_404_to_those_with_a_token_and_401_to_others() {
    let app = start("").await;
    for path in [
        "/",
        "/v1",
        "/v1/tenants/",
        "/v1/tenants/acme/secrets/K/other",
        "/v2/tenants",
        "//healthz",
        "/v1/tenants/acme/secrets/a/b/c",
    ] {
        let known = Answer::of(app.request(Method::GET, path)).await;
        let stranger = Answer::of(app.instance().request(Method::GET, path)).await;
        assert_eq!(stranger.problem(), (401, "token_missing".to_owned()), "{path}");
        assert_eq!(stranger.header("www-authenticate"), "Bearer");
        // An empty tenant's name is a name that none can have.
        if path != "/v1/tenants/" {
            assert_eq!(known.problem(), (404, "route_not_found".to_owned()), "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn head_tells_what_get_would_without_a_body() {
    let app = start("").await;
    let mut wire = Wire::open(&app).await;
    wire.ask("GET", &secret("acme", "K")).await;
    let (_, _, body) = wire.answer().await;
    for (target, expected) in [(secret("acme", "K"), 200), (secret("acme", "NONE"), 404), ("/healthz".to_owned(), 200)]
    {
        wire.ask("HEAD", &target).await;
        let (status, head, _) = wire.read_answer(false).await;
        assert_eq!(status, expected);
        if target == secret("acme", "K") {
            assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{head}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_idle_connections_do_not_disturb_one_that_works() {
    let app = start("").await;
    let mut idle = Vec::new();
    for _ in 0..500 {
        idle.push(Wire::open(&app).await);
    }
    let mut wire = Wire::open(&app).await;
    for _ in 0..20 {
        wire.ask("GET", &secret("acme", "K")).await;
        assert_eq!(wire.answer().await.0, 200);
    }
    // They were accepted, and are served when they speak.
    let last = idle.last_mut().unwrap();
    last.ask("GET", "/healthz").await;
    assert_eq!(last.answer().await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_all_connections_are_at_work_a_further_one_waits_until_one_ends() {
    let app = start("max_connections = 3").await;
    // All of them, before the first is asked for: what there is upstream is read once.
    let tenants = ["acme", "globex", "initech"];
    let _ = tenants.map(|tenant| app.holds(tenant, &[("K", "v")]));
    let gate = app.world().gate(Route::List);
    let mut open = Vec::new();
    for tenant in tenants {
        let mut wire = Wire::open(&app).await;
        wire.ask("GET", &secret(tenant, "K")).await;
        open.push(wire);
    }
    gate.arrived(3).await;
    let mut fourth = Wire::open(&app).await;
    fourth.ask("GET", "/healthz").await;
    fourth.stays(Duration::from_millis(1500)).await;
    gate.open();
    for wire in &mut open {
        assert_eq!(wire.answer().await.0, 200, "none of them was closed for it");
    }
    open.pop();
    assert_eq!(fourth.answer().await.0, 200);
}

async fn until_refused(instance: &str) {
    let refused = async {
        while TcpStream::connect(instance.trim_start_matches("http://")).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within("new connections are refused", refused).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_progress_when_shutdown_begins_is_answered_and_new_connections_are_refused() {
    let app = start("shutdown_grace = \"10m\"").await;
    let instance = app.another().await;
    let gate = app.world().gate(Route::List);
    let mut idle = Wire::to(&app, &instance).await;
    idle.ask("GET", "/healthz").await;
    idle.answer().await;
    let mut silent = Wire::to(&app, &instance).await;
    let mut wire = Wire::to(&app, &instance).await;
    wire.ask("GET", &secret("acme", "K")).await;
    gate.arrived(1).await;
    let url = instance.url.clone();
    let stopping = tokio::spawn(instance.stop());
    until_refused(&url).await;
    assert!(!stopping.is_finished());
    gate.open();
    let (status, _, body) = wire.answer().await;
    assert_eq!((status, body.contains("\"value\":\"v\"")), (200, true));
    assert_eq!(wire.closed().await, "");
    assert_eq!(idle.closed().await, "", "idle ones are closed at once");
    assert_eq!(silent.closed().await, "");
    within("it ends long before its grace time", stopping).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_grace_time_bounds_how_long_requests_in_progress_are_waited_for() {
    let app = start("shutdown_grace = \"300ms\"").await;
    let instance = app.another().await;
    let gate = app.world().gate(Route::List);
    let mut wire = Wire::to(&app, &instance).await;
    wire.ask("GET", &secret("acme", "K")).await;
    gate.arrived(1).await;
    let began = Instant::now();
    instance.stop().await;
    assert!(began.elapsed() < Duration::from_secs(20), "well before the call upstream gives up");
    drop(gate);
}
