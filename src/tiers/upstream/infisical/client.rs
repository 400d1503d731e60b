//! One call: within its deadline, its budget and the breaker's permission, repeated once where that
//! may help, with a token that is renewed if it was refused.

use std::{
    fmt,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderMap, Method, header};
use reqwest::Url;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::Instant,
};
use zeroize::Zeroizing;

use super::{
    super::{Cause, Health, Lane, Unstorable, UpstreamError, UpstreamState},
    BuildError, Config,
    auth::{Auth, Login, Token},
    budget::{Budget, ServiceClock},
    call::Call,
    patience::Patience,
    retry_after::retry_after,
    state::TierState,
    wire::{self, Problem},
};
use crate::{
    clock::Clock,
    metrics::Metrics,
    secret::SecretValue,
    tiers::breaker::{Breaker, Open, Permit},
};

/// Firewalls refuse clients that do not say what they are.
const USER_AGENT: &str = concat!("secretier/", env!("CARGO_PKG_VERSION"));

/// Why an answer was not read.
pub(super) const TOO_LONG: &str = "it is longer than infisical.max_response";

/// Makes calls.
pub(super) struct Client {
    site_url: String,
    connections: usize,
    patience: ArcSwap<Patience>,
    identity: ArcSwap<Identity>,
    max_response: u64,
    clock: Clock,
    metrics: Arc<Metrics>,
    breaker: Breaker,
    budget: Budget,
    /// Until when each route is not called, in milliseconds by the running clock.
    pauses: [AtomicU64; 4],
    /// The requests a minute that the server takes, as it told last.
    told_limit: AtomicU32,
    /// Whether the server was asked for its state since the breaker opened, and was not well. One
    /// task asks, so nobody else writes it.
    pub(super) was_out: AtomicBool,
    slots: Semaphore,
    /// Refreshes and migrations together may use half of the slots, so that they never fill them.
    refresh_slots: Semaphore,
    /// When a call was last answered, by the runtime's clock since the start.
    answered: AtomicU64,
    began: Instant,
    pub(super) state: TierState,
}

/// Our identity there, and the token of its login. A call uses one identity to its end: the numbers
/// of tokens belong to one login, and a refusal of one says nothing about another.
struct Identity {
    client_id: String,
    client_secret: SecretValue,
    auth: Auth,
}

/// Prepared settings, ready to be applied.
pub(super) struct Prepared {
    patience: Option<Patience>,
    identity: Option<Identity>,
    per_minute: NonZeroU32,
    migration: NonZeroU32,
    timeout: Duration,
}

impl Prepared {
    pub(super) fn has_new_login(&self) -> bool {
        self.identity.is_some()
    }
}

/// One request, which may be sent more than once.
pub(super) struct Request {
    pub(super) call: Call,
    pub(super) method: Method,
    /// From the root of the site, encoded.
    pub(super) path: String,
    pub(super) query: Vec<(&'static str, String)>,
    pub(super) body: Option<Bytes>,
    /// The validator of the held snapshot.
    pub(super) known: Option<String>,
}

/// An answer: neither a failure, nor a refusal of our token or identity.
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) meaning: Meaning,
    pub(super) etag: Option<String>,
    pub(super) body: Zeroizing<Vec<u8>>,
    pub(super) problem: Problem,
}

impl Reply {
    /// Whether it says nothing about the credentials of a login: it comes from another place.
    fn is_no_answer_to_a_login(&self) -> bool {
        matches!(self.status, 300..=399 | 405) || self.problem.is_route_not_found()
    }
}

/// The meaning of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// 2xx.
    Done,
    /// 304.
    NotModified,
    /// There was nothing to delete, reported as a failure.
    NothingThere,
    /// The identity may not do this.
    Denied,
    /// 401 or 403 without a clear reason: the token is no longer valid, or the identity may not do
    /// this.
    Refused,
    /// The token is no longer valid.
    TokenTrouble,
    /// Another 4xx.
    Rejected,
    /// The server is broken.
    Broken,
}

impl Client {
    pub(super) fn build(
        config: Config,
        client_secret: SecretValue,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> Result<Self, BuildError> {
        let connections = usize::from(config.max_connections.get());
        let patience = Patience::build(&config.site_url, connections, &config)?;
        let share = config.migration_requests_per_minute();
        let budget = Budget::new(config.requests_per_minute, share, config.timeout, ServiceClock(clock.clone()));
        Ok(Self {
            site_url: config.site_url.trim_end_matches('/').to_owned(),
            connections,
            patience: ArcSwap::from_pointee(patience),
            identity: ArcSwap::from_pointee(Identity {
                client_id: config.client_id,
                client_secret,
                auth: Auth::new(clock.clone()),
            }),
            max_response: config.max_response,
            breaker: Breaker::new(clock.clone(), 3, Duration::from_secs(1), Duration::from_secs(30)),
            budget,
            pauses: Default::default(),
            told_limit: AtomicU32::new(0),
            was_out: AtomicBool::new(false),
            slots: Semaphore::new(connections),
            refresh_slots: Semaphore::new(connections.div_ceil(2)),
            answered: AtomicU64::new(0),
            began: Instant::now(),
            state: TierState::new(clock.clone(), &metrics),
            clock,
            metrics,
        })
    }

    /// Prepares other settings: requests a minute, timeout and login. The others stay.
    pub(super) fn prepare(&self, config: &Config, client_secret: SecretValue) -> Result<Prepared, BuildError> {
        let is_as_patient = self.patience.load().is_of(config)?;
        let identity = self.identity.load();
        let is_same = identity.client_id == config.client_id && identity.client_secret.same_as(&client_secret);
        Ok(Prepared {
            patience: match is_as_patient {
                true => None,
                false => Some(Patience::build(&self.site_url, self.connections, config)?),
            },
            // After a refused login, another one is tried at once.
            identity: (!is_same).then(|| Identity {
                client_id: config.client_id.clone(),
                client_secret,
                auth: Auth::new(self.clock.clone()),
            }),
            per_minute: config.requests_per_minute,
            migration: config.migration_requests_per_minute(),
            timeout: config.timeout,
        })
    }

    /// Applies them, for calls that begin from now on.
    pub(super) fn apply(&self, prepared: Prepared) {
        let Prepared { patience, identity, per_minute, migration, timeout } = prepared;
        // Before any call may take longer.
        self.budget.change(per_minute, migration, timeout);
        if let Some(patience) = patience {
            self.patience.store(Arc::new(patience));
        }
        if let Some(identity) = identity {
            self.identity.store(Arc::new(identity));
        }
    }

    /// The deadline of a call that begins now, including logins and repetitions.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.patience.load().timeout
    }

    /// As [`Self::deadline`], for the read of a folder, which continues after its callers have
    /// stopped waiting.
    pub(super) fn read_deadline(&self) -> Instant {
        Instant::now() + self.patience.load().read
    }

    /// As [`Self::deadline`], for a long call that no caller waits for.
    pub(super) fn late_deadline(&self) -> Instant {
        Instant::now() + self.patience.load().longest
    }

    /// Makes a call with a token, and once more with a newer one if the token was refused.
    pub(super) async fn call(&self, request: &Request, lane: Lane, deadline: Instant) -> Result<Reply, UpstreamError> {
        let identity = self.identity.load_full();
        let token = self.token(&identity, 0, lane, deadline).await?;
        let first = self.exchange(request, Some(&token), lane, deadline).await?;
        match first.meaning {
            Meaning::Denied => return Err(UpstreamError::Denied),
            Meaning::Refused if identity.auth.was_refused_when_new(&token) => return Err(self.denied()),
            Meaning::Refused | Meaning::TokenTrouble => {}
            _ => return Ok(first),
        }
        let token = self.token(&identity, token.number(), lane, deadline).await?;
        let second = self.exchange(request, Some(&token), lane, deadline).await?;
        match second.meaning {
            Meaning::Denied => Err(UpstreamError::Denied),
            Meaning::Refused => {
                identity.auth.refused_when_new(&token);
                if second.problem.says_not_in_project() {
                    // A denial all the same: whoever takes the identity out of the project means it.
                    self.state.has_nothing(Cause::Project);
                }
                Err(self.denied())
            }
            // The token is refused although the login is valid: that says nothing about the folder,
            // so it must not stop copies from being served as a denial would.
            Meaning::TokenTrouble if second.status == 400 => Err(UpstreamError::Rejected {
                status: 400,
                cause: Cause::Rejected,
                hint: "the identity's access tokens are limited in their uses; allow unlimited uses",
            }),
            Meaning::TokenTrouble => Err(UpstreamError::Failed(second.status)),
            _ => Ok(second),
        }
    }

    /// A refusal that turned out to concern the call: the tier answers.
    fn denied(&self) -> UpstreamError {
        self.tell(UpstreamState::Up, None);
        UpstreamError::Denied
    }

    pub(super) fn share(&self, is_shared: bool) {
        self.budget.share(is_shared);
    }

    /// Whether connections are made through a proxy.
    pub(super) fn has_proxy(&self) -> bool {
        self.patience.load().has_proxy()
    }

    pub(super) fn breaker(&self) -> &Breaker {
        &self.breaker
    }

    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    pub(super) fn health(&self) -> Health {
        let budget_left = self.budget.left();
        self.metrics.gauge("secretier_upstream_budget_left", &[], f64::from(budget_left));
        let paused = self.pauses.iter().any(|until| self.clock.running() < millis(until));
        let (state, cause) = self.state.now(paused);
        Health { state, cause, budget_left: Some(budget_left) }
    }

    async fn token(
        &self,
        identity: &Identity,
        newer_than: u64,
        lane: Lane,
        deadline: Instant,
    ) -> Result<Arc<Token>, UpstreamError> {
        // Every call waits for a login, so it does not last longer for a long call.
        let deadline = deadline.min(self.deadline());
        let token = identity.auth.token(newer_than, self.login(identity, lane, deadline));
        tokio::time::timeout_at(deadline, token).await.unwrap_or(Err(UpstreamError::TimedOut))
    }

    async fn login(&self, identity: &Identity, lane: Lane, deadline: Instant) -> Result<Login, UpstreamError> {
        let Identity { client_id, client_secret, .. } = identity;
        let credentials = wire::Credentials { client_id, client_secret: client_secret.expose() };
        let request = Request {
            call: Call::Login,
            method: Method::POST,
            path: "/api/v1/auth/universal-auth/login".to_owned(),
            query: Vec::new(),
            body: Some(wire::body(&credentials, client_secret.len())?),
            known: None,
        };
        let reply = self.exchange(&request, None, lane, deadline).await?;
        if reply.meaning != Meaning::Done {
            if reply.is_no_answer_to_a_login() {
                // The server answers: an outage or a refused login from before must not hide this.
                self.tell(UpstreamState::Up, None);
                return Ok(Login::Elsewhere(self.state.misplaced(rejection(&reply))));
            }
            let cause = reply.problem.why_no_login();
            tracing::debug!(status = reply.status, cause = cause.as_str(), "the upstream refuses our login");
            self.tell(UpstreamState::LoginRefused, Some(cause));
            return Ok(Login::Refused(cause));
        }
        let granted: wire::Granted = wire::read(&reply.body)?;
        let token = Zeroizing::new(granted.access_token.0.expose().to_owned());
        Ok(Login::Granted { token, lasts: Duration::from_secs(granted.expires_in) })
    }

    /// Sends a request, and once more if the first try failed in a way that may pass.
    async fn exchange(
        &self,
        request: &Request,
        token: Option<&Token>,
        lane: Lane,
        deadline: Instant,
    ) -> Result<Reply, UpstreamError> {
        let failure = match self.attempt(request, token, lane, deadline).await {
            Ok(reply) => return Ok(reply),
            Err(failure) => failure,
        };
        let pause = Duration::from_millis(rand::random_range(50..=150));
        let repeatable = match failure.reach {
            Reach::NotSent => true,
            // A write may have happened even though no answer came.
            Reach::Unclear => !request.call.writes(),
            Reach::Settled => false,
        };
        if !repeatable || Instant::now() + pause >= deadline {
            return Err(failure.error);
        }
        tokio::time::sleep(pause).await;
        match self.attempt(request, token, lane, deadline).await {
            // The second try was not made after all, so the first error says more.
            Err(second) if second.error.retry_after().is_some() => Err(failure.error),
            Err(second) => Err(second.error),
            Ok(reply) => Ok(reply),
        }
    }

    /// Sends a request once.
    ///
    /// The order matters. Checks without cost come first, the breaker among them, so that of all
    /// callers that find its pause over, only the one with the trial call spends budget; and a call
    /// waits for budget before it takes one of the few slots. A long call takes its slot first,
    /// because a request that is taken from the budget must arrive within the timeout. A caller
    /// that is refused on the way, or goes away, gives back the permission for the trial call.
    async fn attempt(
        &self,
        request: &Request,
        token: Option<&Token>,
        lane: Lane,
        deadline: Instant,
    ) -> Result<Reply, Failure> {
        self.check_pause(request.call)?;
        let left_alone = |open: Open| {
            Failure::settled(UpstreamError::Down { cause: self.state.cause(), retry_after: open.retry_after })
        };
        let permit = self.breaker.admit().map_err(left_alone)?;
        // A wait that leaves no time for the call would waste budget.
        let patience = self.patience.load_full();
        let latest = deadline.checked_sub(patience.timeout / 4).unwrap_or(deadline);
        let early = if request.call.is_long() { Some(self.slots(lane).await?) } else { None };
        self.budget.take(lane, latest).await.map_err(Failure::settled)?;
        let _slots = match early {
            Some(slots) => slots,
            None => self.slots(lane).await?,
        };
        self.check_pause(request.call)?;
        permit.check().map_err(left_alone)?;
        let mut attempt =
            Attempt { client: self, permit: Some(permit), call: request.call, lane, started: Instant::now(), deadline };
        self.metrics.gauge("secretier_upstream_budget_left", &[], f64::from(self.budget.left()));

        let response = patience.http.execute(self.http_request(request, token)?);
        let response = match attempt.even_late(response, patience.timeout, request).await {
            Ok(response) => response,
            Err(error) => return Err(attempt.broke(&error, &patience)),
        };
        let status = response.status().as_u16();
        let etag = response.headers().get(header::ETAG).and_then(|etag| etag.to_str().ok()).map(str::to_owned);
        if let Some(limit) = told_limit(response.headers()) {
            self.told_limit.store(limit, Ordering::Relaxed);
        }
        if status == 429 {
            let retry_after = retry_after(response.headers(), self.clock.now());
            attempt.end(Outcome::RateLimited, Some(status));
            self.pause(request.call, retry_after);
            return Err(Failure::settled(UpstreamError::RateLimited { retry_after }));
        }
        let body = match self.body(response).await {
            Ok(body) => body,
            Err(Unread::TooLong) => {
                attempt.end(Outcome::Rejected, Some(status));
                return Err(Failure::settled(UpstreamError::Malformed(TOO_LONG)));
            }
            Err(Unread::Broken) => {
                self.state.failed(Cause::Connection);
                attempt.end(Outcome::Failed, Some(status));
                return Err(Failure::unclear(UpstreamError::Malformed("it was cut off")));
            }
        };
        let problem = if (200..=299).contains(&status) { None } else { Problem::read(&body) };
        let is_answer = match status {
            200..=299 => wire::is_json(&body),
            304 => request.known.is_some(),
            // A proxy in front of the server may say that a body is too long.
            413 => true,
            400..=499 => problem.is_some(),
            _ => true,
        };
        if !is_answer {
            self.state.failed(Cause::NotInfisical);
            attempt.end(Outcome::Failed, Some(status));
            return Err(Failure::unclear(UpstreamError::Foreign { status }));
        }
        let problem = problem.unwrap_or_default();
        let meaning = Meaning::of(request.call, status, &problem);
        if meaning == Meaning::Broken {
            self.state.failed(Cause::Failed);
        }
        attempt.end(meaning.outcome(), Some(status));
        match meaning {
            Meaning::Broken => Err(Failure::unclear(UpstreamError::Failed(status))),
            _ => Ok(Reply { status, meaning, etag, body, problem }),
        }
    }

    /// The HTTP client, and how long a usual call may take.
    pub(super) fn http(&self) -> (reqwest::Client, Duration) {
        let patience = self.patience.load();
        (patience.http.clone(), patience.timeout)
    }

    /// Logs in, if there is no token.
    pub(super) async fn log_in(&self, deadline: Instant) -> Result<(), UpstreamError> {
        let identity = self.identity.load_full();
        self.token(&identity, 0, Lane::Interactive, deadline).await.map(drop)
    }

    /// The requests a minute that the server said it takes on a route; 0 if it said nothing.
    pub(super) fn told_limit(&self) -> u32 {
        self.told_limit.load(Ordering::Relaxed)
    }

    pub(super) fn http_request(&self, request: &Request, token: Option<&Token>) -> Result<reqwest::Request, Failure> {
        // The site's address was checked when this was built, and the path is ours.
        let url = Url::parse(&format!("{}{}", self.site_url, request.path));
        let mut url = url.map_err(|_| {
            let reason = "not an address".to_owned();
            Failure::settled(UpstreamError::unreachable(reason))
        })?;
        if !request.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&request.query);
        }
        let mut sent = reqwest::Request::new(request.method.clone(), url);
        let headers = sent.headers_mut();
        headers.insert(header::ACCEPT, header::HeaderValue::from_static("application/json"));
        headers.insert(header::USER_AGENT, header::HeaderValue::from_static(USER_AGENT));
        if let Some(token) = token {
            headers.insert(header::AUTHORIZATION, token.header());
        }
        if let Some(known) = request.known.as_deref().and_then(|known| known.parse().ok()) {
            headers.insert(header::IF_NONE_MATCH, known);
        }
        if let Some(body) = &request.body {
            headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
            *sent.body_mut() = Some(body.clone().into());
        }
        Ok(sent)
    }

    /// Reads a body of limited length into memory that is wiped.
    pub(super) async fn body(&self, mut response: reqwest::Response) -> Result<Zeroizing<Vec<u8>>, Unread> {
        let announced = response.content_length().unwrap_or(0);
        if announced > self.max_response {
            return Err(Unread::TooLong);
        }
        // The announced length may be wrong, so not all of it is allocated at once.
        let room = usize::try_from(announced.min(1 << 20)).unwrap_or(0);
        let mut body = Zeroizing::new(Vec::with_capacity(room));
        while let Some(chunk) = response.chunk().await.map_err(|_| Unread::Broken)? {
            if (body.len() + chunk.len()) as u64 > self.max_response {
                return Err(Unread::TooLong);
            }
            if body.capacity() - body.len() < chunk.len() {
                // Grown by hand: a vector that grows by itself leaves its old memory unwiped.
                let mut longer = Zeroizing::new(Vec::with_capacity((body.len() + chunk.len()) * 2));
                longer.extend_from_slice(&body);
                body = longer;
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    async fn slots(&self, lane: Lane) -> Result<(Option<SemaphorePermit<'_>>, SemaphorePermit<'_>), Failure> {
        // The semaphore is never closed, so this never fails.
        let closed = |_| Failure::settled(UpstreamError::TimedOut);
        let refresh = match lane {
            Lane::Changes | Lane::Refresh | Lane::Migration => {
                Some(self.refresh_slots.acquire().await.map_err(closed)?)
            }
            Lane::Interactive => None,
        };
        Ok((refresh, self.slots.acquire().await.map_err(closed)?))
    }

    fn note_answer(&self) {
        let at = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.answered.fetch_max(at.saturating_add(1), Ordering::Relaxed);
    }

    fn has_answered_since(&self, since: Instant) -> bool {
        let answered = self.answered.load(Ordering::Relaxed);
        answered > 0 && self.began + Duration::from_millis(answered) >= since
    }

    /// Notes the tier's latest state.
    fn tell(&self, now: UpstreamState, cause: Option<Cause>) {
        self.state.tell(now, cause, self.breaker.is_open());
    }

    fn check_pause(&self, call: Call) -> Result<(), Failure> {
        let (now, until) = (self.clock.running(), millis(&self.pauses[call.route()]));
        if now < until {
            return Err(Failure::settled(UpstreamError::RateLimited { retry_after: until - now }));
        }
        Ok(())
    }

    fn pause(&self, call: Call, pause: Duration) {
        let until = self.clock.running() + pause;
        let until = u64::try_from(until.as_millis()).unwrap_or(u64::MAX);
        self.pauses[call.route()].fetch_max(until, Ordering::Relaxed);
        self.tell(UpstreamState::RateLimited, None);
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("site_url", &self.site_url).finish_non_exhaustive()
    }
}

/// One request in progress. If it is dropped at its deadline, it counts as a failure; before the
/// deadline our caller went away, which says nothing about upstream.
struct Attempt<'a> {
    client: &'a Client,
    permit: Option<Permit<'a>>,
    call: Call,
    lane: Lane,
    started: Instant,
    deadline: Instant,
}

impl Attempt<'_> {
    /// Waits for an answer for as long as the call may take. If it has not come after the usual
    /// timeout, the call counts as a failure from then on, unless another call was answered lately:
    /// then this folder is slow, and the tier has not failed.
    async fn even_late<T>(&mut self, answer: impl Future<Output = T>, usual: Duration, request: &Request) -> T {
        let mut answer = std::pin::pin!(answer);
        if !request.call.reads_a_folder() || self.started + usual >= self.deadline {
            return answer.await;
        }
        if let Ok(answer) = tokio::time::timeout(usual, &mut answer).await {
            return answer;
        }
        let folder = request.query.iter().find(|(name, _)| *name == "secretPath").map(|(_, path)| path.as_str());
        tracing::warn!(
            folder,
            "the upstream takes longer than infisical.timeout to list a folder; the read goes on until \
             infisical.read_timeout, and what it brings is kept"
        );
        let since = self.started.checked_sub(usual).unwrap_or(self.started);
        if !self.client.has_answered_since(since)
            && let Some(permit) = self.permit.replace(self.client.breaker.probe())
        {
            permit.failed();
            self.client.tell(UpstreamState::Down, Some(Cause::Timeout));
        }
        answer.await
    }

    fn end(mut self, outcome: Outcome, status: Option<u16>) {
        self.settle(outcome, status);
    }

    /// Ends the attempt without an answer.
    fn broke(self, error: &reqwest::Error, patience: &Patience) -> Failure {
        if error.is_timeout() && error.is_connect() && patience.has_proxy() {
            let cause = Cause::ProxyTimeout;
            self.client.state.failed_by(cause, error);
            self.end(Outcome::Failed, None);
            return Failure::settled(UpstreamError::Unreachable { cause, reason: "no answer in time".to_owned() });
        }
        if error.is_timeout() {
            self.end(Outcome::Timeout, None);
            return Failure::settled(UpstreamError::TimedOut);
        }
        let cause = Cause::of_connection(error);
        self.client.state.failed_by(cause, error);
        self.end(Outcome::Failed, None);
        let reach = if error.is_connect() { Reach::NotSent } else { Reach::Unclear };
        // The innermost reason, which contains no address: "connection refused".
        let mut reason: &dyn std::error::Error = error;
        while let Some(source) = reason.source() {
            reason = source;
        }
        Failure { error: UpstreamError::Unreachable { cause, reason: reason.to_string() }, reach }
    }

    fn settle(&mut self, outcome: Outcome, status: Option<u16>) {
        let Some(permit) = self.permit.take() else { return };
        let took = self.started.elapsed();
        match outcome {
            Outcome::Failed | Outcome::Timeout => {
                permit.failed();
                let cause = (outcome == Outcome::Timeout).then_some(Cause::Timeout);
                self.client.tell(UpstreamState::Down, cause);
            }
            Outcome::Ok | Outcome::NotModified | Outcome::Denied | Outcome::Rejected => {
                self.client.note_answer();
                permit.succeeded();
                self.client.tell(UpstreamState::Up, None);
            }
            // The caller that saw it reports it.
            Outcome::RateLimited | Outcome::Refused => permit.succeeded(),
            Outcome::Cancelled => drop(permit),
        }
        let (call, outcome) = (self.call.as_str(), outcome.as_str());
        self.client.metrics.count("secretier_upstream_calls_total", &[("call", call), ("outcome", outcome)]);
        self.client.metrics.observe("secretier_upstream_call_seconds", &[("call", call)], took);
        let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        tracing::debug!(call, outcome, status, millis, lane = ?self.lane, "called the upstream");
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let in_time = Instant::now() < self.deadline;
        self.settle(if in_time { Outcome::Cancelled } else { Outcome::Timeout }, None);
    }
}

/// The outcome of a request, for the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Ok,
    NotModified,
    Denied,
    RateLimited,
    Failed,
    Timeout,
    Rejected,
    Refused,
    Cancelled,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::NotModified => "not_modified",
            Self::Denied => "denied",
            Self::RateLimited => "rate_limited",
            Self::Failed => "failed",
            Self::Timeout => "timeout",
            Self::Rejected => "rejected",
            Self::Refused => "refused",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A request without a usable answer.
pub(super) struct Failure {
    error: UpstreamError,
    reach: Reach,
}

/// How far a failed request got.
pub(super) enum Reach {
    /// It certainly did not reach the server.
    NotSent,
    /// It may have reached the server, and may have been processed.
    Unclear,
    /// It must not be repeated.
    Settled,
}

impl Failure {
    fn settled(error: UpstreamError) -> Self {
        Self { error, reach: Reach::Settled }
    }

    fn unclear(error: UpstreamError) -> Self {
        Self { error, reach: Reach::Unclear }
    }
}

/// Why a body was not read.
pub(super) enum Unread {
    TooLong,
    Broken,
}

impl Meaning {
    fn of(call: Call, status: u16, problem: &Problem) -> Self {
        match status {
            200..=299 => Self::Done,
            304 => Self::NotModified,
            400..=499 if call == Call::Login => Self::Refused,
            500..=599 if call == Call::Login => Self::Broken,
            401 | 403 if problem.is_permission_denied() => Self::Denied,
            400..=499 if problem.is_validation_failure() => Self::Rejected,
            401 | 403 => Self::Refused,
            400 if problem.speaks_of_access_token() => Self::TokenTrouble,
            500 if call == Call::Delete && problem.is_stumble_over_nothing() => Self::NothingThere,
            500 if call == Call::Write && problem.says_too_large() => Self::Rejected,
            500 if problem.speaks_of_token() => Self::TokenTrouble,
            500..=599 => Self::Broken,
            _ => Self::Rejected,
        }
    }

    fn outcome(self) -> Outcome {
        match self {
            Self::Done | Self::NothingThere => Outcome::Ok,
            Self::NotModified => Outcome::NotModified,
            Self::Denied => Outcome::Denied,
            Self::Refused | Self::TokenTrouble => Outcome::Refused,
            Self::Rejected => Outcome::Rejected,
            Self::Broken => Outcome::Failed,
        }
    }
}

/// The error that a rejection means.
pub(super) fn rejection(reply: &Reply) -> UpstreamError {
    let cause = if (300..=399).contains(&reply.status) { Cause::Redirected } else { reply.problem.cause() };
    let hint = match reply.status {
        // A proxy in front of the server may accept less than the server does.
        413 => return Unstorable::Size.into(),
        _ if reply.problem.says_too_large() => return Unstorable::Size.into(),
        300..=399 => "it redirects elsewhere, which is not followed; set infisical.site_url to the final address",
        _ => reply.problem.hint(),
    };
    UpstreamError::Rejected { status: reply.status, cause, hint }
}

/// The requests a minute that the server takes on a route, where it says so.
fn told_limit(headers: &HeaderMap) -> Option<u32> {
    headers.get("x-ratelimit-limit")?.to_str().ok()?.trim().parse().ok()
}

fn millis(millis: &AtomicU64) -> Duration {
    Duration::from_millis(millis.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_mean_what_they_were_recorded_to_mean() {
        use Call::{Delete, Login, Snapshot, Write};
        use Meaning::{Broken, Denied, Done, NotModified, NothingThere, Refused, Rejected, TokenTrouble};
        for (call, status, error, message, meaning) in [
            (Snapshot, 200, "", "", Done),
            (Snapshot, 304, "", "", NotModified),
            (Snapshot, 401, "PermissionDenied", "You are not allowed to read on secrets", Denied),
            (Snapshot, 403, "PermissionDenied", "You are not allowed to read on secrets", Denied),
            (Snapshot, 403, "Identity not in project", "You are not allowed to access this resource", Refused),
            (Snapshot, 403, "Unauthorized access", "Token missing", Refused),
            (Snapshot, 403, "UnauthorizedError", "Failed to renew MI access token due to TTL expiration", Refused),
            (Snapshot, 500, "Internal Server Error", "jwt malformed", TokenTrouble),
            (Snapshot, 500, "Internal Server Error", "jwt expired", TokenTrouble),
            (Snapshot, 500, "Internal Server Error", "invalid token", TokenTrouble),
            (Snapshot, 500, "Internal Server Error", "invalid signature", TokenTrouble),
            (
                Snapshot,
                400,
                "BadRequest",
                "Unable to renew because access token number of uses limit reached",
                TokenTrouble,
            ),
            (Snapshot, 400, "BadRequest", "Project not found during bot lookup.", Rejected),
            (Snapshot, 500, "IdAccessTokenFindOne", "Something went wrong", Broken),
            (Snapshot, 500, "Internal Server Error", "Reached the max retries per request limit", Broken),
            (Login, 403, "UnauthorizedError", "Invalid credentials", Refused),
            (Login, 500, "Find one", "Something went wrong", Broken),
            (Write, 400, "BadRequest", "Secret not found", Rejected),
            (Write, 500, "Internal Server Error", "Request body is too large", Rejected),
            (Write, 500, "Internal Server Error", "Something went wrong", Broken),
            (
                Delete,
                500,
                "Internal Server Error",
                "Cannot read properties of undefined (reading 'encryptedValue')",
                NothingThere,
            ),
            (
                Snapshot,
                500,
                "Internal Server Error",
                "Cannot read properties of undefined (reading 'encryptedValue')",
                Broken,
            ),
        ] {
            let body = serde_json::json!({"statusCode": status, "error": error, "message": message}).to_string();
            let problem = Problem::read(body.as_bytes()).unwrap();
            assert_eq!(Meaning::of(call, status, &problem), meaning, "{status} {error} {message}");
        }
        let body = r#"{"statusCode":403,"error":"ValidationFailure","message":[{"code":"invalid_type"}]}"#;
        assert_eq!(Meaning::of(Write, 403, &Problem::read(body.as_bytes()).unwrap()), Rejected);
    }
}
