//! Shadow reads: for a while after a migration has made the database a tenant's owner, a
//! sample of its lookups is compared, behind the answers, with what upstream still has.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use metrics::Counter;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::Resolver;
use crate::{
    clock::{Clock, Moment, Timestamp},
    log::Seldom,
    metrics::Metrics,
    phase::Phase,
    sealing::{Digester, Digests},
    secret::{SecretKey, SecretName},
    tenant::Tenant,
    tiers::{
        database::{Compared, Held, Source, StoreError},
        memory::Entry,
        upstream::{Fetched, Lane, UpstreamError},
    },
    units,
};

/// `[migration]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How long after a tenant was switched its lookups are compared; zero is never.
    #[serde(with = "units::duration")]
    pub shadow_for: Duration,
    /// The share of its lookups that is compared, from 0 to 1.
    pub shadow_sample: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { shadow_for: Duration::from_secs(24 * 60 * 60), shadow_sample: 0.01 }
    }
}

impl Config {
    /// The first fault in these settings, with the name of the setting.
    #[must_use]
    pub fn fault(&self) -> Option<&'static str> {
        let is_share = (0.0..=1.0).contains(&self.shadow_sample);
        (!is_share).then_some("shadow_sample: a share of lookups is from 0 to 1, as in 0.01")
    }
}

/// The most answers that wait to be compared.
const WAITING: usize = 1024;

/// How long one read of a folder serves further comparisons.
const FOLDER_SERVES: Duration = Duration::from_secs(10);

/// The most folders that are kept. The budget allows far fewer reads in that time.
const FOLDERS_KEPT: usize = 256;

/// How often the counts are added to the database.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// The lookups' side: decides whether answers are compared, and hands them over.
pub struct Shadow {
    /// Whether any tenant may have been switched lately: a lookup's only check where none was.
    any: AtomicBool,
    /// When a migration last made progress by the database's clock, in milliseconds since 1970.
    last_run: AtomicI64,
    lasts: Duration,
    share: f64,
    clock: Clock,
    queue: mpsc::Sender<Given>,
    dropped: Counter,
}

/// The answers that lookups have handed over to be compared.
pub struct Queue(mpsc::Receiver<Given>);

/// An answer as a caller got it.
struct Given {
    tenant: Tenant,
    key: SecretKey,
    entry: Arc<Entry>,
}

impl Shadow {
    /// Compares nothing until a tenant is switched.
    #[must_use]
    pub fn build(config: &Config, clock: Clock, metrics: &Metrics) -> (Self, Queue) {
        let (queue, given) = mpsc::channel(WAITING);
        let shadow = Self {
            any: AtomicBool::new(false),
            last_run: AtomicI64::new(i64::MIN),
            lasts: config.shadow_for,
            share: config.shadow_sample,
            clock,
            queue,
            dropped: Outcome::Dropped.counter(metrics),
        };
        (shadow, Queue(given))
    }

    /// Hands an answer over to be compared, if the sample includes it. Never waits. Costs one
    /// load where no tenant was switched lately; after a switch, lookups of other tenants also draw
    /// a random number. Whether this tenant was switched is checked behind the answer.
    #[inline]
    pub(super) fn offer(&self, name: SecretName<'_>, entry: &Arc<Entry>) {
        // Relaxed is enough: a lookup that sees a change a moment late is one comparison more or
        // fewer.
        if self.any.load(Ordering::Relaxed) && rand::random::<f64>() < self.share {
            self.hand_over(name, entry);
        }
    }

    fn hand_over(&self, name: SecretName<'_>, entry: &Arc<Entry>) {
        if self.is_over() {
            return;
        }
        let (tenant, key) = name.to_owned();
        let given = Given { tenant, key, entry: Arc::clone(entry) };
        if self.queue.try_send(given).is_err() {
            self.dropped.increment(1);
        }
    }

    /// Tenants that were switched at this time or later are compared; `None` where none ever is.
    pub(super) fn since(&self) -> Option<Timestamp> {
        let lasts = i64::try_from(self.lasts.as_millis()).unwrap_or(i64::MAX);
        let is_on = lasts > 0 && self.share > 0.0;
        is_on.then(|| Timestamp::from_millis(self.clock.database_now().as_millis().saturating_sub(lasts)))
    }

    /// Compares lookups from now on, after a migration that last made progress at `last_run` and
    /// may have switched tenants lately.
    pub(super) fn watch(&self, last_run: Option<Timestamp>) {
        self.last_run.store(last_run.map_or(i64::MIN, Timestamp::as_millis), Ordering::Relaxed);
        self.any.store(!self.is_over(), Ordering::Relaxed);
    }

    /// Stops comparing lookups once the time of all tenants is over.
    fn expire(&self) {
        if self.is_over() {
            self.any.store(false, Ordering::Relaxed);
        }
    }

    fn is_over(&self) -> bool {
        let last_run = self.last_run.load(Ordering::Relaxed);
        self.since().is_none_or(|since| last_run <= since.as_millis())
    }
}

impl fmt::Debug for Shadow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shadow")
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Queue")
    }
}

/// The outcome for an answer in the sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Upstream has the same.
    Equal,
    /// Upstream has something else, and nothing in the database explains it.
    Different,
    /// The database has been written to since the switch, and upstream has not.
    Ahead,
    /// The secret, or its owner, has changed since the answer was given.
    Superseded,
    /// Upstream refuses us the folder.
    Denied,
    /// Upstream has no such folder.
    Missing,
    /// Upstream or the database failed.
    Failed,
    /// The queue was full, or the budget was used up.
    Dropped,
}

impl Outcome {
    const ALL: [Self; 8] = [
        Self::Equal,
        Self::Different,
        Self::Ahead,
        Self::Superseded,
        Self::Denied,
        Self::Missing,
        Self::Failed,
        Self::Dropped,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Different => "different",
            Self::Ahead => "ahead",
            Self::Superseded => "superseded",
            Self::Denied => "denied",
            Self::Missing => "missing",
            Self::Failed => "failed",
            Self::Dropped => "dropped",
        }
    }

    fn counter(self, metrics: &Metrics) -> Counter {
        metrics.counter("secretier_shadow_reads_total", &[("outcome", self.as_str())])
    }
}

impl From<UpstreamError> for Outcome {
    fn from(error: UpstreamError) -> Self {
        match error {
            UpstreamError::Denied => Self::Denied,
            UpstreamError::OutOfBudget { .. } => Self::Dropped,
            UpstreamError::LoginRefused { .. }
            | UpstreamError::RateLimited { .. }
            | UpstreamError::Down { .. }
            | UpstreamError::TimedOut
            | UpstreamError::Unreachable { .. }
            | UpstreamError::Foreign { .. }
            | UpstreamError::Failed(_)
            | UpstreamError::Malformed(_)
            | UpstreamError::Incomplete
            | UpstreamError::Rejected { .. }
            | UpstreamError::Unstorable(_)
            | UpstreamError::AwaitsApproval => Self::Failed,
        }
    }
}

/// The side behind the answers: compares one after the other, and counts.
///
/// Upstream's values are dropped as soon as their digests are made. The digests serve the
/// tenant's next comparisons for ten seconds. A failure serves them as well, so that a refused
/// folder, or an outage, costs no more calls than a folder that is read.
pub struct Comparer {
    resolver: Arc<Resolver>,
    given: mpsc::Receiver<Given>,
    /// By tenant and switch: a read from before a switch says nothing about the time after it.
    folders: HashMap<(Tenant, Timestamp), Reading>,
    /// Counts that the database has not been told yet: one entry a switch.
    untold: BTreeMap<(Tenant, Timestamp), Compared>,
    counters: Vec<(Outcome, Counter)>,
    differences: Seldom,
}

/// The outcome of reading a folder.
struct Reading {
    began: Moment,
    folder: Result<Folder, Outcome>,
}

/// A folder's secrets, as digests.
struct Folder {
    digester: Digester,
    digests: Digests,
}

impl Comparer {
    /// Compares the answers that this resolver's lookups hand over.
    #[must_use]
    pub fn new(resolver: Arc<Resolver>, queue: Queue) -> Self {
        let counters = Outcome::ALL.map(|outcome| (outcome, outcome.counter(&resolver.metrics)));
        Self {
            resolver,
            given: queue.0,
            folders: HashMap::new(),
            untold: BTreeMap::new(),
            counters: counters.into(),
            differences: Seldom::default(),
        }
    }

    /// Runs until `stopped` completes; then adds the last counts to the database.
    pub async fn until(mut self, stopped: impl Future<Output = ()>) {
        let mut turns = tokio::time::interval(TELL_EVERY);
        turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut stopped = std::pin::pin!(stopped);
        loop {
            let given = tokio::select! {
                () = &mut stopped => break,
                _ = turns.tick() => None,
                given = self.given.recv() => given,
            };
            let Some(given) = given else {
                self.tidy();
                self.tell().await;
                continue;
            };
            let compared = tokio::select! {
                () = &mut stopped => break,
                compared = self.compare(&given) => compared,
            };
            if let Some((switched_at, outcome)) = compared {
                self.count(given, switched_at, outcome);
            }
        }
        self.tell().await;
    }

    /// The outcome, and the switch since which the database answers for the tenant; `None`
    /// where there was no switch, or none lately.
    async fn compare(&mut self, given: &Given) -> Option<(Timestamp, Outcome)> {
        if self.resolver.own_phase(&given.tenant) != Some(Phase::Database) {
            return None;
        }
        let since = self.resolver.shadow.since()?;
        let switched_at = match self.resolver.database.switched_since(&given.tenant, since).await {
            Ok(switched_at) => switched_at?,
            // A failure is not noted in the database, so it does not matter which switch it was.
            Err(_) => return Some((since, Outcome::Failed)),
        };
        let outcome = match self.folder(given, switched_at).await.map(|folder| folder.agrees_with(given)) {
            Ok(true) => Outcome::Equal,
            Ok(false) => self.judge(given).await,
            Err(outcome) => outcome,
        };
        Some((switched_at, outcome))
    }

    /// Decides what a difference means, by the secret's row.
    async fn judge(&self, given: &Given) -> Outcome {
        let Ok(found) = self.resolver.database.find(&given.tenant, &given.key).await else { return Outcome::Failed };
        if found.company.and_then(|company| company.phase) != Some(Phase::Database) {
            return Outcome::Superseded;
        }
        match (&given.entry.answer, found.copy) {
            (Some(answer), Held::Present(stored)) if !answer.etag_is(&format!("\"{}\"", stored.etag)) => {
                Outcome::Superseded
            }
            (Some(_), Held::Present(stored)) => match stored.source {
                Source::Database => Outcome::Ahead,
                Source::Infisical => Outcome::Different,
            },
            (None, Held::Absent) => Outcome::Different,
            // The row says that it was deleted in the database.
            (None, Held::Unknown) => Outcome::Ahead,
            (None, Held::Present(_)) | (Some(_), Held::Absent | Held::Unknown) => Outcome::Superseded,
            (_, Held::Unreadable(_) | Held::Unusable(_)) => Outcome::Failed,
        }
    }

    /// The tenant's folder, read now or in the last few seconds.
    async fn folder(&mut self, given: &Given, switched_at: Timestamp) -> Result<&Folder, Outcome> {
        let (place, now) = ((given.tenant.clone(), switched_at), self.resolver.clock.moment());
        let serves = |reading: &Reading| now.since(reading.began) < FOLDER_SERVES;
        if !self.folders.get(&place).is_some_and(serves) {
            let reading = Reading { began: now, folder: self.read(&given.tenant).await };
            if self.folders.len() >= FOLDERS_KEPT {
                self.folders.clear();
            }
            self.folders.insert(place.clone(), reading);
        }
        match self.folders.get(&place).map(|reading| &reading.folder) {
            Some(Ok(folder)) => Ok(folder),
            Some(Err(outcome)) => Err(*outcome),
            None => Err(Outcome::Failed),
        }
    }

    async fn read(&self, tenant: &Tenant) -> Result<Folder, Outcome> {
        let upstream = self.resolver.upstream.as_deref().ok_or(Outcome::Failed)?;
        let Fetched::Changed(snapshot) = upstream.snapshot(tenant, None, Lane::Migration).await? else {
            return Err(Outcome::Failed);
        };
        // An empty folder may be a missing one: only a list that is read afterwards tells.
        if snapshot.secrets.is_empty() && !upstream.tenants(Lane::Migration).await?.tenants.contains(tenant) {
            return Err(Outcome::Missing);
        }
        let digester = Digester::new(&self.resolver.database.keys().ring()).ok_or(Outcome::Failed)?;
        let digest = |key: &SecretKey, value| (key.clone(), digester.of(tenant, key, value));
        let digests = snapshot.secrets.iter().map(|secret| digest(&secret.key, &secret.value)).collect();
        Ok(Folder { digester, digests })
    }

    fn count(&mut self, given: Given, switched_at: Timestamp, outcome: Outcome) {
        if let Some((_, counter)) = self.counters.iter().find(|(of, _)| *of == outcome) {
            counter.increment(1);
        }
        let Given { tenant, key, .. } = given;
        match outcome {
            Outcome::Equal | Outcome::Ahead => {
                self.untold.entry((tenant, switched_at)).or_default().compared += 1;
            }
            Outcome::Different => {
                if let Some(others) = self.differences.may_say() {
                    tracing::warn!(%tenant, %key, others, "the database answered otherwise than the upstream would have");
                }
                let untold = self.untold.entry((tenant, switched_at)).or_default();
                untold.compared += 1;
                untold.different += 1;
                untold.different_at = Some(self.resolver.clock.now());
            }
            Outcome::Superseded | Outcome::Denied | Outcome::Missing | Outcome::Failed | Outcome::Dropped => {}
        }
    }

    /// Forgets everything that is past its time.
    fn tidy(&mut self) {
        let now = self.resolver.clock.moment();
        self.folders.retain(|_, reading| now.since(reading.began) < FOLDER_SERVES);
        self.resolver.shadow.expire();
    }

    /// Adds the counts to the database. Counts that it does not accept are kept for the next time;
    /// a call that ended without an answer may then be added twice.
    async fn tell(&mut self) {
        let mut untold = std::mem::take(&mut self.untold).into_iter();
        while let Some(((tenant, switched_at), compared)) = untold.next() {
            if let Err(error) = self.resolver.database.add_compared(&tenant, switched_at, compared).await {
                tracing::debug!(%tenant, %error, "what was compared could not be noted; trying again");
                self.untold.insert((tenant, switched_at), compared);
                // The other counts would only wait for the same outage.
                if matches!(error, StoreError::Unavailable { .. }) {
                    self.untold.extend(untold);
                    return;
                }
            }
        }
    }
}

impl fmt::Debug for Comparer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Comparer")
    }
}

impl Folder {
    fn agrees_with(&self, given: &Given) -> bool {
        let answer = given.entry.answer.as_ref();
        let digest = answer.map(|answer| self.digester.of(&given.tenant, &given.key, &answer.value()));
        self.digests.get(&given.key) == digest.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Ages;

    const AGES: Ages = Ages {
        ttl: Duration::from_secs(300),
        negative_ttl: Duration::from_secs(30),
        refresh_after: Duration::from_secs(900),
        memory_max_stale: Duration::from_secs(3600),
        database_max_stale: Duration::from_secs(3600),
    };

    /// Offers an absence of each of these tenants this often; returns how many were taken
    /// and how many were not.
    fn offered(shadow: &Shadow, queue: &mut Queue, metrics: &Metrics, tenants: &[&str], times: usize) -> (usize, u64) {
        let now = shadow.clock.confirmed_now();
        let entry = Arc::new(Entry::new(None, now, now, AGES));
        for _ in 0..times {
            for tenant in tenants {
                shadow.offer(SecretName::parse(tenant, "K").unwrap(), &entry);
            }
        }
        let taken = std::iter::from_fn(|| queue.0.try_recv().ok()).count();
        let page = metrics.render();
        let dropped =
            page.lines().find_map(|line| line.strip_prefix("secretier_shadow_reads_total{outcome=\"dropped\"} "));
        (taken, dropped.map_or(0, |number| number.parse().unwrap()))
    }

    fn shadow(lasts: Duration, share: f64) -> (Shadow, Queue, Arc<Metrics>) {
        let metrics = Metrics::new();
        let config = Config { shadow_for: lasts, shadow_sample: share };
        let (shadow, queue) = Shadow::build(&config, Clock::system(), &metrics);
        shadow.watch(Some(shadow.clock.database_now()));
        (shadow, queue, metrics)
    }

    #[test]
    fn only_the_share_of_lookups_is_taken_for_as_long_as_it_is_to_last() {
        let hour = Duration::from_secs(3600);
        let (shadow, mut queue, metrics) = shadow(hour, 0.1);
        let (taken, dropped) = offered(&shadow, &mut queue, &metrics, &["acme"], 2000);
        assert!((100..=300).contains(&taken) && dropped == 0, "{taken} and {dropped}");
        shadow.clock.advance(hour);
        assert_eq!(offered(&shadow, &mut queue, &metrics, &["acme"], 2000), (0, 0));
        assert!(shadow.any.load(Ordering::Relaxed));
        shadow.expire();
        assert!(!shadow.any.load(Ordering::Relaxed), "a lookup costs what it did before");
    }

    #[test]
    fn what_finds_no_room_is_dropped_and_counted() {
        let (shadow, mut queue, metrics) = shadow(Duration::from_secs(3600), 1.0);
        assert_eq!(offered(&shadow, &mut queue, &metrics, &["acme"], WAITING + 7), (WAITING, 7));
    }

    #[test]
    fn without_time_or_share_no_tenant_is_asked_for() {
        let (on, off) = (Duration::from_secs(1), Duration::ZERO);
        assert!(shadow(on, 0.5).0.since().is_some());
        assert!(shadow(off, 0.5).0.since().is_none());
        assert!(shadow(on, 0.0).0.since().is_none());
    }

    #[test]
    fn a_share_that_is_none_is_a_fault() {
        let fault = |shadow_sample| Config { shadow_sample, ..Config::default() }.fault();
        assert!([0.0, 0.01, 1.0].into_iter().all(|share| fault(share).is_none()));
        assert!([-0.1, 1.1, f64::NAN, f64::INFINITY].into_iter().all(|share| fault(share).is_some()));
    }
}
