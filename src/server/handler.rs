//! Admits requests, authenticates their callers, and answers at once from memory. The routes
//! do everything else.
//!
//! A request is handled in the call that hyper makes for it, not in the future that hyper gets
//! for it. An answer from that call has released the request when hyper reads on, so
//! that hyper reads into the buffer it has; beside a request that is still held it takes a
//! new one, and the old one is wiped. An answer that must be waited for is boxed: hyper moves the
//! future, and a hit must not pay for the size of the rest.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::{BoxFuture, Either};
use http::{HeaderValue, Method, Request, Uri, header, request::Parts};
use hyper::body::Incoming;

use super::{
    Service, Terms,
    api::webhooks,
    ask::{Ask, legible},
    budgets::Thing,
    connection::{InProgress, Requests},
    guard::HeaderScan,
    infisical_api::auth,
    operation::Run,
    outgoing,
    query::Query,
    respond::{Answer, Problem, REQUEST_ID, Told},
    routes::{Route, dispatch},
};
use crate::{
    access::{
        Action, Caller, Known, Refusal, Refused,
        audit::{Account, Act, Outcome, Recording, Who},
    },
    budget::{Held, Holds},
    clock::Moment,
    secret::SecretName,
};

/// An answer that is ready, or one that must be waited for.
pub(super) type Answering = Either<Ready<Result<Answer, Infallible>>, BoxFuture<'static, Result<Answer, Infallible>>>;

/// Answers one request, and accounts for it.
///
/// Answers that need no wait come from this call: a hit, health, and every refusal except
/// the denials that are to be on record first. A caller without a valid token may wait only
/// while there is a place among strangers.
pub(super) fn answer(service: &Arc<Service>, in_progress: InProgress, mut request: Request<Incoming>) -> Answering {
    // Checked before the answer, not before the request, so that a stop since is noticed.
    let now = service.resolver.clock().moment();
    let is_attached = service.attachment.holds(now);
    let mut who = Who::at(in_progress.connection().caller().peer);
    let entry = {
        let (terms, route) = (service.terms.load(), find(service, request.method(), request.uri()));
        who.face = route.as_ref().filter(|route| route.is_infisicals()).map(|_| "infisical");
        match enter(service, &terms, in_progress.connection(), &mut who, route.as_ref(), &request, now) {
            Ok((Admission::Known, seen)) if is_attached => {
                let account = Account::new(who, request.headers());
                if let Some((told, held)) = hit(service, &account, route.as_ref(), &request, &seen, now) {
                    drop(account);
                    in_progress.end_at_once();
                    return at_once(told.into_answer(std::mem::take(request.headers_mut()), held));
                }
                who = account.who;
                Ok(Admission::Known)
            }
            Ok((entry, _)) => Ok(entry),
            Err(problem) => Err(problem),
        }
    };
    let entry = entry.and_then(|entry| match entry {
        Admission::Open => open(service, &request).map(Later::Answered),
        Admission::Known => Ok(Later::Known),
        Admission::Unsigned => Ok(Later::Unsigned),
        Admission::Unknown => {
            let caller = in_progress.connection().with_caller(&service.access, who.peer, Caller::clone);
            service.hold(Thing::StrangersPlace, caller.holds(), 1).map(|place| Later::Unknown(caller, place))
        }
    });
    let service = Arc::clone(service);
    match entry {
        Ok(Later::Answered(answer)) => {
            in_progress.end_at_once();
            at_once(answer)
        }
        Ok(Later::Known) => Either::Right(Box::pin(known(service, in_progress, who, request, Instant::now()))),
        Ok(Later::Unsigned) => Either::Right(Box::pin(unsigned(service, in_progress, who, request))),
        Ok(Later::Unknown(caller, place)) => {
            Either::Right(Box::pin(unknown(service, in_progress, who, request, caller, place)))
        }
        Err(problem) => refused_at_once(&service, in_progress, who, &request, problem),
    }
}

fn at_once(answer: Answer) -> Answering {
    Either::Left(ready(Ok(answer)))
}

/// Refuses a request for which nothing was done. Where the denial is to be on record first, and
/// there is a place to wait for that, it is waited for; where there is none, the record follows.
fn refused_at_once(
    service: &Arc<Service>,
    in_progress: InProgress,
    who: Who,
    request: &Request<Incoming>,
    problem: Problem,
) -> Answering {
    let account = Account::new(who, request.headers());
    let (answer, recording) =
        refuse(service, &account, find(service, request.method(), request.uri()).as_ref(), problem);
    let place =
        recording.and_then(|recording| Some((recording, place_to_wait(service, in_progress.connection(), &account)?)));
    let Some((recording, place)) = place else {
        in_progress.end_at_once();
        return at_once(answer);
    };
    Either::Right(Box::pin(async move {
        recording.await;
        drop((place, in_progress));
        Ok(answer)
    }))
}

/// The way in which a request was admitted.
#[derive(Debug, Clone, Copy)]
enum Admission {
    /// It asks for health, which is answered to everybody, whatever else is going on.
    Open,
    /// It is a webhook, which is authenticated by its signature, or a login, by its body.
    Unsigned,
    /// It came with a valid token, or from a process that needs none.
    Known,
    /// It came with a token that may be valid.
    Unknown,
}

/// The work that is left for an admitted request.
enum Later {
    Answered(Answer),
    Unsigned,
    Known,
    /// It has a place among strangers until its token is known.
    Unknown(Caller, Held),
}

/// Admits a request: its peer's rate and the guards first, then its caller. No claim of
/// identity is looked at before that.
fn enter<'h>(
    service: &Service,
    terms: &Terms,
    connection: &Requests,
    who: &mut Who,
    route: Option<&Route<'_>>,
    request: &'h Request<Incoming>,
    now: Moment,
) -> Result<(Admission, HeaderScan<'h>), Problem> {
    let (peer, seen) =
        terms.guard.pass(connection.caller().peer, request).or_else(|problem| charged(service, connection, problem))?;
    who.peer = peer;
    if connection.had_fragment() {
        let problem = Problem::invalid_request("a '#' in the target is a part of no name: it is written %23");
        return charged(service, connection, problem);
    }
    match route.and_then(Route::run) {
        Some(Run::Open(_)) => return Ok((Admission::Open, seen)),
        Some(Run::Webhook | Run::Login(_)) => return Ok((Admission::Unsigned, seen)),
        Some(Run::Unknown) => {
            let problem = Problem::no_infisical_route(request.method(), request.uri().path());
            return charged(service, connection, problem);
        }
        Some(Run::Lookup | Run::Read(_) | Run::Write(_)) | None => {}
    }
    let known = connection
        .with_caller(&service.access, peer, |caller| service.access.recognise(caller, seen.authorization, now));
    match known {
        Ok(Known::As(grant)) => {
            connection.let_in();
            who.grant = Some(grant);
            if seen.has_audit_fields {
                who.read_fields(request.headers())?;
            }
            Ok((Admission::Known, seen))
        }
        Ok(Known::NotYet) => Ok((Admission::Unknown, seen)),
        Err(refusal) => Err(refused(service, who, refusal)),
    }
}

/// Refuses a request that is not meant for us. It is charged to its connection's peer all the
/// same: the address that it claims to come from is not believed.
fn charged<T>(service: &Service, connection: &Requests, problem: Problem) -> Result<T, Problem> {
    service.access.admit(connection.caller()).inspect_err(|refused| service.count_limited(refused))?;
    Err(problem)
}

/// The requested secret from memory: nothing is waited for, and nothing is
/// allocated. `None` where more is needed; then nothing was done, and nothing recorded.
fn hit(
    service: &Service,
    account: &Account<'_>,
    route: Option<&Route<'_>>,
    request: &Request<Incoming>,
    seen: &HeaderScan<'_>,
    now: Moment,
) -> Option<(Told, Option<Held>)> {
    let route = route.filter(|route| matches!(route.run(), Some(Run::Lookup)))?;
    let (tenant, key) = (route.names.tenant, route.names.key);
    let is_plain = request.uri().query().is_none()
        && !seen.is_conditional
        // A key with escapes is decoded elsewhere. A tenant's name has none.
        && !key.contains('%');
    if !is_plain || service.audit.refuses_all() {
        return None;
    }
    let grant = account.who.grant.as_deref()?;
    let name = SecretName::parse(tenant, key).ok()?;
    grant.allow(Action::Read, name.tenant(), name.key()).ok()?;
    let resolved = service.resolver.recall(name, now)?;
    let answer = resolved.answer()?;
    let ask = Ask { service, account, grant, headers: request.headers(), query: Query::NONE, names: route.names };
    let wants_text = seen.has_preference && ask.wants_text();
    let told = Told::secret(answer, &resolved, wants_text, now);
    let held = match told.length() > outgoing::UNCOUNTED {
        true => Some(service.hold(Thing::Answer, grant.holds(), told.length() as u64).ok()?),
        false => None,
    };
    ask.saw(name, &resolved, now);
    Some((told, held))
}

/// Answers an admitted caller with more than memory has.
async fn known(
    service: Arc<Service>,
    in_progress: InProgress,
    who: Who,
    request: Request<Incoming>,
    began: Instant,
) -> Result<Answer, Infallible> {
    let (head, body) = request.into_parts();
    let route = find(&service, &head.method, &head.uri);
    let account = Account::new(who, &head.headers);
    let mut asked = Asked { service: &service, account, route: route.as_ref(), is_accounted: false };
    let answering = proceed(&service, in_progress.connection(), &mut asked.account, route.as_ref(), &head, body);
    let answer = in_a_clients_time(route.as_ref(), began, answering).await;
    // A refusal is in the ledger before anything is waited for.
    asked.is_accounted = true;
    let answer = match answer {
        Ok((mut answer, place)) => {
            answer.body_mut().keep(in_progress, place);
            answer
        }
        Err(problem) => tell(&service, in_progress.connection(), &asked.account, route.as_ref(), problem).await,
    };
    service.durations.note(answer.status(), began.elapsed());
    Ok(answer)
}

/// Asks the database for the token's owner. Then the place among strangers is free.
async fn unknown(
    service: Arc<Service>,
    in_progress: InProgress,
    who: Who,
    request: Request<Incoming>,
    caller: Caller,
    place: Held,
) -> Result<Answer, Infallible> {
    let began = Instant::now();
    let route = find(&service, request.method(), request.uri());
    let account = Account::new(who, request.headers());
    let mut asked = Asked { service: &service, account, route: route.as_ref(), is_accounted: false };
    let known_now = service.access.ask(&caller, request.headers().get(header::AUTHORIZATION)).await;
    asked.is_accounted = true;
    let who = &mut asked.account.who;
    let let_in = known_now.map_err(|refusal| refused(&service, who, refusal)).and_then(|grant| {
        in_progress.connection().let_in();
        who.grant = Some(grant);
        who.read_fields(request.headers()).map_err(Problem::from)
    });
    if let Err(problem) = let_in {
        drop(place);
        let answer = tell(&service, in_progress.connection(), &asked.account, route.as_ref(), problem).await;
        service.durations.note(answer.status(), began.elapsed());
        return Ok(answer);
    }
    let who = std::mem::replace(who, Who::at(caller.peer));
    drop((asked, place));
    // The rest is large, and only requests that get here need it.
    Box::pin(known(service, in_progress, who, request, began)).await
}

/// Takes a webhook, which is authenticated by its signature, or a login, by its body.
async fn unsigned(
    service: Arc<Service>,
    in_progress: InProgress,
    who: Who,
    request: Request<Incoming>,
) -> Result<Answer, Infallible> {
    let (head, body) = request.into_parts();
    let route = find(&service, &head.method, &head.uri);
    let route = route.as_ref();
    let account = Account::new(who, &head.headers);
    let mut asked = Asked { service: &service, account, route, is_accounted: false };
    let parameters = route.map_or(&[][..], Route::parameters);
    let connection = in_progress.connection();
    let answer = match (route.and_then(Route::run), Query::parse(head.uri.query(), parameters), &service.hooks) {
        (Some(Run::Login(asks)), ..) => {
            let answering = auth::answer(*asks, &service, connection, &mut asked.account, &head, body);
            in_a_clients_time(route, Instant::now(), answering).await
        }
        (_, Ok(_), Some(hooks)) => {
            webhooks::take_notice(hooks, &service, connection, &asked.account, &head, body).await
        }
        (_, Ok(_), None) => Err(Problem::no_route()),
        (_, Err(problem), _) => Err(problem),
    };
    asked.is_accounted = true;
    Ok(match answer {
        Ok(answer) => answer,
        Err(problem) => tell(&service, in_progress.connection(), &asked.account, route, problem).await,
    })
}

/// Answers about the instance's health, to everybody.
fn open(service: &Service, request: &Request<Incoming>) -> Result<Answer, Problem> {
    let route = find(service, request.method(), request.uri()).ok_or_else(Problem::no_route)?;
    if !route.is_infisicals() {
        Query::parse(request.uri().query(), route.parameters())?;
    }
    match route.run() {
        Some(Run::Open(tell)) => Ok(tell(service)),
        Some(_) | None => Err(Problem::no_route()),
    }
}

/// Ends a request to the face before Infisical's clients give up, who would ask again at once: some wait 10
/// seconds. A write goes on.
async fn in_a_clients_time<T>(
    route: Option<&Route<'_>>,
    began: Instant,
    answering: impl Future<Output = Result<T, Problem>>,
) -> Result<T, Problem> {
    const PATIENCE: Duration = Duration::from_secs(7);
    match route.is_some_and(Route::is_infisicals) {
        // Its token may have been asked for in the database.
        true => tokio::time::timeout(PATIENCE.saturating_sub(began.elapsed()), answering)
            .await
            .unwrap_or_else(|_| Err(Problem::took_too_long())),
        false => answering.await,
    }
}

/// A request that is being answered. It counts even if its caller goes away meanwhile.
struct Asked<'a> {
    service: &'a Service,
    account: Account<'a>,
    route: Option<&'a Route<'a>>,
    is_accounted: bool,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if self.is_accounted {
            return;
        }
        let (action, tenant, key) = called(self.route);
        let (tenant, key) = (legible(tenant), legible(key));
        let code = Some("caller_left");
        let act = Act { action, tenant: &tenant, key: &key, outcome: Outcome::Failed, tier: None, code };
        self.service.audit.count(&self.account, act, self.service.resolver.clock().now());
    }
}

/// Answers an admitted request, as far as there is room, and returns its place; the request is
/// in progress until the answer is taken.
async fn proceed(
    service: &Service,
    connection: &Requests,
    account: &mut Account<'_>,
    route: Option<&Route<'_>>,
    head: &Parts,
    body: Incoming,
) -> Result<(Answer, Option<Held>), Problem> {
    attach(service, connection, account, head).await?;
    let Some(grant) = account.who.grant.clone() else { return Err(Refused::Missing.into()) };
    // Only now: a caller without a valid token takes no place from the others.
    let place = service.hold(Thing::Place, grant.holds(), 1)?;
    let heard = service.resolver.heard();
    let answer = dispatch(service, account, route, head, body).await;
    // The read took time, in which the process may have been stopped. A change has happened,
    // whenever its answer is sent.
    let reads = matches!(head.method, Method::GET | Method::HEAD) || route.is_some_and(Route::is_read);
    if reads && !service.attachment.holds_now() {
        renew(service, connection, account, head).await?;
        // The answer stands if no secret, and no owner, has changed meanwhile.
        if service.resolver.heard() != heard {
            return Err(detached(service));
        }
    }
    let mut answer = answer?;
    if let Some(bytes) = answer.body().uncounted() {
        let held = service.hold(Thing::Answer, grant.holds(), bytes)?;
        answer.body_mut().counted(held);
    }
    Ok((answer, Some(place)))
}

/// Makes sure that the database's current state is known, and who the caller is by that state.
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
    let (authorization, now) = (head.headers.get(header::AUTHORIZATION), service.resolver.clock().moment());
    let recognise = |caller: &Caller| service.access.recognise(caller, authorization, now);
    match connection.with_caller(&service.access, account.who.peer, recognise) {
        Ok(Known::As(grant)) => {
            account.who.grant = Some(grant);
            Ok(())
        }
        // It was known a moment ago, and no longer is.
        Ok(Known::NotYet) => Err(refused(service, &mut account.who, Refused::Invalid.into())),
        Err(refusal) => Err(refused(service, &mut account.who, refusal)),
    }
}

fn detached(service: &Service) -> Problem {
    service.metrics.count("secretier_detached_requests_total", &[]);
    Problem::detached()
}

/// Answers with a problem. A denial is on record before the denied caller learns of it.
async fn tell(
    service: &Service,
    connection: &Requests,
    account: &Account<'_>,
    route: Option<&Route<'_>>,
    problem: Problem,
) -> Answer {
    let (answer, recording) = refuse(service, account, route, problem);
    // Where there is no place to wait, the record follows.
    if let Some(recording) = recording
        && let Some(_place) = place_to_wait(service, connection, account)
    {
        recording.await;
    }
    answer
}

/// A place of the token or the peer to wait for a denial to be on record: where the audit hangs,
/// denied callers keep no more connections than these from the others.
fn place_to_wait(service: &Service, connection: &Requests, account: &Account<'_>) -> Option<Held> {
    let bounds = service.limits().bounds;
    let take = |holds: &Holds| service.budgets.take(Thing::StrangersPlace, holds, 1, &bounds).ok();
    match &account.who.grant {
        Some(grant) => take(grant.holds()),
        None => connection.with_caller(&service.access, account.who.peer, |caller| take(caller.holds())),
    }
}

/// Accounts for a problem. Returns the answer, and the recording to wait for before it is sent.
fn refuse(
    service: &Service,
    account: &Account<'_>,
    route: Option<&Route<'_>>,
    problem: Problem,
) -> (Answer, Option<Recording>) {
    service.metrics.count("secretier_errors_total", &[("code", problem.code)]);
    let (action, tenant, key) = called(route);
    let about = problem.is_about().map(|(tenant, key)| (tenant.to_owned(), key.to_owned()));
    let (tenant, key) = about.as_ref().map_or((tenant, key), |(tenant, key)| (tenant, key));
    // A stranger's path is the stranger's own text, and is not read.
    let (tenant, key) = if account.who.grant.is_some() { (tenant, key) } else { ("", "") };
    let (tenant, key) = (legible(tenant), legible(key));
    let (outcome, code) = (problem.outcome(), Some(problem.code));
    let act = Act { action, tenant: &tenant, key: &key, outcome, tier: None, code };
    // A denial is on record whatever it interrupts; any other problem if no route has recorded it.
    let is_refusal = matches!(outcome, Outcome::Denied | Outcome::Limited);
    let recording = if problem.is_guards() {
        // Counted by peer and reason, since each is like all others.
        service.audit.count(account, act, service.resolver.clock().now());
        None
    } else if is_refusal || !problem.is_recorded() {
        service.audit.refused(account, act)
    } else {
        None
    };
    let mut answer = match route.is_some_and(Route::is_infisicals) {
        true => problem.into_infisical(account.request_id()),
        false => problem.into_response(),
    };
    if let Ok(id) = HeaderValue::from_str(account.request_id()) {
        answer.headers_mut().insert(REQUEST_ID, id);
    }
    (answer, recording)
}

/// A request's name in the audit, with the names in its path as they came.
fn called<'h>(route: Option<&Route<'h>>) -> (&'static str, &'h str, &'h str) {
    route.map_or(("unknown", "", ""), |route| (route.action(), route.names.tenant, route.names.key))
}

/// The route of a request. Where webhooks are not configured, there is no route for them; nor is there one
/// of the face where that is off.
fn find<'h>(service: &Service, method: &Method, uri: &'h Uri) -> Option<Route<'h>> {
    let route = Route::find(method, uri.path())?;
    let is_there = (!route.is_webhook() || service.hooks.is_some())
        && (!route.is_infisicals() || service.terms.load().infisical_api.is_some());
    is_there.then_some(route)
}

fn refused(service: &Service, who: &mut Who, refusal: Refusal) -> Problem {
    let Refusal { why, token_id, grant } = refusal;
    service.count_limited(&why);
    (who.token_id, who.grant) = (token_id, grant);
    why.into()
}
