//! A request that came with a good token: what every route asks of it.

use std::{borrow::Cow, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use hyper::body::Incoming;
use percent_encoding::{CONTROLS, percent_decode_str, utf8_percent_encode};
use serde::{Serialize, de::DeserializeOwned};
use utoipa::ToSchema;

use super::{
    Limits, Service, accept, body,
    budgets::Room,
    operation::Names,
    query::Query,
    respond::{Answer, JSON, Problem, respond},
};
use crate::{
    access::{
        Action, Grant,
        audit::{Account, Act, Kind, Outcome},
    },
    answer,
    clock::Moment,
    legible,
    metrics::Metrics,
    resolver::{Condition, Resolved, Tier, Want, Written},
    secret::{SecretKey, SecretName, Version, Writer},
    tenant::Tenant,
};

/// Counters of the hot path, looked up once.
#[derive(Debug)]
pub(super) struct Counters {
    found: [metrics::Counter; 3],
    absent: [metrics::Counter; 3],
    age: [metrics::Histogram; 3],
}

impl Counters {
    pub(super) fn new(metrics: &Metrics) -> Self {
        let tiers = [Tier::Memory, Tier::Database, Tier::Upstream].map(Tier::as_str);
        let counter = |outcome| {
            tiers.map(|tier| metrics.counter("secretier_lookups_total", &[("tier", tier), ("outcome", outcome)]))
        };
        let age = tiers.map(|tier| metrics.histogram("secretier_served_age_seconds", &[("tier", tier)]));
        Self { found: counter("found"), absent: counter("absent"), age }
    }

    fn count(&self, resolved: &Resolved, age: Duration) {
        let tier = match resolved.cache_status.answered_by {
            Tier::Memory => 0,
            Tier::Database => 1,
            Tier::Upstream => 2,
        };
        match resolved.answer() {
            Some(_) => {
                self.found[tier].increment(1);
                self.age[tier].record(age.as_secs_f64());
            }
            None => self.absent[tier].increment(1),
        }
    }
}

/// How long requests took that were not answered at once, by the first digit of their status.
#[derive(Debug)]
pub(super) struct Durations([metrics::Histogram; 4]);

impl Durations {
    pub(super) fn new(metrics: &Metrics) -> Self {
        let of_status = |status| metrics.histogram("secretier_request_duration_seconds", &[("status", status)]);
        Self(["2xx", "3xx", "4xx", "5xx"].map(of_status))
    }

    pub(super) fn note(&self, status: StatusCode, took: Duration) {
        let [ok, other, wrong, failed] = &self.0;
        let histogram = match status.as_u16() {
            ..300 => ok,
            300..400 => other,
            400..500 => wrong,
            500.. => failed,
        };
        histogram.record(took.as_secs_f64());
    }
}

/// A request that came with a good token.
pub(super) struct Ask<'a> {
    pub(super) service: &'a Service,
    pub(super) account: &'a Account<'a>,
    pub(super) grant: &'a Grant,
    pub(super) headers: &'a HeaderMap,
    pub(super) query: Query<'a>,
    pub(super) names: Names<'a>,
}

impl Ask<'_> {
    /// Reads the request's body, a JSON object, as far as there is room for it.
    pub(super) async fn read<T: DeserializeOwned + Send + 'static>(
        &self,
        body: Incoming,
        limit: u64,
    ) -> Result<T, Problem> {
        body::check_encoding(self.headers)?;
        body::check_type(self.headers)?;
        let Limits { bounds, body_timeout, .. } = self.service.limits();
        let mut room = Room::new(&self.service.budgets, self.grant.holds(), bounds, &self.service.metrics)?;
        body::read_json(body, limit, body_timeout, &mut room, self.service.resolver.database().work()).await
    }

    /// The same where there may be no body, for a route whose clients put into the query what they like.
    pub(super) async fn read_if_any<T: DeserializeOwned + Default + Send + 'static>(
        &self,
        body: Incoming,
        limit: u64,
    ) -> Result<T, Problem> {
        body::check_encoding(self.headers)?;
        let Limits { bounds, body_timeout, .. } = self.service.limits();
        let mut room = Room::new(&self.service.budgets, self.grant.holds(), bounds, &self.service.metrics)?;
        let bytes = body::read_bytes(body, limit, body_timeout, &mut room).await?;
        if bytes.is_empty() {
            return Ok(T::default());
        }
        body::parse_anywhere(bytes, self.service.resolver.database().work()).await
    }

    /// Accounts for a lookup: counted where memory had it, else recorded by itself.
    pub(super) fn saw(&self, name: SecretName<'_>, resolved: &Resolved, now: Moment) {
        self.saw_as("read", name, resolved, now);
    }

    /// The same for a lookup of another name.
    pub(super) fn saw_as(&self, action: &'static str, name: SecretName<'_>, resolved: &Resolved, now: Moment) {
        self.service.counters.count(resolved, now.since(resolved.entry.confirmed_at));
        let outcome = if resolved.answer().is_some() { Outcome::Found } else { Outcome::Absent };
        let (tenant, key) = (name.tenant(), name.key());
        let tier = Some(resolved.cache_status.answered_by.as_str());
        let act = Act { action, tenant, key, outcome, tier, code: None };
        match resolved.cache_status.answered_by {
            Tier::Memory => self.service.audit.count(self.account, act, now.wall()),
            Tier::Database | Tier::Upstream => self.service.audit.note(Kind::Lookup, self.account, act),
        }
    }

    /// Counts what was answered.
    pub(super) fn count(&self, action: &'static str, tenant: &str, key: &str, tier: Option<&'static str>) {
        let act = Act { action, tenant, key, outcome: Outcome::Found, tier, code: None };
        self.service.audit.count(self.account, act, self.service.resolver.clock().now());
    }

    /// Does what changes a secret, on record: that it is begun, before it is, and how it
    /// ended, before the answer. What cannot be recorded is not begun.
    pub(super) async fn recorded<T, E: Into<Problem>>(
        &self,
        action: &'static str,
        tenant: &Tenant,
        key: &SecretKey,
        change: impl Future<Output = Result<T, E>>,
        owner: impl Fn(&T) -> Tier,
    ) -> Result<T, Problem> {
        let (tenant, key) = (tenant.as_str(), key.as_str());
        let act = |outcome, tier, code| Act { action, tenant, key, outcome, tier, code };
        self.service.audit.write(Kind::Write, self.account, act(Outcome::Begun, None, None)).await?;
        let changed = change.await.map_err(Into::into);
        let (outcome, tier, code) = match &changed {
            Ok(done) => (Outcome::Done, Some(owner(done).as_str()), None),
            Err(problem) => (problem.outcome(), None, Some(problem.code)),
        };
        // It is done, and that it was begun is on record: the ledger goes on trying to write the rest.
        let _ = self.service.audit.write(Kind::Write, self.account, act(outcome, tier, code)).await;
        changed.map_err(Problem::recorded)
    }

    /// The same for a change of a tenant as a whole.
    pub(super) async fn recorded_of_tenant<T, E: Into<Problem>>(
        &self,
        action: &'static str,
        tenant: &Tenant,
        change: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Problem> {
        let act = |outcome, code| Act { action, tenant: tenant.as_str(), key: "", outcome, tier: None, code };
        self.service.audit.write(Kind::Write, self.account, act(Outcome::Begun, None)).await?;
        let changed = change.await.map_err(Into::into);
        let (outcome, code) = match &changed {
            Ok(_) => (Outcome::Done, None),
            Err(problem) => (problem.outcome(), Some(problem.code)),
        };
        let _ = self.service.audit.write(Kind::Write, self.account, act(outcome, code)).await;
        changed.map_err(Problem::recorded)
    }

    pub(super) fn tenant_for(&self, action: Action) -> Result<Tenant, Problem> {
        let tenant = decode_tenant(self.names)?.parse::<Tenant>().map_err(|_| Problem::invalid_tenant())?;
        self.grant.allow_tenant(action, tenant.as_str())?;
        Ok(tenant)
    }

    pub(super) fn secret_for(&self, action: Action) -> Result<(Tenant, SecretKey), Problem> {
        let (tenant, key) = decoded(self.names)?;
        let name = SecretName::parse(&tenant, &key)?;
        self.grant.allow(action, name.tenant(), name.key())?;
        Ok(name.to_owned())
    }

    /// The writer to this tenant, with the keys that a value may refer to: those that the token
    /// may read there.
    pub(super) fn writer(&self, tenant: &Tenant) -> Writer {
        let (grant, tenant) = (self.account.who.grant.clone(), tenant.clone());
        let reaches = move |name: &str| {
            grant.as_ref().is_some_and(|grant| grant.allow(Action::Read, tenant.as_str(), name).is_ok())
        };
        Writer::reaching(&self.grant.name, Arc::new(reaches))
    }

    pub(super) fn want(&self) -> Want {
        let no_cache = self.headers.get_all(header::CACHE_CONTROL).iter().any(|value| {
            value.to_str().is_ok_and(|value| value.split(',').any(|word| word.trim().eq_ignore_ascii_case("no-cache")))
        });
        if no_cache { Want::Revalidated } else { Want::Cached }
    }

    /// Whether the bare value is wanted rather than JSON.
    pub(super) fn wants_text(&self) -> bool {
        accept::prefers_text(self.headers.get_all(header::ACCEPT).iter().filter_map(|line| line.to_str().ok()))
    }

    pub(super) fn known(&self, found: &answer::Answer) -> bool {
        self.headers.get_all(header::IF_NONE_MATCH).iter().any(|value| {
            value.to_str().is_ok_and(|value| value.split(',').any(|tag| tag.trim() == "*" || found.etag_is(tag)))
        })
    }

    /// Whether the caller has what this validator stands for (`If-None-Match`).
    pub(super) fn knows(&self, etag: &str) -> bool {
        let listed = |value: &HeaderValue| {
            let is_it = |tag: &str| matches!(tag.trim(), "*") || tag.trim().trim_start_matches("W/") == etag;
            value.to_str().is_ok_and(|value| value.split(',').any(is_it))
        };
        self.headers.get_all(header::IF_NONE_MATCH).iter().any(listed)
    }

    /// The condition of a write. `If-Match` lists validators, or `*`; of `If-None-Match`
    /// only `*` makes sense here.
    pub(super) fn condition(&self) -> Result<Condition, Problem> {
        let listed = |name| {
            let values = self.headers.get_all(name).iter().map(|value: &HeaderValue| value.to_str().unwrap_or(""));
            let tags = values.flat_map(|value| value.split(',')).map(|tag| tag.trim().to_owned());
            tags.collect::<Vec<String>>()
        };
        let (matching, none) = (listed(header::IF_MATCH), listed(header::IF_NONE_MATCH));
        match (matching.as_slice(), none.as_slice()) {
            ([], []) => Ok(Condition::None),
            ([any], []) if any == "*" => Ok(Condition::IfMatchAny),
            (tags, []) => {
                let bare = |tag: &String| tag.trim_start_matches("W/").trim_matches('"').to_owned();
                Ok(Condition::IfMatch(tags.iter().map(bare).collect()))
            }
            ([], [any]) if any == "*" => Ok(Condition::IfNoneMatchAny),
            _ => Err(Problem::invalid_body("send one of If-Match: \"<etag>\", If-Match: *, or If-None-Match: *")),
        }
    }

    pub(super) fn version(&self) -> Result<Option<Version>, Problem> {
        let wrong = || Problem::invalid_query("version takes a number from 1 on, as in ?version=3");
        let parse = |text: &str| text.parse().ok().and_then(Version::new).ok_or_else(wrong);
        self.query.get("version").map(parse).transpose()
    }

    pub(super) fn flag(&self, name: &'static str) -> Result<bool, Problem> {
        match self.query.get(name) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(Problem::invalid_query(format!("{name} takes true or false, as in ?{name}=true"))),
        }
    }
}

/// A name in a path, decoded if it can be a name; otherwise as it came, with everything that is not
/// plain ASCII percent-encoded.
pub(super) fn legible(name: &str) -> Cow<'_, str> {
    let decoded = decode(name).filter(|name| !name.contains(char::is_control));
    decoded.unwrap_or_else(|| utf8_percent_encode(name, CONTROLS).into())
}

pub(super) fn decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains('%') {
        return Some(Cow::Borrowed(text));
    }
    percent_decode_str(text).decode_utf8().ok()
}

/// The tenant that a path names. An escaped slash does not make a shared folder of it.
fn decode_tenant(names: Names<'_>) -> Result<Cow<'_, str>, Problem> {
    let is_of_its_kind = |tenant: &Cow<'_, str>| tenant.starts_with('/') == names.tenant.starts_with('/');
    decode(names.tenant).filter(is_of_its_kind).ok_or_else(Problem::invalid_tenant)
}

/// The tenant and the key that a path names.
pub(super) fn decoded(names: Names<'_>) -> Result<(Cow<'_, str>, Cow<'_, str>), Problem> {
    let tenant = decode_tenant(names)?;
    let key = decode(names.key).ok_or_else(Problem::invalid_key)?;
    Ok((tenant, key))
}

/// Names in it are escaped so that a terminal shows them as they are; read, they are the same.
pub(super) fn json(body: &impl Serialize) -> Bytes {
    // Our own structs of texts and numbers always serialise.
    legible::lines_of(serde_json::to_vec(body).unwrap_or_default()).into()
}

pub(super) fn wrote(status: StatusCode, tenant: &Tenant, key: &SecretKey, written: &Written) -> Answer {
    let body = Wrote {
        tenant: tenant.as_str(),
        key: key.as_str(),
        version: written.version.map(|version| version.number()),
        updated_at: written.updated_at.to_rfc3339(),
    };
    let mut answer = respond(status, JSON, json(&body));
    if let Some(etag) = &written.etag
        && let Ok(etag) = HeaderValue::try_from(format!("\"{etag}\""))
    {
        answer.headers_mut().insert(header::ETAG, etag);
    }
    answer
}

#[derive(Serialize, ToSchema)]
pub(super) struct Wrote<'a> {
    tenant: &'a str,
    key: &'a str,
    /// The new version; null where Infisical took the write but could not be read back, or
    /// has another value by then.
    version: Option<i64>,
    /// RFC 3339, UTC.
    updated_at: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_shown_as_it_reads_unless_it_would_not_read_well() {
        assert_eq!((legible("%41"), legible("%00")), (Cow::Borrowed("A"), Cow::Borrowed("%00")));
        assert_eq!((legible("\u{9b}é"), legible("é")), (Cow::Borrowed("%C2%9B%C3%A9"), Cow::Borrowed("é")));
    }
}
