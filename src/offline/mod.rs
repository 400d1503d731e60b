//! The offline copy: the last state that an instance served, in a sealed file beside it. The
//! instance starts from it where the database does not answer.
//!
//! `file` is the format on disk, and this module the content. The resolver and the access
//! layer provide their parts and take them back; `app` writes the file and reads it.

mod file;

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

pub use self::file::{Header, OfflineFile, write};
use crate::{
    access::KeptToken,
    clock::{Moment, Timestamp},
    phase::Phase,
    private_file::FileError,
    sealing::MasterKeyId,
    secret::SecretKey,
    tenant::Tenant,
    tiers::memory::Entry,
};

/// The whole content. The secrets are memory's own, not copies of them.
#[derive(Debug)]
pub struct Contents {
    /// When it was gathered; its ages are counted back from this.
    pub gathered_at: Moment,
    /// The number of the last change that is followed.
    pub followed: i64,
    /// The last shredding that is followed.
    pub shredded: Option<Timestamp>,
    /// Tenants' own phases.
    pub phases: Vec<(Tenant, Phase)>,
    /// Tenants that upstream denies, and when it is worth asking for each again.
    pub denied: Vec<(Tenant, Timestamp)>,
    /// The tokens that are valid.
    pub tokens: Vec<KeptToken>,
    /// Secrets; never an absence.
    pub secrets: Vec<(Tenant, Arc<Entry>)>,
}

/// One record, in the order of the file: the knowledge about tenants comes before their
/// secrets. A secret's value is stored beside it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Record {
    /// The number of the last change that was followed.
    Followed {
        /// The number.
        number: i64,
    },
    /// The time of the last shredding that was followed.
    Shredded {
        /// In milliseconds since 1970.
        at: i64,
    },
    /// A tenant's own phase.
    Phase {
        /// The tenant.
        tenant: String,
        /// Its phase.
        phase: Phase,
    },
    /// A tenant that upstream denies.
    Denied {
        /// The tenant.
        tenant: String,
        /// When it is worth asking again, in milliseconds since 1970.
        retry_at: i64,
    },
    /// A token that is valid.
    Token(KeptToken),
    /// A secret.
    Secret(KeptSecret),
}

/// A secret without its value. Times are in milliseconds since 1970.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptSecret {
    /// Its tenant.
    pub tenant: String,
    /// Its name.
    pub key: String,
    /// The version of the value.
    pub version: i64,
    /// When the version was written.
    pub updated_at: i64,
    /// Its validator, without quotes.
    pub etag: String,
    /// When its owner last confirmed it.
    pub confirmed_at: i64,
    /// The time until which it might be served.
    pub servable_until: i64,
}

impl KeptSecret {
    /// The kept part of an entry, and its value; `None` for an absence.
    ///
    /// Its times are the wall clock's, which is all that the process that reads them has in common
    /// with this one; and they are counted from the clock's present time, whatever it was before.
    fn of<'a>(tenant: &Tenant, entry: &'a Entry, now: Moment) -> Option<(Self, &'a str)> {
        let answer = entry.answer.as_ref()?;
        let left = Duration::from_millis(u64::try_from(now.millis_until(entry.servable_until)).unwrap_or(0));
        let secret = Self {
            tenant: tenant.as_str().to_owned(),
            key: answer.key.as_str().to_owned(),
            version: answer.version.number(),
            updated_at: answer.updated_at.as_millis(),
            etag: answer.bare_etag().to_owned(),
            confirmed_at: now.minus(now.since(entry.confirmed_at)).wall().as_millis(),
            servable_until: now.plus(left).wall().as_millis(),
        };
        Some((secret, answer.expose()))
    }

    /// The secret's tenant and name.
    ///
    /// # Errors
    /// Names that this program never writes.
    pub fn name(&self) -> Result<(Tenant, SecretKey), OfflineError> {
        match (self.tenant.parse(), self.key.parse()) {
            (Ok(tenant), Ok(key)) => Ok((tenant, key)),
            _ => Err(OfflineError::Damaged),
        }
    }
}

/// Why an offline copy cannot be used. Never holds the file's content.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// There is no file.
    #[error("there is no such file; a running instance writes it")]
    Missing,
    /// The system refuses it, or others may have read it.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is longer than any that this configuration writes.
    #[error("it is {0} bytes long, which no file of this instance is")]
    TooLong(u64),
    /// It is another kind of file, or of a later version of this program.
    #[error("it is not a file of this kind, or of another version of this program")]
    Unknown,
    /// It is of another environment.
    #[error("it is of the environment {0:?}")]
    Environment(String),
    /// The key that it is sealed under is in no source.
    #[error("it is sealed under the master key {0}, which none of keys.sources gave")]
    KeyMissing(MasterKeyId),
    /// It was changed, cut, or put together from several.
    #[error("it was changed or cut, and nothing of it is used")]
    Damaged,
    /// Its time lies ahead, so that no age can be known.
    #[error("it was written at {written_at}, and the clock says {now}: correct the clock")]
    Ahead {
        /// When it claims to have been written.
        written_at: String,
        /// The current time.
        now: String,
    },
}

/// The same, with the file's path.
#[derive(Debug, thiserror::Error)]
#[error("memory.offline_file {path} cannot be used", path = .path.display())]
pub struct Unusable {
    /// The file.
    pub path: PathBuf,
    /// The reason.
    pub source: OfflineError,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        answer::Answer,
        clock::Clock,
        policy::Ages,
        secret::{SecretValue, Version},
    };

    #[test]
    fn what_is_kept_is_as_old_by_the_wall_clock_as_it_is_however_that_was_set_meanwhile() {
        let [minute, day] = [60, 24 * 60 * 60].map(Duration::from_secs);
        let ages = Ages {
            ttl: minute,
            negative_ttl: minute,
            refresh_after: minute,
            memory_max_stale: day,
            database_max_stale: day,
        };
        let (tenant, value) = ("acme".parse().unwrap(), SecretValue::new("v".to_owned()));
        for step in [0, 3_600_000, -3_600_000] {
            let clock = Clock::system();
            let now = clock.confirmed_now();
            let answer = Answer::new(&tenant, "K".parse().unwrap(), &value, Version::FIRST, now.stamp, "abc");
            let entry = Entry::new(Some(answer), now, now, ages);
            clock.step(step);
            clock.advance(2 * minute);
            let (kept, _) = KeptSecret::of(&tenant, &entry, clock.moment()).unwrap();
            let [confirmed_at, until] = [kept.confirmed_at, kept.servable_until].map(Timestamp::from_millis);
            let age = clock.now().since(confirmed_at);
            // A step ahead counts as time that has passed.
            let told = 2 * minute + Duration::from_millis(step.max(0).unsigned_abs());
            assert!(age >= told && age < told + minute, "{step}: {age:?}");
            let left = until.since(clock.now());
            assert!(left <= day - told && left > day - told - minute, "{step}: {left:?}");
        }
    }
}
