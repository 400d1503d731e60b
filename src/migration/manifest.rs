//! The signed report of a run: which tenants, how many secrets, which digests, when. It
//! holds no value, and no secret's name except in the reasons of failures.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::run::{Outcome, Summary};
use crate::{
    clock::Timestamp,
    sealing::{KeyPurpose, KeyRing, MasterKeyId},
};

const VERSION: u64 = 1;

/// A report with its signature: HMAC-SHA256 under a key derived from the master key, over
/// the report as JSON without blanks and with its members in the order of their names.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signed {
    /// The report.
    pub manifest: Value,
    /// The master key that the signature's key is derived from.
    pub master_key: String,
    /// The signature, in hex.
    pub signature: String,
}

/// Why a report cannot be trusted.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is no report.
    #[error("it is no report of a migration")]
    Malformed,
    /// The master key is in no source.
    #[error("the master key {0} that it is signed under is in no source, so the signature cannot be checked")]
    NoKey(String),
    /// It was changed.
    #[error("the signature is not that of this report: it was changed, or signed elsewhere")]
    Forged,
}

impl Signed {
    /// Reports a run; `None` where there is no master key to sign with.
    #[must_use]
    pub fn of(summary: &Summary, environment: &str, ring: &KeyRing, now: Timestamp) -> Option<Self> {
        let key = ring.first()?.derive(KeyPurpose::MigrationManifest);
        let tenants: Vec<Value> = summary.outcomes.iter().map(line).collect();
        let already: Vec<&str> = summary.already.iter().map(|tenant| tenant.as_str()).collect();
        let manifest = serde_json::json!({
            "version": VERSION,
            "environment": environment,
            "run": summary.run.id,
            "started_at": summary.run.started_at.to_rfc3339(),
            "reported_at": now.to_rfc3339(),
            "tenants": tenants,
            "already": already,
            "unusable": summary.unusable,
        });
        let signature = key.tag(&[manifest.to_string().as_bytes()]).to_string();
        Some(Self { manifest, master_key: key.master_key().to_string(), signature })
    }

    /// Reads a report and checks its signature.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn read(text: &str, ring: &KeyRing) -> Result<Self, ManifestError> {
        let signed: Self = serde_json::from_str(text).map_err(|_| ManifestError::Malformed)?;
        let id = signed.master_key.parse::<MasterKeyId>().map_err(|_| ManifestError::Malformed)?;
        let key = ring.find(id).ok_or_else(|| ManifestError::NoKey(signed.master_key.clone()))?;
        let tag = key.derive(KeyPurpose::MigrationManifest).tag(&[signed.manifest.to_string().as_bytes()]);
        let given = hex::decode(&signed.signature).map_err(|_| ManifestError::Malformed)?;
        if tag.is(&given) && signed.is_written_as(text.trim()) { Ok(signed) } else { Err(ManifestError::Forged) }
    }

    /// Whether the text has this content and nothing else: if a member is there twice, this
    /// program reads one of the two, and another program may read the other.
    fn is_written_as(&self, text: &str) -> bool {
        let written = [serde_json::to_string_pretty(self), serde_json::to_string(self)];
        written.into_iter().flatten().any(|written| written == text)
    }
}

/// One tenant's line of the report.
#[must_use]
pub fn line(outcome: &Outcome) -> Value {
    let time = |at: Option<Timestamp>| at.map(Timestamp::to_rfc3339);
    let failure = outcome.failure.as_ref();
    serde_json::json!({
        "tenant": outcome.tenant.as_str(),
        "step": outcome.step,
        "secrets": outcome.secrets,
        "digest": outcome.digest,
        "verified_at": time(outcome.verified_at),
        "switched_at": time(outcome.switched_at),
        "reason": failure.map(|failure| failure.reason),
        "error": failure.map(|failure| &failure.error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        sealing::MasterKey,
        tiers::database::{Run, RunKind},
    };

    #[test]
    fn a_report_that_was_changed_is_refused() {
        let at = Timestamp::from_millis(1_700_000_000_000);
        let run = Run {
            id: "r".to_owned(),
            kind: RunKind::Run,
            options: String::new(),
            started_by: String::new(),
            total: 0,
            started_at: at,
            seen_at: at,
            ended_at: Some(at),
        };
        let already = vec!["acme".parse().unwrap()];
        let summary = Summary { run, outcomes: Vec::new(), already, unusable: Vec::new() };
        let ring = KeyRing::new(vec![MasterKey::generate().unwrap()]);
        let signed = Signed::of(&summary, "prod", &ring, at).unwrap();
        let text = serde_json::to_string_pretty(&signed).unwrap();
        Signed::read(&text, &ring).unwrap();
        let changed = text.replace("acme", "evil");
        assert!(matches!(Signed::read(&changed, &ring), Err(ManifestError::Forged)));
        let added = text.replace("\"already\": [", "\"already\": [\"evil\"],\n    \"already\": [");
        assert!(added.contains("evil"));
        assert!(matches!(Signed::read(&added, &ring), Err(ManifestError::Forged)), "a member that is there twice");
        let compact = serde_json::to_string(&signed).unwrap();
        Signed::read(&format!("{compact}\n"), &ring).unwrap();
        let other = KeyRing::new(vec![MasterKey::generate().unwrap()]);
        assert!(matches!(Signed::read(&text, &other), Err(ManifestError::NoKey(_))));
    }
}
