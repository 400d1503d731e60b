//! The tier that owned the secrets first: read a folder at a time, written one
//! secret at a time. A new upstream is a folder here and one arm in this file.

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
    settings::{BuildError, Config, Settings},
    webhook::{About, Unproved, Webhook, WebhookCall},
};
use crate::{
    clock::{Clock, Timestamp},
    flaws::{Flaws, Unresolved, Unusable},
    metrics::Metrics,
    references::{self, Texts},
    secret::{SecretKey, SecretValue, Version},
    tenant::Tenant,
};

/// Where tenants' secrets come from in the phases `infisical` and `hybrid`.
///
/// Every call keeps the configured budget of requests a minute, and ends within the
/// configured timeout, whatever the other side does; [`Self::everything`], which is long and
/// which nobody waits for, within ten times that.
pub trait Upstream: Send + Sync {
    /// The tenants that exist: the sub-folders of the tenants' folder.
    fn tenants(&self, lane: Lane) -> BoxFuture<'_, Result<Folders, UpstreamError>>;

    /// Everything in one tenant's folder. With `known`, the validator of a snapshot
    /// that the caller still holds, an unchanged folder is not sent again.
    ///
    /// A folder that does not exist reads as an empty snapshot: only [`Self::tenants`]
    /// tells the two apart.
    fn snapshot<'a>(
        &'a self,
        tenant: &'a Tenant,
        known: Option<&'a str>,
        lane: Lane,
    ) -> BoxFuture<'a, Result<Fetched, UpstreamError>>;

    /// What texts of a tenant's folder stand for, that are held here: by name, each that refers to
    /// others. Goes by what is held of folders beside it, and calls nothing.
    fn resolve<'a>(&self, tenant: &Tenant, texts: Texts<'a>) -> HashMap<&'a str, references::Resolved>;

    /// What is in all tenants' folders that may be read, in one call.
    ///
    /// A tenant is missing from it that has nothing, and also one whose folder is refused to
    /// us: only [`Self::tenants`] and [`Self::snapshot`] tell these apart.
    fn everything(&self, lane: Lane) -> BoxFuture<'_, Result<Everything, UpstreamError>>;

    /// The tenants in whose folders something was changed at `since` or later, by upstream's
    /// clock; nothing where this server cannot tell.
    ///
    /// A folder that is gone is not told of, nor one whose imports have changed; a secret that
    /// was deleted may not be. So this hastens a look at what it names, and proves nothing.
    fn changed_since(
        &self,
        since: Timestamp,
        lane: Lane,
    ) -> BoxFuture<'_, Result<Option<Vec<ChangedFolder>>, UpstreamError>>;

    /// Whether upstream would keep a secret as it is: its name, and its value, where it is not
    /// to be deleted. Every write is held to this before anything is sent; whoever must know
    /// before a write is begun asks for it.
    ///
    /// # Errors
    /// What it is that upstream would alter, or cannot take.
    fn check(&self, key: &SecretKey, value: Option<&SecretValue>) -> Result<(), Unstorable>;

    /// Creates or changes one secret, and the tenant's folder where it is missing;
    /// `true` if there was no such secret.
    fn put<'a>(
        &'a self,
        tenant: &'a Tenant,
        key: &'a SecretKey,
        value: &'a SecretValue,
    ) -> BoxFuture<'a, Result<bool, UpstreamError>>;

    /// Deletes one secret; `false` if there was none.
    fn delete<'a>(&'a self, tenant: &'a Tenant, key: &'a SecretKey) -> BoxFuture<'a, Result<bool, UpstreamError>>;

    /// Creates a tenant's folder, and what lies above it; one that is there stays as it is.
    fn create_folder<'a>(&'a self, tenant: &'a Tenant) -> BoxFuture<'a, Result<(), UpstreamError>>;

    /// Deletes a tenant's folder with the secrets in it; `false` if there was none. Refused
    /// where it has folders in it.
    fn remove_folder<'a>(&'a self, tenant: &'a Tenant, lane: Lane) -> BoxFuture<'a, Result<bool, UpstreamError>>;

    /// Secrets of one folder outside the tenants', by their names and in that order:
    /// master keys. One call, however many names.
    fn read<'a>(
        &'a self,
        folder: &'a str,
        names: &'a [&'a str],
        lane: Lane,
    ) -> BoxFuture<'a, Result<Vec<Option<SecretValue>>, UpstreamError>>;

    /// Creates or changes one secret in a folder outside the tenants', which is there.
    fn write<'a>(
        &'a self,
        folder: &'a str,
        name: &'a SecretKey,
        value: &'a SecretValue,
    ) -> BoxFuture<'a, Result<(), UpstreamError>>;

    /// Leaves a migration that runs in another process its share of the budget, until told
    /// otherwise.
    fn share_budget(&self, is_shared: bool);

    /// Goes on with what an instance has left of its budget that ran in this one's place before.
    fn resume_budget(&self, before: Before);

    /// Makes other settings ready to be brought into force while calls are made: requests a
    /// minute, timeout and login. The others stay as they were built.
    ///
    /// # Errors
    /// The setting that is wrong; then nothing has changed.
    fn reconfigure(&self, settings: Config<'_>) -> Result<Reconfigured<'_>, BuildError>;

    /// Whether a value with `${...}` in it refers to others there, rather than being that text.
    fn reads_references(&self) -> bool;

    /// What tells its notices from others, where it sends some.
    fn webhook(&self) -> Option<Arc<dyn Webhook>>;

    /// What the last calls told, without making one.
    fn health(&self) -> Health;
}

/// The budget of an instance that ran before, as far as it is known.
pub enum Before {
    /// What it has used, as the book says, which is told from now on what this one uses.
    Told {
        /// When all of it will have come back.
        whole_in: Duration,
        /// The book.
        book: Arc<dyn BudgetBook>,
    },
    /// The book cannot be read.
    Unknown,
}

/// Keeps what an instance has used of its budget, for the one that is started in its place.
pub trait BudgetBook: Send + Sync {
    /// Writes down in how much time all of the budget is there again; `false` where that fails.
    fn note(&self, whole_in: Duration) -> BoxFuture<'_, bool>;
}

/// Settings that are ready: nothing can fail any more.
#[must_use]
pub struct Reconfigured<'a> {
    has_new_login: bool,
    apply: Box<dyn FnOnce() + Send + 'a>,
}

impl<'a> Reconfigured<'a> {
    /// Settings that `apply` brings into force.
    pub fn new(has_new_login: bool, apply: impl FnOnce() + Send + 'a) -> Self {
        Self { has_new_login, apply: Box::new(apply) }
    }

    /// Settings that are as they were.
    pub fn unchanged() -> Self {
        Self::new(false, || ())
    }

    /// Whether the login is another one, wherever it is written.
    #[must_use]
    pub fn has_new_login(&self) -> bool {
        self.has_new_login
    }

    /// Brings them into force, for calls that begin from now on.
    pub fn apply(self) {
        (self.apply)();
    }
}

/// The upstream that is configured, where one is.
///
/// # Errors
/// The setting that is wrong.
pub fn build(
    config: Option<Config<'_>>,
    environment: &str,
    clock: &Clock,
    metrics: &Arc<Metrics>,
) -> Result<Option<Arc<dyn Upstream>>, BuildError> {
    config.map(|config| config.settings().build(environment, clock, metrics)).transpose()
}

/// Which callers go first when the budget is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// A caller is waiting: may use the whole budget, and waits for it a little.
    Interactive,
    /// Nobody is waiting: may use half of the budget, and never waits for it.
    Refresh,
    /// Goes after everyone else: may use the migration's own share of the budget, and never
    /// waits; the caller comes back when it is told to ([`UpstreamError::OutOfBudget`]).
    Migration,
}

/// The sub-folders of the tenants' folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Folders {
    /// The tenants, by name.
    pub tenants: Vec<Tenant>,
    /// Names there that cannot be a tenant's, in order.
    pub unusable: Vec<String>,
}

/// A tenant's folder in which something was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedFolder {
    /// The tenant that may be meant: more may be told of than were changed.
    pub tenant: Tenant,
    /// When, by upstream's clock, where it says so.
    pub at: Option<Timestamp>,
}

/// The answer to a request for a snapshot.
#[derive(Debug)]
pub enum Fetched {
    /// The folder as it is now.
    Changed(Snapshot),
    /// The folder is as the known snapshot says.
    Unchanged,
}

/// The complete content of one tenant's folder, imports and references resolved.
#[derive(Debug, Default, Clone)]
pub struct Snapshot {
    /// The secrets, each key once.
    pub secrets: Vec<UpstreamSecret>,
    /// A validator to send as `known` next time; none where the secrets depend on more than
    /// the folder.
    pub etag: Option<String>,
    /// What is in the folder and not among the secrets, or served otherwise than its writer may
    /// think; by name.
    pub oddities: Vec<Oddity>,
    /// Whether the read of another folder that values refer to has failed. The values that are
    /// missing for it may be as they were.
    pub fell_short: bool,
}

impl Snapshot {
    /// The oddities, by what they are.
    #[must_use]
    pub fn flaws(&self) -> Flaws {
        let mut flaws = Flaws::default();
        for Oddity { name, kind } in &self.oddities {
            match (name.parse(), kind) {
                (Ok(key), OddityKind::Unusable(reason)) => drop(flaws.unusable.insert(key, *reason)),
                (Ok(key), OddityKind::Reference(reason)) => drop(flaws.unresolved.insert(key, *reason)),
                (_, OddityKind::InvalidName) | (Err(_), _) => drop(flaws.names.insert(name.clone())),
            }
        }
        flaws
    }
}

/// Something in a folder that a migration should not pass over in silence.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Oddity {
    /// The secret's name, as it is written there.
    pub name: String,
    /// What is odd about it.
    pub kind: OddityKind,
}

/// What can be odd about a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OddityKind {
    /// It is left out: its name cannot be a [`SecretKey`].
    InvalidName,
    /// It is left out: its value cannot be used.
    Unusable(Unusable),
    /// Its value holds a reference that stays as it is written.
    Reference(Unresolved),
}

/// What one call tells of all tenants' folders.
#[derive(Debug, Default)]
pub struct Everything {
    /// The secrets of each tenant that has some, without a validator.
    pub tenants: HashMap<Tenant, Snapshot>,
    /// Whether a folder imports another. Imported secrets are then missing from all of
    /// `tenants`, for the answer does not tell which folder imports them: folders must be
    /// read one by one.
    pub has_imports: bool,
}

/// A secret as upstream holds it.
#[derive(Debug, Clone)]
pub struct UpstreamSecret {
    /// Its name.
    pub key: SecretKey,
    /// Its value, references replaced.
    pub value: SecretValue,
    /// The text that upstream holds, where there is a reference in it.
    pub text: Option<SecretValue>,
    /// Upstream's own count of its values: it restarts when a secret is created again.
    pub version: Version,
    /// When it was last changed, where upstream tells.
    pub updated_at: Option<Timestamp>,
}

impl UpstreamSecret {
    /// What upstream holds.
    #[must_use]
    pub fn written(&self) -> &SecretValue {
        self.text.as_ref().unwrap_or(&self.value)
    }
}

/// What is known of the upstream tier without calling it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// The last thing that happened.
    pub state: UpstreamState,
    /// Calls that may be made at once, now; nothing where nobody counts them.
    pub budget_left: Option<u32>,
}

/// How upstream answered last.
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
    /// It said to stay away for a while (429).
    RateLimited,
}

impl UpstreamState {
    /// The word used in answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down => "down",
            Self::LoginRefused => "login_refused",
            Self::RateLimited => "rate_limited",
        }
    }
}

/// Why upstream gave no answer. Never holds a value, nor what the other side sent.
#[derive(Debug, Clone, thiserror::Error)]
pub enum UpstreamError {
    /// After a good login, the folder is refused to us. Not a failure: an answer.
    #[error("the upstream refuses this folder to our identity")]
    Denied,
    /// Our own login is refused.
    #[error("the upstream refuses our login; check client_id and client_secret")]
    LoginRefused {
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
        /// Time until upstream takes calls again.
        retry_after: Duration,
    },
    /// It failed so often that it is not called for a while.
    #[error("the upstream has failed repeatedly and is left alone for a while")]
    Down {
        /// Time until a call is tried.
        retry_after: Duration,
    },
    /// No answer within the timeout.
    #[error("the upstream did not answer in time")]
    TimedOut,
    /// No connection, or a broken one.
    #[error("the upstream cannot be reached: {0}")]
    Unreachable(String),
    /// An answer that says the other side is broken.
    #[error("the upstream failed with status {0}")]
    Failed(u16),
    /// An answer that we cannot read.
    #[error("the upstream's answer cannot be read: {0}")]
    Malformed(&'static str),
    /// A folder was read, and another that it refers to could not be.
    #[error("a folder that the tenant's refers to cannot be read")]
    Incomplete,
    /// A request that upstream will not take: a wrong project or environment, say.
    #[error("the upstream rejects the request with status {status}: {hint}")]
    Rejected {
        /// Its status.
        status: u16,
        /// What to look at.
        hint: &'static str,
    },
    /// A write that upstream would not store as it is.
    #[error(transparent)]
    Unstorable(#[from] Unstorable),
    /// A write that upstream holds back until someone approves it there.
    #[error("the upstream holds this change back for approval")]
    AwaitsApproval,
}

/// What of a secret upstream would alter, or cannot take; and what to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unstorable {
    /// Its name.
    #[error("{0}")]
    Name(&'static str),
    /// Its value.
    #[error("{0}")]
    Value(&'static str),
    /// Nothing is written there.
    #[error("{0}")]
    ReadOnly(&'static str),
    /// The size of both, with what goes around them.
    #[error("the value is too long for the upstream, which takes up to 1 MiB; store less, or keep it elsewhere")]
    Size,
}

impl UpstreamError {
    /// Whether this is an answer about the tenant, rather than a tier that failed.
    #[must_use]
    pub fn is_denial(&self) -> bool {
        matches!(self, Self::Denied)
    }

    /// When it may be worth asking again, where that is known.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::LoginRefused { retry_after }
            | Self::OutOfBudget { retry_after }
            | Self::RateLimited { retry_after }
            | Self::Down { retry_after } => Some(*retry_after),
            Self::Denied
            | Self::TimedOut
            | Self::Unreachable(_)
            | Self::Failed(_)
            | Self::Malformed(_)
            | Self::Incomplete
            | Self::Rejected { .. }
            | Self::Unstorable(_)
            | Self::AwaitsApproval => None,
        }
    }
}
