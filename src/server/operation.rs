//! What can be asked of a resource, as its file in `api/` describes it and the table of routes lists it.

use futures_util::future::BoxFuture;
use hyper::body::Incoming;

use super::{
    Service,
    ask::Ask,
    infisical_api::auth::Asks,
    respond::{Answer, Problem},
};

/// One method of a resource.
pub(super) struct Operation {
    /// The request's name in the audit.
    pub(super) action: &'static str,
    /// The parameters that it may have in its query.
    pub(super) parameters: &'static [&'static str],
    pub(super) run: Run,
}

/// How a request is answered.
pub(super) enum Run {
    /// Told to everybody.
    Open(fn(&Service) -> Answer),
    /// Brings its own proof in place of a token.
    Webhook,
    /// Brings client credentials, or an access token, in its body.
    Login(Asks),
    /// A request of the face that there is no route for: told to everybody.
    Unknown,
    /// The lookup of one secret: what is awaited in `routes::dispatch` is moved, and wiped at its end, in
    /// its whole size, and a lookup must not pay for that of the rest. So the rest is boxed.
    Lookup,
    /// Changes nothing.
    Read(Handler),
    /// Changes something.
    Write(Handler),
}

type Handler = for<'a> fn(&'a Ask<'a>, Incoming) -> BoxFuture<'a, Result<Answer, Problem>>;

/// The names in a path, as they came, still percent-encoded; empty where the path has none. Only a shared
/// folder's begins with a slash.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Names<'a> {
    pub(super) tenant: &'a str,
    pub(super) key: &'a str,
}
