//! What can go wrong in this tier.

use std::time::Duration;

use crate::{
    log,
    sealing::{OpenError, SealError},
};

/// Why the database gave no answer. Never holds a value, nor the URL's password.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It does not answer, or not in time, or has failed so often that it is left alone
    /// for a while. A write that ends so may or may not have been done.
    #[error("the database does not answer")]
    Unavailable {
        /// Time until it is worth asking again.
        retry_after: Duration,
        /// What happened.
        source: Cause,
    },
    /// It answers, and refuses the query; or a row holds what this program never wrote.
    #[error("the database refuses a query")]
    Broken(#[source] Cause),
    /// Nothing can be sealed.
    #[error("the secret cannot be sealed")]
    Sealing(#[from] SealError),
    /// The rows are of another environment.
    #[error(
        "the database holds the secrets of environment {stored:?} and this instance serves {configured:?}; \
         correct `environment`, or give each environment its own [database] url or schema"
    )]
    Environment {
        /// The environment the database was made for.
        stored: String,
        /// The environment in the configuration.
        configured: String,
    },
    /// The tables could not be made or brought up to date.
    #[error("the database's tables cannot be brought up to date")]
    Migration(#[source] Cause),
    /// The URL is not taken.
    #[error("[database] url: {0}")]
    InvalidUrl(String),
    /// Another setting is not taken.
    #[error("[database] {0}")]
    InvalidConfig(&'static str),
    /// A token of this name exists, perhaps a revoked one.
    #[error("a token named {0:?} exists already, in use or revoked; choose another name")]
    NameTaken(String),
    /// A row is not as somebody with a master key left it, or cannot be sealed here.
    #[error("{0}")]
    Seals(String),
    /// Another process has taken over what this one was doing.
    #[error("another process has taken over what this one was doing, because it was not heard of for a while")]
    LeaseLost,
}

impl StoreError {
    /// When it is worth asking again, where that is known.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unavailable { retry_after, .. } => Some(*retry_after),
            _ => None,
        }
    }

    /// Whether it did not answer, rather than that it refused.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    pub(super) fn broken(cause: impl Into<String>) -> Self {
        Self::Broken(Cause(cause.into()))
    }
}

/// What the database, or the way to it, said.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Cause(pub(super) String);

impl Cause {
    /// An error with everything below it, in one line.
    pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> Self {
        Self(log::chain(error))
    }
}

/// Why a write was not done.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The secret is not at the version that the caller's precondition names.
    #[error("the secret has changed, or is not there, or is there already; read it again")]
    Conflict,
    /// The tenant's own phase is not the one by which the database was chosen as the owner.
    #[error("the tenant has changed hands; choose the owner anew")]
    Moved,
    /// The version that is to come back is not kept, or is a deletion.
    #[error("no value of that version is kept")]
    NoVersion,
    /// The version that is to come back does not open.
    #[error("the version does not open")]
    Unreadable(#[source] OpenError),
    /// The tier failed.
    #[error("the database tier failed")]
    Store(#[from] StoreError),
}
