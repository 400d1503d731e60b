//! The database's knowledge of master keys: ids, where they were seen, which data keys they wrap.
//! The keys themselves are never here.

use std::collections::{HashMap, HashSet};

use diesel::{
    ExpressionMethods as _, QueryDsl as _,
    dsl::{count_star, min, sql},
    sql_types::BigInt,
};

use super::{
    Database,
    error::StoreError,
    schema::{
        company_data_keys::{self, master_key_id},
        master_keys, settings,
    },
};
use crate::{
    clock::Timestamp,
    keys::KeySource,
    sealing::{
        MasterKeyId,
        passphrase::{Derivation, DerivationError},
    },
};

/// A master key that some process has held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownKey {
    /// The key's id.
    pub id: MasterKeyId,
    /// The source where it was last seen.
    pub source: String,
    /// When it was first seen.
    pub first_seen_at: Timestamp,
    /// When a source last gave it.
    pub last_seen_at: Timestamp,
}

/// How many data keys a master key wraps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrappedBy {
    /// The key's id.
    pub id: MasterKeyId,
    /// Data keys.
    pub data_keys: i64,
    /// The number of tenants that these belong to.
    pub tenants: i64,
}

/// A master key that is needed but not held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingKey {
    /// The data keys that it wraps.
    pub wraps: WrappedBy,
    /// Where and when it was seen, if ever.
    pub known: Option<KnownKey>,
}

// diesel's own form of it cannot be cloned, but a query must be cloned to be tried again.
const TENANTS: &str = "count(DISTINCT company_id)";

/// The setting that holds the parameters of a derivation.
const DERIVATION: &str = "passphrase_derivation";

fn refused(error: DerivationError) -> StoreError {
    StoreError::broken(format!("the setting {DERIVATION} is refused: {error}"))
}

impl Database {
    /// The parameters that derive a key from a passphrase: drawn once for this database, the same
    /// for every instance.
    ///
    /// # Errors
    /// [`StoreError`]; also where the stored parameters are weaker or costlier than is allowed.
    pub async fn derivation(&self) -> Result<Derivation, StoreError> {
        // Read first: a database that accepts no writes can be read.
        if let Some(found) = self.stored_derivation().await? {
            return Ok(found);
        }
        let mut call = self.calls.write("derivation").await?;
        let draw = diesel::insert_into(settings::table)
            .values((settings::name.eq(DERIVATION), settings::value.eq(Derivation::draw()?.to_string())))
            .on_conflict(settings::name)
            .do_nothing();
        call.execute(draw).await?;
        let stored: Option<String> = call.first(settings::table.find(DERIVATION).select(settings::value)).await?;
        call.commit().await?;
        stored.unwrap_or_default().parse().map_err(refused)
    }

    /// The same, if they were drawn.
    ///
    /// # Errors
    /// [`StoreError`]; also where they are weaker or costlier than is allowed.
    pub async fn stored_derivation(&self) -> Result<Option<Derivation>, StoreError> {
        let mut call = self.calls.read("find_derivation").await?;
        let found: Option<String> = call.first(settings::table.find(DERIVATION).select(settings::value)).await?;
        call.done();
        found.map(|found| found.parse().map_err(refused)).transpose()
    }

    /// How many data keys each master key wraps, including keys that are not held.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn wrapped_by(&self) -> Result<Vec<WrappedBy>, StoreError> {
        let mut call = self.calls.read("wrapped_by").await?;
        let wrapped = company_data_keys::table
            .group_by(master_key_id)
            .select((master_key_id, count_star(), sql::<BigInt>(TENANTS)))
            .order(master_key_id.asc());
        let wrapped: Vec<(String, i64, i64)> = call.load(wrapped).await?;
        call.done();
        wrapped.into_iter().map(WrappedBy::try_from).collect()
    }

    /// The master keys that wrap tenants' data keys and are not held, with the places where they
    /// were seen.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn missing_master_keys(&self) -> Result<Vec<MissingKey>, StoreError> {
        let held: HashSet<String> = self.keys.ring().ids().map(|id| id.to_string()).collect();
        let mut call = self.calls.read("missing_master_keys").await?;
        // One after the other by the index: there are few master keys, and as many data keys as
        // tenants.
        let mut lacking = Vec::new();
        let mut last = String::new();
        loop {
            let next = company_data_keys::table.filter(master_key_id.gt(last.clone())).select(min(master_key_id));
            let next: Option<Option<String>> = call.first(next).await?;
            let Some(next) = next.flatten() else { break };
            if !held.contains(&next) {
                lacking.push(next.clone());
            }
            last = next;
        }
        if lacking.is_empty() {
            call.done();
            return Ok(Vec::new());
        }
        let missing = company_data_keys::table
            .filter(master_key_id.eq_any(lacking))
            .group_by(master_key_id)
            .select((master_key_id, count_star(), sql::<BigInt>(TENANTS)))
            .order(master_key_id.asc());
        let missing: Vec<(String, i64, i64)> = call.load(missing).await?;
        call.done();
        let known: HashMap<MasterKeyId, KnownKey> =
            self.known_master_keys().await?.into_iter().map(|known| (known.id, known)).collect();
        let missing = missing.into_iter().map(|row| {
            let wraps = WrappedBy::try_from(row)?;
            Ok(MissingKey { wraps, known: known.get(&wraps.id).cloned() })
        });
        missing.collect()
    }

    /// Every master key that was ever noted.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn known_master_keys(&self) -> Result<Vec<KnownKey>, StoreError> {
        let mut call = self.calls.read("known_master_keys").await?;
        let rows: Vec<(String, String, i64, i64)> =
            call.load(master_keys::table.order(master_keys::first_seen_at.asc())).await?;
        call.done();
        rows.into_iter()
            .map(|(id, source, first, last)| {
                let (first_seen_at, last_seen_at) = (Timestamp::from_millis(first), Timestamp::from_millis(last));
                Ok(KnownKey { id: readable(&id)?, source, first_seen_at, last_seen_at })
            })
            .collect()
    }

    /// Notes where master keys were just seen.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn note_master_keys(&self, seen: &[(MasterKeyId, KeySource)]) -> Result<(), StoreError> {
        if seen.is_empty() {
            return Ok(());
        }
        let mut call = self.calls.write("note_master_keys").await?;
        let now = self.clock.now().as_millis();
        for (id, source) in seen {
            let note = diesel::insert_into(master_keys::table)
                .values((
                    master_keys::id.eq(id.to_string()),
                    master_keys::source.eq(source.to_string()),
                    master_keys::first_seen_at.eq(now),
                    master_keys::last_seen_at.eq(now),
                ))
                .on_conflict(master_keys::id)
                .do_update()
                .set((master_keys::source.eq(source.to_string()), master_keys::last_seen_at.eq(now)));
            call.execute(note).await?;
        }
        call.commit().await
    }
}

impl TryFrom<(String, i64, i64)> for WrappedBy {
    type Error = StoreError;

    fn try_from((id, data_keys, tenants): (String, i64, i64)) -> Result<Self, StoreError> {
        Ok(Self { id: readable(&id)?, data_keys, tenants })
    }
}

fn readable(id: &str) -> Result<MasterKeyId, StoreError> {
    id.parse().map_err(|_| StoreError::broken("the id of a master key in the database cannot be read"))
}
