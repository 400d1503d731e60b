//! The steps of a request: route, fault, token, rate limit, handler, in the order in which the
//! recorded server refuses.

use std::{io, net::IpAddr};

use http::{HeaderName, Method, Request, Response, header};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::{
    auth,
    exchange::{Allowance, Call, Reply, WireBody, cut_off, decode, garbage, no_content},
    faults::{Fault, Hold, Route},
    fields, folders, secrets, tokens,
    tokens::Identity,
    world::{Dialect, State, World},
};

/// Answers one request; an error closes the connection without an answer.
pub(super) async fn answer(
    world: &World,
    request: Request<Incoming>,
    peer: IpAddr,
) -> Result<Response<WireBody>, io::Error> {
    let call = Call::read(request, peer).await.map_err(io::Error::other)?;
    if call.method == Method::OPTIONS {
        return Ok(no_content());
    }
    let found = find(&call.method, call.path(), world.lock().is_newer());
    let route = found.as_ref().map_or(Route::Other, |found| found.endpoint.kind());
    let folder = if route == Route::List { secrets::listed_folder(&call) } else { None };
    world.count(route);
    pass(world, route, folder.as_deref(), Hold::Arrival).await;
    let fault = world.lock().trouble.strike(route, folder.as_deref());
    let if_none_match = call.headers.get(header::IF_NONE_MATCH).cloned();
    let respond = |reply: Reply| reply.into_response(if_none_match.as_ref());

    let response = match fault {
        Some(Fault::Down) => return Err(io::Error::other("down on purpose")),
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Slow(delay)) => {
            tokio::time::sleep(delay).await;
            respond(reply(world, &call, found, fault))
        }
        Some(Fault::Garbage) => garbage(),
        Some(Fault::CutOff) => cut_off(respond(reply(world, &call, found, fault))).await?,
        _ => respond(reply(world, &call, found, fault)),
    };
    pass(world, route, folder.as_deref(), Hold::Answer).await;
    Ok(response)
}

async fn pass(world: &World, route: Route, folder: Option<&str>, hold: Hold) {
    let passages = world.lock().trouble.passages(route, folder, hold);
    for passage in passages {
        passage.wait().await;
    }
}

fn reply(world: &World, call: &Call, found: Option<Found>, fault: Option<Fault>) -> Reply {
    let mut state = world.lock();
    let reply = match fault.and_then(failure) {
        Some(failure) => failure,
        None => serve(&mut state, call, found, fault).unwrap_or_else(|refusal| refusal),
    };
    match state.dialect {
        Dialect::August2024 => reply,
        Dialect::October2024 => reply.in_octobers_form(),
        Dialect::Newer => reply.in_newer_form(),
    }
}

/// The faults that do not depend on the request.
fn failure(fault: Fault) -> Option<Reply> {
    match fault {
        Fault::RateLimited { retry_after } => {
            Some(Reply::too_many_requests(Allowance { limit: 40, remaining: 0, reset: retry_after.as_secs() }))
        }
        Fault::Status(status) => Some(Reply::error(status, "Internal Server Error", "Something went wrong")),
        Fault::Denied => Some(secrets::not_allowed_to("read")),
        Fault::TokenExpired => Some(tokens::broken("jwt expired")),
        Fault::TokenGone => Some(tokens::gone()),
        Fault::Down
        | Fault::Hang
        | Fault::Slow(_)
        | Fault::Garbage
        | Fault::CutOff
        | Fault::DatabaseDown
        | Fault::CacheDown => None,
    }
}

fn serve(state: &mut State, call: &Call, found: Option<Found>, fault: Option<Fault>) -> Result<Reply, Reply> {
    let Some(Found { endpoint, parameter }) = found else { return Err(unknown_route(call)) };
    let database_down = fault == Some(Fault::DatabaseDown);
    let identity = if endpoint.needs_token() {
        let token = bearer(call)?;
        if database_down {
            state.tokens.check(token, state.clock.now())?;
            return Err(Reply::error(500, "IdAccessTokenFindOne", "Something went wrong"));
        }
        let State { tokens, identities, clock, .. } = &mut *state;
        Some(tokens.use_up(token, identities, clock.now())?.clone())
    } else {
        None
    };
    if endpoint == Endpoint::UsersOnly {
        let error = format!("{} Unauthorized Access", call.target);
        return Err(Reply::error(403, &error, "You are not allowed to access this resource"));
    }
    let body = if endpoint.takes_body() { call.body()? } else { Value::Null };
    if endpoint == Endpoint::Status && database_down {
        let message = "connect ECONNREFUSED 127.0.0.1:5432";
        return Err(Reply::new(
            500,
            json!({"statusCode": 500, "code": "ECONNREFUSED", "error": "Internal Server Error", "message": message}),
        ));
    }
    if fault == Some(Fault::CacheDown) && endpoint != Endpoint::Status {
        let message = "Reached the max retries per request limit (which is 1). \
                       Refer to \"maxRetriesPerRequest\" option for details.";
        return Err(Reply::error(500, "Internal Server Error", message));
    }
    let allowance = count(state, endpoint, call)?;
    let handled = if database_down && endpoint != Endpoint::Status {
        Err(Reply::error(500, "Find one", "Something went wrong"))
    } else {
        let mut request = Asked { state, call, body: &body, parameter: &parameter, identity: identity.as_ref() };
        handle(endpoint, &mut request)
    };
    let mut reply = handled.map_or_else(|refusal| refusal, Reply::ok);
    reply.allowance = allowance;
    Ok(reply)
}

/// The input of a handler.
pub(super) struct Asked<'a> {
    pub(super) state: &'a mut State,
    pub(super) call: &'a Call,
    pub(super) body: &'a Value,
    /// The name or id in the path, decoded.
    pub(super) parameter: &'a str,
    pub(super) identity: Option<&'a Identity>,
}

fn handle(endpoint: Endpoint, asked: &mut Asked<'_>) -> Result<Value, Reply> {
    match endpoint {
        Endpoint::Status => Ok(auth::status(asked)),
        Endpoint::Login => auth::login(asked),
        Endpoint::Renew => auth::renew(asked),
        Endpoint::Revoke => auth::revoke(asked),
        Endpoint::ListSecrets => secrets::list(asked),
        Endpoint::GetSecret => secrets::get(asked),
        Endpoint::CreateSecret => secrets::create(asked),
        Endpoint::UpdateSecret => secrets::update(asked),
        Endpoint::DeleteSecret => secrets::delete(asked),
        Endpoint::CreateSecrets => secrets::create_batch(asked),
        Endpoint::UpdateSecrets => secrets::update_batch(asked),
        Endpoint::DeleteSecrets => secrets::delete_batch(asked),
        Endpoint::ListFolders => folders::list(asked),
        Endpoint::GetFolder => folders::get(asked),
        Endpoint::CreateFolder => folders::create(asked),
        Endpoint::RenameFolder => folders::rename(asked),
        Endpoint::DeleteFolder => folders::delete(asked),
        Endpoint::CreateImport => folders::create_import(asked),
        Endpoint::CreateTag => folders::create_tag(asked),
        Endpoint::Project => folders::project(asked),
        Endpoint::ProjectBySlug => folders::project_by_slug(asked),
        // The project has no secrets that are encrypted end to end.
        Endpoint::ListEncrypted => Ok(json!({"secrets": []})),
        Endpoint::CreateEncrypted => Err(fields::missing(&[
            "secretKeyCiphertext",
            "secretKeyIV",
            "secretKeyTag",
            "secretValueCiphertext",
            "secretValueIV",
            "secretValueTag",
        ])),
        Endpoint::UsersOnly => Err(tokens::gone()),
    }
}

/// The token, under any scheme: the recorded server cuts seven characters off.
fn bearer(call: &Call) -> Result<&str, Reply> {
    let missing = || Reply::error(403, "Unauthorized access", "Token missing");
    let header = call.headers.get(header::AUTHORIZATION).ok_or_else(missing)?;
    Ok(header.to_str().unwrap_or_default().get(7..).unwrap_or_default())
}

fn count(state: &mut State, endpoint: Endpoint, call: &Call) -> Result<Option<Allowance>, Reply> {
    let (Some(limits), Some((route, limit))) = (state.limits, endpoint.limit()) else { return Ok(None) };
    let limit = match limit {
        Limit::Secrets => limits.secrets,
        Limit::Folders => limits.folders,
        Limit::Writes => limits.writes,
        Limit::Logins => limits.logins,
    };
    let forwarded = call.header(HeaderName::from_static("x-forwarded-for"));
    let client = match forwarded.and_then(|addresses| addresses.split(',').next()) {
        Some(address) => address.trim().chars().take(64).collect(),
        None => call.peer.to_string(),
    };
    state.limiter.count(route, &client, limit, state.clock.running()).map(Some).map_err(Reply::too_many_requests)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    Status,
    Login,
    Renew,
    Revoke,
    ListSecrets,
    GetSecret,
    CreateSecret,
    UpdateSecret,
    DeleteSecret,
    CreateSecrets,
    UpdateSecrets,
    DeleteSecrets,
    ListFolders,
    GetFolder,
    CreateFolder,
    RenameFolder,
    DeleteFolder,
    CreateImport,
    CreateTag,
    Project,
    ProjectBySlug,
    ListEncrypted,
    CreateEncrypted,
    /// Routes that only people may use, not machines.
    UsersOnly,
}

enum Limit {
    Secrets,
    Folders,
    Writes,
    Logins,
}

impl Endpoint {
    fn kind(self) -> Route {
        match self {
            Self::Login => Route::Login,
            Self::ListFolders => Route::Folders,
            Self::ListSecrets => Route::List,
            Self::GetSecret => Route::Get,
            Self::CreateSecret
            | Self::UpdateSecret
            | Self::DeleteSecret
            | Self::CreateSecrets
            | Self::UpdateSecrets
            | Self::DeleteSecrets
            | Self::CreateFolder
            | Self::RenameFolder
            | Self::DeleteFolder
            | Self::CreateImport
            | Self::CreateTag
            | Self::CreateEncrypted => Route::Write,
            Self::Status
            | Self::Renew
            | Self::Revoke
            | Self::GetFolder
            | Self::Project
            | Self::ProjectBySlug
            | Self::ListEncrypted
            | Self::UsersOnly => Route::Other,
        }
    }

    fn needs_token(self) -> bool {
        !matches!(self, Self::Status | Self::Login | Self::Renew | Self::Revoke)
    }

    fn takes_body(self) -> bool {
        matches!(self, Self::Renew | Self::Revoke) || matches!(self.kind(), Route::Login | Route::Write)
    }

    /// The window in which it is counted, and its size.
    fn limit(self) -> Option<(&'static str, Limit)> {
        Some(match self {
            Self::Status | Self::UsersOnly => return None,
            Self::Login => ("login", Limit::Logins),
            Self::Renew => ("renew", Limit::Logins),
            Self::Revoke => ("revoke", Limit::Logins),
            Self::CreateTag => ("create tag", Limit::Logins),
            Self::ListSecrets => ("list secrets", Limit::Secrets),
            Self::GetSecret => ("get secret", Limit::Secrets),
            Self::ListEncrypted => ("list encrypted", Limit::Secrets),
            Self::CreateSecret => ("create secret", Limit::Writes),
            Self::UpdateSecret => ("update secret", Limit::Writes),
            Self::DeleteSecret => ("delete secret", Limit::Writes),
            Self::CreateSecrets => ("create secrets", Limit::Writes),
            Self::UpdateSecrets => ("update secrets", Limit::Writes),
            Self::DeleteSecrets => ("delete secrets", Limit::Writes),
            Self::CreateEncrypted => ("create encrypted", Limit::Writes),
            Self::CreateFolder => ("create folder", Limit::Writes),
            Self::RenameFolder => ("rename folder", Limit::Writes),
            Self::DeleteFolder => ("delete folder", Limit::Writes),
            Self::CreateImport => ("create import", Limit::Writes),
            Self::ListFolders => ("list folders", Limit::Folders),
            Self::GetFolder => ("get folder", Limit::Folders),
            Self::Project => ("project", Limit::Folders),
            Self::ProjectBySlug => ("project by slug", Limit::Folders),
        })
    }
}

struct Found {
    endpoint: Endpoint,
    parameter: String,
}

fn find(method: &Method, path: &str, newer: bool) -> Option<Found> {
    let path = path.strip_suffix('/').unwrap_or(path);
    let segments: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
    // A HEAD is answered like a GET, without the body.
    let method = if method == Method::HEAD { "GET" } else { method.as_str() };
    let (secrets, folders) = if newer { ("v4", "v2") } else { ("v3", "v1") };

    let (endpoint, parameter) = match (method, &segments[1..]) {
        _ if segments[0] != "api" => return None,
        ("GET", ["status"]) => (Endpoint::Status, ""),
        ("POST", ["v1", "auth", "universal-auth", "login"]) => (Endpoint::Login, ""),
        ("POST", ["v1", "auth", "token", "renew"]) => (Endpoint::Renew, ""),
        ("POST", ["v1", "auth", "token", "revoke"]) => (Endpoint::Revoke, ""),
        ("GET", ["v1", "workspace"]) => (Endpoint::UsersOnly, ""),
        ("GET", ["v1", "secret", _, "secret-versions"]) => (Endpoint::UsersOnly, ""),
        ("GET", ["v1", "workspace", id]) => (Endpoint::Project, *id),
        ("GET", ["v2", "workspace", slug]) => (Endpoint::ProjectBySlug, *slug),
        ("POST", ["v1", "workspace", id, "tags"]) => (Endpoint::CreateTag, *id),
        ("POST", ["v1", "secret-imports"]) => (Endpoint::CreateImport, ""),
        ("GET", [version, "folders"]) if *version == folders => (Endpoint::ListFolders, ""),
        ("POST", [version, "folders"]) if *version == folders => (Endpoint::CreateFolder, ""),
        ("GET", [version, "folders", id]) if *version == folders => (Endpoint::GetFolder, *id),
        ("PATCH", [version, "folders", id]) if *version == folders => (Endpoint::RenameFolder, *id),
        ("DELETE", [version, "folders", id]) if *version == folders => (Endpoint::DeleteFolder, *id),
        (method, [version, "secrets", rest @ ..]) if *version == secrets => find_secrets(method, rest, newer)?,
        _ => return None,
    };
    let parameter = decode(parameter)?;
    (parameter.encode_utf16().count() <= LONGEST_PARAMETER).then_some(Found { endpoint, parameter })
}

fn find_secrets<'a>(method: &str, rest: &[&'a str], newer: bool) -> Option<(Endpoint, &'a str)> {
    // v3 has the batch before the word raw; v4 does not use raw any more.
    let rest = match (newer, rest) {
        (false, ["batch", "raw"]) => &["batch"],
        (false, ["raw", rest @ ..]) if rest.is_empty() && method == "POST" => {
            return Some((Endpoint::CreateEncrypted, ""));
        }
        (false, ["raw", name]) => return single(method, name),
        (false, ["raw"]) => &[][..],
        (false, []) if method == "GET" => return Some((Endpoint::ListEncrypted, "")),
        (false, _) => return None,
        (true, rest) => rest,
    };
    match (method, rest) {
        ("GET", []) => Some((Endpoint::ListSecrets, "")),
        ("POST", ["batch"]) => Some((Endpoint::CreateSecrets, "")),
        ("PATCH", ["batch"]) => Some((Endpoint::UpdateSecrets, "")),
        ("DELETE", ["batch"]) => Some((Endpoint::DeleteSecrets, "")),
        (_, [name]) => single(method, name),
        _ => None,
    }
}

fn single<'a>(method: &str, name: &'a str) -> Option<(Endpoint, &'a str)> {
    let endpoint = match method {
        "GET" => Endpoint::GetSecret,
        "POST" => Endpoint::CreateSecret,
        "PATCH" => Endpoint::UpdateSecret,
        "DELETE" => Endpoint::DeleteSecret,
        _ => return None,
    };
    Some((endpoint, name))
}

fn unknown_route(call: &Call) -> Reply {
    let message = format!("Route {}:{} not found", call.method, call.target);
    Reply::new(404, json!({"statusCode": 404, "error": "Not Found", "message": message}))
}

/// The longest value of a parameter in a path, in UTF-16 units.
const LONGEST_PARAMETER: usize = 100;
