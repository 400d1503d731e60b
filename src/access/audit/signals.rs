//! Detects signs of an attack in the records, and reports them in the log and in the metrics,
//! while the attack goes on. None of this is on the path of a request.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    Misuse,
    record::{Kind, Outcome, Record},
};
use crate::{access::peer::PeerId, clock::Clock, metrics::Metrics, units};

/// `[audit.signals]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The period that is looked back on.
    #[serde(with = "units::duration")]
    pub window: Duration,
    /// Denials of one token, or from one peer without one.
    pub denials: u32,
    /// Requests of one token, or from one peer without one, that nobody could answer.
    pub malformed: u32,
    /// Tenants whose secrets one token asks for.
    pub tenants: u32,
    /// Secrets that one token asks for and that do not exist.
    pub absent: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { window: Duration::from_secs(600), denials: 30, malformed: 100, tenants: 1000, absent: 100 }
    }
}

/// Counts per source. Bounded in sources, and for each source no more names than its limit.
pub(super) struct Signals {
    config: Config,
    clock: Clock,
    metrics: Arc<Metrics>,
    sources: HashMap<String, Source>,
    hasher: RandomState,
}

/// The most sources that are watched together; those that began longest ago make room.
const SOURCES: usize = 10_000;

#[derive(Debug)]
struct Source {
    /// By the running clock: no step of the wall clock ends its window or extends it.
    since: Duration,
    denials: u64,
    malformed: u64,
    /// The signals that were reported in this window, of those that are reported once.
    told: HashSet<Signal>,
    tenants: HashSet<u64>,
    absent: HashSet<u64>,
}

/// A sign of an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Signal {
    DeniedBurst,
    ExpiredToken,
    ManyTenants,
    Enumeration,
    MalformedFlood,
    RapidResets,
    UnreadAnswers,
}

impl Signal {
    const fn as_str(self) -> &'static str {
        match self {
            Self::DeniedBurst => "denied_burst",
            Self::ExpiredToken => "expired_token",
            Self::ManyTenants => "many_tenants",
            Self::Enumeration => "enumeration",
            Self::MalformedFlood => "malformed_flood",
            Self::RapidResets => "rapid_resets",
            Self::UnreadAnswers => "unread_answers",
        }
    }

    const fn meaning(self) -> &'static str {
        match self {
            Self::DeniedBurst => "this caller is denied again and again",
            Self::ExpiredToken => "a token is used that has expired",
            Self::ManyTenants => "this token asks for the secrets of unusually many tenants",
            Self::Enumeration => "this token asks for many secrets that do not exist",
            Self::MalformedFlood => "this caller sends many requests that cannot be answered",
            Self::RapidResets => "this caller takes back many requests as soon as it has sent them",
            Self::UnreadAnswers => "this caller does not read the answers that it asked for",
        }
    }
}

impl Signals {
    pub(super) fn new(config: Config, clock: Clock, metrics: Arc<Metrics>) -> Self {
        Self { config, clock, metrics, sources: HashMap::new(), hasher: RandomState::new() }
    }

    /// Examines new records.
    pub(super) fn observe(&mut self, records: &[Record]) {
        let now = self.clock.running();
        records.iter().for_each(|record| self.look(record, now));
    }

    fn look(&mut self, record: &Record, now: Duration) {
        let Record { kind, actor, detail, outcome, .. } = record;
        // A sum of refusals is shown before it is written, and again when it is.
        let count = record.count.saturating_sub(record.seen);
        if *kind == Kind::Admin || count == 0 {
            return;
        }
        // The id of a token that was not accepted is the caller's own text.
        let known = actor.as_ref().filter(|actor| actor.name.is_some());
        let id = actor.as_ref().map(|actor| actor.id.as_str());
        let peer = detail.peer.map(|peer| peer.to_string());
        let host = detail.peer.map(|peer| PeerId::from(peer).to_string());
        let Some(name) = known.and(id).or(host.as_deref()).or(id) else { return };
        let shown = actor.as_ref().and_then(|actor| actor.name.as_deref()).unwrap_or(name).to_owned();
        let (tenant, secret) = (
            record.tenant.as_ref().map(|tenant| self.hasher.hash_one(tenant)),
            self.hasher.hash_one((&record.tenant, &record.key)),
        );
        let Config { window, denials, malformed, tenants, absent } = self.config.clone();
        let source = self.source(name, now);
        let mut told = Vec::new();
        match outcome {
            Outcome::Denied | Outcome::Limited => {
                if rises_to(&mut source.denials, count, denials) {
                    told.push((Signal::DeniedBurst, source.denials));
                }
                if detail.code == Some("token_expired") && source.told.insert(Signal::ExpiredToken) {
                    told.push((Signal::ExpiredToken, count));
                }
            }
            Outcome::Invalid => match detail.code.and_then(Misuse::of) {
                Some(misuse) => {
                    let signal = match misuse {
                        Misuse::RapidResets => Signal::RapidResets,
                        Misuse::UnreadAnswer => Signal::UnreadAnswers,
                    };
                    if source.told.insert(signal) {
                        told.push((signal, count));
                    }
                }
                None if rises_to(&mut source.malformed, count, malformed) => {
                    told.push((Signal::MalformedFlood, source.malformed));
                }
                None => {}
            },
            Outcome::Found | Outcome::Absent | Outcome::Begun | Outcome::Done | Outcome::Conflict => {
                if actor.is_some()
                    && let Some(tenant) = tenant
                    && grows_to(&mut source.tenants, tenant, tenants)
                {
                    told.push((Signal::ManyTenants, u64::from(tenants)));
                }
                if *outcome == Outcome::Absent && grows_to(&mut source.absent, secret, absent) {
                    told.push((Signal::Enumeration, u64::from(absent)));
                }
            }
            Outcome::Failed => {}
        }
        for (signal, count) in told {
            self.metrics.count("secretier_signals_total", &[("signal", signal.as_str())]);
            let window = humantime::format_duration(window).to_string();
            let (signal, meaning) = (signal.as_str(), signal.meaning());
            tracing::warn!(signal, actor = shown, peer, count, window, "{meaning}");
        }
    }

    /// A source's counts in its window.
    fn source(&mut self, name: &str, now: Duration) -> &mut Source {
        if !self.sources.contains_key(name) && self.sources.len() >= SOURCES {
            self.forget_the_older_half();
        }
        let source = self.sources.entry(name.to_owned()).or_insert_with(|| Source::since(now));
        if now.saturating_sub(source.since) > self.config.window {
            *source = Source::since(now);
        }
        source
    }

    /// Makes room for many at once: to find the oldest for each new source would cost more
    /// than it is worth.
    fn forget_the_older_half(&mut self) {
        let mut since: Vec<Duration> = self.sources.values().map(|source| source.since).collect();
        let half = since.len() / 2;
        let (_, middle, _) = since.select_nth_unstable(half);
        let mut to_forget = half;
        let middle = *middle;
        self.sources.retain(|_, source| {
            // Of many that began at the same moment, only as many are forgotten as make the half.
            let is_forgotten = source.since <= middle && to_forget > 0;
            to_forget -= usize::from(is_forgotten);
            !is_forgotten
        });
    }
}

impl Source {
    fn since(now: Duration) -> Self {
        Self {
            since: now,
            denials: 0,
            malformed: 0,
            told: HashSet::new(),
            tenants: HashSet::new(),
            absent: HashSet::new(),
        }
    }
}

/// Whether a number has just reached or passed its limit. 0 means no limit.
fn rises_to(number: &mut u64, more: u64, limit: u32) -> bool {
    let before = *number;
    *number += more;
    limit > 0 && before < u64::from(limit) && *number >= u64::from(limit)
}

/// Whether a set has just reached its limit; it does not grow further.
fn grows_to(set: &mut HashSet<u64>, name: u64, limit: u32) -> bool {
    set.len() < limit as usize && set.insert(name) && set.len() == limit as usize
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::access::Peer;

    const LIMIT: u8 = 30;

    fn record(outcome: Outcome, code: &'static str, address: IpAddr) -> Record {
        let mut record = Record { actor: None, ..Record::example(Kind::Denial, "K", outcome) };
        (record.detail.peer, record.detail.code) = (Some(Peer::Ip(address)), Some(code));
        record
    }

    fn signals() -> (Signals, Arc<Metrics>, Clock) {
        let (clock, metrics) = (Clock::system(), Metrics::new());
        let config = Config { denials: LIMIT.into(), malformed: LIMIT.into(), ..Config::default() };
        (Signals::new(config, clock.clone(), Arc::clone(&metrics)), metrics, clock)
    }

    fn times(metrics: &Metrics, signal: &str) -> u32 {
        let line = format!("secretier_signals_total{{signal=\"{signal}\"}} ");
        let page = metrics.render();
        page.lines().find_map(|found| found.strip_prefix(&line)).unwrap().parse().unwrap()
    }

    fn is_told(addresses: impl Iterator<Item = IpAddr>, outcome: Outcome, signal: &str) -> bool {
        let (mut signals, metrics, _) = signals();
        let records: Vec<Record> = addresses.map(|address| record(outcome, "some", address)).collect();
        signals.observe(&records);
        times(&metrics, signal) == 1
    }

    #[test]
    fn who_can_have_many_addresses_is_one_all_the_same() {
        for (outcome, signal) in [(Outcome::Denied, "denied_burst"), (Outcome::Invalid, "malformed_flood")] {
            let is_told = |address: &dyn Fn(u8) -> IpAddr| is_told((0..LIMIT).map(address), outcome, signal);
            assert!(is_told(&|n| IpAddr::from([127, n, 0, 1])), "this machine");
            assert!(is_told(&|n| IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, n.into()])), "an IPv6 host");
            assert!(!is_told(&|n| IpAddr::from([192, 0, 2, n])), "others");
        }
    }

    #[test]
    fn a_misused_connection_is_told_once_a_window_and_is_no_malformed_request() {
        let (mut signals, metrics, clock) = signals();
        for (code, signal) in [("rapid_resets", "rapid_resets"), ("unread_answer", "unread_answers")] {
            assert_eq!(times(&metrics, signal), 0, "shown from the start");
            let mut misused = record(Outcome::Invalid, code, IpAddr::from([192, 0, 2, 1]));
            misused.count = 1000;
            signals.observe(&[misused.clone(), misused.clone()]);
            assert_eq!(times(&metrics, signal), 1);
            clock.advance(Config::default().window + Duration::from_secs(1));
            signals.observe(&[misused]);
            assert_eq!(times(&metrics, signal), 2);
        }
        assert_eq!(times(&metrics, "malformed_flood"), 0);
    }

    #[test]
    fn what_was_shown_before_it_was_written_is_counted_once() {
        let (mut signals, metrics, _) = signals();
        let mut sum = record(Outcome::Invalid, "some", IpAddr::from([192, 0, 2, 1]));
        sum.count = u64::from(LIMIT) - 1;
        signals.observe(std::slice::from_ref(&sum));
        sum.seen = sum.count;
        signals.observe(std::slice::from_ref(&sum));
        assert_eq!(times(&metrics, "malformed_flood"), 0);
        sum.count += 1;
        signals.observe(&[sum]);
        assert_eq!(times(&metrics, "malformed_flood"), 1);
    }

    #[test]
    fn however_many_sources_there_are_so_many_are_looked_at() {
        let (mut signals, _, clock) = signals();
        let limit = u32::try_from(SOURCES).unwrap();
        for number in 0..3 * limit {
            clock.advance(Duration::from_micros(u64::from(number % 2) * 1000));
            signals.observe(&[record(Outcome::Denied, "some", IpAddr::from(number.to_be_bytes()))]);
            assert!(signals.sources.len() <= SOURCES);
        }
        let last = IpAddr::from((3 * limit - 1).to_be_bytes()).to_string();
        assert!(signals.sources.contains_key(&last), "who came last is known");
    }
}
