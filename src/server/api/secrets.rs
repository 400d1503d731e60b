//! One secret: read, written, deleted, explained.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use utoipa::{OpenApi, ToSchema};

use crate::{
    access::Action,
    resolver::{Explanation, NewTenant},
    secret::{self, SecretName, SecretValue},
    server::{
        ask::{Ask, Wrote, decoded, json, wrote},
        operation::{Operation, Run},
        respond::{
            Answer, CACHE_STATUS, JSON, Problem, ProblemBody, REQUEST_ID, Told, cache_status_header, respond, ttl,
        },
    },
};

#[derive(OpenApi)]
#[openapi(paths(read, put, delete, explain), components(schemas(SecretBody)))]
pub(super) struct Document;

/// The lookup, which is not boxed: it must not pay for the size of the others.
pub(in crate::server) const READ: Operation = Operation { action: "read", parameters: &["version"], run: Run::Lookup };
pub(in crate::server) const PUT: Operation =
    Operation { action: "put", parameters: &["create_tenant"], run: Run::Write(|ask, body| Box::pin(put(ask, body))) };
pub(in crate::server) const DELETE: Operation =
    Operation { action: "delete", parameters: &[], run: Run::Write(|ask, _| Box::pin(delete(ask))) };
pub(in crate::server) const EXPLAIN: Operation =
    Operation { action: "explain", parameters: &[], run: Run::Read(|ask, _| Box::pin(explain(ask))) };

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/secrets/{key}", operation_id = "get_secret",
    description = "One secret. Its bare value where `Accept` gives `text/plain` more weight than `application/json`, or the \
        same weight and names it first.",
    params(
        ("version" = Option<i64>, Query, minimum = 1, description = "An older version, where it is kept"),
        ("Cache-Control" = Option<String>, Header, description = "`no-cache` goes past memory and revalidates the copy"),
        ("If-None-Match" = Option<String>, Header, description = "An ETag held from before")
    ),
    responses(
        (
            status = 200, content((SecretBody = "application/json"), (String = "text/plain")),
            description = "The secret, or its bare value",
            headers(("ETag" = String), ("Age" = u64), ("Cache-Status" = String))
        ),
        (
            status = 304, description = "It has one of the ETags in `If-None-Match`",
            headers(("ETag" = String), ("Age" = u64), ("Cache-Status" = String))
        ),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`"),
        (
            status = 404, body = ProblemBody, description = "`secret_not_found`, also for an unknown tenant",
            headers(("Cache-Status" = String))
        ),
        (status = 503, body = ProblemBody, description = "`upstream_denied`, `secret_unavailable`")
    )
)]
pub(in crate::server) async fn read(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let (tenant, key) = decoded(ask.names)?;
    let name = SecretName::parse(&tenant, &key)?;
    ask.grant.allow(Action::Read, name.tenant(), name.key())?;
    let version = ask.version()?;
    let resolved = match version {
        None => ask.service.resolver.resolve(name, ask.want()).await?,
        Some(version) => ask.service.resolver.resolve_version(name, version, ask.want()).await?,
    };
    let now = ask.service.resolver.clock().moment();
    ask.saw(name, &resolved, now);
    let Some(found) = resolved.answer() else {
        let problem = if version.is_none() { Problem::not_found() } else { Problem::no_version() };
        let mut answer = problem.into_response();
        if let Ok(id) = HeaderValue::from_str(ask.account.request_id()) {
            answer.headers_mut().insert(REQUEST_ID, id);
        }
        ask.service.metrics.count("secretier_errors_total", &[("code", "secret_not_found")]);
        answer
            .headers_mut()
            .insert(CACHE_STATUS, cache_status_header(&resolved.cache_status, ttl(&resolved.entry, now)));
        return Ok(answer);
    };
    let told = Told::secret(found, &resolved, ask.wants_text(), now);
    let told = if ask.known(found) { told.not_modified() } else { told };
    Ok(told.into_answer(HeaderMap::new(), None))
}

#[utoipa::path(
    put, path = "/v1/tenants/{tenant}/secrets/{key}", operation_id = "put_secret",
    description = "Writes a secret to its owner.",
    params(
        ("create_tenant" = Option<bool>, Query, description = "Whether to make the tenant where nobody knows it"),
        ("If-Match" = Option<String>, Header, description = "Write only over this ETag, or `*` over any"),
        ("If-None-Match" = Option<String>, Header, pattern = r"^\*$", description = "`*`: write only where there is none")
    ),
    request_body(content = Put, description = "At most six times `server.max_value` (1 MiB) and 1 KiB"),
    responses(
        (status = 200, body = Wrote, description = "A new version", headers(("ETag" = String))),
        (status = 201, body = Wrote, description = "A new secret", headers(("ETag" = String))),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`, `invalid_body`, `reference_not_allowed`"),
        (status = 404, body = ProblemBody, description = "`tenant_unknown`, without `create_tenant=true`"),
        (status = 409, body = ProblemBody, description = "`version_conflict`, `approval_required`, `upstream_read_only`"),
        (status = 413, body = ProblemBody, description = "The value, or what upstream would have to take, is too large"),
        (status = 503, body = ProblemBody, description = "`upstream_denied`")
    )
)]
async fn put(ask: &Ask<'_>, body: Incoming) -> Result<Answer, Problem> {
    let (tenant, key) = ask.secret_for(Action::Write)?;
    let condition = ask.condition()?;
    let new_tenant = if ask.flag("create_tenant")? { NewTenant::Created } else { NewTenant::Refused };
    // A byte may take six as an escape.
    let max_value = ask.service.limits().max_value;
    let limit = max_value.saturating_mul(6).saturating_add(1024);
    let put: Put = ask.read(body, limit).await?;
    if put.value.len() as u64 > max_value {
        return Err(Problem::too_large());
    }
    let writer = ask.writer(&tenant);
    let putting = ask.service.resolver.put(&tenant, &key, &put.value, &condition, &writer, new_tenant);
    let written = ask.recorded("put", &tenant, &key, putting, |written| written.tier).await?;
    tracing::info!(%tenant, %key, token = ask.grant.name, peer = %ask.account.who.peer, created = written.created, "a secret was written");
    let status = if written.created { StatusCode::CREATED } else { StatusCode::OK };
    Ok(wrote(status, &tenant, &key, &written))
}

#[utoipa::path(
    delete, path = "/v1/tenants/{tenant}/secrets/{key}", operation_id = "delete_secret",
    description = "Deletes a secret at its owner.",
    params(
        ("If-Match" = Option<String>, Header, description = "Delete only this ETag, or `*` any"),
        ("If-None-Match" = Option<String>, Header, pattern = r"^\*$", description = "`*`: delete only where there is none, which is never so")
    ),
    responses(
        (status = 204, description = "Deleted"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`, `invalid_body` (of a condition)"),
        (status = 404, body = ProblemBody, description = "`secret_not_found`, also for an unknown tenant"),
        (status = 409, body = ProblemBody, description = "`version_conflict`, `approval_required`, `upstream_read_only`"),
        (status = 503, body = ProblemBody, description = "`upstream_denied`")
    )
)]
async fn delete(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let (tenant, key) = ask.secret_for(Action::Write)?;
    let condition = ask.condition()?;
    let writer = ask.writer(&tenant);
    let deleting = async {
        let deleted = ask.service.resolver.delete(&tenant, &key, &condition, &writer).await?;
        deleted.ok_or_else(Problem::not_found)
    };
    ask.recorded("delete", &tenant, &key, deleting, |tier| *tier).await?;
    tracing::info!(%tenant, %key, token = ask.grant.name, peer = %ask.account.who.peer, "a secret was deleted");
    let mut answer = respond(StatusCode::NO_CONTENT, JSON, Bytes::new());
    answer.headers_mut().remove(header::CONTENT_TYPE);
    Ok(answer)
}

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/secrets/{key}/explain", operation_id = "explain_secret",
    description = "What each tier has for a key, without the value, and why the answer is what it is.",
    responses(
        (status = 200, body = Explanation, description = "What each tier has"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`")
    )
)]
async fn explain(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let (tenant, key) = decoded(ask.names)?;
    let name = SecretName::parse(&tenant, &key)?;
    ask.grant.allow(Action::Read, name.tenant(), name.key())?;
    ask.service.resolver.may_serve(name)?;
    ask.count("explain", name.tenant(), name.key(), None);
    Ok(respond(StatusCode::OK, JSON, json(&ask.service.resolver.explain(name).await)))
}

/// A secret with its value.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct SecretBody {
    tenant: String,
    key: String,
    value: String,
    version: i64,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::server) struct Put {
    /// The new value: at most `server.max_value` bytes of UTF-8, 1 MiB by default.
    #[serde(deserialize_with = "secret::deserialize_value")]
    #[schema(value_type = String)]
    value: SecretValue,
}
