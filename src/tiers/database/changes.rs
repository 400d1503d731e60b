//! The feed: the changes in the database, which running instances follow.
//!
//! Each change is a row, written in the transaction that makes it. Its number comes from one
//! counter, which is raised last and stays locked until the commit: numbers are given in the order
//! of the commits and have no gaps. So an instance that has seen a number has seen all before it,
//! and one that asks for later numbers misses none, however long it was away. With numbers from a
//! sequence, one of a slow transaction would turn up behind one that was read already.
//!
//! A database that is restored from a backup gives numbers again, to other changes. So each change
//! also has a random mark, and an instance that asks for the changes after a number remembers the
//! mark that it has seen there. Another mark means another history, and so does a counter that has
//! fallen behind that number.
//!
//! PostgreSQL notifies listeners that there are new changes. A notification may be lost with its
//! connection: then the next poll, which comes every `poll_interval` anyway, finds the change.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use diesel::{ExpressionMethods as _, QueryDsl as _, Queryable};

use super::{
    Database,
    calls::Call,
    error::StoreError,
    prepared::Prepared,
    rows::{NewChange, ROWS},
    schema::{changes, counters},
    time::DatabaseNow,
};
use crate::{secret::SecretKey, tenant::Tenant};

const COUNTER: &str = "changes";

/// The smallest number of changes that are kept. An instance that has missed more of them takes
/// everything for changed.
const KEPT: i64 = 10_000;

/// How many more there may be: older changes are removed a few at a time.
const TRIMMED_AT_ONCE: i64 = 100;

/// The number of changes that are read at once.
const AT_ONCE: i64 = 1_000;

/// Up to this many changes of one tenant's secrets are told one by one; more are told as one change
/// of the folder.
const ONE_BY_ONE: usize = 32;

/// Something that has changed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Change {
    /// The tokens: who may ask.
    Tokens,
    /// Tenants' own phases, or which of them were shredded.
    Tenants,
    /// The state of a migration.
    Migration,
    /// The set of master keys to hold.
    MasterKeys,
    /// One secret, at its owner or in the copy.
    Secret(Tenant, SecretKey),
    /// A tenant's secrets, or many of them.
    Folder(Tenant),
    /// Upstream refuses us the tenant's folder.
    Denial(Tenant),
    /// The tenant's folder has changed upstream, according to a webhook.
    Webhook(Tenant),
}

/// A place in the feed: the number of a change, and its random mark, which tells it from the change
/// that had this number before the database was restored from a backup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The change's number; 0 where there was none yet.
    pub number: i64,
    /// Its mark; 0 where it has none.
    pub mark: i64,
}

/// A change with its place in the feed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Numbered {
    /// Where it is in the feed.
    pub place: Place,
    /// The change itself.
    pub change: Change,
}

/// The changes since a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// The changes that others made, and those that the process that made them must follow too.
    pub changes: Vec<Change>,
    /// The changes of secrets and of their owners, whoever made them.
    pub of_secrets: Vec<Numbered>,
    /// The place after which these are the changes; `None` where it is not known.
    pub first: Option<Place>,
    /// The place of the last change that was read; `None` where it is not known.
    pub last: Option<Place>,
    /// The number up to which these are the changes.
    pub up_to: i64,
    /// Whether these are all; if not, anything may have changed.
    pub is_whole: bool,
    /// Whether these reach the last change that there was at the time of the question: of many
    /// changes, only some are read at once.
    pub is_to_the_end: bool,
    /// Whether the database was set back to an older state: it has another history now.
    pub is_set_back: bool,
}

/// The marks of the changes up to which callers have asked lately, each as it was read. There is
/// more than one because several callers ask, each from its own number.
#[derive(Debug, Default)]
pub(super) struct Seen(Mutex<BTreeMap<i64, Option<i64>>>);

impl Seen {
    const MOST: usize = 64;

    fn note(&self, number: i64, mark: Option<i64>) {
        let mut seen = self.lock();
        seen.insert(number, mark);
        while seen.len() > Self::MOST {
            seen.pop_first();
        }
    }

    /// Whether the change of that number is another one than was seen before.
    fn is_other(&self, number: i64, mark: Option<i64>) -> bool {
        self.lock().get(&number).is_some_and(|seen| *seen != mark)
    }

    /// Forgets the marks, because the history is another one.
    fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<i64, Option<i64>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Queryable)]
struct Row {
    number: i64,
    what: String,
    subdomain: Option<String>,
    secret_key: Option<String>,
    made_by: String,
    mark: Option<i64>,
}

impl Change {
    fn what(&self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Tenants => "tenants",
            Self::Migration => "migration",
            Self::MasterKeys => "master_keys",
            Self::Secret(..) => "secret",
            Self::Folder(_) => "folder",
            Self::Denial(_) => "denial",
            Self::Webhook(_) => "notice",
        }
    }

    fn tenant(&self) -> Option<&Tenant> {
        match self {
            Self::Tokens | Self::Tenants | Self::Migration | Self::MasterKeys => None,
            Self::Secret(tenant, _) | Self::Folder(tenant) | Self::Denial(tenant) | Self::Webhook(tenant) => {
                Some(tenant)
            }
        }
    }

    /// Whether the process that makes the change has applied it itself by the commit.
    fn is_known_to_its_maker(&self) -> bool {
        matches!(self, Self::Secret(..) | Self::Folder(_) | Self::Denial(_) | Self::Webhook(_))
    }

    /// Whether it may give a secret another value.
    fn is_of_secrets(&self) -> bool {
        matches!(self, Self::Secret(..) | Self::Folder(_) | Self::Tenants)
    }

    /// The changes that tell that these secrets of a tenant have changed.
    pub(super) fn of_secrets(tenant: &Tenant, keys: Vec<SecretKey>) -> Vec<Self> {
        match keys.len() {
            0..=ONE_BY_ONE => keys.into_iter().map(|key| Self::Secret(tenant.clone(), key)).collect(),
            _ => vec![Self::Folder(tenant.clone())],
        }
    }
}

impl Row {
    fn place(&self) -> Place {
        Place { number: self.number, mark: self.mark.unwrap_or_default() }
    }

    /// The change that the row stands for; `None` where this program is too old to know its kind.
    fn change(&self) -> Option<Change> {
        let tenant = || self.subdomain.as_ref()?.parse::<Tenant>().ok();
        Some(match self.what.as_str() {
            "tokens" => Change::Tokens,
            "tenants" => Change::Tenants,
            "migration" => Change::Migration,
            "master_keys" => Change::MasterKeys,
            "secret" => Change::Secret(tenant()?, self.secret_key.as_ref()?.parse().ok()?),
            "folder" => Change::Folder(tenant()?),
            "denial" => Change::Denial(tenant()?),
            "notice" => Change::Webhook(tenant()?),
            _ => return None,
        })
    }
}

impl Database {
    /// The number of the last change.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn changes(&self) -> Result<i64, StoreError> {
        let mut call = self.calls.read("changes").await?;
        let number = call.first(counters::table.find(COUNTER).select(counters::value)).await?;
        call.done();
        Ok(number.unwrap_or(0))
    }

    /// The number of the last change of this kind that is kept; where none is kept, a later number
    /// than the last one had. A caller that waits until that number is in force everywhere waits
    /// for all changes of this kind.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn last_change(&self, kind: &Change) -> Result<i64, StoreError> {
        let mut call = self.calls.read("last_change").await?;
        let newest = changes::table.filter(changes::what.eq(kind.what())).order(changes::number.desc());
        let oldest_kept = changes::table.order(changes::number.asc()).limit(1).select(changes::number);
        let mut number: Option<i64> = call.first(newest.limit(1).select(changes::number)).await?;
        if number.is_none() {
            number = call.first(oldest_kept).await?;
        }
        call.done();
        Ok(number.unwrap_or(0))
    }

    /// The changes after the change of this number: cheap enough to ask twice a second. The
    /// database's clock is read in the same query.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn changes_after(&self, number: i64) -> Result<News, StoreError> {
        let mut call = self.calls.read("changes_after").await?;
        // The known change is read too: if its row is gone, others behind it may be gone as well.
        let rows = changes::table.filter(changes::number.ge(number)).order(changes::number.asc()).limit(AT_ONCE);
        let asked_at = self.clock.running();
        let rows: Vec<(Row, Option<i64>)> = call.load(rows.select((changes::all_columns, DatabaseNow))).await?;
        self.note_time(rows.last().and_then(|(_, now)| *now), asked_at);
        let first = rows.split_first().filter(|((first, _), _)| first.number == number);
        let is_other = first.is_some_and(|((first, _), _)| self.seen.is_other(number, first.mark));
        let Some(((first, _), new)) = first.filter(|_| !is_other) else {
            let asked_at = self.clock.running();
            let last = counters::table.find(COUNTER).select((counters::value, DatabaseNow));
            let (up_to, now) = call.first::<_, (i64, Option<i64>)>(last).await?.unwrap_or_default();
            call.done();
            self.note_time(now, asked_at);
            let is_set_back = is_other || up_to < number;
            if is_set_back {
                self.seen.forget();
            }
            // Where the counter has not moved, only that row is gone, and there is nothing after
            // it.
            let is_whole = up_to == number && !is_other;
            return Ok(News {
                changes: Vec::new(),
                of_secrets: Vec::new(),
                first: None,
                last: None,
                up_to,
                is_whole,
                is_to_the_end: true,
                is_set_back,
            });
        };
        call.done();
        self.seen.note(number, first.mark);
        // Read after the rows: a change under a name that ends meanwhile does not count as ours.
        let maker = self.calls.maker.name();
        let is_to_the_end = i64::try_from(rows.len()).is_ok_and(|rows| rows < AT_ONCE);
        let mut news = News {
            changes: Vec::new(),
            of_secrets: Vec::new(),
            first: Some(first.place()),
            last: rows.last().map(|(row, _)| row.place()),
            up_to: number,
            is_whole: true,
            is_to_the_end,
            is_set_back: false,
        };
        if let Some((last, _)) = new.last() {
            self.seen.note(last.number, last.mark);
        }
        for (row, _) in new {
            news.up_to = row.number;
            let change = row.change();
            if let Some(change) = change.as_ref().filter(|change| change.is_of_secrets()) {
                news.of_secrets.push(Numbered { place: row.place(), change: change.clone() });
            }
            match change {
                Some(change) if row.made_by == maker && change.is_known_to_its_maker() => {}
                Some(change) => news.changes.push(change),
                None => news.is_whole = false,
            }
        }
        Ok(news)
    }

    /// The changes of secrets and of their owners behind a place, up to a number; `None` where they
    /// cannot be told, because they are too many, are trimmed, or follow another history.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn changes_between(&self, after: Place, up_to: i64) -> Result<Option<Vec<Numbered>>, StoreError> {
        let mut call = self.calls.read("changes_between").await?;
        let rows = changes::table.filter(changes::number.between(after.number, up_to));
        let rows = rows.order(changes::number.asc()).limit(AT_ONCE).select(changes::all_columns);
        let rows: Vec<Row> = call.load(rows).await?;
        call.done();
        let begins_there = rows.first().is_some_and(|first| first.place() == after);
        let ends_there = rows.last().is_some_and(|last| last.number == up_to);
        if !begins_there || !ends_there || rows.iter().any(|row| row.change().is_none()) {
            return Ok(None);
        }
        let numbered = rows.into_iter().filter(|row| row.number > after.number).filter_map(|row| {
            let change = row.change().filter(Change::is_of_secrets)?;
            Some(Numbered { place: row.place(), change })
        });
        Ok(Some(numbered.collect()))
    }

    /// Tells other instances that these tenants' folders have changed upstream.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn announce_webhooks(&self, tenants: &[Tenant]) -> Result<(), StoreError> {
        let write = || async {
            let mut call = self.calls.write("announce_webhooks").await?;
            let told: Vec<Change> = tenants.iter().cloned().map(Change::Webhook).collect();
            self.raise_all(&mut call, &told).await?;
            call.commit().await
        };
        self.calls.repeated(write).await
    }

    /// Writes down what the transaction changes, and returns its number. Call it last: every other
    /// transaction that makes a change waits from here to the commit.
    pub(super) async fn raise(&self, call: &mut Call<'_>, made: Change) -> Result<i64, StoreError> {
        self.number(call, &[made]).await
    }

    /// The same for no change, or several.
    pub(super) async fn raise_all(&self, call: &mut Call<'_>, made: &[Change]) -> Result<(), StoreError> {
        if made.is_empty() {
            return Ok(());
        }
        self.number(call, made).await.map(drop)
    }

    async fn number(&self, call: &mut Call<'_>, made: &[Change]) -> Result<i64, StoreError> {
        let count = i64::try_from(made.len()).unwrap_or(i64::MAX);
        let raise = diesel::update(counters::table.find(COUNTER)).set(counters::value.eq(counters::value + count));
        let last: Option<i64> = call.first(Prepared(raise.returning(counters::value))).await?;
        let last = last.ok_or_else(|| StoreError::broken("the counter of changes is gone"))?;
        let maker = self.calls.maker.name();
        let row = |(number, change): (i64, &Change)| NewChange {
            number,
            what: change.what(),
            subdomain: change.tenant().map(|tenant| tenant.as_str().to_owned()),
            secret_key: match change {
                Change::Secret(_, key) => Some(key.as_str().to_owned()),
                _ => None,
            },
            made_by: maker.clone(),
            mark: Some(rand::random()),
        };
        let numbered: Vec<(i64, &Change)> = (last - count + 1..).zip(made).collect();
        for chunk in numbered.chunks(ROWS) {
            call.insert_changes(chunk.iter().copied().map(row).collect()).await?;
        }
        if last / TRIMMED_AT_ONCE != (last - count) / TRIMMED_AT_ONCE {
            call.execute(diesel::delete(changes::table.filter(changes::number.le(last - KEPT)))).await?;
        }
        call.notify().await?;
        Ok(last)
    }

    /// Calls `heard` whenever something has changed, and once when notifications are sure to
    /// arrive, for as long as the connection lasts. With a database that sends no notifications,
    /// this waits for ever.
    ///
    /// # Errors
    /// The reason why there is no such connection, or no more.
    pub async fn listen(&self, heard: impl Fn() + Send) -> Result<std::convert::Infallible, StoreError> {
        self.calls
            .pool
            .listen(heard)
            .await
            .map_err(|source| StoreError::Unavailable { retry_after: super::error::SHORTEST_BREAK, source })
    }
}
