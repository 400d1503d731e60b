//! The tier that owned the secrets first: read a folder at a time, written one secret at a time. A
//! new upstream is a folder here and one arm in this file.

mod cause;
pub mod directory;
mod flaws;
pub mod infisical;
mod settings;
pub mod standin;
mod webhook;

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;

use self::flaws::ToldFlaws;
pub use self::{
    cause::Cause,
    settings::{BuildError, Config, Settings},
    webhook::{About, Unverified, Webhook, WebhookCall},
};
pub use crate::snapshot::{Oddity, OddityKind, Snapshot, UpstreamSecret};
use crate::{
    clock::{Clock, Timestamp},
    diagnosis::Area,
    metrics::Metrics,
    references::{self, Texts},
    secret::{SecretKey, SecretValue},
    tenant::Tenant,
    withheld::Withheld,
};

/// The source of tenants' secrets in the phases `infisical` and `hybrid`.
///
/// Every call keeps to the configured budget of requests a minute, and ends within the configured
/// timeout, whatever the server does. [`Self::everything`], which is long and which no caller waits
/// for, ends within ten times the timeout.
pub trait Upstream: Send + Sync {
    /// The tenants that exist: the sub-folders of the tenants' folder.
    fn tenants(&self, lane: Lane) -> BoxFuture<'_, Result<Folders, UpstreamError>>;

    /// Whether this instance is configured to serve the tenant from upstream. Of a shared folder that it is
    /// not, it knows nothing: neither that it is there nor that it is not.
    fn serves(&self, tenant: &Tenant) -> bool {
        tenant.shared_folder().is_none()
    }

    /// Whether a secret in the tenant's folder is one of our own master keys.
    fn withholds(&self, _tenant: &Tenant, _key: &SecretKey) -> bool {
        false
    }

    /// Reads everything in one tenant's folder. With `known`, the validator of a snapshot that the
    /// caller still holds, an unchanged folder is not sent again.
    ///
    /// A folder that does not exist reads as an empty snapshot: only [`Self::tenants`] shows the
    /// difference.
    fn snapshot<'a>(
        &'a self,
        tenant: &'a Tenant,
        known: Option<&'a str>,
        lane: Lane,
    ) -> BoxFuture<'a, Result<Fetched, UpstreamError>>;

    /// Resolves the references in texts of a tenant's folder that the caller holds: returns those
    /// texts that contain references, by name. Uses the other folders as they are held here, and
    /// calls nothing.
    fn resolve<'a>(&self, tenant: &Tenant, texts: Texts<'a>) -> HashMap<&'a str, references::Resolved>;

    /// Reads all tenants' folders that may be read, in one call.
    ///
    /// A tenant is missing from the result if its folder is empty, and also if its folder is denied
    /// to us: only [`Self::tenants`] and [`Self::snapshot`] show the difference.
    fn everything(&self, lane: Lane) -> BoxFuture<'_, Result<Everything, UpstreamError>>;

    /// The tenants in whose folders something was changed at `since` or later, by upstream's clock;
    /// `None` where this server cannot tell.
    ///
    /// A folder that is gone is not reported, nor is one whose imports have changed; a secret that
    /// was deleted may not be. So this only makes the reported folders be read sooner, and proves
    /// nothing.
    fn changed_since(
        &self,
        since: Timestamp,
        lane: Lane,
    ) -> BoxFuture<'_, Result<Option<Vec<ChangedFolder>>, UpstreamError>>;

    /// Fingerprints of all tenants' folders, by one call. With `known`, the validator of the answer
    /// before, nothing is sent again where nothing has changed in any of them.
    ///
    /// Imported secrets are not in it, nor are folders that are denied to us: as in
    /// [`Self::everything`].
    fn overview<'a>(&'a self, known: Option<&'a str>, lane: Lane) -> BoxFuture<'a, Result<Overview, UpstreamError>>;

    /// Whether upstream would keep a secret as it is: its name, and its value, unless it is to be
    /// deleted. Every write is checked with this before anything is sent; a caller that must know
    /// before a write begins calls it itself.
    ///
    /// # Errors
    /// The part that upstream would alter, or cannot accept.
    fn check(&self, key: &SecretKey, value: Option<&SecretValue>) -> Result<(), Unstorable>;

    /// Creates or changes one secret, and creates the tenant's folder where it is missing; `true`
    /// if there was no such secret.
    fn put<'a>(
        &'a self,
        tenant: &'a Tenant,
        key: &'a SecretKey,
        value: &'a SecretValue,
    ) -> BoxFuture<'a, Result<bool, UpstreamError>>;

    /// Deletes one secret; `false` if there was none.
    fn delete<'a>(&'a self, tenant: &'a Tenant, key: &'a SecretKey) -> BoxFuture<'a, Result<bool, UpstreamError>>;

    /// Creates a tenant's folder, and the folders above it; an existing one stays as it is.
    fn create_folder<'a>(&'a self, tenant: &'a Tenant) -> BoxFuture<'a, Result<(), UpstreamError>>;

    /// Deletes a tenant's folder; `false` if there was none. Refused where the folder contains folders.
    fn remove_folder<'a>(
        &'a self,
        tenant: &'a Tenant,
        removal: Removal,
        lane: Lane,
    ) -> BoxFuture<'a, Result<bool, UpstreamError>>;

    /// Reads secrets of one folder outside the tenants' folders, by their names and in that order:
    /// master keys. One call, however many names.
    fn read<'a>(
        &'a self,
        folder: &'a str,
        names: &'a [&'a str],
        lane: Lane,
    ) -> BoxFuture<'a, Result<Vec<Option<SecretValue>>, UpstreamError>>;

    /// Whether a folder above the tenants' folders has no secrets of its own.
    fn is_bare<'a>(&'a self, _folder: &'a str) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        Box::pin(async { Ok(true) })
    }

    /// Creates or changes one secret in an existing folder outside the tenants' folders.
    fn write<'a>(
        &'a self,
        folder: &'a str,
        name: &'a SecretKey,
        value: &'a SecretValue,
    ) -> BoxFuture<'a, Result<(), UpstreamError>>;

    /// Leaves a migration in another process its share of the budget, until `is_shared` is `false`.
    fn share_budget(&self, is_shared: bool);

    /// Continues with the rest of the budget of an instance that ran in this one's place before.
    fn resume_budget(&self, before: Before);

    /// Prepares other settings, to be applied while calls are made: requests a minute, timeout and
    /// login. The others stay as they were built.
    ///
    /// # Errors
    /// The setting that is wrong; nothing has changed then.
    fn reconfigure(&self, settings: Config<'_>) -> Result<Reconfigured<'_>, BuildError>;

    /// Whether a value with `${...}` in it refers to other secrets there, rather than being that
    /// text.
    fn reads_references(&self) -> bool;

    /// Verifies this upstream's webhooks, if it sends any.
    fn webhook(&self) -> Option<Arc<dyn Webhook>>;

    /// The state after the last calls, without making one.
    fn health(&self) -> Health;

    /// While it is left alone after failures: finds out, at no cost to the budget, whether it
    /// answers again. By itself an upstream is only tried in its time.
    fn notice_recovery(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    /// Tries step by step what lookups and writes need, for `secretier doctor`. Changes nothing.
    fn examine<'a>(&'a self, settings: Config<'a>, area: &'a Area) -> BoxFuture<'a, ()>;
}

/// The part of a folder that may be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// The folder with the secrets in it.
    Whole,
    /// Only a folder without secrets.
    Empty,
}

/// The budget of an instance that ran before, as far as it is known.
pub enum Before {
    /// The use of the budget according to the book; from now on the book also records this
    /// instance's use.
    Told {
        /// The time until all of the budget will have come back.
        whole_in: Duration,
        /// The book.
        book: Arc<dyn BudgetBook>,
    },
    /// The book cannot be read.
    Unknown,
}

/// Records an instance's use of its budget, for the instance that replaces it.
pub trait BudgetBook: Send + Sync {
    /// Records the time until all of the budget will have come back; `false` where that fails.
    fn note(&self, whole_in: Duration) -> BoxFuture<'_, bool>;
}

/// Prepared settings: applying them cannot fail.
#[must_use]
pub struct Reconfigured<'a> {
    has_new_login: bool,
    apply: Box<dyn FnOnce() + Send + 'a>,
}

impl<'a> Reconfigured<'a> {
    /// Settings that `apply` applies.
    pub fn new(has_new_login: bool, apply: impl FnOnce() + Send + 'a) -> Self {
        Self { has_new_login, apply: Box::new(apply) }
    }

    /// Settings without changes.
    pub fn unchanged() -> Self {
        Self::new(false, || ())
    }

    /// Whether the login differs, wherever it is written.
    #[must_use]
    pub fn has_new_login(&self) -> bool {
        self.has_new_login
    }

    /// Applies them, for calls that begin from now on.
    pub fn apply(self) {
        (self.apply)();
    }
}

/// Builds the configured upstream, if there is one.
///
/// # Errors
/// The setting that is wrong.
pub fn build(
    config: Option<Config<'_>>,
    environment: &str,
    withheld: &Withheld,
    clock: &Clock,
    metrics: &Arc<Metrics>,
) -> Result<Option<Arc<dyn Upstream>>, BuildError> {
    config.map(|config| config.settings().build(environment, withheld, clock, metrics)).transpose()
}

/// The priority of a caller when the budget is short, the highest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// A caller waits: may use the whole budget, and waits for it briefly.
    Interactive,
    /// No caller waits, and changes are looked for, or were found, or whether upstream is well again:
    /// may use a quarter of the budget that refreshes may not, and theirs as well. It never waits.
    Changes,
    /// No caller waits: may use half of the budget, and never waits for it.
    Refresh,
    /// Has the lowest priority: may use the migration's own share of the budget, and never waits;
    /// the caller comes back at the time in the error ([`UpstreamError::OutOfBudget`]).
    Migration,
}

/// The sub-folders of the tenants' folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Folders {
    /// The tenants, by name.
    pub tenants: Vec<Tenant>,
    /// Names there that no tenant can have, in order.
    pub unusable: Vec<String>,
}

/// A tenant's folder in which something was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedFolder {
    /// The tenant that may be meant: more tenants may be reported than were changed.
    pub tenant: Tenant,
    /// The time of the change by upstream's clock, where upstream reports it.
    pub at: Option<Timestamp>,
}

/// The answer to a request for a snapshot.
#[derive(Debug)]
pub enum Fetched {
    /// The folder as it is now.
    Changed(Snapshot),
    /// The folder is unchanged since the known snapshot.
    Unchanged,
}

/// The result of one call for all tenants' folders.
#[derive(Debug, Default)]
pub struct Everything {
    /// The secrets of each tenant that has some, without a validator.
    pub tenants: HashMap<Tenant, Snapshot>,
    /// Whether a folder imports another. Imported secrets are then missing from all of `tenants`,
    /// because the answer does not say which folder imports them: folders must be read one by one.
    pub has_imports: bool,
}

/// The result of one call for the fingerprints of all tenants' folders.
#[derive(Debug)]
pub enum Overview {
    /// Nothing has changed since the known answer.
    Unchanged,
    /// As the folders are now.
    Folders {
        /// The validator of this answer, where there is one.
        validator: Option<String>,
        /// Each tenant that has secrets.
        tenants: HashMap<Tenant, Fingerprint>,
        /// Whether a folder imports another: a change there shows in no fingerprint.
        has_imports: bool,
        /// The length of the answer, in bytes.
        length: usize,
    },
    /// It cannot be had in one call: the answer would be too long, or this upstream has none.
    Untold,
}

/// Stands for the content of a tenant's folder: it differs where the content does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint {
    /// A hash under a key of this process, of no use outside of it.
    pub hash: u128,
    /// The time of the last change of a secret that is still there, by upstream's clock.
    pub newest: Option<Timestamp>,
}

/// The upstream tier's state, known without a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// The last state.
    pub state: UpstreamState,
    /// Why it is not `Up`, where that is known.
    pub cause: Option<Cause>,
    /// The number of calls that could be made at once, now; `None` where calls are not counted.
    pub budget_left: Option<u32>,
}

/// The state of upstream at its last answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpstreamState {
    /// Not called yet.
    Unknown,
    /// It answers.
    Up,
    /// It does not answer, or answers that it is broken.
    Down,
    /// It refuses our login.
    LoginRefused,
    /// It asked us to stay away for a while (429).
    RateLimited,
    /// It answers, but has nothing under the configured project, environment or path.
    Rejected,
}

impl UpstreamState {
    /// All states.
    pub const ALL: [Self; 6] =
        [Self::Unknown, Self::Up, Self::Down, Self::LoginRefused, Self::RateLimited, Self::Rejected];

    /// The word used in answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down => "down",
            Self::LoginRefused => "login_refused",
            Self::RateLimited => "rate_limited",
            Self::Rejected => "rejected",
        }
    }
}

/// Why upstream gave no answer. It never contains a value, nor anything that the server sent.
#[derive(Debug, Clone, thiserror::Error)]
pub enum UpstreamError {
    /// The folder is denied to us although the login is valid. This is an answer, not a failure.
    #[error("the upstream refuses this folder to our identity")]
    Denied,
    /// Our own login is refused.
    #[error("{}", .cause.advice())]
    LoginRefused {
        /// Why.
        cause: Cause,
        /// Time until another login is tried.
        retry_after: Duration,
    },
    /// The configured requests a minute are used up.
    #[error("the budget of upstream requests a minute is used up")]
    OutOfBudget {
        /// Time until the budget allows a call.
        retry_after: Duration,
    },
    /// Upstream answered 429.
    #[error("the upstream limits our rate")]
    RateLimited {
        /// Time until upstream accepts calls again.
        retry_after: Duration,
    },
    /// It failed so often that it is not called for a while.
    #[error("the upstream has failed repeatedly and is left alone for a while{}", .cause.map(|cause| format!(": {}", cause.advice())).unwrap_or_default())]
    Down {
        /// Why the last call failed.
        cause: Option<Cause>,
        /// Time until the next trial call.
        retry_after: Duration,
    },
    /// No answer within the timeout.
    #[error("the upstream did not answer in time")]
    TimedOut,
    /// No connection, or a broken one.
    #[error("{}: {reason}", if .cause.is_of_proxy() { "there is no connection through infisical.proxy" } else { "the upstream cannot be reached" })]
    Unreachable {
        /// Why, in one word.
        cause: Cause,
        /// Why, in the system's words.
        reason: String,
    },
    /// Something else answers at the configured address.
    #[error("{} (it answers with status {status})", Cause::NotInfisical.advice())]
    Foreign {
        /// Its status.
        status: u16,
    },
    /// An answer that says that the server is broken.
    #[error("the upstream failed with status {0}")]
    Failed(u16),
    /// An answer that we cannot parse.
    #[error("the upstream's answer cannot be read: {0}")]
    Malformed(&'static str),
    /// A folder was read, but another folder that it refers to could not be.
    #[error("a folder that the tenant's refers to cannot be read")]
    Incomplete,
    /// A request that upstream does not accept: because of a wrong project or environment, for
    /// example.
    #[error("the upstream rejects the request with status {status}: {hint}")]
    Rejected {
        /// Its status.
        status: u16,
        /// Why, in one word.
        cause: Cause,
        /// The setting to check.
        hint: &'static str,
    },
    /// A write that upstream would not store unchanged.
    #[error(transparent)]
    Unstorable(#[from] Unstorable),
    /// A write that upstream holds back until somebody approves it there.
    #[error("the upstream holds this change back for approval")]
    AwaitsApproval,
}

/// The part of a secret that upstream would alter, or cannot accept; and what to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unstorable {
    /// Its name.
    #[error("{0}")]
    Name(&'static str),
    /// Its value.
    #[error("{0}")]
    Value(&'static str),
    /// This upstream is read-only.
    #[error("{0}")]
    ReadOnly(&'static str),
    /// The size of name and value, with the rest of the request.
    #[error(
        "the value is too long for the upstream, which takes up to 1 MiB, or for a proxy in front of it; store less, or keep it elsewhere"
    )]
    Size,
}

impl UpstreamError {
    /// No connection, or none that can be tried.
    pub(crate) fn unreachable(reason: String) -> Self {
        Self::Unreachable { cause: Cause::Connection, reason }
    }

    /// Why, in one stable word, where it is a failure of upstream.
    #[must_use]
    pub fn cause(&self) -> Option<Cause> {
        match self {
            Self::LoginRefused { cause, .. } | Self::Unreachable { cause, .. } | Self::Rejected { cause, .. } => {
                Some(*cause)
            }
            Self::Down { cause, .. } => *cause,
            Self::TimedOut => Some(Cause::Timeout),
            Self::Failed(_) => Some(Cause::Failed),
            Self::Foreign { .. } => Some(Cause::NotInfisical),
            Self::Denied
            | Self::OutOfBudget { .. }
            | Self::RateLimited { .. }
            | Self::Malformed(_)
            | Self::Incomplete
            | Self::Unstorable(_)
            | Self::AwaitsApproval => None,
        }
    }

    /// Whether this is an answer about the tenant, rather than a failure of the tier.
    #[must_use]
    pub fn is_denial(&self) -> bool {
        matches!(self, Self::Denied)
    }

    /// When it may be worth asking again, where that is known.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::LoginRefused { retry_after, .. }
            | Self::OutOfBudget { retry_after }
            | Self::RateLimited { retry_after }
            | Self::Down { retry_after, .. } => Some(*retry_after),
            Self::Denied
            | Self::TimedOut
            | Self::Unreachable { .. }
            | Self::Foreign { .. }
            | Self::Failed(_)
            | Self::Malformed(_)
            | Self::Incomplete
            | Self::Rejected { .. }
            | Self::Unstorable(_)
            | Self::AwaitsApproval => None,
        }
    }
}
