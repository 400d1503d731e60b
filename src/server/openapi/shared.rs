//! The parts that operations have in common, added to the description of each resource: names in paths,
//! the answers that a request can get before its resource is asked, and the headers of all answers.

use std::collections::BTreeMap;

use http::{Method, StatusCode};
use utoipa::openapi::{
    Components, Content, Header, HeaderBuilder, ObjectBuilder, OpenApi, PathItem, Ref, RefOr, Required, Response,
    ResponseBuilder,
    path::{Operation, Parameter, ParameterBuilder, ParameterIn},
    schema::{Schema, SchemaType, Type},
    security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme},
};

use crate::server::{names, operation::Run};

/// A refusal that does not depend on the resource.
struct Refusal {
    status: StatusCode,
    /// Its name among the components.
    name: &'static str,
    /// When it is given, by its codes.
    description: &'static str,
    /// The headers that other refusals do not have.
    headers: &'static [&'static str],
    given_by: Givers,
}

/// The operations that give a refusal.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Givers {
    /// All of them, health included.
    All,
    /// Those that are not told to everybody.
    Guarded,
    /// Those that are there only where they are configured.
    Configured,
    /// Those that read a body.
    WithBody,
    /// All of them; hyper answers, without a body.
    Http,
}

impl Givers {
    fn include(self, run: &Run, has_body: bool) -> bool {
        match self {
            Self::All | Self::Http => true,
            Self::Guarded => !matches!(run, Run::Open(_)),
            Self::Configured => matches!(run, Run::Webhook),
            Self::WithBody => has_body,
        }
    }
}

const REFUSALS: [Refusal; 11] = [
    Refusal {
        status: StatusCode::BAD_REQUEST,
        name: "BadRequest",
        description: "`invalid_request` (and the connection is closed), `invalid_query`, `invalid_audit_field`; without a body where HTTP itself does not allow the request",
        headers: &[],
        given_by: Givers::All,
    },
    Refusal {
        status: StatusCode::UNAUTHORIZED,
        name: "Unauthorized",
        description: "`token_missing`, `token_invalid`, `token_expired`",
        headers: &["WWW-Authenticate"],
        given_by: Givers::Guarded,
    },
    Refusal {
        status: StatusCode::FORBIDDEN,
        name: "Forbidden",
        description: "`out_of_scope` (of a token), `bad_host`, `forwarded_request`",
        headers: &[],
        given_by: Givers::All,
    },
    Refusal {
        status: StatusCode::NOT_FOUND,
        name: "NotFound",
        description: "`route_not_found`",
        headers: &[],
        given_by: Givers::Configured,
    },
    Refusal {
        status: StatusCode::METHOD_NOT_ALLOWED,
        name: "MethodNotAllowed",
        description: "`method_not_allowed`, of a method that is not listed for this path",
        headers: &["Allow"],
        given_by: Givers::All,
    },
    Refusal {
        status: StatusCode::PAYLOAD_TOO_LARGE,
        name: "PayloadTooLarge",
        description: "`value_too_large`",
        headers: &[],
        given_by: Givers::WithBody,
    },
    Refusal {
        status: StatusCode::URI_TOO_LONG,
        name: "UriTooLong",
        description: "The target is longer than 65,534 bytes, where `server.max_header` allows as much",
        headers: &[],
        given_by: Givers::Http,
    },
    Refusal {
        status: StatusCode::UNSUPPORTED_MEDIA_TYPE,
        name: "UnsupportedMediaType",
        description: "`unsupported_encoding` of a body with a `Content-Encoding` other than `identity`, `unsupported_media_type` of a body with a `Content-Type` other than JSON",
        headers: &["Accept", "Accept-Encoding"],
        given_by: Givers::WithBody,
    },
    Refusal {
        status: StatusCode::TOO_MANY_REQUESTS,
        name: "TooManyRequests",
        description: "`rate_limited`",
        headers: &["Retry-After"],
        given_by: Givers::All,
    },
    Refusal {
        status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        name: "HeadTooLong",
        description: "The head is longer than `server.max_header`, or has more than 100 lines (HTTP/1.1)",
        headers: &[],
        given_by: Givers::Http,
    },
    Refusal {
        status: StatusCode::SERVICE_UNAVAILABLE,
        name: "Unavailable",
        description: "`unavailable`, `audit_unavailable`",
        headers: &["Retry-After"],
        given_by: Givers::Guarded,
    },
];

/// The headers of every problem.
const OF_PROBLEMS: [&str; 2] = ["Cache-Control", "X-Request-Id"];

/// Headers of answers: name, type, pattern and meaning.
const HEADERS: [(&str, Type, Option<&str>, &str); 11] = [
    ("Accept", Type::String, Some("^application/json$"), "The media type that a body is to have"),
    ("Accept-Encoding", Type::String, Some("^identity$"), "The encoding that a body is to have: none"),
    ("Age", Type::Integer, None, "Seconds since the owner confirmed what is answered"),
    ("Allow", Type::String, Some("^[A-Z]+(, [A-Z]+)*$"), "The methods of this path"),
    ("Cache-Control", Type::String, Some("^no-store$"), "`no-store`, on every answer"),
    ("Cache-Status", Type::String, None, "The tiers that were asked, nearest to the origin first (RFC 9211)"),
    ("ETag", Type::String, Some("^\"[0-9a-f]+\"$"), "Names the version; it is not made from the value"),
    ("Retry-After", Type::Integer, None, "Seconds after which to try again"),
    ("Vary", Type::String, Some("^Accept$"), "The header of the request that the answer depends on"),
    ("WWW-Authenticate", Type::String, Some("^Bearer$"), "`Bearer`"),
    ("X-Request-Id", Type::String, Some("^[!-~]{1,128}$"), "The id under which the request is on record"),
];

/// Completes a description. `run` finds the route of a method and of a path with the names of its parameters
/// in place of names.
pub(super) fn complete(api: &mut OpenApi, run: impl Fn(&Method, &str) -> Option<&'static Run>) {
    add_folders(api);
    for (path, item) in &mut api.paths.paths {
        item.parameters = parameters(path);
        for (method, operation) in operations(item) {
            if let Some(run) = run(&method, path) {
                complete_operation(operation, run);
            }
        }
        item.head = item.get.clone().map(head_of);
    }
    add_components(api.components.get_or_insert_default());
}

/// Describes the requests of shared folders, which are those of tenants.
fn add_folders(api: &mut OpenApi) {
    let of_tenant = |(path, item): (&String, &PathItem)| {
        let rest = path.strip_prefix("/v1/tenants/{tenant}")?;
        let mut item = item.clone();
        for (_, operation) in operations(&mut item) {
            let name = operation.operation_id.take().unwrap_or_default();
            operation.operation_id = Some(match name.contains("tenant") {
                true => name.replace("tenant", "folder"),
                false => format!("{name}_in_folder"),
            });
            let same = operation.description.take().unwrap_or_default();
            operation.description = Some(format!("For a shared folder, as for a tenant: {same}"));
        }
        Some((format!("/v1/folders/{{folder}}{rest}"), item))
    };
    let added: Vec<(String, PathItem)> = api.paths.paths.iter().filter_map(of_tenant).collect();
    api.paths.paths.extend(added);
}

/// The same request without the body of its answer.
fn head_of(mut operation: Operation) -> Operation {
    operation.operation_id = operation.operation_id.map(|name| format!("head_{name}"));
    operation.description = Some("The same as `GET`, without the body.".to_owned());
    operation
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = (Method, &mut Operation)> {
    let all = [
        (Method::GET, &mut item.get),
        (Method::POST, &mut item.post),
        (Method::PUT, &mut item.put),
        (Method::DELETE, &mut item.delete),
    ];
    all.into_iter().filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// The parameters in a path.
fn parameters(path: &str) -> Option<Vec<RefOr<Parameter>>> {
    let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let parameters: Vec<_> = names.map(|name| reference("parameters", name)).collect();
    (!parameters.is_empty()).then_some(parameters)
}

fn reference<T>(kind: &str, name: &str) -> RefOr<T> {
    RefOr::Ref(Ref::new(format!("#/components/{kind}/{name}")))
}

fn complete_operation(operation: &mut Operation, run: &Run) {
    operation.tags = None;
    let has_body = operation.request_body.is_some();
    let responses = &mut operation.responses.responses;
    for response in responses.values_mut() {
        if let RefOr::T(response) = response {
            complete_response(response);
        }
    }
    for refusal in REFUSALS.iter().filter(|refusal| refusal.given_by.include(run, has_body)) {
        match responses.get_mut(refusal.status.as_str()) {
            Some(RefOr::T(response)) => add_to(response, refusal),
            Some(RefOr::Ref(_)) => {}
            None => {
                responses.insert(refusal.status.as_str().to_owned(), reference("responses", refusal.name));
            }
        }
    }
    for parameter in operation.parameters.iter_mut().flatten() {
        if let RefOr::T(Parameter { schema: Some(RefOr::T(Schema::Object(schema))), .. }) = parameter {
            schema.schema_type = without_null(std::mem::take(&mut schema.schema_type));
        }
    }
    if !matches!(run, Run::Open(_) | Run::Webhook) {
        operation.parameters.get_or_insert_default().push(reference("parameters", "X-Request-Id"));
    }
}

/// A parameter is left out; none is null.
fn without_null(kind: SchemaType) -> SchemaType {
    match kind {
        SchemaType::Array(mut kinds) => {
            kinds.retain(|kind| *kind != Type::Null);
            match <[Type; 1]>::try_from(kinds) {
                Ok([kind]) => SchemaType::Type(kind),
                Err(kinds) => SchemaType::Array(kinds),
            }
        }
        SchemaType::Type(_) | SchemaType::AnyValue => kind,
    }
}

/// Gives a resource's own response the headers that all have, and a problem its media type.
fn complete_response(response: &mut Response) {
    let own: Vec<String> = response.headers.keys().cloned().collect();
    response.headers = own.iter().map(|name| (name.clone(), reference("headers", name))).collect();
    response.headers.extend(headers(&["Cache-Control"]));
    let is_problem = |content: &RefOr<Content>| match content {
        RefOr::T(Content { schema: Some(RefOr::Ref(schema)), .. }) => schema.ref_location == PROBLEM_SCHEMA,
        RefOr::T(_) | RefOr::Ref(_) => false,
    };
    if response.content.values().any(is_problem) {
        response.content = std::iter::once((PROBLEM.to_owned(), problem())).collect();
        response.headers.extend(headers(&OF_PROBLEMS));
    }
}

/// Adds to a resource's own refusal what others are refused for with the same status.
fn add_to(response: &mut Response, refusal: &Refusal) {
    response.description = format!("{}; {}", response.description, refusal.description);
    response.headers.extend(headers(refusal.headers));
}

fn headers(names: &[&str]) -> BTreeMap<String, RefOr<Header>> {
    names.iter().map(|&name| (name.to_owned(), reference("headers", name))).collect()
}

const PROBLEM: &str = "application/problem+json";
const PROBLEM_SCHEMA: &str = "#/components/schemas/ProblemBody";

fn problem() -> RefOr<Content> {
    RefOr::T(Content::new(Some(Ref::new(PROBLEM_SCHEMA))))
}

fn add_components(components: &mut Components) {
    for refusal in &REFUSALS {
        let response = ResponseBuilder::new().description(refusal.description);
        let mut response = match refusal.given_by {
            Givers::Http => response.build(),
            _ => response.content(PROBLEM, Content::new(Some(Ref::new(PROBLEM_SCHEMA)))).build(),
        };
        if refusal.given_by != Givers::Http {
            response.headers = headers(&OF_PROBLEMS);
            response.headers.extend(headers(refusal.headers));
        }
        components.responses.insert(refusal.name.to_owned(), RefOr::T(response));
    }
    for (name, kind, pattern, description) in HEADERS {
        let minimum = (kind == Type::Integer).then_some(0_i32);
        let schema = ObjectBuilder::new().schema_type(kind).pattern(pattern).minimum(minimum);
        let header = HeaderBuilder::new().schema(Some(schema)).description(Some(description)).build();
        components.headers.insert(name.to_owned(), RefOr::T(header));
    }
    for (name, place, schema, description) in [
        ("tenant", ParameterIn::Path, names::tenant(), "The tenant's subdomain"),
        ("folder", ParameterIn::Path, names::tenant(), "The shared folder's name; in answers it has a slash before it"),
        ("key", ParameterIn::Path, names::key(), "The secret's name, percent-encoded: 1 to 255 bytes of UTF-8"),
        (
            "X-Request-Id",
            ParameterIn::Header,
            ObjectBuilder::new().schema_type(Type::String).build(),
            "The id under which the request is to be on record: 1 to 128 visible characters of ASCII; any other is not read",
        ),
    ] {
        let required = if place == ParameterIn::Path { Required::True } else { Required::False };
        let schema = Some(Schema::Object(schema));
        let parameter = ParameterBuilder::new().name(name).parameter_in(place).required(required).schema(schema);
        let parameter = parameter.description(Some(description)).build();
        components.parameters.insert(name.to_owned(), RefOr::T(parameter));
    }
    let token = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("secretier token create"));
    let signature = ApiKeyValue::with_description(
        "x-infisical-signature",
        "`t=<ms>;<hex>`: HMAC-SHA256 of the body under `infisical.webhook_secret`",
    );
    components.add_security_scheme("token", SecurityScheme::Http(token.build()));
    components.add_security_scheme("signature", SecurityScheme::ApiKey(ApiKey::Header(signature)));
}
