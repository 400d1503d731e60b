//! Replays of what strangers and small tokens can try to make an instance spend, each judged by
//! the bounds that `docs/SECURITY.md` tells. `examples/attack` and the tests share them.

#![allow(dead_code, reason = "the tests use the short form of this")]

mod attacks;
mod caller;
mod frames;
mod memory;
mod stage;

use std::time::Duration;

use clap::ValueEnum;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{task::spawn_blocking, time::sleep};

use self::{
    attacks::Saw,
    caller::{Calls, GoodCallers},
    memory::{Kind, Watch},
    stage::{Audit, Stage},
};

pub(crate) use self::stage::Program;

const MB: u64 = 1_000_000;

/// How much more may be left, and how long after.
const LEFT: u64 = 20 * MB;
const AFTER: Duration = Duration::from_secs(10);

/// Rows of denials: ten times `audit.denials_per_second` at once, and as many a second for half a minute.
const DENIALS: u64 = 4000;

/// What is tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Attack {
    /// 300 HTTP/2 connections with 256 requests each, without a token
    Storm,
    /// The same with 1,000 connections
    GreatStorm,
    /// 100,000 requests that are refused before anybody is known by them, each different
    Malformed,
    /// Requests with large headers that are denied
    Denied,
    /// Logins of Infisical's clients with wrong credentials, and access tokens that are none
    Logins,
    /// Bodies that are half sent
    SlowBodies,
    /// 100 lists of 16 MiB that nobody reads
    Unread,
    /// Eight connections that list 16 MiB all the time
    Lists,
    /// 64 forged notices that do not end
    Notices,
    /// Requests that are reset at once
    Resets,
    /// Heads and uploads that do not end
    Unfinished,
}

/// How much of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Against a release build: latency counts too.
    Long,
    /// Against any build: memory, disk and counts alone.
    Short,
}

impl Form {
    fn choose<T>(self, long: T, short: T) -> T {
        match self {
            Self::Long => long,
            Self::Short => short,
        }
    }
}

/// What the attack may cost at most.
struct Bounds {
    /// Bytes of memory beyond those of before.
    more: u64,
    /// All of its memory, in bytes.
    in_all: Option<u64>,
    /// Rows of the audit, but for the good caller's.
    rows: u64,
    /// Lines of the log, but for those of the good caller's writes.
    lines: usize,
    /// Bytes on the disk.
    disk: u64,
    /// A good caller's reads: 95 of 100 are faster, for each time that it took before.
    times: Option<f64>,
    /// The same as a duration.
    p95: Option<Duration>,
    /// None of a good caller's writes takes longer.
    write: Option<Duration>,
}

impl Attack {
    fn bounds(self, form: Form, limit: Option<u64>) -> Bounds {
        let usual = Bounds {
            more: 60 * MB,
            in_all: None,
            rows: 1000,
            lines: 500,
            disk: 16 * MB,
            times: None,
            p95: Some(Duration::from_millis(50)),
            write: None,
        };
        match self {
            // A connection has its own buffers, whatever it asks for. It is over before a good caller has
            // asked often enough to tell one answer of twenty.
            Self::Storm => Bounds { more: 60 * MB * form.choose(300, 100) / 300, rows: DENIALS, p95: None, ..usual },
            Self::GreatStorm => {
                let in_all = limit.unwrap_or(512 << 20);
                Bounds { more: in_all, in_all: Some(in_all), rows: DENIALS, ..usual }
            }
            Self::Malformed => Bounds { write: Some(Duration::from_millis(500)), p95: None, ..usual },
            Self::Denied | Self::Logins => Bounds { rows: DENIALS, disk: 24 * MB, p95: None, ..usual },
            // server.max_bodies, and the buffers of the connections.
            Self::SlowBodies | Self::Unfinished => Bounds { more: 96 * MB, ..usual },
            // Each secret of a list is on record once a window.
            Self::Unread => Bounds { more: 128 * MB, rows: form.choose(4000, 1000), p95: None, ..usual },
            // Lists that are being made or taken, and those that were freed in the seconds before.
            Self::Lists => {
                Bounds { more: 256 * MB, rows: form.choose(4000, 1000), times: Some(3.0), p95: None, ..usual }
            }
            Self::Notices | Self::Resets => usual,
        }
    }

    async fn run(self, stage: &Stage, form: Form) -> Saw {
        match self {
            Self::Storm => attacks::storm(stage, form.choose(300, 100)).await,
            Self::GreatStorm => attacks::storm(stage, 1000).await,
            Self::Malformed => attacks::malformed(stage, form.choose(100_000, 3000)).await,
            Self::Denied => attacks::denied(stage, form.choose(100_000, 3000)).await,
            Self::Logins => attacks::logins(stage, form.choose(100_000, 3000)).await,
            Self::SlowBodies => attacks::slow_bodies(stage, form).await,
            Self::Unread => attacks::unread(stage, form).await,
            Self::Lists => attacks::lists(stage, form).await,
            Self::Notices => attacks::notices(stage, form).await,
            Self::Resets => attacks::resets(stage, form).await,
            Self::Unfinished => attacks::unfinished(stage, form).await,
        }
    }
}

/// What was seen of one attack.
pub(crate) struct Observed {
    pub(crate) attack: Attack,
    /// What the attackers saw.
    pub(crate) told: String,
    /// Before, at most, and a while after.
    pub(crate) memory: [u64; 3],
    /// Before and after.
    pub(crate) disk: [u64; 2],
    /// How many requests of others than the good caller were answered, where that is counted.
    pub(crate) answered: u64,
    /// The audit's rows that came with it, but for the good caller's.
    pub(crate) rows: u64,
    /// How many requests these account for.
    pub(crate) accounted: u64,
    /// Of the log.
    pub(crate) lines: usize,
    /// Of a good caller, before and during the attack.
    pub(crate) reads: [Calls; 2],
    pub(crate) writes: [Calls; 2],
    /// How the bounds were not kept.
    pub(crate) beyond: Vec<String>,
}

/// Tries it against an instance of its own. `limit` is what memory may be taken in all by a storm of 1,000.
pub(crate) async fn replay(attack: Attack, form: Form, program: &Program, limit: Option<u64>) -> Observed {
    let mut stage = Stage::set(program, form).await;
    let process = stage.process();
    let kind = form.choose(Kind::Resident, Kind::Own);
    if matches!(attack, Attack::Unread | Attack::Lists) {
        stage.fill_large(form);
    }
    let quiet = GoodCallers::start(&stage);
    sleep(form.choose(Duration::from_secs(2), Duration::from_millis(300))).await;
    let before = end(quiet).await;
    // What the filling took is given back.
    sleep(form.choose(Duration::from_secs(1), Duration::from_millis(300))).await;
    let (memory, disk, audit, lines) = (kind.of(process), stage.disk(), stage.audit(), stage.log().lines().count());
    let (watch, callers) = (Watch::begin(kind, process), GoodCallers::start(&stage));
    let saw = attack.run(&stage, form).await;
    let during = end(callers).await;
    let most = watch.end();
    let wanted = audit.requests + saw.answered as u64;
    let is_settled = || kind.of(process) <= memory + LEFT && stage.audit().requests >= wanted;
    after_a_while(form, is_settled).await;
    let Audit { rows, requests } = stage.audit();
    let [[reads, writes], [reads_then, writes_then]] = [before, during];
    let mut observed = Observed {
        attack,
        told: saw.told,
        answered: saw.answered as u64,
        memory: [memory, most, kind.of(process)],
        disk: [disk, stage.disk()],
        rows: rows - audit.rows,
        accounted: requests - audit.requests,
        lines: stage.log().lines().count() - lines,
        reads: [reads, reads_then],
        writes: [writes, writes_then],
        beyond: saw.wrong.into_iter().collect(),
    };
    if !stage.is_alive() {
        observed.beyond.push("it has ended".to_owned());
    }
    observed.judge(&attack.bounds(form, limit), form);
    observed
}

/// The callers' last requests are answered on threads of their own; waiting for them blocks none of ours.
async fn end(callers: GoodCallers) -> [Calls; 2] {
    spawn_blocking(|| callers.end()).await.unwrap()
}

/// Waits ten seconds; in the short form, no longer than until all is settled.
async fn after_a_while(form: Form, is_settled: impl Fn() -> bool) {
    const STEP: Duration = Duration::from_millis(100);
    let mut waited = Duration::ZERO;
    while waited < AFTER && (form == Form::Long || !is_settled()) {
        sleep(STEP).await;
        waited += STEP;
    }
}

impl Observed {
    fn judge(&mut self, bounds: &Bounds, form: Form) {
        let [before, most, after] = self.memory;
        let mut judge = |is_kept: bool, what: String| {
            if !is_kept {
                self.beyond.push(what);
            }
        };
        judge(
            most <= before + bounds.more,
            format!("{} more memory, and {} were allowed", mb(most.saturating_sub(before)), mb(bounds.more)),
        );
        judge(
            after <= before + LEFT,
            format!(
                "{} of memory are left after {AFTER:?}, and {} were allowed",
                mb(after - before.min(after)),
                mb(LEFT)
            ),
        );
        if let Some(in_all) = bounds.in_all {
            judge(most <= in_all, format!("{} of memory in all, and {} were allowed", mb(most), mb(in_all)));
        }
        judge(self.rows < bounds.rows, format!("{} rows, and fewer than {} were allowed", self.rows, bounds.rows));
        let (answered, accounted) = (self.answered, self.accounted);
        let lines = self.lines.saturating_sub(self.writes[1].count());
        judge(accounted >= answered, format!("of {answered} requests that were answered, {accounted} are on record"));
        judge(lines <= bounds.lines, format!("{lines} lines of the log, and {} were allowed", bounds.lines));
        let grown = self.disk[1].saturating_sub(self.disk[0]);
        judge(grown <= bounds.disk, format!("{} on the disk, and {} were allowed", mb(grown), mb(bounds.disk)));
        for (what, calls) in [("read", &self.reads[1]), ("write", &self.writes[1])] {
            let first = calls.failed.first().map(String::as_str).unwrap_or_default();
            let (failed, all) = (calls.failed.len(), calls.count());
            judge(calls.failed.is_empty(), format!("{failed} of a good caller's {all} {what}s failed: {first}"));
        }
        if form == Form::Short {
            return;
        }
        let [quiet, then] = [0, 1].map(|number| self.reads[number].at(0.95));
        if let Some(p95) = bounds.p95 {
            judge(then < p95, format!("a good caller's p95 was {then:.1?}, and less than {p95:.0?} was allowed"));
        }
        if let Some(times) = bounds.times {
            let ratio = then.as_secs_f64() / quiet.as_secs_f64();
            judge(ratio <= times, format!("others' p95 was {ratio:.1} times that of before, and {times} were allowed"));
        }
        if let Some(write) = bounds.write {
            let longest = self.writes[1].longest();
            judge(longest <= write, format!("a good caller's write took {longest:.0?}, and {write:.0?} were allowed"));
        }
    }
}

/// Bytes, as people read them.
pub(crate) fn mb(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / MB as f64)
}

/// As many files as this process may have at most, for connections; what it starts may have as many.
pub(crate) fn allow_connections() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}
