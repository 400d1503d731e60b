//! The versions of a secret that are kept.

use http::StatusCode;
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use utoipa::{OpenApi, ToSchema};

use crate::{
    access::Action,
    resolver::Older,
    secret::{SecretName, Version},
    server::{
        ask::{Ask, Wrote, json, wrote},
        operation::{Operation, Run},
        respond::{Answer, JSON, Problem, ProblemBody, respond},
    },
};

#[derive(OpenApi)]
#[openapi(paths(list, roll_back))]
pub(super) struct Document;

pub(in crate::server) const LIST: Operation =
    Operation { action: "versions", parameters: &[], run: Run::Read(|ask, _| Box::pin(list(ask))) };
pub(in crate::server) const ROLLBACK: Operation =
    Operation { action: "rollback", parameters: &[], run: Run::Write(|ask, body| Box::pin(roll_back(ask, body))) };

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/secrets/{key}/versions", operation_id = "list_versions",
    description = "The versions of a secret that are kept, newest first, without their values.",
    responses(
        (status = 200, body = VersionList, description = "The versions"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`"),
        (status = 404, body = ProblemBody, description = "`secret_not_found`: none is kept, or there is no such tenant"),
        (status = 503, body = ProblemBody, description = "`upstream_denied`, `secret_unavailable`")
    )
)]
async fn list(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let (tenant, key) = ask.secret_for(Action::Read)?;
    let revisions = ask.service.resolver.versions(SecretName::of(&tenant, &key)).await?;
    if revisions.is_empty() {
        return Err(Problem::not_found());
    }
    ask.count("versions", tenant.as_str(), key.as_str(), None);
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

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/secrets/{key}/rollback", operation_id = "roll_back_secret",
    description = "Writes the value of an older version to the secret's owner, as a new version.",
    params(
        ("If-Match" = Option<String>, Header, description = "Write only over this ETag, or `*` over any"),
        ("If-None-Match" = Option<String>, Header, pattern = r"^\*$", description = "`*`: write only where there is none, after a deletion")
    ),
    request_body(content = Rollback, description = "At most 1 KiB"),
    responses(
        (status = 200, body = Wrote, description = "A new version", headers(("ETag" = String))),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`, `invalid_body`, `reference_not_allowed`"),
        (status = 404, body = ProblemBody, description = "`secret_not_found`: no value of that version is kept; `tenant_unknown`"),
        (status = 409, body = ProblemBody, description = "`version_conflict`, `version_revoked`, `approval_required`, `upstream_read_only`"),
        (status = 413, body = ProblemBody, description = "The body, or what upstream would have to take, is too large"),
        (status = 503, body = ProblemBody, description = "`upstream_denied`, `secret_unavailable`")
    )
)]
async fn roll_back(ask: &Ask<'_>, body: Incoming) -> Result<Answer, Problem> {
    let (tenant, key) = ask.secret_for(Action::Write)?;
    let condition = ask.condition()?;
    let wanted: Rollback = ask.read(body, 1024).await?;
    let number = Version::new(wanted.version)
        .ok_or_else(|| Problem::invalid_body("version takes a number from 1 on, as in {\"version\":3}"))?;
    let writer = ask.writer(&tenant);
    let older = Older { number, even_revoked: wanted.force };
    let rolling_back = ask.service.resolver.rollback(&tenant, &key, older, &condition, &writer);
    let written = ask.recorded("rollback", &tenant, &key, rolling_back, |written| written.tier).await?;
    tracing::info!(%tenant, %key, token = ask.grant.name, peer = %ask.account.who.peer, to = %number, "a secret was rolled back");
    Ok(wrote(StatusCode::OK, &tenant, &key, &written))
}

#[derive(Serialize, ToSchema)]
struct VersionList<'a> {
    tenant: &'a str,
    key: &'a str,
    /// Newest first.
    versions: Vec<VersionEntry<'a>>,
}

#[derive(Serialize, ToSchema)]
struct VersionEntry<'a> {
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
struct Rollback {
    /// The version whose value is to come back.
    #[schema(minimum = 1)]
    version: i64,
    /// Whether to bring it back where a rotation has revoked it, too.
    #[serde(default)]
    force: bool,
}
