//! Tenants: which there are, and reading their folders now.

use http::StatusCode;
use serde::Serialize;
use utoipa::{OpenApi, ToSchema};

use crate::{
    access::Action,
    resolver::{Refresh, TenantSummary},
    server::{
        ask::{Ask, json},
        operation::{Operation, Run},
        respond::{Answer, JSON, Problem, ProblemBody, respond},
    },
    tenant::shared_folder,
};

#[derive(OpenApi)]
#[openapi(paths(list, folders, one, refresh))]
pub(super) struct Document;

pub(in crate::server) const LIST: Operation =
    Operation { action: "tenants", parameters: &[], run: Run::Read(|ask, _| Box::pin(list(ask))) };
pub(in crate::server) const FOLDERS: Operation =
    Operation { action: "folders", parameters: &[], run: Run::Read(|ask, _| Box::pin(folders(ask))) };
pub(in crate::server) const ONE: Operation =
    Operation { action: "tenant", parameters: &[], run: Run::Read(|ask, _| Box::pin(one(ask))) };
pub(in crate::server) const REFRESH: Operation =
    Operation { action: "refresh", parameters: &[], run: Run::Write(|ask, _| Box::pin(refresh(ask))) };

#[utoipa::path(
    get, path = "/v1/tenants", operation_id = "list_tenants",
    description = "The tenants that the token reaches.",
    responses((status = 200, body = TenantList, description = "The tenants"))
)]
async fn list(ask: &Ask<'_>) -> Result<Answer, Problem> {
    ask.grant.allow_action(Action::Read)?;
    let is_wanted = |tenant: &str| shared_folder(tenant).is_none() && ask.grant.reaches(tenant);
    let tenants = ask.service.resolver.tenants(is_wanted).await?;
    ask.count("tenants", "", "", None);
    let tenants = tenants.into_iter().map(|summary| within_scope(ask, summary)).collect();
    Ok(respond(StatusCode::OK, JSON, json(&TenantList { tenants })))
}

#[utoipa::path(
    get, path = "/v1/folders", operation_id = "list_folders",
    description = "The shared folders that the token reaches, each with its name behind a slash in place of a tenant.",
    responses((status = 200, body = FolderList, description = "The shared folders"))
)]
async fn folders(ask: &Ask<'_>) -> Result<Answer, Problem> {
    ask.grant.allow_action(Action::Read)?;
    let is_wanted = |tenant: &str| shared_folder(tenant).is_some() && ask.grant.reaches(tenant);
    let folders = ask.service.resolver.tenants(is_wanted).await?;
    ask.count("folders", "", "", None);
    let folders = folders.into_iter().map(|summary| within_scope(ask, summary)).collect();
    Ok(respond(StatusCode::OK, JSON, json(&FolderList { folders })))
}

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}", operation_id = "get_tenant",
    description = "One tenant.",
    responses(
        (status = 200, body = TenantSummary, description = "The tenant"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`"),
        (status = 404, body = ProblemBody, description = "`secret_not_found`: there is no such tenant"),
        (status = 503, body = ProblemBody, description = "`upstream_denied`")
    )
)]
async fn one(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let tenant = ask.tenant_for(Action::Read)?;
    let summary = ask.service.resolver.tenant(&tenant).await?.ok_or_else(Problem::not_found)?;
    ask.count("tenant", tenant.as_str(), "", None);
    Ok(respond(StatusCode::OK, JSON, json(&within_scope(ask, summary))))
}

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/refresh", operation_id = "refresh_tenant",
    description = "Reads the tenant's folder now.",
    responses(
        (status = 200, body = Refreshed, description = "It was read"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`"),
        (status = 404, body = ProblemBody, description = "`secret_not_found`: there is no such tenant"),
        (status = 409, body = ProblemBody, description = "`not_owned_upstream`: the database owns this tenant"),
        (status = 503, body = ProblemBody, description = "`upstream_denied`")
    )
)]
async fn refresh(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let tenant = ask.tenant_for(Action::Read)?;
    let fresh = match ask.service.resolver.refresh(&tenant).await? {
        Refresh::Read(fresh) => fresh,
        Refresh::NoFolder => return Err(Problem::not_found()),
        Refresh::NotOwnedUpstream => return Err(Problem::not_owned_upstream()),
    };
    ask.count("refresh", tenant.as_str(), "", None);
    let keys = ask.grant.reaches_every_key().then_some(fresh.entries.len());
    let body = Refreshed { tenant: tenant.as_str(), keys, changed: fresh.status == 200 };
    Ok(respond(StatusCode::OK, JSON, json(&body)))
}

/// How many keys a tenant has is not for those who may not know of some of them.
fn within_scope(ask: &Ask<'_>, mut summary: TenantSummary) -> TenantSummary {
    if !ask.grant.reaches_every_key() {
        summary.keys = None;
    }
    summary
}

#[derive(Serialize, ToSchema)]
struct TenantList {
    tenants: Vec<TenantSummary>,
}

#[derive(Serialize, ToSchema)]
struct FolderList {
    folders: Vec<TenantSummary>,
}

#[derive(Serialize, ToSchema)]
struct Refreshed<'a> {
    tenant: &'a str,
    /// Secrets in the folder; null where the token does not reach every key.
    keys: Option<usize>,
    /// Whether the folder differs from what was held.
    changed: bool,
}
