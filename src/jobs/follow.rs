//! Follows the changes in the database: forgets what has changed, and reads tokens, tenants and
//! rotations again.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{Notify, watch};

use super::{Common, turns};
use crate::{
    clock::Moment,
    tiers::database::{Change, Database, News},
};

/// The time between two looks at the changes, however often the database announces some:
/// changes in this time are read together.
const BREATH: Duration = Duration::from_millis(10);

/// How long to wait before listening again after the connection ended: the first, the longest.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Follows the counter of changes.
pub(super) struct Follower {
    pub(super) common: Arc<Common>,
    /// How often the database is asked, where it announces nothing, and failed reads are repeated.
    every: Duration,
    /// Notified whenever the database announces a change.
    pub(super) heard: Arc<Notify>,
    due: Due,
    /// The counter of changes up to which all are in force.
    followed: watch::Sender<i64>,
}

/// Everything that must be read again, because it has changed.
#[derive(Default)]
struct Due {
    news: Mutex<Unread>,
    added: Notify,
}

#[derive(Clone, Copy, Default)]
struct Unread {
    tokens: bool,
    migration: bool,
    tenants: bool,
    master_keys: bool,
    /// The change that all of it leads to; `None` where nothing was looked at since.
    up_to: Option<i64>,
    /// When the last look began that found all changes that there were.
    as_of: Option<Moment>,
}

impl Follower {
    pub(super) fn new(common: Arc<Common>, every: Duration, followed: watch::Sender<i64>) -> Self {
        Self { common, every, heard: Arc::default(), due: Due::default(), followed }
    }

    /// Finds the place in the feed from which on it follows.
    pub(super) async fn begin(&self) {
        let followed = *self.followed.borrow();
        // Where the database does not answer, the first look finds it.
        if let Ok(news) = self.common.database.changes_after(followed).await {
            self.common.service.resolver.begin_events(&news);
        }
    }

    pub(super) async fn until(&self, stopped: impl Future<Output = ()> + Clone) {
        tokio::join!(self.hear_until(stopped.clone()), self.read_until(stopped));
    }

    /// Asks for the changes, and forgets the secrets that have changed.
    async fn hear_until(&self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut turns = turns(self.every);
        let mut last = *self.followed.borrow();
        // Whether the last look found the database; none before the first.
        let mut found = None;
        loop {
            let Common { service, database, clock, .. } = &*self.common;
            tokio::select! {
                _ = turns.tick() => {}
                () = self.heard.notified() => {}
                () = service.attachment.look_wanted() => {}
                () = &mut stopped => break,
            }
            let began = clock.moment();
            let Ok(news) = database.changes_after(last).await else {
                service.attachment.note_failure();
                found = Some(false);
                continue;
            };
            match found.replace(true) {
                None => service.resolver.begin_events(&news),
                Some(false) => service.resolver.note_missed_events(),
                Some(true) => {}
            }
            if news.up_to != last || !news.is_whole {
                service.resolver.apply(&news);
                last = news.up_to;
                // There may be more.
                self.heard.notify_one();
            }
            self.due.add(&news, began);
            tokio::time::sleep(BREATH).await;
        }
    }

    /// Puts the other changes into force, and notes how far everything is.
    async fn read_until(&self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut turns = turns(self.every);
        loop {
            tokio::select! {
                _ = turns.tick() => {}
                () = self.due.added.notified() => {}
                () = &mut stopped => break,
            }
            self.read().await;
        }
    }

    async fn read(&self) {
        let Common { service, .. } = &*self.common;
        let mut unread = self.due.take();
        let Some(up_to) = unread.up_to else { return };
        // Nobody waits until a secret's change is in force everywhere: there may be many, and
        // they are announced with the next turn.
        let is_awaited = unread.tokens || unread.migration || unread.tenants || unread.master_keys;
        // Tokens first, because they have the least time.
        if unread.tokens {
            match service.access.reload().await {
                Ok(()) => unread.tokens = false,
                Err(error) => tracing::warn!(%error, "tokens have changed and could not be read; trying again"),
            }
        }
        if std::mem::take(&mut unread.migration) {
            self.common.make_room().await;
        }
        if unread.tenants {
            match service.resolver.follow().await {
                Ok(()) => unread.tenants = false,
                Err(error) => tracing::warn!(%error, "tenants have changed and could not be read; trying again"),
            }
        }
        if std::mem::take(&mut unread.master_keys) {
            self.common.look_for_rotation().await;
        }
        if unread.tokens || unread.tenants {
            service.attachment.note_failure();
            self.due.put_back(unread);
            return;
        }
        if let Some(began) = unread.as_of {
            service.attachment.note_look(began);
        }
        service.resolver.note_followed(up_to);
        self.followed.send_if_modified(|followed| {
            *followed = up_to;
            is_awaited
        });
    }
}

impl Due {
    /// Adds the findings of a look that began at this moment.
    fn add(&self, news: &News, began: Moment) {
        let anything = |of: Change| !news.is_whole || news.changes.contains(&of);
        let mut unread = self.lock();
        unread.tokens |= anything(Change::Tokens);
        unread.migration |= anything(Change::Migration);
        unread.tenants |= anything(Change::Tenants);
        unread.master_keys |= anything(Change::MasterKeys);
        unread.up_to = Some(news.up_to);
        if news.is_to_the_end {
            unread.as_of = Some(began);
        }
        drop(unread);
        self.added.notify_one();
    }

    fn take(&self) -> Unread {
        std::mem::take(&mut *self.lock())
    }

    /// Puts unfinished work back, beside the work that has become due since.
    fn put_back(&self, left: Unread) {
        let mut unread = self.lock();
        unread.tokens |= left.tokens;
        unread.migration |= left.migration;
        unread.tenants |= left.tenants;
        unread.master_keys |= left.master_keys;
        unread.up_to = unread.up_to.or(left.up_to);
    }

    fn lock(&self) -> MutexGuard<'_, Unread> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Listens for changes until `stopped` completes, on one connection after the other.
pub(super) async fn listen(database: &Database, heard: &Notify, stopped: impl Future<Output = ()>) {
    let listening = async {
        let mut pause = SHORTEST_PAUSE;
        loop {
            let began = Instant::now();
            let Err(error) = database.listen(|| heard.notify_one()).await;
            // A connection that lasted a while is no sign of trouble.
            pause = if began.elapsed() > LONGEST_PAUSE { SHORTEST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
            tracing::debug!(%error, "nobody tells of changes just now; they are asked for");
            tokio::time::sleep(pause).await;
        }
    };
    tokio::select! {
        () = stopped => {}
        () = listening => {}
    }
}
