//! The source of the secrets that a migration takes over: each read of a tenant is a new one.

use std::{borrow::Cow, fmt};

use futures_util::future::BoxFuture;

use crate::{
    clock::Timestamp,
    tenant::Tenant,
    tiers::upstream::{Snapshot, UpstreamError},
};

/// A place that secrets are taken over from. It is only read.
pub trait Origin: Send + Sync {
    /// The tenants that are there, in the order of their names.
    fn tenants(&self) -> BoxFuture<'_, Result<Listed, OriginError>>;

    /// Everything there is for each of these tenants, in their order, read now: nothing is
    /// kept from one call to the next, so that two calls are independent of each other.
    fn read<'a>(&'a self, tenants: &'a [Tenant]) -> BoxFuture<'a, Vec<Result<Content, OriginError>>>;

    /// Whether reading all tenants at once is the cheapest way, however many they are.
    fn reads_all_at_once(&self) -> bool {
        false
    }

    /// Notes for the operator about the reads since the last call.
    fn told(&self) -> Vec<String> {
        Vec::new()
    }
}

/// The tenants of an origin.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// The tenants that can be migrated, by name.
    pub tenants: Vec<Tenant>,
    /// Names there that cannot be a tenant's.
    pub unusable: Vec<String>,
}

/// The content of an origin for one tenant.
#[derive(Debug)]
pub struct Content {
    /// Its secrets, each key once.
    pub snapshot: Snapshot,
    /// Entries that are not, or not certainly, among the secrets.
    pub problems: Vec<Problem>,
    /// When the read began, by the database's clock.
    pub began: Timestamp,
}

/// An entry of an origin that cannot be taken over as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The secret's name there, as it is written.
    pub name: String,
    /// The kind of fault.
    pub kind: ProblemKind,
    /// More detail, to be written after the name; `None` where the kind says it all.
    pub detail: Option<Cow<'static, str>>,
}

/// The kinds of faults of a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProblemKind {
    /// The database does not take such a name.
    Name,
    /// Several of one name have different values. None of them is served today.
    Duplicate,
    /// The value holds a reference that stays as it is written.
    Reference,
    /// The value does not open, or is not one that the database takes.
    Value,
}

impl ProblemKind {
    /// The word used on the command line and in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Duplicate => "duplicate",
            Self::Reference => "reference",
            Self::Value => "value",
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        if let Some(detail) = &self.detail {
            return write!(f, "{name:?} {detail}");
        }
        match self.kind {
            ProblemKind::Name => {
                write!(f, "{name:?} cannot be a secret's name here: 1 to 255 bytes, no control characters")
            }
            ProblemKind::Duplicate => write!(f, "{name:?} is there more than once; delete all but one"),
            ProblemKind::Reference => write!(f, "{name:?} holds a reference that stays as it is written"),
            ProblemKind::Value => write!(f, "the value of {name:?} cannot be read"),
        }
    }
}

/// Why a tenant, or the list of them, could not be read. Never holds a value.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OriginError {
    /// Upstream gave no answer.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// The folder is not there any more.
    #[error("the tenant's folder is not there any more")]
    Missing,
    /// It reads as empty, and the list that would tell whether it exists is refused.
    #[error("the tenant's folder reads as empty, and upstream refuses the list that tells an empty folder from none")]
    Unlisted,
    /// So many cannot be read at once after all: they must be read in smaller rounds.
    #[error("so many tenants cannot be read at once")]
    TooMany,
    /// The tables gave no answer.
    #[error("the source database does not answer: {0}")]
    Table(String),
}

impl OriginError {
    /// Whether the same would happen for every other tenant: the origin does not answer even after
    /// a wait, or accepts no calls of ours.
    #[must_use]
    pub fn is_of_all(&self) -> bool {
        match self {
            Self::Upstream(error) => matches!(
                error,
                UpstreamError::Down { .. }
                    | UpstreamError::LoginRefused { .. }
                    | UpstreamError::RateLimited { .. }
                    | UpstreamError::Unreachable { .. }
            ),
            Self::Table(_) => true,
            Self::Missing | Self::Unlisted | Self::TooMany => false,
        }
    }
}
