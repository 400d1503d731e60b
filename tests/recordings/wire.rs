//! HTTP as plain bytes: what is sent is exactly what was recorded, percent signs included.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::within::within;

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The body. Half a surrogate pair, which Rust's strings cannot hold, becomes `<U+D800>`.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body.replace("\\ud800", "<U+D800>")).unwrap_or(Value::Null)
    }
}

/// One request on its own connection; `None` if the connection ends before the whole answer came.
pub(crate) async fn send(
    address: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: Option<&str>,
) -> Option<Answer> {
    let mut request = format!("{method} {target} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
    for (name, value) in headers {
        request += &format!("{name}: {value}\r\n");
    }
    if let Some(body) = body {
        request += &format!("content-length: {}\r\n", body.len());
    }
    request += "\r\n";
    request += body.unwrap_or_default();

    let mut connection = TcpStream::connect(address).await.ok()?;
    connection.write_all(request.as_bytes()).await.ok()?;
    let mut read = Vec::new();
    within("the stand-in answers, or closes", connection.read_to_end(&mut read)).await.ok()?;
    let read = String::from_utf8(read).expect("an answer in UTF-8");
    let (head, body) = read.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let answer = Answer { status, headers, body: body.to_owned() };
    let promised = answer.header("content-length").and_then(|length| length.parse::<usize>().ok()).unwrap_or(0);
    let bodiless = method == "HEAD" || matches!(status, 204 | 304);
    (bodiless || answer.body.len() == promised).then_some(answer)
}
