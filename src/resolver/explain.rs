//! Explains an answer: what each tier has for a key, without the value.

use std::time::Duration;

use serde::Serialize;
use utoipa::ToSchema;

use super::{Cause, Resolver, Standing};
use crate::{
    flaws::{Unresolved, Unusable},
    phase::Phase,
    policy::Policy,
    secret::{SecretKey, SecretName},
    tenant::Tenant,
    tiers::{
        database::{Company, Held, Lookup},
        memory::Recall,
    },
};

/// What each tier has for one secret, and what a lookup makes of it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Explanation {
    /// The tenant.
    pub tenant: String,
    /// The secret's key.
    pub key: String,
    /// Who owns the secret.
    #[schema(value_type = String, example = "hybrid")]
    pub phase: Phase,
    /// What decided the phase: `tenant`, `rule` or `default`.
    pub phase_chosen_by: &'static str,
    /// The rule that matches, counted from 1 in the order of the configuration.
    pub rule: Option<usize>,
    /// What memory has.
    pub memory: Has,
    /// What the database has.
    pub database: Has,
    /// What is known of upstream without calling it.
    pub infisical: Has,
    /// Why Infisical's value cannot be used: `hidden`, `duplicate`, `not_text` or `reference`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unusable: Option<&'static str>,
    /// Why a reference in the value stays as it is written: `not_there`, `not_allowed`, `cycle`,
    /// `too_deep` or `too_long`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unresolved: Option<&'static str>,
    /// What a lookup does now, and why.
    pub answer: String,
}

/// What one tier has.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct Has {
    /// `fresh`, `stale`, `expired`, `absent`, `nothing`, `unreadable`, `denied`, `down`,
    /// `behind` or `unconfirmed` of a copy that later answers or an outage have overtaken,
    /// or `unused` in this phase; for upstream how it answered last.
    pub state: String,
    /// The version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<i64>,
    /// Seconds since the owner confirmed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age: Option<u64>,
    /// Who wrote it: `infisical` or `database`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<&'static str>,
    /// Why upstream does not answer, in one word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'static str>,
    /// Whether the tenant has a folder upstream, as the last list said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listed: Option<bool>,
}

impl Has {
    fn state(state: &str) -> Self {
        Self { state: state.to_owned(), ..Self::default() }
    }
}

impl Resolver {
    /// Explains the answer to a lookup. Asks the database, never upstream.
    pub async fn explain(&self, name: SecretName<'_>) -> Explanation {
        let (tenant, key) = name.to_owned();
        let watermark = self.watermark(&tenant);
        let found = self.database.find(&tenant, &key).await;
        let own = match &found {
            Ok(found) => found.company.as_ref().and_then(|company| company.phase),
            Err(_) => self.own_phase(&tenant),
        };
        let policy = self.policies().of(&tenant, &key, own);
        let memory = self.explain_memory(name);
        let database = match (&found, policy.phase) {
            (_, Phase::Infisical) => Has::state("unused"),
            (Err(_), _) => Has::state("down"),
            (Ok(found), phase) => {
                let snapshot_at = found.company.as_ref().and_then(|company| company.snapshot_at);
                let age = snapshot_at.map(|at| self.clock.age(at));
                let row = explain_row(found.company.as_ref(), &found.copy, policy, age);
                let standing = found.company.as_ref().map_or(Standing::Current, |company| watermark.standing(company));
                match standing {
                    Standing::Behind if phase == Phase::Hybrid => Has { state: "behind".to_owned(), ..row },
                    Standing::Unconfirmed if phase == Phase::Hybrid => Has { state: "unconfirmed".to_owned(), ..row },
                    _ => row,
                }
            }
        };
        let health = self.upstream.as_ref().map(|upstream| upstream.health());
        let infisical = match (policy.phase, &health) {
            (Phase::Database, _) => Has::state("unused"),
            (_, None) => Has::state("not configured"),
            (_, Some(health)) => Has {
                cause: health.cause.map(Cause::as_str),
                listed: self.tenant_directory.held().map(|list| list.tenants.contains(&tenant)),
                ..Has::state(health.state.as_str())
            },
        };
        let flaws = match (&found, policy.phase) {
            (_, Phase::Database) => KeyFlaws::default(),
            (Ok(found), Phase::Hybrid) => self.flaws_of_copy(&tenant, &key, found).await,
            (Err(_), Phase::Hybrid) | (_, Phase::Infisical) => self.flaws_in_memory(&tenant, &key),
        };
        let answer = match (self.offline.is_offline(), memory.state.as_str()) {
            (true, "stale") => {
                "memory answers what memory.offline_file held, up to memory.max_stale: the database has not answered \
                 since the start"
                    .to_owned()
            }
            (true, state) if state != "denied" => {
                "503: the database has not answered since the start, and memory.offline_file does not hold this"
                    .to_owned()
            }
            _ => {
                let answer = conclude(policy, &memory, &database);
                match health.and_then(|health| health.cause).filter(|_| answer.starts_with("upstream answers")) {
                    Some(cause) => format!("{answer}; but it does not at present: {}", cause.advice()),
                    None => answer,
                }
            }
        };
        Explanation {
            tenant: tenant.as_str().to_owned(),
            key: key.as_str().to_owned(),
            phase: policy.phase,
            phase_chosen_by: policy.chosen_by.as_str(),
            rule: policy.rule,
            memory,
            database,
            infisical,
            unusable: flaws.unusable.map(Unusable::as_str),
            unresolved: flaws.unresolved.map(Unresolved::as_str),
            answer: flaws.explain(answer),
        }
    }

    /// The secret's flaws, as the last snapshot in memory tells them.
    fn flaws_in_memory(&self, tenant: &Tenant, key: &SecretKey) -> KeyFlaws {
        let Some(names) = self.memory.names(tenant) else { return KeyFlaws::default() };
        KeyFlaws {
            unusable: names.flaws.unusable.get(key).copied(),
            unresolved: names.flaws.unresolved.get(key).copied(),
        }
    }

    /// The secret's flaws, as the copy tells them that a lookup would find.
    async fn flaws_of_copy(&self, tenant: &Tenant, key: &SecretKey, found: &Lookup) -> KeyFlaws {
        match &found.copy {
            Held::Unusable(reason) => KeyFlaws { unusable: Some(*reason), unresolved: None },
            Held::Present(stored) if stored.text.is_some() => {
                KeyFlaws { unusable: None, unresolved: self.unresolved(tenant, key).await }
            }
            _ => self.flaws_in_memory(tenant, key),
        }
    }

    fn explain_memory(&self, name: SecretName<'_>) -> Has {
        if self.memory.denied_until(name.tenant()).is_some() {
            return Has::state("denied");
        }
        let (state, entry) = match self.memory.recall(name.tenant(), name.key()) {
            Recall::Fresh(entry) if entry.answer.is_none() => ("absent", entry),
            Recall::Fresh(entry) => ("fresh", entry),
            Recall::Stale(entry) => ("stale", entry),
            Recall::Nothing => return Has::state("nothing"),
        };
        Has {
            version: entry.answer.as_ref().map(|answer| answer.version.number()),
            age: Some(self.clock.moment().since(entry.confirmed_at).as_secs()),
            ..Has::state(state)
        }
    }
}

/// The flaws of one secret upstream.
#[derive(Debug, Clone, Copy, Default)]
struct KeyFlaws {
    unusable: Option<Unusable>,
    unresolved: Option<Unresolved>,
}

impl KeyFlaws {
    fn explain(self, answer: String) -> String {
        match (self.unusable, self.unresolved) {
            (Some(reason), _) => format!("503 secret_unavailable: {}", reason.advice()),
            (None, Some(reason)) => {
                format!("{answer}; the value {}, and that stays as it is written", reason.explain())
            }
            (None, None) => answer,
        }
    }
}

fn explain_row(company: Option<&Company>, held: &Held, policy: Policy, age: Option<Duration>) -> Has {
    let state = match (held, policy.phase, age) {
        (Held::Unreadable(_), ..) => "unreadable",
        (Held::Absent | Held::Unknown | Held::Unusable(_), Phase::Database, _) => "absent",
        (Held::Present(_), Phase::Database, _) => "fresh",
        _ if company.is_some_and(|company| company.denied_at.is_some()) => "denied",
        (_, _, None) | (Held::Unknown, ..) => "nothing",
        (Held::Unusable(_), ..) => "unusable",
        (Held::Present(_), _, Some(age)) if age >= policy.ages.database_max_stale => "expired",
        (Held::Absent, _, Some(age)) if age >= policy.ages.database_max_stale => "nothing",
        (Held::Absent, _, Some(age)) if age < policy.ages.refresh_after => "absent",
        (Held::Absent, ..) => "nothing",
        (Held::Present(_), _, Some(age)) if age < policy.ages.refresh_after => "fresh",
        (Held::Present(_), ..) => "stale",
    };
    let stored = match held {
        Held::Present(stored) => Some(stored),
        Held::Absent | Held::Unknown | Held::Unreadable(_) | Held::Unusable(_) => None,
    };
    Has {
        version: stored.map(|stored| stored.version.number()),
        age: age.filter(|_| policy.phase == Phase::Hybrid).map(|age| age.as_secs()),
        source: stored.map(|stored| stored.source.as_str()),
        ..Has::state(state)
    }
}

fn conclude(policy: Policy, memory: &Has, database: &Has) -> String {
    let answer = match (memory.state.as_str(), policy.phase, database.state.as_str()) {
        ("fresh", ..) => "memory answers: what it has is younger than memory.ttl",
        ("absent", ..) => "404 from memory: its absence was proved less than memory.negative_ttl ago",
        (_, Phase::Database, "fresh") => "the database answers: it owns this tenant's secrets",
        (_, Phase::Database, "absent") => "404: the database owns this tenant's secrets and has none of this name",
        (_, Phase::Database, "unreadable") => {
            "503: the row does not open (damaged, moved, or its master key is missing), and the database owns it"
        }
        ("stale", Phase::Database, _) => "memory answers while the database is down, up to memory.max_stale",
        (_, Phase::Database, _) => "503: the database owns this tenant's secrets and is down",
        ("denied", ..) | (_, _, "denied") => {
            "503 upstream_denied until upstream lets our identity read the folder again"
        }
        (_, Phase::Hybrid, "fresh") => "the database's copy answers: it is younger than database.refresh_after",
        (_, Phase::Hybrid, "stale") => {
            "the database's copy answers at once and is refreshed behind the answer: it is older than database.refresh_after"
        }
        (_, Phase::Hybrid, "behind") => {
            "upstream answers, and nothing else: this instance has answered something later than the database's copy, \
             which could not be written back"
        }
        (_, Phase::Hybrid, "unconfirmed") => {
            "upstream answers; if it does not, the database's copy does: something may have happened since it was stored"
        }
        (_, Phase::Hybrid, "absent") => "404: the last snapshot, younger than database.refresh_after, lacks this key",
        ("stale", ..) => "upstream answers; if it does not within a moment, memory does, up to memory.max_stale",
        (_, Phase::Hybrid, "unreadable") => "upstream answers: the copy does not open and is replaced",
        (_, Phase::Hybrid | Phase::Infisical, _) => "upstream answers: nothing nearer may",
    };
    answer.to_owned()
}
