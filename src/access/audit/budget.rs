//! Limits the cost of records of refusals: bytes a day, of which each peer and each token has
//! no more than a share.

use std::{
    convert::Infallible,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use quick_cache::sync::Cache;

use crate::{
    access::{Grant, Peer, peer::PeerId},
    clock::Clock,
    metrics::Metrics,
};

/// The account that a refusal is charged to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Payer {
    /// A peer without a valid token.
    Stranger(PeerId),
    /// A token that is known, by its id.
    Token(String),
}

impl Payer {
    pub(super) fn of(peer: Peer, grant: Option<&Arc<Grant>>) -> Self {
        match grant {
            Some(grant) => Self::Token(grant.id.clone()),
            None => Self::Stranger(PeerId::from(peer)),
        }
    }
}

/// Bytes that records of refusals may take: a quarter of a day's at once, and the rest evenly
/// over the day. So no 24 hours bring more than the setting, whenever they begin.
///
/// A payer has a quarter of the whole by the same rule. The last quarter of the current level is
/// for known tokens: strangers together cannot keep their denials from being recorded
/// with names.
///
/// Both accounts are checked and charged under the lock of the whole, so that no two payments
/// are made from the same bytes. The table of payers is bounded; one that was forgotten begins
/// with a full account, which the whole still bounds.
pub(super) struct Budget {
    per_day: AtomicU64,
    whole: Mutex<Account>,
    payers: Cache<Payer, Arc<Mutex<Account>>>,
    clock: Clock,
    paid: metrics::Counter,
}

/// The most payers that are remembered. Each takes some hundred bytes.
const PAYERS: usize = 10_000;

/// The smallest setting: a payer's share at once is then still sixteen of the longest records.
pub(super) const LEAST_PER_DAY: u64 = 1 << 20;

/// The largest setting.
pub(super) const MOST_PER_DAY: u64 = 1 << 40;

impl Budget {
    pub(super) fn new(per_day: u64, clock: Clock, metrics: &Metrics) -> Self {
        let whole = Mutex::new(Account::full(per_day, clock.running()));
        let paid = metrics.counter("secretier_audit_strangers_bytes_total", &[]);
        // Shown from the start, so that an alert finds a series to watch.
        paid.increment(0);
        Self { per_day: AtomicU64::new(per_day), whole, payers: Cache::new(PAYERS), clock, paid }
    }

    /// Allows this many bytes a day from now on. Bytes that were spent stay spent.
    pub(super) fn change(&self, per_day: u64) {
        self.per_day.store(per_day, Ordering::Relaxed);
    }

    /// Pays for a record; `false` where it cannot be paid now. A record without a payer
    /// stands for many.
    pub(super) fn pay(&self, payer: Option<&Payer>, bytes: u64) -> bool {
        let (per_day, now) = (self.per_day.load(Ordering::Relaxed), self.clock.running());
        let mut whole = lock(&self.whole);
        whole.refill(per_day, now);
        let kept_back = match payer {
            Some(Payer::Token(_)) => 0,
            Some(Payer::Stranger(_)) | None => Account::most(per_day) / 4,
        };
        if !whole.has(units(bytes) + kept_back) {
            return false;
        }
        if let Some(payer) = payer {
            let share = per_day / 4;
            let account = self.account(payer, share, now);
            let mut account = lock(&account);
            account.refill(share, now);
            if !account.has(units(bytes)) {
                return false;
            }
            account.level -= units(bytes);
        }
        whole.level -= units(bytes);
        self.paid.increment(bytes);
        true
    }

    fn account(&self, payer: &Payer, share: u64, now: Duration) -> Arc<Mutex<Account>> {
        let new = || Ok::<_, Infallible>(Arc::new(Mutex::new(Account::full(share, now))));
        match self.payers.get_or_insert_with(payer, new) {
            Ok(account) => account,
            Err(never) => match never {},
        }
    }
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget").field("per_day", &self.per_day).finish_non_exhaustive()
    }
}

fn lock(account: &Mutex<Account>) -> MutexGuard<'_, Account> {
    account.lock().unwrap_or_else(PoisonError::into_inner)
}

const DAY_MILLIS: u64 = 24 * 60 * 60 * 1000;

/// Bytes times the milliseconds of a day: however often an account is refilled, no amount is
/// lost by rounding.
fn units(bytes: u64) -> u128 {
    u128::from(bytes) * u128::from(DAY_MILLIS)
}

/// An amount that may be spent now, in [`units`].
#[derive(Debug)]
struct Account {
    level: u128,
    /// By the running clock: no step of the wall clock gives anybody more.
    refilled_at: Duration,
}

impl Account {
    fn full(per_day: u64, now: Duration) -> Self {
        Self { level: Self::most(per_day), refilled_at: now }
    }

    /// The amount that can be spent at once.
    fn most(per_day: u64) -> u128 {
        units(per_day / 4)
    }

    fn refill(&mut self, per_day: u64, now: Duration) {
        let millis = now.saturating_sub(self.refilled_at).as_millis();
        let refill = millis.saturating_mul(u128::from(per_day - per_day / 4));
        self.level = self.level.saturating_add(refill).min(Self::most(per_day));
        self.refilled_at = self.refilled_at.max(now);
    }

    fn has(&self, units: u128) -> bool {
        self.level >= units
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    const RECORD: u64 = 700;
    const DAY: u64 = 1 << 20;

    fn budget() -> (Budget, Clock) {
        let clock = Clock::system();
        (Budget::new(DAY, clock.clone(), &Metrics::new()), clock)
    }

    fn peer(number: u8) -> Payer {
        Payer::of(Peer::Ip(IpAddr::from([192, 0, 2, number])), None)
    }

    fn token(number: u8) -> Payer {
        Payer::Token(format!("{number:016}"))
    }

    /// The bytes that are paid in this many hours, while every payer asks for too much.
    fn paid(budget: &Budget, clock: &Clock, payers: &[Payer], hours: u64) -> u64 {
        let mut paid = 0;
        for _ in 0..hours * 6 {
            for payer in payers {
                paid += RECORD
                    * std::iter::repeat_with(|| budget.pay(Some(payer), RECORD)).take_while(|paid| *paid).count()
                        as u64;
            }
            clock.advance(Duration::from_secs(600));
        }
        paid
    }

    #[test]
    fn no_day_costs_more_than_is_configured_however_many_are_refused() {
        let (budget, clock) = budget();
        let everybody: Vec<Payer> = (0..40).map(peer).chain((0..40).map(token)).collect();
        for day in 0..3 {
            let paid = paid(&budget, &clock, &everybody, 24);
            assert!(paid <= DAY && paid > DAY / 2, "day {day}: {paid}");
        }
    }

    #[test]
    fn no_peer_and_no_token_has_more_than_a_quarter() {
        for payer in [peer(1), token(1)] {
            let (budget, clock) = budget();
            let paid = paid(&budget, &clock, std::slice::from_ref(&payer), 24);
            assert!(paid <= DAY / 4 && paid > DAY / 8, "{payer:?}: {paid}");
        }
    }

    #[test]
    fn strangers_leave_a_part_to_tokens_that_are_known() {
        let (budget, clock) = budget();
        let strangers: Vec<Payer> = (0..100).map(peer).collect();
        paid(&budget, &clock, &strangers, 24);
        for stranger in &strangers {
            while budget.pay(Some(stranger), RECORD) {}
        }
        assert!(!budget.pay(None, RECORD), "nor do sums of theirs take it");
        assert!(budget.pay(Some(&token(1)), RECORD));
    }

    #[test]
    fn no_step_of_the_wall_clock_gives_anybody_more() {
        let (budget, clock) = budget();
        while budget.pay(Some(&peer(1)), RECORD) {}
        for step in [3_600_000, -7_200_000, 24 * 3_600_000] {
            clock.step(step);
            assert!(!budget.pay(Some(&peer(1)), 10 * RECORD), "{step}");
        }
        clock.advance(Duration::from_secs(3600));
        assert!(budget.pay(Some(&peer(1)), 10 * RECORD));
    }

    #[test]
    fn another_setting_counts_at_once_and_gives_nothing_back() {
        let (budget, clock) = budget();
        let payers: Vec<Payer> = (0..40).map(token).collect();
        let spend = || {
            payers
                .iter()
                .map(|payer| {
                    std::iter::repeat_with(|| budget.pay(Some(payer), RECORD)).take_while(|paid| *paid).count() as u64
                })
                .sum::<u64>()
                * RECORD
        };
        assert!(spend() <= DAY / 4);
        budget.change(8 * DAY);
        assert!(spend() < 10 * RECORD, "what was spent stays spent");
        clock.advance(Duration::from_secs(24 * 60 * 60));
        let spent = spend();
        assert!(spent > DAY && spent <= 2 * DAY, "{spent}");
        budget.change(DAY);
        clock.advance(Duration::from_secs(24 * 60 * 60));
        assert!(spend() <= DAY / 4);
    }
}
