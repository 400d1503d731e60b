//! A stream of changes: Server-Sent Events, as the HTML standard has them
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).

use std::{collections::HashSet, fmt::Write as _, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use percent_encoding::percent_decode_str;
use serde::Serialize;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};
use utoipa::{OpenApi, ToSchema};

use crate::{
    access::{Access, Action, Grant, LoginMark, Refused},
    attachment::Attachment,
    budget::Held,
    clock::Clock,
    resolver::{Event, EventFollower, EventId, Reaches, What},
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
            pattern = "^/?[a-z0-9][a-z0-9_-]{0,62}(,/?[a-z0-9][a-z0-9_-]{0,62}){0,9}$"),
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
    let reaches = reaches(Arc::clone(&grant), tenants);
    let (follower, first, place) = ask.service.resolver.follow_events(behind.as_deref(), reaches).await;
    let telling = Telling {
        login: ask.service.access.login_in(ask.headers.get(header::AUTHORIZATION)),
        tokens: ask.service.access.replacements(),
        access: Arc::clone(&ask.service.access),
        attachment: Arc::clone(&ask.service.attachment),
        clock: ask.service.resolver.clock().clone(),
        stopping: ask.service.stopping.subscribe(),
        grant,
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

/// The scope of a stream: its token's, narrowed to the tenants that were asked for.
fn reaches(grant: Arc<Grant>, tenants: Option<HashSet<Tenant>>) -> Reaches {
    Arc::new(move |tenant, key| {
        tenants.as_ref().is_none_or(|tenants| tenants.contains(tenant))
            && grant.reaches(tenant.as_str())
            && key.is_none_or(|key| grant.reaches_key(key.as_str()))
    })
}

/// A stream, told by a task of its own until the client or the token is gone.
struct Telling {
    access: Arc<Access>,
    /// Changes when other tokens are good.
    tokens: watch::Receiver<()>,
    grant: Arc<Grant>,
    /// The login that it was opened with, if it was one.
    login: Option<LoginMark>,
    attachment: Arc<Attachment>,
    clock: Clock,
    stopping: watch::Receiver<bool>,
    sender: mpsc::Sender<Bytes>,
    _held: Held,
}

impl Telling {
    async fn run(mut self, mut follower: EventFollower, first: Vec<Event>, place: EventId) {
        let mut beats = interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        if !self.tell(first).await || !self.send(format!("id: {place}\n\n")).await {
            return;
        }
        loop {
            let next = tokio::select! {
                // In this order: changes that were missed come before the comment that says that there are none.
                biased;
                () = follower.wait() => follower.take(),
                _ = beats.tick() => {
                    if !self.send(":\n\n".to_owned()).await {
                        return;
                    }
                    continue;
                }
                goes_on = self.goes_on() => {
                    if !goes_on {
                        return;
                    }
                    continue;
                }
            };
            // It reads too slowly where not all are kept. If it comes again, it is told what it has missed.
            let Some(events) = next else { return };
            if !self.tell(events).await {
                return;
            }
        }
    }

    /// Completes with `false` when the stream is to end, with `true` where it may have been.
    async fn goes_on(&mut self) -> bool {
        tokio::select! {
            () = self.sender.closed() => false,
            () = async { drop(self.stopping.wait_for(|stopping| *stopping).await) } => false,
            _ = self.tokens.changed() => self.is_admitted(),
        }
    }

    fn is_admitted(&self) -> bool {
        let now = self.clock.moment();
        self.access.still_admits(&self.grant, self.login.as_ref(), now.wall()) && self.attachment.holds(now)
    }

    async fn tell(&mut self, events: Vec<Event>) -> bool {
        let mut text = String::new();
        for event in &events {
            write(&mut text, event);
            if text.len() > PIECE && !self.send(std::mem::take(&mut text)).await {
                return false;
            }
        }
        text.is_empty() || self.send(text).await
    }

    /// Whether the caller is still admitted, and the client has taken the piece in time.
    async fn send(&mut self, text: String) -> bool {
        let (sender, end) = (self.sender.clone(), Instant::now() + PATIENCE);
        let mut sending = std::pin::pin!(timeout_at(end, sender.send(text.into())));
        if !self.is_admitted() {
            return false;
        }
        loop {
            tokio::select! {
                sent = &mut sending => return matches!(sent, Ok(Ok(()))),
                goes_on = self.goes_on() => {
                    if !goes_on {
                        return false;
                    }
                }
            }
        }
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
