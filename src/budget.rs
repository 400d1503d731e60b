//! Limits for resources that are held at once: in total, and by each holder.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// The amount that is held.
///
/// It is only ever changed by one addition or subtraction, so concurrent changes lose nothing. If
/// two takers come at once near the limit, both may be refused, but never are both admitted.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// The present amount.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds to it, and returns the amount before.
    fn add(&self, amount: u64) -> u64 {
        self.0.fetch_add(amount, Ordering::Relaxed)
    }

    fn give_back(&self, amount: u64) {
        self.0.fetch_sub(amount, Ordering::Relaxed);
    }
}

/// The resources that requests hold: of one token or peer, or in total.
#[derive(Debug, Default, Clone)]
pub struct Holds {
    /// Requests in progress.
    pub places: Arc<Gauge>,
    /// Bytes of bodies that are being read.
    pub bodies: Arc<Gauge>,
    /// Bytes of answers that are not received yet.
    pub answers: Arc<Gauge>,
    /// Streams of events.
    pub streams: Arc<Gauge>,
}

/// The limits for the amount held at once.
#[derive(Debug, Clone, Copy)]
pub struct Most {
    /// In total.
    pub in_all: u64,
    /// By one token, or one peer.
    pub by_one: u64,
}

/// The limit that is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spent {
    /// The limit of the one token or peer.
    ByOne,
    /// The limit in total.
    InAll,
}

/// A part of the held amount, which is given back when this is dropped.
#[derive(Debug)]
pub struct Held {
    all: Arc<Gauge>,
    one: Arc<Gauge>,
    amount: u64,
}

impl Held {
    /// Takes an amount. A holder that holds nothing else may take more than its own share:
    /// otherwise a thing that is larger than the share could never be had.
    ///
    /// # Errors
    /// [`Spent`]; nothing is taken then.
    pub fn take(all: &Arc<Gauge>, one: &Arc<Gauge>, amount: u64, most: Most) -> Result<Self, Spent> {
        let mut held = Self { all: Arc::clone(all), one: Arc::clone(one), amount: 0 };
        held.grow(amount, most)?;
        Ok(held)
    }

    /// Takes an additional amount.
    ///
    /// # Errors
    /// [`Spent`]; the amount from before stays held.
    pub fn grow(&mut self, more: u64, most: Most) -> Result<(), Spent> {
        let by_one = self.one.add(more);
        // The drop gives back exactly the amount that was added to both.
        if by_one > self.amount && by_one.saturating_add(more) > most.by_one {
            self.one.give_back(more);
            return Err(Spent::ByOne);
        }
        if self.all.add(more).saturating_add(more) > most.in_all {
            self.one.give_back(more);
            self.all.give_back(more);
            return Err(Spent::InAll);
        }
        self.amount += more;
        Ok(())
    }

    /// Changes the held amount.
    ///
    /// # Errors
    /// [`Spent`]; everything is given back then.
    pub fn resized(mut self, amount: u64, most: Most) -> Result<Self, Spent> {
        match amount.checked_sub(self.amount) {
            Some(more) => self.grow(more, most)?,
            None => drop(self.split(self.amount - amount)),
        }
        Ok(self)
    }

    /// Splits off so much of it, or all of it where that is less.
    #[must_use]
    pub fn split(&mut self, amount: u64) -> Self {
        let amount = amount.min(self.amount);
        self.amount -= amount;
        Self { all: Arc::clone(&self.all), one: Arc::clone(&self.one), amount }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all.give_back(self.amount);
        self.one.give_back(self.amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Most = Most { in_all: 10, by_one: 4 };

    #[test]
    fn what_is_held_is_bounded_in_all_and_by_one_and_comes_back_whatever_becomes_of_it() {
        let (all, one, other) = (Arc::default(), Arc::default(), Arc::default());
        let mut first = Held::take(&all, &one, 3, MOST).unwrap();
        assert_eq!(Held::take(&all, &one, 2, MOST).unwrap_err(), Spent::ByOne);
        assert_eq!((all.held(), one.held()), (3, 3), "a refusal holds nothing");
        let _more = Held::take(&all, &other, 4, MOST).unwrap();
        let third = Arc::default();
        assert_eq!(Held::take(&all, &third, 4, MOST).unwrap_err(), Spent::InAll);
        assert_eq!((all.held(), third.held()), (7, 0));
        first = first.resized(4, MOST).unwrap().resized(3, MOST).unwrap();
        assert_eq!((all.held(), one.held()), (7, 3));
        let part = first.split(2);
        drop(first);
        assert_eq!((all.held(), one.held()), (6, 2), "what was split off is held by itself");
        drop(part);
        assert_eq!((all.held(), one.held()), (4, 0));
    }

    #[test]
    fn who_holds_nothing_may_hold_one_thing_that_is_larger_than_its_share() {
        let (all, one) = (Arc::default(), Arc::default());
        let mut large = Held::take(&all, &one, 4, MOST).unwrap();
        large.grow(4, MOST).unwrap();
        assert_eq!(Held::take(&all, &one, 1, MOST).unwrap_err(), Spent::ByOne);
        drop(large);
        assert_eq!(Held::take(&all, &one, 11, MOST).unwrap_err(), Spent::InAll, "and none that is larger than all");
        assert_eq!((all.held(), one.held()), (0, 0));
    }
}
