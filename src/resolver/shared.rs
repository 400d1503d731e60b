//! One read of a folder for all instances: a lease in the database says which of them reads,
//! and the others take the copy that it stores.
//!
//! On PostgreSQL alone: SQLite serves one machine with few processes, and two more transactions
//! for every folder that is read would occupy its only writer.
//!
//! Only the number of calls depends on it. Where the database does not answer, or where the
//! reader takes too long or stores nothing, each instance reads for itself as if it were
//! alone. Of two that read at once, the generation and the times of their reads decide whose
//! snapshot stays, as always.

use std::{sync::Arc, time::Duration};

use super::Resolver;
use crate::{
    clock::Timestamp,
    log::process_name,
    tenant::Tenant,
    tiers::database::{Company, Database, Lease, Listing},
};

/// How often an instance checks whether the reader has ended: the first pause, the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// The way to get a folder's content.
pub(super) enum Turn {
    /// This instance is to read it.
    Ours(Arc<Reader>),
    /// Another instance has read it meanwhile and stored this copy.
    Copied(Box<Listing>),
    /// It cannot be told whose turn it is, or the wait is too long.
    Unknown,
}

/// The right to read for all instances. The lease ends with the last handle to it.
pub(super) struct Reader {
    database: Arc<Database>,
    lease: Lease,
}

impl Drop for Reader {
    fn drop(&mut self) {
        let (database, lease) = (Arc::clone(&self.database), self.lease.clone());
        // Without a runtime this process is ending, and the lease expires by itself.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = database.end_lease(&lease).await {
                    tracing::debug!(%error, "a lease ends by itself");
                }
            });
        }
    }
}

impl Resolver {
    /// Whose turn it is to read a folder; `before` is the time of the copy that the lookup found.
    pub(super) async fn turn_to_read(&self, tenant: &Tenant, before: Option<Timestamp>) -> Turn {
        if !self.database.is_for_many() {
            return Turn::Unknown;
        }
        // The rest of the time is for this instance's own read.
        let patience = self.deadline().mul_f64(0.75);
        tokio::time::timeout(patience, self.await_turn(tenant, before)).await.unwrap_or(Turn::Unknown)
    }

    async fn await_turn(&self, tenant: &Tenant, before: Option<Timestamp>) -> Turn {
        let (name, by) = (Lease::of_snapshot(tenant), process_name());
        let lasts = self.deadline() * 2 + self.database.timeout();
        // A database that is busy, or hangs, must not use up the caller's time.
        let at_once = self.deadline() / 10;
        let mut pause = FIRST_PAUSE;
        let mut waited = false;
        let lease = loop {
            let asked = tokio::time::timeout(at_once, self.database.lease(&name, &by, lasts)).await;
            match asked {
                Err(_) => return Turn::Unknown,
                Ok(Ok(Ok(lease))) => break lease,
                Ok(Ok(Err(_))) => {
                    if !waited {
                        self.metrics.count("secretier_coalesced_waits_total", &[("for", "instance")]);
                    }
                    waited = true;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                Ok(Err(error)) => {
                    tracing::debug!(%tenant, %error, "no lease to read a folder");
                    return Turn::Unknown;
                }
            }
        };
        let reader = Arc::new(Reader { database: Arc::clone(&self.database), lease });
        // Checked even without a wait: another reader may have ended between our look at the
        // copy and the lease.
        match self.database.company(tenant).await {
            Ok(Some(company)) if self.is_new(&company, before) => match self.database.find_all(tenant).await {
                Ok(listing) if listing.company.as_ref() == Some(&company) => Turn::Copied(Box::new(listing)),
                Ok(_) | Err(_) => Turn::Ours(reader),
            },
            Ok(_) | Err(_) => Turn::Ours(reader),
        }
    }

    /// Whether it is another copy than the one from `before`, and recent by either clock.
    fn is_new(&self, company: &Company, before: Option<Timestamp>) -> bool {
        company.snapshot_at != before && self.copy_age(company).is_some_and(|age| age <= self.deadline() * 2)
    }
}
