//! `/api/status`, which Infisical answers without a token and outside of its rate limits.

use std::{error::Error as _, sync::atomic::Ordering};

use http::{Method, header};

use super::{
    super::Cause,
    call::Call,
    client::{Client, Request},
    wire,
};
use crate::{clock::Timestamp, log};

/// The answer to a question for the server's own state.
pub(super) struct Status {
    pub(super) status: u16,
    /// Whether it is JSON, as Infisical answers: a firewall's page is not.
    pub(super) is_json: bool,
    /// Where a redirect leads.
    pub(super) location: Option<String>,
    /// The server's clock.
    pub(super) date: Option<Timestamp>,
}

/// Why there is no answer.
pub(super) struct NoStatus {
    pub(super) cause: Cause,
    /// The system's own words.
    pub(super) words: Option<String>,
}

impl Client {
    /// While the tier is left alone after failures, asks for the server's state, so that its return
    /// is noticed at once: the first good answer after one that was not lets the trial call be made.
    /// A server that is well by this and fails all the same is tried in its time.
    pub(super) async fn notice_recovery(&self) {
        if self.breaker().check().is_ok() {
            self.was_out.store(false, Ordering::Relaxed);
            return;
        }
        let is_well = self.status().await.is_ok_and(|status| status.is_json && (200..=299).contains(&status.status));
        if !is_well {
            self.was_out.store(true, Ordering::Relaxed);
        } else if self.was_out.swap(false, Ordering::Relaxed) {
            self.breaker().try_now();
        }
    }

    /// Asks for the server's own state, whatever state the tier is in. It is not like other calls:
    /// it takes nothing of the budget, and neither opens nor closes the breaker.
    pub(super) async fn status(&self) -> Result<Status, NoStatus> {
        let no_status = |cause| NoStatus { cause, words: None };
        let request = Request {
            call: Call::Read,
            method: Method::GET,
            path: "/api/status".to_owned(),
            query: Vec::new(),
            body: None,
            known: None,
        };
        let request = self.http_request(&request, None).map_err(|_| no_status(Cause::Connection))?;
        let (http, timeout) = self.http();
        let answer = async {
            let response = http.execute(request).await.map_err(|error| match error.is_timeout() {
                true if error.is_connect() && self.has_proxy() => no_status(Cause::ProxyTimeout),
                true => no_status(Cause::Timeout),
                // The error itself contains the address; its sources are the system's words.
                false => NoStatus { cause: Cause::of_connection(&error), words: error.source().map(log::chain) },
            })?;
            let status = response.status().as_u16();
            let text = |name: header::HeaderName| response.headers().get(name)?.to_str().ok().map(str::to_owned);
            let (location, date) = (text(header::LOCATION), text(header::DATE));
            let body = self.body(response).await.map_err(|_| no_status(Cause::Connection))?;
            let said = wire::read::<wire::ServerStatus>(&body).ok();
            let by_body = said.as_ref().and_then(|said| Timestamp::from_rfc3339(said.date.as_deref()?));
            let by_header = || Timestamp::from_http_date(date.as_deref()?);
            Ok(Status { status, is_json: said.is_some(), location, date: by_body.or_else(by_header) })
        };
        tokio::time::timeout(timeout, answer).await.unwrap_or(Err(no_status(Cause::Timeout)))
    }
}
