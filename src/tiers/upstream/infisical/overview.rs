//! One read of all tenants' folders, to tell which of them have changed. The server sends nothing
//! again while nothing has.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use siphasher::sip128::{Hasher128 as _, SipHasher24};
use tokio::time::Instant;

use super::{
    super::{Fetched, Lane, Overview, UpstreamError},
    Call, FOUND_OUT_FOR, Infisical, Meaning,
    client::{TOO_LONG, rejection},
    wire,
};

/// How long such a read that failed is not tried again.
const FAILED_FOR: Duration = Duration::from_secs(10 * 60);

/// The state that is kept between two such reads.
pub(super) struct LookingOver {
    /// Fingerprints are kept beside values' names for as long as the process lives: without the
    /// key, nobody can try values against them.
    key: [u8; 16],
    /// Until when the answer is taken to be too long, or denied, in seconds by the running clock.
    untold_until: AtomicU64,
}

impl Default for LookingOver {
    fn default() -> Self {
        Self { key: rand::random(), untold_until: AtomicU64::new(0) }
    }
}

impl fmt::Debug for LookingOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LookingOver").finish_non_exhaustive()
    }
}

impl Infisical {
    /// Whether a folder has no secrets of its own, imported ones included.
    pub(super) async fn has_no_secrets(&self, folder: &str, deadline: Instant) -> Result<bool, UpstreamError> {
        match self.list_secrets(Call::Read, folder, None, Lane::Interactive, deadline).await? {
            Fetched::Changed(snapshot) => Ok(snapshot.secrets.is_empty() && snapshot.oddities.is_empty()),
            Fetched::Unchanged => Err(UpstreamError::Malformed("it says unchanged, and nothing was known")),
        }
    }

    pub(super) async fn look_over(
        &self,
        known: Option<&str>,
        lane: Lane,
        deadline: Instant,
    ) -> Result<Overview, UpstreamError> {
        let now = self.clock.running();
        let untold_until = &self.looking_over.untold_until;
        if now < Duration::from_secs(untold_until.load(Ordering::Relaxed)) {
            return Ok(Overview::Untold);
        }
        let reply = match self.list(Call::Everything, &self.places.tenants, known, lane, deadline).await {
            Err(UpstreamError::Malformed(TOO_LONG)) => {
                tracing::info!(
                    "all tenants' folders together are longer than infisical.max_response: they are compared one by one"
                );
                untold_until.store((now + FOUND_OUT_FOR).as_secs(), Ordering::Relaxed);
                return Ok(Overview::Untold);
            }
            // The identity may read the tenants' folders and not the one above them.
            Err(UpstreamError::Denied) => {
                untold_until.store((now + FOUND_OUT_FOR).as_secs(), Ordering::Relaxed);
                return Ok(Overview::Untold);
            }
            // The rest of the poll was answered: this read is too much for the server, or for what
            // stands before it. A call that was not made, for want of budget say, is no such sign.
            Err(error) if error.retry_after().is_none() => {
                tracing::debug!(%error, "all folders could not be read in one call");
                untold_until.store((now + FAILED_FOR).as_secs(), Ordering::Relaxed);
                return Ok(Overview::Untold);
            }
            reply => reply?,
        };
        match reply.meaning {
            Meaning::NotModified => {
                self.client.state.found_something();
                Ok(Overview::Unchanged)
            }
            Meaning::Done => {
                let (above, key) = (self.places.tenants.clone(), self.looking_over.key);
                // It may be long, and a lookup must not wait for its thread because of it.
                let read = tokio::task::spawn_blocking(move || {
                    let length = reply.body.len();
                    let list = wire::read::<wire::SecretList<'_>>(&reply.body)?;
                    let (tenants, has_imports) = list.fingerprints(&above, |parts| hash(&key, parts))?;
                    Ok(Overview::Folders { validator: reply.etag, tenants, has_imports, length })
                });
                read.await.unwrap_or(Err(UpstreamError::Malformed("it could not be read to its end")))
            }
            _ if reply.problem.is_folder_not_found() => Ok(Overview::Untold),
            _ => Err(rejection(&reply)),
        }
    }
}

/// Each part with its length, so that no two lists of parts are alike.
fn hash(key: &[u8; 16], parts: &[&str]) -> u128 {
    use std::hash::Hasher as _;
    let mut hasher = SipHasher24::new_with_key(key);
    for part in parts {
        hasher.write_usize(part.len());
        hasher.write(part.as_bytes());
    }
    hasher.finish128().as_u128()
}
