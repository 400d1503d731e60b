//! The audit: who asked for what, from where, and with what outcome.
//!
//! Every access and every attempt is accounted for, in one of three ways:
//! - **counted**: memory hits, lists, and requests that were malformed or too many. Equal
//!   ones are one record a window, with their number, and the times of the first and the last.
//!   Of a refusal, nothing that the caller has written is kept.
//! - **recorded one by one, behind the answer**: lookups that reached a lower tier.
//! - **recorded one by one, before the answer**: denials, administration, and writes; a
//!   write is recorded before it is begun, too, and is not begun if it cannot be.
//!
//! `window` counts, `budget` limits the cost of refusals, `ledger` queues and writes, `sinks`
//! and `lines` are the targets, `chain` links the records and finds tampering, `signals` reports
//! signs of an attack.

mod budget;
mod chain;
mod ledger;
mod lines;
mod record;
mod rotation;
mod rows;
mod signals;
mod sinks;
mod window;

use std::{
    collections::BTreeMap,
    num::NonZeroU32,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use arc_swap::ArcSwap;
use governor::Quota;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::{Deserialize, Serialize};

use self::{
    budget::{Budget, Payer},
    chain::Signer,
    ledger::{Ledger, Queued},
    rows::{OnRecord, verify_rows},
    signals::Signals,
    sinks::{DatabaseSink, Sink},
    window::{Origin, Sight},
};
pub use self::{
    chain::{Fault, Finding, Walked},
    ledger::{Unrecorded, Writer},
    lines::{Line, LinesError, to_json, verify as verify_lines},
    record::{Actor, Detail, Kind, Outcome, Record},
    rows::{RowFinding, Rows},
};
use super::{Grant, Peer, limits::Rate};
/// Records as the database has them, and what they are searched by.
pub use crate::tiers::database::{AuditFilter, AuditPlace, AuditRow};
use crate::{
    clock::{Clock, Timestamp},
    legible, log,
    metrics::Metrics,
    sealing::KeyRing,
    tiers::database::{AuditChain, Database, StoreError},
    units,
};

/// `[audit]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The targets of records. The first decides whether a record counts as written.
    pub sink: Vec<SinkName>,
    /// The file of the sink `file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The file is rotated when it is this long.
    #[serde(with = "units::size")]
    pub file_size: u64,
    /// Files that were rotated away and are kept.
    pub files_kept: usize,
    /// How long equal accesses are summed up. A crash loses the counts of one window.
    #[serde(with = "units::duration")]
    pub window: Duration,
    /// The most separate sums; further accesses are counted without names.
    pub max_sums: usize,
    /// The most records that wait to be written; more are counted, by caller, action and origin.
    pub queue: usize,
    /// Denials a second that are recorded one by one, with ten times as many at once: this many of
    /// strangers, and as many of known tokens. Further ones are counted, by who and where from. 0
    /// records each that `strangers_per_day` has room for.
    pub denials_per_second: u32,
    /// Bytes a day of records that strangers can cause, and tokens that are denied. One peer, and
    /// one token, has a quarter. Further ones are counted, by who and why, and written later.
    #[serde(with = "units::size")]
    pub strangers_per_day: u64,
    /// How to treat requests while records cannot be written.
    pub if_unavailable: IfUnavailable,
    /// How long records are kept in the database.
    pub retention: Retention,
    /// When to warn.
    pub signals: signals::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            sink: vec![SinkName::Database],
            file: None,
            file_size: 64 << 20,
            files_kept: 8,
            window: Duration::from_secs(10),
            max_sums: 50_000,
            queue: 10_000,
            denials_per_second: 100,
            strangers_per_day: 256 << 20,
            if_unavailable: IfUnavailable::RefuseWrites,
            retention: Retention::default(),
            signals: signals::Config::default(),
        }
    }
}

impl Config {
    /// The faults of these settings, each as a setting and a sentence.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.sink.is_empty() {
            faults.push("sink: name at least one of \"database\", \"file\", \"stdout\"".to_owned());
        }
        if self.sink.iter().enumerate().any(|(index, sink)| self.sink[..index].contains(sink)) {
            faults.push("sink: names a place twice".to_owned());
        }
        if self.sink.contains(&SinkName::File) && self.file.is_none() {
            faults.push("file: the sink \"file\" needs one, as in \"/var/log/secretier/audit.jsonl\"".to_owned());
        }
        if self.window.is_zero() || self.window > Duration::from_secs(3600) {
            faults.push("window: from \"1ms\" to \"1h\"".to_owned());
        }
        for (name, number) in [("max_sums", self.max_sums), ("queue", self.queue)] {
            if number == 0 {
                faults.push(format!("{name}: at least 1 is needed"));
            }
        }
        if !(budget::LEAST_PER_DAY..=budget::MOST_PER_DAY).contains(&self.strangers_per_day) {
            faults.push("strangers_per_day: from \"1MiB\" to \"1TiB\"".to_owned());
        }
        faults
    }
}

/// A target of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SinkName {
    /// The database.
    Database,
    /// Lines of JSON in a file.
    File,
    /// Lines of JSON on standard output.
    Stdout,
}

/// How to treat requests while records cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum IfUnavailable {
    /// Everything but health is refused.
    RefuseAll,
    /// Writes and administration are refused, reads are counted.
    RefuseWrites,
    /// Everything goes on and is counted.
    GoOn,
}

/// How long records of each kind are kept in the database.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Lookups and lists.
    #[serde(with = "units::duration")]
    pub lookups: Duration,
    /// Denials.
    #[serde(with = "units::duration")]
    pub denials: Duration,
    /// Changes of secrets.
    #[serde(with = "units::duration")]
    pub writes: Duration,
    /// Administration.
    #[serde(with = "units::duration")]
    pub admin: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        let days = |days: u64| Duration::from_secs(days * 24 * 60 * 60);
        Self { lookups: days(90), denials: days(180), writes: days(400), admin: days(400) }
    }
}

impl Retention {
    fn of(self, kind: Kind) -> Duration {
        match kind {
            Kind::Admin => self.admin,
            Kind::Denial => self.denials,
            Kind::Lookup => self.lookups,
            Kind::Write => self.writes,
        }
    }
}

/// Fields that callers add to the record of a request: the headers `X-Audit-*`, by the rest of
/// their names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Fields(BTreeMap<String, String>);

impl Fields {
    const MOST: usize = 8;
    const LONGEST: usize = 256;

    /// Collects them.
    ///
    /// # Errors
    /// [`InvalidField`]: too many, too long, twice, or no text.
    pub fn of(headers: &HeaderMap) -> Result<Self, InvalidField> {
        let mut fields = BTreeMap::new();
        for (name, value) in headers {
            let Some(name) = name.as_str().strip_prefix("x-audit-") else { continue };
            let value = std::str::from_utf8(value.as_bytes()).map_err(|_| InvalidField)?;
            let is_new = fields.insert(name.to_owned(), value.to_owned()).is_none();
            let fits = !name.is_empty() && name.len() <= 64 && value.len() <= Self::LONGEST;
            if !fits || !is_new || fields.len() > Self::MOST {
                return Err(InvalidField);
            }
        }
        Ok(Self(fields))
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first of the fields, up to this many bytes together.
    fn cut_short(self, longest: usize) -> Self {
        let mut left = longest;
        let mut cut = |(name, value): (String, String)| {
            left = left.checked_sub(name.len())?;
            let value = record::shortened(&value, left);
            left -= value.len();
            Some((name, value))
        };
        Self(self.0.into_iter().map_while(&mut cut).collect())
    }

    fn iter(&self) -> impl Iterator<Item = (&String, &String)> {
        self.0.iter()
    }
}

/// Headers `X-Audit-*` that cannot be recorded as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "at most 8 headers X-Audit-*, each once, with a name of at most 64 bytes and at most 256 bytes of text (UTF-8)"
)]
pub struct InvalidField;

/// The caller, as far as it is known.
#[derive(Debug)]
pub struct Who {
    /// The peer that the request came from.
    pub peer: Peer,
    /// The caller's grant, once it is known.
    pub grant: Option<Arc<Grant>>,
    /// The public part of the presented token, where it was not accepted.
    pub token_id: Option<String>,
    /// The API that was used, where it is another than our own.
    pub face: Option<&'static str>,
    fields: Fields,
}

impl Who {
    /// A caller at this peer, not known yet.
    #[must_use]
    pub fn at(peer: Peer) -> Self {
        Self { peer, grant: None, token_id: None, face: None, fields: Fields::default() }
    }

    /// Reads the fields from the headers.
    ///
    /// # Errors
    /// [`InvalidField`]; none is recorded then.
    pub fn read_fields(&mut self, headers: &HeaderMap) -> Result<(), InvalidField> {
        self.fields = Fields::of(headers)?;
        Ok(())
    }
}

/// The caller and the request's headers, as they are recorded: the same for all records of
/// one request.
#[derive(Debug)]
pub struct Account<'a> {
    /// The caller.
    pub who: Who,
    headers: &'a HeaderMap,
    request_id: OnceLock<String>,
}

impl<'a> Account<'a> {
    /// The account of a request.
    #[must_use]
    pub fn new(who: Who, headers: &'a HeaderMap) -> Self {
        Self { who, headers, request_id: OnceLock::new() }
    }

    /// The request's id: the one it came with, if that is 1 to 128 visible characters and not a
    /// stranger's, or a new one.
    pub fn request_id(&self) -> &str {
        self.request_id.get_or_init(|| {
            let given = self.header(&REQUEST_ID).and_then(|id| id.to_str().ok());
            let given =
                given.filter(|id| (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic()));
            given.map_or_else(drawn_id, str::to_owned)
        })
    }

    /// A header, where its sender is known. Headers of strangers are not read.
    fn header(&self, name: &HeaderName) -> Option<&HeaderValue> {
        self.who.grant.as_ref().and_then(|_| self.headers.get(name))
    }

    fn agent(&self) -> &[u8] {
        let agent = self.header(&header::USER_AGENT).map_or(&b""[..], |agent| agent.as_bytes());
        &agent[..agent.len().min(LONGEST_AGENT)]
    }

    fn fields(&self) -> &Fields {
        if self.who.grant.is_some() { &self.who.fields } else { &NO_FIELDS }
    }

    fn actor(&self) -> Option<Actor> {
        let process = match self.who.peer {
            Peer::Process { uid, .. } => Some(format!("uid:{uid}")),
            Peer::Ip(_) => None,
        };
        let token = || self.who.token_id.clone().filter(|id| is_token_id(id));
        let stranger = || token().or(process).map(|id| Actor { id, name: None });
        self.who.grant.as_deref().map(Actor::from).or_else(stranger)
    }
}

/// Whether this may be the public part of a token: strangers send anything in its place.
fn is_token_id(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// An id for a request that came without one. It is drawn from this process's generator, without
/// a system call for each: an id is no secret.
fn drawn_id() -> String {
    uuid::Builder::from_random_bytes(rand::random()).into_uuid().to_string()
}

static NO_FIELDS: Fields = Fields(BTreeMap::new());

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const LONGEST_AGENT: usize = 200;

fn agent_text(agent: &[u8]) -> Option<String> {
    (!agent.is_empty()).then(|| String::from_utf8_lossy(agent).into_owned())
}

/// A request's action and its outcome.
#[derive(Debug, Clone, Copy)]
pub struct Act<'a> {
    /// The action, in a word.
    pub action: &'static str,
    /// The tenant; empty where none was named.
    pub tenant: &'a str,
    /// The secret; empty where none was named.
    pub key: &'a str,
    /// The outcome.
    pub outcome: Outcome,
    /// The tier that answered.
    pub tier: Option<&'static str>,
    /// The code of the error in the answer.
    pub code: Option<&'static str>,
}

/// A use of a connection that costs the server and brings the caller nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misuse {
    /// Streams that were reset before they were answered, many in a short time.
    RapidResets,
    /// An answer that was not read.
    UnreadAnswer,
}

impl Misuse {
    /// The code in records.
    const fn as_str(self) -> &'static str {
        match self {
            Self::RapidResets => "rapid_resets",
            Self::UnreadAnswer => "unread_answer",
        }
    }

    /// The misuse that a record with this code reports, if any.
    fn of(code: &str) -> Option<Self> {
        [Self::RapidResets, Self::UnreadAnswer].into_iter().find(|misuse| misuse.as_str() == code)
    }
}

/// A refusal that is being recorded: completes when it is on record, or when that takes longer
/// than anybody should wait.
pub struct Recording(Queued);

impl Future for Recording {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        // The refusal stands whether or not it could be recorded; the ledger tries again.
        Pin::new(&mut self.0).poll(context).map(drop)
    }
}

/// The account of an instance's requests.
pub struct Audit {
    ledger: Arc<Ledger>,
    terms: ArcSwap<Terms>,
    clock: Clock,
}

/// The settings that may change while requests are accounted for.
#[derive(Debug)]
struct Terms {
    denials_per_second: u32,
    /// Anybody can be denied, so the cost of that is limited.
    strangers_denials: Option<Arc<Rate>>,
    known_denials: Option<Arc<Rate>>,
    if_unavailable: IfUnavailable,
}

impl Terms {
    /// Rates of the settings before go on, where these are the same.
    fn build(config: &Config, clock: &Clock, before: Option<&Self>) -> Self {
        let denials_per_second = config.denials_per_second;
        let rate = || {
            NonZeroU32::new(denials_per_second).map(|rate| {
                let burst = NonZeroU32::new(rate.get().saturating_mul(10)).unwrap_or(rate);
                Arc::new(Rate::new(Quota::per_second(rate).allow_burst(burst), clock.running()))
            })
        };
        let (strangers_denials, known_denials) =
            match before.filter(|before| before.denials_per_second == denials_per_second) {
                Some(before) => (before.strangers_denials.clone(), before.known_denials.clone()),
                None => (rate(), rate()),
            };
        Self { denials_per_second, strangers_denials, known_denials, if_unavailable: config.if_unavailable }
    }
}

impl Audit {
    /// The audit, and its writer, which must run for as long as the audit is used.
    #[must_use]
    pub fn build(config: &Config, database: &Arc<Database>, clock: Clock, metrics: &Arc<Metrics>) -> (Self, Writer) {
        let recorded_by = crate::log::process_name();
        // An operation on the database ends within its timeout, and the next takes later records.
        let patience = database.timeout() * 2 + Duration::from_millis(500);
        let budget = Budget::new(config.strangers_per_day, clock.clone(), metrics);
        let ledger = Ledger::new(config.max_sums, config.queue, patience, budget, Arc::clone(metrics));
        let ledger = Arc::new(ledger);
        let signals = Signals::new(config.signals.clone(), clock.clone(), Arc::clone(metrics));
        let sinks = sinks::build(config, database, &recorded_by);
        let writer = Writer::new(Arc::clone(&ledger), sinks, signals, config.window);
        let terms = ArcSwap::from_pointee(Terms::build(config, &clock, None));
        (Self { ledger, terms, clock }, writer)
    }

    /// Applies changed `denials_per_second`, `strangers_per_day` and `if_unavailable`, from the
    /// next request on. Its other settings stay as they were built.
    pub fn change(&self, config: &Config) {
        self.ledger.budget.change(config.strangers_per_day);
        let before = self.terms.load();
        self.terms.store(Arc::new(Terms::build(config, &self.clock, Some(&before))));
    }

    /// Whether everything but health is to be refused for now.
    #[must_use]
    pub fn refuses_all(&self) -> bool {
        !self.ledger.is_up() && self.terms.load().if_unavailable == IfUnavailable::RefuseAll
    }

    /// Whether the last attempt to write records succeeded.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.ledger.is_up()
    }

    /// The numbers of records and sums that wait to be written.
    #[must_use]
    pub fn waiting(&self) -> (usize, usize) {
        (self.ledger.waiting(), self.ledger.sums())
    }

    /// Counts an access, or another outcome of a request.
    pub fn count(&self, account: &Account<'_>, act: Act<'_>, at: Timestamp) {
        let Act { action, tenant, key, outcome, tier, code } = act;
        let Who { peer, face, .. } = account.who;
        let origin = Some(Origin { peer, agent: account.agent(), fields: account.fields(), face });
        let kind = if is_denial(outcome) { Kind::Denial } else { Kind::Lookup };
        let (tenant, key, grant) = (clipped(tenant), clipped(key), account.who.grant.as_ref());
        self.ledger.count(Sight { kind, grant, action, tenant, key, outcome, tier, code, origin }, at);
    }

    /// Accounts for a refusal at once: it is in the queue, or counted, when this returns.
    ///
    /// Returns a future that completes when it is on record, where it is recorded by itself.
    /// Dropping the future loses nothing: the record stays in the queue.
    pub fn refused(&self, account: &Account<'_>, act: Act<'_>) -> Option<Recording> {
        if act.outcome == Outcome::Denied && self.takes_denial(account) {
            let denial = self.record(Kind::Denial, account, act).cut_short();
            let payer = Payer::of(account.who.peer, account.who.grant.as_ref());
            if self.ledger.budget.pay(Some(&payer), denial.cost()) {
                return self.ledger.queue(denial).ok().map(Recording);
            }
        }
        self.count(account, act, self.clock.now());
        None
    }

    /// Counts a use of a connection that costs the server and brings the caller
    /// nothing.
    pub fn misused(&self, peer: Peer, grant: Option<&Arc<Grant>>, what: Misuse) {
        let sight = Sight {
            kind: Kind::Denial,
            grant,
            action: "connection",
            tenant: "",
            key: "",
            outcome: Outcome::Invalid,
            tier: None,
            code: Some(what.as_str()),
            origin: Some(Origin { peer, agent: b"", fields: &NO_FIELDS, face: None }),
        };
        self.ledger.count(sight, self.clock.now());
    }

    /// Whether one more denial may be recorded by itself. Strangers have a rate of their own, so
    /// that they cannot keep the denials of known tokens from being recorded with names.
    fn takes_denial(&self, account: &Account<'_>) -> bool {
        let terms = self.terms.load();
        let rate = if account.who.grant.is_some() { &terms.known_denials } else { &terms.strangers_denials };
        rate.as_ref().is_none_or(|rate| rate.check(self.clock.running()).is_ok())
    }

    /// Queues the record of an access, to be written behind the answer.
    pub fn note(&self, kind: Kind, account: &Account<'_>, act: Act<'_>) {
        self.ledger.note(self.record(kind, account, act));
    }

    /// Records an access that must be on record before the answer.
    ///
    /// # Errors
    /// [`Unrecorded`] where that cannot be done, and the configuration says that nothing
    /// may be begun or answered then.
    pub async fn write(&self, kind: Kind, account: &Account<'_>, act: Act<'_>) -> Result<(), Unrecorded> {
        let written = self.ledger.write(self.record(kind, account, act)).await;
        if self.terms.load().if_unavailable == IfUnavailable::GoOn { Ok(()) } else { written }
    }

    /// Records a step of a rotation that was begun by `by`, as [`Self::write`] does.
    ///
    /// # Errors
    /// [`Unrecorded`].
    pub async fn write_of_rotation(&self, by: &str, act: Act<'_>) -> Result<(), Unrecorded> {
        let written = self.ledger.write(Record::of_rotation(by, act, self.clock.now())).await;
        if self.terms.load().if_unavailable == IfUnavailable::GoOn { Ok(()) } else { written }
    }

    fn record(&self, kind: Kind, account: &Account<'_>, act: Act<'_>) -> Record {
        let at = self.clock.now();
        // Names that strangers ask for are their own text, like everything that they send.
        let is_known = account.who.grant.is_some();
        let named = |name: &str| (is_known && !name.is_empty()).then(|| clipped(name).to_owned());
        Record {
            kind,
            first_at: at,
            at,
            count: 1,
            seen: 0,
            actor: account.actor(),
            grant: account.who.grant.clone(),
            action: act.action,
            tenant: named(act.tenant),
            key: named(act.key),
            outcome: act.outcome,
            tier: act.tier,
            detail: Detail {
                code: act.code,
                peer: Some(account.who.peer),
                face: account.who.face,
                agent: agent_text(account.agent()),
                request_id: Some(account.request_id().to_owned()),
                fields: account.fields().clone(),
                ..Detail::default()
            },
        }
    }
}

impl std::fmt::Debug for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Audit").field("up", &self.is_up()).finish_non_exhaustive()
    }
}

/// Whether the caller is told that it may not do this, or not so often.
fn is_denial(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Denied | Outcome::Limited)
}

/// Cuts a name short: callers' names may be anything, of any length.
fn clipped(name: &str) -> &str {
    const LONGEST: usize = 300;
    &name[..name.floor_char_boundary(LONGEST)]
}

/// An administrative command, on record: its options before it begins, and how it ended.
pub struct Administration {
    sink: Sink,
    record: Record,
    clock: Clock,
}

impl Administration {
    /// Records that a command is about to do something.
    ///
    /// # Errors
    /// It cannot be recorded, and must not be done.
    pub async fn begin(
        config: &Config,
        database: &Arc<Database>,
        action: &'static str,
        tenant: Option<&str>,
        options: BTreeMap<&'static str, String>,
    ) -> Result<Self, RecordError> {
        let clock = Clock::system();
        let recorded_by = crate::log::process_name();
        let mut sinks = sinks::build(config, database, &recorded_by);
        // Standard output is for the command's own output.
        sinks.retain(|sink| sink.as_str() != "stdout");
        let sink = match sinks.into_iter().next() {
            Some(sink) => sink,
            None => Sink::Database(DatabaseSink::new(Arc::clone(database), recorded_by)),
        };
        let uid = rustix::process::getuid().as_raw();
        let name = std::env::var("SUDO_USER").or_else(|_| std::env::var("USER")).ok();
        let name = name.map(|name| legible::line(&name).into_owned());
        let record = Record {
            kind: Kind::Admin,
            first_at: clock.now(),
            at: clock.now(),
            count: 1,
            seen: 0,
            actor: Some(Actor { id: format!("uid:{uid}"), name }),
            grant: None,
            action,
            tenant: tenant.map(str::to_owned),
            key: None,
            outcome: Outcome::Begun,
            tier: None,
            detail: Detail { options, ..Detail::default() },
        };
        let mut administration = Self { sink, record, clock };
        let begun = administration.append(Outcome::Begun).await;
        match (begun, config.if_unavailable) {
            (Err(error), IfUnavailable::RefuseAll | IfUnavailable::RefuseWrites) => Err(error),
            (Err(error), IfUnavailable::GoOn) => {
                tracing::warn!(error = log::chain(&error), "this command is not on record");
                Ok(administration)
            }
            (Ok(()), _) => Ok(administration),
        }
    }

    /// Records how it ended.
    ///
    /// # Errors
    /// It cannot be recorded. Its beginning is on record.
    pub async fn end(mut self, done: bool) -> Result<(), RecordError> {
        if let Sink::Database(sink) = &self.sink {
            sink.read_keys_of_a_rotation().await;
        }
        self.append(if done { Outcome::Done } else { Outcome::Failed }).await
    }

    async fn append(&mut self, outcome: Outcome) -> Result<(), RecordError> {
        let at = self.clock.now();
        let record = Record { outcome, at, first_at: at, ..self.record.clone() };
        self.sink.append(&[], &[record]).await.map_err(|failed| RecordError(log::chain(&failed.error)))
    }
}

/// The action of a command cannot be recorded.
#[derive(Debug, thiserror::Error)]
#[error("it cannot be recorded in the audit, so it was not done: {0}")]
pub struct RecordError(String);

/// Removes records that are older than their kind is kept. Returns whether there may be more.
///
/// # Errors
/// [`StoreError`].
pub async fn trim(database: &Database, retention: Retention, now: Timestamp) -> Result<bool, StoreError> {
    const AT_ONCE: i64 = 2000;
    let ring = database.keys().ring();
    let mut is_more = false;
    if ring.is_empty() {
        // Without a master key, the new beginning could not be signed.
        return Ok(false);
    }
    for kind in Kind::ALL {
        let age = i64::try_from(retention.of(kind).as_millis()).unwrap_or(i64::MAX);
        let before = now.as_millis().saturating_sub(age);
        let start = |chain: &AuditChain, oldest: &[AuditRow]| {
            let start = chain::removable(chain, oldest, before, Signer(&ring));
            if start.is_none() && oldest.len() as i64 == AT_ONCE && oldest.iter().all(|row| row.at < before) {
                tracing::error!(
                    chain = kind.as_str(),
                    "records of the audit whose time is over stay, for nobody with a master key that is at hand \
                     vouches for them; 'secretier audit verify' tells why"
                );
            }
            start
        };
        is_more |= database.trim_audit(kind.as_str(), AT_ONCE, start).await?;
    }
    Ok(is_more)
}

/// Signs the chains in the database as they are now, after an operator has examined what was
/// done to them.
///
/// # Errors
/// [`StoreError`].
pub async fn accept(database: &Arc<Database>, kinds: &[Kind]) -> Result<(), StoreError> {
    DatabaseSink::new(Arc::clone(database), crate::log::process_name()).accept(kinds).await
}

/// Verifies the chains in the database, while records may be added to them. `expected` are
/// the ends that earlier verifications found.
///
/// # Errors
/// [`StoreError`].
pub async fn verify(
    database: &Database,
    keys: &KeyRing,
    expected: &[(String, i64, [u8; 32])],
) -> Result<Vec<Walked>, StoreError> {
    verify_noting(database, keys, expected, &mut OnRecord::default()).await
}

/// The same, and notes in `on_record` what the rows must show.
async fn verify_noting(
    database: &Database,
    keys: &KeyRing,
    expected: &[(String, i64, [u8; 32])],
    on_record: &mut OnRecord,
) -> Result<Vec<Walked>, StoreError> {
    let chains = database.audit_chains().await?;
    let is_new = chains.iter().all(|chain| chain.vouched.is_none());
    let mut walked = Vec::new();
    for kind in Kind::ALL {
        let name = kind.as_str();
        let Some(chain) = chains.iter().find(|chain| chain.chain == name) else {
            let finding = Finding { chain: name.to_owned(), seq: 0, fault: Fault::End };
            walked.push(Walked { chain: name.to_owned(), records: 0, end: (0, [0; 32]), findings: vec![finding] });
            continue;
        };
        let expected = expected.iter().find(|(chain, ..)| chain == name).map(|(_, seq, hash)| (*seq, *hash));
        walked.push(walk(database, keys, (kind, chain.clone()), expected, is_new, on_record).await?);
    }
    Ok(walked)
}

/// Verifies the chains in the database and the rows that they report, while records are added
/// and keys are rotated. `expected` are the ends that earlier verifications found.
///
/// Anything that is signed, sealed or wrapped with a master key that is not held looks like a
/// forgery by somebody without one. A rotation brings a key into use that every running instance
/// holds by then; a verification that began before is no instance, and its keys may be older. So
/// where anything does not fit, the sources are read again, and where they have another key by now,
/// everything is checked once more: with keys that are read after the rows were.
///
/// # Errors
/// [`StoreError`].
pub async fn verify_everything(
    database: &Database,
    expected: &[(String, i64, [u8; 32])],
) -> Result<(Vec<Walked>, Rows), StoreError> {
    loop {
        let (keys, mut on_record) = (database.keys().ring(), OnRecord::default());
        let walked = verify_noting(database, &keys, expected, &mut on_record).await?;
        let rows = verify_rows(database, &on_record).await?;
        let fits = rows.findings.is_empty() && walked.iter().all(|chain| chain.findings.is_empty());
        if fits || !has_more(database, &keys).await {
            return Ok((walked, rows));
        }
    }
}

/// Whether the sources have a master key that is not among these.
async fn has_more(database: &Database, than: &KeyRing) -> bool {
    if let Err(error) = database.keys().reload().await {
        tracing::warn!(error = log::chain(&error), "the master keys could not be read again");
    }
    database.keys().ring().ids().any(|id| than.find(id).is_none())
}

async fn walk(
    database: &Database,
    keys: &KeyRing,
    (kind, mut chain): (Kind, AuditChain),
    expected: Option<(i64, [u8; 32])>,
    is_new: bool,
    on_record: &mut OnRecord,
) -> Result<Walked, StoreError> {
    const AT_ONCE: i64 = 1000;
    'walk: loop {
        let mut walk = chain::Walk::new(keys, &chain.start, &chain.chain);
        if let Some((seq, hash)) = expected {
            walk.expect(seq, hash, Fault::NotThatHistory);
        }
        if let Some(mark) = &chain.vouched {
            walk.expect(mark.seq, mark.hash, Fault::End);
        }
        loop {
            let rows = database.audit_records(&chain.chain, walk.seq(), AT_ONCE).await?;
            if rows.first().map_or(walk.seq() < chain.seq, |first| first.seq > walk.seq() + 1) {
                // Missing records may have been removed for their age meanwhile.
                let now = database.audit_chains().await?;
                let is_later = |now: &AuditChain| now.chain == chain.chain && now.start.seq > chain.start.seq;
                if let Some(now) = now.into_iter().find(is_later) {
                    chain = now;
                    continue 'walk;
                }
            }
            // Records that were added since the end was read are left to another verification.
            for row in rows.iter().filter(|row| row.seq <= chain.seq) {
                walk.step(row);
                on_record.note(kind, row);
            }
            if rows.last().is_none_or(|last| last.seq >= chain.seq) {
                break;
            }
        }
        let mut walked = walk.end(&chain, is_new);
        if let Some(seq) = beyond_the_end(database, &chain.chain).await? {
            walked.findings.push(Finding { chain: chain.chain.clone(), seq, fault: Fault::Beyond });
        }
        return Ok(walked);
    }
}

/// A record that follows the noted end, and is not just being added.
async fn beyond_the_end(database: &Database, chain: &str) -> Result<Option<i64>, StoreError> {
    let end = async || {
        let chains = database.audit_chains().await?;
        Ok::<_, StoreError>(chains.into_iter().find(|found| found.chain == chain).map_or(0, |found| found.seq))
    };
    let follows = database.audit_records(chain, end().await?, 1).await?;
    let Some(first) = follows.first() else { return Ok(None) };
    // A record and the end that covers it are written in one transaction.
    Ok((first.seq > end().await?).then_some(first.seq))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_recorded_in_part_whatever_it_is_made_of() {
        for long in ["a".repeat(20_000), "é".repeat(20_000), format!("a{}", "é".repeat(20_000))] {
            assert!((299..=300).contains(&clipped(&long).len()));
        }
    }
}
