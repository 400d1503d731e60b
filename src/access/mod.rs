//! Authorisation: bearer tokens, their actions and scopes; processes that need no token; and
//! the limits of each caller.

pub mod audit;
mod config;
mod limits;
mod logins;
mod peer;
mod tokens;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use governor::Quota;
use http::HeaderValue;
use tokio::sync::{Notify, watch};

pub use crate::tiers::database::LONGEST_LOGIN;
pub use config::{Config, InvalidNetwork, Names, Network, UnixPeer};
pub use limits::{Caller, Limit};
pub use logins::{Login, LoginMark};
pub use peer::Peer;
pub use tokens::{Action, ClientCredentials, Grant, InvalidToken, KeptToken, NewToken, Token, client_id};

use self::{
    limits::{Peers, Rate},
    logins::{Begin, Logins, PresentedLogin},
    tokens::{Lasting, Marker, Presented, PresentedToken},
};
use crate::{
    clock::{Clock, Moment, Timestamp},
    tiers::database::{Database, KnownLogins, StoreError, TokenRow},
};

/// The tokens that are valid, held in memory so that no request waits for the database.
///
/// The set is replaced whole, never changed in place: a request sees the tokens from
/// before a change or from after it, and a revoked one is gone for every request that
/// begins after the replacement.
pub struct Access {
    grants: ArcSwap<Grants>,
    /// What access tokens are checked by; replaced whole, after the grants.
    logins: ArcSwap<Logins>,
    processes: ArcSwap<Vec<(UnixPeer, Holder)>>,
    peers: Peers,
    /// Read and changed only under `reading`.
    per_token: ArcSwap<Option<Quota>>,
    database: Arc<Database>,
    clock: Clock,
    /// When the database was last asked about unknown tokens, in milliseconds by the running clock.
    asked_at: AtomicI64,
    reading: tokio::sync::Mutex<()>,
    /// The lasting state of each token in the database, revoked ones included: their last use is
    /// the one that people ask for.
    lasting: Mutex<HashMap<String, Arc<Lasting>>>,
    /// Marks tokens that were found valid.
    marks: Marker,
    /// How often the set was replaced; raised after each replacement.
    changes: AtomicU64,
    /// Told of each replacement.
    replaced: watch::Sender<()>,
    /// Notified when a token that admitted callers before is gone, or ends sooner.
    lost: Notify,
}

/// Grants by the public parts of their tokens. A caller who knows none of these cannot exploit
/// how this table hashes.
type Grants = hashbrown::HashMap<String, Holder>;

/// The caller of a request.
#[derive(Debug)]
pub enum Known {
    /// The holder of a token, or a process that needs none.
    As(Arc<Grant>),
    /// A caller with a token that may have been made a moment ago.
    NotYet,
}

/// A grant, with its rate. The rate goes on while the tokens are read
/// again, and ends with its token.
#[derive(Debug, Clone)]
struct Holder {
    grant: Arc<Grant>,
    rate: Option<Arc<Rate>>,
}

/// A request that is not admitted.
#[derive(Debug)]
pub struct Refusal {
    /// The reason.
    pub why: Refused,
    /// The public part of the token that was presented, where it has the form of one.
    pub token_id: Option<String>,
    /// The rights that the token has or once had; known only where its secret part is right.
    pub grant: Option<Arc<Grant>>,
}

impl From<Refused> for Refusal {
    fn from(why: Refused) -> Self {
        Self { why, token_id: None, grant: None }
    }
}

/// Why there is no access token.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// The client, or its access token, is refused.
    #[error("{}", .0.why)]
    Refused(Refusal),
    /// There is no key to sign with: that of the database does not open here.
    #[error("the key that signs access tokens does not open with the master keys that are known here")]
    NoKey,
    /// The token has so many logins that were ended that one more is not taken.
    #[error("too many logins of this token were ended and would not have ended by themselves yet")]
    TooManyEnded,
    /// The database cannot be asked.
    #[error("the database tier failed")]
    Store(#[from] StoreError),
}

impl From<Refusal> for LoginError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Why a request is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No `Authorization: Bearer` header.
    #[error("send a token in the header 'Authorization: Bearer <token>'; 'secretier token create' makes one")]
    Missing,
    /// A token that is unknown, revoked or damaged.
    #[error("this token is unknown or was revoked; 'secretier token create' makes a new one")]
    Invalid,
    /// An access token that cannot be told to be good: the database does not answer, or the master key does
    /// not that the key which signed it is sealed with.
    #[error(
        "it cannot be told just now whether this access token is good: the database does not answer, or no source of keys.sources has the master key that its signing key is sealed with; try again"
    )]
    Unconfirmed,
    /// A token past its end.
    #[error("this token has expired; 'secretier token create' makes a new one")]
    Expired,
    /// A valid token whose scope does not include the request.
    #[error("this token does not reach this tenant, this key or this action; GET /v1/whoami tells what it reaches")]
    OutOfScope,
    /// The caller asked for more than a limit allows.
    #[error("{}", told(*limit))]
    Limited {
        /// Which limit.
        limit: Limit,
        /// When to come again.
        retry_after: Duration,
    },
}

fn told(limit: Limit) -> &'static str {
    match limit {
        Limit::Token => {
            "this token asks more often than access.requests_per_second_per_token allows; come again after Retry-After"
        }
        Limit::Peer => {
            "this peer asks more often than access.requests_per_second_per_peer allows; come again after Retry-After"
        }
        Limit::Failures => {
            "too many tokens from this peer were none; come again after Retry-After, with one that is good"
        }
    }
}

impl Access {
    /// The shortest time between two questions to the database about unknown tokens, however many
    /// are tried.
    const ASK_EVERY: Duration = Duration::from_millis(200);

    /// Last uses that are written to the database in one operation.
    const TOLD_TOGETHER: usize = 100;

    /// Knows no token until [`Self::reload`] has read them.
    #[must_use]
    pub fn build(config: &Config, database: Arc<Database>, clock: Clock) -> Self {
        let access = Self {
            grants: ArcSwap::default(),
            logins: ArcSwap::default(),
            processes: ArcSwap::default(),
            peers: Peers::new(config.peers, config.per_peer(), clock.clone()),
            per_token: ArcSwap::from_pointee(config.per_token()),
            database,
            clock,
            asked_at: AtomicI64::new(i64::MIN),
            reading: tokio::sync::Mutex::default(),
            lasting: Mutex::default(),
            marks: Marker::new(),
            changes: AtomicU64::new(0),
            replaced: watch::Sender::new(()),
            lost: Notify::new(),
        };
        access.let_in(&config.unix_peers, &[]);
        access
    }

    /// Applies changed settings, from the next request on. Tokens stay; a changed rate begins anew
    /// for each of them.
    pub async fn change(&self, config: &Config) {
        // Otherwise tokens that are just being read could be replaced by those known before, or
        // bring back the former rate.
        let _turn = self.reading.lock().await;
        self.peers.change(config.peers, config.per_peer());
        let is_same = **self.per_token.load() == config.per_token();
        if !is_same {
            self.per_token.store(Arc::new(config.per_token()));
            let anew = |(id, holder): (&String, &Holder)| {
                (id.clone(), Holder { grant: Arc::clone(&holder.grant), rate: self.rate() })
            };
            self.grants.store(Arc::new(self.grants.load().iter().map(anew).collect()));
        }
        let before = if is_same { self.processes.load_full() } else { Arc::default() };
        self.let_in(&config.unix_peers, &before);
    }

    /// Admits these processes, and no others. One that was admitted before keeps
    /// its rate.
    fn let_in(&self, processes: &[UnixPeer], before: &[(UnixPeer, Holder)]) {
        let holder = |process: &UnixPeer| match before.iter().find(|(known, _)| known == process) {
            Some((_, holder)) => Some(holder.clone()),
            // A fault in it was reported when the configuration was checked.
            None => Some(Holder { grant: Arc::new(process.grant().ok()?), rate: self.rate() }),
        };
        let processes = processes.iter().filter_map(|process| Some((process.clone(), holder(process)?)));
        self.processes.store(Arc::new(processes.collect()));
        self.replaced.send_replace(());
    }

    /// Looks up a peer's account; to be done once a connection, and kept.
    #[must_use]
    pub fn caller(&self, peer: Peer) -> Caller {
        self.peers.caller(peer)
    }

    /// The number of peers that are remembered.
    #[must_use]
    pub fn peers(&self) -> usize {
        self.peers.len()
    }

    /// Reads the tokens again.
    ///
    /// # Errors
    /// The database does not answer; the tokens known before stay valid.
    pub async fn reload(&self) -> Result<(), StoreError> {
        // One at a time, from the read to the replacement: otherwise a set that was read before
        // a token was revoked could replace one that was read after.
        let _turn = self.reading.lock().await;
        self.read().await
    }

    async fn read(&self) -> Result<(), StoreError> {
        let known = self.database.known_tokens().await?;
        let (rows, is_set_back) = (known.tokens, known.is_set_back);
        let lasting = self.keep_lasting(&rows);
        let before = self.grants.load_full();
        // Tokens of an earlier state of the database admit nobody who was not admitted already.
        let was_in = |row: &TokenRow| before.get(&row.id).is_some_and(|holder| holder.grant.is_of(row));
        let live = rows.into_iter().filter(|row| row.revoked_at.is_none());
        let live = live.filter(|row| !is_set_back || was_in(row));
        let grants = live.filter_map(|row| {
            let lasting = lasting.get(&row.id).map(Arc::clone).unwrap_or_default();
            readable(row, lasting)
        });
        self.replace(grants.map(|grant| (grant.id.clone(), self.holder(grant))).collect());
        // Last: whatever is wrong with them, a revoked token is gone by now.
        let KnownLogins { keys, unopened, ended } = self.database.known_logins().await?;
        self.logins.store(Arc::new(Logins::new(&keys, &unopened, ended)));
        self.replaced.send_replace(());
        Ok(())
    }

    fn replace(&self, grants: Grants) {
        let before = self.grants.load_full();
        let ends = |holder: &Holder| holder.grant.expires_at();
        let is_lost = before.iter().any(|(id, holder)| grants.get(id).is_none_or(|now| ends(now) != ends(holder)));
        self.grants.store(Arc::new(grants));
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.replaced.send_replace(());
        if is_lost {
            self.lost.notify_one();
        }
    }

    /// The valid tokens, to be kept for a start without the database.
    #[must_use]
    pub fn kept(&self) -> Vec<KeptToken> {
        self.grants.load().values().map(|holder| KeptToken::of(&holder.grant)).collect()
    }

    /// Admits the callers that were admitted when these were kept, until the database tells the
    /// current state; returns the number of tokens.
    pub fn take_over(&self, tokens: Vec<KeptToken>) -> usize {
        let rows: Vec<TokenRow> = tokens.into_iter().filter_map(KeptToken::into_row).collect();
        let lasting = self.keep_lasting(&rows);
        let grants = rows.into_iter().filter_map(|row| {
            let lasting = lasting.get(&row.id).map(Arc::clone).unwrap_or_default();
            readable(row, lasting)
        });
        self.replace(grants.map(|grant| (grant.id.clone(), self.holder(grant))).collect());
        self.grants.load().len()
    }

    /// A number that differs after every change of the result of [`Self::kept`].
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Waits until a token is gone, or ends sooner, since the last such wait. For a single
    /// waiter.
    pub async fn lost(&self) {
        self.lost.notified().await;
    }

    /// Keeps the lasting state of the tokens that exist, and forgets the others.
    fn keep_lasting(&self, rows: &[TokenRow]) -> HashMap<String, Arc<Lasting>> {
        let mut lasting = self.lasting.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = |row: &TokenRow| (row.id.clone(), lasting.get(&row.id).map(Arc::clone).unwrap_or_default());
        *lasting = rows.iter().map(kept).collect();
        lasting.clone()
    }

    /// Writes the last uses of tokens to the database that it does not know yet.
    ///
    /// # Errors
    /// The database does not answer; it will be told the next time.
    pub async fn tell_uses(&self) -> Result<(), StoreError> {
        // Each is a statement: all of many would take longer than one operation may.
        for some in self.untold_uses().chunks(Self::TOLD_TOGETHER) {
            self.database.note_token_uses(some.iter().map(|(id, at, _)| (id.clone(), *at)).collect()).await?;
            for (_, at, lasting) in some {
                lasting.last_use.told(*at);
            }
        }
        Ok(())
    }

    fn untold_uses(&self) -> Vec<(String, Timestamp, Arc<Lasting>)> {
        let lasting = self.lasting.lock().unwrap_or_else(PoisonError::into_inner);
        let untold = |(id, lasting): (&String, &Arc<Lasting>)| {
            lasting.last_use.untold().map(|at| (id.clone(), at, Arc::clone(lasting)))
        };
        lasting.iter().filter_map(untold).collect()
    }

    fn holder(&self, grant: Grant) -> Holder {
        match self.grants.load().get(&grant.id) {
            Some(before) => Holder { grant: Arc::new(grant), rate: before.rate.clone() },
            None => Holder { grant: Arc::new(grant), rate: self.rate() },
        }
    }

    /// A token's rate, starting full.
    fn rate(&self) -> Option<Arc<Rate>> {
        self.per_token.load().map(|quota| Arc::new(Rate::new(quota, self.clock.running())))
    }

    /// The caller of a request, as far as that can be told at once; [`Self::ask`] tells the
    /// rest where it is [`Known::NotYet`]. A valid token is admitted however many invalid ones come
    /// from its peer: all programs of a machine have one address.
    ///
    /// # Errors
    /// The caller is not admitted.
    pub fn recognise(
        &self,
        caller: &Caller,
        authorization: Option<&HeaderValue>,
        now: Moment,
    ) -> Result<Known, Refusal> {
        self.peers.request(caller, now.running()).map_err(|wait| limited(Limit::Peer, wait))?;
        let Some(authorization) = authorization else {
            let processes = self.processes.load();
            let process = processes.iter().find(|(process, _)| process.is(caller.peer));
            let (_, holder) = process.ok_or(Refused::Missing)?;
            return holder.admitted(now).map(Known::As);
        };
        let presented = match tokens::presented(authorization) {
            Ok(presented) => presented,
            Err(Refused::Invalid) => {
                self.may_attempt(caller, None)?;
                return Err(self.failed(caller, None));
            }
            Err(why) => return Err(why.into()),
        };
        let id = presented.id();
        let holder = self.grants.load();
        let holder = holder.get(id).filter(|_| presented.can_be_checked(&self.logins));
        match holder.map(|holder| self.opened(&presented, holder, now)) {
            Some(Some(outcome)) => outcome.map(Known::As),
            Some(None) => {
                self.may_attempt(caller, Some(id))?;
                Err(self.failed(caller, Some(id)))
            }
            None => {
                presented.opens_nothing(&self.marks);
                self.may_attempt(caller, Some(id))?;
                Ok(Known::NotYet)
            }
        }
    }

    /// Whether the holder of this grant would be admitted now, its rate aside.
    #[must_use]
    pub fn still_admits(&self, grant: &Grant, login: Option<&LoginMark>, now: Timestamp) -> bool {
        if login.is_some_and(|login| !self.logins.load().lasts(login, now)) {
            return false;
        }
        let lasts = |holder: &Holder| {
            // A token that was replaced ends sooner than when it was presented.
            holder.grant.is_as(grant) && holder.grant.expires_at().is_none_or(|end| now < end)
        };
        self.grants.load().get(&grant.id).is_some_and(lasts)
            || self.processes.load().iter().any(|(_, holder)| lasts(holder))
    }

    /// The login in this header, if an access token stands there; it is not checked.
    #[must_use]
    pub fn login_in(&self, authorization: Option<&HeaderValue>) -> Option<LoginMark> {
        match tokens::presented(authorization?).ok()? {
            Presented::Login(login) => Some(login.mark()),
            Presented::Token(_) => None,
        }
    }

    /// Changes with each replacement of the tokens and logins.
    #[must_use]
    pub fn replacements(&self) -> watch::Receiver<()> {
        self.replaced.subscribe()
    }

    /// Asks the database about a token that [`Self::recognise`] does not know.
    ///
    /// # Errors
    /// The caller is not admitted.
    pub async fn ask(&self, caller: &Caller, authorization: Option<&HeaderValue>) -> Result<Arc<Grant>, Refusal> {
        let presented = tokens::presented(authorization.ok_or(Refused::Missing)?)?;
        let id = presented.id();
        // It may have been made a moment ago, by another process. Of many callers who bring it
        // at once one asks, and the others wait for that.
        let _turn = self.reading.lock().await;
        let can_be_checked = || presented.can_be_checked(&self.logins);
        if !self.grants.load().contains_key(id) || !can_be_checked() {
            // Where the database does not answer, the token stays unknown.
            let answered = self.read_again().await;
            if !can_be_checked() && (!answered || presented.awaits_its_key(&self.logins)) {
                // Its holder may have done nothing wrong, and must not take it for ended.
                self.failed(caller, Some(id));
                return Err(Refusal { token_id: Some(id.to_owned()), ..Refused::Unconfirmed.into() });
            }
        }
        let known = self.grants.load();
        let outcome = known.get(id).and_then(|holder| self.opened(&presented, holder, self.clock.moment()));
        outcome.unwrap_or_else(|| Err(self.failed(caller, Some(id))))
    }

    /// Reads the tokens again, unless that was just done; `false` where the database does not answer.
    /// To be called under `reading`.
    async fn read_again(&self) -> bool {
        if !self.may_ask() {
            return true;
        }
        let answered = Box::pin(self.read()).await.is_ok();
        // The callers who waited do not ask again one after the other, however long it took.
        self.asked_at.store(millis(self.clock.running()), Ordering::Relaxed);
        answered
    }

    /// Gives an access token for a token's client credentials. A wrong secret costs its peer what a wrong
    /// token does, and takes as long as a right one.
    ///
    /// # Errors
    /// [`LoginError`].
    pub async fn log_in(
        &self,
        caller: &Caller,
        client_id: &str,
        client_secret: &str,
        lasts: Duration,
    ) -> Result<(Login, Arc<Grant>), LoginError> {
        let text = ClientCredentials::token(client_id, client_secret);
        let presented = text.as_ref().and_then(|text| PresentedToken::parse(text.as_bytes())).map(Presented::Token);
        let Some(presented) = presented else {
            self.may_attempt(caller, None)?;
            return Err(self.failed(caller, None).into());
        };
        let grant = self.recognised(caller, &presented).await?;
        Ok((self.sign(&grant, lasts, None).await?, grant))
    }

    /// Gives a new access token for one that is good. It is the same login: it ends with it, and no later
    /// than the first access token would have at the most.
    ///
    /// # Errors
    /// [`LoginError`].
    pub async fn renew_login(
        &self,
        caller: &Caller,
        access_token: &str,
        lasts: Duration,
    ) -> Result<(Login, Arc<Grant>), LoginError> {
        let (login, grant) = self.recognised_login(caller, access_token).await?;
        Ok((self.sign(&grant, lasts, Some(&login)).await?, grant))
    }

    /// Ends the login that gave this access token, on every instance.
    ///
    /// # Errors
    /// [`LoginError`].
    pub async fn end_login(&self, caller: &Caller, access_token: &str) -> Result<Arc<Grant>, LoginError> {
        let (login, grant) = self.recognised_login(caller, access_token).await?;
        if !self.database.end_login(login.id(), &grant.id, login.ends()).await? {
            return Err(LoginError::TooManyEnded);
        }
        self.reload().await?;
        Ok(grant)
    }

    async fn recognised_login<'a>(
        &self,
        caller: &Caller,
        access_token: &'a str,
    ) -> Result<(PresentedLogin<'a>, Arc<Grant>), LoginError> {
        let presented = PresentedLogin::parse(access_token.as_bytes()).map(|login| Presented::Login(Box::new(login)));
        let Some(presented) = presented else {
            self.may_attempt(caller, None)?;
            return Err(self.failed(caller, None).into());
        };
        let grant = self.recognised(caller, &presented).await?;
        match presented {
            Presented::Login(login) => Ok((*login, grant)),
            Presented::Token(_) => Err(Refusal::from(Refused::Invalid).into()),
        }
    }

    /// The grant that is presented in a body rather than a header, as [`Self::recognise`] and
    /// [`Self::ask`] find it.
    async fn recognised(&self, caller: &Caller, presented: &Presented<'_>) -> Result<Arc<Grant>, Refusal> {
        let id = presented.id();
        let known = || {
            let holders = self.grants.load();
            let holder = holders.get(id).filter(|_| presented.can_be_checked(&self.logins));
            holder.map(|holder| self.opened(presented, holder, self.clock.moment()))
        };
        let mut outcome = known();
        if outcome.is_none() {
            presented.opens_nothing(&self.marks);
            self.may_attempt(caller, Some(id))?;
            let _turn = self.reading.lock().await;
            let answered = self.read_again().await;
            outcome = known();
            if outcome.is_none() && (!answered || presented.awaits_its_key(&self.logins)) {
                self.failed(caller, Some(id));
                return Err(Refusal { token_id: Some(id.to_owned()), ..Refused::Unconfirmed.into() });
            }
        } else if let Some(None) = outcome {
            self.may_attempt(caller, Some(id))?;
        }
        outcome.flatten().unwrap_or_else(|| Err(self.failed(caller, Some(id))))
    }

    /// Makes sure that there is a key that signs access tokens, so that a login needs no database.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn ensure_login_key(&self) -> Result<(), StoreError> {
        if !self.logins.load().can_sign() {
            self.database.ensure_login_key().await?;
            self.reload().await?;
        }
        Ok(())
    }

    /// Signs an access token: of a new login, or of one that goes on.
    async fn sign(
        &self,
        grant: &Grant,
        lasts: Duration,
        login: Option<&PresentedLogin<'_>>,
    ) -> Result<Login, LoginError> {
        self.ensure_login_key().await?;
        let now = self.clock.now();
        let begin = login.map_or_else(|| Begin::at(now), PresentedLogin::begin);
        let login = self.logins.load().sign(&grant.id, grant.expires_at(), lasts, &begin, now);
        login.ok_or(LoginError::NoKey)
    }

    /// Admits a request that is authenticated by something other than a token, as far as its
    /// peer's rate allows.
    ///
    /// # Errors
    /// The peer asks too often.
    pub fn admit(&self, caller: &Caller) -> Result<(), Refused> {
        self.peers.request(caller, self.clock.running()).map_err(|wait| limited(Limit::Peer, wait))
    }

    /// Notes that the authentication failed, as for an invalid token: like that, it does not
    /// hold back valid requests.
    ///
    /// # Errors
    /// The peer was not allowed to try one yet.
    pub fn fail(&self, caller: &Caller) -> Result<(), Refused> {
        let now = self.clock.running();
        caller.account.attempt(now).map_err(|wait| limited(Limit::Failures, wait))?;
        caller.account.failed(now);
        Ok(())
    }

    /// The grant of a known token; `None` where its secret part is wrong.
    fn opened(&self, presented: &Presented<'_>, holder: &Holder, now: Moment) -> Option<Result<Arc<Grant>, Refusal>> {
        match presented.opens(&holder.grant, &self.marks, &self.logins, now.wall()) {
            Ok(()) => Some(holder.admitted(now)),
            Err(Refused::Invalid) => None,
            Err(why) => Some(Err(holder.refusal(why))),
        }
    }

    fn may_attempt(&self, caller: &Caller, id: Option<&str>) -> Result<(), Refusal> {
        let attempt = caller.account.attempt(self.clock.running());
        attempt.map_err(|wait| Refusal { token_id: id.map(str::to_owned), ..limited(Limit::Failures, wait).into() })
    }

    fn failed(&self, caller: &Caller, id: Option<&str>) -> Refusal {
        caller.account.failed(self.clock.running());
        Refusal { token_id: id.map(str::to_owned), ..Refused::Invalid.into() }
    }

    fn may_ask(&self) -> bool {
        let now = millis(self.clock.running());
        let asked_at = self.asked_at.load(Ordering::Relaxed);
        now.saturating_sub(asked_at) >= millis(Self::ASK_EVERY)
            && self.asked_at.compare_exchange(asked_at, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

impl Holder {
    /// Admits one more request.
    fn admitted(&self, now: Moment) -> Result<Arc<Grant>, Refusal> {
        match self.rate.as_ref().map_or(Ok(()), |rate| rate.check(now.running())) {
            Ok(()) => Ok(Arc::clone(&self.grant)),
            Err(wait) => Err(self.refusal(limited(Limit::Token, wait))),
        }
    }

    fn refusal(&self, why: Refused) -> Refusal {
        Refusal { why, token_id: Some(self.grant.id.clone()), grant: Some(Arc::clone(&self.grant)) }
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn limited(limit: Limit, retry_after: Duration) -> Refused {
    Refused::Limited { limit, retry_after }
}

/// A row that cannot be read admits nobody, and must not keep the others out.
fn readable(row: TokenRow, lasting: Arc<Lasting>) -> Option<Grant> {
    let name = row.name.clone();
    Grant::from_row(row, lasting)
        .inspect_err(|error| tracing::error!(token = name, %error, "a stored token cannot be read"))
        .ok()
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("tokens", &self.grants.load().len()).finish_non_exhaustive()
    }
}
