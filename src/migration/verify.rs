//! Compares the database with upstream's backup at any time, and reports where they have drifted
//! apart since the switch, by tenant and name.

use serde::Serialize;

use super::{
    origin::{Content, OriginError},
    transfer::{Rows, Transfer, patiently},
};
use crate::{
    log,
    phase::Phase,
    sealing::Differences,
    secret::SecretKey,
    tenant::Tenant,
    tiers::database::{Company, Source, StoreError, TenantState},
};

/// A tenant that the database owns, beside its folder.
#[derive(Debug, Clone, Serialize)]
pub struct Compared {
    /// The tenant.
    #[serde(serialize_with = "as_text")]
    pub tenant: Tenant,
    /// Secrets in the database.
    pub secrets: usize,
    /// The secrets that differ.
    pub drift: Vec<Drift>,
    /// Why they could not be compared.
    pub error: Option<String>,
}

/// A secret that differs between the two sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Drift {
    /// Its name.
    pub key: String,
    /// The kind of change.
    pub what: Kind,
}

/// The kinds of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Written through the proxy since the switch: the database is ahead.
    WrittenHere,
    /// Deleted through the proxy since the switch: the database is ahead.
    DeletedHere,
    /// Changed in Infisical since the switch, where nobody reads it any more.
    ChangedUpstream,
    /// Made in Infisical since the switch, where nobody reads it any more.
    MadeUpstream,
    /// Deleted in Infisical since the switch.
    DeletedUpstream,
}

impl Kind {
    /// The text for operators.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::WrittenHere => "written in the database since the switch",
            Self::DeletedHere => "deleted in the database since the switch",
            Self::ChangedUpstream => "changed upstream since the switch; the database has what was there before",
            Self::MadeUpstream => "made upstream since the switch; the database lacks it",
            Self::DeletedUpstream => "deleted upstream since the switch; the database has it",
        }
    }
}

impl Compared {
    /// Whether both sides were compared and are equal.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.error.is_none() && self.drift.is_empty()
    }
}

impl Transfer {
    /// Compares these tenants, a batch at a time; each result is reported as soon as it is there.
    /// Tenants that never had a folder are left out.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn compare(
        &self,
        tenants: &[Tenant],
        batch: usize,
        told: &mut (dyn FnMut(&Compared) + Send),
    ) -> Result<Vec<Compared>, StoreError> {
        let mut compared = Vec::with_capacity(tenants.len());
        let (mut rest, mut lost) = (tenants, None);
        while !rest.is_empty() {
            let size = if self.origin.reads_all_at_once() { rest.len() } else { batch.clamp(1, rest.len()) };
            let (round, later) = rest.split_at(size.min(rest.len()));
            let contents = match &lost {
                None => self.origin.read(round).await,
                Some(error) => round.iter().map(|_| Err(OriginError::clone(error))).collect(),
            };
            lost =
                contents.iter().filter_map(|content| content.as_ref().err()).find(|error| error.is_of_all()).cloned();
            if contents.iter().any(|content| matches!(content, Err(OriginError::TooMany))) {
                continue;
            }
            for (tenant, content) in round.iter().zip(contents) {
                if let Some(one) = self.compare_one(tenant, content).await? {
                    told(&one);
                    compared.push(one);
                }
            }
            rest = later;
        }
        Ok(compared)
    }

    async fn compare_one(
        &self,
        tenant: &Tenant,
        content: Result<Content, OriginError>,
    ) -> Result<Option<Compared>, StoreError> {
        match content {
            Ok(content) => self.compare_content(tenant, &content).await.map(Some),
            Err(OriginError::Missing) if self.is_of_database_alone(tenant).await? => Ok(None),
            Err(error) => {
                let error = Some(log::chain(&error));
                Ok(Some(Compared { tenant: tenant.clone(), secrets: 0, drift: Vec::new(), error }))
            }
        }
    }

    /// Compares a tenant that the database owns with its folder's content.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn compare_content(&self, tenant: &Tenant, content: &Content) -> Result<Compared, StoreError> {
        let rows = self.rows_of(tenant, Some(Phase::Database)).await?;
        let mut compared =
            Compared { tenant: tenant.clone(), secrets: rows.digests.len(), drift: Vec::new(), error: None };
        if let Some((key, error)) = &rows.unreadable {
            compared.error = Some(format!("what is stored of {:?} does not open: {error}", key.as_str()));
            return Ok(compared);
        }
        let upstream = self.digests_of(tenant, Some(Phase::Database), &content.snapshot);
        let own = patiently(|| self.database.own_writes(tenant)).await?;
        let own: Vec<SecretKey> = own.into_iter().map(|own| own.key).collect();
        compared.drift = drift(&Differences::between(&upstream, &rows.digests), &rows, &own);
        Ok(compared)
    }
}

fn drift(differences: &Differences, rows: &Rows, own: &[SecretKey]) -> Vec<Drift> {
    let is_own = |key: &SecretKey| rows.sources.get(key) == Some(&Source::Database);
    let either = |yes: bool, here, there| if yes { here } else { there };
    let found =
        differences.different.iter().map(|key| (key, either(is_own(key), Kind::WrittenHere, Kind::ChangedUpstream)));
    let found = found.chain(
        differences
            .only_database
            .iter()
            .map(|key| (key, either(is_own(key), Kind::WrittenHere, Kind::DeletedUpstream))),
    );
    let found = found.chain(
        differences
            .only_origin
            .iter()
            .map(|key| (key, either(own.contains(key), Kind::DeletedHere, Kind::MadeUpstream))),
    );
    let mut drift: Vec<Drift> = found.map(|(key, what)| Drift { key: key.as_str().to_owned(), what }).collect();
    drift.sort_by(|a, b| a.key.cmp(&b.key));
    drift
}

/// The tenants that a migration gave to the database, with the progress of each.
#[must_use]
pub fn switched(states: Vec<TenantState>, companies: &std::collections::HashMap<Tenant, Company>) -> Vec<TenantState> {
    let is_ours = |state: &TenantState| {
        companies.get(&state.tenant).is_some_and(|company| company.phase == Some(Phase::Database))
    };
    states.into_iter().filter(|state| state.switched_at.is_some() && is_ours(state)).collect()
}

pub(super) fn as_text<S: serde::Serializer>(tenant: &Tenant, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(tenant.as_str())
}
