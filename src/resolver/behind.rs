//! Copies in the database that are known to be behind what this instance has answered, and work
//! that an outage of the database has left to be done.
//!
//! **The rule**: an instance never answers older than what it has answered. An answer that was
//! read from upstream is in the database only once it was written back. Where the write-back
//! fails or takes its time, the copy in the database is older than the answer, and would be
//! served again as soon as memory has lost what was read. So each read leaves a *mark* of when it
//! ended before anything of it is answered, and removes it when its write-back has landed. A copy
//! from a read that began before its tenant's mark may be older, and is not believed: upstream is
//! asked, and where upstream fails, only memory may answer.
//!
//! There are two kinds of marks:
//! - *behind*: this instance has answered something later than the copy, or may have. The copy
//!   is not served.
//! - *unconfirmed*: something may have happened that this instance has not answered yet: a write
//!   whose end the database missed, or a denial that an instance met in an outage before it was
//!   killed. Upstream is asked first; where it does not answer, the copy is served as ever.
//!
//! Reads are ordered by the database's clock, never by the values: somebody may set a value
//! back.
//!
//! The interleavings that would break it, and what prevents them:
//! - *The write-back lands before its read has left the mark*: the mark is left before the
//!   write-back begins.
//! - *An older read leaves its mark when a later one has landed*: each read has its own mark. It
//!   is settled by its own write-back, or by that of a read which began after it had ended.
//! - *Another instance's clock is a little ahead*: its copy counts as later than a mark only by
//!   [`CLOCK_TOLERANCE`]. An instance knows its own copy by the read that it is from.
//! - *There are more tenants than marks*: a read that finds no room and is not in the database by
//!   the time it is answered leaves a mark for all tenants. They are read again before their
//!   copies are believed.
//! - *A load found the copy before the mark was left, and a later caller joins it*: loads in
//!   flight are forgotten when a read has landed in memory, before it is answered.
//! - *A load has found the copy, and the write-back lands and takes the mark away before the load
//!   looks for it*: the copy is judged by the [`Watermark`] that was taken before it was read. A
//!   mark that is left after that belongs to an answer that was given after the load began, so
//!   the two may be seen in either order.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::Resolver;
use crate::{
    clock::Timestamp,
    secret::{SecretKey, Writer},
    tenant::Tenant,
    tiers::database::{Company, StoreError, Told, UpstreamWrite},
};

/// The most tenants that have marks of their own.
const MARKS: usize = 10_000;

/// The most denials, and the most ends of writes, that are kept for the database.
const UNRECORDED: usize = 1_000;

/// The most reads of one tenant that are told apart.
const READS: usize = 8;

/// By how much two instances may disagree about the database's clock.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(1);

/// The pause before a folder that could not be written back is read again: the first, the longest.
const SHORTEST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(5 * 60);

/// The most folders that are put into the queue at once.
const AT_ONCE: usize = 100;

/// When a read of upstream began and had its answer: its content was true at some moment in
/// between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) began: Timestamp,
    pub(super) ended: Timestamp,
}

/// The times that a tenant's copy must be later than, as known before the copy was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Watermark {
    /// The end of the last read that was answered and is not known to be in the database.
    answered: Option<Timestamp>,
    /// The time by which something may have happened that was not answered here.
    unconfirmed: Option<Timestamp>,
    /// When the list of upstream's folders was read that lacks the tenant.
    gone: Option<Timestamp>,
}

/// How a tenant's copy compares with what this instance has answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing later is known.
    Current,
    /// Something may have happened since: upstream is to be asked first.
    Unconfirmed,
    /// Something later may have been answered: the copy is not to be served.
    Behind,
}

/// The marks, and the work that an outage has left to be done.
#[derive(Debug, Default)]
pub(super) struct Behind {
    /// Whether there is any mark: the only cost to a lookup where there is none.
    is_any: AtomicBool,
    marks: Mutex<Marks>,
    unrecorded: Mutex<Unrecorded>,
}

#[derive(Debug, Default)]
struct Marks {
    tenants: HashMap<Tenant, Mark>,
    /// A mark for all tenants, for reads that found no room for a mark of their own.
    all: Mark,
}

#[derive(Debug, Clone, Default)]
struct Mark {
    /// Reads that are not, or not yet, in the database. No two began at the same time.
    behind: Vec<Read>,
    unconfirmed: Option<Timestamp>,
    /// When the folder is to be read again for the mark, and how often it was.
    due: Option<Timestamp>,
    tries: u32,
}

/// Events that the database has yet to be told of: it did not answer when they happened.
#[derive(Debug, Default)]
struct Unrecorded {
    /// When upstream refused each tenant's folder.
    denials: HashMap<Tenant, Timestamp>,
    writes: VecDeque<Unended>,
}

/// A write that upstream has done, and whose end the database does not know.
#[derive(Debug)]
pub(super) struct Unended {
    pub(super) write: UpstreamWrite,
    pub(super) key: SecretKey,
    /// When upstream had done it.
    pub(super) at: Timestamp,
    /// The writer, where the database has a copy or may get one.
    pub(super) writer: Option<Writer>,
}

impl Watermark {
    /// How a copy compares that was read in the database after this was taken.
    pub(super) fn standing(&self, company: &Company) -> Standing {
        company.snapshot_at.map_or(Standing::Current, |copy_at| self.standing_of(copy_at))
    }

    fn standing_of(&self, copy_at: Timestamp) -> Standing {
        // A copy that is just after the mark may be before it by another instance's clock.
        let is_before = |mark: Option<Timestamp>| mark.is_some_and(|mark| copy_at <= mark.plus(CLOCK_TOLERANCE));
        // Callers may have been told already that the tenant is gone.
        let is_gone = self.gone.is_some_and(|gone| copy_at < gone);
        match (is_gone || is_before(self.answered), is_before(self.unconfirmed)) {
            (true, _) => Standing::Behind,
            (false, true) => Standing::Unconfirmed,
            (false, false) => Standing::Current,
        }
    }
}

impl Mark {
    fn watermark(&self) -> Watermark {
        let answered = self.behind.iter().map(|read| read.ended).max();
        Watermark { answered, unconfirmed: self.unconfirmed, gone: None }
    }

    fn note_read(&mut self, read: Read) {
        self.behind.push(read);
        if self.behind.len() > READS {
            self.behind.sort_unstable_by_key(|read| read.ended);
            self.behind.remove(0);
            // The first one left stands for the removed one too: only a later read settles it.
            self.behind[0].began = Timestamp::from_millis(i64::MAX);
        }
    }

    /// Removes the marks that a read settles whose outcome is the copy.
    fn settle(&mut self, read: Read) {
        self.behind.retain(|other| other.ended > read.began && other.began != read.began);
        self.unconfirmed = self.unconfirmed.filter(|mark| *mark > read.began);
    }

    fn is_empty(&self) -> bool {
        self.behind.is_empty() && self.unconfirmed.is_none()
    }
}

impl Marks {
    /// The tenant's own mark; `None` where there is no room for it.
    fn mark_of(&mut self, tenant: &Tenant) -> Option<&mut Mark> {
        if self.tenants.len() >= MARKS && !self.tenants.contains_key(tenant) {
            return None;
        }
        Some(self.tenants.entry(tenant.clone()).or_default())
    }
}

impl Behind {
    /// Notes that a read of upstream is about to be answered, and is not in the database yet;
    /// `false` where there is no room for that.
    pub(super) fn note_read(&self, tenant: &Tenant, read: Read) -> bool {
        let mut marks = self.marks();
        let Some(mark) = marks.mark_of(tenant) else { return false };
        mark.note_read(read);
        self.is_any.store(true, Ordering::Release);
        true
    }

    /// Notes the same for every tenant, of a read that found no room for a mark of its own and is
    /// not in the database when it is answered.
    pub(super) fn note_read_for_all(&self, read: Read) {
        self.marks().all.note_read(read);
        self.is_any.store(true, Ordering::Release);
    }

    /// Removes the mark of a read of which nothing is answered.
    pub(super) fn withdraw(&self, tenant: &Tenant, read: Read) {
        self.reduce(tenant, |mark| mark.behind.retain(|other| other.began != read.began));
    }

    /// Notes that something may have happened to a tenant's secrets by `at`.
    pub(super) fn note_doubt(&self, tenant: &Tenant, at: Timestamp) {
        let mut marks = self.marks();
        match marks.mark_of(tenant) {
            Some(mark) => mark.unconfirmed = mark.unconfirmed.max(Some(at)),
            None => marks.all.unconfirmed = marks.all.unconfirmed.max(Some(at)),
        }
        self.is_any.store(true, Ordering::Release);
    }

    /// Notes that something may have happened to any tenant's secrets by `at`.
    pub(super) fn note_doubt_of_all(&self, at: Timestamp) {
        let mut marks = self.marks();
        marks.all.unconfirmed = marks.all.unconfirmed.max(Some(at));
        self.is_any.store(true, Ordering::Release);
    }

    /// Notes that the result of a read is now the tenant's copy.
    pub(super) fn settle(&self, tenant: &Tenant, read: Read) {
        self.reduce(tenant, |mark| mark.settle(read));
    }

    fn reduce(&self, tenant: &Tenant, reduce: impl Fn(&mut Mark)) {
        if !self.is_any.load(Ordering::Acquire) {
            return;
        }
        let mut marks = self.marks();
        if let Some(mark) = marks.tenants.get_mut(tenant) {
            reduce(mark);
            if mark.is_empty() {
                marks.tenants.remove(tenant);
            }
        }
        self.is_any.store(!marks.tenants.is_empty() || !marks.all.is_empty(), Ordering::Release);
    }

    /// The times that a copy of the tenant must be later than if it is read after this call.
    fn watermark(&self, tenant: &Tenant) -> Watermark {
        if !self.is_any.load(Ordering::Acquire) {
            return Watermark::default();
        }
        let marks = self.marks();
        let (own, of_all) = (marks.tenants.get(tenant).map(Mark::watermark).unwrap_or_default(), marks.all.watermark());
        Watermark {
            answered: own.answered.max(of_all.answered),
            unconfirmed: own.unconfirmed.max(of_all.unconfirmed),
            gone: None,
        }
    }

    /// Removes the marks of tenants that were shredded or moved to another owner.
    pub(super) fn forget<'t>(&self, tenants: impl IntoIterator<Item = &'t Tenant>) {
        for tenant in tenants {
            self.reduce(tenant, |mark| *mark = Mark::default());
        }
    }

    /// The tenants whose folders are to be read and written back now. Each is returned again after
    /// a growing pause, for as long as it has a mark.
    fn due(&self, now: Timestamp) -> Vec<Tenant> {
        if !self.is_any.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut marks = self.marks();
        let due = marks.tenants.iter_mut().filter(|(_, mark)| mark.due.is_none_or(|due| due <= now)).take(AT_ONCE);
        let due = due.filter_map(|(tenant, mark)| {
            let is_first = mark.due.is_none();
            let pause = (SHORTEST_PAUSE * 2_u32.saturating_pow(mark.tries.min(10))).min(LONGEST_PAUSE);
            mark.due = Some(now.plus(pause));
            mark.tries += 1;
            // A read that ended a moment ago may be on its way into the database.
            (!is_first).then(|| tenant.clone())
        });
        due.collect()
    }

    /// Keeps a denial for a database that could not be told of it; `false` where there is no room.
    pub(super) fn note_denial(&self, tenant: &Tenant, at: Timestamp) -> bool {
        let mut unrecorded = self.unrecorded();
        let has_room = unrecorded.denials.len() < UNRECORDED || unrecorded.denials.contains_key(tenant);
        if has_room {
            unrecorded.denials.insert(tenant.clone(), at);
        }
        has_room
    }

    /// Keeps the end of a write for the database. When full, the oldest is dropped: its
    /// registration stays in the database, where every instance finds it.
    pub(super) fn note_unended(&self, unended: Unended) {
        let mut unrecorded = self.unrecorded();
        if unrecorded.writes.len() >= UNRECORDED {
            unrecorded.writes.pop_front();
        }
        unrecorded.writes.push_back(unended);
    }

    fn marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unrecorded(&self) -> MutexGuard<'_, Unrecorded> {
        self.unrecorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Resolver {
    /// The times that the tenant's copy must be later than; to be taken before the copy is read.
    pub(super) fn watermark(&self, tenant: &Tenant) -> Watermark {
        Watermark { gone: self.tenant_directory.lacked_at(tenant), ..self.behind.watermark(tenant) }
    }

    /// Does the work that the database missed while it was out: tells it of denials and of the
    /// ends of writes, and queues reads of the folders that were not written back. To be called
    /// now and then while the database answers.
    ///
    /// # Errors
    /// The database does not accept it; the work is kept.
    pub async fn make_up(&self) -> Result<(), StoreError> {
        self.record_denials().await?;
        self.end_writes().await?;
        for tenant in self.behind.due(self.clock.database_now()) {
            // Without a copy, nothing can be behind.
            if !self.may_be_copied(&tenant) || self.database.company(&tenant).await?.is_none() {
                self.behind.forget([&tenant]);
            } else {
                self.queue_refresh(&tenant);
            }
        }
        Ok(())
    }

    /// Finds writes that any instance has sent to upstream and whose end is unknown, because the
    /// instance was killed or the database was out. Copies from before are confirmed first.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn find_unended_writes(&self) -> Result<(), StoreError> {
        for (tenant, until) in self.database.unended_writes().await? {
            if self.may_be_copied(&tenant) {
                self.behind.note_doubt(&tenant, until);
            }
        }
        Ok(())
    }

    async fn record_denials(&self) -> Result<(), StoreError> {
        let denials: Vec<_> =
            self.behind.unrecorded().denials.iter().map(|(tenant, at)| (tenant.clone(), *at)).collect();
        for (tenant, at) in denials {
            // A read that has succeeded since has withdrawn the denial.
            if self.is_denied(tenant.as_str()) {
                self.database.deny(&tenant, at).await?;
            }
            let mut unrecorded = self.behind.unrecorded();
            if unrecorded.denials.get(&tenant) == Some(&at) {
                unrecorded.denials.remove(&tenant);
            }
        }
        Ok(())
    }

    async fn end_writes(&self) -> Result<(), StoreError> {
        loop {
            // Taken out first: nobody else ends it meanwhile.
            let Some(unended) = self.behind.unrecorded().writes.pop_front() else { return Ok(()) };
            if let Err(error) = self.end_write(&unended).await {
                self.behind.unrecorded().writes.push_front(unended);
                return Err(error);
            }
        }
    }

    async fn end_write(&self, Unended { write, key, at, writer }: &Unended) -> Result<(), StoreError> {
        let company = self.database.company(write.tenant()).await?;
        // The write's outcome may have been read and stored since: then nothing is to be forgotten.
        let is_copied =
            company.and_then(|company| company.snapshot_at).is_some_and(|copied| copied > at.plus(CLOCK_TOLERANCE));
        let told = match writer {
            Some(_) if is_copied => Told::Nothing,
            Some(writer) => Told::Copied(key, writer),
            None => Told::Uncopied(key),
        };
        self.database.end_upstream_write(write, told).await?;
        if !matches!(told, Told::Nothing) {
            self.changed(write.tenant(), key);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1000)
    }

    /// A read that took no time.
    fn read(seconds: i64) -> Read {
        Read { began: at(seconds), ended: at(seconds) }
    }

    fn standing(behind: &Behind, tenant: &Tenant, copy_at: i64) -> Standing {
        behind.watermark(tenant).standing_of(at(copy_at))
    }

    fn tenant(name: &str) -> Tenant {
        name.parse().unwrap()
    }

    #[test]
    fn a_copy_from_before_an_answer_is_behind_until_one_from_after_has_landed() {
        let (behind, acme) = (Behind::default(), tenant("acme"));
        assert_eq!(standing(&behind, &acme, 1), Standing::Current);
        behind.note_read(&acme, read(10));
        assert_eq!(standing(&behind, &acme, 1), Standing::Behind);
        assert_eq!(standing(&behind, &acme, 10), Standing::Behind, "it may be from before by another's clock");
        assert_eq!(standing(&behind, &acme, 20), Standing::Current);
        assert_eq!(standing(&behind, &tenant("globex"), 1), Standing::Current);
        behind.settle(&acme, read(9));
        assert_eq!(standing(&behind, &acme, 1), Standing::Behind, "an older read settles nothing");
        behind.settle(&acme, read(10));
        assert_eq!(standing(&behind, &acme, 10), Standing::Current);
    }

    #[test]
    fn a_copy_that_was_found_before_its_mark_went_is_judged_by_the_mark() {
        let (behind, acme) = (Behind::default(), tenant("acme"));
        behind.note_read(&acme, read(10));
        let watermark = behind.watermark(&acme);
        behind.settle(&acme, read(10));
        assert_eq!(watermark.standing_of(at(1)), Standing::Behind);
        assert_eq!(standing(&behind, &acme, 1), Standing::Current, "nothing later is in the way any more");
    }

    #[test]
    fn of_reads_that_overlap_each_is_settled_by_itself_or_a_later_one() {
        let (behind, acme) = (Behind::default(), tenant("acme"));
        let (long, short) = (Read { began: at(1), ended: at(50) }, Read { began: at(20), ended: at(30) });
        behind.note_read(&acme, long);
        behind.note_read(&acme, short);
        behind.settle(&acme, short);
        assert_eq!(standing(&behind, &acme, 20), Standing::Behind, "the long one may have seen something later");
        behind.settle(&acme, long);
        assert_eq!(standing(&behind, &acme, 20), Standing::Current);
        for number in 0..20 {
            behind.note_read(&acme, Read { began: at(2 + number), ended: at(100 + number) });
        }
        assert_eq!(behind.marks().tenants[&acme].behind.len(), READS);
        behind.settle(&acme, read(200));
        assert_eq!(standing(&behind, &acme, 20), Standing::Current);
    }

    #[test]
    fn a_doubt_is_less_than_an_answer_and_holds_beside_it() {
        let (behind, acme) = (Behind::default(), tenant("acme"));
        behind.note_doubt(&acme, at(20));
        behind.note_read(&acme, read(10));
        assert_eq!(standing(&behind, &acme, 5), Standing::Behind);
        behind.settle(&acme, read(10));
        assert_eq!(standing(&behind, &acme, 15), Standing::Unconfirmed);
        behind.note_doubt_of_all(at(40));
        behind.settle(&acme, read(30));
        assert_eq!(standing(&behind, &acme, 30), Standing::Unconfirmed);
        assert_eq!(standing(&behind, &acme, 50), Standing::Current);
    }

    #[test]
    fn where_marks_do_not_fit_every_copy_from_before_is_behind_once_a_read_was_not_stored() {
        let behind = Behind::default();
        for number in 0..MARKS {
            assert!(behind.note_read(&tenant(&format!("t{number}")), read(1)));
        }
        assert!(!behind.note_read(&tenant("one-more"), read(10)), "there is no room");
        assert!(behind.note_read(&tenant("t0"), read(10)), "who has a mark needs none");
        assert_eq!(standing(&behind, &tenant("one-more"), 5), Standing::Current, "it may be stored yet");
        behind.note_read_for_all(read(10));
        assert_eq!(standing(&behind, &tenant("one-more"), 5), Standing::Behind);
        assert_eq!(standing(&behind, &tenant("nobody"), 5), Standing::Behind);
        assert_eq!(standing(&behind, &tenant("nobody"), 20), Standing::Current);
        assert_eq!(behind.marks().tenants.len(), MARKS);
    }

    #[test]
    fn a_folder_is_read_again_for_its_mark_after_pauses_that_grow() {
        let (behind, acme) = (Behind::default(), tenant("acme"));
        behind.note_read(&acme, read(0));
        assert!(behind.due(at(0)).is_empty(), "it may just be on its way");
        let given: Vec<i64> = (1..60).filter(|second| !behind.due(at(*second)).is_empty()).collect();
        assert_eq!(given, [2, 6, 14, 30]);
        behind.settle(&acme, read(0));
        assert!(behind.due(at(1_000)).is_empty());
    }
}
