//! Answers that hold all of a tenant's values while they are made: few at once, and for each
//! token one after the other.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Instant,
};

use arc_swap::ArcSwap;
use quick_cache::sync::Cache;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{long_work::SHORT, metrics::Metrics, tenant::Tenant};

/// Of so many tenants it is remembered how long their lists are.
const KNOWN: usize = 16 << 10;

/// Who makes long answers, and who waits for that.
///
/// A token's turns are a semaphore of one place, which is there for as long as anybody has it or
/// waits for it. Whoever comes looks for it and makes it under one lock, so that there are never
/// two of one token.
#[derive(Debug)]
pub(super) struct LongAnswers {
    /// Replaced whole: those who have a place of the one before give it back there.
    in_all: ArcSwap<Semaphore>,
    by_token: Mutex<HashMap<String, Weak<Semaphore>>>,
    /// What tenants' lists weighed when they were last read. Those that were short wait for no
    /// turn. One that has grown since is found to be long as it is read, and waits from then on.
    weights: Cache<Tenant, usize>,
    metrics: Arc<Metrics>,
}

/// What is taken for one request. Of a token that has its turn, the request takes no second one.
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

    /// Lets so many be made at once of all tokens, from the next on.
    pub(super) fn set_at_once(&self, most: u32) {
        self.in_all.store(Arc::new(Semaphore::new(most as usize)));
    }

    /// For a request that comes with the token of this id.
    pub(super) fn of<'a>(&'a self, token: &'a str) -> LongAnswer<'a> {
        LongAnswer { long: self, token, turn: Mutex::default() }
    }

    /// Notes what a tenant's list weighs.
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
    /// Waits for the token's turn, which the request has until it is answered, or gives back.
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

    /// Waits for the token's turn where the tenant's list is known to be long, and tells what it
    /// weighed when it was last read.
    pub async fn take_if_long(&self, tenant: &Tenant) -> Option<usize> {
        let weight = self.long.weights.get(tenant).filter(|weight| *weight > SHORT)?;
        self.take().await;
        Some(weight)
    }

    /// Waits for the token's turn, and for a place among all, to read what the database has of
    /// this tenant, unless that is known to be short. The place is the caller's to give back.
    pub(super) async fn take_for(&self, tenant: &Tenant) -> Option<OwnedSemaphorePermit> {
        if self.long.is_short(tenant) {
            return None;
        }
        self.take().await;
        self.long.in_all.load_full().acquire_owned().await.ok()
    }

    /// Gives the turn back: nothing long is held any more.
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
