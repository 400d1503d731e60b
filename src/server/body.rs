//! Reading a request's body: bounded in size and time, wiped afterwards.

use std::time::Duration;

use bytes::Buf as _;
use http::{HeaderMap, header};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

use super::{budgets::Room, respond::Problem};
use crate::{
    long_work::{LongWork, SHORT},
    object::Object,
};

/// Refuses a body that is encoded: what it is bounded by is the length that it was sent in, and the bytes of a secret
/// that a decoder keeps would not be wiped.
pub(super) fn check_encoding(headers: &HeaderMap) -> Result<(), Problem> {
    let encodings =
        headers.get_all(header::CONTENT_ENCODING).iter().flat_map(|line| line.as_bytes().split(|&b| b == b','));
    let is_plain = |encoding: &[u8]| encoding.is_empty() || encoding.eq_ignore_ascii_case(b"identity");
    match encodings.map(<[u8]>::trim_ascii).all(is_plain) {
        true => Ok(()),
        false => Err(Problem::unsupported_encoding()),
    }
}

/// Refuses a body that says it is something other than JSON. One that does not say what it is, is taken for JSON.
pub(super) fn check_type(headers: &HeaderMap) -> Result<(), Problem> {
    let is_json = |line: &[u8]| {
        let name = line.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii();
        name.is_empty() || name.eq_ignore_ascii_case(b"application/json")
    };
    match headers.get_all(header::CONTENT_TYPE).iter().all(|line| is_json(line.as_bytes())) {
        true => Ok(()),
        false => Err(Problem::unsupported_media_type()),
    }
}

/// Reads a body of at most `limit` bytes within `timeout`, and parses it as a JSON object.
pub(super) async fn read_json<T: DeserializeOwned + Send + 'static>(
    body: Incoming,
    limit: u64,
    timeout: Duration,
    room: &mut Room<'_>,
    work: &LongWork,
) -> Result<T, Problem> {
    parse_anywhere(read_bytes(body, limit, timeout, room).await?, work).await
}

/// Parses a body, a long one on a thread that serves no requests.
pub(super) async fn parse_anywhere<T: DeserializeOwned + Send + 'static>(
    bytes: Zeroizing<Vec<u8>>,
    work: &LongWork,
) -> Result<T, Problem> {
    if bytes.len() > SHORT { work.run(move || parse(&bytes)).await } else { parse(&bytes) }
}

pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    // serde_json's messages can quote the body; a reader gets the position instead.
    serde_json::from_slice(bytes).map(|Object(body)| body).map_err(|error| {
        let place = format!("line {}, column {}", error.line(), error.column());
        Problem::invalid_body(match error.classify() {
            serde_json::error::Category::Eof => format!("the body ends too early, at {place}"),
            serde_json::error::Category::Data => format!("the body is not of the documented form, at {place}"),
            _ => format!("the body is no JSON, at {place}"),
        })
    })
}

/// Reads a body of at most `limit` bytes within `timeout`.
pub(super) async fn read_bytes(
    body: Incoming,
    limit: u64,
    timeout: Duration,
    room: &mut Room<'_>,
) -> Result<Zeroizing<Vec<u8>>, Problem> {
    tokio::time::timeout(timeout, read(body, limit, room))
        .await
        .map_err(|_| Problem::invalid_body("the request's body did not arrive in time"))?
}

async fn read(mut body: Incoming, limit: u64, room: &mut Room<'_>) -> Result<Zeroizing<Vec<u8>>, Problem> {
    let announced = body.size_hint().lower();
    if announced > limit {
        return Err(Problem::too_large());
    }
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let announced = usize::try_from(announced).unwrap_or(usize::MAX);
    // The announced length need not arrive: a client that sends little takes little memory.
    let mut bytes = Zeroizing::new(Vec::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Problem::invalid_body("the connection broke within the request's body"))?;
        let Ok(data) = frame.into_data() else { continue };
        let needed = bytes.len() + data.remaining();
        if needed > limit {
            return Err(Problem::too_large());
        }
        if needed > bytes.capacity() {
            let capacity = if announced <= FIRST { announced } else { (needed * 2).max(FIRST).min(limit) };
            let capacity = capacity.max(needed);
            room.grow(capacity - bytes.capacity())?;
            // Grown by hand: a vector that grows by itself leaves its old buffer behind, unwiped.
            let mut larger = Zeroizing::new(Vec::with_capacity(capacity));
            larger.extend_from_slice(&bytes);
            bytes = larger;
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

/// Bytes of a body that are allocated at its first byte.
const FIRST: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(name: &header::HeaderName, lines: &[&'static str]) -> Result<(), &'static str> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(name, http::HeaderValue::from_static(line));
        }
        check_encoding(&headers).and_then(|()| check_type(&headers)).map_err(|problem| problem.code)
    }

    #[test]
    fn a_body_comes_as_it_is() {
        for plain in [&[][..], &["identity"], &["Identity, identity"], &[""], &["identity", " identity "]] {
            assert_eq!(checked(&header::CONTENT_ENCODING, plain), Ok(()), "{plain:?}");
        }
        for encoded in [&["gzip"][..], &["GZIP"], &["identity, br"], &["identity", "zstd"], &["x"], &["identity;q=1"]] {
            assert_eq!(checked(&header::CONTENT_ENCODING, encoded), Err("unsupported_encoding"), "{encoded:?}");
        }
    }

    #[test]
    fn a_body_is_json_unless_it_says_otherwise() {
        for json in [&[][..], &["application/json"], &["Application/JSON ; charset=utf-8"], &[""]] {
            assert_eq!(checked(&header::CONTENT_TYPE, json), Ok(()), "{json:?}");
        }
        for other in [
            &["text/plain"][..],
            &["application/x-www-form-urlencoded"],
            &["application/json-patch+json"],
            &["application/problem+json"],
            &["application/json, text/plain"],
            &["application/json", "text/plain"],
            &["json"],
        ] {
            assert_eq!(checked(&header::CONTENT_TYPE, other), Err("unsupported_media_type"), "{other:?}");
        }
    }
}
