//! The storage of the audit's chains, for the access layer.

use std::sync::{Mutex, PoisonError};

use diesel::{
    BoolExpressionMethods as _, ExpressionMethods as _, IntoSql as _, NullableExpressionMethods as _, QueryDsl as _,
    Queryable, TextExpressionMethods as _, sql_types::Bool,
};

use super::{
    Database,
    calls::Call,
    error::StoreError,
    rows::AuditRecordRow,
    schema::{audit_chains, audit_records},
};
use crate::clock::Timestamp;

/// One record in its chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    /// The chain it belongs to: its kind.
    pub chain: String,
    /// Its place there, from 1 on.
    pub seq: i64,
    /// When the first of the counted events happened.
    pub first_at: i64,
    /// When the last one happened.
    pub at: i64,
    /// The number of events that it counts.
    pub count: i64,
    /// The actor: a token's id or `uid:N`; `None` where it is not known.
    pub actor_id: Option<String>,
    /// The actor's name, for people.
    pub actor_name: Option<String>,
    /// The requested action.
    pub action: String,
    /// The tenant that it concerns.
    pub tenant: Option<String>,
    /// The secret that it concerns.
    pub key: Option<String>,
    /// The outcome.
    pub outcome: String,
    /// The tier that answered.
    pub tier: Option<String>,
    /// Everything else, as JSON.
    pub detail: String,
    /// Covers all of the above and the hash of the previous record.
    pub hash: [u8; 32],
    /// At a checkpoint: the signature over all records up to here.
    pub signature: Option<Signed>,
}

/// A signature, and the master key whose derived key made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// The master key's id, as stored.
    pub key: String,
    /// The signature.
    pub bytes: Vec<u8>,
}

/// A place in a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditMark {
    /// The number of records up to here.
    pub seq: i64,
    /// The hash of the last of them.
    pub hash: [u8; 32],
    /// The signature that vouches for it, if there is one.
    pub signature: Option<Signed>,
}

/// The beginning and the end of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditChain {
    /// Its name: the kind of its records.
    pub chain: String,
    /// The mark before its first record: the last record that was removed for its age.
    pub start: AuditMark,
    /// How many records there have been, including those that were removed.
    pub seq: i64,
    /// The hash of the last record.
    pub hash: [u8; 32],
    /// The end of the chain when it was last signed.
    pub vouched: Option<AuditMark>,
}

/// The criteria of a search. A criterion that is left out matches everything.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// This tenant.
    pub tenant: Option<String>,
    /// Nothing that may be of a shared folder: no record of one, nor of a key whose tenant is not known.
    pub no_folders: bool,
    /// This secret.
    pub key: Option<String>,
    /// This token's name or id, or `uid:N`.
    pub actor: Option<String>,
    /// This outcome.
    pub outcome: Option<String>,
    /// Records whose last event was then or later.
    pub since: Option<Timestamp>,
    /// Records whose first event was before then.
    pub until: Option<Timestamp>,
    /// Only records after this one, in the order of the answer.
    pub after: Option<AuditPlace>,
}

/// Where a page of found records ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditPlace {
    /// The record's time.
    pub at: i64,
    /// Its chain.
    pub chain: String,
    /// Its place there.
    pub seq: i64,
}

impl From<AuditRow> for AuditRecordRow {
    fn from(row: AuditRow) -> Self {
        let (signed_with, signature) = row.signature.map(|signed| (signed.key, signed.bytes)).unzip();
        Self {
            chain: row.chain,
            seq: row.seq,
            first_at: row.first_at,
            at: row.at,
            count: row.count,
            actor_id: row.actor_id,
            actor_name: row.actor_name,
            action: row.action,
            tenant: row.tenant,
            secret_key: row.key,
            outcome: row.outcome,
            tier: row.tier,
            detail: row.detail,
            hash: row.hash.to_vec(),
            signed_with,
            signature,
        }
    }
}

impl From<AuditRecordRow> for AuditRow {
    fn from(row: AuditRecordRow) -> Self {
        Self {
            chain: row.chain,
            seq: row.seq,
            first_at: row.first_at,
            at: row.at,
            count: row.count,
            actor_id: row.actor_id,
            actor_name: row.actor_name,
            action: row.action,
            tenant: row.tenant,
            key: row.secret_key,
            outcome: row.outcome,
            tier: row.tier,
            detail: row.detail,
            hash: hash(&row.hash),
            signature: signed(row.signed_with, row.signature),
        }
    }
}

#[derive(Queryable)]
struct ChainRow {
    chain: String,
    start_seq: i64,
    start_hash: Vec<u8>,
    start_signed_with: Option<String>,
    start_signature: Option<Vec<u8>>,
    seq: i64,
    hash: Vec<u8>,
    vouched_seq: Option<i64>,
    vouched_hash: Option<Vec<u8>>,
    signed_with: Option<String>,
    signature: Option<Vec<u8>>,
}

impl From<ChainRow> for AuditChain {
    fn from(row: ChainRow) -> Self {
        Self {
            chain: row.chain,
            start: AuditMark {
                seq: row.start_seq,
                hash: hash(&row.start_hash),
                signature: signed(row.start_signed_with, row.start_signature),
            },
            seq: row.seq,
            hash: hash(&row.hash),
            vouched: row.vouched_seq.map(|seq| AuditMark {
                seq,
                hash: hash(&row.vouched_hash.unwrap_or_default()),
                signature: signed(row.signed_with, row.signature),
            }),
        }
    }
}

/// A hash of another length was tampered with. A verification must find it, but it must not keep
/// everything else from being read: no record has the hash that is returned for it.
fn hash(bytes: &[u8]) -> [u8; 32] {
    bytes.try_into().unwrap_or([0xff; 32])
}

fn signed(key: Option<String>, bytes: Option<Vec<u8>>) -> Option<Signed> {
    key.zip(bytes).map(|(key, bytes)| Signed { key, bytes })
}

impl Call<'_> {
    /// Whether this record is in its place.
    async fn has_audit(&mut self, chain: &str, seq: i64, hash: &[u8; 32]) -> Result<bool, StoreError> {
        let row = audit_records::table.find((chain.to_owned(), seq)).select(audit_records::hash);
        Ok(self.first::<_, Vec<u8>>(row).await?.is_some_and(|found| found == hash))
    }
}

/// Rows in one statement on PostgreSQL, which counts parameters with 16 bits.
const INSERTED_AT_ONCE: usize = 1000;

impl Database {
    /// Appends to these chains, which are locked meanwhile. `link` is given the ends of the chains,
    /// in the order of `chains`; the chains that no longer contain the record that was `seen` in
    /// them; and whether the record `in_doubt` is there. It returns the records and the new ends.
    /// It is called again where the database undoes the transaction, and only its last result
    /// counts.
    ///
    /// Chains are locked in the order of their names: pass them in that order.
    ///
    /// # Errors
    /// [`StoreError`]. After [`StoreError::Unavailable`] it is not known whether it was done.
    pub async fn append_audit(
        &self,
        chains: &[&'static str],
        seen: &[(&'static str, i64, [u8; 32])],
        in_doubt: Option<(&str, i64, [u8; 32])>,
        link: impl FnMut(Vec<AuditChain>, Vec<&'static str>, bool) -> (Vec<AuditRow>, Vec<AuditChain>) + Send,
    ) -> Result<(), StoreError> {
        let link = Mutex::new(link);
        self.calls.repeated(|| self.append_audit_once(chains, seen, in_doubt, &link)).await
    }

    async fn append_audit_once(
        &self,
        chains: &[&'static str],
        seen: &[(&'static str, i64, [u8; 32])],
        in_doubt: Option<(&str, i64, [u8; 32])>,
        link: &Mutex<impl FnMut(Vec<AuditChain>, Vec<&'static str>, bool) -> (Vec<AuditRow>, Vec<AuditChain>) + Send>,
    ) -> Result<(), StoreError> {
        let mut call = self.calls.write("append_audit").await?;
        let (mut ends, mut gone) = (Vec::with_capacity(chains.len()), Vec::new());
        for &chain in chains {
            // Locks the row; readers do not wait for it.
            let lock = diesel::update(audit_chains::table.find(chain)).set(audit_chains::seq.eq(audit_chains::seq));
            call.execute(lock).await?;
            let row: Option<ChainRow> = call.first(audit_chains::table.find(chain)).await?;
            let row = row.ok_or_else(|| StoreError::broken(format!("the audit's chain {chain} is gone")))?;
            let end = AuditChain::from(row);
            if let Some((_, seq, hash)) = seen.iter().find(|(seen, ..)| *seen == chain) {
                let is_there = match *seq {
                    seq if seq == end.seq => *hash == end.hash,
                    // The seen record was removed for its age, or is the beginning.
                    seq if seq <= end.start.seq => true,
                    seq => call.has_audit(chain, seq, hash).await?,
                };
                if !is_there {
                    gone.push(chain);
                }
            }
            ends.push(end);
        }
        let landed = match in_doubt {
            None => false,
            // Read under the lock: a transaction that was interrupted has ended by now.
            Some((chain, seq, hash)) => call.has_audit(chain, seq, &hash).await?,
        };
        let (rows, ends) = link.lock().unwrap_or_else(PoisonError::into_inner)(ends, gone, landed);
        let mut rows = rows.into_iter().map(AuditRecordRow::from).peekable();
        while rows.peek().is_some() {
            call.insert_audit(rows.by_ref().take(INSERTED_AT_ONCE).collect()).await?;
        }
        for end in ends {
            let (vouched_seq, vouched_hash) = end.vouched.as_ref().map(|mark| (mark.seq, mark.hash.to_vec())).unzip();
            let signature = end.vouched.and_then(|mark| mark.signature);
            let (key, bytes) = signature.map(|signed| (signed.key, signed.bytes)).unzip();
            let start = end.start.signature;
            let (start_key, start_bytes) = start.map(|signed| (signed.key, signed.bytes)).unzip();
            let update = diesel::update(audit_chains::table.find(end.chain)).set((
                audit_chains::start_signed_with.eq(start_key),
                audit_chains::start_signature.eq(start_bytes),
                audit_chains::seq.eq(end.seq),
                audit_chains::hash.eq(end.hash.to_vec()),
                audit_chains::vouched_seq.eq(vouched_seq),
                audit_chains::vouched_hash.eq(vouched_hash),
                audit_chains::signed_with.eq(key),
                audit_chains::signature.eq(bytes),
            ));
            call.execute(update).await?;
        }
        call.commit().await
    }

    /// The chains, in the order of their names.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn audit_chains(&self) -> Result<Vec<AuditChain>, StoreError> {
        let mut call = self.calls.read("audit_chains").await?;
        let rows: Vec<ChainRow> = call.load(audit_chains::table.order(audit_chains::chain.asc())).await?;
        call.done();
        Ok(rows.into_iter().map(AuditChain::from).collect())
    }

    /// The records of a chain after a place, at most so many, in their order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn audit_records(&self, chain: &str, after: i64, limit: i64) -> Result<Vec<AuditRow>, StoreError> {
        let mut call = self.calls.read("audit_records").await?;
        let rows = audit_records::table
            .filter(audit_records::chain.eq(chain.to_owned()))
            .filter(audit_records::seq.gt(after))
            .order(audit_records::seq.asc())
            .limit(limit);
        let rows: Vec<AuditRecordRow> = call.load(rows).await?;
        call.done();
        Ok(rows.into_iter().map(AuditRow::from).collect())
    }

    /// The records that match, newest first, at most so many.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn search_audit(&self, filter: &AuditFilter, limit: i64) -> Result<Vec<AuditRow>, StoreError> {
        let AuditFilter { tenant, no_folders, key, actor, outcome, since, until, after } = filter.clone();
        let mut call = self.calls.read("search_audit").await?;
        let place = after.unwrap_or(AuditPlace { at: i64::MAX, chain: String::new(), seq: i64::MAX });
        let (since, until) =
            (since.map_or(i64::MIN, Timestamp::as_millis), until.map_or(i64::MAX, Timestamp::as_millis));
        // A criterion that is left out matches by its own flag.
        let left_out = |left_out: bool| left_out.into_sql::<Bool>();
        let (any_key, any_actor) = (left_out(key.is_none()), left_out(actor.is_none()));
        let any_outcome = left_out(outcome.is_none());
        let is_later = audit_records::at
            .lt(place.at)
            .or(audit_records::at.eq(place.at).and(audit_records::chain.gt(place.chain.clone())))
            .or(audit_records::at
                .eq(place.at)
                .and(audit_records::chain.eq(place.chain))
                .and(audit_records::seq.lt(place.seq)));
        let rows = audit_records::table
            .filter(audit_records::at.ge(since))
            .filter(audit_records::first_at.lt(until))
            .filter(audit_records::at.le(place.at))
            .filter(is_later)
            .filter(any_key.nullable().or(audit_records::secret_key.eq(key)))
            .filter(
                any_actor
                    .nullable()
                    .or(audit_records::actor_id.eq(actor.clone()))
                    .or(audit_records::actor_name.eq(actor)),
            )
            .filter(any_outcome.or(audit_records::outcome.eq(outcome.unwrap_or_default())))
            .order((audit_records::at.desc(), audit_records::chain.asc(), audit_records::seq.desc()))
            .limit(limit);
        // The tenant has an index, which a flag would prevent from being used.
        let rows: Vec<AuditRecordRow> = match tenant {
            Some(tenant) => call.load(rows.filter(audit_records::tenant.eq(tenant))).await?,
            None if no_folders => {
                let is_of_folder = audit_records::tenant.like("/%");
                let names_nothing = audit_records::tenant.is_null().and(audit_records::secret_key.is_null());
                let is_of_company = audit_records::tenant.is_not_null().and(diesel::dsl::not(is_of_folder));
                call.load(rows.filter(names_nothing.or(is_of_company.assume_not_null()))).await?
            }
            None => call.load(rows).await?,
        };
        call.done();
        Ok(rows.into_iter().map(AuditRow::from).collect())
    }

    /// Removes the oldest records of a chain. `start` is given the chain and at most so many of its
    /// records, and returns where the chain is to begin, if anything is to be removed. Returns
    /// whether there may be more to remove.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn trim_audit(
        &self,
        chain: &'static str,
        limit: i64,
        start: impl Fn(&AuditChain, &[AuditRow]) -> Option<AuditMark>,
    ) -> Result<bool, StoreError> {
        self.calls.repeated(|| self.trim_audit_once(chain, limit, &start)).await
    }

    async fn trim_audit_once(
        &self,
        chain: &'static str,
        limit: i64,
        start: &impl Fn(&AuditChain, &[AuditRow]) -> Option<AuditMark>,
    ) -> Result<bool, StoreError> {
        let mut call = self.calls.write("trim_audit").await?;
        let lock = diesel::update(audit_chains::table.find(chain)).set(audit_chains::seq.eq(audit_chains::seq));
        call.execute(lock).await?;
        let oldest =
            audit_records::table.filter(audit_records::chain.eq(chain)).order(audit_records::seq.asc()).limit(limit);
        let row: Option<ChainRow> = call.first(audit_chains::table.find(chain)).await?;
        let oldest: Vec<AuditRecordRow> = call.load(oldest).await?;
        let oldest: Vec<AuditRow> = oldest.into_iter().map(AuditRow::from).collect();
        let Some(mark) = row.and_then(|row| start(&row.into(), &oldest)) else {
            call.roll_back().await?;
            return Ok(false);
        };
        let (key, bytes) = mark.signature.map(|signed| (signed.key, signed.bytes)).unzip();
        let old = audit_records::table.filter(audit_records::chain.eq(chain)).filter(audit_records::seq.le(mark.seq));
        call.execute(diesel::delete(old)).await?;
        let update = diesel::update(audit_chains::table.find(chain)).set((
            audit_chains::start_seq.eq(mark.seq),
            audit_chains::start_hash.eq(mark.hash.to_vec()),
            audit_chains::start_signed_with.eq(key),
            audit_chains::start_signature.eq(bytes),
        ));
        call.execute(update).await?;
        call.commit().await?;
        Ok(oldest.len() as i64 == limit)
    }
}
