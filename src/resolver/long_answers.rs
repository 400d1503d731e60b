//! Answers that hold all of a tenant's values while they are made. Few are made at once, and
//! each token's are made one after the other.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Instant,
};

use arc_swap::ArcSwap;
use quick_cache::sync::Cache;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{long_work::SHORT, metrics::Metrics, tenant::Tenant};

/// The most tenants whose list lengths are remembered.
const KNOWN: usize = 16 << 10;

/// The long answers that are being made, and the requests that wait to make one.
///
/// A token's turns are a semaphore with one place, which exists for as long as any request holds
/// it or waits for it. It is looked up and made under one lock, so that a token never has
/// two of them.
#[derive(Debug)]
pub(super) struct LongAnswers {
    /// Replaced whole: requests that hold a place of the previous one give it back there.
    in_all: ArcSwap<Semaphore>,
    by_token: Mutex<HashMap<String, Weak<Semaphore>>>,
    /// The weight of each tenant's list when it was last read. A list that was short waits for no
    /// turn. One that has grown since is found to be long while it is read, and waits from then on.
    weights: Cache<Tenant, usize>,
    metrics: Arc<Metrics>,
}

/// The turn that one request takes. A request that has its token's turn takes no second one.
#[derive(Debug)]
pub struct LongAnswer<'a> {
    long: &'a LongAnswers,
    token: &'a str,
    turn: Mutex<Option<OwnedSemaphorePermit>>,
}

impl LongAnswers {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            in_all: ArcSwap::from_pointee(Semaphore::new(1)),
            by_token: Mutex::default(),
            weights: Cache::new(KNOWN),
            metrics,
        }
    }

    /// Sets how many may be made at once for all tokens, from the next on.
    pub(super) fn set_at_once(&self, most: u32) {
        self.in_all.store(Arc::new(Semaphore::new(most as usize)));
    }

    /// For a request that comes with the token of this id.
    pub(super) fn of<'a>(&'a self, token: &'a str) -> LongAnswer<'a> {
        LongAnswer { long: self, token, turn: Mutex::default() }
    }

    /// Notes the weight of a tenant's list.
    pub(super) fn note(&self, tenant: &Tenant, weight: usize) {
        if self.weights.get(tenant) != Some(weight) {
            self.weights.insert(tenant.clone(), weight);
        }
    }

    fn is_short(&self, tenant: &Tenant) -> bool {
        self.weights.get(tenant).is_some_and(|weight| weight <= SHORT)
    }

    fn turns_of(&self, token: &str) -> Arc<Semaphore> {
        let mut by_token = self.by_token.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turns) = by_token.get(token).and_then(Weak::upgrade) {
            return turns;
        }
        by_token.retain(|_, turns| turns.strong_count() > 0);
        let turns = Arc::new(Semaphore::new(1));
        by_token.insert(token.to_owned(), Arc::downgrade(&turns));
        turns
    }
}

impl LongAnswer<'_> {
    /// Waits for the token's turn. The request keeps it until it is answered or gives it back.
    pub async fn take(&self) {
        if self.turn().is_some() {
            return;
        }
        let began = Instant::now();
        // None of these is ever closed.
        let turn = self.long.turns_of(self.token).acquire_owned().await.ok();
        self.long.metrics.observe("secretier_long_answer_wait_seconds", &[], began.elapsed());
        *self.turn() = turn;
    }

    /// Waits for the token's turn where the tenant's list is known to be long, and returns the
    /// weight that the list had when it was last read.
    pub async fn take_if_long(&self, tenant: &Tenant) -> Option<usize> {
        let weight = self.long.weights.get(tenant).filter(|weight| *weight > SHORT)?;
        self.take().await;
        Some(weight)
    }

    /// Waits for the token's turn, and for one of the places that all tokens share, to read this
    /// tenant's rows, unless they are known to be short. The caller gives the place back.
    pub(super) async fn take_for(&self, tenant: &Tenant) -> Option<OwnedSemaphorePermit> {
        if self.long.is_short(tenant) {
            return None;
        }
        self.take().await;
        self.long.in_all.load_full().acquire_owned().await.ok()
    }

    /// Gives the turn back: the request no longer holds anything long.
    pub(super) fn give_back(&self) {
        *self.turn() = None;
    }

    fn turn(&self) -> std::sync::MutexGuard<'_, Option<OwnedSemaphorePermit>> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_token_has_one_turn_at_a_time_and_others_have_theirs() {
        let long = LongAnswers::new(Metrics::new());
        let (first, second, other) = (long.of("a"), long.of("a"), long.of("b"));
        first.take().await;
        assert!(second.take().now_or_never().is_none());
        first.take().now_or_never().expect("a request that has its turn waits for no other");
        other.take().now_or_never().expect("one token does not wait for another");
        first.give_back();
        second.take().now_or_never().expect("the turn has come");
        drop((first, second, other));
        assert!(long.of("c").take().now_or_never().is_some());
        assert_eq!(long.by_token.lock().unwrap().len(), 1, "nothing is kept of who waits no more");
    }

    #[tokio::test]
    async fn so_many_are_made_at_once_and_what_is_short_is_not_among_them() {
        const AT_ONCE: usize = 3;
        let long = LongAnswers::new(Metrics::new());
        long.set_at_once(AT_ONCE as u32);
        let tenant: Tenant = "acme".parse().unwrap();
        let tokens: Vec<String> = (0..=AT_ONCE).map(|number| number.to_string()).collect();
        let answers: Vec<LongAnswer<'_>> = tokens.iter().map(|token| long.of(token)).collect();
        let mut places = Vec::new();
        for answer in &answers[..AT_ONCE] {
            places.push(answer.take_for(&tenant).await.expect("it is not known to be short"));
        }
        assert!(answers[AT_ONCE].take_for(&tenant).now_or_never().is_none());
        long.note(&tenant, SHORT);
        assert!(answers[AT_ONCE].take_for(&tenant).await.is_none(), "it waits for nobody");
        long.note(&tenant, SHORT + 1);
        assert!(answers[AT_ONCE].take_for(&tenant).now_or_never().is_none());
        places.pop();
        assert!(answers[AT_ONCE].take_for(&tenant).now_or_never().flatten().is_some());
    }
}
