//! One record: who asked for what, from where, and with what outcome.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;

use super::{Act, Fields};
use crate::{
    access::{Grant, Peer},
    clock::Timestamp,
    legible,
};

/// The subject of a record. Each kind is a chain of its own and is kept for its own time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Commands and requests that concern the instance rather than one secret.
    Admin,
    /// Callers who were not admitted, or not allowed to do what they asked for.
    Denial,
    /// Lookups and lists.
    Lookup,
    /// Changes of secrets.
    Write,
}

impl Kind {
    /// Every kind, in the order of their names: the order in which chains are locked.
    pub const ALL: [Self; 4] = [Self::Admin, Self::Denial, Self::Lookup, Self::Write];

    /// The chain's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Denial => "denial",
            Self::Lookup => "lookup",
            Self::Write => "write",
        }
    }
}

/// The outcome of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The secret, or the list.
    Found,
    /// Proof that there is none.
    Absent,
    /// It is about to be tried: the record that says how it ended follows. Where none
    /// follows, the process or the caller went away meanwhile.
    Begun,
    /// It was done.
    Done,
    /// A write whose condition did not hold, or that its owner did not accept.
    Conflict,
    /// Not admitted, or out of scope.
    Denied,
    /// Too often.
    Limited,
    /// A request that nobody could answer.
    Invalid,
    /// No tier could answer, or the write failed.
    Failed,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 9] = [
        Self::Found,
        Self::Absent,
        Self::Begun,
        Self::Done,
        Self::Conflict,
        Self::Denied,
        Self::Limited,
        Self::Invalid,
        Self::Failed,
    ];

    /// The word in the record.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::Absent => "absent",
            Self::Begun => "begun",
            Self::Done => "done",
            Self::Conflict => "conflict",
            Self::Denied => "denied",
            Self::Limited => "limited",
            Self::Invalid => "invalid",
            Self::Failed => "failed",
        }
    }
}

/// The actor of a record.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Actor {
    /// A token's public id, or `uid:N`.
    pub id: String,
    /// The actor's name, for people, where it is known.
    pub name: Option<String>,
}

impl From<&Grant> for Actor {
    fn from(grant: &Grant) -> Self {
        Self { id: grant.id.clone(), name: Some(grant.name.clone()) }
    }
}

/// The content of a record. It gets its place in a chain when it is written.
#[derive(Debug, Clone)]
pub struct Record {
    /// Its subject.
    pub kind: Kind,
    /// When it happened; of several equal ones, the first time.
    pub first_at: Timestamp,
    /// The last time.
    pub at: Timestamp,
    /// The number of events that it counts.
    pub count: u64,
    /// How many of them the detection of attacks has seen before.
    pub(super) seen: u64,
    /// The actor, where it is known.
    pub actor: Option<Actor>,
    /// The actor's token, where it is known. It counts records that cannot be kept by themselves.
    pub grant: Option<Arc<Grant>>,
    /// The action.
    pub action: &'static str,
    /// The tenant, as it was asked for.
    pub tenant: Option<String>,
    /// The secret, as it was asked for.
    pub key: Option<String>,
    /// The outcome.
    pub outcome: Outcome,
    /// The tier that answered.
    pub tier: Option<&'static str>,
    /// Everything else.
    pub detail: Detail,
}

impl Record {
    /// The record of a step of a rotation that was begun by `by`.
    pub(super) fn of_rotation(by: &str, act: Act<'_>, at: Timestamp) -> Self {
        let Act { action, tenant, key, outcome, tier, code } = act;
        let actor = Some(Actor { id: "rotation".to_owned(), name: Some(by.to_owned()) });
        let detail = Detail { code, ..Detail::default() };
        let (tenant, key) = (Some(tenant.to_owned()), Some(key.to_owned()));
        Self {
            kind: Kind::Write,
            first_at: at,
            at,
            count: 1,
            seen: 0,
            actor,
            grant: None,
            action,
            tenant,
            key,
            outcome,
            tier,
            detail,
        }
    }

    /// The same with the caller's own texts cut short, so that no denial takes more than 4 KiB,
    /// whatever came with it.
    pub(super) fn cut_short(mut self) -> Self {
        const LONGEST_AGENT: usize = 200;
        const LONGEST_FIELDS: usize = 512;
        self.detail.agent = self.detail.agent.map(|agent| shortened(&agent, LONGEST_AGENT));
        self.detail.fields = self.detail.fields.cut_short(LONGEST_FIELDS);
        self
    }

    /// The bytes that it takes in the database, indexes included: no less than it does there, on
    /// SQLite and on PostgreSQL, and not much more.
    pub(super) fn cost(&self) -> u64 {
        /// Numbers, words, hash, signature, the recorder's name, and three indexes.
        const FIXED: usize = 400;
        let length = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let actor = self.actor.as_ref().map_or(0, |actor| actor.id.len() + length(&actor.name));
        // The tenant is in an index, too.
        let tenant = 2 * length(&self.tenant);
        // It always serialises.
        let detail = serde_json::to_string(&self.detail).map_or(0, |detail| detail.len());
        u64::try_from(FIXED + actor + tenant + length(&self.key) + detail).unwrap_or(u64::MAX)
    }
}

/// The beginning of a text, as it is recorded: with escapes, a text is longer than it came.
pub(super) fn shortened(text: &str, longest: usize) -> String {
    let shown = legible::line(text);
    shown[..shown.floor_char_boundary(longest)].to_owned()
}

/// The parts of a record that searches do not use.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Detail {
    /// The code of the error that was answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<&'static str>,
    /// The origin: an address, or `uid:N`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<Peer>,
    /// The API that was used, where it is another than our own: `infisical`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub face: Option<&'static str>,
    /// The header `User-Agent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// The header `X-Request-Id`, or the one that was made for the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// The caller's `X-Audit-*` fields.
    #[serde(skip_serializing_if = "Fields::is_empty")]
    pub fields: Fields,
    /// The options of a command, as far as they are not secret.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<&'static str, String>,
    /// Whether there were more than can be kept apart: names were left out, the count is exact.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub summed: bool,
}

#[cfg(test)]
impl Record {
    /// A record for tests.
    pub(super) fn example(kind: Kind, key: &str, outcome: Outcome) -> Self {
        let at = Timestamp::from_millis(1_700_000_000_000);
        Self {
            kind,
            first_at: at,
            at,
            count: 1,
            seen: 0,
            actor: Some(Actor { id: "uid:0".to_owned(), name: None }),
            grant: None,
            action: "put",
            tenant: Some("acme".to_owned()),
            key: Some(key.to_owned()),
            outcome,
            tier: None,
            detail: Detail::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_has_a_bounded_size_whatever_came_with_it() {
        for text in ["x", "\"", "\\", "\u{9b}", "\u{200b}", "\u{fffd}", "é"] {
            let long = |bytes: usize| text.repeat(bytes / text.len());
            let mut denial = Record::example(Kind::Denial, &long(300), Outcome::Denied);
            denial.actor = Some(Actor { id: "0123456789abcdef".to_owned(), name: Some(long(128)) });
            denial.tenant = Some(long(300));
            denial.detail = Detail {
                code: Some("out_of_scope"),
                agent: Some(long(600)),
                request_id: Some("\"".repeat(128)),
                fields: Fields((0..8).map(|number| (format!("{number:064}"), long(256))).collect()),
                ..Detail::default()
            };
            let denial = denial.cut_short();
            assert!(denial.cost() <= 4096, "{text:?}: {}", denial.cost());
            assert!(denial.detail.agent.is_some() && !denial.detail.fields.is_empty());
        }
    }
}
