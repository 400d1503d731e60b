//! Which tiers a lookup asked and what they said: what `Cache-Status` tells the caller.

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

/// Why a tier did not answer itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It has nothing that may be served.
    Miss,
    /// What it has is past its refresh age.
    Stale,
    /// The caller asked past it.
    Request,
}

/// What happened at one tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consulted {
    /// It was not asked.
    No,
    /// It answered; seconds until its answer is to be refreshed, negative when overdue.
    Hit(i64),
    /// It was passed.
    Forwarded(Why),
    /// It answered with this status, as the origin does.
    Fetched(u16),
    /// It failed, in a word.
    Failed(&'static str),
}

/// What happened at each tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trail {
    /// The tier whose answer this is.
    pub answered_by: Tier,
    /// At memory. A hit's time to live is told by the entry.
    pub memory: Consulted,
    /// At the database.
    pub database: Consulted,
    /// At upstream.
    pub upstream: Consulted,
}

impl Trail {
    /// Memory had it, and nothing else was asked.
    #[must_use]
    pub fn memory() -> Self {
        Self { answered_by: Tier::Memory, memory: Consulted::Hit(0), database: Consulted::No, upstream: Consulted::No }
    }

    /// Whether memory had it, and nothing else was asked.
    #[must_use]
    pub fn is_plain_hit(&self) -> bool {
        *self == Self::memory()
    }

    pub(super) fn stale_memory(why: Why, error: &ResolveError) -> Self {
        let failed = Consulted::Failed(detail(error));
        let (database, upstream) = match error {
            ResolveError::Database(_) | ResolveError::Alone => (failed, Consulted::No),
            _ => (Consulted::Forwarded(why), failed),
        };
        Self { database, upstream, ..Self::memory() }
    }

    pub(super) fn forwarded(why: Why) -> Self {
        Self { answered_by: Tier::Upstream, memory: Consulted::Forwarded(why), ..Self::memory() }
    }

    pub(super) fn database(why: Why, ttl: Duration) -> Self {
        Self::forwarded(why).answered_by_database(ttl.as_secs().cast_signed())
    }

    pub(super) fn past_database(why: Why, has_copy: bool, failed: bool) -> Self {
        let database = match (failed, has_copy, why) {
            (true, _, _) => Consulted::Failed("unavailable"),
            (false, true, Why::Request) => Consulted::Forwarded(Why::Request),
            (false, _, _) => Consulted::Forwarded(Why::Miss),
        };
        Self { database, ..Self::forwarded(why) }
    }

    pub(super) fn answered_by_database(self, ttl: i64) -> Self {
        Self { answered_by: Tier::Database, database: Consulted::Hit(ttl), ..self }
    }

    /// Answered by a copy of that age, which is to be refreshed at another.
    pub(super) fn answered_by_copy(self, refresh_after: Duration, age: Duration) -> Self {
        self.answered_by_database(refresh_after.as_secs().cast_signed() - age.as_secs().cast_signed())
    }

    pub(super) fn answered_by_upstream(self, status: u16) -> Self {
        Self { answered_by: Tier::Upstream, upstream: Consulted::Fetched(status), ..self }
    }

    pub(super) fn but_failed(self, error: &ResolveError) -> Self {
        Self { upstream: Consulted::Failed(detail(error)), ..self }
    }

    /// Writes the value of `Cache-Status` (RFC 9211), nearest to the origin first.
    /// `ttl` is what the entry in memory has left, in seconds.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&self, out: &mut impl fmt::Write, ttl: i64) -> fmt::Result {
        let why = match self.database {
            Consulted::Forwarded(why) => why,
            _ => match self.memory {
                Consulted::Forwarded(why) => why,
                // Whoever asked further than a hit found it stale.
                Consulted::Hit(_) => Why::Stale,
                _ => Why::Miss,
            },
        };
        let mut separator = "";
        for (tier, consulted) in
            [(Tier::Upstream, self.upstream), (Tier::Database, self.database), (Tier::Memory, self.memory)]
        {
            let name = tier.as_str();
            match consulted {
                Consulted::No => continue,
                Consulted::Hit(_) if tier == Tier::Memory => write!(out, "{separator}{name}; hit; ttl={ttl}")?,
                Consulted::Hit(left) => write!(out, "{separator}{name}; hit; ttl={left}")?,
                Consulted::Forwarded(why) => write!(out, "{separator}{name}; fwd={}", why.as_str())?,
                Consulted::Fetched(status) => {
                    write!(out, "{separator}{name}; fwd={}; fwd-status={status}", why.as_str())?;
                }
                Consulted::Failed(detail) => {
                    write!(out, "{separator}{name}; fwd={}; detail={detail}", why.as_str())?;
                }
            }
            separator = ", ";
        }
        Ok(())
    }
}

impl Why {
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

/// A word for the `detail` parameter; never more than a word.
fn detail(error: &ResolveError) -> &'static str {
    use crate::tiers::upstream::UpstreamError as Upstream;
    match error {
        ResolveError::Denied => "denied",
        ResolveError::Unreadable => "unreadable",
        ResolveError::Unusable(_) => "unusable",
        ResolveError::Database(_) | ResolveError::Alone => "unavailable",
        ResolveError::NoUpstream => "not-configured",
        ResolveError::Moving => "moving",
        ResolveError::TimedOut => "timeout",
        ResolveError::Lost => "lost",
        ResolveError::Upstream(error) => match error {
            Upstream::Denied => "denied",
            Upstream::LoginRefused { .. } => "login-refused",
            Upstream::OutOfBudget { .. } => "out-of-budget",
            Upstream::RateLimited { .. } => "rate-limited",
            Upstream::Down { .. } | Upstream::Unreachable(_) => "unreachable",
            Upstream::TimedOut => "timeout",
            Upstream::Failed(_) => "failed",
            Upstream::Malformed(_) => "malformed",
            Upstream::Incomplete => "incomplete",
            Upstream::Rejected { .. } | Upstream::Unstorable(_) | Upstream::AwaitsApproval => "rejected",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(trail: Trail) -> String {
        let mut text = String::new();
        trail.write(&mut text, 281).unwrap();
        text
    }

    #[test]
    fn cache_status_names_each_tier_that_was_asked_nearest_to_the_origin_first() {
        assert_eq!(written(Trail::memory()), "memory; hit; ttl=281");
        assert_eq!(
            written(Trail::past_database(Why::Miss, false, false).answered_by_upstream(200)),
            "infisical; fwd=miss; fwd-status=200, database; fwd=miss, memory; fwd=miss"
        );
        assert_eq!(
            written(Trail::past_database(Why::Miss, true, false).answered_by_database(-40)),
            "database; hit; ttl=-40, memory; fwd=miss"
        );
        assert_eq!(
            written(Trail::stale_memory(Why::Stale, &ResolveError::TimedOut)),
            "infisical; fwd=stale; detail=timeout, database; fwd=stale, memory; hit; ttl=281"
        );
        assert_eq!(
            written(Trail::stale_memory(Why::Stale, &ResolveError::Alone)),
            "database; fwd=stale; detail=unavailable, memory; hit; ttl=281"
        );
        assert_eq!(
            written(Trail::past_database(Why::Miss, false, true).answered_by_upstream(200)),
            "infisical; fwd=miss; fwd-status=200, database; fwd=miss; detail=unavailable, memory; fwd=miss"
        );
    }
}
