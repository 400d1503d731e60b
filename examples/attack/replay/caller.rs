//! A good caller: one request after the other over a connection that it keeps, each timed.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::stage::{HANGS, Stage};

const READ: &str = "/v1/tenants/good/secrets/K";
const WRITTEN: &str = "/v1/tenants/good/secrets/W";

/// How long it waits between two requests.
const BETWEEN_READS: Duration = Duration::from_millis(2);
const BETWEEN_WRITES: Duration = Duration::from_millis(25);

pub(crate) struct Caller {
    address: String,
    headers: String,
    stream: Option<BufReader<TcpStream>>,
}

impl Caller {
    pub(crate) fn new(address: &str, token: &str) -> Self {
        let headers = format!("Host: {address}\r\nAuthorization: Bearer {token}\r\n");
        Self { address: address.to_owned(), headers, stream: None }
    }

    /// The answer's length, or why there is none that is good.
    pub(crate) fn get(&mut self, path: &str) -> Result<usize, String> {
        let request = format!("GET {path} HTTP/1.1\r\n{}\r\n", self.headers);
        self.ask(&request)
    }

    pub(crate) fn put(&mut self, path: &str, value: &str) -> Result<usize, String> {
        let body = serde_json::json!({ "value": value }).to_string();
        let length = body.len();
        let headers = format!("{}Content-Type: application/json\r\nContent-Length: {length}\r\n", self.headers);
        self.ask(&format!("PUT {path} HTTP/1.1\r\n{headers}\r\n{body}"))
    }

    fn ask(&mut self, request: &str) -> Result<usize, String> {
        // One that was kept may have been closed meanwhile, which is no fault of either side.
        let was_kept = self.stream.is_some();
        match self.try_ask(request) {
            Err(_) if was_kept => self.try_ask(request),
            asked => asked,
        }
        .map_err(|error| error.to_string())
        .and_then(|(status, length)| if status < 300 { Ok(length) } else { Err(format!("status {status}")) })
    }

    fn try_ask(&mut self, request: &str) -> io::Result<(u16, usize)> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(&self.address)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(HANGS))?;
                BufReader::new(stream)
            }
        };
        stream.get_mut().write_all(request.as_bytes())?;
        let (status, length, is_last) = read_answer(&mut stream)?;
        if !is_last {
            self.stream = Some(stream);
        }
        Ok((status, length))
    }
}

fn read_answer(stream: &mut BufReader<TcpStream>) -> io::Result<(u16, usize, bool)> {
    let (mut head, mut length, mut is_last) = (String::new(), 0, false);
    loop {
        let start = head.len();
        if stream.read_line(&mut head)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = head[start..].trim_end().to_ascii_lowercase();
        match line.split_once(':') {
            _ if line.is_empty() => break,
            Some(("content-length", value)) => length = value.trim().parse().map_err(io::Error::other)?,
            Some(("connection", value)) => is_last = value.trim() == "close",
            _ => {}
        }
    }
    io::copy(&mut stream.take(length), &mut io::sink())?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let length = usize::try_from(length).map_err(io::Error::other)?;
    Ok((status.ok_or(io::ErrorKind::InvalidData)?, length, is_last))
}

/// What became of the requests of one good caller.
#[derive(Default)]
pub(crate) struct Calls {
    took: Vec<Duration>,
    pub(crate) failed: Vec<String>,
}

impl Calls {
    /// How long the fastest `share` of them took at most.
    pub(crate) fn at(&self, share: f64) -> Duration {
        let last = self.took.len().saturating_sub(1);
        self.took.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
    }

    pub(crate) fn longest(&self) -> Duration {
        self.at(1.0)
    }

    pub(crate) fn count(&self) -> usize {
        self.took.len()
    }
}

/// One that reads and one that writes, until they are told to end.
pub(crate) struct GoodCallers {
    is_over: Arc<AtomicBool>,
    threads: [JoinHandle<Calls>; 2],
}

impl GoodCallers {
    pub(crate) fn start(stage: &Stage) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let start = |between: Duration, ask: fn(&mut Caller) -> Result<usize, String>| {
            let (mut caller, is_over) = (Caller::new(&stage.address, &stage.good), Arc::clone(&is_over));
            thread::spawn(move || {
                let mut calls = Calls::default();
                while !is_over.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let asked = ask(&mut caller);
                    calls.took.push(began.elapsed());
                    calls.failed.extend(asked.err());
                    thread::sleep(between);
                }
                calls.took.sort_unstable();
                calls
            })
        };
        let reads = start(BETWEEN_READS, |caller| caller.get(READ));
        let writes = start(BETWEEN_WRITES, |caller| caller.put(WRITTEN, "of the good caller"));
        Self { is_over, threads: [reads, writes] }
    }

    /// What became of the reads, and of the writes.
    pub(crate) fn end(self) -> [Calls; 2] {
        self.is_over.store(true, Ordering::Relaxed);
        self.threads.map(|thread| thread.join().unwrap())
    }
}
