//! One request as the routes see it, and one reply as it is sent: bodies parsed as Fastify parses
//! them, entity tags and errors in the recorded form.

use std::{convert::Infallible, io, net::IpAddr, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::surrogates;

pub(super) type WireBody = UnsyncBoxBody<Bytes, io::Error>;

/// The largest body that is accepted, as on the recorded server.
const LARGEST_BODY: usize = 1024 * 1024;

/// How much of a body that is too large is read before it is refused, so that its sender can read
/// the refusal.
const LARGEST_DISCARD: usize = 16 * LARGEST_BODY;

/// A request that was read to its end.
pub(super) struct Call {
    pub(super) method: Method,
    /// As it was sent, query included.
    pub(super) target: String,
    pub(super) headers: HeaderMap,
    pub(super) peer: IpAddr,
    /// `None` if it was larger than the limit.
    body: Option<Bytes>,
}

impl Call {
    pub(super) async fn read(request: http::Request<Incoming>, peer: IpAddr) -> Result<Self, hyper::Error> {
        let (head, body) = request.into_parts();
        let target = head.uri.path_and_query().map_or_else(|| head.uri.path(), |target| target.as_str()).to_owned();
        let body = read_bounded(body).await?;
        Ok(Self { method: head.method, target, headers: head.headers, peer, body })
    }

    pub(super) fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    pub(super) fn header(&self, name: HeaderName) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The query; a name that occurs twice has an array.
    pub(super) fn query(&self) -> Map<String, Value> {
        fields_of_form(self.target.split_once('?').map_or("", |(_, query)| query))
    }

    /// The body, parsed by its content type; JSON `null` where none was sent.
    pub(super) fn body(&self) -> Result<Value, Reply> {
        let Some(body) = &self.body else {
            return Err(Reply::framework(413, "FST_ERR_CTP_BODY_TOO_LARGE", "Payload Too Large", BODY_TOO_LARGE));
        };
        let Some(content_type) = self.header(header::CONTENT_TYPE) else {
            if body.is_empty() {
                return Ok(Value::Null);
            }
            return Err(unsupported_media_type("undefined"));
        };
        let text = String::from_utf8_lossy(body);
        match content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
            "application/json" if text.is_empty() => {
                Err(Reply::framework(400, "FST_ERR_CTP_EMPTY_JSON_BODY", "Bad Request", EMPTY_JSON_BODY))
            }
            "application/json" => serde_json::from_str(&surrogates::hide(&text)).map_err(|error| {
                let message = if error.is_eof() {
                    "Unexpected end of JSON input".to_owned()
                } else {
                    format!("Unexpected token in JSON at position {}", error.column().saturating_sub(1))
                };
                Reply::new(400, json!({"statusCode": 400, "error": "Bad Request", "message": message}))
            }),
            "application/x-www-form-urlencoded" => Ok(Value::Object(fields_of_form(&text))),
            "text/plain" => Ok(Value::String(text.into_owned())),
            other => Err(unsupported_media_type(other)),
        }
    }
}

/// An answer before it is sent.
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) body: Value,
    pub(super) allowance: Option<Allowance>,
    pub(super) retry_after: Option<Duration>,
}

/// The values of the rate limit's headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Allowance {
    pub(super) limit: u32,
    pub(super) remaining: u32,
    /// Seconds until the window ends.
    pub(super) reset: u64,
}

impl Reply {
    pub(super) fn new(status: u16, body: Value) -> Self {
        Self { status, body, allowance: None, retry_after: None }
    }

    pub(super) fn ok(body: Value) -> Self {
        Self::new(200, body)
    }

    pub(super) fn error(status: u16, error: &str, message: &str) -> Self {
        Self::new(status, json!({"statusCode": status, "error": error, "message": message}))
    }

    fn framework(status: u16, code: &str, error: &str, message: &str) -> Self {
        Self::new(status, json!({"statusCode": status, "code": code, "error": error, "message": message}))
    }

    pub(super) fn too_many_requests(allowance: Allowance) -> Self {
        let mut reply = Self::error(429, "Too Many Requests", "Rate limit exceeded, retry in 1 minute");
        reply.retry_after = Some(Duration::from_secs(allowance.reset));
        reply.allowance = Some(allowance);
        reply
    }

    /// The form of the same answer from a server of October 2024.
    pub(super) fn in_octobers_form(mut self) -> Self {
        let text = |key: &str| self.body.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (status, error, message) = match (self.status, text("error").as_str(), text("message").as_str()) {
            (401, "PermissionDenied", _) => (403, None, None),
            (403, "ValidationFailure", _) => (401, None, None),
            // Nothing above its body parser catches it.
            (413, ..) => (500, Some("InternalServerError"), Some("Something went wrong")),
            (400, _, said) if is_missing(said) => (404, Some("NotFound"), None),
            _ => return self,
        };
        self.status = status;
        if let Some(fields) = self.body.as_object_mut() {
            fields.insert("statusCode".to_owned(), json!(status));
            for (name, told) in [("error", error), ("message", message)] {
                if let Some(told) = told {
                    fields.insert(name.to_owned(), json!(told));
                }
            }
            fields.remove("code");
        }
        self
    }

    /// The form of the same answer from newer servers.
    pub(super) fn in_newer_form(mut self) -> Self {
        if self.status < 400 {
            return self;
        }
        let text = |key: &str| self.body.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (error, message) = (text("error"), text("message"));
        let (status, error, message) = match (self.status, error.as_str(), message.as_str()) {
            (401, "PermissionDenied", _) => (403, "PermissionDenied", message),
            (403, "ValidationFailure", _) => (422, "ValidationFailure", message),
            (403, "UnauthorizedError" | "Unauthorized access", _) => (401, "UnauthorizedError", message),
            (500, _, "jwt expired") => {
                (403, "TokenError", "Your token has expired. Please re-authenticate.".to_owned())
            }
            (500, _, said) if said.starts_with("jwt ") || said.starts_with("invalid ") => {
                (403, "TokenError", TOKEN_MALFORMED.to_owned())
            }
            (400, _, said) if is_missing(said) => (404, "NotFound", message),
            (429, ..) => {
                let seconds = self.retry_after.unwrap_or_default().as_secs();
                let message = format!("Rate limit exceeded. Please try again in {seconds} seconds");
                (429, "RateLimitExceeded", message)
            }
            (status, ..) => (status, error.as_str(), message),
        };
        let error = error.to_owned();
        self.status = status;
        if let Some(fields) = self.body.as_object_mut() {
            fields.insert("reqId".to_owned(), json!(format!("req-{:016x}", rand::random::<u64>())));
            fields.insert("statusCode".to_owned(), json!(status));
            fields.insert("error".to_owned(), json!(error));
            if fields.get("message").is_some_and(Value::is_string) {
                fields.insert("message".to_owned(), json!(message));
            }
        }
        self
    }

    /// The whole response; 304 where the caller's tag is the tag of exactly this body.
    pub(super) fn into_response(self, if_none_match: Option<&HeaderValue>) -> Response<WireBody> {
        let body = surrogates::reveal(self.body.to_string());
        let tag = entity_tag(body.as_bytes());
        let unchanged = if_none_match.is_some_and(|known| known.as_bytes() == tag.as_bytes());
        let (status, body) = if unchanged { (304, String::new()) } else { (self.status, body) };

        let mut response = Response::new(whole(body));
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json; charset=utf-8"));
        if let Ok(tag) = HeaderValue::try_from(tag) {
            headers.insert(header::ETAG, tag);
        }
        if let Some(Allowance { limit, remaining, reset }) = self.allowance {
            headers.insert("x-ratelimit-limit", HeaderValue::from(limit));
            headers.insert("x-ratelimit-remaining", HeaderValue::from(remaining));
            headers.insert("x-ratelimit-reset", HeaderValue::from(reset));
        }
        if let Some(wait) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs()));
        }
        response
    }
}

/// Whether a message says that something does not exist.
fn is_missing(message: &str) -> bool {
    message.contains("not found") || message.contains("not exist")
}

/// The answer to every `OPTIONS`.
pub(super) fn no_content() -> Response<WireBody> {
    let mut response = Response::new(whole(String::new()));
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

/// The typical page of a proxy in front of a broken server.
pub(super) fn garbage() -> Response<WireBody> {
    let mut response = Response::new(whole("<!doctype html><title>Welcome</title><p>It works!".to_owned()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html"));
    response
}

/// The same answer, of which only half arrives; nothing arrives where the head would be all of it.
pub(super) async fn cut_off(whole: Response<WireBody>) -> io::Result<Response<WireBody>> {
    let cut = || io::Error::other("cut off on purpose");
    let (mut head, body) = whole.into_parts();
    if head.status == StatusCode::NOT_MODIFIED {
        return Err(cut());
    }
    let bytes = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len().max(2)));
    let half = bytes.slice(..bytes.len() / 2);
    let frames = stream::unfold(Some(half), move |half| async move {
        match half {
            Some(half) => Some((Ok(Frame::data(half)), None)),
            None => {
                // The half that was sent must have left before the connection is closed.
                tokio::time::sleep(Duration::from_millis(10)).await;
                Some((Err(cut()), None))
            }
        }
    });
    Ok(Response::from_parts(head, StreamBody::new(frames).boxed_unsync()))
}

/// Decodes `%41` and, in a query, `+`.
pub(super) fn decode(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(std::borrow::Cow::into_owned)
}

fn fields_of_form(form: &str) -> Map<String, Value> {
    let mut fields = Map::new();
    for pair in form.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let plain = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
        let value = Value::String(plain(value));
        match fields.get_mut(&plain(name)) {
            None => {
                fields.insert(plain(name), value);
            }
            Some(Value::Array(values)) => values.push(value),
            Some(first) => *first = Value::Array(vec![first.take(), value]),
        }
    }
    fields
}

async fn read_bounded(mut body: Incoming) -> Result<Option<Bytes>, hyper::Error> {
    let mut read = BytesMut::new();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        length += data.len();
        if length <= LARGEST_BODY {
            read.extend_from_slice(&data);
        } else if length > LARGEST_DISCARD {
            break;
        }
    }
    Ok((length <= LARGEST_BODY).then(|| read.freeze()))
}

fn whole(body: String) -> WireBody {
    Full::new(Bytes::from(body)).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// In the recorded form: 160 bits in base64. The real server uses a SHA-1 of the same bytes, but
/// the hash cannot be recognised from outside.
fn entity_tag(body: &[u8]) -> String {
    let digest = Sha256::digest(body);
    format!("\"{}\"", STANDARD.encode(&digest[..20]))
}

fn unsupported_media_type(content_type: &str) -> Reply {
    let message = format!("Unsupported Media Type: {content_type}");
    Reply::framework(415, "FST_ERR_CTP_INVALID_MEDIA_TYPE", "Unsupported Media Type", &message)
}

const BODY_TOO_LARGE: &str = "Request body is too large";
const EMPTY_JSON_BODY: &str = "Body cannot be empty when content-type is set to 'application/json'";
const TOKEN_MALFORMED: &str =
    "The provided access token is malformed. Please use a valid token or generate a new one and try again.";
