//! Whether this instance's knowledge of the database is recent enough to answer from.
//!
//! The database says who owns a tenant, what was shredded, which tokens are valid, and what a
//! secret's value is where the database owns it. An instance that cannot ask it continues with what
//! it knew. `database.max_detached` limits for how long. After that it answers nothing that depends
//! on this knowledge, which is everything that needs a token.
//!
//! The time without the database is counted from the earlier of two moments:
//! - the beginning of the last look for changes that are all applied here: every change before that
//!   moment is known;
//! - the beginning of the last announcement that the database acknowledged: commands compute from
//!   the register until when this instance may answer, and the register does not contain looks. The
//!   database notes its time while the announcement is in progress, so that time is never earlier
//!   than this moment.
//!
//! The interleavings that would break it, and what prevents each:
//! - *The process is stopped, or the machine suspended, and continues.* Both clocks are read before
//!   each answer, and the one that shows more time counts: the running clock, which counts
//!   suspensions, or the wall clock. An answer that takes longer than a hit is checked again at its
//!   end.
//! - *A look finds changes, but they cannot be read.* Its moment counts only when all of them are
//!   applied.
//! - *A request reads one new end and one old end.* Both were true when they were set, and each of
//!   them bounds the answer.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

use crate::clock::{Clock, Moment, Timestamp};

/// The longest time that a request waits for the database, where the instance has lost it.
const WAIT: Duration = Duration::from_secs(2);

/// The connection of this instance to the database, in time.
#[derive(Debug)]
pub struct Attachment {
    clock: Clock,
    max_detached: Duration,
    known: Mutex<Known>,
    /// When the instance stops answering, by each clock; see [`Moment::is_before`].
    end: [AtomicI64; 2],
    /// Notified when a look or an announcement has ended; and the number of those that failed.
    tried: Notify,
    failed: AtomicU64,
    /// Notified when a request waits for a look or an announcement.
    look_wanted: Notify,
    announcement_wanted: Notify,
}

/// The beginnings of the last look and announcement that succeeded.
#[derive(Debug, Clone, Copy)]
struct Known {
    looked: Moment,
    announced: Moment,
}

impl Attachment {
    /// For an instance that begins to ask the database now.
    #[must_use]
    pub fn new(clock: Clock, max_detached: Duration) -> Self {
        let now = clock.moment();
        let end = now.plus(max_detached).millis().map(AtomicI64::new);
        Self {
            clock,
            max_detached,
            known: Mutex::new(Known { looked: now, announced: now }),
            end,
            tried: Notify::new(),
            failed: AtomicU64::new(0),
            look_wanted: Notify::new(),
            announcement_wanted: Notify::new(),
        }
    }

    /// How long the instance answers after it has lost the database.
    #[must_use]
    pub fn max_detached(&self) -> Duration {
        self.max_detached
    }

    /// Whether the database's last news may be used for an answer at this moment. Costs two loads.
    #[must_use]
    pub fn holds(&self, now: Moment) -> bool {
        let [running, wall] = &self.end;
        now.is_before(Moment::from_millis([running.load(Ordering::Acquire), wall.load(Ordering::Acquire)]))
    }

    /// The same for the present moment.
    #[must_use]
    pub fn holds_now(&self) -> bool {
        self.holds(self.clock.moment())
    }

    /// When the state of the database was last fully known, by the wall clock.
    #[must_use]
    pub fn since(&self) -> Timestamp {
        self.lock().earlier().wall()
    }

    /// Takes over the knowledge that another instance had at this time of the wall clock: as if the
    /// database had last been asked then.
    pub fn take_over(&self, at: Timestamp) {
        let now = self.clock.moment();
        let at = now.minus(now.wall().since(at));
        self.note(|known| *known = Known { looked: at, announced: at });
    }

    /// Notes that everything is applied that the database had at this moment.
    pub fn note_look(&self, began: Moment) {
        self.note(|known| known.looked = began);
    }

    /// Notes that the database has acknowledged an announcement that began at this moment.
    pub fn note_announcement(&self, began: Moment) {
        self.note(|known| known.announced = began);
    }

    /// Notes that a look or an announcement has failed.
    pub fn note_failure(&self) {
        self.failed.fetch_add(1, Ordering::Release);
        self.tried.notify_waiters();
    }

    /// Completes where a request waits for a look.
    pub async fn look_wanted(&self) {
        self.look_wanted.notified().await;
    }

    /// Completes where a request waits for an announcement.
    pub async fn announcement_wanted(&self) {
        self.announcement_wanted.notified().await;
    }

    /// Has the database asked if the last time was too long ago, and waits until it has answered or
    /// failed. Returns whether its news may be used for answers.
    pub async fn renewed(&self) -> bool {
        let failed = self.failed.load(Ordering::Acquire);
        let renewed = async {
            loop {
                let tried = self.tried.notified();
                if self.holds_now() {
                    return true;
                }
                if self.failed.load(Ordering::Acquire) != failed {
                    return false;
                }
                self.look_wanted.notify_one();
                self.announcement_wanted.notify_one();
                tried.await;
            }
        };
        tokio::time::timeout(WAIT, renewed).await.unwrap_or(false)
    }

    fn note(&self, change: impl FnOnce(&mut Known)) {
        let mut known = self.lock();
        change(&mut known);
        let ends = known.earlier().plus(self.max_detached).millis();
        for (end, millis) in self.end.iter().zip(ends) {
            end.store(millis, Ordering::Release);
        }
        drop(known);
        self.tried.notify_waiters();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn earlier(&self) -> Moment {
        self.looked.sooner(self.announced)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn attachment() -> (Clock, Attachment) {
        let clock = Clock::system();
        (clock.clone(), Attachment::new(clock, LONG))
    }

    #[test]
    fn nothing_is_answered_past_the_bound_by_either_clock() {
        for step in [false, true] {
            let (clock, attachment) = attachment();
            assert!(attachment.holds_now());
            match step {
                true => clock.step(10_001),
                false => clock.advance(LONG),
            }
            assert!(!attachment.holds_now());
        }
    }

    #[test]
    fn a_look_without_an_announcement_prolongs_nothing_nor_the_other_way_round() {
        let (clock, attachment) = attachment();
        clock.advance(LONG / 2);
        let later = clock.moment();
        attachment.note_look(later);
        clock.advance(LONG / 2);
        assert!(!attachment.holds_now(), "the register still tells the time of before");
        attachment.note_announcement(later);
        assert!(attachment.holds_now());
        attachment.note_announcement(clock.moment());
        clock.advance(LONG / 2);
        assert!(!attachment.holds_now(), "nobody knows what was changed since the look");
    }

    #[test]
    fn what_another_knew_is_no_younger_than_it_was_there() {
        let (clock, attachment) = attachment();
        attachment.take_over(clock.now());
        assert!(attachment.holds_now());
        clock.advance(LONG);
        attachment.take_over(Timestamp::from_millis(clock.now().as_millis() - 10_000));
        assert!(!attachment.holds_now());
    }

    #[tokio::test]
    async fn a_request_waits_for_a_look_and_not_for_one_that_failed() {
        let (clock, attachment) = attachment();
        clock.advance(LONG);
        let (renewed, ()) = tokio::join!(attachment.renewed(), async {
            attachment.look_wanted().await;
            attachment.note_look(clock.moment());
            attachment.announcement_wanted().await;
            attachment.note_announcement(clock.moment());
        });
        assert!(renewed);
        clock.advance(LONG);
        let (renewed, ()) = tokio::join!(attachment.renewed(), async {
            attachment.look_wanted().await;
            attachment.note_failure();
        });
        assert!(!renewed);
    }
}
