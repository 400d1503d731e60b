//! The token that asks.

use http::StatusCode;
use serde::Serialize;
use utoipa::{OpenApi, ToSchema};

use crate::{
    clock::Timestamp,
    server::{
        ask::{Ask, json},
        operation::{Operation, Run},
        respond::{Answer, JSON, Problem, respond},
    },
    tenant::shared_folder,
};

#[derive(OpenApi)]
#[openapi(paths(who_am_i))]
pub(super) struct Document;

pub(in crate::server) const WHO_AM_I: Operation =
    Operation { action: "whoami", parameters: &[], run: Run::Read(|ask, _| Box::pin(who_am_i(ask))) };

#[utoipa::path(
    get, path = "/v1/whoami", operation_id = "who_am_i",
    description = "The token that asks: what it reaches, and until when.",
    responses((status = 200, body = WhoAmI, description = "The token"))
)]
async fn who_am_i(ask: &Ask<'_>) -> Result<Answer, Problem> {
    ask.count("whoami", "", "", None);
    let (grant, now) = (ask.grant, ask.service.resolver.clock().now());
    let body = WhoAmI {
        name: &grant.name,
        id: &grant.id,
        tenants: grant.tenants().filter(|glob| shared_folder(glob).is_none()).collect(),
        folders: grant.tenants().filter_map(shared_folder).collect(),
        keys: grant.keys().collect(),
        actions: grant.actions().iter().map(|action| action.as_str()).collect(),
        expires_at: grant.expires_at().map(Timestamp::to_rfc3339),
        expires_in_seconds: grant.expires_at().map(|end| end.since(now).as_secs()),
    };
    Ok(respond(StatusCode::OK, JSON, json(&body)))
}

/// A token, as its holder is told of it.
#[derive(Serialize, ToSchema)]
struct WhoAmI<'a> {
    name: &'a str,
    /// The public part of the token.
    id: &'a str,
    /// The tenants it reaches, as globs.
    tenants: Vec<&'a str>,
    /// The shared folders it reaches, as globs.
    folders: Vec<&'a str>,
    /// The keys it reaches there, as globs.
    keys: Vec<&'a str>,
    /// What it may do there: `read`, `write`, `admin`.
    actions: Vec<&'static str>,
    /// When it ends, in RFC 3339, UTC; null where it does not.
    expires_at: Option<String>,
    /// Seconds until then.
    expires_in_seconds: Option<u64>,
}
