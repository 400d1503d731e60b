//! A client that does nothing but wait for its answer: one connection, one request at a time.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

/// What runs into it hangs.
const HANGS: Duration = Duration::from_secs(120);

pub(crate) struct Client {
    stream: BufReader<TcpStream>,
    headers: String,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// The body, of an answer that is good.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        let body = String::from_utf8_lossy(&self.body).into_owned();
        assert_eq!(self.status, 200, "{}{body}", self.head);
        body
    }
}

impl Client {
    /// Connects to `http://address`; requests bring this token, where there is one.
    pub(crate) fn connect(url: &str, token: &str) -> Self {
        Self::try_connect(url, token).unwrap()
    }

    pub(crate) fn try_connect(url: &str, token: &str) -> std::io::Result<Self> {
        let address = url.trim_start_matches("http://");
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(HANGS))?;
        let mut headers = format!("Host: {address}\r\n");
        if !token.is_empty() {
            headers.push_str(&format!("Authorization: Bearer {token}\r\n"));
        }
        Ok(Self { stream: BufReader::new(stream), headers })
    }

    pub(crate) fn get(&mut self, path: &str) -> Answer {
        self.try_get(path).unwrap()
    }

    pub(crate) fn try_get(&mut self, path: &str) -> std::io::Result<Answer> {
        let request = format!("GET {path} HTTP/1.1\r\n{}\r\n", self.headers);
        self.ask(&request)
    }

    /// How long the answer took, which must be good, in microseconds.
    pub(crate) fn time(&mut self, path: &str) -> f64 {
        let began = Instant::now();
        let answer = self.get(path);
        let took = began.elapsed();
        assert_eq!(answer.status, 200, "{path}: {}", answer.head);
        took.as_secs_f64() * 1e6
    }

    fn ask(&mut self, request: &str) -> std::io::Result<Answer> {
        self.stream.get_mut().write_all(request.as_bytes())?;
        let (mut head, mut length) = (String::new(), 0);
        loop {
            let start = head.len();
            if self.stream.read_line(&mut head)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let line = head[start..].trim_end();
            if line.is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap();
        Ok(Answer { status, head, body })
    }
}

/// Asks for all of these, so many at a time, and waits for the answers, good or not.
pub(crate) fn ask_all(url: &str, token: &str, paths: &[String], at_once: usize) {
    let part = paths.len().div_ceil(at_once).max(1);
    std::thread::scope(|scope| {
        for paths in paths.chunks(part) {
            scope.spawn(move || {
                let mut client = Client::connect(url, token);
                for path in paths {
                    client.get(path);
                }
            });
        }
    });
}
