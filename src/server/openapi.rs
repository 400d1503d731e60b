//! The API's own description (OpenAPI 3.1), for `GET /openapi.json`.

use std::sync::OnceLock;
use utoipa::OpenApi;

use super::api;

/// The description as JSON, made once.
pub fn document() -> &'static str {
    static DOCUMENT: OnceLock<String> = OnceLock::new();
    // A description of types always serialises.
    DOCUMENT.get_or_init(|| {
        let mut description = Description::openapi();
        for resource in api::documents() {
            description.merge(resource);
        }
        description.to_json().unwrap_or_default()
    })
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "secretier",
        description = "Secrets of tenants, from memory, an encrypted database and Infisical. \
            Every answer says in Cache-Status which tier it came from. A request takes the parameters that are listed \
            for it, each once; any other is 400 invalid_query."
    ),
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
