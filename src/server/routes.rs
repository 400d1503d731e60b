//! The table of the routes, and how a request is found in it.

use http::{Method, request::Parts};
use hyper::body::Incoming;

use super::{
    Service,
    api::{audit, events, lists, process, rotations, secrets, tenants, token, versions, webhooks},
    ask::Ask,
    infisical_api::{auth, batch, folders, project, read, write},
    openapi,
    operation::{Names, Operation, Run},
    query::Query,
    respond::{Answer, Problem},
};
use crate::access::{Refused, audit::Account};

/// A path's pattern: its texts, with `tenant`, `folder` and `key` for the names between them.
macro_rules! path {
    (@part tenant) => { Part::Tenant };
    (@part folder) => { Part::Folder };
    (@part key) => { Part::Key };
    (@part $text:literal) => { Part::Is($text) };
    ($($part:tt)+) => { &[$(path!(@part $part)),+] };
}

/// All requests of the API. Of several patterns that fit a path, the first with the request's method
/// counts: a secret may be named `batch-get`, and is read and written like any other.
const TABLE: &[Entry] = &[
    Entry(Verb::Get, path!("/v1/tenants/" tenant "/secrets/" key), secrets::READ),
    Entry(Verb::Post, path!("/v1/tenants/" tenant "/secrets/batch-get"), lists::BATCH),
    Entry(Verb::Put, path!("/v1/tenants/" tenant "/secrets/" key), secrets::PUT),
    Entry(Verb::Delete, path!("/v1/tenants/" tenant "/secrets/" key), secrets::DELETE),
    Entry(Verb::Get, path!("/v1/tenants/" tenant "/secrets/" key "/explain"), secrets::EXPLAIN),
    Entry(Verb::Get, path!("/v1/tenants/" tenant "/secrets/" key "/versions"), versions::LIST),
    Entry(Verb::Post, path!("/v1/tenants/" tenant "/secrets/" key "/rollback"), versions::ROLLBACK),
    Entry(Verb::Get, path!("/v1/tenants/" tenant "/secrets/" key "/valid"), rotations::VALID),
    Entry(Verb::Post, path!("/v1/tenants/" tenant "/secrets/" key "/rotate"), rotations::ROTATE),
    Entry(Verb::Get, path!("/v1/tenants/" tenant "/secrets/" key "/rotation"), rotations::ONE),
    Entry(Verb::Post, path!("/v1/tenants/" tenant "/secrets/" key "/rotation/promote"), rotations::PROMOTE),
    Entry(Verb::Post, path!("/v1/tenants/" tenant "/secrets/" key "/rotation/retry"), rotations::RETRY),
    Entry(Verb::Post, path!("/v1/tenants/" tenant "/secrets/" key "/rotation/abort"), rotations::ABORT),
    Entry(Verb::Post, path!("/v1/tenants/" tenant "/secrets/" key "/rotation/retire"), rotations::RETIRE),
    Entry(Verb::Post, path!("/v1/tenants/" tenant "/secrets/" key "/rotation/rollback"), rotations::ROLL_BACK),
    Entry(Verb::Get, path!("/v1/rotations"), rotations::LIST),
    Entry(Verb::Get, path!("/v1/tenants/" tenant "/secrets"), lists::LIST),
    Entry(Verb::Get, path!("/v1/tenants"), tenants::LIST),
    Entry(Verb::Get, path!("/v1/tenants/" tenant), tenants::ONE),
    Entry(Verb::Post, path!("/v1/tenants/" tenant "/refresh"), tenants::REFRESH),
    // A shared folder has the requests of a tenant.
    Entry(Verb::Get, path!("/v1/folders" folder "/secrets/" key), secrets::READ),
    Entry(Verb::Post, path!("/v1/folders" folder "/secrets/batch-get"), lists::BATCH),
    Entry(Verb::Put, path!("/v1/folders" folder "/secrets/" key), secrets::PUT),
    Entry(Verb::Delete, path!("/v1/folders" folder "/secrets/" key), secrets::DELETE),
    Entry(Verb::Get, path!("/v1/folders" folder "/secrets/" key "/explain"), secrets::EXPLAIN),
    Entry(Verb::Get, path!("/v1/folders" folder "/secrets/" key "/versions"), versions::LIST),
    Entry(Verb::Post, path!("/v1/folders" folder "/secrets/" key "/rollback"), versions::ROLLBACK),
    Entry(Verb::Get, path!("/v1/folders" folder "/secrets"), lists::LIST),
    Entry(Verb::Get, path!("/v1/folders" folder), tenants::ONE),
    Entry(Verb::Post, path!("/v1/folders" folder "/refresh"), tenants::REFRESH),
    Entry(Verb::Get, path!("/v1/folders" folder "/secrets/" key "/valid"), rotations::VALID),
    Entry(Verb::Post, path!("/v1/folders" folder "/secrets/" key "/rotate"), rotations::ROTATE),
    Entry(Verb::Get, path!("/v1/folders" folder "/secrets/" key "/rotation"), rotations::ONE),
    Entry(Verb::Post, path!("/v1/folders" folder "/secrets/" key "/rotation/promote"), rotations::PROMOTE),
    Entry(Verb::Post, path!("/v1/folders" folder "/secrets/" key "/rotation/retry"), rotations::RETRY),
    Entry(Verb::Post, path!("/v1/folders" folder "/secrets/" key "/rotation/abort"), rotations::ABORT),
    Entry(Verb::Post, path!("/v1/folders" folder "/secrets/" key "/rotation/retire"), rotations::RETIRE),
    Entry(Verb::Post, path!("/v1/folders" folder "/secrets/" key "/rotation/rollback"), rotations::ROLL_BACK),
    Entry(Verb::Get, path!("/v1/folders"), tenants::FOLDERS),
    Entry(Verb::Get, path!("/v1/whoami"), token::WHO_AM_I),
    Entry(Verb::Get, path!("/v1/audit"), audit::SEARCH),
    Entry(Verb::Get, path!("/v1/events"), events::FOLLOW),
    Entry(Verb::Post, path!("/v1/hooks/infisical"), webhooks::NOTICE),
    Entry(Verb::Get, path!("/healthz"), process::ALIVE),
    Entry(Verb::Get, path!("/readyz"), process::READY),
    Entry(Verb::Get, path!("/metrics"), process::METRICS),
    Entry(Verb::Get, path!("/openapi.json"), openapi::DESCRIPTION),
    // The face for Infisical's clients, where it is on.
    Entry(Verb::Get, path!("/api/v3/secrets/raw"), read::LIST),
    Entry(Verb::Get, path!("/api/v4/secrets"), read::LIST),
    Entry(Verb::Get, path!("/api/v3/secrets/raw/" key), read::GET),
    Entry(Verb::Get, path!("/api/v4/secrets/" key), read::GET),
    Entry(Verb::Get, path!("/api/v3/secrets/raw/id/" key), read::BY_ID),
    Entry(Verb::Post, path!("/api/v3/secrets/raw/" key), write::CREATE),
    Entry(Verb::Patch, path!("/api/v3/secrets/raw/" key), write::UPDATE),
    Entry(Verb::Delete, path!("/api/v3/secrets/raw/" key), write::DELETE),
    Entry(Verb::Post, path!("/api/v3/secrets/batch/raw"), batch::CREATE),
    Entry(Verb::Patch, path!("/api/v3/secrets/batch/raw"), batch::UPDATE),
    Entry(Verb::Delete, path!("/api/v3/secrets/batch/raw"), batch::DELETE),
    Entry(Verb::Get, path!("/api/v1/folders"), folders::LIST),
    Entry(Verb::Get, path!("/api/v2/folders"), folders::LIST),
    Entry(Verb::Post, path!("/api/v1/folders"), folders::CREATE),
    Entry(Verb::Post, path!("/api/v2/folders"), folders::CREATE),
    Entry(Verb::Delete, path!("/api/v1/folders/" key), folders::DELETE),
    Entry(Verb::Delete, path!("/api/v2/folders/" key), folders::DELETE),
    Entry(Verb::Get, path!("/api/v1/projects/slug/" key), project::BY_SLUG),
    Entry(Verb::Get, path!("/api/v2/workspace/" key), project::BY_SLUG),
    Entry(Verb::Get, path!("/api/v1/workspace/slug/" key), project::BY_SLUG),
    Entry(Verb::Get, path!("/api/v1/workspace/" key), project::BY_ID),
    Entry(Verb::Post, path!("/api/v1/auth/universal-auth/login"), auth::LOG_IN),
    Entry(Verb::Post, path!("/api/v1/auth/token/renew"), auth::RENEW),
    Entry(Verb::Post, path!("/api/v1/auth/token/revoke"), auth::END),
    Entry(Verb::Get, path!("/api/status"), auth::STATUS),
];

/// What the face answers to a request that no entry fits.
const UNKNOWN: &Entry =
    &Entry(Verb::Get, path!("/api"), Operation { action: "unknown", parameters: &[], run: Run::Unknown });

struct Entry(Verb, &'static [Part], Operation);

enum Part {
    Is(&'static str),
    Tenant,
    /// A shared folder's name with the slash before it, as it is written in place of a tenant.
    Folder,
    Key,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verb {
    /// HEAD too.
    Get,
    Post,
    Put,
    Patch,
    Delete,
}

impl Verb {
    fn fits(self, method: &Method) -> bool {
        match self {
            Self::Get => matches!(*method, Method::GET | Method::HEAD),
            Self::Post => *method == Method::POST,
            Self::Put => *method == Method::PUT,
            Self::Patch => *method == Method::PATCH,
            Self::Delete => *method == Method::DELETE,
        }
    }

    /// As the header `Allow` lists it.
    fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET, HEAD",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        }
    }
}

/// Where a request's path leads.
#[derive(Clone, Copy)]
pub(super) struct Route<'a> {
    path: &'a str,
    /// The first of the resource, where none has the request's method.
    entry: &'static Entry,
    is_allowed: bool,
    pub(super) names: Names<'a>,
}

/// The path of a request to the face, as the table writes it: clients are given an address with or without
/// a slash at its end, and with or without `/api`, and may end a path with a slash.
fn below_api(path: &str) -> Option<&str> {
    if !path.starts_with("/api/") && !path.starts_with("//") {
        return None;
    }
    let without_slashes = path.trim_start_matches('/');
    let path = &path[path.len() - without_slashes.len() - 1..];
    // Of an address that ended with a slash, there are two between.
    let inner = path
        .strip_prefix("/api")
        .map(|rest| rest.strip_prefix('/').filter(|rest| rest.starts_with('/')).unwrap_or(rest));
    let path = inner.filter(|rest| rest.starts_with("/api/")).unwrap_or(path);
    path.starts_with("/api/").then(|| path.strip_suffix('/').unwrap_or(path))
}

/// The names in a path, where it fits the pattern. A name ends where the next '/' is.
fn names<'a>(pattern: &[Part], path: &'a str) -> Option<Names<'a>> {
    let (mut names, mut rest) = (Names::default(), path);
    for part in pattern {
        let (name, begins) = match part {
            Part::Is(text) => {
                rest = rest.strip_prefix(text)?;
                continue;
            }
            Part::Tenant => (&mut names.tenant, 0),
            Part::Folder => (&mut names.tenant, rest.starts_with('/').then_some(1)?),
            Part::Key => (&mut names.key, 0),
        };
        let length = rest.bytes().skip(begins).position(|byte| byte == b'/');
        (*name, rest) = rest.split_at(length.map_or(rest.len(), |length| begins + length));
    }
    rest.is_empty().then_some(names)
}

impl<'a> Route<'a> {
    /// Looks a request up in the table.
    pub(super) fn find(method: &Method, path: &'a str) -> Option<Self> {
        let below = below_api(path);
        let path = below.unwrap_or(path);
        let mut first = below.map(|path| Self { path, entry: UNKNOWN, is_allowed: true, names: Names::default() });
        for entry in TABLE {
            let Some(names) = names(entry.1, path) else { continue };
            let is_allowed = entry.0.fits(method);
            let route = Self { path, entry, is_allowed, names };
            if is_allowed {
                return Some(route);
            }
            first = first.or(Some(route));
        }
        first
    }

    /// How the request is answered; `None` if the resource lacks its method.
    pub(super) fn run(&self) -> Option<&'static Run> {
        self.is_allowed.then_some(&self.entry.2.run)
    }

    /// Whether it changes nothing, whatever it is.
    pub(super) fn is_read(&self) -> bool {
        self.is_allowed && matches!(self.entry.2.run, Run::Open(_) | Run::Lookup | Run::Read(_))
    }

    /// Whether it is one of the face for Infisical's clients.
    pub(super) fn is_infisicals(&self) -> bool {
        matches!(self.entry.1.first(), Some(Part::Is(text)) if text.starts_with("/api"))
    }

    /// Whether the resource is there for webhooks alone.
    pub(super) fn is_webhook(&self) -> bool {
        matches!(self.entry.2.run, Run::Webhook)
    }

    /// The request's name in the audit.
    pub(super) fn action(&self) -> &'static str {
        self.entry.2.action
    }

    /// The parameters that the request may have in its query.
    pub(super) fn parameters(&self) -> &'static [&'static str] {
        self.entry.2.parameters
    }

    /// The methods of this resource, as the header `Allow` lists them.
    fn allow(&self) -> String {
        let fits = |entry: &&Entry| names(entry.1, self.path).is_some();
        TABLE.iter().filter(fits).map(|entry| entry.0.as_str()).collect::<Vec<_>>().join(", ")
    }
}

/// Does what is asked, for who was let in.
pub(super) async fn dispatch(
    service: &Service,
    account: &Account<'_>,
    route: Option<&Route<'_>>,
    head: &Parts,
    body: Incoming,
) -> Result<Answer, Problem> {
    if service.audit.refuses_all() {
        return Err(Problem::unrecorded());
    }
    let Some(grant) = account.who.grant.as_deref() else { return Err(Refused::Missing.into()) };
    let route = route.ok_or_else(Problem::no_route)?;
    let not_allowed = || Problem::method_not_allowed(route.allow());
    let run = route.run().ok_or_else(not_allowed)?;
    let query = match route.is_infisicals() {
        true => Query::any(head.uri.query()),
        false => Query::parse(head.uri.query(), route.parameters())?,
    };
    let ask = Ask { service, account, grant, headers: &head.headers, query, names: route.names };
    match run {
        Run::Lookup => secrets::read(&ask).await,
        Run::Read(handler) | Run::Write(handler) => handler(&ask, body).await,
        // Those are answered before anybody is asked for a token.
        Run::Open(_) | Run::Webhook | Run::Login(_) | Run::Unknown => Err(not_allowed()),
    }
}

/// Each route's methods and path, as the API's description writes them.
#[cfg(test)]
pub(super) fn templates() -> Vec<(String, String)> {
    let text = |part: &Part| match part {
        Part::Is(text) => *text,
        Part::Tenant => "{tenant}",
        Part::Folder => "/{folder}",
        Part::Key => "{key}",
    };
    // The face is described by Infisical.
    let is_ours = |entry: &&Entry| !matches!(entry.1.first(), Some(Part::Is(text)) if text.starts_with("/api"));
    let each = TABLE.iter().filter(is_ours).flat_map(|entry| {
        let path: String = entry.1.iter().map(text).collect();
        entry.0.as_str().split(", ").map(move |method| (method.to_owned(), path.clone()))
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request's name in the audit, with the names in its path; `None` if there is no such route.
    fn found<'a>(method: &Method, path: &'a str) -> Option<(&'static str, &'a str, &'a str)> {
        let route = Route::find(method, path).filter(|route| route.is_allowed)?;
        Some((route.action(), route.names.tenant, route.names.key))
    }

    fn get(path: &str) -> Option<(&'static str, &str, &str)> {
        found(&Method::GET, path)
    }

    #[test]
    fn the_table_knows_its_routes_and_no_others() {
        assert_eq!(get("/v1/whoami"), Some(("whoami", "", "")));
        assert_eq!(found(&Method::POST, "/v1/hooks/infisical"), Some(("notice", "", "")));
        assert_eq!(get("/v1/hooks"), None);
        assert_eq!(get("/v1/tenants/a/secrets/b"), Some(("read", "a", "b")));
        assert_eq!(found(&Method::HEAD, "/v1/tenants/a/secrets/b"), Some(("read", "a", "b")));
        assert_eq!(get("/v1/tenants/a/secrets/b%2Fc"), Some(("read", "a", "b%2Fc")));
        assert_eq!(get("/v1/tenants/a/secrets/explain"), Some(("read", "a", "explain")));
        assert_eq!(get("/v1/tenants/a/secrets/b/explain"), Some(("explain", "a", "b")));
        // A shared folder comes with its slash; its name may be wrong, as a tenant may.
        assert_eq!(get("/v1/folders//secrets/b"), Some(("read", "/", "b")));
        assert_eq!(get("/v1/folders/a/secrets/b"), Some(("read", "/a", "b")));
        assert_eq!(get("/v1/folders/a/secrets"), Some(("list", "/a", "")));
        assert_eq!(get("/v1/folders/a"), Some(("tenant", "/a", "")));
        assert_eq!((get("/v1/folders"), get("/v1/folders/")), (Some(("folders", "", "")), Some(("tenant", "/", ""))));
        for wrong in ["/v1/foldersx", "/v1/foldersa/secrets/b", "/v1/folders/a/b"] {
            assert_eq!(get(wrong), None, "{wrong}");
        }
        // A secret's name is told by its place, whatever it is.
        for name in ["versions", "rollback", "explain", "batch-get"] {
            let path = format!("/v1/tenants/a/secrets/{name}");
            assert_eq!(get(&path), Some(("read", "a", name)));
            assert_eq!(found(&Method::PUT, &path), Some(("put", "a", name)));
        }
        assert_eq!(found(&Method::POST, "/v1/tenants/a/secrets/batch-get"), Some(("batch", "a", "")));
        for name in ["b", "versions", "rollback", "batch-get"] {
            let below = |what| format!("/v1/tenants/a/secrets/{name}/{what}");
            assert_eq!(get(&below("versions")), Some(("versions", "a", name)));
            assert_eq!(found(&Method::POST, &below("rollback")), Some(("rollback", "a", name)));
            assert_eq!(found(&Method::GET, &below("valid")), Some(("valid", "a", name)));
            assert_eq!(found(&Method::POST, &below("rotate")), Some(("rotate", "a", name)));
            assert_eq!(found(&Method::GET, &below("rotation")), Some(("rotation", "a", name)));
            for (step, action) in [
                ("rotation/promote", "promote"),
                ("rotation/retry", "retry_rotation"),
                ("rotation/abort", "abort_rotation"),
                ("rotation/retire", "retire"),
                ("rotation/rollback", "roll_back_rotation"),
            ] {
                let path = below(step);
                assert_eq!(found(&Method::POST, &path), Some((action, "a", name)), "{path}");
            }
            assert_eq!(get(&below("batch-get")), None);
        }
        let found_api = |method: &Method, path| found(method, path).filter(|(action, ..)| *action != "unknown");
        for path in [
            "/api/v3/secrets/raw",
            "/api/v3/secrets/raw/",
            "//api/v3/secrets/raw",
            "/api/api/v4/secrets",
            "/api//api/v4/secrets",
        ] {
            assert_eq!(found_api(&Method::GET, path), Some(("list", "", "")), "{path}");
        }
        assert_eq!(found_api(&Method::PATCH, "/api/v3/secrets/raw/a%2Fb"), Some(("put", "", "a%2Fb")));
        assert_eq!(found_api(&Method::POST, "/api/v1/auth/universal-auth/login/"), Some(("login", "", "")));
        for path in ["/api/v3/secrets/", "/api/x", "/api/v3/secrets/raw/a/b", "/api/", "/api/v4/secrets/a/b"] {
            assert_eq!(found_api(&Method::GET, path), None, "{path}");
            assert!(Route::find(&Method::GET, path).is_some_and(|route| route.is_infisicals()), "{path}");
        }
        assert_eq!(found_api(&Method::PUT, "/api/v3/secrets/raw/a"), None);
        for wrong in
            ["/", "", "/v1", "/v1/tenants/a/secrets/b/c", "/v1/tenants/a/secrets/b/explain/", "/healthz/", "//"]
        {
            assert!(Route::find(&Method::GET, wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn a_resource_tells_its_methods_where_it_lacks_one() {
        for (path, allow) in [
            ("/v1/tenants/a/secrets/b", "GET, HEAD, PUT, DELETE"),
            ("/v1/tenants/a/secrets/batch-get", "GET, HEAD, POST, PUT, DELETE"),
            ("/v1/tenants/a/refresh", "POST"),
            ("/readyz", "GET, HEAD"),
        ] {
            let route = Route::find(&Method::PATCH, path).unwrap();
            assert!(route.run().is_none());
            assert_eq!(route.allow(), allow);
        }
        // The first entry names it in the audit: a record of it has the tenant and the key.
        let route = Route::find(&Method::PATCH, "/v1/tenants/a/secrets/batch-get").unwrap();
        assert_eq!((route.action(), route.names), ("read", Names { tenant: "a", key: "batch-get" }));
    }
}
