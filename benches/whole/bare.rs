//! Hyper as bare as it gets, in a process of its own: what the product is held to. With one
//! body for whatever is asked, or with what one plain SELECT by primary key brings.

use std::{
    cell::RefCell,
    convert::Infallible,
    io::{Read as _, Write as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use clap::Args;
use http::header;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};

use crate::select;

/// Serve what hyper alone can, until standard input ends.
#[derive(Args)]
pub(crate) struct Bare {
    /// Bytes of the body.
    #[arg(long, default_value_t = 100)]
    body: usize,
    /// Send as many headers as a secret is told with: their making and writing is hyper's too.
    #[arg(long)]
    headed: bool,
    /// Listen on this Unix socket too.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// The database whose table of secrets a path names a row of, instead of a body.
    #[arg(long)]
    select: Option<String>,
}

/// Where an answer comes from.
#[derive(Clone)]
enum Source {
    Kept(Bytes),
    Headed(Bytes),
    Sqlite(Arc<str>),
    Postgres(Arc<Clients>),
}

/// As many connections as the product's pool has, in turn: each takes many queries at once.
struct Clients {
    all: Vec<select::Client>,
    next: AtomicUsize,
}

impl Bare {
    /// Says on standard output where.
    pub(crate) fn run(self) {
        // The one that started this process may have been killed.
        std::thread::spawn(|| {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            std::process::exit(0);
        });
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(self.serve());
    }

    async fn serve(self) {
        let source = match &self.select {
            None if self.headed => Source::Headed(Bytes::from(vec![b'x'; self.body])),
            None => Source::Kept(Bytes::from(vec![b'x'; self.body])),
            Some(url) => match url.strip_prefix("sqlite:") {
                Some(file) => Source::Sqlite(file.into()),
                None => {
                    let mut all = Vec::new();
                    for _ in 0..10 {
                        all.push(select::Client::connect(url).await);
                    }
                    Source::Postgres(Arc::new(Clients { all, next: AtomicUsize::new(0) }))
                }
            },
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        if let Some(socket) = &self.socket {
            let (listener, source) = (UnixListener::bind(socket).unwrap(), source.clone());
            tokio::spawn(async move {
                loop {
                    let Ok((stream, _)) = listener.accept().await else { continue };
                    tokio::spawn(source.clone().answer(stream));
                }
            });
        }
        println!("http://{}", listener.local_addr().unwrap());
        std::io::stdout().flush().unwrap();
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let _ = stream.set_nodelay(true);
            tokio::spawn(source.clone().answer(stream));
        }
    }
}

fn headed(body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, "application/json"),
        (header::CACHE_CONTROL, "no-store"),
        (header::ETAG, "\"0123456789abcdef0123456789abcdef\""),
        (header::AGE, "12"),
        (header::HeaderName::from_static("cache-status"), "memory; hit; ttl=288"),
    ] {
        headers.insert(name, header::HeaderValue::from_static(value));
    }
    response
}

impl Source {
    /// Answers what comes on a connection.
    async fn answer(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        match self {
            // Nothing but hyper: not even a future that could wait.
            Self::Kept(body) => {
                let answer = service_fn(|_: Request<Incoming>| {
                    std::future::ready(Ok::<_, Infallible>(Response::new(Full::new(body.clone()))))
                });
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
            }
            Self::Headed(body) => {
                let answer =
                    service_fn(|_: Request<Incoming>| std::future::ready(Ok::<_, Infallible>(headed(body.clone()))));
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
            }
            source => {
                let answer = service_fn(|request: Request<Incoming>| {
                    let source = source.clone();
                    async move {
                        let id = request.uri().path().trim_start_matches('/');
                        Ok::<_, Infallible>(Response::new(Full::new(source.select(id).await)))
                    }
                });
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
            }
        }
    }

    async fn select(&self, id: &str) -> Bytes {
        thread_local! {
            static ROWS: RefCell<Option<select::Rows>> = const { RefCell::new(None) };
        }
        let text = match self {
            Self::Kept(body) | Self::Headed(body) => return body.clone(),
            // On the thread that serves, without a hop: no way of asking SQLite is quicker.
            Self::Sqlite(file) => {
                ROWS.with_borrow_mut(|rows| rows.get_or_insert_with(|| select::Rows::open(file)).one(id))
            }
            Self::Postgres(clients) => {
                let next = clients.next.fetch_add(1, Ordering::Relaxed) % clients.all.len();
                clients.all[next].one(id).await
            }
        };
        Bytes::from(text)
    }
}
