//! Snapshots: the write-back copy of an upstream folder, replaced as a whole.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use super::{
    Database, JobLock,
    calls::Call,
    changes::Change,
    companies::{self, Company, Purpose},
    data_keys::{Chain, Sealing},
    error::StoreError,
    migrations::TenantState,
    rows::{BACKGROUND_TIMEOUTS, CopyState, NewSecret, SecretRow},
    secrets::{self, Current, Sealed},
    versions::{Batch, Next},
};
use crate::{
    clock::Timestamp,
    etag,
    flaws::{Flaws, Unusable},
    long_work::{Large, Pace},
    phase::Phase,
    sealing::{DataKey, OpenError, Place},
    secret::{SecretKey, SecretValue, Version},
    snapshot::Snapshot,
    tenant::Tenant,
};

/// The state of the tenant in the database before upstream was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Began {
    /// The company's generation; `None` if there was no company.
    pub generation: Option<i64>,
}

/// A snapshot to be stored.
#[derive(Clone, Copy)]
pub struct Taken<'a> {
    /// The tenant that it belongs to.
    pub tenant: &'a Tenant,
    /// The folder as upstream has it.
    pub snapshot: &'a Snapshot,
    /// The state of the tenant in the database before upstream was asked.
    pub began: Began,
    /// When upstream was asked.
    pub at: Timestamp,
    /// Says for which keys the snapshot counts; the others are left alone.
    pub speaks_for: &'a (dyn Fn(&SecretKey) -> bool + Sync),
}

/// The result of storing a snapshot.
#[derive(Debug)]
pub enum StoreOutcome {
    /// It is the tenant's copy now.
    Stored {
        /// The tenant's row as it is now.
        company: Company,
        /// The newest versions of the snapshot's keys, except for keys that `speaks_for` refused
        /// and that the database has no value for.
        secrets: Vec<Current>,
    },
    /// Something was written or invalidated while upstream was asked, or a later snapshot or denial
    /// was stored, or the database owns the tenant: nothing changed.
    Superseded,
}

impl Database {
    /// Makes a snapshot, which upstream was asked for at `at`, the tenant's copy, as a whole or not
    /// at all. Unchanged secrets keep their version. A secret that the snapshot lacks is deleted
    /// with every earlier copy of it, and is known to be absent upstream. Keys that `speaks_for`
    /// refuses are left alone; where the snapshot has any, the copy is not whole, and no validator
    /// is kept for it.
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
        self.calls.repeated(|| self.store_snapshot_once(tenant, snapshot, began, at, speaks_for)).await
    }

    async fn store_snapshot_once(
        &self,
        tenant: &Tenant,
        snapshot: &Snapshot,
        began: Began,
        at: Timestamp,
        speaks_for: &(dyn Fn(&SecretKey) -> bool + Sync),
    ) -> Result<StoreOutcome, StoreError> {
        let mut call = self.calls.write_within("store_snapshot", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
        let mut changed = Vec::new();
        let taken = Taken { tenant, snapshot, began, at, speaks_for };
        let outcome = self.store_in(&mut call, &[&taken], &mut changed).await?.pop();
        let outcome = outcome.ok_or_else(|| StoreError::broken("a snapshot was lost"))?;
        match &outcome {
            StoreOutcome::Stored { .. } => {
                self.raise_all(&mut call, &changed).await?;
                call.commit().await?;
            }
            StoreOutcome::Superseded => call.roll_back().await?,
        }
        Ok(outcome)
    }

    /// Stores the snapshots of several tenants, each given once, in one transaction, and notes how
    /// far each stored tenant has come. `state_of` gets the place in `taken` and the tenant's row.
    /// Outcomes are in the order of `taken`.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn store_snapshots(
        &self,
        lock: &JobLock,
        taken: &[Taken<'_>],
        state_of: &(dyn Fn(usize, &Company) -> TenantState + Sync),
    ) -> Result<Vec<StoreOutcome>, StoreError> {
        self.calls.repeated(|| self.store_snapshots_once(lock, taken, state_of)).await
    }

    async fn store_snapshots_once(
        &self,
        lock: &JobLock,
        taken: &[Taken<'_>],
        state_of: &(dyn Fn(usize, &Company) -> TenantState + Sync),
    ) -> Result<Vec<StoreOutcome>, StoreError> {
        let mut call = self.calls.write_within("store_snapshots", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
        let mut changed = Vec::new();
        let (places, ordered): (Vec<usize>, Vec<&Taken<'_>>) =
            companies::in_order(taken, |taken| taken.tenant).into_iter().unzip();
        let outcomes = self.store_in(&mut call, &ordered, &mut changed).await?;
        let outcomes: Vec<(usize, StoreOutcome)> = places.into_iter().zip(outcomes).collect();
        let stored = outcomes.iter().filter_map(|(place, outcome)| match outcome {
            StoreOutcome::Stored { company, .. } => Some(state_of(*place, company)),
            StoreOutcome::Superseded => None,
        });
        let states: Vec<TenantState> = stored.collect();
        self.keep_states_in(&mut call, &states).await?;
        self.check(&mut call, lock).await?;
        self.raise_all(&mut call, &changed).await?;
        call.commit().await?;
        Ok(companies::as_given(outcomes))
    }

    /// Returns the rows of a tenant that is being stored, after reporting it if they do not fit the
    /// tenant's head. They are replaced all the same: upstream knows better than rows and head.
    async fn accepted(&self, company: &Company, rows: Vec<SecretRow>, chain: &Chain) -> Large<Vec<SecretRow>> {
        let (verdict, rows) = self.verdict_of(company, rows, chain).await;
        drop(self.accept(company, verdict));
        rows
    }

    /// Stores these snapshots, given in the order of their tenants' names, each unless it is
    /// superseded, and adds the changes to `told`. A tenant that is new here adds none: nobody
    /// could have read it before. Outcomes are in the order given.
    async fn store_in(
        &self,
        call: &mut Call<'_>,
        taken: &[&Taken<'_>],
        told: &mut Vec<Change>,
    ) -> Result<Vec<StoreOutcome>, StoreError> {
        let (now, at_database) = (self.clock.now(), self.clock.database_now());
        let tenants: Vec<&Tenant> = taken.iter().map(|taken| taken.tenant).collect();
        let locked = companies::lock_all(call, &tenants, now, Purpose::Fill).await?;
        let lands = |taken: &Taken<'_>, company: &Company, made: bool| {
            let generation = (!made).then_some(company.generation);
            generation == taken.began.generation
                && company.phase != Some(Phase::Database)
                && !outdated(company, taken.at, at_database)
        };
        let landing: Vec<bool> =
            taken.iter().zip(&locked).map(|(taken, (company, made))| lands(taken, company, *made)).collect();
        // A row that was made just now has no secrets yet.
        let known: Vec<&Company> = locked
            .iter()
            .zip(&landing)
            .filter_map(|((company, made), lands)| (*lands && !made).then_some(company))
            .collect();
        let mut rows = secrets::all_of(call, &known).await?;
        let mut chains = self.chains(call, &known).await?;
        let mut copies = Vec::with_capacity(taken.len());
        for ((taken, (company, made)), lands) in taken.iter().zip(&locked).zip(landing) {
            if lands {
                let chain = chains.remove(&company.id).unwrap_or_default();
                let rows = rows.remove(&company.id).unwrap_or_default();
                let mut rows = if *made { Large::small(rows) } else { self.accepted(company, rows, &chain).await };
                copies.push(Copying::new(taken, company, *made, chain, rows.take()).await?);
            }
        }
        let sealings: Vec<Sealing<'_>> = copies.iter().filter_map(Copying::sealing).collect();
        let mut data_keys = self.sealing_keys(call, &sealings).await?.into_iter();
        drop(sealings);

        let (mut batch, mut states) = (Batch::default(), Vec::with_capacity(copies.len()));
        let mut stored = HashMap::with_capacity(copies.len());
        for copy in copies {
            let data_key = if copy.seals() { data_keys.next() } else { None };
            let (company, currents) = copy.write(data_key, &mut batch, told, now).await?;
            states.push(CopyState {
                id: company.id.clone(),
                at: company.snapshot_at.unwrap_or(now).as_millis(),
                etag: company.snapshot_etag.clone(),
                whole: company.snapshot_whole,
            });
            stored.insert(company.tenant.clone(), StoreOutcome::Stored { company, secrets: currents });
        }
        let heads = batch.write(self, call, now).await?;
        call.keep_copies(states).await?;
        for outcome in stored.values_mut() {
            if let StoreOutcome::Stored { company, .. } = outcome
                && let Some(head) = heads.get(&company.id)
            {
                company.head.clone_from(head);
            }
        }
        let outcome = |tenant: &&Tenant| stored.remove(*tenant).unwrap_or(StoreOutcome::Superseded);
        Ok(tenants.iter().map(outcome).collect())
    }
}

/// A snapshot that is being stored: it is not superseded, and its tenant is locked.
struct Copying<'a> {
    taken: &'a Taken<'a>,
    company: &'a Company,
    /// Whether this transaction made the tenant's row.
    made: bool,
    chain: Chain,
    rows: HashMap<SecretKey, SecretRow>,
    /// The newest versions of the secrets that the database has already.
    currents: Vec<Current>,
    /// The places in the snapshot of the secrets that the database lacks.
    changed: Vec<usize>,
    /// The keys whose values cannot be used, among those that the snapshot counts for.
    unusable: BTreeMap<SecretKey, Unusable>,
    /// Whether every name in the folder is a key.
    is_named: bool,
}

impl<'a> Copying<'a> {
    /// Compares the database's rows with the snapshot. Yields to other tasks in between.
    async fn new(
        taken: &'a Taken<'a>,
        company: &'a Company,
        made: bool,
        chain: Chain,
        rows: Vec<SecretRow>,
    ) -> Result<Self, StoreError> {
        let rows = rows.into_iter().map(|row| Ok((row.key()?, row)));
        let rows: HashMap<SecretKey, SecretRow> = rows.collect::<Result<_, StoreError>>()?;
        let (mut currents, mut changed) = (Vec::new(), Vec::new());
        let mut pace = Pace::default();
        for (place, secret) in taken.snapshot.secrets.iter().enumerate() {
            // A value that the database wrote as owner becomes a copy, even where the value is the
            // same.
            let same = |row: &SecretRow| {
                row.is_of_upstream()
                    && is_same(row.open(company, &chain), Some(&secret.value))
                    && is_same(row.open_text(company, &chain), secret.text.as_ref())
            };
            match rows.get(&secret.key) {
                Some(row) if !(taken.speaks_for)(&secret.key) || same(row) => {
                    if row.sealed.is_some() {
                        currents.push(row.current(company)?);
                    }
                }
                None if !(taken.speaks_for)(&secret.key) => {}
                _ => changed.push(place),
            }
            pace.did(secret.value.len()).await;
        }
        let Flaws { mut unusable, names, .. } = taken.snapshot.flaws();
        unusable.retain(|key, _| (taken.speaks_for)(key));
        let is_named = names.is_empty();
        Ok(Self { taken, company, made, chain, rows, currents, changed, unusable, is_named })
    }

    fn seals(&self) -> bool {
        !self.changed.is_empty()
    }

    /// The values to be sealed, if there are any.
    fn sealing(&self) -> Option<Sealing<'_>> {
        let Self { company, chain, made, .. } = self;
        let texts = self.changed.iter().filter(|place| self.taken.snapshot.secrets[**place].text.is_some()).count();
        let count = self.changed.len() + texts;
        self.seals().then_some(Sealing { company, chain, count, is_new: *made })
    }

    /// Adds to the batch the rows that make this the tenant's copy, and adds the changes to `told`.
    /// Returns the tenant's row as it is then, and the newest versions of the snapshot's keys.
    async fn write(
        self,
        data_key: Option<Arc<DataKey>>,
        batch: &mut Batch,
        told: &mut Vec<Change>,
        now: Timestamp,
    ) -> Result<(Company, Vec<Current>), StoreError> {
        let Self { taken, company, made, chain, rows, mut currents, changed, unusable, is_named } = self;
        let Taken { tenant, snapshot, at, speaks_for, .. } = *taken;
        let mut touched = Vec::with_capacity(changed.len());
        let mut pace = Pace::default();
        if let Some(data_key) = &data_key {
            for secret in changed.into_iter().map(|place| &snapshot.secrets[place]) {
                let (key, next) = (&secret.key, Next::after(rows.get(&secret.key))?);
                let version = next.number;
                let place = Place { company_id: &company.id, key, version };
                let sealed = Sealed::of(data_key, &secret.value, secret.text.as_ref(), place)?;
                batch.add(company, next, NewSecret::of_upstream(company, key, sealed, next, now));
                let etag = etag::of(&company.id, key, version);
                currents.push(Current { key: key.clone(), version, updated_at: now, etag });
                touched.push(key.clone());
                pace.did(secret.value.len()).await;
            }
        }
        for (key, reason) in &unusable {
            let row = rows.get(key);
            if row.and_then(SecretRow::unusable) != Some(*reason) {
                let next = Next::after(row)?;
                batch.add(company, next, NewSecret::unusable(company, key, *reason, next, now));
                touched.push(key.clone());
            }
        }
        batch.keys(company, chain, data_key);
        let named: HashSet<&SecretKey> =
            snapshot.secrets.iter().map(|secret| &secret.key).chain(unusable.keys()).collect();
        for (key, row) in rows.iter().filter(|(key, _)| !named.contains(key) && speaks_for(key)) {
            if row.is_forgotten() && row.version()? == Version::FIRST {
                // Nobody here has ever seen this secret exist, so no row is left of it.
                batch.remove(row);
                touched.push(key.clone());
            } else if row.sealed.is_some() || !row.is_of_upstream() {
                let next = Next::after(Some(row))?;
                batch.add(company, next, NewSecret::of_upstream(company, key, Sealed::nothing(), next, now));
                batch.drop_copies(company, key);
                touched.push(key.clone());
            }
        }
        if !made {
            told.extend(Change::of_secrets(tenant, touched));
        }
        // Names that are no valid keys have no rows, but a list must show them.
        let snapshot_whole = named.iter().all(|key| speaks_for(key)) && is_named;
        let company = Company {
            snapshot_at: Some(at),
            snapshot_whole,
            snapshot_etag: snapshot.etag.clone().filter(|_| snapshot_whole),
            denied_at: None,
            ..company.clone()
        };
        Ok((company, currents))
    }
}

/// Whether a value, or a text, equals the opened one, or both are absent.
fn is_same(opened: Result<Option<SecretValue>, OpenError>, other: Option<&SecretValue>) -> bool {
    match (opened, other) {
        (Ok(Some(opened)), Some(other)) => opened.same_as(other),
        (Ok(None), None) => true,
        (Ok(_) | Err(_), _) => false,
    }
}

/// Whether a later snapshot, or a denial after this one was asked for, has been stored. A time in
/// the future was written by a wrong clock: it is ignored.
fn outdated(company: &Company, at: Timestamp, now: Timestamp) -> bool {
    [company.snapshot_at, company.denied_at].into_iter().flatten().any(|landed| at < landed && landed <= now)
}
