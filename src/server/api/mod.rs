//! The API's requests: a file for each resource, with its bodies, and with the description and the
//! handler of each request. `routes.rs` has the table.

pub(super) mod audit;
pub(super) mod events;
pub(super) mod lists;
pub(super) mod process;
pub(super) mod rotations;
pub(super) mod secrets;
pub(super) mod tenants;
pub(super) mod token;
pub(super) mod versions;
pub(super) mod webhooks;

use utoipa::OpenApi as _;

/// The description of each resource.
pub(super) fn documents() -> [utoipa::openapi::OpenApi; 10] {
    [
        secrets::Document::openapi(),
        versions::Document::openapi(),
        rotations::Document::openapi(),
        lists::Document::openapi(),
        tenants::Document::openapi(),
        webhooks::Document::openapi(),
        audit::Document::openapi(),
        events::Document::openapi(),
        token::Document::openapi(),
        process::Document::openapi(),
    ]
}
