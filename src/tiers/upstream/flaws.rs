//! Logs the faults of secrets in folders, once each.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use super::{Oddity, OddityKind};

/// The faults that were last logged for each folder, so that each is logged once.
#[derive(Default)]
pub(super) struct ToldFlaws(Mutex<HashMap<String, Vec<Oddity>>>);

impl ToldFlaws {
    /// The number of folders that are remembered; with more of them, some are logged again.
    const MOST: usize = 1000;

    /// Logs the names that are left out of a folder, or whose values are served as they are
    /// written; once, until the folder's faults change.
    pub(super) fn tell(&self, folder: &str, oddities: &[Oddity]) {
        const TOLD: usize = 10;
        if !self.are_news(folder, oddities) {
            return;
        }
        let named = oddities.iter().take(TOLD).map(|Oddity { name, kind }| {
            let reason = match kind {
                OddityKind::InvalidName => "invalid_name",
                OddityKind::Unusable(reason) => reason.as_str(),
                OddityKind::Reference(reason) => reason.as_str(),
            };
            format!("{name:?}: {reason}")
        });
        let keys = named.collect::<Vec<_>>().join(", ");
        let count = oddities.len();
        tracing::warn!(
            folder,
            count,
            keys,
            "secrets of a folder cannot be used, or hold references that stay as they are written"
        );
    }

    /// Whether they differ from those that were logged last.
    fn are_news(&self, folder: &str, oddities: &[Oddity]) -> bool {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if oddities.is_empty() {
            told.remove(folder);
            return false;
        }
        if told.get(folder).is_some_and(|before| before == oddities) {
            return false;
        }
        if told.len() >= Self::MOST {
            told.clear();
        }
        told.insert(folder.to_owned(), oddities.to_vec());
        true
    }
}
