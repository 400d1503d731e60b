//! Universal auth: a client logs in with a token's client credentials, and is given an access token.
//!
//! These requests bring their proof in the body, and their `Authorization` header is ignored: clients send
//! an empty one, or that of an ended login. Nothing here asks Infisical.

use std::time::Duration;

use http::{StatusCode, header, request::Parts};
use hyper::body::Incoming;
use serde::{Deserialize, Deserializer, Serialize};
use zeroize::Zeroizing;

use crate::{
    access::{
        Caller, Login, LoginError,
        audit::{Account, Act, Outcome},
    },
    answer::wiped_json,
    infisical::Granted,
    resolver::ResolveError,
    server::{
        Limits, Service,
        ask::json,
        body,
        budgets::{Room, Thing},
        connection::Requests,
        operation::{Operation, Run},
        respond::{Answer, JSON, Problem, respond},
    },
};

pub(in crate::server) const LOG_IN: Operation =
    Operation { action: "login", parameters: &[], run: Run::Login(Asks::LogIn) };
pub(in crate::server) const RENEW: Operation =
    Operation { action: "renew_login", parameters: &[], run: Run::Login(Asks::Renew) };
pub(in crate::server) const END: Operation =
    Operation { action: "end_login", parameters: &[], run: Run::Login(Asks::End) };
pub(in crate::server) const STATUS: Operation = Operation { action: "health", parameters: &[], run: Run::Open(status) };

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub(in crate::server) enum Asks {
    LogIn,
    Renew,
    End,
}

/// The longest body: credentials, or an access token.
const LONGEST: u64 = 8 << 10;

/// The longest time for it to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(2);

/// Clients that ask for a new access token ahead of its end do so within this many seconds of it.
const SHORTEST: u64 = 31;

fn status(_: &Service) -> Answer {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Status {
        message: &'static str,
        email_configured: bool,
        invite_only_signup: bool,
        redis_configured: bool,
        secret_scanning_configured: bool,
    }
    let status = Status {
        message: "Ok",
        email_configured: false,
        invite_only_signup: true,
        redis_configured: false,
        secret_scanning_configured: false,
    };
    respond(StatusCode::OK, JSON, json(&status))
}

/// The body of any of the three requests.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Brought {
    #[serde(deserialize_with = "wiped")]
    client_id: Option<Zeroizing<String>>,
    #[serde(deserialize_with = "wiped")]
    client_secret: Option<Zeroizing<String>>,
    #[serde(deserialize_with = "wiped")]
    access_token: Option<Zeroizing<String>>,
}

fn wiped<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Zeroizing<String>>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(Zeroizing::new))
}

pub(in crate::server) async fn answer(
    asks: Asks,
    service: &Service,
    connection: &Requests,
    account: &mut Account<'_>,
    head: &Parts,
    body: Incoming,
) -> Result<Answer, Problem> {
    let caller = connection.with_caller(&service.access, account.who.peer, Caller::clone);
    service.access.admit(&caller).inspect_err(|refused| service.count_limited(refused))?;
    body::check_encoding(&head.headers)?;
    let brought = receive(service, &caller, body).await?;
    let face = service.terms.load().infisical_api.clone().ok_or_else(Problem::no_route)?;
    if !service.attachment.holds_now() && !service.attachment.renewed().await {
        return Err(Problem::detached());
    }
    let _place = service.hold(Thing::StrangersPlace, caller.holds(), 1)?;
    let (access, lasts) = (&service.access, face.access_token_ttl);
    let header = || bearer(head);
    let text = |text: &Option<Zeroizing<String>>| text.clone().unwrap_or_default();
    let outcome = match asks {
        Asks::LogIn => {
            let (id, secret) = (text(&brought.client_id), text(&brought.client_secret));
            access.log_in(&caller, &id, &secret, lasts).await.map(|(login, grant)| (Some(login), grant))
        }
        Asks::Renew => {
            let renewed = access.renew_login(&caller, &text(&brought.access_token), lasts).await;
            renewed.map(|(login, grant)| (Some(login), grant))
        }
        Asks::End => {
            let ends = brought.access_token.clone().filter(|text| !text.is_empty()).or_else(header).unwrap_or_default();
            access.end_login(&caller, &ends).await.map(|grant| (None, grant))
        }
    };
    let (login, grant) = outcome.map_err(|error| refused(asks, service, account, error))?;
    connection.let_in();
    account.who.grant = Some(grant);
    if service.audit.refuses_all() {
        return Err(Problem::unrecorded());
    }
    let action = match asks {
        Asks::LogIn => "login",
        Asks::Renew => "renew_login",
        Asks::End => "end_login",
    };
    let act = Act { action, tenant: "", key: "", outcome: Outcome::Done, tier: None, code: None };
    service.audit.count(account, act, service.resolver.clock().now());
    Ok(match login {
        Some(login) => granted(&login),
        None => ended(&brought.access_token.or_else(header).unwrap_or_default()),
    })
}

async fn receive(service: &Service, caller: &Caller, body: Incoming) -> Result<Brought, Problem> {
    let Limits { bounds, body_timeout, .. } = service.limits();
    let mut room = Room::new(&service.budgets, caller.holds(), bounds, &service.metrics)?;
    // As with webhooks: one that is sent slowly gives its place to the next.
    let mut reading = service.logins.begin(caller.peer);
    let reads = body::read_bytes(body, LONGEST, body_timeout.min(BODY_TIMEOUT), &mut room);
    let bytes = tokio::select! {
        biased;
        bytes = reads => bytes?,
        _ = &mut reading.given_up => {
            service.metrics.count("secretier_limited_total", &[("limit", "logins")]);
            return Err(Problem::holds_too_much("more logins come than are taken"));
        }
    };
    if bytes.is_empty() { Ok(Brought::default()) } else { body::parse(&bytes) }
}

fn bearer(head: &Parts) -> Option<Zeroizing<String>> {
    let header = head.headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| Zeroizing::new(token.trim().to_owned()))
}

fn refused(asks: Asks, service: &Service, account: &mut Account<'_>, error: LoginError) -> Problem {
    match error {
        LoginError::Refused(refusal) => {
            service.count_limited(&refusal.why);
            let is_wrong = refusal.why == crate::access::Refused::Invalid;
            (account.who.token_id, account.who.grant) = (refusal.token_id, refusal.grant);
            match asks {
                Asks::LogIn if is_wrong => Problem::wrong_credentials(),
                Asks::LogIn | Asks::Renew | Asks::End => refusal.why.into(),
            }
        }
        LoginError::NoKey => Problem::no_login_key(),
        LoginError::TooManyEnded => Problem::too_many_ended(),
        LoginError::Store(error) if error.needs_master_key() => Problem::no_login_key(),
        LoginError::Store(error) => ResolveError::Database(std::sync::Arc::new(error)).into(),
    }
}

fn granted(login: &Login) -> Answer {
    let seconds = login.lasts.as_secs().max(SHORTEST);
    let body = Granted {
        access_token: login.access_token.as_str(),
        expires_in: seconds,
        max_ttl: seconds,
        token_type: "Bearer".into(),
    };
    respond(StatusCode::OK, JSON, wiped_json(&body))
}

/// One client reads the answer as it reads that of a login.
fn ended(access_token: &str) -> Answer {
    #[derive(Serialize)]
    struct Ended<'a> {
        message: &'static str,
        #[serde(flatten)]
        granted: Granted<&'a str>,
    }
    let granted = Granted { access_token, expires_in: 0, max_ttl: 0, token_type: "Bearer".into() };
    respond(StatusCode::OK, JSON, wiped_json(&Ended { message: "Successfully revoked access token", granted }))
}
