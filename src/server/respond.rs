//! Turns outcomes into responses. This file alone picks status codes.

use std::{borrow::Cow, sync::OnceLock, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use serde::Serialize;
use utoipa::ToSchema;

use super::outgoing::Body;
use crate::{
    access::{
        Refused,
        audit::{InvalidField, Outcome, Unrecorded},
    },
    answer,
    budget::Held,
    clock::Moment,
    legible,
    resolver::{
        CacheStatus, Cause, Entry, ResolveError, Resolved, StoreError, Unstorable, Unverified, UpstreamError,
        WriteError,
    },
    secret::{InvalidKey, InvalidName},
    tenant::InvalidTenant,
};

pub(super) type Answer = Response<Body>;

/// An error as callers see it (RFC 9457).
#[derive(Debug)]
pub(super) struct Problem {
    status: StatusCode,
    pub(super) code: &'static str,
    title: &'static str,
    detail: Cow<'static, str>,
    cause: Option<&'static str>,
    retry_after: Option<Duration>,
    allow: Option<Box<str>>,
    takes: Option<Taken>,
    closes: bool,
    is_recorded: bool,
    is_guards: bool,
    /// The tenant and the key that the request was about, where its path does not name them.
    about: Option<Box<(String, String)>>,
}

/// The form of a body that is taken, where it came in another.
#[derive(Debug, Clone, Copy)]
enum Taken {
    Unencoded,
    Json,
}

impl Taken {
    /// As a header says it.
    fn header(self) -> (HeaderName, &'static str) {
        match self {
            Self::Unencoded => (header::ACCEPT_ENCODING, "identity"),
            Self::Json => (header::ACCEPT, "application/json"),
        }
    }
}

/// The body of an error: `application/problem+json` (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProblemBody<'a> {
    /// What kind of error this is, for people.
    title: &'a str,
    /// The HTTP status.
    #[schema(example = 404)]
    status: u16,
    /// What kind of error this is, for programs; stable.
    #[schema(example = "secret_not_found")]
    code: &'a str,
    /// The remedy.
    detail: &'a str,
    /// What is wrong with upstream, where that is why, for programs; stable.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "tls_certificate_unknown")]
    cause: Option<&'static str>,
}

/// A tier that failed without saying for how long would hardly have recovered before
/// this.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// An operator has to correct a secret that cannot be used.
const RETRY_UNUSABLE: Duration = Duration::from_secs(30);

/// An operator has to change what the identity may do.
const RETRY_DENIED_WRITE: Duration = Duration::from_secs(30);

/// The database is needed to tell whether an access token is good.
const UNCONFIRMED: &str = "it cannot be told just now whether this access token is good: the database, or the master key that its signing key is sealed with, does not answer; try again";

/// After that many webhooks in so short a time, it takes a while until they are forgotten.
const RETRY_NOTICES: Duration = Duration::from_secs(60);

impl Problem {
    fn new(status: StatusCode, code: &'static str, title: &'static str, detail: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            code,
            title,
            detail: detail.into(),
            cause: None,
            retry_after: None,
            allow: None,
            takes: None,
            closes: false,
            is_recorded: false,
            is_guards: false,
            about: None,
        }
    }

    /// A malformed or ambiguous request (request smuggling). The bytes that follow on the
    /// connection are not read: they may be a part of it.
    pub(super) fn invalid_request(detail: &'static str) -> Self {
        let problem = Self::new(StatusCode::BAD_REQUEST, "invalid_request", "Invalid request", detail);
        Self { closes: true, ..problem }
    }

    pub(super) fn bad_host() -> Self {
        let problem = Self::new(
            StatusCode::FORBIDDEN,
            "bad_host",
            "Bad host",
            "this server is not called so; ask it by a name that access.hosts lists",
        );
        Self { is_guards: true, ..problem }
    }

    pub(super) fn forwarded() -> Self {
        let problem = Self::new(
            StatusCode::FORBIDDEN,
            "forwarded_request",
            "Forwarded request",
            "the headers Forwarded, X-Forwarded-* and Via are taken only from an address that access.trusted_proxies lists",
        );
        Self { is_guards: true, ..problem }
    }

    /// There is no room for more, for any caller.
    pub(super) fn busy(detail: &'static str) -> Self {
        Self::unavailable(detail, None)
    }

    /// There is no room for more of this caller.
    pub(super) fn holds_too_much(detail: &'static str) -> Self {
        let problem = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", "Rate limited", detail);
        Self { retry_after: Some(RETRY_AFTER), ..problem }
    }

    pub(super) fn invalid_body(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_body", "Invalid body", detail)
    }

    pub(super) fn invalid_query(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_query", "Invalid query", detail)
    }

    /// A webhook that was taken before, here or by another instance.
    pub(super) fn replayed() -> Self {
        Self::new(
            StatusCode::CONFLICT,
            "webhook_replayed",
            "Webhook replayed",
            "this notice was taken before; nothing follows from it a second time",
        )
    }

    /// The same, in words about a webhook.
    pub(super) fn of_notice(self) -> Self {
        match self.code {
            "value_too_large" => Self { detail: "a notice is at most 64 KiB long".into(), ..self },
            _ => self,
        }
    }

    pub(super) fn too_many_webhooks() -> Self {
        Self::unavailable(
            "more notices come than are taken; changes are found all the same, if later",
            Some(RETRY_NOTICES),
        )
    }

    pub(super) fn invalid_key() -> Self {
        InvalidName::Key(InvalidKey).into()
    }

    /// One of our own master keys, which no token reaches.
    pub(super) fn withheld() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "secret_withheld",
            "Secret withheld",
            "keys.sources names this secret: it is a master key of secretier itself, and is neither served nor written",
        )
    }

    pub(super) fn invalid_tenant() -> Self {
        InvalidName::Tenant(InvalidTenant).into()
    }

    pub(super) fn too_large() -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "value_too_large",
            "Value too large",
            "the value is larger than server.max_value allows",
        )
    }

    /// The body of a request came encoded.
    pub(super) fn unsupported_encoding() -> Self {
        let problem = Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_encoding",
            "Unsupported encoding",
            "the header Content-Encoding says that the body is encoded; send it as it is, without that header",
        );
        Self { takes: Some(Taken::Unencoded), ..problem }
    }

    /// The body of a request is something other than JSON.
    pub(super) fn unsupported_media_type() -> Self {
        let problem = Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "Unsupported media type",
            "the body is to be JSON; send it with the header 'Content-Type: application/json', or without that header",
        );
        Self { takes: Some(Taken::Json), ..problem }
    }

    pub(super) fn batch_too_large() -> Self {
        let problem = Self::too_large();
        Self { detail: "these secrets are larger than one batch may be (64 MiB); ask for fewer keys".into(), ..problem }
    }

    /// The secrets of many tenants are more than one answer may be.
    pub(super) fn list_too_large() -> Self {
        let detail = "these secrets are more than one answer may be (server.max_answers_per_token); list one tenant after the other";
        Self { detail: detail.into(), ..Self::too_large() }
    }

    /// A list with values would lack some that exist.
    pub(super) fn some_unavailable(key: &str, reason: &str) -> Self {
        let detail = format!(
            "{key:?} is there and cannot be used ({reason}), so a list with every value would lack it; ask without \
             values=true, which names all such secrets, and for the others one by one"
        );
        let problem = Self::new(StatusCode::SERVICE_UNAVAILABLE, "secret_unavailable", "Secret unavailable", detail);
        Self { retry_after: Some(RETRY_UNUSABLE), ..problem }
    }

    /// The same for a tenant that does not exist, so that names cannot be probed.
    pub(super) fn not_found() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "secret_not_found",
            "Secret not found",
            "there is no such secret, or no such tenant; 'secretier explain TENANT KEY' tells what each tier knows",
        )
    }

    /// There is nothing to refresh, now or later.
    pub(super) fn not_owned_upstream() -> Self {
        Self::new(
            StatusCode::CONFLICT,
            "not_owned_upstream",
            "Not owned upstream",
            "the database owns this tenant's secrets, so there is nothing upstream to refresh them from",
        )
    }

    /// The same for a version that never existed, that is a deletion, or that is gone.
    pub(super) fn no_version() -> Self {
        let problem = Self::not_found();
        Self {
            detail: "no value of this version is kept; GET .../versions lists the versions that are".into(),
            ..problem
        }
    }

    /// A rotation of this secret runs, or waits for the end of the old value.
    pub(super) fn rotation_in_progress(has_promoted: bool) -> Self {
        let detail = match has_promoted {
            true => {
                "the value before is still valid after the last rotation; POST .../rotation/retire ends that, and then it can be rotated again"
            }
            false => {
                "a rotation of this secret runs; GET .../rotation tells how far it is, POST .../rotation/abort stops it"
            }
        };
        Self::new(StatusCode::CONFLICT, "rotation_in_progress", "Rotation in progress", detail)
    }

    pub(super) fn no_rotation_rule() -> Self {
        Self::new(
            StatusCode::CONFLICT,
            "rotation_rule_missing",
            "Rotation rule missing",
            "no [[rotation]] of the configuration says how to make a new value for this secret; send one: {\"value\":\"...\"}",
        )
    }

    pub(super) fn same_value() -> Self {
        let detail = "the secret has this value already, so there is nothing to rotate";
        Self::new(StatusCode::CONFLICT, "same_value", "Same value", detail)
    }

    pub(super) fn no_rotation() -> Self {
        let detail = "this secret was never rotated, or longer ago than its versions are kept; POST .../rotate begins";
        Self::new(StatusCode::NOT_FOUND, "rotation_not_found", "Rotation not found", detail)
    }

    pub(super) fn rotation_not_running() -> Self {
        let detail = "no rotation of this secret runs; GET .../rotation tells how the last one ended";
        Self::new(StatusCode::CONFLICT, "rotation_not_running", "Rotation not running", detail)
    }

    pub(super) fn rotation_not_now(why: &'static str) -> Self {
        Self::new(StatusCode::CONFLICT, "rotation_not_now", "Not at this step of the rotation", why)
    }

    pub(super) fn no_route() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "route_not_found",
            "No such route",
            "GET /openapi.json lists the requests that are answered",
        )
    }

    pub(super) fn method_not_allowed(allow: String) -> Self {
        let problem = Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            "Method not allowed",
            "the header Allow lists the methods of this resource",
        );
        Self { allow: Some(allow.into()), ..problem }
    }

    /// There is no such route below `/api`, in the words of Infisical's server.
    pub(super) fn no_infisical_route(method: &Method, path: &str) -> Self {
        const LONGEST: usize = 300;
        let path = &path[..path.floor_char_boundary(LONGEST)];
        Self { detail: format!("Route {method}:{path} not found").into(), ..Self::no_route() }
    }

    /// A project other than the one that this instance serves.
    pub(super) fn other_project() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "other_project",
            "Other project",
            "this instance serves one project, and the request names another",
        )
    }

    /// An environment other than the one that this instance serves.
    pub(super) fn other_environment() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "other_environment",
            "Other environment",
            "this instance serves one environment, and the request names another",
        )
    }

    /// A folder that this instance knows nothing of: whether there is something in it is not known.
    pub(super) fn folder_not_served() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "folder_not_served",
            "Folder not served",
            "this instance serves the folders of tenants, as in secretPath=/tenants/acme, and the shared folders of [[infisical.folders]], and not the one that is asked for",
        )
    }

    /// An id that Infisical has given a secret.
    pub(super) fn foreign_id() -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "foreign_id",
            "Foreign id",
            "this is an id of Infisical's own; secretier gives secrets other ids, which lists and single reads tell",
        )
    }

    /// A folder that is proved not to exist.
    pub(super) fn no_folder() -> Self {
        Self { detail: "there is no such folder".into(), ..Self::not_found() }
    }

    /// A secret that is to be made, and is there with another value.
    pub(super) fn already_exists() -> Self {
        Self::new(StatusCode::CONFLICT, "version_conflict", "Version conflict", "Secret already exist")
    }

    /// A folder that is to be deleted, and has something in it.
    pub(super) fn folder_not_empty(detail: &'static str) -> Self {
        Self::new(StatusCode::CONFLICT, "folder_not_empty", "Folder not empty", detail)
    }

    /// The client credentials of a login are wrong.
    pub(super) fn wrong_credentials() -> Self {
        let problem = Self::from(Refused::Invalid);
        Self {
            detail: "Invalid credentials: the client id or the client secret is wrong, or was revoked".into(),
            ..problem
        }
    }

    /// Too many logins of one token were ended.
    pub(super) fn too_many_ended() -> Self {
        Self::holds_too_much("too many logins of this token were ended; this one ends by itself")
    }

    /// There is nothing to sign access tokens with.
    pub(super) fn no_login_key() -> Self {
        Self::unavailable(
            "no access token can be signed, for no master key is known to seal the signing key with; see [keys]",
            Some(RETRY_UNUSABLE),
        )
    }

    /// It would take longer than clients wait.
    pub(super) fn took_too_long() -> Self {
        Self::unavailable("this took longer than a client waits; try again", None)
    }

    /// The same about this tenant and key, where the request's path does not name them.
    pub(super) fn about(self, tenant: &str, key: &str) -> Self {
        Self { about: Some(Box::new((tenant.to_owned(), key.to_owned()))), ..self }
    }

    /// The tenant and the key of [`Self::about`].
    pub(super) fn is_about(&self) -> Option<(&str, &str)> {
        self.about.as_deref().map(|(tenant, key)| (tenant.as_str(), key.as_str()))
    }

    fn unavailable(detail: &'static str, retry_after: Option<Duration>) -> Self {
        let problem = Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "Unavailable", detail);
        Self { retry_after: Some(retry_after.unwrap_or(RETRY_AFTER)), ..problem }
    }

    /// The database has not been heard of for longer than answers are allowed without it.
    pub(super) fn detached() -> Self {
        Self::unavailable(
            "the database has not been heard of for longer than database.max_detached, so it is not known whether tokens, \
             owners and secrets are as they were; try again",
            None,
        )
    }

    /// Only recorded actions are allowed, and none can be recorded.
    pub(super) fn unrecorded() -> Self {
        let problem = Self::unavailable(
            "the audit cannot be written, and without it nothing is changed (audit.if_unavailable); nothing has changed, try again",
            None,
        );
        Self { code: "audit_unavailable", title: "Audit unavailable", ..problem }
    }

    /// The same, already recorded in the audit as far as it is to be.
    pub(super) fn recorded(self) -> Self {
        Self { is_recorded: true, ..self }
    }

    /// Whether it is already recorded in the audit as far as it is to be.
    pub(super) fn is_recorded(&self) -> bool {
        self.is_recorded
    }

    /// Whether the request is refused for its form, whoever sent it: this is no denial of anybody.
    pub(super) fn is_guards(&self) -> bool {
        self.is_guards
    }

    /// The outcome's name in the audit.
    pub(super) fn outcome(&self) -> Outcome {
        match (self.status, self.code) {
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => Outcome::Denied,
            (StatusCode::TOO_MANY_REQUESTS, _) => Outcome::Limited,
            (StatusCode::CONFLICT, _) => Outcome::Conflict,
            (_, "secret_not_found" | "tenant_unknown") => Outcome::Absent,
            (status, _) if status.is_server_error() => Outcome::Failed,
            _ => Outcome::Invalid,
        }
    }

    /// The answer in the form that Infisical's clients read: a number, a word and a text. A 404 is kept for
    /// what is proved absent, and a conflict is a 400, as it is there.
    pub(super) fn into_infisical(self, request_id: &str) -> Answer {
        let status = if self.status == StatusCode::CONFLICT { StatusCode::BAD_REQUEST } else { self.status };
        let seconds = self.retry_after.map(|after| after.as_millis().div_ceil(1000).max(1));
        let message = match (status, seconds) {
            (StatusCode::TOO_MANY_REQUESTS, Some(seconds)) => {
                format!("Rate limit exceeded. Please try again in {seconds} seconds").into()
            }
            _ => self.detail.clone(),
        };
        let is_route = self.code == "route_not_found";
        let error = match status {
            StatusCode::UNAUTHORIZED => "Unauthorized",
            StatusCode::FORBIDDEN => "PermissionDenied",
            StatusCode::NOT_FOUND if is_route => "Not Found",
            StatusCode::NOT_FOUND => "NotFound",
            StatusCode::TOO_MANY_REQUESTS => "RateLimitExceeded",
            StatusCode::PAYLOAD_TOO_LARGE => "PayloadTooLarge",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailable",
            _ if status.is_server_error() => "InternalServerError",
            _ => "BadRequest",
        };
        let request_id = (!is_route).then_some(request_id);
        let body = crate::infisical::Failure {
            request_id: request_id.map(Cow::Borrowed),
            status: status.as_u16(),
            message,
            error: error.into(),
        };
        // A struct of texts and numbers always serialises.
        let body = legible::lines_of(serde_json::to_vec(&body).unwrap_or_default());
        let mut answer = self.with_headers(respond(status, JSON, body.into()));
        answer.headers_mut().remove(header::ALLOW);
        answer
    }

    pub(super) fn into_response(self) -> Answer {
        let body = ProblemBody {
            title: self.title,
            status: self.status.as_u16(),
            code: self.code,
            detail: &self.detail,
            cause: self.cause,
        };
        // A struct of texts and numbers always serialises.
        let body = legible::lines_of(serde_json::to_vec(&body).unwrap_or_default());
        let response = respond(self.status, HeaderValue::from_static("application/problem+json"), body.into());
        self.with_headers(response)
    }

    fn with_headers(self, mut response: Answer) -> Answer {
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            // Rounded up: a moment earlier, the answer would be the same.
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_millis().div_ceil(1000).max(1) as u64));
        }
        if let Some(allow) = self.allow.and_then(|allow| HeaderValue::from_str(&allow).ok()) {
            headers.insert(header::ALLOW, allow);
        }
        if let Some((name, value)) = self.takes.map(Taken::header) {
            headers.insert(name, HeaderValue::from_static(value));
        }
        if self.closes {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A secret's answer: everything but its body is short, and ready-made where it is common.
pub(super) struct Told {
    status: StatusCode,
    /// `None` where there is no body.
    content_type: Option<HeaderValue>,
    body: Bytes,
    etag: HeaderValue,
    age: HeaderValue,
    cache_status: HeaderValue,
}

impl Told {
    pub(super) fn secret(found: &answer::Answer, resolved: &Resolved, as_text: bool, now: Moment) -> Self {
        let (content_type, body) = if as_text { (TEXT, found.text()) } else { (JSON, found.json()) };
        let ttl = ttl(&resolved.entry, now);
        Self {
            status: StatusCode::OK,
            content_type: Some(content_type),
            body,
            etag: found.etag(),
            age: seconds(now.since(resolved.entry.confirmed_at).as_secs()),
            cache_status: match resolved.cache_status.is_plain_hit() {
                true => memory_hit(ttl),
                false => cache_status_header(&resolved.cache_status, ttl),
            },
        }
    }

    /// The answer that the caller has it already.
    pub(super) fn not_modified(self) -> Self {
        Self { status: StatusCode::NOT_MODIFIED, content_type: None, body: Bytes::new(), ..self }
    }

    /// The length of its body.
    pub(super) fn length(&self) -> usize {
        self.body.len()
    }

    /// The answer. The content of `headers` is dropped; the table itself, which
    /// may be the request's, is reused. `held` is what the body is counted for.
    pub(super) fn into_answer(self, mut headers: HeaderMap, held: Option<Held>) -> Answer {
        headers.clear();
        if let Some(content_type) = self.content_type {
            headers.insert(header::CONTENT_TYPE, content_type);
        }
        headers.insert(header::CACHE_CONTROL, NO_STORE);
        headers.insert(header::ETAG, self.etag);
        headers.insert(header::AGE, self.age);
        headers.insert(CACHE_STATUS, self.cache_status);
        let mut answer = Response::new(Body::held(self.body, held));
        *answer.status_mut() = self.status;
        *answer.headers_mut() = headers;
        answer
    }
}

/// The seconds until an entry in memory is no longer fresh.
pub(super) fn ttl(entry: &Entry, now: Moment) -> i64 {
    now.millis_until(entry.fresh_until).div_euclid(1000)
}

/// The value of `Cache-Status`.
pub(super) fn cache_status_header(cache_status: &CacheStatus, ttl: i64) -> HeaderValue {
    let mut text = String::with_capacity(96);
    // Writing to a string never fails, and a cache status is made of plain words.
    let _ = cache_status.write(&mut text, ttl);
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("secretier"))
}

/// Headers are kept for numbers of seconds below this, once they were made: most ages and times
/// to live are below. A header takes some 50 bytes.
const KEPT: usize = 4096;

type Kept = [OnceLock<HeaderValue>; KEPT];

fn kept(kept: &Kept, number: u64, make: impl Fn() -> HeaderValue) -> HeaderValue {
    match usize::try_from(number).ok().and_then(|number| kept.get(number)) {
        Some(kept) => kept.get_or_init(make).clone(),
        None => make(),
    }
}

fn seconds(number: u64) -> HeaderValue {
    static SECONDS: Kept = [const { OnceLock::new() }; KEPT];
    kept(&SECONDS, number, || HeaderValue::from(number))
}

/// The value of `Cache-Status` for a hit in memory: no other tier was asked.
fn memory_hit(ttl: i64) -> HeaderValue {
    static HITS: Kept = [const { OnceLock::new() }; KEPT];
    let make = || cache_status_header(&CacheStatus::memory(), ttl);
    u64::try_from(ttl).map_or_else(|_| make(), |ttl| kept(&HITS, ttl, make))
}

pub(super) const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// Says on every error under which id the request is on record.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");

/// An answer; no cache on the way may store it.
pub(super) fn respond(status: StatusCode, content_type: HeaderValue, body: Bytes) -> Answer {
    respond_with(status, content_type, Body::whole(body))
}

/// The same with a body that may be made while it is taken.
pub(super) fn respond_with(status: StatusCode, content_type: HeaderValue, body: Body) -> Answer {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, content_type);
    headers.insert(header::CACHE_CONTROL, NO_STORE);
    response
}

pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json");
pub(super) const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

impl From<InvalidName> for Problem {
    fn from(invalid: InvalidName) -> Self {
        let (code, title) = match invalid {
            InvalidName::Tenant(_) => ("invalid_tenant", "Invalid tenant"),
            InvalidName::Key(_) => ("invalid_key", "Invalid key"),
        };
        Self::new(StatusCode::BAD_REQUEST, code, title, invalid.to_string())
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        let (status, code, title) = match refused {
            Refused::Missing => (StatusCode::UNAUTHORIZED, "token_missing", "Token missing"),
            Refused::Invalid => (StatusCode::UNAUTHORIZED, "token_invalid", "Token invalid"),
            Refused::Unconfirmed => return Self::unavailable(UNCONFIRMED, None),
            Refused::Expired => (StatusCode::UNAUTHORIZED, "token_expired", "Token expired"),
            Refused::OutOfScope => (StatusCode::FORBIDDEN, "out_of_scope", "Out of scope"),
            Refused::Limited { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate_limited", "Rate limited"),
        };
        let retry_after = match refused {
            Refused::Limited { retry_after, .. } => Some(retry_after),
            Refused::Missing | Refused::Invalid | Refused::Unconfirmed | Refused::Expired | Refused::OutOfScope => None,
        };
        Self { retry_after, ..Self::new(status, code, title, refused.to_string()) }
    }
}

impl From<Unverified> for Problem {
    fn from(unverified: Unverified) -> Self {
        let (status, code, title) = match unverified {
            Unverified::Forged => (StatusCode::UNAUTHORIZED, "signature_invalid", "Signature invalid"),
            Unverified::Outdated => (StatusCode::UNAUTHORIZED, "signature_expired", "Signature expired"),
            Unverified::Unreadable => (StatusCode::BAD_REQUEST, "invalid_body", "Invalid body"),
        };
        Self::new(status, code, title, unverified.to_string())
    }
}

impl From<InvalidField> for Problem {
    fn from(error: InvalidField) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_audit_field", "Invalid audit field", error.to_string())
    }
}

impl From<Unrecorded> for Problem {
    fn from(_: Unrecorded) -> Self {
        Self::unrecorded()
    }
}

impl From<ResolveError> for Problem {
    fn from(error: ResolveError) -> Self {
        let retry_after = error.retry_after();
        let detail = match &error {
            ResolveError::Denied { .. } => {
                return Self {
                    code: "upstream_denied",
                    title: "Denied upstream",
                    ..Self::unavailable(
                        "the upstream refuses this tenant's folder to the identity that the proxy uses; give it read access to the folder",
                        retry_after,
                    )
                };
            }
            ResolveError::Unusable(reason) => {
                return Self {
                    code: "secret_unavailable",
                    title: "Secret unavailable",
                    ..Self::unavailable(reason.advice(), retry_after)
                };
            }
            ResolveError::Unreadable => {
                "the stored secret does not open; the log names the row and the reason, and 'secretier explain' shows its state"
            }
            ResolveError::Withheld => return Self::withheld(),
            ResolveError::NotConfigured => {
                "this instance is not configured to read this shared folder: add it as [[infisical.folders]], as other instances on this database have it"
            }
            ResolveError::NoUpstream => {
                "this tenant's phase needs an upstream, and neither [infisical] nor [directory] is configured"
            }
            ResolveError::Moving => "the tenant is changing hands between upstream and the database; try again",
            ResolveError::Offline => {
                "the database has not answered since this instance was started, from memory.offline_file, and only what that holds is answered meanwhile; try again"
            }
            ResolveError::TimedOut => "no tier answered in time; try again",
            ResolveError::Lost => "the lookup failed inside the proxy; the log has the reason",
            ResolveError::Database(error) if matches!(**error, StoreError::Unwritable(_)) => {
                "the database takes no writes just now: it is read-only, or its disk is full; reads are answered, and the log has the reason"
            }
            ResolveError::Database(_) => "the database cannot be reached, and no other tier may answer; try again",
            ResolveError::Upstream(error) => match (error, error.cause()) {
                (UpstreamError::Rejected { hint, cause: cause @ (Cause::Rejected | Cause::Directory), .. }, _) => {
                    let detail = format!("the upstream rejects the request: {hint}").into();
                    return Self { detail, cause: Some(cause.as_str()), ..Self::unavailable("", retry_after) };
                }
                (_, Some(cause)) => {
                    let detail = format!("nothing nearer may answer, and upstream cannot: {}", cause.advice()).into();
                    return Self { detail, cause: Some(cause.as_str()), ..Self::unavailable("", retry_after) };
                }
                (UpstreamError::OutOfBudget { .. }, _) => {
                    "the budget of calls to Infisical is used up (infisical.requests_per_minute); try again later"
                }
                (UpstreamError::RateLimited { .. }, _) => "Infisical limits the proxy's rate; try again later",
                (UpstreamError::Malformed(_), _) => "what the upstream holds cannot be read; the log has the reason",
                (UpstreamError::Incomplete, _) => {
                    "a folder of Infisical that this tenant's secrets refer to cannot be read just now; try again"
                }
                _ => "the upstream cannot be reached, and nothing nearer may answer for it; try again",
            },
        };
        Self::unavailable(detail, retry_after)
    }
}

impl From<Unstorable> for Problem {
    fn from(unstorable: Unstorable) -> Self {
        let problem = match unstorable {
            Unstorable::Name(_) => Self::invalid_key(),
            Unstorable::Value(_) => return Self::invalid_body(unstorable.to_string()),
            Unstorable::ReadOnly(_) => Self::new(
                StatusCode::CONFLICT,
                "upstream_read_only",
                "Read-only upstream",
                "the secret's owner takes no writes",
            ),
            Unstorable::Size => Self::too_large(),
        };
        Self { detail: unstorable.to_string().into(), ..problem }
    }
}

impl From<WriteError> for Problem {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::UnknownTenant => Self::new(
                StatusCode::NOT_FOUND,
                "tenant_unknown",
                "Tenant unknown",
                "neither upstream nor the database knows this tenant, and nothing was written; check its name, or make the tenant by this write: ?create_tenant=true, 'secretier set --create-tenant'; a shared folder is configured as [[infisical.folders]]",
            ),
            WriteError::Conflict => Self::new(
                StatusCode::CONFLICT,
                "version_conflict",
                "Version conflict",
                "the secret has changed, or exists or lacks where the condition says otherwise; read it and decide anew",
            ),
            WriteError::Denied => Self {
                code: "upstream_denied",
                title: "Denied upstream",
                ..Self::unavailable(
                    "the upstream does not let the identity that the proxy uses change this tenant's folder; give it \
                     edit access (create, edit and delete) to the folder",
                    Some(RETRY_DENIED_WRITE),
                )
            },
            WriteError::NoVersion => Self::no_version(),
            WriteError::Revoked => Self::new(
                StatusCode::CONFLICT,
                "version_revoked",
                "Version revoked",
                "a rotation has ended this version, so its value is not valid any more; {\"version\":N,\"force\":true} brings it \
                 back all the same",
            ),
            WriteError::KeptUpstream => {
                let problem = Self::no_version();
                Self { detail: "its owner keeps the history of this secret; roll it back there".into(), ..problem }
            }
            WriteError::Reference => Self::new(
                StatusCode::BAD_REQUEST,
                "reference_not_allowed",
                "Reference not allowed",
                "the value has ${...} in it, which Infisical would read as a reference to a secret that this token does \
                 not reach; refer only to keys of the same tenant that the token reaches, or write the value in Infisical",
            ),
            WriteError::Unstorable(what) => what.into(),
            WriteError::AwaitsApproval => Self::new(
                StatusCode::CONFLICT,
                "approval_required",
                "Approval required",
                "Infisical holds this change back until someone approves it there; nothing has changed yet",
            ),
            WriteError::Failed(error) => error.into(),
        }
    }
}
