//! The routes, as a table, and what each does.

use std::{borrow::Cow, collections::HashSet, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header, request::Parts};
use hyper::body::Incoming;
use percent_encoding::{CONTROLS, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use utoipa::ToSchema;

use super::{
    Limits, Service, body,
    budgets::{Room, Thing},
    health,
    lists::{self, ListBody, UnavailableKey},
    outgoing::{Body, UNCOUNTED},
    query::{Query, Search},
    respond::{Answer, CACHE_STATUS, JSON, Problem, Told, cache_status_header, respond, respond_with, ttl},
};
use crate::{
    access::{
        Action, Grant, Refused,
        audit::{Account, Act, Kind, Outcome},
    },
    answer,
    budget::Held,
    clock::{Moment, Timestamp},
    flaws::Flaws,
    legible,
    long_work::{Pace, SHORT},
    metrics::Metrics,
    pieces::Pieces,
    resolver::{
        Condition, Listing, LongAnswer, NewTenant, Refresh, ResolveError, Resolved, TenantSummary, Tier, Want, Written,
    },
    secret::{self, SecretKey, SecretName, SecretValue, Version, Writer},
    tenant::Tenant,
};

/// The most keys that one batch may ask for.
const MAX_BATCH: usize = 1000;

/// The most bytes that one batch may answer with.
const MAX_BATCH_BYTES: usize = 64 << 20;

/// A request's path, taken apart. Texts are as they came, still percent-encoded.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route<'a> {
    Health,
    Ready,
    Metrics,
    OpenApi,
    Audit,
    WhoAmI,
    Webhook,
    Tenants,
    Tenant(&'a str),
    Refresh(&'a str),
    Secrets(&'a str),
    BatchGet(&'a str),
    Secret(&'a str, &'a str),
    Explain(&'a str, &'a str),
    Versions(&'a str, &'a str),
    Rollback(&'a str, &'a str),
}

impl<'a> Route<'a> {
    /// The table.
    pub(super) fn find(path: &'a str) -> Option<Self> {
        Some(match Self::parts(path)? {
            [Some("healthz"), None, ..] => Self::Health,
            [Some("readyz"), None, ..] => Self::Ready,
            [Some("metrics"), None, ..] => Self::Metrics,
            [Some("openapi.json"), None, ..] => Self::OpenApi,
            [Some("v1"), Some("audit"), None, ..] => Self::Audit,
            [Some("v1"), Some("whoami"), None, ..] => Self::WhoAmI,
            [Some("v1"), Some("hooks"), Some("infisical"), None, ..] => Self::Webhook,
            [Some("v1"), Some("tenants"), None, ..] => Self::Tenants,
            [Some("v1"), Some("tenants"), Some(tenant), None, ..] => Self::Tenant(tenant),
            [Some("v1"), Some("tenants"), Some(tenant), Some("refresh"), None, ..] => Self::Refresh(tenant),
            [Some("v1"), Some("tenants"), Some(tenant), Some("secrets"), None, ..] => Self::Secrets(tenant),
            [Some("v1"), Some("tenants"), Some(tenant), Some("secrets"), Some("batch-get"), None, _] => {
                Self::BatchGet(tenant)
            }
            [Some("v1"), Some("tenants"), Some(tenant), Some("secrets"), Some(key), None, _] => {
                Self::Secret(tenant, key)
            }
            [Some("v1"), Some("tenants"), Some(tenant), Some("secrets"), Some(key), Some("explain"), None] => {
                Self::Explain(tenant, key)
            }
            [Some("v1"), Some("tenants"), Some(tenant), Some("secrets"), Some(key), Some("versions"), None] => {
                Self::Versions(tenant, key)
            }
            [Some("v1"), Some("tenants"), Some(tenant), Some("secrets"), Some(key), Some("rollback"), None] => {
                Self::Rollback(tenant, key)
            }
            _ => return None,
        })
    }

    /// What stands between the slashes; the last has all of the rest.
    fn parts(path: &str) -> Option<[Option<&str>; 7]> {
        let mut rest = Some(path.strip_prefix('/')?);
        let mut parts = [None; 7];
        for (index, part) in parts.iter_mut().enumerate() {
            let Some(text) = rest else { break };
            let slash = if index < 6 { text.bytes().position(|byte| byte == b'/') } else { None };
            (*part, rest) = match slash {
                Some(at) => (Some(&text[..at]), Some(&text[at + 1..])),
                None => (Some(text), None),
            };
        }
        Some(parts)
    }

    /// What a request for this is called in the audit, and the tenant and key that it names,
    /// as they came.
    pub(super) fn named(&self, method: &Method) -> (&'static str, &'a str, &'a str) {
        match *self {
            Self::Health | Self::Ready => ("health", "", ""),
            Self::Metrics => ("metrics", "", ""),
            Self::OpenApi => ("openapi", "", ""),
            Self::Audit => ("audit.search", "", ""),
            Self::WhoAmI => ("whoami", "", ""),
            Self::Webhook => ("notice", "", ""),
            Self::Tenants => ("tenants", "", ""),
            Self::Tenant(tenant) => ("tenant", tenant, ""),
            Self::Refresh(tenant) => ("refresh", tenant, ""),
            Self::Secrets(tenant) => ("list", tenant, ""),
            Self::BatchGet(tenant) if method == Method::POST => ("batch", tenant, ""),
            Self::BatchGet(tenant) => (verb(method), tenant, "batch-get"),
            Self::Secret(tenant, key) => (verb(method), tenant, key),
            Self::Explain(tenant, key) => ("explain", tenant, key),
            Self::Versions(tenant, key) => ("versions", tenant, key),
            Self::Rollback(tenant, key) => ("rollback", tenant, key),
        }
    }

    /// The parameters that a request for this may have in its query.
    pub(super) fn parameters(&self, method: &Method) -> &'static [&'static str] {
        match (self, method) {
            (Self::Secret(..) | Self::BatchGet(_), &Method::GET | &Method::HEAD) => &["version"],
            (Self::Secret(..) | Self::BatchGet(_), &Method::PUT) => &["create_tenant"],
            (Self::Secrets(_), _) => &["values"],
            (Self::Audit, _) => Search::PARAMETERS,
            (Self::Secret(..) | Self::BatchGet(_), _) => &[],
            (Self::Health | Self::Ready | Self::Metrics | Self::OpenApi | Self::WhoAmI | Self::Webhook, _) => &[],
            (Self::Tenants | Self::Tenant(_) | Self::Refresh(_), _) => &[],
            (Self::Explain(..) | Self::Versions(..) | Self::Rollback(..), _) => &[],
        }
    }

    /// The methods of this resource, as the header `Allow` lists them.
    fn allow(&self) -> &'static str {
        match self {
            Self::Health | Self::Ready | Self::Metrics | Self::OpenApi => "GET, HEAD",
            Self::Audit
            | Self::WhoAmI
            | Self::Tenants
            | Self::Tenant(_)
            | Self::Secrets(_)
            | Self::Explain(..)
            | Self::Versions(..) => "GET, HEAD",
            Self::Webhook | Self::Refresh(_) | Self::Rollback(..) => "POST",
            // A secret may be named `batch-get`: it is read and written like any other.
            Self::BatchGet(_) => "GET, HEAD, POST, PUT, DELETE",
            Self::Secret(..) => "GET, HEAD, PUT, DELETE",
        }
    }
}

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

/// Does what is asked, for who was let in.
pub(super) async fn dispatch(
    service: &Service,
    account: &Account<'_>,
    route: Option<&Route<'_>>,
    head: &Parts,
    body: Incoming,
) -> Result<Answer, Problem> {
    if service.audit.refuses_all() {
        return Err(Problem::unrecorded());
    }
    let Some(grant) = account.who.grant.as_deref() else { return Err(Refused::Missing.into()) };
    let route = route.ok_or_else(Problem::no_route)?;
    if !route.allow().split(", ").any(|method| method == head.method) {
        return Err(Problem::method_not_allowed(route.allow()));
    }
    let query = Query::parse(head.uri.query(), route.parameters(&head.method))?;
    let ask = Ask { service, account, grant, headers: &head.headers, query };
    // Boxed, all but the lookup: what is awaited here is moved, and wiped at its end, in its whole
    // size, and a lookup must not pay for that of the rest.
    match (&head.method, route) {
        (&Method::GET | &Method::HEAD, Route::Secret(tenant, key)) => ask.secret(tenant, key).await,
        (&Method::GET | &Method::HEAD, Route::BatchGet(tenant)) => ask.secret(tenant, "batch-get").await,
        (&Method::GET | &Method::HEAD, Route::Secrets(tenant)) => Box::pin(ask.secrets(tenant)).await,
        (&Method::POST, Route::BatchGet(tenant)) => Box::pin(ask.batch(tenant, body)).await,
        (&Method::PUT, Route::Secret(tenant, key)) => Box::pin(ask.put(tenant, key, body)).await,
        (&Method::PUT, Route::BatchGet(tenant)) => Box::pin(ask.put(tenant, "batch-get", body)).await,
        (&Method::DELETE, Route::Secret(tenant, key)) => Box::pin(ask.delete(tenant, key)).await,
        (&Method::DELETE, Route::BatchGet(tenant)) => Box::pin(ask.delete(tenant, "batch-get")).await,
        (&Method::GET | &Method::HEAD, Route::Explain(tenant, key)) => Box::pin(ask.explain(tenant, key)).await,
        (&Method::GET | &Method::HEAD, Route::Versions(tenant, key)) => Box::pin(ask.versions(tenant, key)).await,
        (&Method::POST, Route::Rollback(tenant, key)) => Box::pin(ask.rollback(tenant, key, body)).await,
        (&Method::GET | &Method::HEAD, Route::Tenants) => Box::pin(ask.tenants()).await,
        (&Method::GET | &Method::HEAD, Route::Tenant(tenant)) => Box::pin(ask.tenant(tenant)).await,
        (&Method::POST, Route::Refresh(tenant)) => Box::pin(ask.refresh(tenant)).await,
        (&Method::GET | &Method::HEAD, Route::Audit) => Box::pin(ask.audit()).await,
        (&Method::GET | &Method::HEAD, Route::Metrics) => {
            ask.count("metrics", "", "", None);
            Ok(health::metrics(service))
        }
        (&Method::GET | &Method::HEAD, Route::WhoAmI) => Ok(ask.who_am_i()),
        (&Method::GET | &Method::HEAD, Route::OpenApi) => {
            ask.count("openapi", "", "", None);
            Ok(respond(StatusCode::OK, JSON, super::openapi::document().into()))
        }
        _ => Err(Problem::method_not_allowed(route.allow())),
    }
}

/// What a name in a path says, as far as that can be a name; else as it came, all that is not
/// plain ASCII percent-encoded.
pub(super) fn legible(name: &str) -> Cow<'_, str> {
    let decoded = decode(name).filter(|name| !name.contains(char::is_control));
    decoded.unwrap_or_else(|| utf8_percent_encode(name, CONTROLS).into())
}

/// What is done to a secret.
fn verb(method: &Method) -> &'static str {
    match *method {
        Method::PUT => "put",
        Method::DELETE => "delete",
        _ => "read",
    }
}

/// A request that came with a good token.
pub(super) struct Ask<'a> {
    pub(super) service: &'a Service,
    pub(super) account: &'a Account<'a>,
    pub(super) grant: &'a Grant,
    pub(super) headers: &'a HeaderMap,
    pub(super) query: Query<'a>,
}

impl Ask<'_> {
    /// `GET /v1/tenants/{tenant}/secrets/{key}`
    async fn secret(&self, tenant: &str, key: &str) -> Result<Answer, Problem> {
        let (tenant, key) = decoded(tenant, key)?;
        let name = SecretName::parse(&tenant, &key)?;
        self.grant.allow(Action::Read, name.tenant(), name.key())?;
        let version = self.version()?;
        let resolved = match version {
            None => self.service.resolver.resolve(name, self.want()).await?,
            Some(version) => self.service.resolver.resolve_version(name, version, self.want()).await?,
        };
        let now = self.service.resolver.clock.moment();
        self.saw(name, &resolved, now);
        let Some(found) = resolved.answer() else {
            let problem = if version.is_none() { Problem::not_found() } else { Problem::no_version() };
            let mut answer = problem.into_response();
            self.service.metrics.count("secretier_errors_total", &[("code", "secret_not_found")]);
            answer
                .headers_mut()
                .insert(CACHE_STATUS, cache_status_header(&resolved.cache_status, ttl(&resolved.entry, now)));
            return Ok(answer);
        };
        let told = Told::secret(found, &resolved, self.wants_text(), now);
        let told = if self.known(found) { told.not_modified() } else { told };
        Ok(told.into_answer(HeaderMap::new(), None))
    }

    /// `GET /v1/tenants/{tenant}/secrets`
    async fn secrets(&self, tenant: &str) -> Result<Answer, Problem> {
        let tenant = self.tenant_for(Action::Read, tenant)?;
        let with_values = self.flag("values")?;
        let turn = self.service.resolver.long_answer(&self.grant.id);
        let room = if with_values { self.room_ahead(&tenant, &turn).await? } else { None };
        let listing = self.service.resolver.resolve_all(&tenant, self.want(), &turn).await?;
        let Listing { secrets, flaws, age, cache_status } = listing.ok_or_else(Problem::not_found)?;
        let tier = Some(cache_status.answered_by.as_str());
        self.count("list", tenant.as_str(), "", tier);
        let unavailable = self.unavailable(&flaws);
        // A list that lacked a value would say that there is none.
        if let (true, Some(first)) = (with_values, unavailable.first()) {
            return Err(Problem::some_unavailable(first.key, first.reason));
        }
        let secrets = secrets.map(|secrets| secrets.into_values().collect::<Vec<_>>());
        let (secrets, _) = secrets.parted(|secret| self.grant.reaches_key(secret.key.as_str()));
        let (mut body, mut pace) = (ListBody::new(with_values, &unavailable), Pace::default());
        for (place, secret) in secrets.iter().enumerate() {
            if with_values {
                self.count("read", tenant.as_str(), secret.key.as_str(), tier);
            }
            body.count(place == 0, secret);
            pace.did(0).await;
        }
        let mut answer = self.joined(body.length(), body.parts(secrets), room)?;
        let headers = answer.headers_mut();
        headers.insert(header::AGE, HeaderValue::from(age.as_secs()));
        headers.insert(CACHE_STATUS, cache_status_header(&cache_status, 0));
        Ok(answer)
    }

    /// Reads the request's body, as far as there is room for it.
    async fn read<T: DeserializeOwned + Send + 'static>(&self, body: Incoming, limit: u64) -> Result<T, Problem> {
        let Limits { bounds, body_timeout, .. } = self.service.limits();
        let mut room = Room::new(&self.service.budgets, self.grant.holds(), bounds, &self.service.metrics)?;
        body::read_json(body, limit, body_timeout, &mut room, self.service.resolver.database.work()).await
    }

    /// An answer of so many bytes, joined from these parts while it is taken.
    fn joined(
        &self,
        length: u64,
        parts: impl Iterator<Item = Bytes> + Send + 'static,
        room: Option<Held>,
    ) -> Result<Answer, Problem> {
        let mut pieces = Pieces::new(length, parts);
        Ok(match length <= UNCOUNTED as u64 {
            true => respond(StatusCode::OK, JSON, pieces.next().unwrap_or_default()),
            false => {
                let held = self.service.hold_answer(room, self.grant.holds(), length)?;
                respond_with(StatusCode::OK, JSON, Body::pieces(length, held, pieces))
            }
        })
    }

    /// Makes room for a list that was long when it was last read, before it is read again: what
    /// would be refused when it is made is not made. It waits for the token's turn, for as long as
    /// the list may take.
    async fn room_ahead(&self, tenant: &Tenant, turn: &LongAnswer<'_>) -> Result<Option<Held>, Problem> {
        let waited = tokio::time::timeout(self.service.resolver.deadline(), turn.take_if_long(tenant)).await;
        let weight = waited.map_err(|_| ResolveError::TimedOut)?;
        weight.map(|weight| self.service.hold(Thing::Answer, self.grant.holds(), weight as u64)).transpose()
    }

    /// The keys that the token reaches and that cannot be used, by name.
    fn unavailable<'f>(&self, flaws: &'f Flaws) -> Vec<UnavailableKey<'f>> {
        let unusable = flaws.unusable.iter().map(|(key, reason)| (key.as_str(), reason.as_str()));
        let all = unusable.chain(flaws.names.iter().map(|name| (name.as_str(), "invalid_name")));
        let reached = all.filter(|(key, _)| self.grant.reaches_key(key));
        reached.map(|(key, reason)| UnavailableKey { key, reason }).collect()
    }

    /// `POST /v1/tenants/{tenant}/secrets/batch-get`
    async fn batch(&self, tenant: &str, body: Incoming) -> Result<Answer, Problem> {
        let tenant = self.tenant_for(Action::Read, tenant)?;
        let limit = (MAX_BATCH * (SecretKey::MAX_LEN * 6 + 3)) as u64;
        let wanted: BatchGet = self.read(body, limit).await?;
        if wanted.keys.len() > MAX_BATCH {
            return Err(Problem::invalid_body(format!("a batch asks for at most {MAX_BATCH} keys")));
        }
        if wanted.keys.iter().any(|key| !SecretKey::is_valid(key)) {
            return Err(Problem::invalid_key());
        }
        // All or nothing, as with a key that is missing: who asked must not take less for all.
        if !wanted.keys.iter().all(|key| self.grant.reaches_key(key)) {
            return Err(Refused::OutOfScope.into());
        }
        // A key that is named often is answered once.
        let mut named = HashSet::new();
        let keys: Vec<String> = wanted.keys.into_iter().filter(|key| named.insert(key.clone())).collect();
        // Keys of one tenant share its snapshot, so a few at a time are enough.
        let look_up = |key| self.look_up(&tenant, key);
        let mut looked_up = stream::iter(keys).map(look_up).buffered(16);
        let (turn, mut pace) = (self.service.resolver.long_answer(&self.grant.id), Pace::default());
        let (mut missing, mut length) = (Vec::new(), 0);
        let mut found = self.service.resolver.database.work().large(Vec::new(), MAX_BATCH_BYTES);
        while let Some(result) = looked_up.next().await {
            let (key, resolved) = result?;
            match resolved.answer() {
                Some(answer) => {
                    let json = answer.json();
                    length += json.len();
                    if length > MAX_BATCH_BYTES {
                        return Err(Problem::batch_too_large());
                    }
                    found.push(json);
                }
                None => missing.push(key),
            }
            if length > SHORT {
                let its_turn = tokio::time::timeout(self.service.resolver.deadline(), turn.take()).await;
                its_turn.map_err(|_| ResolveError::TimedOut)?;
            }
            pace.did(0).await;
        }
        if named.is_empty() {
            self.count("batch", tenant.as_str(), "", None);
        }
        let (length, parts) = lists::batch(found, &missing);
        self.joined(length, parts, None)
    }

    async fn look_up(&self, tenant: &Tenant, key: String) -> Result<(String, Resolved), Problem> {
        let name = SecretName::parse(tenant.as_str(), &key)?;
        let resolved = self.service.resolver.resolve(name, self.want()).await?;
        self.saw(name, &resolved, self.service.resolver.clock.moment());
        Ok((key, resolved))
    }

    /// `PUT /v1/tenants/{tenant}/secrets/{key}`
    async fn put(&self, tenant: &str, key: &str, body: Incoming) -> Result<Answer, Problem> {
        let (tenant, key) = self.secret_for(Action::Write, tenant, key)?;
        let condition = self.condition()?;
        let new_tenant = if self.flag("create_tenant")? { NewTenant::Created } else { NewTenant::Refused };
        // A byte may take six as an escape.
        let max_value = self.service.limits().max_value;
        let limit = max_value.saturating_mul(6).saturating_add(1024);
        let put: Put = self.read(body, limit).await?;
        if put.value.len() as u64 > max_value {
            return Err(Problem::too_large());
        }
        let writer = self.writer(&tenant);
        let putting = self.service.resolver.put(&tenant, &key, &put.value, &condition, &writer, new_tenant);
        let written = self.recorded("put", &tenant, &key, putting, |written| written.tier).await?;
        tracing::info!(%tenant, %key, token = self.grant.name, peer = %self.account.who.peer, created = written.created, "a secret was written");
        let status = if written.created { StatusCode::CREATED } else { StatusCode::OK };
        Ok(wrote(status, &tenant, &key, &written))
    }

    /// `DELETE /v1/tenants/{tenant}/secrets/{key}`
    async fn delete(&self, tenant: &str, key: &str) -> Result<Answer, Problem> {
        let (tenant, key) = self.secret_for(Action::Write, tenant, key)?;
        let condition = self.condition()?;
        let writer = self.writer(&tenant);
        let deleting = async {
            let deleted = self.service.resolver.delete(&tenant, &key, &condition, &writer).await?;
            deleted.ok_or_else(Problem::not_found)
        };
        self.recorded("delete", &tenant, &key, deleting, |tier| *tier).await?;
        tracing::info!(%tenant, %key, token = self.grant.name, peer = %self.account.who.peer, "a secret was deleted");
        let mut answer = respond(StatusCode::NO_CONTENT, JSON, Bytes::new());
        answer.headers_mut().remove(header::CONTENT_TYPE);
        Ok(answer)
    }

    /// `GET /v1/tenants/{tenant}/secrets/{key}/explain`
    async fn explain(&self, tenant: &str, key: &str) -> Result<Answer, Problem> {
        let (tenant, key) = decoded(tenant, key)?;
        let name = SecretName::parse(&tenant, &key)?;
        self.grant.allow(Action::Read, name.tenant(), name.key())?;
        self.count("explain", name.tenant(), name.key(), None);
        Ok(respond(StatusCode::OK, JSON, json(&self.service.resolver.explain(name).await)))
    }

    /// `GET /v1/tenants/{tenant}/secrets/{key}/versions`
    async fn versions(&self, tenant: &str, key: &str) -> Result<Answer, Problem> {
        let (tenant, key) = self.secret_for(Action::Read, tenant, key)?;
        let revisions = self.service.resolver.versions(SecretName::of(&tenant, &key)).await?;
        if revisions.is_empty() {
            return Err(Problem::not_found());
        }
        self.count("versions", tenant.as_str(), key.as_str(), None);
        let versions = revisions.iter().map(|revision| VersionEntry {
            version: revision.version.number(),
            created_at: revision.created_at.to_rfc3339(),
            source: revision.source.as_str(),
            by: revision.written_by.as_deref().unwrap_or(revision.source.as_str()),
            deleted: revision.is_deletion,
            current: revision.is_current,
        });
        let body = VersionList { tenant: tenant.as_str(), key: key.as_str(), versions: versions.collect() };
        Ok(respond(StatusCode::OK, JSON, json(&body)))
    }

    /// `POST /v1/tenants/{tenant}/secrets/{key}/rollback`
    async fn rollback(&self, tenant: &str, key: &str, body: Incoming) -> Result<Answer, Problem> {
        let (tenant, key) = self.secret_for(Action::Write, tenant, key)?;
        let condition = self.condition()?;
        let wanted: Rollback = self.read(body, 1024).await?;
        let number = Version::new(wanted.version)
            .ok_or_else(|| Problem::invalid_body("version takes a number from 1 on, as in {\"version\":3}"))?;
        let writer = self.writer(&tenant);
        let rolling_back = self.service.resolver.rollback(&tenant, &key, number, &condition, &writer);
        let written = self.recorded("rollback", &tenant, &key, rolling_back, |written| written.tier).await?;
        tracing::info!(%tenant, %key, token = self.grant.name, peer = %self.account.who.peer, to = %number, "a secret was rolled back");
        Ok(wrote(StatusCode::OK, &tenant, &key, &written))
    }

    /// `GET /v1/tenants`
    async fn tenants(&self) -> Result<Answer, Problem> {
        self.grant.allow_action(Action::Read)?;
        let tenants = self.service.resolver.tenants(|tenant| self.grant.reaches(tenant)).await?;
        self.count("tenants", "", "", None);
        let tenants = tenants.into_iter().map(|summary| self.within_scope(summary)).collect();
        Ok(respond(StatusCode::OK, JSON, json(&TenantList { tenants })))
    }

    /// `GET /v1/tenants/{tenant}`
    async fn tenant(&self, tenant: &str) -> Result<Answer, Problem> {
        let tenant = self.tenant_for(Action::Read, tenant)?;
        let summary = self.service.resolver.tenant(&tenant).await?.ok_or_else(Problem::not_found)?;
        self.count("tenant", tenant.as_str(), "", None);
        Ok(respond(StatusCode::OK, JSON, json(&self.within_scope(summary))))
    }

    /// `GET /v1/audit`
    async fn audit(&self) -> Result<Answer, Problem> {
        self.grant.allow_action(Action::Admin)?;
        let search = Search::parse(&self.query)?;
        // A token that reaches some tenants or keys sees the records of those it names.
        if !self.grant.reaches_all(search.filter.tenant.as_deref(), search.filter.key.as_deref()) {
            return Err(Refused::OutOfScope.into());
        }
        let (tenant, key) = (search.filter.tenant.as_deref(), search.filter.key.as_deref());
        let (tenant, key) = (tenant.unwrap_or_default(), key.unwrap_or_default());
        let act = Act { action: "audit.search", tenant, key, outcome: Outcome::Begun, tier: None, code: None };
        self.service.audit.write(Kind::Admin, self.account, act).await?;
        let found = self.service.resolver.database.search_audit(&search.filter, search.limit).await;
        let found = found.map_err(|error| ResolveError::Database(std::sync::Arc::new(error)))?;
        Ok(respond(StatusCode::OK, JSON, json(&search.page(&found))))
    }

    /// `POST /v1/tenants/{tenant}/refresh`
    async fn refresh(&self, tenant: &str) -> Result<Answer, Problem> {
        let tenant = self.tenant_for(Action::Read, tenant)?;
        let fresh = match self.service.resolver.refresh(&tenant).await? {
            Refresh::Read(fresh) => fresh,
            Refresh::NoFolder => return Err(Problem::not_found()),
            Refresh::NotOwnedUpstream => return Err(Problem::not_owned_upstream()),
        };
        self.count("refresh", tenant.as_str(), "", None);
        let keys = self.grant.reaches_every_key().then_some(fresh.entries.len());
        let body = Refreshed { tenant: tenant.as_str(), keys, changed: fresh.status == 200 };
        Ok(respond(StatusCode::OK, JSON, json(&body)))
    }

    /// `GET /v1/whoami`
    fn who_am_i(&self) -> Answer {
        self.count("whoami", "", "", None);
        let (grant, now) = (self.grant, self.service.resolver.clock.now());
        let body = WhoAmI {
            name: &grant.name,
            id: &grant.id,
            tenants: grant.tenants().collect(),
            keys: grant.keys().collect(),
            actions: grant.actions().iter().map(|action| action.as_str()).collect(),
            expires_at: grant.expires_at().map(Timestamp::to_rfc3339),
            expires_in_seconds: grant.expires_at().map(|end| end.since(now).as_secs()),
        };
        respond(StatusCode::OK, JSON, json(&body))
    }

    /// How many keys a tenant has is not for those who may not know of some of them.
    fn within_scope(&self, mut summary: TenantSummary) -> TenantSummary {
        if !self.grant.reaches_every_key() {
            summary.keys = None;
        }
        summary
    }

    /// Accounts for a lookup: counted where memory had it, else recorded by itself.
    pub(super) fn saw(&self, name: SecretName<'_>, resolved: &Resolved, now: Moment) {
        self.service.counters.count(resolved, now.since(resolved.entry.confirmed_at));
        let outcome = if resolved.answer().is_some() { Outcome::Found } else { Outcome::Absent };
        let (tenant, key) = (name.tenant(), name.key());
        let tier = Some(resolved.cache_status.answered_by.as_str());
        let act = Act { action: "read", tenant, key, outcome, tier, code: None };
        match resolved.cache_status.answered_by {
            Tier::Memory => self.service.audit.count(self.account, act, now.wall()),
            Tier::Database | Tier::Upstream => self.service.audit.note(Kind::Lookup, self.account, act),
        }
    }

    /// Counts what was answered.
    fn count(&self, action: &'static str, tenant: &str, key: &str, tier: Option<&'static str>) {
        let act = Act { action, tenant, key, outcome: Outcome::Found, tier, code: None };
        self.service.audit.count(self.account, act, self.service.resolver.clock.now());
    }

    /// Does what changes a secret, on record: that it is begun, before it is, and how it
    /// ended, before the answer. What cannot be recorded is not begun.
    async fn recorded<T, E: Into<Problem>>(
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

    fn tenant_for(&self, action: Action, tenant: &str) -> Result<Tenant, Problem> {
        let tenant = decode(tenant).and_then(|tenant| tenant.parse::<Tenant>().ok());
        let tenant = tenant.ok_or_else(Problem::invalid_tenant)?;
        self.grant.allow_tenant(action, tenant.as_str())?;
        Ok(tenant)
    }

    fn secret_for(&self, action: Action, tenant: &str, key: &str) -> Result<(Tenant, SecretKey), Problem> {
        let (tenant, key) = decoded(tenant, key)?;
        let name = SecretName::parse(&tenant, &key)?;
        self.grant.allow(action, name.tenant(), name.key())?;
        Ok(name.to_owned())
    }

    /// Who writes to this tenant, and which of its keys a value may refer to: those that the token
    /// may read there.
    fn writer(&self, tenant: &Tenant) -> Writer {
        let (grant, tenant) = (self.account.who.grant.clone(), tenant.clone());
        let reaches = move |name: &str| {
            grant.as_ref().is_some_and(|grant| grant.allow(Action::Read, tenant.as_str(), name).is_ok())
        };
        Writer::reaching(&self.grant.name, Arc::new(reaches))
    }

    fn want(&self) -> Want {
        let no_cache = self.headers.get_all(header::CACHE_CONTROL).iter().any(|value| {
            value.to_str().is_ok_and(|value| value.split(',').any(|word| word.trim().eq_ignore_ascii_case("no-cache")))
        });
        if no_cache { Want::Revalidated } else { Want::Cached }
    }

    /// Whether the bare value is wanted: `text/plain` is named, and JSON is not.
    pub(super) fn wants_text(&self) -> bool {
        let Some(accept) = self.headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()) else {
            return false;
        };
        let first = accept.split(',').map(|range| range.split(';').next().unwrap_or("").trim());
        let named = first.into_iter().find(|range| matches!(*range, "text/plain" | "application/json"));
        named == Some("text/plain")
    }

    fn known(&self, found: &answer::Answer) -> bool {
        self.headers.get_all(header::IF_NONE_MATCH).iter().any(|value| {
            value.to_str().is_ok_and(|value| value.split(',').any(|tag| tag.trim() == "*" || found.etag_is(tag)))
        })
    }

    /// The condition of a write. `If-Match` lists validators, or `*`; of `If-None-Match`
    /// only `*` makes sense here.
    fn condition(&self) -> Result<Condition, Problem> {
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

    fn version(&self) -> Result<Option<Version>, Problem> {
        let wrong = || Problem::invalid_query("version takes a number from 1 on, as in ?version=3");
        let parse = |text: &str| text.parse().ok().and_then(Version::new).ok_or_else(wrong);
        self.query.get("version").map(parse).transpose()
    }

    fn flag(&self, name: &'static str) -> Result<bool, Problem> {
        match self.query.get(name) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(Problem::invalid_query(format!("{name} takes true or false, as in ?{name}=true"))),
        }
    }
}

fn decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains('%') {
        return Some(Cow::Borrowed(text));
    }
    percent_decode_str(text).decode_utf8().ok()
}

fn decoded<'a>(tenant: &'a str, key: &'a str) -> Result<(Cow<'a, str>, Cow<'a, str>), Problem> {
    let tenant = decode(tenant).ok_or_else(Problem::invalid_tenant)?;
    let key = decode(key).ok_or_else(Problem::invalid_key)?;
    Ok((tenant, key))
}

/// Names in it are escaped so that a terminal shows them as they are; read, they are the same.
fn json(body: &impl Serialize) -> Bytes {
    // Our own structs of texts and numbers always serialise.
    legible::lines_of(serde_json::to_vec(body).unwrap_or_default()).into()
}

fn wrote(status: StatusCode, tenant: &Tenant, key: &SecretKey, written: &Written) -> Answer {
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

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BatchGet {
    /// The keys, at most 1000.
    keys: Vec<String>,
}

/// A secret with its value.
#[derive(Serialize, ToSchema)]
pub(super) struct SecretBody {
    tenant: String,
    key: String,
    value: String,
    version: i64,
}

#[derive(Serialize, ToSchema)]
pub(super) struct BatchBody {
    secrets: Vec<SecretBody>,
    missing: Vec<String>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Put {
    /// The new value.
    #[serde(deserialize_with = "secret::deserialize_value")]
    #[schema(value_type = String)]
    value: SecretValue,
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

#[derive(Serialize, ToSchema)]
pub(super) struct VersionList<'a> {
    tenant: &'a str,
    key: &'a str,
    /// Newest first.
    versions: Vec<VersionEntry<'a>>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct VersionEntry<'a> {
    version: i64,
    /// RFC 3339, UTC.
    created_at: String,
    /// Who gave the value, or deleted it: `infisical` or `database`.
    source: &'a str,
    /// The name of the token that wrote it, or `infisical` where a read of the folder told of it.
    by: &'a str,
    /// Whether it is a deletion.
    deleted: bool,
    /// Whether it is the newest.
    current: bool,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Rollback {
    /// The version whose value is to come back.
    version: i64,
}

#[derive(Serialize, ToSchema)]
pub(super) struct TenantList {
    tenants: Vec<TenantSummary>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Refreshed<'a> {
    tenant: &'a str,
    /// Secrets in the folder; null where the token does not reach every key.
    keys: Option<usize>,
    /// Whether the folder differs from what was held.
    changed: bool,
}

/// A token, as its holder is told of it.
#[derive(Serialize, ToSchema)]
pub(super) struct WhoAmI<'a> {
    name: &'a str,
    /// The public part of the token.
    id: &'a str,
    /// The tenants it reaches, as globs.
    tenants: Vec<&'a str>,
    /// The keys it reaches there, as globs.
    keys: Vec<&'a str>,
    /// What it may do there: `read`, `write`, `admin`.
    actions: Vec<&'static str>,
    /// When it ends, in RFC 3339, UTC; null where it does not.
    expires_at: Option<String>,
    /// Seconds until then.
    expires_in_seconds: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_knows_its_routes_and_no_others() {
        assert_eq!(Route::find("/v1/whoami"), Some(Route::WhoAmI));
        assert_eq!(Route::find("/v1/hooks/infisical"), Some(Route::Webhook));
        assert_eq!(Route::find("/v1/hooks"), None);
        assert_eq!(Route::find("/v1/tenants/a/secrets/b"), Some(Route::Secret("a", "b")));
        assert_eq!(Route::find("/v1/tenants/a/secrets/b%2Fc"), Some(Route::Secret("a", "b%2Fc")));
        assert_eq!(Route::find("/v1/tenants/a/secrets/explain"), Some(Route::Secret("a", "explain")));
        assert_eq!(Route::find("/v1/tenants/a/secrets/b/explain"), Some(Route::Explain("a", "b")));
        assert_eq!(Route::find("/v1/tenants/a/secrets/batch-get"), Some(Route::BatchGet("a")));
        // A secret's name is told by its place, whatever it is.
        for name in ["versions", "rollback", "explain"] {
            assert_eq!(Route::find(&format!("/v1/tenants/a/secrets/{name}")), Some(Route::Secret("a", name)));
        }
        for name in ["b", "versions", "rollback", "batch-get"] {
            let below = |what| format!("/v1/tenants/a/secrets/{name}/{what}");
            assert_eq!(Route::find(&below("versions")), Some(Route::Versions("a", name)));
            assert_eq!(Route::find(&below("rollback")), Some(Route::Rollback("a", name)));
            assert_eq!(Route::find(&below("batch-get")), None);
        }
        for wrong in
            ["/", "", "/v1", "/v1/tenants/a/secrets/b/c", "/v1/tenants/a/secrets/b/explain/", "/healthz/", "//"]
        {
            assert_eq!(Route::find(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_name_is_shown_as_it_reads_unless_it_would_not_read_well() {
        assert_eq!((legible("%41"), legible("%00")), (Cow::Borrowed("A"), Cow::Borrowed("%00")));
        assert_eq!((legible("\u{9b}é"), legible("é")), (Cow::Borrowed("%C2%9B%C3%A9"), Cow::Borrowed("é")));
    }
}
