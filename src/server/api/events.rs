//! A stream of changes: Server-Sent Events, as the HTML standard has them
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).

use std::{collections::HashSet, fmt::Write as _, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use percent_encoding::percent_decode_str;
use serde::Serialize;
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, timeout},
};
use utoipa::{OpenApi, ToSchema};

use crate::{
    access::{Access, Action, Grant, Refused},
    attachment::Attachment,
    budget::Held,
    clock::Clock,
    resolver::{Event, EventFollower, EventId, What},
    server::{
        ask::Ask,
        budgets::Thing,
        operation::{Operation, Run},
        outgoing::Body,
        respond::{Answer, Problem, ProblemBody, respond_with},
    },
    tenant::Tenant,
};

#[derive(OpenApi)]
#[openapi(paths(follow))]
pub(super) struct Document;

pub(in crate::server) const FOLLOW: Operation =
    Operation { action: "events", parameters: &["tenants"], run: Run::Read(|ask, _| Box::pin(follow(ask))) };

const EVENTS: HeaderValue = HeaderValue::from_static("text/event-stream");

/// How often a comment is sent, so that a silent stream can be told from a broken one.
const BEAT: Duration = Duration::from_secs(2);

/// How long a piece may wait for a client that does not read.
const PATIENCE: Duration = Duration::from_secs(10);

/// Pieces that wait for the client.
const WAITING: usize = 2;

/// The longest piece, in bytes, unless one event is longer.
const PIECE: usize = 16 << 10;

#[utoipa::path(
    get, path = "/v1/events", operation_id = "events",
    description = "Server-Sent Events. `event: changed` with `data: {\"tenant\",\"key\",\"version\",\"etag\"}` tells that a \
        secret has another value, once this instance serves it; `version` and `etag` are null where it is gone. \
        `event: reset` tells that changes may have been missed: what is known of any secret may be old. A comment comes \
        every 2 s. A stream that is opened with the header `Last-Event-ID` goes on behind that event. It ends when the \
        token does, and where the client does not read.",
    params(
        ("tenants" = Option<String>, Query, description = "Only these tenants, separated by commas",
            pattern = "^[a-z0-9][a-z0-9_-]{0,62}(,[a-z0-9][a-z0-9_-]{0,62}){0,9}$"),
        ("Last-Event-ID" = Option<String>, Header, description = "The `id` of the last event that was heard"),
    ),
    responses(
        (status = 200, content((String = "text/event-stream")), description = "The stream, which does not end by itself"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`"),
        (status = 403, body = ProblemBody, description = "`out_of_scope`, if the token does not \
            read, or does not reach one of these tenants")
    )
)]
async fn follow(ask: &Ask<'_>) -> Result<Answer, Problem> {
    ask.grant.allow_action(Action::Read)?;
    let tenants = ask.query.get("tenants").map(|names| wanted(ask.grant, names)).transpose()?;
    let grant = ask.account.who.grant.clone().ok_or(Refused::Missing)?;
    let held = ask.service.hold(Thing::Stream, ask.grant.holds(), 1)?;
    ask.count("events", "", "", None);
    let (sender, receiver) = mpsc::channel(WAITING);
    let behind = ask.headers.get("last-event-id").map(|id| id.to_str().unwrap_or("").to_owned());
    let (follower, first, place) = ask.service.resolver.follow_events(behind.as_deref()).await;
    let telling = Telling {
        access: Arc::clone(&ask.service.access),
        attachment: Arc::clone(&ask.service.attachment),
        clock: ask.service.resolver.clock().clone(),
        stopping: ask.service.stopping.subscribe(),
        scope: Scope { grant, tenants },
        sender,
        _held: held,
    };
    // It ends at once where the body is dropped, as that of HEAD is.
    tokio::spawn(telling.run(follower, first, place));
    Ok(respond_with(StatusCode::OK, EVENTS, Body::live(receiver)))
}

/// The tenants that a query names, each of which the token must reach.
fn wanted(grant: &Grant, names: &str) -> Result<HashSet<Tenant>, Problem> {
    let mut tenants = HashSet::new();
    let names = percent_decode_str(names).decode_utf8().map_err(|_| Problem::invalid_tenant())?;
    for name in names.split(',') {
        let tenant: Tenant = name.parse().map_err(|_| Problem::invalid_tenant())?;
        grant.allow_tenant(Action::Read, tenant.as_str())?;
        tenants.insert(tenant);
    }
    Ok(tenants)
}

/// What a stream tells of: what its token may read, of the tenants that were asked for.
struct Scope {
    grant: Arc<Grant>,
    tenants: Option<HashSet<Tenant>>,
}

impl Scope {
    fn has(&self, what: &What) -> bool {
        let reaches = |tenant: &Tenant| {
            self.tenants.as_ref().is_none_or(|tenants| tenants.contains(tenant)) && self.grant.reaches(tenant.as_str())
        };
        match what {
            What::Changed { tenant, key, .. } => reaches(tenant) && self.grant.reaches_key(key.as_str()),
            What::Reset(Some(tenant)) => reaches(tenant),
            What::Reset(None) => true,
        }
    }
}

/// A stream, told by a task of its own until the client or the token is gone.
struct Telling {
    access: Arc<Access>,
    attachment: Arc<Attachment>,
    clock: Clock,
    stopping: watch::Receiver<bool>,
    scope: Scope,
    sender: mpsc::Sender<Bytes>,
    _held: Held,
}

impl Telling {
    async fn run(self, mut follower: EventFollower, first: Vec<Event>, place: EventId) {
        let mut tokens = self.access.replacements();
        let mut beats = interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        if !self.tell(first).await || !self.send(format!("id: {place}\n\n")).await {
            return;
        }
        let (gone, mut stopping) = (self.sender.clone(), self.stopping.clone());
        loop {
            let told = tokio::select! {
                // In this order: changes that were missed come before the comment that says that there are none.
                biased;
                () = gone.closed() => return,
                () = async { drop(stopping.wait_for(|stopping| *stopping).await) } => return,
                _ = tokens.changed() => true,
                () = follower.wait() => match follower.take() {
                    Some(events) => self.tell(events).await,
                    // It reads too slowly. Where it comes again, it is told what it has missed, or a reset.
                    None => return,
                },
                _ = beats.tick() => self.send(":\n\n".to_owned()).await,
            };
            if !told || !self.is_admitted() {
                return;
            }
        }
    }

    fn is_admitted(&self) -> bool {
        let now = self.clock.moment();
        self.access.still_admits(&self.scope.grant, now.wall()) && self.attachment.holds(now)
    }

    async fn tell(&self, events: Vec<Event>) -> bool {
        let mut text = String::new();
        for event in events.iter().filter(|event| self.scope.has(&event.what)) {
            write(&mut text, event);
            if text.len() > PIECE && !self.send(std::mem::take(&mut text)).await {
                return false;
            }
        }
        text.is_empty() || self.send(text).await
    }

    /// Whether the client has taken it in time.
    async fn send(&self, text: String) -> bool {
        matches!(timeout(PATIENCE, self.sender.send(text.into())).await, Ok(Ok(())))
    }
}

/// A changed secret, without its value.
#[derive(Serialize, ToSchema)]
struct Changed<'a> {
    tenant: &'a str,
    key: &'a str,
    version: Option<i64>,
    etag: Option<String>,
}

/// Appends an event in the form of the stream. JSON has its line ends escaped.
fn write(text: &mut String, Event { id, what }: &Event) {
    // Writing to memory never fails, and texts and numbers always serialise.
    let _ = match what {
        What::Changed { tenant, key, found } => {
            let (version, etag) = found.as_ref().map(|(version, etag)| (*version, format!("\"{etag}\""))).unzip();
            let data = Changed { tenant: tenant.as_str(), key: key.as_str(), version, etag };
            let data = serde_json::to_string(&data).unwrap_or_default();
            write!(text, "event: changed\nid: {id}\ndata: {data}\n\n")
        }
        What::Reset(_) => write!(text, "event: reset\nid: {id}\ndata: {{}}\n\n"),
    };
}
