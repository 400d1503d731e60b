//! Snapshots: the write-back copy of an upstream folder, replaced as a whole.

use std::collections::{HashMap, HashSet};

use diesel::{ExpressionMethods as _, QueryDsl as _};

use super::{
    Database, Turn,
    calls::Call,
    changes::Change,
    companies::{self, Company, Purpose},
    error::StoreError,
    migrations::TenantState,
    schema::companies as company_table,
    secrets::{self, Current, NewSecret, SecretRow},
    versions::{Batch, Next},
};
use crate::{
    clock::Timestamp,
    etag,
    phase::Phase,
    sealing::Place,
    secret::{SecretKey, Version},
    tenant::Tenant,
    tiers::upstream::Snapshot,
};

/// A snapshot is stored behind the answer: it may take this many timeouts.
pub(super) const PATIENCE: u32 = 10;

/// What the database said of the tenant before upstream was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Began {
    /// The company's generation; nothing if there was no company.
    pub generation: Option<i64>,
}

/// A snapshot to be stored.
#[derive(Clone, Copy)]
pub struct Taken<'a> {
    /// Whose it is.
    pub tenant: &'a Tenant,
    /// What upstream has.
    pub snapshot: &'a Snapshot,
    /// What the database said of the tenant before upstream was asked.
    pub began: Began,
    /// When it was asked.
    pub at: Timestamp,
    /// The keys that it speaks for; the others are left alone.
    pub speaks_for: &'a (dyn Fn(&SecretKey) -> bool + Sync),
}

/// What became of a snapshot.
#[derive(Debug)]
pub enum StoreOutcome {
    /// It is the tenant's copy now.
    Stored {
        /// The tenant's row as it is now.
        company: Company,
        /// The newest versions of the snapshot's keys, those left out that
        /// `speaks_for` refused and the database has no value for.
        secrets: Vec<Current>,
    },
    /// Something was written or invalidated while upstream was asked, or a later
    /// snapshot or denial has landed, or the database owns the tenant: nothing changed.
    Superseded,
}

impl Database {
    /// Makes a snapshot, which upstream was asked for at `at`, the tenant's copy, as a
    /// whole or not at all. Secrets that are as they were keep their version; what the
    /// snapshot lacks is deleted with every copy of it from before, and known to be absent
    /// there. Keys that `speaks_for` refuses are left alone; where the snapshot has any, the copy is not whole, and no
    /// validator is kept for it.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn store_snapshot(
        &self,
        tenant: &Tenant,
        snapshot: &Snapshot,
        began: Began,
        at: Timestamp,
        speaks_for: &(dyn Fn(&SecretKey) -> bool + Sync),
    ) -> Result<StoreOutcome, StoreError> {
        let mut call = self.calls.write_within("store_snapshot", self.calls.timeout * PATIENCE).await?;
        let mut changed = Vec::new();
        let outcome =
            self.store_in(&mut call, &Taken { tenant, snapshot, began, at, speaks_for }, &mut changed).await?;
        match &outcome {
            StoreOutcome::Stored { .. } => {
                self.raise_all(&mut call, &changed).await?;
                call.commit().await?;
            }
            StoreOutcome::Superseded => call.roll_back().await?,
        }
        Ok(outcome)
    }

    /// The same for several tenants in one transaction, with how far each of those that
    /// were stored has come; outcomes are in the order in which tenants are given.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn store_snapshots(
        &self,
        turn: &Turn,
        taken: &[Taken<'_>],
        state_of: &(dyn Fn(&Company) -> TenantState + Sync),
    ) -> Result<Vec<StoreOutcome>, StoreError> {
        let mut call = self.calls.write_within("store_snapshots", self.calls.timeout * PATIENCE).await?;
        let (mut outcomes, mut states) = (Vec::with_capacity(taken.len()), Vec::new());
        let mut changed = Vec::new();
        for (place, taken) in companies::in_order(taken, |taken| taken.tenant) {
            let outcome = self.store_in(&mut call, taken, &mut changed).await?;
            if let StoreOutcome::Stored { company, .. } = &outcome {
                states.push(state_of(company));
            }
            outcomes.push((place, outcome));
        }
        self.keep_states_in(&mut call, &states).await?;
        self.check(&mut call, turn).await?;
        self.raise_all(&mut call, &changed).await?;
        call.commit().await?;
        Ok(companies::as_given(outcomes))
    }

    /// Stores one snapshot, if it is not superseded, and adds what it changes to `told`: a
    /// tenant that is new here is nothing that others could have read before.
    async fn store_in(
        &self,
        call: &mut Call<'_>,
        taken: &Taken<'_>,
        told: &mut Vec<Change>,
    ) -> Result<StoreOutcome, StoreError> {
        let Taken { tenant, snapshot, began, at, speaks_for } = *taken;
        let now = self.clock.now();
        let (mut company, made) = companies::lock(call, tenant, now, Purpose::Fill).await?;
        let generation = (!made).then_some(company.generation);
        if generation != began.generation || company.phase == Some(Phase::Database) || outdated(&company, at, now) {
            return Ok(StoreOutcome::Superseded);
        }

        let mut rows = HashMap::<SecretKey, SecretRow>::new();
        for row in secrets::all(call, &company.id).await? {
            rows.insert(row.key()?, row);
        }
        let mut chain = self.chain_to_seal(call, &company).await?;
        let (mut batch, mut currents, mut changed) = (Batch::default(), Vec::new(), Vec::new());
        let named: HashSet<&SecretKey> = snapshot.secrets.iter().map(|secret| &secret.key).collect();
        for secret in &snapshot.secrets {
            // What the database wrote as owner becomes a copy, even where the value is the same.
            let same = |row: &SecretRow| {
                row.is_of_upstream()
                    && matches!(row.open(&company, &chain), Ok(Some(value)) if value.same_as(&secret.value))
            };
            match rows.get(&secret.key) {
                Some(row) if !speaks_for(&secret.key) || same(row) => {
                    if row.sealed.is_some() {
                        currents.push(row.current(&company)?);
                    }
                }
                None if !speaks_for(&secret.key) => {}
                row => changed.push((secret, row)),
            }
        }
        let mut touched: Vec<SecretKey> = changed.iter().map(|(secret, _)| secret.key.clone()).collect();
        if !changed.is_empty() {
            let data_key = self.sealing_key(call, &company, &mut chain, changed.len(), now).await?;
            for (secret, row) in changed {
                let (key, next) = (&secret.key, Next::after(row)?);
                let version = next.number;
                let sealed = data_key.seal(&secret.value, Place { company_id: &company.id, key, version })?;
                batch.add(next, NewSecret::of_upstream(&company, key, Some(sealed), next, now));
                let etag = etag::of(&company.id, key, version);
                currents.push(Current { key: key.clone(), version, updated_at: now, etag });
            }
        }
        for (key, row) in rows.iter().filter(|(key, _)| !named.contains(key) && speaks_for(key)) {
            if row.is_forgotten() && row.version()? == Version::FIRST {
                // Of what never was, as far as anybody here has seen, nothing is left.
                batch.remove(row);
                touched.push(key.clone());
            } else if row.sealed.is_some() || !row.is_of_upstream() {
                let next = Next::after(Some(row))?;
                batch.add(next, NewSecret::of_upstream(&company, key, None, next, now));
                batch.drop_copies(key);
                touched.push(key.clone());
            }
        }
        batch.write(call, &company, self.retention, now).await?;
        if !made {
            told.extend(Change::of_secrets(tenant, touched));
        }

        company.snapshot_at = Some(at);
        company.snapshot_whole = named.iter().all(|key| speaks_for(key));
        company.snapshot_etag = snapshot.etag.clone().filter(|_| company.snapshot_whole);
        company.denied_at = None;
        let update = diesel::update(company_table::table.find(company.id.clone())).set((
            company_table::snapshot_at.eq(at.as_millis()),
            company_table::snapshot_etag.eq(company.snapshot_etag.clone()),
            company_table::snapshot_whole.eq(company.snapshot_whole),
            company_table::denied_at.eq(None::<i64>),
        ));
        call.execute(update).await?;
        Ok(StoreOutcome::Stored { company, secrets: currents })
    }
}

/// Whether a later snapshot, or a denial after this one was asked for, has landed. A
/// time that lies ahead was written by a clock that goes wrong: it decides nothing.
fn outdated(company: &Company, at: Timestamp, now: Timestamp) -> bool {
    [company.snapshot_at, company.denied_at].into_iter().flatten().any(|landed| at < landed && landed <= now)
}
