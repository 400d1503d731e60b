//! Chains: how a record's hash covers the one before, how ends are signed, and what a check finds.
//!
//! A record's hash is SHA-256 over the chain's name, its place, everything that it says and
//! the hash before, each part with its length. To change, remove or move a record, an attacker
//! must make every later hash anew; signatures (HMAC-SHA256 under a key derived from the
//! master key, which is not in the database) then no longer fit, nor does the end of the
//! chain, which is signed with its place. One thing this cannot find by itself: a database that
//! was set back to an earlier state as a whole. An operator who keeps the end that an earlier
//! verification printed can.

use std::{borrow::Cow, fmt};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::record::Record;
use crate::{
    legible,
    sealing::{KeyPurpose, KeyRing},
    tiers::database::{AuditChain, AuditMark, AuditRow, Signed},
};

/// The statement that a signature vouches for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vouches {
    /// The record and all before it are genuine.
    Checkpoint,
    /// The chain ended here.
    End,
    /// The records before were removed for their age.
    Start,
}

impl Vouches {
    fn label(self) -> &'static [u8] {
        match self {
            Self::Checkpoint => b"checkpoint",
            Self::End => b"end",
            Self::Start => b"start",
        }
    }
}

/// Signs and checks, with the master keys that are at hand.
#[derive(Clone, Copy)]
pub(super) struct Signer<'a>(pub(super) &'a KeyRing);

impl Signer<'_> {
    fn sign(self, vouches: Vouches, chain: &str, seq: i64, hash: &[u8; 32]) -> Option<Signed> {
        let key = self.0.first()?.derive(KeyPurpose::Audit);
        let tag = key.tag(&parts(vouches, chain, &seq.to_be_bytes(), hash));
        Some(Signed { key: key.master_key().to_string(), bytes: tag.as_bytes().to_vec() })
    }

    /// Whether the beginning of a chain is signed with a master key; `None` where that key
    /// is not at hand.
    fn is_start(self, chain: &str, start: &AuditMark) -> Option<bool> {
        match &start.signature {
            // Nothing was ever removed, which needs no signature.
            None => Some(start.seq == 0 && start.hash == [0; 32]),
            Some(signed) => self.fits(Vouches::Start, chain, start.seq, &start.hash, signed),
        }
    }

    /// Whether the signature fits; `None` where its key is not at hand.
    fn fits(self, vouches: Vouches, chain: &str, seq: i64, hash: &[u8; 32], signed: &Signed) -> Option<bool> {
        // A malformed id was not written by anybody with a key.
        let Ok(id) = signed.key.parse() else { return Some(false) };
        let key = self.0.find(id)?.derive(KeyPurpose::Audit);
        Some(key.tag(&parts(vouches, chain, &seq.to_be_bytes(), hash)).is(&signed.bytes))
    }
}

fn parts<'a>(vouches: Vouches, chain: &'a str, seq: &'a [u8; 8], hash: &'a [u8; 32]) -> [&'a [u8]; 4] {
    [vouches.label(), chain.as_bytes(), seq, hash]
}

/// Appends the records to a chain, and signs the last of them and the end.
///
/// Without a signer the existing signatures stay as they are: where a chain does not end as it was
/// left, a new signature would vouch for somebody's change.
pub(super) fn link(
    chain: &mut AuditChain,
    records: impl IntoIterator<Item = Record>,
    recorded_by: &str,
    signer: Option<Signer<'_>>,
) -> Vec<AuditRow> {
    let mut rows: Vec<AuditRow> = Vec::new();
    for record in records {
        let seq = chain.seq + 1;
        let row = placed(record, &chain.chain, seq, &chain.hash, recorded_by);
        (chain.seq, chain.hash) = (seq, row.hash);
        rows.push(row);
    }
    let Some(signer) = signer else { return rows };
    if let Some(last) = rows.last_mut() {
        last.signature = signer.sign(Vouches::Checkpoint, &chain.chain, last.seq, &last.hash);
    }
    // With the current wrapping key, so that older keys are not needed for it.
    let signed_before = chain.start.signature.as_ref().map(|signed| signed.key.clone());
    let is_start = signer.is_start(&chain.chain, &chain.start) == Some(true);
    let signature = signer.sign(Vouches::Start, &chain.chain, chain.start.seq, &chain.start.hash);
    if is_start && signed_before.is_some() && signed_before != signature.as_ref().map(|signed| signed.key.clone()) {
        chain.start.signature = signature;
    }
    if let Some(signature) = signer.sign(Vouches::End, &chain.chain, chain.seq, &chain.hash) {
        chain.vouched = Some(AuditMark { seq: chain.seq, hash: chain.hash, signature: Some(signature) });
    }
    rows
}

/// Whether a chain ends where somebody with a master key left it, or further on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It ends where it was left, or further on.
    Sound,
    /// It is signed with a key that is not at hand: another instance may have read a new key
    /// earlier.
    Unknown,
    /// It was cut, or its end or beginning replaced.
    Broken,
}

/// The state of a chain's end. The first signature of all is made for all chains at once, so a
/// chain without one is sound only while none has any (`is_new`).
pub(super) fn state(chain: &AuditChain, is_new: bool, signer: Signer<'_>) -> State {
    let Some(AuditMark { seq, hash, signature: Some(signed) }) = &chain.vouched else {
        return if is_new { State::Sound } else { State::Broken };
    };
    let is_end = *seq < chain.seq || (*seq == chain.seq && *hash == chain.hash);
    match signer.fits(Vouches::End, &chain.chain, *seq, hash, signed) {
        Some(true) if is_end && signer.is_start(&chain.chain, &chain.start) != Some(false) => State::Sound,
        None if is_end => State::Unknown,
        Some(_) | None => State::Broken,
    }
}

/// How far a chain may be removed for its age: the last place before `before` that is signed
/// with a master key. Records that do not fit stay: an attacker who dates records back could
/// otherwise have us remove the changed ones.
pub(super) fn removable(chain: &AuditChain, oldest: &[AuditRow], before: i64, signer: Signer<'_>) -> Option<AuditMark> {
    if signer.is_start(&chain.chain, &chain.start) != Some(true) {
        return None;
    }
    let vouched = chain.vouched.as_ref().and_then(|mark| {
        let signed = mark.signature.as_ref()?;
        (signer.fits(Vouches::End, &chain.chain, mark.seq, &mark.hash, signed)?).then_some((mark.seq, mark.hash))
    });
    let (mut at, mut found) = ((chain.start.seq, chain.start.hash), None);
    for row in oldest.iter().take_while(|row| row.at < before) {
        if row.seq != at.0 + 1 || hash(row, &at.1) != row.hash {
            break;
        }
        at = (row.seq, row.hash);
        let fits = |signed| signer.fits(Vouches::Checkpoint, &chain.chain, row.seq, &row.hash, signed);
        if vouched == Some(at) || row.signature.as_ref().and_then(fits) == Some(true) {
            found = Some(at);
        }
    }
    let (seq, hash) = found?;
    Some(AuditMark { seq, hash, signature: Some(signer.sign(Vouches::Start, &chain.chain, seq, &hash)?) })
}

fn placed(record: Record, chain: &str, seq: i64, before: &[u8; 32], recorded_by: &str) -> AuditRow {
    let (actor_id, actor_name) = match record.actor {
        Some(actor) => (Some(actor.id), actor.name),
        None => (None, None),
    };
    let mut detail = serde_json::to_value(&record.detail).unwrap_or_default();
    detail["recorded_by"] = recorded_by.into();
    // Made legible before it is hashed, so that callers' texts can be read safely wherever they go
    // from here. Tenant, key and names stay exact, because searches use them.
    make_legible(&mut detail);
    let mut row = AuditRow {
        chain: chain.to_owned(),
        seq,
        first_at: record.first_at.as_millis(),
        at: record.at.as_millis(),
        count: i64::try_from(record.count).unwrap_or(i64::MAX),
        actor_id,
        actor_name,
        action: record.action.to_owned(),
        tenant: record.tenant,
        key: record.key,
        outcome: record.outcome.as_str().to_owned(),
        tier: record.tier.map(str::to_owned),
        detail: detail.to_string(),
        hash: [0; 32],
        signature: None,
    };
    row.hash = hash(&row, before);
    row
}

fn make_legible(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Cow::Owned(shown) = legible::line(text) {
                *text = shown;
            }
        }
        Value::Array(values) => values.iter_mut().for_each(make_legible),
        Value::Object(values) => values.values_mut().for_each(make_legible),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// A record's hash, given the hash of the record before.
fn hash(row: &AuditRow, before: &[u8; 32]) -> [u8; 32] {
    let mut hash = Sha256::new_with_prefix(b"secretier audit record v1");
    hash.update(before);
    let mut add = |part: Option<&[u8]>| match part {
        Some(bytes) => {
            hash.update([1]);
            hash.update((bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        }
        None => hash.update([0]),
    };
    add(Some(row.chain.as_bytes()));
    for number in [row.seq, row.first_at, row.at, row.count] {
        add(Some(&number.to_be_bytes()));
    }
    let texts = [&row.actor_id, &row.actor_name, &row.tenant, &row.key, &row.tier];
    for text in texts {
        add(text.as_ref().map(String::as_bytes));
    }
    for text in [&row.action, &row.outcome, &row.detail] {
        add(Some(text.as_bytes()));
    }
    hash.finalize().into()
}

/// A fault in a chain, and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The chain.
    pub chain: String,
    /// The record, or the first of several.
    pub seq: i64,
    /// The kind of fault.
    pub fault: Fault,
}

/// The kinds of faults of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A record is not the one that was written in this place.
    Changed,
    /// Records up to this one are missing.
    Missing(i64),
    /// A record has a place that another has, too.
    Repeated,
    /// A record is signed, and the signature does not belong to this chain: it, or one before it,
    /// was replaced and the hashes were made anew.
    Signature,
    /// The end of the chain was removed: the records up to this one.
    Truncated(i64),
    /// The note of the chain's end was changed.
    End,
    /// Records follow the noted end.
    Beyond,
    /// The note of the chain's beginning was changed.
    Start,
    /// No signature covers this record and those after it.
    Unsigned,
    /// The end, or the beginning, is signed with a master key that is not at hand.
    UnknownKey(String),
    /// The end of an earlier verification is not part of the chain.
    NotThatHistory,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { chain, seq, fault } = self;
        match fault {
            Fault::Changed => write!(f, "{chain} {seq}: this record was changed, or put in the place of another"),
            Fault::Missing(to) if to == seq => write!(f, "{chain} {seq}: this record was removed"),
            Fault::Missing(to) => write!(f, "{chain} {seq}: the records {seq} to {to} were removed"),
            Fault::Repeated => write!(f, "{chain} {seq}: this place is taken twice"),
            Fault::Signature => write!(
                f,
                "{chain} {seq}: the signature does not fit; this record or one before it, back to the last \
                 signature that fits, was replaced"
            ),
            Fault::Truncated(to) if to == seq => write!(f, "{chain} {seq}: the last record was removed"),
            Fault::Truncated(to) => write!(f, "{chain} {seq}: the end was removed, the records {seq} to {to}"),
            Fault::End => {
                write!(f, "{chain} {seq}: the noted end of the chain was changed, or records before it replaced")
            }
            Fault::Beyond => write!(f, "{chain} {seq}: records were added behind the noted end"),
            Fault::Start => write!(f, "{chain} {seq}: the noted beginning of the chain was changed"),
            Fault::Unsigned => write!(
                f,
                "{chain} {seq}: nobody vouches for the records from here on; a command without a master key wrote \
                 them (a running instance signs them within seconds), or signatures were removed"
            ),
            Fault::UnknownKey(key) => {
                write!(
                    f,
                    "{chain} {seq}: this end of the chain is signed with the master key {key}, which is not in \
                     keys.sources"
                )
            }
            Fault::NotThatHistory => {
                write!(f, "{chain} {seq}: the record that the earlier end names is not in the chain")
            }
        }
    }
}

/// Checks one chain, record by record, and notes what does not fit. Keeps no records.
pub(super) struct Walk<'a> {
    signer: Signer<'a>,
    chain: String,
    /// The hash before the next record; `None` where that record was removed.
    before: Option<[u8; 32]>,
    /// The hashes that may precede the next record after records that did not fit: those of
    /// replaced records.
    candidates: Vec<[u8; 32]>,
    seq: i64,
    /// The last place that a signature covers.
    vouched: i64,
    /// Places that must be met, each with its hash and the fault if it is not met.
    expected: Vec<(i64, [u8; 32], Fault)>,
    records: u64,
    findings: Vec<Finding>,
}

/// The most hashes that are remembered for a run of records that do not fit.
const CANDIDATES: usize = 64;

/// The most findings in one chain: more would add nothing.
const FINDINGS: usize = 100;

impl<'a> Walk<'a> {
    /// Begins at the start of a chain.
    pub(super) fn new(keys: &'a KeyRing, start: &AuditMark, chain: &str) -> Self {
        let signer = Signer(keys);
        let mut walk = Self {
            signer,
            chain: chain.to_owned(),
            before: Some(start.hash),
            candidates: Vec::new(),
            seq: start.seq,
            vouched: start.seq,
            expected: Vec::new(),
            records: 0,
            findings: Vec::new(),
        };
        match (signer.is_start(chain, start), &start.signature) {
            (Some(false), _) => walk.find(start.seq, Fault::Start),
            (None, Some(signed)) => walk.find(start.seq, Fault::UnknownKey(signed.key.clone())),
            (Some(true), _) | (None, None) => {}
        }
        walk
    }

    /// Expects a place too that is known to be part of the chain.
    pub(super) fn expect(&mut self, seq: i64, hash: [u8; 32], otherwise: Fault) {
        // A removed record cannot be checked; its hash is in the chain's start.
        if seq > self.seq || (seq == self.seq && self.before.is_some_and(|before| before != hash)) {
            self.expected.push((seq, hash, otherwise));
        }
    }

    /// The place up to which the walk has come.
    pub(super) fn seq(&self) -> i64 {
        self.seq
    }

    /// Begins in the middle of a chain, at this place: earlier records are not at hand.
    pub(super) fn from_the_middle(keys: &'a KeyRing, seq: i64, chain: &str) -> Self {
        let mut walk = Self::new(keys, &AuditMark { seq: 0, hash: [0; 32], signature: None }, chain);
        (walk.seq, walk.vouched, walk.before) = (seq - 1, seq - 1, None);
        walk
    }

    /// The next record.
    pub(super) fn step(&mut self, row: &AuditRow) {
        self.records += 1;
        if row.seq <= self.seq {
            self.find(row.seq, Fault::Repeated);
            return;
        }
        if row.seq > self.seq + 1 {
            self.find(self.seq + 1, Fault::Missing(row.seq - 1));
            // Its hash covers a missing record; the next record confirms it.
            (self.before, self.candidates) = (None, Vec::new());
        }
        let made = self.before.map(|before| hash(row, &before));
        let fits = match made {
            None => true,
            Some(made) => made == row.hash || self.candidates.iter().any(|candidate| hash(row, candidate) == row.hash),
        };
        if fits {
            self.candidates.clear();
        } else {
            self.find(row.seq, Fault::Changed);
            if self.candidates.len() < CANDIDATES {
                self.candidates.extend(self.before);
                self.candidates.extend(made);
                self.candidates.push(row.hash);
            }
        }
        if let Some(signed) = &row.signature {
            match self.signer.fits(Vouches::Checkpoint, &self.chain, row.seq, &row.hash, signed) {
                Some(true) => self.vouched = row.seq,
                // A record that does not fit by itself is reported once.
                Some(false) if fits => self.find(row.seq, Fault::Signature),
                Some(false) | None => {}
            }
        }
        (self.before, self.seq) = (Some(row.hash), row.seq);
        self.meet(row.seq, &row.hash);
    }

    /// Compares the end of the walk with the noted end of the chain. `is_new` says
    /// that nothing of it was ever signed, and need not be.
    pub(super) fn end(mut self, end: &AuditChain, is_new: bool) -> Walked {
        if end.seq > self.seq {
            self.find(self.seq + 1, Fault::Truncated(end.seq));
        } else if end.seq < self.seq {
            self.find(end.seq + 1, Fault::Beyond);
        } else if self.before.is_some_and(|before| before != end.hash) {
            self.find(end.seq, Fault::End);
        }
        match &end.vouched {
            Some(AuditMark { seq, hash, signature: Some(signed) }) => {
                match self.signer.fits(Vouches::End, &self.chain, *seq, hash, signed) {
                    Some(true) if *seq > end.seq => self.find(end.seq, Fault::End),
                    Some(true) => self.vouched = self.vouched.max(*seq),
                    Some(false) => self.find(*seq, Fault::End),
                    None => {
                        self.find(*seq, Fault::UnknownKey(signed.key.clone()));
                        self.vouched = self.vouched.max(*seq);
                    }
                }
            }
            Some(_) | None if !is_new => self.find(end.seq, Fault::Unsigned),
            Some(_) | None => {}
        }
        self.finish()
    }

    /// The same where no end of the chain is noted.
    pub(super) fn finish(mut self) -> Walked {
        let is_told = |finding: &Finding| matches!(finding.fault, Fault::Unsigned);
        if self.vouched < self.seq && !self.findings.iter().any(is_told) {
            self.find(self.vouched + 1, Fault::Unsigned);
        }
        for (seq, _, otherwise) in std::mem::take(&mut self.expected) {
            // Records that were cut off are reported by the end.
            let is_told = otherwise == Fault::End && seq > self.seq;
            if !is_told {
                self.find(seq, otherwise);
            }
        }
        self.findings.dedup();
        Walked {
            chain: self.chain,
            records: self.records,
            end: (self.seq, self.before.unwrap_or_default()),
            findings: self.findings,
        }
    }

    fn meet(&mut self, seq: i64, hash: &[u8; 32]) {
        self.expected.retain(|(place, expected, _)| (*place, expected) != (seq, hash));
    }

    fn find(&mut self, seq: i64, fault: Fault) {
        if self.findings.len() < FINDINGS {
            self.findings.push(Finding { chain: self.chain.clone(), seq, fault });
        }
    }
}

/// A chain that was verified.
#[derive(Debug)]
pub struct Walked {
    /// The chain.
    pub chain: String,
    /// The number of records.
    pub records: u64,
    /// The last of them: its place and hash.
    pub end: (i64, [u8; 32]),
    /// The faults.
    pub findings: Vec<Finding>,
}
