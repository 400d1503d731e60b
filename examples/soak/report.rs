//! What was done and seen, as a table in the end.

use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::model::{Model, lock};

/// Wrong answers that are told one by one; more are counted.
const TOLD: u64 = 50;

pub(crate) struct Report {
    began: Instant,
    counts: Mutex<BTreeMap<(&'static str, String), u64>>,
    wrong: Mutex<u64>,
    memory: Mutex<[Vec<u64>; 2]>,
}

impl Report {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now(), counts: Mutex::default(), wrong: Mutex::default(), memory: Mutex::default() }
    }

    pub(crate) fn request(&self, what: &str) {
        self.count("requests", what);
    }

    pub(crate) fn answer(&self, what: &str, tier: Option<&str>, status: u16, code: Option<&str>) {
        if let Some(tier) = tier {
            self.count("answers by tier", tier);
        }
        match code {
            Some(code) => self.count("errors by cause", &format!("{status} {code}")),
            None if tier.is_none() => self.count("answers without a tier", &format!("{what} {status}")),
            None => {}
        }
    }

    pub(crate) fn unanswered(&self) {
        self.count("errors by cause", "no connection: killed, or not up again");
    }

    pub(crate) fn fault(&self, what: &str) {
        self.count("faults", what);
    }

    /// Notes an answer that may not be.
    pub(crate) fn wrong(&self, what: &str) {
        let mut wrong = lock(&self.wrong);
        *wrong += 1;
        if *wrong <= TOLD {
            println!("WRONG after {:.1} s: {what}", self.began.elapsed().as_secs_f64());
        }
    }

    pub(crate) fn memory_at_start(&self, resident: &[u64]) {
        lock(&self.memory)[0] = resident.to_vec();
    }

    pub(crate) fn memory_at_end(&self, resident: &[u64]) {
        lock(&self.memory)[1] = resident.to_vec();
    }

    /// Prints the table; tells whether no answer was wrong.
    pub(crate) fn print(&self, model: &Model, seed: u64) -> bool {
        let row = |what: &str, number: String| println!("  {what:<44} {number:>14}");
        println!("\nsoak of {:.1} s, seed {seed}", self.began.elapsed().as_secs_f64());
        let mut group = "";
        for ((of, what), number) in lock(&self.counts).iter() {
            if *of != group {
                println!("{of}");
                group = of;
            }
            row(what, number.to_string());
        }
        println!("oldest value served after an acknowledged change, by owner");
        for owner in ["infisical", "database"] {
            let oldest = model.oldest(owner);
            row(&format!("{owner}: at the instance that changed it"), seconds(oldest.by_same_instance));
            row(&format!("{owner}: at the others"), seconds(oldest.by_others));
        }
        row("changed in Infisical itself", seconds(model.oldest("infisical").after_infisical));
        println!("memory at start and end");
        let memory = lock(&self.memory);
        for (number, (start, end)) in memory[0].iter().zip(&memory[1]).enumerate() {
            row(&format!("instance {number}"), format!("{} {} KiB", start, end));
        }
        let wrong = *lock(&self.wrong);
        println!("wrong answers");
        row("in all", wrong.to_string());
        wrong == 0
    }

    fn count(&self, of: &'static str, what: &str) {
        *lock(&self.counts).entry((of, what.to_owned())).or_default() += 1;
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.3} s", duration.as_secs_f64())
}
