//! A server whose answers a test decides.

use std::sync::{Mutex, atomic::AtomicU32};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::*;

/// A server whose answers a test decides. By default it grants every login, with `token-1`,
/// `token-2` and so on.
pub(super) struct Fake {
    pub(super) site_url: String,
    pub(super) seen: Arc<Mutex<Vec<Seen>>>,
    pub(super) grants: Arc<AtomicBool>,
    pub(super) clock: Clock,
    pub(super) metrics: Arc<Metrics>,
    pub(super) upstream: Infisical,
}

#[derive(Clone)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) target: String,
    /// The headers, in lower case.
    pub(super) head: String,
    pub(super) body: Value,
    /// The length of the body, as it was sent.
    pub(super) length: usize,
}

pub(super) enum Answer {
    Json(u16, Value),
    Text(u16, Vec<(&'static str, String)>, String),
    /// Ends in the middle.
    CutOff,
    /// Closes without an answer.
    Close,
    /// Never answers.
    Hang,
}

impl Answer {
    pub(super) fn ok(body: Value) -> Self {
        Self::Json(200, body)
    }

    pub(super) fn with_etag(body: &Value, etag: &str) -> Self {
        Self::Text(200, vec![("etag", etag.to_owned())], body.to_string())
    }

    pub(super) fn not_found(seen: &Seen) -> Self {
        let message = format!("Route {}:{} not found", seen.method, seen.target);
        Self::Json(404, json!({"message": message, "error": "Not Found", "statusCode": 404}))
    }

    pub(super) fn into_bytes(self) -> Option<Vec<u8>> {
        let (status, headers, body) = match self {
            Self::Json(status, body) => (status, Vec::new(), body.to_string()),
            Self::Text(status, headers, body) => (status, headers, body),
            Self::CutOff => return Some(b"HTTP/1.1 200 OK\r\ncontent-length: 90\r\n\r\n{\"secrets\":[]}".to_vec()),
            Self::Close | Self::Hang => return None,
        };
        let mut answer = format!("HTTP/1.1 {status} Whatever\r\n");
        for (name, value) in headers {
            answer.push_str(&format!("{name}: {value}\r\n"));
        }
        Some(format!("{answer}content-length: {}\r\n\r\n{body}", body.len()).into_bytes())
    }
}

impl Seen {
    pub(super) fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }
}

impl Fake {
    pub(super) async fn start(answer: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let site_url = format!("http://{}", listener.local_addr().unwrap());
        let (seen, grants) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(true)));
        let (clock, metrics) = (Clock::system(), Metrics::new());
        let (noted, granting, tokens) = (Arc::clone(&seen), Arc::clone(&grants), AtomicU32::new(0));
        let answer = Arc::new(move |request: Seen| {
            noted.lock().unwrap().push(request.clone());
            if request.path() != LOGIN || !granting.load(Ordering::Relaxed) {
                return answer(&request);
            }
            assert_eq!(request.body, json!({"clientId": "client-1", "clientSecret": "hush"}));
            let number = tokens.fetch_add(1, Ordering::Relaxed) + 1;
            let token = format!("token-{number}");
            Answer::ok(json!({"accessToken": token, "expiresIn": 2_592_000, "tokenType": "Bearer"}))
        });
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(converse(stream, Arc::clone(&answer)));
            }
        });
        let upstream = build(config(&site_url), &clock, &metrics);
        Self { site_url, seen, grants, clock, metrics, upstream }
    }

    /// A client of the same server with other settings.
    pub(super) fn another(&self, change: impl FnOnce(&mut Config)) -> Infisical {
        let mut config = config(&self.site_url);
        change(&mut config);
        build(config, &self.clock, &self.metrics)
    }

    /// From now on the test answers logins too.
    pub(super) fn decide_logins(&self) {
        self.grants.store(false, Ordering::Relaxed);
    }

    pub(super) async fn snapshot(&self) -> Result<Snapshot, UpstreamError> {
        match self.upstream.snapshot(&tenant(), None, Lane::Interactive).await? {
            Fetched::Changed(snapshot) => Ok(snapshot),
            Fetched::Unchanged => panic!("nothing was known"),
        }
    }

    pub(super) async fn put(&self, key: &str, value: &str) -> Result<bool, UpstreamError> {
        self.upstream.put(&tenant(), &key.parse().unwrap(), &SecretValue::new(value.to_owned())).await
    }

    /// Writes to a folder that is no tenant's.
    pub(super) async fn write(&self, key: &str, value: &str) -> Result<(), UpstreamError> {
        self.upstream.write("/keys", &key.parse().unwrap(), &SecretValue::new(value.to_owned())).await
    }

    pub(super) async fn delete(&self, key: &str) -> Result<bool, UpstreamError> {
        self.upstream.delete(&tenant(), &key.parse().unwrap()).await
    }

    pub(super) fn seen(&self, path: &str) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().filter(|seen| seen.path() == path).cloned().collect()
    }

    pub(super) fn count(&self, path: &str) -> usize {
        self.seen(path).len()
    }

    pub(super) fn all(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

pub(super) async fn converse(mut stream: TcpStream, answer: Arc<impl Fn(Seen) -> Answer>) {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if stream.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
                return;
            }
        };
        let head = String::from_utf8(buffer.drain(..end).collect()).unwrap();
        let lower = head.to_ascii_lowercase();
        let length = lower.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
        while buffer.len() < length {
            if stream.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let body: Vec<u8> = buffer.drain(..length).collect();
        let mut words = head.split(' ').map(str::to_owned);
        let (method, target) = (words.next().unwrap(), words.next().unwrap());
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let answer = answer(Seen { method, target, head: lower, body, length });
        if matches!(answer, Answer::Hang) {
            std::future::pending::<()>().await;
        }
        let last = matches!(answer, Answer::CutOff);
        let Some(bytes) = answer.into_bytes() else { return };
        if stream.write_all(&bytes).await.is_err() || last {
            return;
        }
    }
}

pub(super) fn config(site_url: &str) -> Config {
    Config {
        site_url: site_url.to_owned(),
        allow_http: false,
        ca_file: None,
        proxy: None,
        project_id: "project-1".to_owned(),
        client_id: "client-1".to_owned(),
        client_secret: SecretSetting::Inline(SecretValue::new("hush".to_owned())),
        tenants_path: "/tenants".to_owned(),
        requests_per_minute: NonZeroU32::new(10_000).unwrap(),
        migration_requests_per_minute: None,
        // Long, so that no test depends on the speed of this machine.
        timeout: Duration::from_secs(20),
        // Never before the timeout.
        read_timeout: Duration::ZERO,
        references: Vec::new(),
        folders: Vec::new(),
        max_connections: NonZeroU16::new(16).unwrap(),
        poll_interval: Duration::from_secs(60),
        webhook_secret: None,
        max_response: 1 << 20,
    }
}

pub(super) fn build(config: Config, clock: &Clock, metrics: &Arc<Metrics>) -> Infisical {
    let secret = config.client_secret.resolve().unwrap();
    Infisical::build(config, "prod".to_owned(), &Withheld::default(), secret, clock.clone(), Arc::clone(metrics))
        .unwrap()
}

pub(super) fn tenant() -> Tenant {
    "acme".parse().unwrap()
}

pub(super) fn secret(key: &str, value: &str) -> Value {
    json!({"id": key, "secretKey": key, "secretValue": value, "type": "shared", "version": 3, "secretPath": "/tenants/acme"})
}

pub(super) fn values(snapshot: &Snapshot) -> Vec<(&str, &str)> {
    snapshot.secrets.iter().map(|secret| (secret.key.as_str(), secret.value.expose())).collect()
}
