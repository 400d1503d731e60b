//! The attacks, each bounded in time.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use memchr::memmem;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{
    Form,
    frames::{
        self, CONTINUATION, Came, DATA, END_STREAM, HEADERS, INITIAL_WINDOW_SIZE, LONGEST, opening, ping, request,
        reset, stream,
    },
    stage::{HANGS, LARGE_LIST, Stage},
};

/// Requests that each connection of a storm makes.
const STREAMS: usize = 256;

/// What a secret's path is, for who may not read it.
const SECRET: &str = "/v1/tenants/good/secrets/K";

/// What the attackers saw.
#[derive(Default)]
pub(super) struct Saw {
    /// In a line.
    pub(super) told: String,
    /// Answers to who is no good caller, each of which is to be accounted for.
    pub(super) answered: usize,
    /// What should not have been answered so.
    pub(super) wrong: Option<String>,
}

impl From<String> for Saw {
    fn from(told: String) -> Self {
        Self { told, ..Self::default() }
    }
}

/// Opens so many connections.
async fn connect(stage: &Stage, connections: usize) -> Vec<TcpStream> {
    let mut streams = Vec::with_capacity(connections);
    for _ in 0..connections {
        let connected = timeout(HANGS, TcpStream::connect(&stage.address)).await;
        streams.push(connected.expect("a connection is taken").unwrap());
    }
    streams
}

/// Writes what the other side takes within this time; tells whether that was all.
async fn write(stream: &mut TcpStream, bytes: &[u8], bound: Duration) -> bool {
    timeout(bound, stream.write_all(bytes)).await.is_ok_and(|written| written.is_ok())
}

/// Every connection sends all its requests at once, without a token, and reads what comes of it.
pub(super) async fn storm(stage: &Stage, connections: usize) -> Saw {
    let opening = opening(&[]);
    let mut streams = connect(stage, connections).await;
    for stream in &mut streams {
        write(stream, &opening, HANGS).await;
    }
    let requests = (0..STREAMS).map(|number| request(stream(number), END_STREAM, "GET", SECRET, &[]));
    let requests: Arc<[u8]> = requests.flatten().collect();
    let storming = streams.into_iter().map(|stream| {
        let requests = Arc::clone(&requests);
        tokio::spawn(async move {
            let (mut reading, mut writing) = stream.into_split();
            let written = timeout(HANGS, writing.write_all(&requests));
            let (came, _) = tokio::join!(frames::read(&mut reading, STREAMS, HANGS), written);
            // Open until all have been answered.
            (came, reading, writing)
        })
    });
    let ended: Vec<_> = join_all(storming).await.into_iter().map(Result::unwrap).collect();
    let came: Vec<Came> = ended.iter().map(|(came, ..)| *came).collect();
    let of = |number: fn(&Came) -> usize| came.iter().map(number).sum::<usize>();
    let (answered, resets) = (of(|came| came.heads), of(|came| came.resets));
    let closed = of(|came| usize::from(came.is_gone));
    let told = format!(
        "{connections} connections x {STREAMS} requests: {answered} answered, {resets} reset, {closed} connections closed"
    );
    Saw { told, answered, wrong: None }
}

/// Requests that are refused before anybody is known by them, each different.
pub(super) async fn malformed(stage: &Stage, requests: usize) -> Saw {
    let answered = flood(stage, requests, Duration::from_secs(40), |number| {
        let noise = format!(
            "User-Agent: agent-{number}-{pad}\r\nX-Audit-Actor: actor-{number}-{pad}\r\nX-Audit-Reason: {number}\r\n\
             X-Request-Id: request-{number}\r\n",
            pad = "x".repeat(500),
        );
        let target = format!("/v1/tenants/t{number}/secrets/K{number}");
        let ours = "Host: localhost\r\n";
        let (target, headers) = match number % 5 {
            0 => (target, format!("Host: evil-{number}.example\r\n")),
            1 => (target, format!("{ours}X-Forwarded-For: 198.51.100.{number}\r\n")),
            2 => (target, format!("{ours}Authorization: Bearer a{number}\r\nAuthorization: Bearer b{number}\r\n")),
            3 => (format!("http://evil-{number}.example{target}"), ours.to_owned()),
            _ => (target, String::new()),
        };
        format!("GET {target} HTTP/1.1\r\n{headers}{noise}\r\n")
    });
    answered.await
}

/// Requests that are denied, with large headers: by tokens that are none, and by one out of its scope.
pub(super) async fn denied(stage: &Stage, requests: usize) -> Saw {
    let small = stage.small.clone();
    let answered = flood(stage, requests, Duration::from_secs(10), move |number| {
        let pad = "x".repeat(1400);
        let noise = format!(
            "User-Agent: agent-{number}-{pad}\r\nX-Audit-Actor: actor-{number}-{pad}\r\n\
             X-Audit-Reason: {number}-{pad}\r\nX-Request-Id: request-{number}\r\n"
        );
        let token = match number % 2 {
            0 => format!("st_{number:012x}_{number:064x}"),
            _ => small.clone(),
        };
        format!(
            "GET /v1/tenants/t{number}/secrets/K{number} HTTP/1.1\r\nHost: localhost\r\n\
             Authorization: Bearer {token}\r\n{noise}\r\n"
        )
    });
    answered.await
}

/// Logins with credentials that are none, and requests with access tokens that are none, each different.
pub(super) async fn logins(stage: &Stage, requests: usize) -> Saw {
    let answered = flood(stage, requests, Duration::from_secs(10), |number| {
        let pad = "x".repeat(1400);
        let ours = format!("Host: localhost\r\nUser-Agent: agent-{number}-{pad}");
        let body = match number % 4 {
            // The form of one of ours that is not there; one that is no UUID; no JSON at all.
            0 => {
                format!("{{\"clientId\":\"{number:08x}-0000-4000-8000-0000{number:08x}\",\"clientSecret\":\"{pad}\"}}")
            }
            1 => format!("{{\"clientId\":\"{number}-{pad}\",\"clientSecret\":\"{number}\"}}"),
            2 => format!("{{{number}"),
            _ => {
                let token = format!("eyJhbGciOiJIUzI1NiJ9.{number:064x}.{number:064x}");
                return format!(
                    "GET /api/v3/secrets/raw?secretPath=/tenants/t{number} HTTP/1.1\r\n{ours}\r\n\
                     Authorization: Bearer {token}\r\n\r\n"
                );
            }
        };
        format!(
            "POST /api/v1/auth/universal-auth/login HTTP/1.1\r\n{ours}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
    });
    answered.await
}

/// Sends requests until so many are answered, or the time is over; each is made from its number.
async fn flood(
    stage: &Stage,
    requests: usize,
    bound: Duration,
    make: impl Fn(usize) -> String + Send + Sync + 'static,
) -> Saw {
    const CONNECTIONS: usize = 4;
    const AT_ONCE: usize = 16;
    let (make, answered, sent) = (Arc::new(make), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let until = Instant::now() + bound;
    let floods = (0..CONNECTIONS).map(|_| {
        let (make, answered, sent) = (Arc::clone(&make), Arc::clone(&answered), Arc::clone(&sent));
        let address = stage.address.clone();
        tokio::spawn(async move {
            let mut kept: Option<TcpStream> = None;
            let mut statuses = BTreeMap::<String, usize>::new();
            while answered.load(Ordering::Relaxed) < requests && Instant::now() < until {
                let first = sent.fetch_add(AT_ONCE, Ordering::Relaxed);
                let several: String = (first..first + AT_ONCE).map(|number| make(number)).collect();
                let mut stream = match kept.take() {
                    Some(stream) => stream,
                    None => TcpStream::connect(&address).await.unwrap(),
                };
                // The other side may close behind the first of them.
                write(&mut stream, several.as_bytes(), HANGS).await;
                let (came, is_open) = read_statuses(&mut stream, AT_ONCE).await;
                answered.fetch_add(came.len(), Ordering::Relaxed);
                for status in came {
                    *statuses.entry(status).or_default() += 1;
                }
                kept = Some(stream).filter(|_| is_open);
            }
            statuses
        })
    });
    let mut statuses = BTreeMap::<String, usize>::new();
    for (status, count) in join_all(floods).await.into_iter().flat_map(Result::unwrap) {
        *statuses.entry(status).or_default() += count;
    }
    let told = statuses.iter().map(|(status, count)| format!("{count} answered {status}")).collect::<Vec<_>>();
    Saw { told: told.join(", "), answered: statuses.values().sum(), wrong: None }
}

/// The statuses of the answers that came, of so many, and whether the connection is open still.
async fn read_statuses(stream: &mut TcpStream, wanted: usize) -> (Vec<String>, bool) {
    const HEAD: &[u8] = b"HTTP/1.1 ";
    let mut came = Vec::new();
    let statuses = |came: &[u8]| {
        let heads = memmem::find_iter(came, HEAD).map(|at| at + HEAD.len());
        let texts = heads.filter_map(|at| came.get(at..at + 3)).map(|status| String::from_utf8_lossy(status).into());
        texts.collect::<Vec<String>>()
    };
    loop {
        if !matches!(timeout(HANGS, stream.read_buf(&mut came)).await, Ok(Ok(1..))) {
            return (statuses(&came), false);
        }
        let so_far = statuses(&came);
        // Of the last one the body may be missing, which the next batch would take for nothing.
        if so_far.len() >= wanted && (came.ends_with(b"}") || came.ends_with(b"}\n")) {
            return (so_far, true);
        }
    }
}

/// Bodies of which a part comes, and then nothing: with a good token, without one, and by HTTP/2.
pub(super) async fn slow_bodies(stage: &Stage, form: Form) -> Saw {
    const PART: usize = 700_000;
    let [by_token, without, multiplexed] = form.choose([300, 100, 50], [80, 40, 20]);
    let part = "v".repeat(PART);
    let head = |token: &str| {
        let path = "/v1/tenants/other/secrets/S?create_tenant=true";
        let length = 1 << 20;
        format!("PUT {path} HTTP/1.1\r\nHost: localhost\r\n{token}Content-Length: {length}\r\n\r\n{{\"value\":\"{part}")
    };
    let bearer = format!("Bearer {}", stage.writer);
    let with_token: Arc<str> = head(&format!("Authorization: {bearer}\r\n")).into();
    let tokenless: Arc<str> = head("").into();
    let patience = form.choose(Duration::from_secs(8), Duration::from_secs(3));
    let mut holding = Vec::new();
    for (bytes, connections) in [(with_token, by_token), (tokenless, without)] {
        for mut stream in connect(stage, connections).await {
            let bytes = Arc::clone(&bytes);
            holding.push(tokio::spawn(async move {
                let began = Instant::now();
                let is_taken = write(&mut stream, bytes.as_bytes(), patience).await;
                sleep(patience.saturating_sub(began.elapsed())).await;
                usize::from(is_taken)
            }));
        }
    }
    for (number, stream) in connect(stage, multiplexed).await.into_iter().enumerate() {
        let bearer = if number % 2 == 0 { bearer.clone() } else { String::new() };
        holding.push(tokio::spawn(multiplexed_bodies(stream, bearer, patience)));
    }
    let taken: usize = join_all(holding).await.into_iter().map(Result::unwrap).sum();
    format!(
        "{} bodies by a good token and {without} without, half sent; {multiplexed} HTTP/2 connections: {taken} taken",
        by_token
    )
    .into()
}

/// As many bytes of bodies as one connection's windows allow, in 16 streams that do not end.
async fn multiplexed_bodies(mut wire: TcpStream, bearer: String, patience: Duration) -> usize {
    const BODIES: usize = 16;
    let began = Instant::now();
    write(&mut wire, &opening(&[]), patience).await;
    let windows = frames::read(&mut wire, 1, Duration::from_millis(300)).await.windows;
    let headers = [("authorization", bearer.as_str())];
    let headers = if bearer.is_empty() { &[][..] } else { &headers };
    let path = "/v1/tenants/other/secrets/S?create_tenant=true";
    let heads = (0..BODIES).flat_map(|number| request(stream(number), 0, "PUT", path, headers));
    let mut is_taken = write(&mut wire, &heads.collect::<Vec<_>>(), patience).await;
    let each = windows[0].min(windows[1] / BODIES);
    let body = vec![b' '; LONGEST];
    for (number, length) in (0..BODIES).flat_map(|number| parts(each).map(move |length| (number, length))) {
        is_taken &= write(&mut wire, &frames::frame(DATA, 0, stream(number), &body[..length]), patience).await;
    }
    sleep(patience.saturating_sub(began.elapsed())).await;
    usize::from(is_taken)
}

/// The lengths of the frames that so many bytes are sent in.
fn parts(bytes: usize) -> impl Iterator<Item = usize> {
    (0..bytes.div_ceil(LONGEST)).map(move |number| LONGEST.min(bytes - number * LONGEST))
}

/// A hundred large lists that nobody reads, by eight connections: HTTP/2 with windows of zero, kept
/// alive by pings, then HTTP/1.1.
pub(super) async fn unread(stage: &Stage, form: Form) -> Saw {
    const CONNECTIONS: usize = 8;
    let lists = form.choose(104, 104) / CONNECTIONS;
    let seconds = form.choose(8, 4);
    let bearer = format!("Bearer {}", stage.small);
    let headers = [("authorization", bearer.as_str())];
    let mut wires = connect(stage, CONNECTIONS).await;
    let asked = (0..lists).flat_map(|number| request(stream(number), END_STREAM, "GET", LARGE_LIST, &headers));
    let asked = [opening(&[(INITIAL_WINDOW_SIZE, 0)]), asked.collect()].concat();
    for wire in &mut wires {
        write(wire, &asked, HANGS).await;
    }
    for _ in 0..seconds {
        sleep(Duration::from_secs(1)).await;
        for wire in &mut wires {
            // Closed, maybe: that is an answer too.
            write(wire, &ping(), HANGS).await;
        }
    }
    let mut came = Vec::new();
    for wire in &mut wires {
        came.push(frames::read(wire, lists, Duration::from_millis(200)).await);
    }
    drop(wires);
    let mut wires = connect(stage, CONNECTIONS).await;
    let one = format!("GET {LARGE_LIST} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {bearer}\r\n\r\n");
    for wire in &mut wires {
        write(wire, one.repeat(lists).as_bytes(), HANGS).await;
    }
    sleep(Duration::from_secs(seconds)).await;
    let of = |number: fn(&Came) -> usize| came.iter().map(number).sum::<usize>();
    let (heads, resets, gone) = (of(|came| came.heads), of(|came| came.resets), of(|came| usize::from(came.is_gone)));
    format!(
        "{} lists by HTTP/2: {heads} begun, {resets} reset, {gone} connections closed; as many by HTTP/1.1",
        lists * CONNECTIONS
    )
    .into()
}

/// Eight connections that list 16 MiB all the time, and read it.
pub(super) async fn lists(stage: &Stage, form: Form) -> Saw {
    let until = Instant::now() + form.choose(Duration::from_secs(8), Duration::from_secs(3));
    let listing = (0..8).map(|_| {
        let asked =
            format!("GET {LARGE_LIST} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n", stage.small);
        let address = stage.address.clone();
        tokio::spawn(async move {
            let (mut whole, mut refused) = (0, 0);
            while Instant::now() < until {
                let mut wire = TcpStream::connect(&address).await.unwrap();
                while Instant::now() < until && write(&mut wire, asked.as_bytes(), HANGS).await {
                    match read_body(&mut wire).await {
                        Some(200) => whole += 1,
                        Some(_) => {
                            refused += 1;
                            sleep(Duration::from_millis(10)).await;
                        }
                        None => break,
                    }
                }
            }
            (whole, refused)
        })
    });
    let done = join_all(listing).await.into_iter().map(Result::unwrap);
    let (whole, refused) = done.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    format!("8 connections: {whole} lists read, {refused} refused").into()
}

/// Reads one answer to its end; gives its status.
async fn read_body(wire: &mut TcpStream) -> Option<u16> {
    let mut bytes = Vec::with_capacity(64 << 10);
    let end = loop {
        if timeout(HANGS, wire.read_buf(&mut bytes)).await.ok()?.ok()? == 0 {
            return None;
        }
        if let Some(end) = memmem::find(&bytes, b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")).map(|text| text.trim().parse());
    let mut left = length?.ok()?;
    left -= (bytes.len() - end).min(left);
    while left > 0 {
        bytes.clear();
        left -= timeout(HANGS, wire.read_buf(&mut bytes)).await.ok()?.ok().filter(|read| *read > 0)?.min(left);
    }
    Some(status)
}

/// True notices, while 64 forged ones do not end.
pub(super) async fn notices(stage: &Stage, form: Form) -> Saw {
    const FORGED: usize = 64;
    let at = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    let forged = format!(
        "POST /v1/hooks/infisical HTTP/1.1\r\nHost: localhost\r\nx-infisical-signature: t={at};{}\r\n\
         Content-Length: 60000\r\n\r\n{{",
        "0".repeat(64),
    );
    let slow = (0..FORGED).map(|_| {
        let (address, forged) = (stage.address.clone(), forged.clone());
        tokio::spawn(async move {
            loop {
                let mut wire = TcpStream::connect(&address).await.unwrap();
                write(&mut wire, forged.as_bytes(), HANGS).await;
                // A byte now and then, until the other side has enough of it.
                let mut answer = [0; 1024];
                while timeout(Duration::from_millis(300), wire.read(&mut answer)).await.is_err() {
                    if !write(&mut wire, b" ", HANGS).await {
                        break;
                    }
                }
            }
        })
    });
    let slow: Vec<_> = slow.collect();
    sleep(Duration::from_millis(500)).await;
    let (sent, mut taken, mut wrong) = (form.choose(24, 12), 0, None);
    for number in 0..sent {
        let (signature, body) = stage.notice(number);
        let length = body.len();
        let head = "POST /v1/hooks/infisical HTTP/1.1\r\nHost: localhost\r\nConnection: close";
        let whole = format!("{head}\r\nx-infisical-signature: {signature}\r\nContent-Length: {length}\r\n\r\n{body}");
        let mut wire = TcpStream::connect(&stage.address).await.unwrap();
        write(&mut wire, whole.as_bytes(), HANGS).await;
        let mut answer = Vec::new();
        let _ = timeout(HANGS, wire.read_to_end(&mut answer)).await;
        let answer = String::from_utf8_lossy(&answer);
        match answer.lines().next() {
            Some("HTTP/1.1 202 Accepted") => taken += 1,
            line => _ = wrong.get_or_insert_with(|| format!("a true notice was not taken: {line:?}")),
        }
        sleep(form.choose(Duration::from_millis(250), Duration::from_millis(200))).await;
    }
    for task in slow {
        task.abort();
        let _ = task.await;
    }
    Saw { told: format!("{taken} of {sent} true notices taken"), answered: 0, wrong }
}

/// Requests that are reset as soon as they are made.
pub(super) async fn resets(stage: &Stage, form: Form) -> Saw {
    const PAIRS: usize = 100;
    let until = Instant::now() + form.choose(Duration::from_secs(6), Duration::from_secs(2));
    let storming = (0..8).map(|_| {
        let address = stage.address.clone();
        tokio::spawn(async move {
            let (mut pairs, mut connections) = (0, 0);
            while Instant::now() < until {
                let wire = TcpStream::connect(&address).await.unwrap();
                let (mut reading, mut writing) = wire.into_split();
                connections += 1;
                let writes = async {
                    let _ = writing.write_all(&opening(&[])).await;
                    for first in (0..).step_by(PAIRS) {
                        let numbers = first..first + PAIRS;
                        let several = numbers.flat_map(|number| {
                            [request(stream(number), END_STREAM, "GET", SECRET, &[]), reset(stream(number))].concat()
                        });
                        let several: Vec<u8> = several.collect();
                        if Instant::now() >= until || writing.write_all(&several).await.is_err() {
                            break;
                        }
                        pairs += PAIRS;
                    }
                };
                tokio::select! {
                    () = writes => {}
                    _ = frames::read(&mut reading, usize::MAX, HANGS) => {}
                }
            }
            (pairs, connections)
        })
    });
    let done = join_all(storming).await.into_iter().map(Result::unwrap);
    let (pairs, connections) = done.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    format!("{pairs} requests reset at once, by {connections} connections").into()
}

/// Heads that do not end, by HTTP/1.1 and HTTP/2, and uploads of which a byte comes now and then.
pub(super) async fn unfinished(stage: &Stage, form: Form) -> Saw {
    let [heads, multiplexed, uploads] = form.choose([400, 200, 200], [100, 50, 50]);
    let seconds = form.choose(6, 3);
    let head = format!("GET {SECRET} HTTP/1.1\r\nHost: localhost\r\nX-Padding: {}", "x".repeat(30_000));
    let upload = format!("PUT {SECRET} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n");
    let block = frames::block("GET", SECRET, &[("x-padding", &"x".repeat(30_000))]);
    let (first, rest) = block.split_at(LONGEST);
    // No END_HEADERS: the rest is to come.
    let continued = [
        opening(&[]),
        frames::frame(HEADERS, END_STREAM, 1, first),
        frames::frame(CONTINUATION, 0, 1, &rest[..rest.len() - 1]),
    ];
    let continued = continued.concat();
    let mut wires = Vec::new();
    for (bytes, connections) in [(head.as_bytes(), heads), (&continued, multiplexed), (upload.as_bytes(), uploads)] {
        for mut wire in connect(stage, connections).await {
            write(&mut wire, bytes, HANGS).await;
            wires.push(wire);
        }
    }
    for _ in 0..seconds {
        sleep(Duration::from_secs(1)).await;
        let (_, uploading) = wires.split_at_mut(heads + multiplexed);
        for wire in uploading {
            write(wire, b" ", HANGS).await;
        }
    }
    format!("{heads} heads by HTTP/1.1, {multiplexed} by HTTP/2, {uploads} uploads, none of which ends").into()
}
