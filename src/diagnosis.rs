//! The findings of `secretier doctor`: a list that grows while each part of the system is examined.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// It works, and should be looked at.
    Warning,
    /// It does not work.
    Failure,
}

impl Outcome {
    /// The word in the report.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failure => "failure",
        }
    }
}

/// The result of one check. It never contains a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The part of the system.
    pub area: &'static str,
    /// The check, unique within its area.
    pub check: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// The result in words.
    pub text: String,
    /// The remedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// The findings so far. Several areas may be examined at once: each has its own list, so that what
/// one of them found stands together, and stands even if the rest of its checks never end.
#[derive(Debug)]
pub struct Area {
    name: &'static str,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    findings: Vec<Finding>,
    doing: &'static str,
}

impl Area {
    /// An area that nothing is known of yet.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        Self { name, state: Mutex::default() }
    }

    /// Notes which check begins.
    pub fn begins(&self, check: &'static str) {
        self.lock().doing = check;
    }

    /// All is well.
    pub fn ok(&self, check: &'static str, text: impl Into<String>) {
        self.note(check, Outcome::Ok, text.into(), None);
    }

    /// It works, and should be looked at.
    pub fn warning(&self, check: &'static str, text: impl Into<String>, advice: impl Into<String>) {
        self.note(check, Outcome::Warning, text.into(), Some(advice.into()));
    }

    /// It does not work.
    pub fn failure(&self, check: &'static str, text: impl Into<String>, advice: impl Into<String>) {
        self.note(check, Outcome::Failure, text.into(), Some(advice.into()));
    }

    /// The check that was begun last has not ended.
    pub fn ran_out_of_time(&self) {
        let doing = self.lock().doing;
        self.failure(
            doing,
            "this had not ended when the time was up",
            "check what it waits for: a network, a disk, a lock",
        );
    }

    /// All findings of this area.
    #[must_use]
    pub fn into_findings(self) -> Vec<Finding> {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).findings
    }

    fn note(&self, check: &'static str, outcome: Outcome, text: String, advice: Option<String>) {
        self.lock().findings.push(Finding { area: self.name, check, outcome, text, advice });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
