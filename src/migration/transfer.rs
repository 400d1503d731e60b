//! The source and the target of a migration, and the comparison of a tenant between them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use super::origin::Origin;
use crate::{
    clock::Clock,
    phase::Phase,
    policy::Policies,
    sealing::{Differences, Digester, Digests, OpenError},
    secret::SecretKey,
    tenant::Tenant,
    tiers::{
        database::{Company, Database, Held, Listing, Source, StoreError},
        upstream::{Snapshot, Upstream},
    },
    withheld::Withheld,
};

/// How long to wait for a database that does not answer.
const DATABASE_WAIT: Duration = Duration::from_secs(5 * 60);

/// The pause before it is asked again.
const PAUSE: Duration = Duration::from_millis(100);

/// The source and the target of a migration, and everything that a comparison needs.
pub struct Transfer {
    /// The target.
    pub database: Arc<Database>,
    /// The source.
    pub origin: Arc<dyn Origin>,
    /// The policies that decide owners.
    pub policies: Arc<Policies>,
    /// Makes the digests that are kept of a comparison.
    pub digester: Digester,
    /// The clock.
    pub clock: Clock,
    /// The kind of content that is taken over.
    pub takes: Takes,
    /// Our own master keys, which are neither taken over nor compared.
    pub withheld: Withheld,
}

/// The kind of content that is taken over, and how it is stored in the database.
pub enum Takes {
    /// Whole folders that upstream owns: stored as copies until the tenant is switched.
    Folders,
    /// An application's own secrets, beside those that are there: stored as the owner's.
    Rows {
        /// Whether existing values that differ become older versions.
        overwrite: bool,
        /// Tenants that upstream has a folder for: they are migrated from there first.
        folders: HashSet<Tenant>,
        /// The upstream that has these folders, where there is one.
        upstream: Option<Arc<dyn Upstream>>,
    },
}

/// Why a tenant with a folder is not imported from elsewhere.
pub(super) const HAS_FOLDER: &str =
    "it has a folder upstream, which owns it; 'migrate run --cutover' first, then import";

/// The database's content for a tenant, as far as it is taken over.
#[derive(Debug, Default)]
pub struct Rows {
    /// The digest of each value.
    pub digests: Digests,
    /// The source of each value.
    pub sources: BTreeMap<SecretKey, Source>,
    /// The first secret that does not open.
    pub unreadable: Option<(SecretKey, OpenError)>,
}

impl Transfer {
    /// The digests of a snapshot's secrets that are taken over, where `own` is the tenant's
    /// own phase. A secret that a rule gives to the database does not count for upstream.
    #[must_use]
    pub fn digests_of(&self, tenant: &Tenant, own: Option<Phase>, snapshot: &Snapshot) -> Digests {
        let ours = snapshot.secrets.iter().filter(|secret| self.is_origins(tenant, &secret.key, own));
        ours.map(|secret| (secret.key.clone(), self.digester.of(tenant, &secret.key, &secret.value))).collect()
    }

    /// The same for the database's rows, read back and opened.
    ///
    /// # Errors
    /// [`StoreError`], after a while.
    pub async fn rows_of(&self, tenant: &Tenant, own: Option<Phase>) -> Result<Rows, StoreError> {
        let listing = patiently(|| self.database.find_all(tenant)).await?;
        Ok(self.rows_in(tenant, own, listing))
    }

    /// The same for several tenants, in their order, each with its own phase.
    ///
    /// # Errors
    /// [`StoreError`], after a while.
    pub async fn rows_of_all(&self, tenants: &[(Tenant, Option<Phase>)]) -> Result<Vec<Rows>, StoreError> {
        let names: Vec<Tenant> = tenants.iter().map(|(tenant, _)| tenant.clone()).collect();
        let mut listings = match self.database.find_all_of(&names).await {
            // One operation may not have the time to read so many.
            Err(StoreError::Unavailable { .. }) => {
                let mut listings = HashMap::with_capacity(names.len());
                for name in &names {
                    listings.extend(patiently(|| self.database.find_all_of(std::slice::from_ref(name))).await?);
                }
                listings
            }
            listings => listings?,
        };
        let rows = |(tenant, own): &(Tenant, Option<Phase>)| match listings.remove(tenant) {
            Some(listing) => self.rows_in(tenant, *own, listing),
            None => Rows::default(),
        };
        Ok(tenants.iter().map(rows).collect())
    }

    fn rows_in(&self, tenant: &Tenant, own: Option<Phase>, listing: Listing) -> Rows {
        let mut rows = Rows::default();
        for (key, held) in listing.secrets {
            if !self.is_origins(tenant, &key, own) {
                continue;
            }
            match held {
                Held::Present(found) => {
                    rows.digests.insert(key.clone(), self.digester.of(tenant, &key, &found.value));
                    rows.sources.insert(key, found.source);
                }
                Held::Absent | Held::Unknown | Held::Unusable(_) => {}
                Held::Unreadable(error) => rows.unreadable = Some((key, error)),
            }
        }
        rows
    }

    /// Whether none of the database's rows of a tenant came from upstream, so that no
    /// folder is expected there.
    ///
    /// # Errors
    /// [`StoreError`], after a while.
    pub async fn is_of_database_alone(&self, tenant: &Tenant) -> Result<bool, StoreError> {
        let rows = self.rows_of(tenant, Some(Phase::Database)).await?;
        Ok(rows.unreadable.is_none() && rows.sources.values().all(|source| *source == Source::Database))
    }

    /// Whether a tenant is in the target phase, or past it.
    #[must_use]
    pub fn is_there(&self, tenant: &Tenant, company: Option<&Company>, to: Option<Phase>) -> bool {
        let own = company.and_then(|company| company.phase);
        match self.takes {
            Takes::Folders => self.is_databases(tenant, own) || (to == Some(Phase::Hybrid) && own == to),
            Takes::Rows { .. } => false,
        }
    }

    /// Why a tenant cannot be taken over, whatever its content.
    #[must_use]
    pub fn refusal(&self, tenant: &Tenant, own: Option<Phase>, to: Option<Phase>) -> Option<String> {
        if self.is_databases(tenant, own) {
            return None;
        }
        let Takes::Rows { folders, .. } = &self.takes else {
            let is_taken_back = to == Some(Phase::Hybrid) && self.policies.has_any_in(Phase::Database, tenant, own);
            return is_taken_back.then(|| {
                "a rule gives some of its secrets to the database, and in phase hybrid they would be upstream's, which \
                 lacks them; --cutover gives it to the database as a whole"
                    .to_owned()
            });
        };
        if folders.contains(tenant) {
            return Some(HAS_FOLDER.to_owned());
        }
        to.is_none().then(|| "it is in a phase that asks upstream; --cutover gives it to the database".to_owned())
    }

    /// Whether the database owns all of a tenant's secrets.
    #[must_use]
    pub fn is_databases(&self, tenant: &Tenant, own: Option<Phase>) -> bool {
        self.policies.is_uniform(tenant, own) && self.policies.phase_of(tenant, own) == Phase::Database
    }

    /// The differences between origin and database. If the origin does not provide a tenant whole,
    /// a secret that it lacks is no difference.
    #[must_use]
    pub fn differences(&self, origin: &Digests, database: &Digests) -> Differences {
        let mut differences = Differences::between(origin, database);
        if matches!(self.takes, Takes::Rows { .. }) {
            differences.only_database.clear();
        }
        differences
    }

    /// Whether the origin decides about a secret; under an own phase of `database` it did so
    /// before the switch.
    fn is_origins(&self, tenant: &Tenant, key: &SecretKey, own: Option<Phase>) -> bool {
        let is_of_owner = matches!(self.takes, Takes::Rows { .. })
            || own == Some(Phase::Database)
            || self.policies.of(tenant, key, own).phase.owned_upstream();
        is_of_owner && !self.withheld.has(tenant.as_str(), key.as_str())
    }
}

/// Asks the database, and repeats that while it does not answer: it may be restarting.
///
/// # Errors
/// The last failure.
pub async fn patiently<T, F>(ask: impl Fn() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let started = tokio::time::Instant::now();
    loop {
        match ask().await {
            Err(StoreError::Unavailable { retry_after, .. }) if started.elapsed() < DATABASE_WAIT => {
                tokio::time::sleep(retry_after.max(PAUSE)).await;
            }
            answer => return answer,
        }
    }
}
