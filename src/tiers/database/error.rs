//! The errors of the database tier.

use std::time::Duration;

use diesel::result::{DatabaseErrorKind, Error};

use crate::{
    log,
    sealing::{OpenError, SealError},
};

/// How long to stay away at first from a database that did not answer.
pub(super) const SHORTEST_BREAK: Duration = Duration::from_millis(250);

/// The time until a refused write is worth another try: somebody has to repair the cause first.
const UNWRITABLE_FOR: Duration = Duration::from_secs(5);

/// Why the database gave no answer. It never contains a value or the URL's password.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It does not answer, or not in time, or has failed so often that it is left alone for a
    /// while. Whether a write that ends so was done is not known.
    #[error("the database does not answer")]
    Unavailable {
        /// Time until it is worth asking again.
        retry_after: Duration,
        /// The failure.
        source: Cause,
    },
    /// It answers, and refuses the query; or a row holds data that this program never writes.
    #[error("the database refuses a query")]
    Broken(#[source] Cause),
    /// It answers, and nothing can be written: it is read-only, or its disk is full.
    #[error("the database takes no writes: it is read-only, or its disk is full")]
    Unwritable(#[source] Cause),
    /// It rolled the whole operation back for the sake of concurrent ones, again and again: it is
    /// certain that nothing was done.
    #[error("the database undid this for the sake of what it did at the same time")]
    Undone {
        /// How long the operation might still have taken.
        left: Duration,
        /// The database's message.
        source: Cause,
    },
    /// The URL leads to a connection pooler that gives us no session of our own.
    #[error(
        "[database] url leads to a connection pooler that lets its clients take turns in the same sessions (as PgBouncer \
         does with pool_mode transaction or statement), and secretier keeps locks and settings in its own; set the \
         pooler to pool_mode = session for this database, or write a url that leads to PostgreSQL itself"
    )]
    SharedSessions,
    /// Nothing can be sealed.
    #[error("the secret cannot be sealed")]
    Sealing(#[from] SealError),
    /// The rows belong to another environment.
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
    /// The tables were made by a newer version, and this one is too old for them.
    #[error(
        "the database's tables are those of a newer version of secretier: their last change is number {found}, who uses them \
         must know number {needed}, and this version knows number {known}; install the version that made them, or the one before it"
    )]
    NewerTables {
        /// The last migration that was applied.
        found: String,
        /// The last migration that this program knows.
        known: String,
        /// The oldest migration that a program must know.
        needed: String,
    },
    /// The tables could not be made or brought up to date.
    #[error("the database's tables cannot be brought up to date")]
    Migration(#[source] Cause),
    /// The URL is invalid.
    #[error("[database] url: {0}")]
    InvalidUrl(String),
    /// Another setting is invalid.
    #[error("[database] {0}")]
    InvalidConfig(&'static str),
    /// A token of this name exists, perhaps a revoked one.
    #[error("a token named {0:?} exists already, in use or revoked; choose another name")]
    NameTaken(String),
    /// A row is not as a process with a master key left it, or cannot be sealed here.
    #[error("{0}")]
    Seals(String),
    /// Another process has taken over this work.
    #[error("another process has taken over what this one was doing, because it was not heard of for a while")]
    LeaseLost,
}

impl StoreError {
    /// Whether something was to be sealed, and no master key is known.
    #[must_use]
    pub fn needs_master_key(&self) -> bool {
        matches!(self, Self::Sealing(SealError::NoMasterKey))
    }

    /// The time until it is worth asking again, where that is known.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unavailable { retry_after, .. } => Some(*retry_after),
            Self::Undone { .. } => Some(SHORTEST_BREAK),
            Self::Unwritable(_) => Some(UNWRITABLE_FOR),
            _ => None,
        }
    }

    /// Whether the database did not answer, rather than refused.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    pub(super) fn broken(cause: impl Into<String>) -> Self {
        Self::Broken(Cause(cause.into()))
    }
}

/// The message of the database, or of the connection to it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Cause(pub(super) String);

impl Cause {
    /// An error with all its sources, in one line.
    pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> Self {
        Self(log::chain(error))
    }
}

/// The meaning of a database's error, with its SQLSTATE where that is known
/// (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judgement {
    /// It did not answer, or not in time.
    Outage(Option<&'static str>),
    /// It rolled the whole transaction back for the sake of concurrent ones.
    Undone(&'static str),
    /// It refused the statement.
    Refused(Option<&'static str>),
    /// It refused a write, because nothing can be written.
    Unwritable(Option<&'static str>),
}

impl Judgement {
    pub(super) fn of(error: &Error) -> Self {
        let Error::DatabaseError(kind, details) = error else { return Self::Refused(None) };
        match kind {
            DatabaseErrorKind::ClosedConnection | DatabaseErrorKind::UnableToSendCommand => Self::Outage(None),
            DatabaseErrorKind::RestrictViolation => Self::Refused(Some("23001")),
            DatabaseErrorKind::NotNullViolation => Self::Refused(Some("23502")),
            DatabaseErrorKind::ForeignKeyViolation => Self::Refused(Some("23503")),
            DatabaseErrorKind::UniqueViolation => Self::Refused(Some("23505")),
            DatabaseErrorKind::CheckViolation => Self::Refused(Some("23514")),
            DatabaseErrorKind::ExclusionViolation => Self::Refused(Some("23P01")),
            DatabaseErrorKind::ReadOnlyTransaction => Self::Unwritable(Some("25006")),
            DatabaseErrorKind::SerializationFailure => Self::Undone("40001"),
            _ => Self::of_words(details.message()),
        }
    }

    /// diesel keeps the code of few errors; most have only the message of PostgreSQL or SQLite.
    fn of_words(message: &str) -> Self {
        const SAID: [(&str, Judgement); 21] = [
            ("database is locked", Judgement::Outage(None)),
            ("database table is locked", Judgement::Outage(None)),
            ("disk I/O error", Judgement::Outage(None)),
            ("deadlock detected", Judgement::Undone("40P01")),
            ("canceling statement due to lock timeout", Judgement::Outage(Some("55P03"))),
            ("canceling statement due to", Judgement::Outage(Some("57014"))),
            ("terminating connection due to idle-in-transaction timeout", Judgement::Outage(Some("25P03"))),
            ("terminating connection due to idle-session timeout", Judgement::Outage(Some("57P05"))),
            ("terminating connection because of crash", Judgement::Outage(Some("57P02"))),
            ("terminating connection", Judgement::Outage(Some("57P01"))),
            ("the database system is", Judgement::Outage(Some("57P03"))),
            // From PgBouncer, where a server has gone or has no session for us.
            ("server conn crashed", Judgement::Outage(Some("08P01"))),
            ("query_wait_timeout", Judgement::Outage(Some("08P01"))),
            ("permission denied", Judgement::Refused(Some("42501"))),
            ("attempt to write a readonly database", Judgement::Unwritable(None)),
            ("database or disk is full", Judgement::Unwritable(None)),
            ("could not extend file", Judgement::Unwritable(Some("53100"))),
            ("No space left on device", Judgement::Unwritable(Some("53100"))),
            ("out of memory", Judgement::Refused(Some("53200"))),
            ("out of shared memory", Judgement::Refused(Some("53200"))),
            ("current transaction is aborted", Judgement::Refused(Some("25P02"))),
        ];
        let known = SAID.iter().find(|(said, _)| message.contains(said));
        known.map_or(Self::Refused(None), |(_, judgement)| *judgement)
    }

    /// Whether the connection ended, rather than a statement.
    pub(super) fn is_of_the_connection(self) -> bool {
        matches!(self, Self::Outage(code) if !matches!(code, Some("55P03" | "57014")))
    }
}

/// Why a write was not done.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The secret is not at the version that the caller's precondition names.
    #[error("the secret has changed, or is not there, or is there already; read it again")]
    Conflict,
    /// The tenant no longer has the phase by which the database was chosen as the owner.
    #[error("the tenant has changed hands; choose the owner anew")]
    Moved,
    /// The version to be restored is not kept, or is a deletion.
    #[error("no value of that version is kept")]
    NoVersion,
    /// The version to be restored was revoked by a rotation.
    #[error("the version was revoked by a rotation")]
    Revoked,
    /// The version to be restored does not open.
    #[error("the version does not open")]
    Unreadable(#[source] OpenError),
    /// The database tier failed.
    #[error("the database tier failed")]
    Store(#[from] StoreError),
}
