//! The API's own description (OpenAPI 3.1), for `GET /openapi.json`.

#![expect(dead_code, reason = "the functions below only carry attributes; nothing calls them")]

use std::sync::OnceLock;
use utoipa::OpenApi;

use super::{health, lists, respond, routes, webhooks};
use crate::resolver;

/// The description as JSON, made once.
pub fn document() -> &'static str {
    static DOCUMENT: OnceLock<String> = OnceLock::new();
    // A description of types always serialises.
    DOCUMENT.get_or_init(|| Description::openapi().to_json().unwrap_or_default())
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "secretier",
        description = "Secrets of tenants, from memory, an encrypted database and Infisical. \
            Every answer says in Cache-Status which tier it came from. A request takes the parameters that are listed \
            for it, each once; any other is 400 invalid_query."
    ),
    paths(
        get_secret, put_secret, delete_secret, list_versions, roll_back_secret, explain_secret, list_secrets, batch_get, list_tenants, get_tenant,
        refresh_tenant, take_notice, search_audit, who_am_i, healthz, readyz, metrics, openapi_json
    ),
    components(schemas(
        routes::SecretBody, routes::BatchBody, routes::BatchGet, lists::KeyList, lists::KeyEntry, routes::Put,
        routes::Wrote, routes::VersionList, routes::VersionEntry, routes::Rollback, routes::TenantList, routes::Refreshed, routes::WhoAmI, webhooks::WebhookTaken, resolver::TenantSummary, resolver::Explanation,
        health::Readiness, respond::ProblemBody, super::query::AuditPage
    )),
    modifiers(&Bearer),
    security(("token" = []))
)]
struct Description;

struct Bearer;

impl utoipa::Modify for Bearer {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("secretier token create"));
        let components = api.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(scheme.build()));
    }
}

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/secrets/{key}",
    description = "One secret; with `Accept: text/plain` its bare value.",
    params(
        ("tenant" = String, Path, description = "The tenant's subdomain"),
        ("key" = String, Path, description = "The secret's name, percent-encoded"),
        ("version" = Option<i64>, Query, description = "An older version, where it is kept"),
        ("Cache-Control" = Option<String>, Header, description = "`no-cache` goes past memory and revalidates the copy"),
        ("If-None-Match" = Option<String>, Header, description = "An ETag held from before")
    ),
    responses(
        (status = 200, body = routes::SecretBody),
        (status = 304, description = "Not modified"),
        (status = 400, body = respond::ProblemBody, description = "invalid_tenant, invalid_key, invalid_query, invalid_request"),
        (status = 401, body = respond::ProblemBody, description = "token_missing, token_invalid, token_expired"),
        (status = 403, body = respond::ProblemBody, description = "out_of_scope, bad_host, forwarded_request"),
        (status = 404, body = respond::ProblemBody, description = "secret_not_found, also for an unknown tenant"),
        (status = 429, body = respond::ProblemBody, description = "rate_limited; see Retry-After"),
        (status = 503, body = respond::ProblemBody, description = "unavailable, upstream_denied; see Retry-After")
    )
)]
fn get_secret() {}

#[utoipa::path(
    put, path = "/v1/tenants/{tenant}/secrets/{key}",
    description = "Writes a secret to its owner.",
    params(
        ("tenant" = String, Path, description = "The tenant's subdomain"),
        ("key" = String, Path, description = "The secret's name, percent-encoded"),
        ("create_tenant" = Option<bool>, Query, description = "Whether to make the tenant where nobody knows it"),
        ("If-Match" = Option<String>, Header, description = "Write only over this ETag, or `*` over any"),
        ("If-None-Match" = Option<String>, Header, description = "`*`: write only where there is none")
    ),
    request_body = routes::Put,
    responses(
        (status = 200, body = routes::Wrote, description = "A new version"),
        (status = 201, body = routes::Wrote, description = "A new secret"),
        (status = 400, body = respond::ProblemBody, description = "invalid_tenant, invalid_key, invalid_query, invalid_body"),
        (status = 404, body = respond::ProblemBody, description = "tenant_unknown, without `create_tenant=true`"),
        (status = 409, body = respond::ProblemBody, description = "version_conflict, approval_required, upstream_read_only"),
        (status = 413, body = respond::ProblemBody, description = "value_too_large"),
        (status = 503, body = respond::ProblemBody, description = "unavailable, upstream_denied")
    )
)]
fn put_secret() {}

#[utoipa::path(
    delete, path = "/v1/tenants/{tenant}/secrets/{key}",
    description = "Deletes a secret at its owner.",
    params(
        ("tenant" = String, Path, description = "The tenant's subdomain"),
        ("key" = String, Path, description = "The secret's name, percent-encoded"),
        ("If-Match" = Option<String>, Header, description = "Delete only this ETag")
    ),
    responses(
        (status = 204, description = "Deleted"),
        (status = 400, body = respond::ProblemBody, description = "invalid_tenant, invalid_key, invalid_body"),
        (status = 404, body = respond::ProblemBody),
        (status = 409, body = respond::ProblemBody, description = "version_conflict"),
        (status = 503, body = respond::ProblemBody)
    )
)]
fn delete_secret() {}

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/secrets/{key}/versions",
    description = "The versions of a secret that are kept, newest first, without their values.",
    params(
        ("tenant" = String, Path, description = "The tenant's subdomain"),
        ("key" = String, Path, description = "The secret's name, percent-encoded")
    ),
    responses(
        (status = 200, body = routes::VersionList),
        (status = 404, body = respond::ProblemBody),
        (status = 503, body = respond::ProblemBody, description = "unavailable, upstream_denied")
    )
)]
fn list_versions() {}

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/secrets/{key}/rollback",
    description = "Writes the value of an older version to the secret's owner, as a new version.",
    params(
        ("tenant" = String, Path, description = "The tenant's subdomain"),
        ("key" = String, Path, description = "The secret's name, percent-encoded"),
        ("If-Match" = Option<String>, Header, description = "Write only over this ETag, or `*` over any"),
        ("If-None-Match" = Option<String>, Header, description = "`*`: write only where there is none, after a deletion")
    ),
    request_body = routes::Rollback,
    responses(
        (status = 200, body = routes::Wrote, description = "A new version"),
        (status = 400, body = respond::ProblemBody, description = "invalid_tenant, invalid_key, invalid_body"),
        (status = 404, body = respond::ProblemBody, description = "secret_not_found: no value of that version is kept"),
        (status = 409, body = respond::ProblemBody, description = "version_conflict, approval_required, upstream_read_only"),
        (status = 503, body = respond::ProblemBody, description = "unavailable, upstream_denied")
    )
)]
fn roll_back_secret() {}

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/secrets/{key}/explain",
    description = "What each tier has for a key, without the value, and why the answer is what it is.",
    params(
        ("tenant" = String, Path, description = "The tenant's subdomain"),
        ("key" = String, Path, description = "The secret's name, percent-encoded")
    ),
    responses((status = 200, body = resolver::Explanation))
)]
fn explain_secret() {}

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/secrets",
    description = "Those of a tenant's keys that the token reaches, by name; `values=true` adds their values.",
    params(
        ("tenant" = String, Path, description = "The tenant's subdomain"),
        ("values" = Option<bool>, Query, description = "Whether to add the values")
    ),
    responses((status = 200, body = lists::KeyList), (status = 404, body = respond::ProblemBody))
)]
fn list_secrets() {}

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/secrets/batch-get",
    description = "Several secrets of one tenant at once.",
    params(("tenant" = String, Path, description = "The tenant's subdomain")),
    request_body = routes::BatchGet,
    responses(
        (status = 200, body = routes::BatchBody),
        (status = 403, body = respond::ProblemBody, description = "out_of_scope, if the token does not reach one of the keys")
    )
)]
fn batch_get() {}

#[utoipa::path(
    get, path = "/v1/tenants",
    description = "The tenants that the token reaches.",
    responses((status = 200, body = routes::TenantList))
)]
fn list_tenants() {}

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}",
    description = "One tenant.",
    params(("tenant" = String, Path, description = "The tenant's subdomain")),
    responses((status = 200, body = resolver::TenantSummary), (status = 404, body = respond::ProblemBody))
)]
fn get_tenant() {}

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/refresh",
    description = "Reads the tenant's folder now.",
    params(("tenant" = String, Path, description = "The tenant's subdomain")),
    responses(
        (status = 200, body = routes::Refreshed),
        (status = 404, body = respond::ProblemBody),
        (status = 409, body = respond::ProblemBody, description = "not_owned_upstream: the database owns this tenant"),
        (status = 503, body = respond::ProblemBody, description = "unavailable, upstream_denied; see Retry-After")
    )
)]
fn refresh_tenant() {}

#[utoipa::path(
    post, path = "/v1/hooks/infisical",
    description = "A webhook of Infisical: a folder has changed. Wants no token but a signature, and is there only \
        where `infisical.webhook_secret` is set.",
    security(()),
    params(("x-infisical-signature" = String, Header, description = "`t=<ms>;<hex>`: HMAC-SHA256 of the body")),
    request_body(content = serde_json::Value, description = "At most 64 KiB"),
    responses(
        (status = 202, body = webhooks::WebhookTaken, description = "Taken, or none of this instance's affairs"),
        (status = 400, body = respond::ProblemBody, description = "invalid_body"),
        (status = 401, body = respond::ProblemBody, description = "signature_invalid, signature_expired"),
        (status = 409, body = respond::ProblemBody, description = "webhook_replayed"),
        (status = 413, body = respond::ProblemBody, description = "value_too_large"),
        (status = 429, body = respond::ProblemBody, description = "rate_limited; see Retry-After"),
        (status = 503, body = respond::ProblemBody, description = "unavailable, audit_unavailable; see Retry-After")
    )
)]
fn take_notice() {}

#[utoipa::path(
    get, path = "/v1/audit",
    description = "Who asked for what, newest first. For tokens that may administer; one that reaches some tenants or \
        keys names one of those.",
    params(
        ("tenant" = Option<String>, Query, description = "Of this tenant"),
        ("key" = Option<String>, Query, description = "Of this secret"),
        ("actor" = Option<String>, Query, description = "By this token, by name or id, or by `uid:N`"),
        ("outcome" = Option<String>, Query, description = "`found`, `absent`, `begun`, `done`, `conflict`, `denied`, \
            `limited`, `invalid` or `failed`"),
        ("since" = Option<String>, Query, description = "From then on (RFC 3339)"),
        ("until" = Option<String>, Query, description = "Before then (RFC 3339)"),
        ("limit" = Option<i64>, Query, description = "At most so many, from 1 to 1000; 100 by default"),
        ("after" = Option<String>, Query, description = "What the page before gave as `next`")
    ),
    responses((status = 200, body = super::query::AuditPage), (status = 400, body = respond::ProblemBody))
)]
fn search_audit() {}

#[utoipa::path(
    get, path = "/v1/whoami",
    description = "The token that asks: what it reaches, and until when.",
    responses((status = 200, body = routes::WhoAmI))
)]
fn who_am_i() {}

#[utoipa::path(get, path = "/healthz", description = "Whether the process is alive.", security(()), responses((status = 200)))]
fn healthz() {}

#[utoipa::path(
    get, path = "/readyz",
    description = "Whether lookups can be answered, and each tier's state.",
    security(()),
    responses((status = 200, body = health::Readiness), (status = 503, body = health::Readiness))
)]
fn readyz() {}

#[utoipa::path(get, path = "/metrics", description = "Metrics, in Prometheus text format.", responses((status = 200, body = String)))]
fn metrics() {}

#[utoipa::path(get, path = "/openapi.json", description = "This description.", responses((status = 200)))]
fn openapi_json() {}
