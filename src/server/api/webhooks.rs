//! Upstream's webhooks, which say that a folder has changed. They come without a token;
//! their signature admits them.
//!
//! A sender without the signing secret gets no further than the signature: a header that could be
//! one, a body of bounded size and time, a few at once, and a failure counted for the peer. A
//! sender of a signed webhook, even a repeated one, causes at worst a read of a folder
//! within the budget of the refreshes.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{StatusCode, request::Parts};
use hyper::body::Incoming;
use serde::Serialize;
use tokio::sync::oneshot;
use utoipa::{OpenApi, ToSchema};
use zeroize::Zeroizing;

use crate::{
    access::{
        Caller, Peer,
        audit::{Account, Act, Outcome},
    },
    resolver::{About, ResolveError, TakenWebhook, Unverified, Webhook},
    server::{
        Limits, Service, body,
        budgets::{Room, Thing},
        connection::Requests,
        operation::{Operation, Run},
        respond::{Answer, JSON, Problem, ProblemBody, respond},
    },
    tenant::Tenant,
};

#[derive(OpenApi)]
#[openapi(paths(take_notice))]
pub(super) struct Document;

pub(in crate::server) const NOTICE: Operation = Operation { action: "notice", parameters: &[], run: Run::Webhook };

/// Bodies of senders not authenticated yet that are read at once.
const AT_ONCE: usize = 64;

/// The same, for one peer.
const AT_ONCE_OF_ONE: usize = 16;

/// The longest time for 64 KiB to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(2);

/// Takes webhooks.
#[derive(Debug)]
pub(in crate::server) struct Hooks {
    webhook: Arc<dyn Webhook>,
    readers: Readers,
}

/// The bodies that are being read, the oldest first.
///
/// Where there is no room for one more, the one that has been arriving longest is given up: of
/// the same peer where it has its share, else of the peer that has most. A genuine webhook arrives
/// at once, headers and body, and that many others would have to overtake it while it is read; one
/// that is sent slowly to keep a place keeps it only until another needs it.
///
/// New bodies, and those that are given up, are decided under one lock. A body that is given up
/// at the moment when it is complete goes on: it has left its place.
#[derive(Debug, Default)]
pub(in crate::server) struct Readers {
    reading: Mutex<Vec<Reader>>,
    numbers: AtomicU64,
}

#[derive(Debug)]
struct Reader {
    number: u64,
    peer: Peer,
    /// Dropped to give the body up.
    _goes_on: oneshot::Sender<()>,
}

/// A place among the bodies that are being read.
pub(in crate::server) struct Reading<'a> {
    readers: &'a Readers,
    number: u64,
    /// Completes when the body is given up.
    pub(in crate::server) given_up: oneshot::Receiver<()>,
}

impl Readers {
    /// Takes a place; the oldest body gives its place up where there is none.
    pub(in crate::server) fn begin(&self, peer: Peer) -> Reading<'_> {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let (goes_on, given_up) = oneshot::channel();
        let mut reading = self.lock();
        let of = |peer: Peer, reading: &[Reader]| reading.iter().filter(|reader| reader.peer.is_one_with(peer)).count();
        let crowded = match of(peer, &reading) >= AT_ONCE_OF_ONE {
            true => Some(peer),
            false if reading.len() < AT_ONCE => None,
            false => reading.iter().map(|reader| reader.peer).max_by_key(|peer| of(*peer, &reading)),
        };
        let oldest = crowded.and_then(|peer| reading.iter().position(|reader| reader.peer.is_one_with(peer)));
        oldest.map(|oldest| reading.remove(oldest));
        reading.push(Reader { number, peer, _goes_on: goes_on });
        Reading { readers: self, number, given_up }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Reader>> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.readers.lock().retain(|reader| reader.number != self.number);
    }
}

impl Hooks {
    pub(in crate::server) fn new(webhook: Arc<dyn Webhook>) -> Self {
        Self { webhook, readers: Readers::default() }
    }

    /// Reads a body, unless another needs its place before it is complete.
    async fn receive(&self, service: &Service, caller: &Caller, body: Incoming) -> Result<Zeroizing<Vec<u8>>, Problem> {
        let Limits { bounds, body_timeout, .. } = service.limits();
        let mut room = Room::new(&service.budgets, caller.holds(), bounds, &service.metrics)?;
        let mut reading = self.readers.begin(caller.peer);
        let body = body::read_bytes(body, self.webhook.longest_body(), body_timeout.min(BODY_TIMEOUT), &mut room);
        tokio::select! {
            // A body that is given up just when it is complete is read.
            biased;
            body = body => body.map_err(Problem::of_notice),
            _ = &mut reading.given_up => {
                service.metrics.count("secretier_limited_total", &[("limit", "webhooks")]);
                Err(Problem::too_many_webhooks())
            }
        }
    }
}

fn account_for(service: &Service, account: &Account<'_>, tenant: Option<&Tenant>) {
    let tenant = tenant.map_or("", Tenant::as_str);
    let act = Act { action: "notice", tenant, key: "", outcome: Outcome::Done, tier: None, code: None };
    service.audit.count(account, act, service.resolver.clock().now());
}

#[utoipa::path(
    post, path = "/v1/hooks/infisical", operation_id = "take_webhook",
    description = "A webhook of Infisical: a folder has changed. Wants no token but a signature, and is there only \
        where `infisical.webhook_secret` is set; elsewhere the path is like any that there is not.",
    security(("signature" = [])),
    request_body(
        content((serde_json::Value = "application/json")),
        description = "Infisical's notice, at most 64 KiB. Whatever `Content-Type` says, it is JSON"
    ),
    responses(
        (status = 202, body = WebhookTaken, description = "Taken, or none of this instance's affairs"),
        (status = 400, body = ProblemBody, description = "`invalid_body`"),
        (status = 401, body = ProblemBody, description = "`signature_invalid`, `signature_expired`"),
        (status = 409, body = ProblemBody, description = "`webhook_replayed`")
    )
)]
pub(in crate::server) async fn take_notice(
    hooks: &Hooks,
    service: &Service,
    connection: &Requests,
    account: &Account<'_>,
    head: &Parts,
    body: Incoming,
) -> Result<Answer, Problem> {
    let caller = connection.with_caller(&service.access, account.who.peer, Caller::clone);
    service.access.admit(&caller).inspect_err(|refused| service.count_limited(refused))?;
    let mut headers = head.headers.get_all(hooks.webhook.header()).iter();
    let header = headers.next().and_then(|header| header.to_str().ok()).filter(|_| headers.next().is_none());
    let unverified = |unverified: Unverified| -> Result<Answer, Problem> {
        if unverified == Unverified::Forged {
            service.access.fail(&caller).inspect_err(|refused| service.count_limited(refused))?;
        }
        Err(unverified.into())
    };
    // Checked before anything is read: this sender could not prove itself.
    let Some(header) = header.filter(|header| hooks.webhook.may_be_signature(header)) else {
        return unverified(Unverified::Forged);
    };
    body::check_encoding(&head.headers)?;
    let body = hooks.receive(service, &caller, body).await?;
    let now = service.resolver.clock().now();
    let notice = match hooks.webhook.read(Some(header), &body, now) {
        Ok(notice) => notice,
        Err(why) => return unverified(why),
    };
    connection.let_in();
    let _place = service.hold(Thing::Place, caller.holds(), 1)?;
    if service.audit.refuses_all() {
        return Err(Problem::unrecorded());
    }
    let resolver = &service.resolver;
    let tenant = match &notice.about {
        About::Tenant(tenant) => Some(tenant),
        About::Tenants => None,
        About::Nothing => {
            account_for(service, account, None);
            return Ok(accepted(&[]));
        }
    };
    // Other instances must hear of it where they hold more than the database has copies of.
    let told: Vec<Tenant> = tenant.filter(|tenant| resolver.is_kept_apart(tenant)).into_iter().cloned().collect();
    match resolver.database().take_notice(notice.digest, &told).await {
        Ok(TakenWebhook::New) => {}
        Ok(TakenWebhook::Replayed) => return Err(Problem::replayed()),
        Ok(TakenWebhook::TooMany) => return Err(Problem::too_many_webhooks()),
        Err(error) => return Err(ResolveError::Database(std::sync::Arc::new(error)).into()),
    }
    account_for(service, account, tenant);
    let refreshing = match tenant {
        Some(tenant) if resolver.queue_refresh(tenant) => vec![tenant.as_str()],
        Some(_) => Vec::new(),
        None => {
            resolver.look_soon();
            Vec::new()
        }
    };
    Ok(accepted(&refreshing))
}

fn accepted(refreshing: &[&str]) -> Answer {
    // Texts always serialise.
    let body = serde_json::to_vec(&WebhookTaken { refreshing }).unwrap_or_default();
    respond(StatusCode::ACCEPTED, JSON, body.into())
}

/// What follows from a notice.
#[derive(Serialize, ToSchema)]
struct WebhookTaken<'a> {
    /// The tenants whose folders are read soon, if anything is held of them.
    refreshing: &'a [&'a str],
}
