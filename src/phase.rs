//! The phase: the owner of a tenant's secrets, and so which tiers may answer.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A tenant's place on the way from Infisical to the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Phase 1: Infisical owns the secrets; the database holds no copy.
    Infisical,
    /// Infisical owns the secrets; the database holds a write-back copy.
    Hybrid,
    /// Phase 2: the database owns the secrets; Infisical is a backup.
    Database,
}

impl Phase {
    /// Every phase, in the order a migration passes them.
    pub const ALL: [Self; 3] = [Self::Infisical, Self::Hybrid, Self::Database];

    /// The name used in configuration, database and answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Infisical => "infisical",
            Self::Hybrid => "hybrid",
            Self::Database => "database",
        }
    }

    /// Whether the database may answer in this phase.
    #[must_use]
    pub fn reads_database(self) -> bool {
        matches!(self, Self::Hybrid | Self::Database)
    }

    /// Whether Infisical owns the secrets in this phase.
    #[must_use]
    pub fn owned_upstream(self) -> bool {
        matches!(self, Self::Infisical | Self::Hybrid)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Phase {
    type Err = InvalidPhase;

    fn from_str(name: &str) -> Result<Self, InvalidPhase> {
        Self::ALL.into_iter().find(|phase| phase.as_str() == name).ok_or(InvalidPhase)
    }
}

/// A word that names no phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a phase is one of \"infisical\", \"hybrid\", \"database\"")]
pub struct InvalidPhase;
