//! Tells in the log what is wrong with the secrets of folders, once.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use super::{Oddity, OddityKind};

/// What was last told of each folder's flaws, so that it is told once.
#[derive(Default)]
pub(super) struct ToldFlaws(Mutex<HashMap<String, Vec<Oddity>>>);

impl ToldFlaws {
    /// Folders that are kept in mind; with more of them, some are told of again.
    const MOST: usize = 1000;

    /// Names in the log what is left out of a folder, or served as it is written; once, until it
    /// is otherwise.
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

    /// Whether they are others than those that were told last.
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
