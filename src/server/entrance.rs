//! The way in: whether a request may be, who asks, and at once what memory has. Everything
//! else is for the routes.
//!
//! A request is met in the call that hyper makes for it, not in the future that hyper gets
//! for it. What is answered in that call has let go of the request when hyper reads on, so
//! that hyper reads into the buffer it has; beside a request that is still held it takes a
//! new one, and the old one is wiped. What has to be waited for is boxed: hyper moves what it
//! gets, and a hit must not pay for the size of the rest.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    sync::Arc,
};

use futures_util::future::{BoxFuture, Either};
use http::{HeaderValue, Method, Request, StatusCode, Uri, header, request::Parts};
use hyper::body::Incoming;

use super::{
    Service, Terms,
    connection::{InProgress, Requests},
    guard::Seen,
    health,
    query::Query,
    respond::{Answer, Problem, TEXT, Told, respond},
    routes::{Ask, Route, dispatch, legible},
};
use crate::{
    access::{
        Action, Caller, Known, Peer, Refusal, Refused,
        audit::{Account, Act, InvalidField, Outcome, Who},
    },
    clock::Moment,
    secret::SecretName,
};

/// An answer that is there, or that is waited for.
pub(super) type Answering = Either<Ready<Result<Answer, Infallible>>, BoxFuture<'static, Result<Answer, Infallible>>>;

/// Answers one request, and accounts for it.
pub(super) fn answer(service: &Arc<Service>, in_progress: InProgress, mut request: Request<Incoming>) -> Answering {
    // Looked at before the answer, not before the request: whoever was stopped since knows of it.
    let now = service.resolver.clock.moment();
    let is_attached = service.attachment.holds(now);
    let mut who = Who::at(in_progress.connection().caller().peer);
    let entry = {
        let (terms, route) = (service.terms.load(), find(service, request.uri()));
        match enter(service, &terms, in_progress.connection(), &mut who, route.as_ref(), &request, now) {
            Ok((Entry::Known, _)) if !is_attached => Ok(Entry::Known),
            Ok((Entry::Known, seen)) => {
                let account = Account::new(who, request.headers());
                if let Some(told) = hit(service, &terms, &account, route.as_ref(), &request, &seen, now) {
                    drop(account);
                    in_progress.end_at_once();
                    return Either::Left(ready(Ok(told.into_answer(std::mem::take(request.headers_mut())))));
                }
                who = account.who;
                Ok(Entry::Known)
            }
            Ok((entry, _)) => Ok(entry),
            Err(problem) => Err(problem),
        }
    };
    let service = Arc::clone(service);
    Either::Right(Box::pin(async move {
        let (head, body) = request.into_parts();
        let answer = later(&service, in_progress.connection(), who, entry, &head, body).await;
        drop(in_progress);
        Ok(answer)
    }))
}

/// How a request came in.
#[derive(Debug, Clone, Copy)]
enum Entry {
    /// It asks for health, which is told to everybody, whatever else is going on.
    Open,
    /// It is a notice, which brings its own proof.
    Notice,
    /// It came with a good token, or from a process that needs none.
    Known,
    /// It came with a token that may be good. Its fields may be none.
    Unknown(Result<(), InvalidField>),
}

/// Lets a request in: the guards first, then whose request it is.
fn enter<'h>(
    service: &Service,
    terms: &Terms,
    connection: &Requests,
    who: &mut Who,
    route: Option<&Route<'_>>,
    request: &'h Request<Incoming>,
    now: Moment,
) -> Result<(Entry, Seen<'h>), Problem> {
    let (peer, seen) = terms.guard.pass(connection.caller().peer, request)?;
    who.peer = peer;
    if connection.had_fragment() {
        return Err(Problem::invalid_request("a '#' in the target is a part of no name: it is written %23"));
    }
    let fields = if seen.has_audit_fields { who.read_fields(request.headers()) } else { Ok(()) };
    match (route, request.method()) {
        (Some(Route::Health | Route::Ready), &Method::GET | &Method::HEAD) => return Ok((Entry::Open, seen)),
        (Some(Route::Notice), &Method::POST) => return Ok((Entry::Notice, seen)),
        _ => {}
    }
    let known =
        with_caller(service, connection, peer, |caller| service.access.recognise(caller, seen.authorization, now));
    match known {
        Ok(Known::As(grant)) => {
            connection.let_in();
            who.grant = Some(grant);
            fields?;
            Ok((Entry::Known, seen))
        }
        Ok(Known::NotYet) => Ok((Entry::Unknown(fields), seen)),
        Err(refusal) => Err(refused(service, who, refusal)),
    }
}

/// The secret that is asked for, as memory has it: nothing is waited for, and nothing is
/// allocated. Where there is more to it, nothing has been done yet, and nothing is told.
fn hit(
    service: &Service,
    terms: &Terms,
    account: &Account<'_>,
    route: Option<&Route<'_>>,
    request: &Request<Incoming>,
    seen: &Seen<'_>,
    now: Moment,
) -> Option<Told> {
    let Some(Route::Secret(tenant, key)) = route else { return None };
    let is_plain = matches!(*request.method(), Method::GET | Method::HEAD)
        && request.uri().query().is_none()
        && !seen.is_conditional
        // Else it is to be decoded. A tenant's name has none.
        && !key.contains('%');
    if !is_plain || service.audit.refuses_all() {
        return None;
    }
    let grant = account.who.grant.as_deref()?;
    let _in_flight = service.in_flight.begin(terms.limits.max_in_flight)?;
    let name = SecretName::parse(tenant, key).ok()?;
    grant.allow(Action::Read, name.tenant(), name.key()).ok()?;
    let resolved = service.resolver.recall(name, now)?;
    let answer = resolved.answer()?;
    let ask = Ask { service, account, grant, headers: request.headers(), query: Query::NONE };
    ask.saw(name, &resolved, now);
    let wants_text = seen.has_preference && ask.wants_text();
    Some(Told::secret(answer, &resolved, wants_text, now))
}

/// Answers what could not be answered at once.
async fn later(
    service: &Service,
    connection: &Requests,
    who: Who,
    entry: Result<Entry, Problem>,
    head: &Parts,
    body: Incoming,
) -> Answer {
    let route = find(service, &head.uri);
    let account = Account::new(who, &head.headers);
    let mut asked = Asked { service, account, route: route.as_ref(), method: &head.method, is_accounted: false };
    let answer = match entry {
        Ok(entry) => proceed(service, connection, &mut asked.account, entry, route.as_ref(), head, body).await,
        Err(problem) => Err(problem),
    };
    // A refusal is in the ledger before anything is waited for.
    asked.is_accounted = true;
    match answer {
        Ok(answer) => answer,
        Err(problem) => refuse(service, &asked.account, route.as_ref(), &head.method, problem).await,
    }
}

/// A request that is being answered. Whoever goes away meanwhile has asked all the same.
struct Asked<'a> {
    service: &'a Service,
    account: Account<'a>,
    route: Option<&'a Route<'a>>,
    method: &'a Method,
    is_accounted: bool,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if self.is_accounted {
            return;
        }
        let (action, tenant, key) = self.route.map_or(("unknown", "", ""), |route| route.named(self.method));
        let (tenant, key) = (legible(tenant), legible(key));
        let code = Some("caller_left");
        let act = Act { action, tenant: &tenant, key: &key, outcome: Outcome::Failed, tier: None, code };
        self.service.audit.count(&self.account, act, self.service.resolver.clock.now());
    }
}

/// Answers who was let in, once it is known who that is, as far as there is room.
async fn proceed(
    service: &Service,
    connection: &Requests,
    account: &mut Account<'_>,
    entry: Entry,
    route: Option<&Route<'_>>,
    head: &Parts,
    body: Incoming,
) -> Result<Answer, Problem> {
    if let (Entry::Open | Entry::Notice, Some(route)) = (entry, route) {
        Query::parse(head.uri.query(), route.parameters(&head.method))?;
    }
    match (entry, &service.hooks) {
        (Entry::Open, _) if matches!(route, Some(Route::Health)) => {
            return Ok(respond(StatusCode::OK, TEXT, "ok\n".into()));
        }
        (Entry::Open, _) => return Ok(health::ready(service)),
        (Entry::Notice, Some(hooks)) => return Box::pin(hooks.take(service, connection, account, head, body)).await,
        (Entry::Notice, None) => return Err(Problem::no_route()),
        (Entry::Unknown(fields), _) => {
            let caller = caller(service, connection, account.who.peer);
            match service.access.ask(&caller, head.headers.get(header::AUTHORIZATION)).await {
                Ok(grant) => account.who.grant = Some(grant),
                Err(refusal) => return Err(refused(service, &mut account.who, refusal)),
            }
            connection.let_in();
            fields?;
        }
        (Entry::Known, _) => {}
    }
    attach(service, connection, account, head).await?;
    // Only now: who has no good token takes no place from those who have.
    let Some(_in_flight) = service.in_flight.begin(service.limits().max_in_flight) else {
        service.metrics.count("secretier_limited_total", &[("limit", "in_flight")]);
        return Err(Problem::too_many_in_flight());
    };
    let heard = service.resolver.heard();
    let answer = dispatch(service, account, route, head, body).await;
    // What was read took time, in which the process may have been stopped. What was changed is
    // changed, whenever that is told.
    let reads = matches!(head.method, Method::GET | Method::HEAD) || matches!(route, Some(Route::BatchGet(_)));
    if reads && !service.attachment.holds_now() {
        renew(service, connection, account, head).await?;
        // It stands where no secret has changed meanwhile, nor an owner.
        if service.resolver.heard() != heard {
            return Err(detached(service));
        }
    }
    answer
}

/// Makes sure that what the database says is known, and whose request it is by that.
async fn attach(
    service: &Service,
    connection: &Requests,
    account: &mut Account<'_>,
    head: &Parts,
) -> Result<(), Problem> {
    if service.attachment.holds_now() { Ok(()) } else { renew(service, connection, account, head).await }
}

/// The same where the database was not heard of for too long: it is asked first.
async fn renew(
    service: &Service,
    connection: &Requests,
    account: &mut Account<'_>,
    head: &Parts,
) -> Result<(), Problem> {
    if !service.attachment.renewed().await {
        return Err(detached(service));
    }
    let (authorization, now) = (head.headers.get(header::AUTHORIZATION), service.resolver.clock.moment());
    let recognise = |caller: &Caller| service.access.recognise(caller, authorization, now);
    match with_caller(service, connection, account.who.peer, recognise) {
        Ok(Known::As(grant)) => {
            account.who.grant = Some(grant);
            Ok(())
        }
        // It was known a moment ago, and is gone.
        Ok(Known::NotYet) => Err(refused(service, &mut account.who, Refused::Invalid.into())),
        Err(refusal) => Err(refused(service, &mut account.who, refusal)),
    }
}

fn detached(service: &Service) -> Problem {
    service.metrics.count("secretier_detached_total", &[]);
    Problem::detached()
}

/// Answers with a problem. A denial is on record before whoever was denied knows of it.
async fn refuse(
    service: &Service,
    account: &Account<'_>,
    route: Option<&Route<'_>>,
    method: &Method,
    problem: Problem,
) -> Answer {
    service.metrics.count("secretier_errors_total", &[("code", problem.code)]);
    let (action, tenant, key) = route.map_or(("unknown", "", ""), |route| route.named(method));
    let (tenant, key) = (legible(tenant), legible(key));
    let (outcome, code) = (problem.outcome(), Some(problem.code));
    let act = Act { action, tenant: &tenant, key: &key, outcome, tier: None, code };
    // A denial is on record whatever it interrupts, anything else where no route has recorded it.
    let is_refusal = matches!(outcome, Outcome::Denied | Outcome::Limited);
    let recording = if is_refusal || !problem.is_recorded() { service.audit.refused(account, act) } else { None };
    // Where the audit hangs, who is denied takes no more places from the others: their records
    // stay in the queue.
    if let (Some(recording), Ok(_waits)) = (recording, service.denials.try_acquire()) {
        recording.await;
    }
    let mut answer = problem.into_response();
    if let Ok(id) = HeaderValue::from_str(account.request_id()) {
        answer.headers_mut().insert(REQUEST_ID, id);
    }
    answer
}

/// The route of a request. Where no notices are taken, there is none for them.
fn find<'h>(service: &Service, uri: &'h Uri) -> Option<Route<'h>> {
    Route::find(uri.path()).filter(|route| *route != Route::Notice || service.hooks.is_some())
}

/// What is remembered of whom a request comes from: its connection's peer, or whom a trusted
/// proxy names, whose connection carries the requests of many.
pub(super) fn caller(service: &Service, connection: &Requests, peer: Peer) -> Caller {
    with_caller(service, connection, peer, Caller::clone)
}

fn with_caller<T>(service: &Service, connection: &Requests, peer: Peer, then: impl FnOnce(&Caller) -> T) -> T {
    if peer == connection.caller().peer { then(connection.caller()) } else { then(&service.access.caller(peer)) }
}

fn refused(service: &Service, who: &mut Who, refusal: Refusal) -> Problem {
    let Refusal { why, token_id, grant } = refusal;
    service.count_limited(&why);
    (who.token_id, who.grant) = (token_id, grant);
    why.into()
}

const REQUEST_ID: header::HeaderName = header::HeaderName::from_static("x-request-id");
