//! The API's own description (OpenAPI 3.1), and `GET /openapi.json`. Each resource describes what it
//! answers itself; `shared.rs` adds what all of them have in common.

mod shared;

use std::sync::OnceLock;

use http::StatusCode;
use utoipa::OpenApi;

use super::{
    api,
    ask::Ask,
    operation::{Operation, Run},
    respond::{Answer, JSON, Problem, respond},
    routes::Route,
};

pub(super) const DESCRIPTION: Operation =
    Operation { action: "openapi", parameters: &[], run: Run::Read(|ask, _| Box::pin(description(ask))) };

/// The description as JSON, made once.
pub fn document() -> &'static str {
    static DOCUMENT: OnceLock<String> = OnceLock::new();
    // A description of types always serialises.
    DOCUMENT.get_or_init(|| {
        let mut description = Description::openapi();
        for resource in api::documents() {
            description.merge(resource);
        }
        shared::complete(&mut description, |method, path| Route::find(method, path).and_then(|route| route.run()));
        description.to_json().unwrap_or_default()
    })
}

#[utoipa::path(
    get, path = "/openapi.json", operation_id = "openapi_json",
    description = "This description.",
    responses((status = 200, content((serde_json::Value = "application/json")), description = "OpenAPI 3.1"))
)]
async fn description(ask: &Ask<'_>) -> Result<Answer, Problem> {
    ask.count("openapi", "", "", None);
    Ok(respond(StatusCode::OK, JSON, document().into()))
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "secretier",
        description = "Secrets of tenants, from memory, an encrypted database and Infisical. \
            Lookups say in Cache-Status which tier they were answered from. A request takes the parameters that are listed \
            for it, each once; any other is 400 `invalid_query`. A method that is not listed for a path, `OPTIONS` among \
            them, is 405, and a path that is not listed 404, for callers with a token; for others 401. \
            Over the Unix socket, a process that is configured needs no token."
    ),
    paths(description),
    security(("token" = []))
)]
struct Description;

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn parsed() -> Value {
        serde_json::from_str(document()).unwrap()
    }

    /// Every object in the document that stands under this name, with where it stands.
    fn each<'v>(value: &'v Value, name: &str, place: &str, visit: &mut impl FnMut(&str, &'v Value)) {
        let members: Vec<(String, &Value)> = match value {
            Value::Object(members) => members.iter().map(|(name, value)| (name.clone(), value)).collect(),
            Value::Array(items) => items.iter().enumerate().map(|(at, item)| (at.to_string(), item)).collect(),
            _ => return,
        };
        for (member, value) in members {
            let place = format!("{place}/{}", member.replace('~', "~0").replace('/', "~1"));
            if member == name {
                visit(&place, value);
            }
            each(value, name, &place, visit);
        }
    }

    #[test]
    fn every_reference_leads_somewhere_and_everything_that_is_shared_is_used() {
        let (document, mut used) = (parsed(), std::collections::BTreeSet::new());
        each(&document, "$ref", "", &mut |place, target| {
            let target = target.as_str().unwrap();
            assert!(document.pointer(target.trim_start_matches('#')).is_some(), "{place}: {target}");
            used.insert(target.to_owned());
        });
        for (kind, components) in document["components"].as_object().unwrap() {
            // A security scheme is used by its name. `NotFound` is also for paths that are not listed.
            for name in components.as_object().unwrap().keys().filter(|_| kind != "securitySchemes") {
                let target = format!("#/components/{kind}/{name}");
                assert!(used.contains(&target), "{target}");
            }
        }
    }

    #[test]
    fn every_response_is_described_and_says_what_it_carries() {
        let document = parsed();
        each(&document, "responses", "", &mut |place, responses| {
            for (status, response) in responses.as_object().unwrap() {
                let place = format!("{place}/{status}");
                let target = response["$ref"].as_str().map(|target| target.trim_start_matches('#'));
                let response = target.map_or(response, |target| document.pointer(target).unwrap());
                assert!(response["description"].as_str().is_some_and(|text| text.len() > 1), "{place}");
                let is_bare = matches!(status.as_str(), "414" | "431" | "UriTooLong" | "HeadTooLong");
                assert_eq!(response["headers"]["Cache-Control"].is_null(), is_bare, "{place}");
                let has_content = !is_bare && !matches!(status.as_str(), "204" | "304");
                assert_eq!(response["content"].is_object(), has_content, "{place}");
                if status.starts_with(['4', '5']) && has_content && !place.contains("readyz") {
                    let schema = &response["content"]["application/problem+json"]["schema"]["$ref"];
                    assert_eq!(schema, "#/components/schemas/ProblemBody", "{place}");
                }
            }
        });
    }

    #[test]
    fn every_route_is_described_with_its_parameters_and_nothing_else_is() {
        let document = parsed();
        let mut described = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            let placeholders: Vec<&str> = path.split('/').filter(|part| part.starts_with('{')).collect();
            let parameters = item["parameters"].as_array().map_or(&[][..], |parameters| parameters);
            let names: Vec<String> = parameters
                .iter()
                .map(|one| document.pointer(one["$ref"].as_str().unwrap().trim_start_matches('#')).unwrap())
                .map(|parameter| format!("{{{}}}", parameter["name"].as_str().unwrap()))
                .collect();
            assert_eq!(names, placeholders, "{path}");
            for (method, operation) in item.as_object().unwrap().iter().filter(|(name, _)| *name != "parameters") {
                let method: http::Method = method.to_uppercase().parse().unwrap();
                let route = Route::find(&method, path).unwrap();
                assert!(route.run().is_some(), "{method} {path}");
                let parameters = operation["parameters"].as_array().map_or(&[][..], |parameters| parameters);
                // One that is left out is not null.
                assert!(parameters.iter().all(|one| !one["schema"]["type"].is_array()), "{method} {path}");
                let in_query = parameters.iter().filter(|parameter| parameter["in"] == "query");
                let names: Vec<&str> = in_query.map(|parameter| parameter["name"].as_str().unwrap()).collect();
                assert_eq!(names, route.parameters(), "{method} {path}");
                described.push((method.to_string(), path.clone()));
            }
        }
        let mut all = super::super::routes::templates();
        all.sort_unstable();
        described.sort_unstable();
        assert_eq!(described, all);
    }

    #[test]
    fn no_two_operations_have_one_name() {
        let (document, mut names) = (parsed(), Vec::new());
        each(&document["paths"], "operationId", "", &mut |_, name| names.push(name.as_str().unwrap()));
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count, "{names:?}");
    }
}
