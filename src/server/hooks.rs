//! Notices of upstream: what a folder that has changed is told by. They come without a token;
//! that they are signed is what lets them in.
//!
//! Whoever has no secret to sign with gets no further than the signature: a body of bounded
//! size and time, a few at once, and a failure on the peer's account. Who sends a signed
//! notice, again even, gets a folder read within the budget of the refreshes, at worst.

use http::{StatusCode, request::Parts};
use hyper::body::Incoming;
use serde::Serialize;
use tokio::sync::Semaphore;
use utoipa::ToSchema;

use super::{
    Service, body,
    connection::Requests,
    entrance::caller,
    respond::{Answer, JSON, Problem, respond},
};
use crate::{
    access::audit::{Account, Act, Outcome},
    resolver::ResolveError,
    tenant::Tenant,
    tiers::{
        database::TakenNotice,
        upstream::infisical::{About, Unproved, Webhook},
    },
};

/// Bodies of those who have proved nothing yet that are read at once.
const AT_ONCE: usize = 64;

/// Takes notices.
#[derive(Debug)]
pub(super) struct Hooks {
    webhook: Webhook,
    receiving: Semaphore,
}

impl Hooks {
    pub(super) fn new(webhook: Webhook) -> Self {
        Self { webhook, receiving: Semaphore::new(AT_ONCE) }
    }

    /// `POST /v1/hooks/infisical`
    pub(super) async fn take(
        &self,
        service: &Service,
        connection: &Requests,
        account: &Account<'_>,
        head: &Parts,
        body: Incoming,
    ) -> Result<Answer, Problem> {
        let caller = caller(service, connection, account.who.peer);
        service.access.admit(&caller).inspect_err(|refused| service.count_limited(refused))?;
        let body = {
            let Ok(_receiving) = self.receiving.try_acquire() else {
                return Err(Problem::too_many_notices());
            };
            let read = body::read_bytes(body, Webhook::LONGEST_BODY, service.limits().body_timeout).await;
            read.map_err(Problem::of_notice)?
        };
        let now = service.resolver.clock.now();
        let mut headers = head.headers.get_all(Webhook::HEADER).iter();
        let header = headers.next().and_then(|header| header.to_str().ok()).filter(|_| headers.next().is_none());
        let notice = match self.webhook.read(header, &body, now) {
            Ok(notice) => notice,
            Err(unproved) => {
                if unproved == Unproved::Forged {
                    service.access.fail(&caller).inspect_err(|refused| service.count_limited(refused))?;
                }
                return Err(unproved.into());
            }
        };
        connection.let_in();
        let Some(_in_flight) = service.in_flight.begin(service.limits().max_in_flight) else {
            service.metrics.count("secretier_limited_total", &[("limit", "in_flight")]);
            return Err(Problem::too_many_in_flight());
        };
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
        // Others must hear of it where they hold what the database has no copy of.
        let told: Vec<Tenant> = tenant.filter(|tenant| resolver.is_kept_apart(tenant)).into_iter().cloned().collect();
        match resolver.database.take_notice(notice.digest, &told).await {
            Ok(TakenNotice::New) => {}
            Ok(TakenNotice::Replayed) => return Err(Problem::replayed()),
            Ok(TakenNotice::TooMany) => return Err(Problem::too_many_notices()),
            Err(error) => return Err(ResolveError::Database(std::sync::Arc::new(error)).into()),
        }
        account_for(service, account, tenant);
        let refreshing = match tenant {
            Some(tenant) if resolver.hasten(tenant) => vec![tenant.as_str()],
            Some(_) => Vec::new(),
            None => {
                resolver.look_soon();
                Vec::new()
            }
        };
        Ok(accepted(&refreshing))
    }
}

fn account_for(service: &Service, account: &Account<'_>, tenant: Option<&Tenant>) {
    let tenant = tenant.map_or("", Tenant::as_str);
    let act = Act { action: "notice", tenant, key: "", outcome: Outcome::Done, tier: None, code: None };
    service.audit.count(account, act, service.resolver.clock.now());
}

fn accepted(refreshing: &[&str]) -> Answer {
    // Texts always serialise.
    let body = serde_json::to_vec(&Noticed { refreshing }).unwrap_or_default();
    respond(StatusCode::ACCEPTED, JSON, body.into())
}

/// What follows from a notice.
#[derive(Serialize, ToSchema)]
pub(super) struct Noticed<'a> {
    /// The tenants whose folders are read soon, if anything is held of them.
    refreshing: &'a [&'a str],
}
