//! The tiers that a lookup asked, and their results: the content of the `Cache-Status` header.

use std::{fmt, time::Duration};

use super::ResolveError;

/// A tier, nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// This process.
    Memory,
    /// The encrypted database.
    Database,
    /// Infisical.
    Upstream,
}

impl Tier {
    /// The word used in headers and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Database => "database",
            Self::Upstream => "infisical",
        }
    }
}

/// Why a tier passed the request on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardReason {
    /// It has nothing that may be served.
    Miss,
    /// Its copy is past the refresh age.
    Stale,
    /// The caller asked for a fresh answer.
    Request,
}

/// The outcome at one tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TierResult {
    /// It was not asked.
    No,
    /// It answered; the seconds until its answer is to be refreshed, negative when overdue.
    Hit(i64),
    /// It passed the request on.
    Forwarded(ForwardReason),
    /// It answered as the origin, with this status.
    Fetched(u16),
    /// It failed; one word says why.
    Failed(&'static str),
}

/// The outcome at each tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheStatus {
    /// The tier whose answer this is.
    pub answered_by: Tier,
    /// The result at memory. The time to live of a hit comes from the entry.
    pub memory: TierResult,
    /// The result at the database.
    pub database: TierResult,
    /// The result at upstream.
    pub upstream: TierResult,
}

impl CacheStatus {
    /// The status of a hit in memory: no other tier was asked.
    #[must_use]
    pub fn memory() -> Self {
        Self {
            answered_by: Tier::Memory,
            memory: TierResult::Hit(0),
            database: TierResult::No,
            upstream: TierResult::No,
        }
    }

    /// Whether memory had it, and nothing else was asked.
    #[must_use]
    pub fn is_plain_hit(&self) -> bool {
        *self == Self::memory()
    }

    pub(super) fn stale_memory(why: ForwardReason, error: &ResolveError) -> Self {
        let failed = TierResult::Failed(detail(error));
        let (database, upstream) = match error {
            ResolveError::Database(_) | ResolveError::Offline => (failed, TierResult::No),
            _ => (TierResult::Forwarded(why), failed),
        };
        Self { database, upstream, ..Self::memory() }
    }

    pub(super) fn forwarded(why: ForwardReason) -> Self {
        Self { answered_by: Tier::Upstream, memory: TierResult::Forwarded(why), ..Self::memory() }
    }

    pub(super) fn database(why: ForwardReason, ttl: Duration) -> Self {
        Self::forwarded(why).answered_by_database(ttl.as_secs().cast_signed())
    }

    pub(super) fn past_database(why: ForwardReason, has_copy: bool, failed: bool) -> Self {
        let database = match (failed, has_copy, why) {
            (true, _, _) => TierResult::Failed("unavailable"),
            (false, true, ForwardReason::Request) => TierResult::Forwarded(ForwardReason::Request),
            (false, _, _) => TierResult::Forwarded(ForwardReason::Miss),
        };
        Self { database, ..Self::forwarded(why) }
    }

    pub(super) fn answered_by_database(self, ttl: i64) -> Self {
        Self { answered_by: Tier::Database, database: TierResult::Hit(ttl), ..self }
    }

    /// Answered by a copy of this age that is to be refreshed at `refresh_after`.
    pub(super) fn answered_by_copy(self, refresh_after: Duration, age: Duration) -> Self {
        self.answered_by_database(refresh_after.as_secs().cast_signed() - age.as_secs().cast_signed())
    }

    pub(super) fn answered_by_upstream(self, status: u16) -> Self {
        Self { answered_by: Tier::Upstream, upstream: TierResult::Fetched(status), ..self }
    }

    pub(super) fn but_failed(self, error: &ResolveError) -> Self {
        Self { upstream: TierResult::Failed(detail(error)), ..self }
    }

    /// Writes the value of `Cache-Status` (RFC 9211), nearest to the origin first.
    /// `ttl` is the time to live that the entry in memory has left, in seconds.
    ///
    /// # Errors
    /// The writer's errors.
    pub fn write(&self, out: &mut impl fmt::Write, ttl: i64) -> fmt::Result {
        let why = match self.database {
            TierResult::Forwarded(why) => why,
            _ => match self.memory {
                TierResult::Forwarded(why) => why,
                // A request that went further than a hit found it stale.
                TierResult::Hit(_) => ForwardReason::Stale,
                _ => ForwardReason::Miss,
            },
        };
        let mut separator = "";
        for (tier, consulted) in
            [(Tier::Upstream, self.upstream), (Tier::Database, self.database), (Tier::Memory, self.memory)]
        {
            let name = tier.as_str();
            match consulted {
                TierResult::No => continue,
                TierResult::Hit(_) if tier == Tier::Memory => write!(out, "{separator}{name}; hit; ttl={ttl}")?,
                TierResult::Hit(left) => write!(out, "{separator}{name}; hit; ttl={left}")?,
                TierResult::Forwarded(why) => write!(out, "{separator}{name}; fwd={}", why.as_str())?,
                TierResult::Fetched(status) => {
                    write!(out, "{separator}{name}; fwd={}; fwd-status={status}", why.as_str())?;
                }
                TierResult::Failed(detail) => {
                    write!(out, "{separator}{name}; fwd={}; detail={detail}", why.as_str())?;
                }
            }
            separator = ", ";
        }
        Ok(())
    }
}

impl ForwardReason {
    /// The word that RFC 9211 section 2.2 gives it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Miss => "miss",
            Self::Stale => "stale",
            Self::Request => "request",
        }
    }
}

/// A single word for the `detail` parameter.
fn detail(error: &ResolveError) -> &'static str {
    use crate::tiers::upstream::UpstreamError as Upstream;
    match error {
        ResolveError::Denied { .. } => "denied",
        ResolveError::Unreadable => "unreadable",
        ResolveError::Unusable(_) => "unusable",
        ResolveError::Database(_) | ResolveError::Offline => "unavailable",
        ResolveError::Withheld => "withheld",
        ResolveError::NoUpstream | ResolveError::NotConfigured => "not-configured",
        ResolveError::Moving => "moving",
        ResolveError::TimedOut => "timeout",
        ResolveError::Lost => "lost",
        ResolveError::Upstream(error) => match error {
            Upstream::Denied => "denied",
            Upstream::LoginRefused { .. } => "login-refused",
            Upstream::OutOfBudget { .. } => "out-of-budget",
            Upstream::RateLimited { .. } => "rate-limited",
            Upstream::Down { .. } | Upstream::Unreachable { .. } => "unreachable",
            Upstream::TimedOut => "timeout",
            Upstream::Failed(_) => "failed",
            Upstream::Malformed(_) | Upstream::Foreign { .. } => "malformed",
            Upstream::Incomplete => "incomplete",
            Upstream::Rejected { .. } | Upstream::Unstorable(_) | Upstream::AwaitsApproval => "rejected",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(cache_status: CacheStatus) -> String {
        let mut text = String::new();
        cache_status.write(&mut text, 281).unwrap();
        text
    }

    #[test]
    fn cache_status_names_each_tier_that_was_asked_nearest_to_the_origin_first() {
        assert_eq!(written(CacheStatus::memory()), "memory; hit; ttl=281");
        assert_eq!(
            written(CacheStatus::past_database(ForwardReason::Miss, false, false).answered_by_upstream(200)),
            "infisical; fwd=miss; fwd-status=200, database; fwd=miss, memory; fwd=miss"
        );
        assert_eq!(
            written(CacheStatus::past_database(ForwardReason::Miss, true, false).answered_by_database(-40)),
            "database; hit; ttl=-40, memory; fwd=miss"
        );
        assert_eq!(
            written(CacheStatus::stale_memory(ForwardReason::Stale, &ResolveError::TimedOut)),
            "infisical; fwd=stale; detail=timeout, database; fwd=stale, memory; hit; ttl=281"
        );
        assert_eq!(
            written(CacheStatus::stale_memory(ForwardReason::Stale, &ResolveError::Offline)),
            "database; fwd=stale; detail=unavailable, memory; hit; ttl=281"
        );
        assert_eq!(
            written(CacheStatus::past_database(ForwardReason::Miss, false, true).answered_by_upstream(200)),
            "infisical; fwd=miss; fwd-status=200, database; fwd=miss; detail=unavailable, memory; fwd=miss"
        );
    }
}
