//! How the proxy is doing, for everybody: alive, ready by tier. And for callers with a token: the metrics
//! page.

use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use utoipa::{OpenApi, ToSchema};

use crate::{
    phase::Phase,
    resolver::{Cause, UpstreamState},
    server::{
        Service,
        ask::Ask,
        budgets::Thing,
        exposition,
        operation::{Operation, Run},
        respond::{Answer, JSON, Problem, TEXT, respond},
    },
};

#[derive(OpenApi)]
#[openapi(paths(alive, ready, metrics))]
pub(super) struct Document;

pub(in crate::server) const ALIVE: Operation = Operation { action: "health", parameters: &[], run: Run::Open(alive) };
pub(in crate::server) const READY: Operation = Operation { action: "health", parameters: &[], run: Run::Open(ready) };
pub(in crate::server) const METRICS: Operation =
    Operation { action: "metrics", parameters: &[], run: Run::Read(|ask, _| Box::pin(metrics(ask))) };

/// Whether lookups can be answered, and what each tier is up to.
#[derive(Debug, Serialize, ToSchema)]
pub struct Readiness {
    /// `ready`; `degraded` where a tier is down and others answer, or the audit is (200); `unavailable`
    /// where only memory is left (503).
    pub status: &'static str,
    /// Each tier, nearest first.
    pub tiers: Tiers,
    /// Whether accesses are being recorded.
    pub audit: AuditReadiness,
    /// Where the instance was started from, while that is all it answers: `offline_file`, for
    /// the database has not answered since.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_from: Option<&'static str>,
    /// Since when the database has not been heard of, in RFC 3339, where that is longer than
    /// `database.max_detached`: then nothing is answered behind a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detached_since: Option<String>,
}

/// The state of the audit.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuditReadiness {
    /// `up`, or `down` where records could not be written when that was last tried.
    pub state: &'static str,
}

/// The tiers.
#[derive(Debug, Serialize, ToSchema)]
pub struct Tiers {
    /// The nearest.
    pub memory: MemoryReadiness,
    /// The middle one.
    pub database: TierReadiness,
    /// The farthest.
    pub infisical: TierReadiness,
}

/// Memory cannot fail; this is how full it is.
#[derive(Debug, Serialize, ToSchema)]
pub struct MemoryReadiness {
    /// Always `up`.
    pub state: &'static str,
    /// Secrets and known absences held.
    pub entries: usize,
    /// Bytes held.
    pub bytes: u64,
}

/// The state of a tier that can fail.
#[derive(Debug, Serialize, ToSchema)]
pub struct TierReadiness {
    /// `up`, `down`, `unknown` (not asked yet), `login_refused`, `rate_limited`, `rejected` (it answers, but has
    /// nothing under the configured project, environment or path), or `off`.
    pub state: &'static str,
    /// `refused` where the last write was, of the database: it is read-only, or its disk is full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub writes: Option<&'static str>,
    /// Why upstream is not `up`, in one word, as in an answer's `cause`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'static str>,
    /// Calls left in the budget, for upstream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget_left: Option<u32>,
}

#[utoipa::path(
    get, path = "/healthz", operation_id = "healthz",
    description = "Whether the process is alive.",
    security(()),
    responses((status = 200, content((String = "text/plain")), description = "It is: `ok`"))
)]
fn alive(_: &Service) -> Answer {
    respond(StatusCode::OK, TEXT, "ok\n".into())
}

#[utoipa::path(
    get, path = "/readyz", operation_id = "readyz",
    description = "Whether lookups can be answered, and each tier's state.",
    security(()),
    responses(
        (status = 200, body = Readiness, description = "`ready` or `degraded`"),
        (status = 503, body = Readiness, description = "`unavailable`")
    )
)]
fn ready(service: &Service) -> Answer {
    let resolver = &service.resolver;
    let needs_upstream = resolver.policies().uses(Phase::owned_upstream);
    let (database_up, takes_writes) = (resolver.database().is_up(), resolver.database().is_writable());
    let health = resolver.upstream().filter(|_| needs_upstream).map(|upstream| upstream.health());
    let upstream_up =
        health.as_ref().is_some_and(|health| matches!(health.state, UpstreamState::Up | UpstreamState::Unknown));
    let audit_up = service.audit.is_up();
    let offline = resolver.offline();
    let started_from = offline.is_offline().then_some("offline_file");
    let attachment = &service.attachment;
    let detached_since = (!attachment.holds_now()).then(|| attachment.since().to_rfc3339());
    let (status, code) = match (database_up, needs_upstream, upstream_up) {
        _ if detached_since.is_some() => ("unavailable", StatusCode::SERVICE_UNAVAILABLE),
        _ if started_from.is_some() && offline.is_over(resolver.clock().moment()) => {
            ("unavailable", StatusCode::SERVICE_UNAVAILABLE)
        }
        _ if started_from.is_some() => ("degraded", StatusCode::OK),
        (true, false, _) | (true, true, true) if !audit_up || !takes_writes => ("degraded", StatusCode::OK),
        (true, false, _) | (true, true, true) => ("ready", StatusCode::OK),
        (true, true, false) | (false, true, true) => ("degraded", StatusCode::OK),
        (false, false, _) | (false, true, false) => ("unavailable", StatusCode::SERVICE_UNAVAILABLE),
    };
    let readiness = Readiness {
        status,
        tiers: Tiers {
            memory: MemoryReadiness {
                state: "up",
                entries: resolver.memory().len(),
                bytes: resolver.memory().weight(),
            },
            database: TierReadiness {
                state: if database_up { "up" } else { "down" },
                writes: (!takes_writes).then_some("refused"),
                cause: None,
                budget_left: None,
            },
            infisical: TierReadiness {
                state: health.as_ref().map_or("off", |health| health.state.as_str()),
                writes: None,
                cause: health.as_ref().and_then(|health| health.cause).map(Cause::as_str),
                budget_left: health.and_then(|health| health.budget_left),
            },
        },
        audit: AuditReadiness { state: if audit_up { "up" } else { "down" } },
        started_from,
        detached_since,
    };
    // A struct of words and numbers always serialises.
    respond(code, JSON, serde_json::to_vec(&readiness).unwrap_or_default().into())
}

#[utoipa::path(
    get, path = "/metrics", operation_id = "metrics",
    description = "Metrics: in OpenMetrics where Accept prefers it, else in Prometheus' text format.",
    responses((
        status = 200,
        content((String = "text/plain"), (String = "application/openmetrics-text")),
        description = "The metrics",
        headers(("Vary" = String))
    ))
)]
async fn metrics(ask: &Ask<'_>) -> Result<Answer, Problem> {
    ask.count("metrics", "", "", None);
    let service = ask.service;
    show(service);
    show_upstream(service);
    const TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    const OPENMETRICS: HeaderValue =
        HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    let (content_type, page) = match exposition::prefers_openmetrics(ask.headers) {
        true => (OPENMETRICS, service.metrics.render_openmetrics()),
        false => (TEXT, service.metrics.render()),
    };
    let mut answer = respond(StatusCode::OK, content_type, page.into());
    answer.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    Ok(answer)
}

/// Sets the gauges that are read when the page is.
fn show(service: &Service) {
    let (resolver, metrics) = (&service.resolver, &service.metrics);
    let set = |name, value| metrics.gauge(name, &[], value);
    set("secretier_memory_entries", resolver.memory().len() as f64);
    set("secretier_memory_bytes", resolver.memory().weight() as f64);
    set("secretier_memory_capacity_bytes", resolver.memory().capacity() as f64);
    set("secretier_offline", flag(resolver.offline().is_offline()));
    if let Some((age, bytes)) = resolver.offline().file(resolver.clock().now()) {
        set("secretier_offline_file_age_seconds", age.as_secs_f64());
        set("secretier_offline_file_bytes", bytes as f64);
    }
    set("secretier_keys_not_locked", resolver.keys_not_locked() as f64);
    set("secretier_database_up", flag(resolver.database().is_up()));
    set("secretier_database_writable", flag(resolver.database().is_writable()));
    let news = resolver.clock().now().since(service.attachment.since());
    set("secretier_database_news_age_seconds", news.as_secs_f64());
    set("secretier_max_detached_seconds", service.attachment.max_detached().as_secs_f64());
    set("secretier_audit_up", flag(service.audit.is_up()));
    let (waiting, sums) = service.audit.waiting();
    metrics.gauge("secretier_audit_waiting", &[("kind", "record")], waiting as f64);
    metrics.gauge("secretier_audit_waiting", &[("kind", "sum")], sums as f64);
    let (loads, snapshots) = resolver.flights();
    metrics.gauge("secretier_flights", &[("kind", "load")], loads as f64);
    metrics.gauge("secretier_flights", &[("kind", "snapshot")], snapshots as f64);
    set("secretier_connections", service.connections.len() as f64);
    set("secretier_requests_in_flight", service.budgets.held(Thing::Place) as f64);
    service.budgets.show(metrics);
    set("secretier_peers", service.access.peers() as f64);
}

fn show_upstream(service: &Service) {
    let metrics = &service.metrics;
    let Some(upstream) = service.resolver.upstream() else { return };
    let health = upstream.health();
    if let Some(left) = health.budget_left {
        metrics.gauge("secretier_upstream_budget_left", &[], f64::from(left));
    }
    metrics.gauge("secretier_upstream_up", &[], flag(health.state == UpstreamState::Up));
    for state in UpstreamState::ALL {
        metrics.gauge("secretier_upstream_state", &[("state", state.as_str())], flag(health.state == state));
    }
    for cause in Cause::ALL {
        metrics.gauge("secretier_upstream_cause", &[("cause", cause.as_str())], flag(health.cause == Some(cause)));
    }
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}
