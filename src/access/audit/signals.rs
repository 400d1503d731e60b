//! What an attack looks like in the records: told in the log and in the metrics, while it
//! goes on. Nothing of it is on the path of a request.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::record::{Kind, Outcome, Record};
use crate::{access::peer::PeerId, clock::Clock, metrics::Metrics, units};

/// `[audit.signals]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How long is looked back.
    #[serde(with = "units::duration")]
    pub window: Duration,
    /// Denials of one token, or from one peer without one.
    pub denials: u32,
    /// Tenants whose secrets one token asks for.
    pub tenants: u32,
    /// Secrets that one token asks for and that do not exist.
    pub absent: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { window: Duration::from_secs(600), denials: 30, tenants: 1000, absent: 100 }
    }
}

/// Counts per source. Bounded: so many sources, and of each no more names than its limit.
pub(super) struct Signals {
    config: Config,
    clock: Clock,
    metrics: Arc<Metrics>,
    sources: HashMap<String, Source>,
    hasher: RandomState,
}

/// Sources that are looked at together at most; the one that began longest ago makes room.
const SOURCES: usize = 10_000;

#[derive(Debug)]
struct Source {
    /// By the running clock: no step of the wall clock ends its window, or draws it out.
    since: Duration,
    denials: u64,
    expired: bool,
    tenants: HashSet<u64>,
    absent: HashSet<u64>,
}

impl Signals {
    pub(super) fn new(config: Config, clock: Clock, metrics: Arc<Metrics>) -> Self {
        for signal in ["denied_burst", "many_tenants", "enumeration", "expired_token"] {
            // Shown from the start, so that an alert finds a series to watch.
            metrics.counter("secretier_signals_total", &[("signal", signal)]).increment(0);
        }
        Self { config, clock, metrics, sources: HashMap::new(), hasher: RandomState::new() }
    }

    /// Looks at what was recorded.
    pub(super) fn observe(&mut self, records: &[Record]) {
        let now = self.clock.running();
        records.iter().for_each(|record| self.look(record, now));
    }

    fn look(&mut self, record: &Record, now: Duration) {
        let Record { kind, count, actor, detail, outcome, .. } = record;
        if *kind == Kind::Admin {
            return;
        }
        // The id of a token that let nobody in is what the caller made of it.
        let known = actor.as_ref().filter(|actor| actor.name.is_some());
        let id = actor.as_ref().map(|actor| actor.id.as_str());
        let peer = detail.peer.map(|peer| peer.to_string());
        let source = detail.peer.map(|peer| PeerId::from(peer).to_string());
        let Some(name) = known.and(id).or(source.as_deref()).or(id) else { return };
        let shown = actor.as_ref().and_then(|actor| actor.name.as_deref()).unwrap_or(name).to_owned();
        let (tenant, secret) = (
            record.tenant.as_ref().map(|tenant| self.hasher.hash_one(tenant)),
            self.hasher.hash_one((&record.tenant, &record.key)),
        );
        let Config { window, denials, tenants, absent } = self.config.clone();
        if !self.sources.contains_key(name) && self.sources.len() >= SOURCES {
            let oldest = self.sources.iter().min_by_key(|(_, source)| source.since).map(|(name, _)| name.clone());
            oldest.and_then(|oldest| self.sources.remove(&oldest));
        }
        let source = self.sources.entry(name.to_owned()).or_insert_with(|| Source::since(now));
        if now.saturating_sub(source.since) > window {
            *source = Source::since(now);
        }
        let mut told = Vec::new();
        match outcome {
            Outcome::Denied | Outcome::Limited => {
                let before = source.denials;
                source.denials += count;
                if denials > 0 && before < u64::from(denials) && source.denials >= u64::from(denials) {
                    told.push(("denied_burst", source.denials));
                }
                if detail.code == Some("token_expired") && !std::mem::replace(&mut source.expired, true) {
                    told.push(("expired_token", *count));
                }
            }
            Outcome::Found | Outcome::Absent | Outcome::Begun | Outcome::Done | Outcome::Conflict => {
                if actor.is_some()
                    && let Some(tenant) = tenant
                    && grows_to(&mut source.tenants, tenant, tenants)
                {
                    told.push(("many_tenants", u64::from(tenants)));
                }
                if *outcome == Outcome::Absent && grows_to(&mut source.absent, secret, absent) {
                    told.push(("enumeration", u64::from(absent)));
                }
            }
            Outcome::Invalid | Outcome::Failed => {}
        }
        for (signal, count) in told {
            self.metrics.count("secretier_signals_total", &[("signal", signal)]);
            let window = humantime::format_duration(window).to_string();
            let meaning = match signal {
                "denied_burst" => "this caller is denied again and again",
                "many_tenants" => "this token asks for the secrets of unusually many tenants",
                "enumeration" => "this token asks for many secrets that do not exist",
                _ => "a token is used that has expired",
            };
            tracing::warn!(signal, actor = shown, peer, count, window, "{meaning}");
        }
    }
}

impl Source {
    fn since(now: Duration) -> Self {
        Self { since: now, denials: 0, expired: false, tenants: HashSet::new(), absent: HashSet::new() }
    }
}

/// Whether a set has just come to its limit; beyond it, it does not grow.
fn grows_to(set: &mut HashSet<u64>, name: u64, limit: u32) -> bool {
    set.len() < limit as usize && set.insert(name) && set.len() == limit as usize
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::access::Peer;

    fn denied_from(addresses: impl Iterator<Item = IpAddr>) -> bool {
        let metrics = Arc::new(Metrics::new());
        let mut signals = Signals::new(Config::default(), Clock::system(), Arc::clone(&metrics));
        let records = addresses.map(|address| {
            let mut record = Record { actor: None, ..Record::example(Kind::Denial, "K", Outcome::Denied) };
            record.detail.peer = Some(Peer::Ip(address));
            record
        });
        signals.observe(&records.collect::<Vec<_>>());
        metrics.render().contains("secretier_signals_total{signal=\"denied_burst\"} 1")
    }

    #[test]
    fn who_can_have_many_addresses_is_one_all_the_same() {
        let many = 30_u8;
        assert!(denied_from((0..many).map(|n| IpAddr::from([127, n, 0, 1]))), "this machine");
        assert!(denied_from((0..many).map(|n| IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, n.into()]))), "an IPv6 host");
        assert!(!denied_from((0..many).map(|n| IpAddr::from([192, 0, 2, n]))), "others");
    }
}
