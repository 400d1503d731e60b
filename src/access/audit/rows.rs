//! Checks that the rows that the audit vouches for are still there: tokens, and tenants' secrets.
//!
//! Each row has a proof of its own (`tiers/database/seals.rs`, `tiers/database/heads.rs`), but
//! a tenant's rows and head, or the tokens and their register, could be set back together. The
//! audit is signed, and has what was done later: a head that was last changed before a write
//! that is on record as done is an old one, and so is one that began before a shredding.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

use super::record::{Kind, Outcome};
use crate::{
    clock::Timestamp,
    tiers::database::{AuditRow, Database, Sealed, StoreError, TokenRow, Verdict, VerifiedTenant},
};

/// The most that instances' clocks may differ, in milliseconds.
const CLOCK_DIFFERENCE: i64 = 60_000;

/// The actions on record as done, as far as rows must show them.
#[derive(Debug, Default)]
pub(super) struct OnRecord {
    /// When each action that has not ended yet began, by its name.
    begun: HashMap<String, i64>,
    tenants: BTreeMap<String, Deeds>,
    /// Names or ids of tokens, and when each was revoked at the latest.
    revoked: Vec<(String, i64)>,
    /// When every row was sealed.
    sealed_at: Option<i64>,
}

/// The actions on a tenant's secrets in the database.
#[derive(Debug, Default)]
struct Deeds {
    /// When the last shredding began, and ended.
    shredded: Option<(i64, i64)>,
    /// When the first and the last write since then began.
    writes: Option<(i64, i64)>,
}

impl OnRecord {
    /// Notes the content of a record. Records of administration come first.
    pub(super) fn note(&mut self, kind: Kind, row: &AuditRow) {
        if !matches!(kind, Kind::Admin | Kind::Write) {
            return;
        }
        let detail: serde_json::Value = serde_json::from_str(&row.detail).unwrap_or_default();
        fn text(text: &Option<String>) -> &str {
            text.as_deref().unwrap_or_default()
        }
        let told = |name: &str| detail[name].as_str().unwrap_or_default().to_owned();
        let (request, by) = (told("request_id"), told("recorded_by"));
        let names = [row.action.as_str(), text(&row.actor_id), text(&row.tenant), text(&row.key), &request, &by];
        let name = names.join("\n");
        if row.outcome == Outcome::Begun.as_str() {
            self.begun.entry(name).or_insert(row.at);
            return;
        }
        let Some(began) = self.begun.remove(&name) else { return };
        if row.outcome != Outcome::Done.as_str() {
            return;
        }
        match (row.action.as_str(), &row.tenant) {
            ("token.revoke", _) => {
                if let Some(token) = detail["options"]["token"].as_str() {
                    self.revoked.push((token.to_owned(), row.at));
                }
            }
            ("keys.seal", _) => self.sealed_at = Some(row.at),
            ("tenant.shred", Some(tenant)) => {
                self.tenants.entry(tenant.clone()).or_default().shredded = Some((began, row.at));
            }
            (_, Some(tenant)) if kind == Kind::Write && row.tier.as_deref() == Some("database") => {
                let deeds = self.tenants.entry(tenant.clone()).or_default();
                if deeds.shredded.is_none_or(|(_, ended)| began > ended) {
                    let (first, last) = deeds.writes.unwrap_or((began, began));
                    deeds.writes = Some((first.min(began), last.max(began)));
                }
            }
            _ => {}
        }
    }
}

/// The findings of `audit verify` about the rows.
#[derive(Debug, Default)]
pub struct Rows {
    /// Since when every row has a seal, or how far the sealing is.
    pub sealed: Option<Sealed>,
    /// Valid tokens with a seal.
    pub tokens: usize,
    /// Valid tokens without a seal.
    pub tokens_unsealed: usize,
    /// Tenants whose secrets are those that were left there.
    pub tenants: usize,
    /// Tenants that cannot be checked: an older version wrote there, or no head was made yet.
    pub tenants_unsealed: usize,
    /// The faults.
    pub findings: Vec<RowFinding>,
}

/// A fault in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowFinding {
    /// A token's row is refused.
    Token(String, String),
    /// A token that is on record as revoked is valid.
    NotRevoked(String, Timestamp),
    /// A tenant's secrets are not those that were left there.
    SetBack(String),
    /// A tenant's head is from before a write that is on record.
    Before(String, Timestamp),
    /// A tenant's head began later than the first write that it should know of, or all of its
    /// secrets are gone with it.
    Anew(String, Timestamp),
    /// A tenant's head is from before a shredding that is on record.
    Unshredded(String, Timestamp),
    /// A master key is missing, so that it cannot be checked.
    Unknown(String),
    /// It is on record that every row was sealed, and the database does not say so.
    NotSealed(Timestamp),
    /// There are data keys, or seals, and no record was ever signed.
    NoAudit,
}

impl fmt::Display for RowFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(name, why) => write!(f, "token {name}: it lets nobody in: {why}"),
            Self::NotRevoked(name, at) => {
                write!(f, "token {name}: it is valid, though it is on record as revoked at {}", at.to_rfc3339())
            }
            Self::SetBack(tenant) => write!(
                f,
                "tenant {tenant}: its secrets are not those that were left there: an older version was put back, or \
                 one, or the mark of a deletion, was taken away"
            ),
            Self::Before(tenant, at) => write!(
                f,
                "tenant {tenant}: its secrets are those of an earlier time: the write of {} is on record and not there",
                at.to_rfc3339()
            ),
            Self::Anew(tenant, at) => write!(
                f,
                "tenant {tenant}: all of its secrets were taken away: the write of {} is on record and not there",
                at.to_rfc3339()
            ),
            Self::Unshredded(tenant, at) => write!(
                f,
                "tenant {tenant}: its secrets are from before it was shredded, which is on record of {}",
                at.to_rfc3339()
            ),
            Self::Unknown(tenant) => {
                write!(
                    f,
                    "tenant {tenant}: its data key does not open, so nobody can tell; see 'secretier keys status'"
                )
            }
            Self::NotSealed(at) => write!(
                f,
                "seals: that every row was sealed is on record of {}, and the database says nothing of it",
                at.to_rfc3339()
            ),
            Self::NoAudit => f.write_str(
                "audit: there are data keys, or seals, and nothing in the audit is signed: somebody removed every \
                 record with every signature, or no instance with a master key has served anything yet",
            ),
        }
    }
}

/// Compares the rows with their proofs, and with the actions on record.
pub(super) async fn verify_rows(database: &Database, on_record: &OnRecord) -> Result<Rows, StoreError> {
    let mut rows = Rows::default();
    let known = database.known_tokens().await?;
    rows.sealed = Some(known.sealed);
    rows.tokens_unsealed = known.unsealed;
    rows.tokens = known.tokens.len().saturating_sub(known.unsealed);
    for (token, why) in &known.refused {
        rows.findings.push(RowFinding::Token(token.name.clone(), why.to_string()));
    }
    for (named, at) in &on_record.revoked {
        let is_valid = |token: &&TokenRow| {
            let is_meant = token.name == *named || token.id == *named;
            is_meant && token.revoked_at.is_none() && token.created_at.as_millis() < *at
        };
        if let Some(token) = known.tokens.iter().find(is_valid) {
            rows.findings.push(RowFinding::NotRevoked(token.name.clone(), Timestamp::from_millis(*at)));
        }
    }
    if let (Some(at), false) = (on_record.sealed_at, matches!(known.sealed, Sealed::Since(_))) {
        rows.findings.push(RowFinding::NotSealed(Timestamp::from_millis(at)));
    }
    let is_unsigned = database.audit_chains().await?.iter().all(|chain| chain.vouched.is_none());
    if is_unsigned && (known.changed_at.is_some() || !database.wrapped_by().await?.is_empty()) {
        rows.findings.push(RowFinding::NoAudit);
    }
    verify_tenants(database, on_record, known.sealed, &mut rows).await?;
    Ok(rows)
}

async fn verify_tenants(
    database: &Database,
    on_record: &OnRecord,
    sealed: Sealed,
    rows: &mut Rows,
) -> Result<(), StoreError> {
    let mut expected: BTreeMap<&str, &Deeds> =
        on_record.tenants.iter().map(|(tenant, deeds)| (tenant.as_str(), deeds)).collect();
    let mut after = None;
    loop {
        let (tenants, next) = database.verify_tenants(after.as_deref()).await?;
        for tenant in &tenants {
            match tenant.verdict {
                Verdict::Sound => rows.tenants += 1,
                Verdict::Unsealed | Verdict::Stale => rows.tenants_unsealed += 1,
                Verdict::Unknown => rows.findings.push(RowFinding::Unknown(tenant.tenant.to_string())),
                Verdict::SetBack => rows.findings.push(RowFinding::SetBack(tenant.tenant.to_string())),
            }
            if let Some(deeds) = expected.remove(tenant.tenant.as_str()) {
                rows.findings.extend(compare(tenant, deeds, sealed));
            }
        }
        after = next;
        if after.is_none() {
            break;
        }
    }
    for (tenant, deeds) in expected {
        if let (Some((_, last)), Sealed::Since(since)) = (deeds.writes, sealed)
            && last > since.as_millis()
        {
            rows.findings.push(RowFinding::Anew(tenant.to_owned(), Timestamp::from_millis(last)));
        }
    }
    Ok(())
}

fn compare(tenant: &VerifiedTenant, deeds: &Deeds, sealed: Sealed) -> Option<RowFinding> {
    let name = || tenant.tenant.to_string();
    let since_sealed = match sealed {
        Sealed::Since(since) => deeds.writes.filter(|(first, _)| *first > since.as_millis() + CLOCK_DIFFERENCE),
        Sealed::Partly | Sealed::Unchecked => None,
    };
    let Some(times) = tenant.times else {
        let (_, last) = since_sealed.filter(|_| !tenant.has_rows && tenant.verdict == Verdict::Sound)?;
        return Some(RowFinding::Anew(name(), Timestamp::from_millis(last)));
    };
    // Both times are by the clock of the process that shredded it.
    let shredded_at = tenant.shredded_at.map_or(i64::MIN, Timestamp::as_millis);
    if let Some((began, _)) = deeds.shredded.filter(|(began, _)| shredded_at < *began) {
        return Some(RowFinding::Unshredded(name(), Timestamp::from_millis(began)));
    }
    // No write has an earlier time than the head: that time only rises.
    if let Some((_, last)) = deeds.writes.filter(|(_, last)| times.changed_at.as_millis() < *last)
        && tenant.verdict != Verdict::Stale
    {
        return Some(RowFinding::Before(name(), Timestamp::from_millis(last)));
    }
    let (first, _) = since_sealed.filter(|(first, _)| times.since.as_millis() > *first + CLOCK_DIFFERENCE)?;
    Some(RowFinding::Anew(name(), Timestamp::from_millis(first)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::database::HeadTimes;

    const SEALED: i64 = 1_000_000;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn found(times: Option<(i64, i64)>, shredded_at: Option<i64>, deeds: &Deeds, sealed: Sealed) -> Option<RowFinding> {
        let tenant = VerifiedTenant {
            tenant: "acme".parse().unwrap(),
            verdict: Verdict::Sound,
            times: times.map(|(since, changed_at)| HeadTimes { since: at(since), changed_at: at(changed_at) }),
            shredded_at: shredded_at.map(at),
            has_rows: times.is_some(),
        };
        compare(&tenant, deeds, sealed)
    }

    #[test]
    fn a_head_is_held_to_the_writes_and_shreddings_on_record() {
        let (acme, sealed) = ("acme".to_owned(), Sealed::Since(at(SEALED)));
        let (first, last) = (SEALED + 2 * CLOCK_DIFFERENCE, SEALED + 3 * CLOCK_DIFFERENCE);
        let deeds = Deeds { shredded: None, writes: Some((first, last)) };
        assert_eq!(found(Some((SEALED, last)), None, &deeds, sealed), None);
        let before = RowFinding::Before(acme.clone(), at(last));
        assert_eq!(found(Some((SEALED, last - 1)), None, &deeds, sealed), Some(before.clone()));
        assert_eq!(found(Some((SEALED, last - 1)), None, &deeds, Sealed::Partly), Some(before));
        // Clocks may differ, but not by so much.
        assert_eq!(found(Some((first + CLOCK_DIFFERENCE, last)), None, &deeds, sealed), None);
        let anew = Some(RowFinding::Anew(acme.clone(), at(first)));
        assert_eq!(found(Some((first + CLOCK_DIFFERENCE + 1, last)), None, &deeds, sealed), anew);
        assert_eq!(
            found(Some((first + CLOCK_DIFFERENCE + 1, last)), None, &deeds, Sealed::Partly),
            None,
            "adopted since"
        );
        assert_eq!(found(None, None, &deeds, sealed), Some(RowFinding::Anew(acme.clone(), at(last))));
        assert_eq!(found(None, None, &deeds, Sealed::Partly), None);

        let deeds = Deeds { shredded: Some((first, last)), writes: None };
        let unshredded = Some(RowFinding::Unshredded(acme, at(first)));
        assert_eq!(found(Some((first, last)), None, &deeds, sealed), unshredded);
        assert_eq!(found(Some((first, last)), Some(first - 1), &deeds, sealed), unshredded);
        assert_eq!(found(Some((first, last)), Some(first), &deeds, sealed), None);
        assert_eq!(found(None, None, &deeds, sealed), None);
    }
}
