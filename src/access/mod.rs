//! Who may ask: bearer tokens, what each may do, and where.

mod peer;
mod tokens;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use http::HeaderValue;

pub use peer::Peer;
pub use tokens::{Action, Grant, InvalidToken, NewToken, Token};

use self::tokens::LastUse;
use crate::{
    clock::{Clock, Timestamp},
    tiers::database::{Database, StoreError, TokenRow},
};

/// The tokens that are valid, held in memory so that no request waits for the database.
///
/// The set is replaced whole, never changed in place: a request sees the tokens from
/// before a change or from after it, and a revoked one is gone for every request that
/// begins after the replacement.
pub struct Access {
    grants: ArcSwap<HashMap<String, Arc<Grant>>>,
    database: Arc<Database>,
    clock: Clock,
    asked_at: AtomicI64,
    reading: tokio::sync::Mutex<()>,
    /// When each token of the database was last used, the revoked ones among them: their
    /// last use is the one that people ask for.
    last_uses: Mutex<HashMap<String, Arc<LastUse>>>,
}

/// Why a request is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No `Authorization: Bearer` header.
    #[error("send a token in the header 'Authorization: Bearer <token>'; 'secretier token create' makes one")]
    Missing,
    /// A token that is unknown, revoked or damaged.
    #[error("this token is unknown or was revoked; 'secretier token create' makes a new one")]
    Invalid,
    /// A token past its end.
    #[error("this token has expired; 'secretier token create' makes a new one")]
    Expired,
    /// A good token that does not reach this far.
    #[error("this token does not reach this tenant, this key or this action; GET /v1/whoami tells what it reaches")]
    OutOfScope,
}

impl Access {
    /// However many unknown tokens are tried, the database is asked about them at most
    /// this often.
    const ASK_EVERY: Duration = Duration::from_millis(200);

    /// Reads the tokens.
    ///
    /// # Errors
    /// The database does not answer, or holds a token that cannot be read.
    pub async fn build(database: Arc<Database>, clock: Clock) -> Result<Self, StoreError> {
        let access = Self {
            grants: ArcSwap::default(),
            database,
            clock,
            asked_at: AtomicI64::new(i64::MIN),
            reading: tokio::sync::Mutex::default(),
            last_uses: Mutex::default(),
        };
        Box::pin(access.reload()).await?;
        Ok(access)
    }

    /// Reads the tokens again.
    ///
    /// # Errors
    /// The database does not answer; the tokens known before stay valid.
    pub async fn reload(&self) -> Result<(), StoreError> {
        // One at a time, from the reading to the replacing: else a set that was read before
        // a token was revoked could replace one that was read after.
        let _turn = self.reading.lock().await;
        self.read().await
    }

    async fn read(&self) -> Result<(), StoreError> {
        let rows = self.database.tokens().await?;
        let last_uses = self.keep_last_uses(&rows);
        let live = rows.into_iter().filter(|row| row.revoked_at.is_none());
        let grants = live.filter_map(|row| {
            let last_use = last_uses.get(&row.id).map(Arc::clone).unwrap_or_default();
            readable(row, last_use)
        });
        self.grants.store(Arc::new(grants.map(|grant| (grant.id.clone(), Arc::new(grant))).collect()));
        Ok(())
    }

    /// Goes on with what is known of the tokens that there are, and forgets the others.
    fn keep_last_uses(&self, rows: &[TokenRow]) -> HashMap<String, Arc<LastUse>> {
        let mut last_uses = self.last_uses.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = |row: &TokenRow| (row.id.clone(), last_uses.get(&row.id).map(Arc::clone).unwrap_or_default());
        *last_uses = rows.iter().map(kept).collect();
        last_uses.clone()
    }

    /// Tells the database when tokens were last used, where it does not know.
    ///
    /// # Errors
    /// The database does not answer; it will be told the next time.
    pub async fn tell_uses(&self) -> Result<(), StoreError> {
        let untold = self.untold_uses();
        if untold.is_empty() {
            return Ok(());
        }
        self.database.note_token_uses(untold.iter().map(|(id, at, _)| (id.clone(), *at)).collect()).await?;
        for (_, at, last_use) in untold {
            last_use.told(at);
        }
        Ok(())
    }

    fn untold_uses(&self) -> Vec<(String, Timestamp, Arc<LastUse>)> {
        let last_uses = self.last_uses.lock().unwrap_or_else(PoisonError::into_inner);
        let untold = |(id, last_use): (&String, &Arc<LastUse>)| {
            last_use.untold().map(|at| (id.clone(), at, Arc::clone(last_use)))
        };
        last_uses.iter().filter_map(untold).collect()
    }

    /// Whom a request comes from.
    ///
    /// # Errors
    /// Why it is not let in.
    pub async fn authenticate(&self, authorization: Option<&HeaderValue>) -> Result<Arc<Grant>, Refused> {
        let presented = tokens::presented(authorization.ok_or(Refused::Missing)?)?;
        let now = self.clock.now();
        if let Some(grant) = self.grants.load().get(presented.id()) {
            return presented.opens(grant, now);
        }
        // It may have been made a moment ago, by another process. Of many who come with it
        // at once one asks, and the others wait for that.
        let _turn = self.reading.lock().await;
        if !self.grants.load().contains_key(presented.id()) && self.may_ask() {
            // Where the database does not answer, the token stays unknown.
            let _ = Box::pin(self.read()).await;
        }
        match self.grants.load().get(presented.id()) {
            Some(grant) => presented.opens(grant, now),
            None => Err(Refused::Invalid),
        }
    }

    fn may_ask(&self) -> bool {
        let now = self.clock.now();
        let asked_at = self.asked_at.load(Ordering::Relaxed);
        let due = i64::try_from(Self::ASK_EVERY.as_millis()).unwrap_or(i64::MAX);
        now.as_millis().saturating_sub(asked_at) >= due
            && self.asked_at.compare_exchange(asked_at, now.as_millis(), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// A row that cannot be read lets nobody in, and must not keep the others out.
fn readable(row: TokenRow, last_use: Arc<LastUse>) -> Option<Grant> {
    let name = row.name.clone();
    Grant::from_row(row, last_use)
        .inspect_err(|error| tracing::error!(token = name, %error, "a stored token cannot be read"))
        .ok()
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("tokens", &self.grants.load().len()).finish_non_exhaustive()
    }
}
