//! Imports secrets that an application has stored itself: the database becomes their owner, and
//! nothing is deleted.

use std::collections::HashMap;

use super::{
    Database, JobLock,
    calls::Call,
    changes::Change,
    companies::{self, Company, Purpose},
    error::StoreError,
    migrations::TenantState,
    rows::{BACKGROUND_TIMEOUTS, NewSecret, SecretRow},
    secrets::{self, Sealed},
    versions::{Batch, Next},
};
use crate::{
    phase::Phase,
    sealing::Place,
    secret::{SecretKey, Writer},
    snapshot::UpstreamSecret,
    tenant::Tenant,
};

/// A tenant's secrets to be imported.
#[derive(Clone, Copy)]
pub struct Import<'a> {
    /// The tenant that they belong to.
    pub tenant: &'a Tenant,
    /// The secrets, each key once.
    pub secrets: &'a [UpstreamSecret],
    /// The tenant's own phase that the decision to write here was based on.
    pub owned_in: Option<Phase>,
    /// Whether existing values that differ, and deletions, become older versions; otherwise they
    /// are conflicts.
    pub overwrite: bool,
}

/// The result of an import.
#[derive(Debug)]
pub enum ImportOutcome {
    /// They are the tenant's secrets now. Those that existed with the same value keep their
    /// version.
    Stored(Company),
    /// The tenant has changed its owner: nothing was stored.
    Moved,
    /// These exist with another value, or were deleted here: nothing was stored.
    Conflict(Vec<SecretKey>),
}

impl Database {
    /// Stores the secrets of several tenants in one transaction, and the state of each tenant that
    /// was stored. `state_of` gets the place in which the tenant is given. Outcomes are in that
    /// order.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn import(
        &self,
        lock: &JobLock,
        imports: &[Import<'_>],
        writer: &Writer,
        state_of: &(dyn Fn(usize, &Company) -> TenantState + Sync),
    ) -> Result<Vec<ImportOutcome>, StoreError> {
        self.calls.repeated(|| self.import_once(lock, imports, writer, state_of)).await
    }

    async fn import_once(
        &self,
        lock: &JobLock,
        imports: &[Import<'_>],
        writer: &Writer,
        state_of: &(dyn Fn(usize, &Company) -> TenantState + Sync),
    ) -> Result<Vec<ImportOutcome>, StoreError> {
        let mut call = self.calls.write_within("import", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
        let (mut outcomes, mut states) = (Vec::with_capacity(imports.len()), Vec::new());
        let mut changed = Vec::new();
        for (place, import) in companies::in_order(imports, |import| import.tenant) {
            let outcome = self.import_in(&mut call, import, writer, &mut changed).await?;
            if let ImportOutcome::Stored(company) = &outcome {
                states.push(state_of(place, company));
            }
            outcomes.push((place, outcome));
        }
        self.keep_states_in(&mut call, &states).await?;
        self.check(&mut call, lock).await?;
        // Last of all: the counter of changes stays locked from here on.
        self.raise_all(&mut call, &changed).await?;
        call.commit().await?;
        Ok(companies::as_given(outcomes))
    }

    async fn import_in(
        &self,
        call: &mut Call<'_>,
        import: &Import<'_>,
        writer: &Writer,
        told: &mut Vec<Change>,
    ) -> Result<ImportOutcome, StoreError> {
        let now = self.clock.now();
        let (company, made) = companies::lock(call, import.tenant, now, Purpose::Change).await?;
        if company.phase != import.owned_in {
            return Ok(ImportOutcome::Moved);
        }
        let mut rows = HashMap::<SecretKey, SecretRow>::new();
        for row in secrets::all(call, &company.id).await? {
            rows.insert(row.key()?, row);
        }
        let chain = self.chain(call, &company).await?;
        let (mut changed, mut conflicts) = (Vec::new(), Vec::new());
        for secret in import.secrets {
            let row = rows.get(&secret.key);
            match row.map(|row| row.open(&company, &chain)) {
                Some(Ok(Some(value))) if value.same_as(&secret.value) => {}
                // A row that does not open is a conflict as well: its value is not known.
                Some(Ok(Some(_)) | Err(_)) if !import.overwrite => conflicts.push(secret.key.clone()),
                // A secret that was deleted here does not come back by itself either.
                Some(Ok(None)) if !import.overwrite && row.is_some_and(SecretRow::is_own) => {
                    conflicts.push(secret.key.clone());
                }
                _ => changed.push((secret, row)),
            }
        }
        if !conflicts.is_empty() {
            return Ok(ImportOutcome::Conflict(conflicts));
        }
        if !changed.is_empty() {
            let data_key = self.sealing_key(call, &company, &chain, changed.len()).await?;
            let mut batch = Batch::default();
            for (secret, row) in changed {
                let next = Next::after(row)?;
                let place = Place { company_id: &company.id, key: &secret.key, version: next.number };
                let sealed = Sealed::of(&data_key, &secret.value, None, place)?;
                batch.add(&company, next, NewSecret::own(&company, &secret.key, sealed, next, writer, now));
            }
            batch.keys(&company, chain, Some(data_key));
            batch.write(self, call, now).await?;
            if !made {
                told.push(Change::Folder(import.tenant.clone()));
            }
        }
        Ok(ImportOutcome::Stored(company))
    }
}
