//! Faults of single secrets in upstream's folder, which do not affect the other secrets of the
//! folder.

use std::collections::{BTreeMap, BTreeSet};

use crate::secret::SecretKey;

/// Why a secret of upstream's cannot be used: it is neither a value nor absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unusable {
    /// Upstream hides its value from our identity.
    Hidden,
    /// The folder has several secrets of that name, with different values.
    Duplicate,
    /// The value is not Unicode text: it has half of a surrogate pair, for example.
    NotText,
    /// The value refers to a secret that exists but cannot be read now.
    Reference,
}

impl Unusable {
    const ALL: [Self; 4] = [Self::Hidden, Self::Duplicate, Self::NotText, Self::Reference];

    /// The word in answers, reports and the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hidden => "hidden",
            Self::Duplicate => "duplicate",
            Self::NotText => "not_text",
            Self::Reference => "reference",
        }
    }

    /// The reason that a word stands for, if this version knows it.
    #[must_use]
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == word)
    }

    /// The fault, and what to do about it.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::Hidden => {
                "upstream hides its value (hidden): let the proxy's identity read values there, not only names"
            }
            Self::Duplicate => {
                "upstream has several secrets of this name with different values (duplicate): delete all but one there"
            }
            Self::NotText => "its value upstream is not Unicode text (not_text): write it again there",
            Self::Reference => {
                "its value refers to a secret that cannot be read just now (reference): see that the folders in \
                 infisical.references exist, and that the proxy's identity may read them"
            }
        }
    }
}

/// Why a reference is not replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unresolved {
    /// There is no such secret.
    NotThere,
    /// It leads into a folder or an environment that the configuration does not allow.
    NotAllowed,
    /// It leads back to itself.
    Cycle,
    /// It leads over more references in sequence than are followed.
    TooDeep,
    /// The value would be too long, or has too many references.
    TooLong,
}

impl Unresolved {
    /// The word in reports and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotThere => "not_there",
            Self::NotAllowed => "not_allowed",
            Self::Cycle => "cycle",
            Self::TooDeep => "too_deep",
            Self::TooLong => "too_long",
        }
    }

    /// The reason as a sentence about a secret.
    #[must_use]
    pub fn explain(self) -> &'static str {
        match self {
            Self::NotThere => "refers to a secret that is not there",
            Self::NotAllowed => "refers to a folder or an environment that infisical.references does not allow",
            Self::Cycle => "refers to itself, or to a secret that does",
            Self::TooDeep => "refers over more than 16 other secrets, one after the other",
            Self::TooLong => "would be longer than 1 MiB with its references replaced, or has more than 1000 of them",
        }
    }
}

/// The faults of a folder: everything in it that is not a usable value as its writer meant it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flaws {
    /// Existing keys whose values cannot be used.
    pub unusable: BTreeMap<SecretKey, Unusable>,
    /// Existing names that are not a valid [`SecretKey`].
    pub names: BTreeSet<String>,
    /// Keys whose values contain a reference that is not replaced.
    pub unresolved: BTreeMap<SecretKey, Unresolved>,
}

impl Flaws {
    /// The approximate size of this in bytes.
    #[must_use]
    pub fn weight(&self) -> usize {
        const EACH: usize = 64;
        let keys = self.unusable.keys().chain(self.unresolved.keys()).map(|key| key.as_str().len() + EACH);
        keys.chain(self.names.iter().map(|name| name.len() + EACH)).sum()
    }
}
