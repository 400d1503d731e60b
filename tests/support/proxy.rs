//! A proxy that makes tunnels (CONNECT), as companies have one between their machines and the world.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, copy_bidirectional},
    net::{TcpListener, TcpStream},
};

/// How a proxy treats those who come.
#[derive(Debug, Clone)]
pub(crate) enum Manner {
    /// It makes a tunnel for anybody.
    Open,
    /// It makes one for those who bring this header, `Basic ...`.
    Asks(String),
    /// It answers with this status line.
    Refuses(&'static str),
    /// It closes the connection without an answer.
    Closes,
    /// It says nothing.
    Hangs,
}

/// A proxy on loopback.
pub(crate) struct Proxy {
    port: u16,
    manner: Arc<Mutex<Manner>>,
    tunnels: Arc<AtomicUsize>,
}

impl Proxy {
    pub(crate) async fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let proxy = Self { port, manner: Arc::new(Mutex::new(manner)), tunnels: Arc::default() };
        let (manner, tunnels) = (Arc::clone(&proxy.manner), Arc::clone(&proxy.tunnels));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let manner = manner.lock().unwrap().clone();
                tokio::spawn(meet(client, manner, Arc::clone(&tunnels)));
            }
        });
        proxy
    }

    /// Its address without user and password.
    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn turns(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }

    /// The number of tunnels that it has made.
    pub(crate) fn tunnels(&self) -> usize {
        self.tunnels.load(Ordering::Relaxed)
    }
}

async fn meet(client: TcpStream, manner: Manner, tunnels: Arc<AtomicUsize>) -> Option<()> {
    let mut client = BufReader::new(client);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        client.read_line(&mut line).await.ok().filter(|length| *length > 0)?;
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let to = lines.first()?.strip_prefix("CONNECT ")?.strip_suffix(" HTTP/1.1")?;
    let brought = lines.iter().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("proxy-authorization").then_some(value)
    });
    let refusal = match &manner {
        Manner::Open => None,
        Manner::Asks(header) if brought == Some(header) => None,
        Manner::Asks(_) => Some("407 Proxy Authentication Required"),
        Manner::Refuses(status) => Some(*status),
        Manner::Closes => return None,
        Manner::Hangs => std::future::pending().await,
    };
    if let Some(status) = refusal {
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
        client.write_all(answer.as_bytes()).await.ok()?;
        return None;
    }
    let mut there = TcpStream::connect(to).await.ok()?;
    tunnels.fetch_add(1, Ordering::Relaxed);
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.ok()?;
    copy_bidirectional(&mut client, &mut there).await.ok()?;
    Some(())
}
