//! A request's query: its parameters, and those of a search in the audit.

use serde::Serialize;
use utoipa::ToSchema;

use super::respond::Problem;
use crate::{
    access::audit::{Outcome, to_json},
    clock::Timestamp,
    tiers::database::{AuditFilter, AuditPlace, AuditRow},
};

/// The parameters of a request, each one that its route knows. A mistyped one is refused: the
/// answer must not be taken for what it would have asked for, least of all after a change.
pub(super) struct Query<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Query<'a> {
    /// The query of a request without parameters.
    pub(super) const NONE: Self = Self(Vec::new());

    /// Parses a query of a route that knows these parameters.
    pub(super) fn parse(query: Option<&'a str>, known: &[&str]) -> Result<Self, Problem> {
        let mut found = Self::NONE;
        for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if !known.contains(&name) {
                return Err(Problem::invalid_query(match known {
                    [] => "this request takes no parameters".to_owned(),
                    [only] => format!("the only parameter here is {only}"),
                    [first @ .., last] => format!("the parameters here are {} and {last}", first.join(", ")),
                }));
            }
            if found.get(name).is_some() {
                return Err(Problem::invalid_query(format!("{name} stands there twice")));
            }
            found.0.push((name, value));
        }
        Ok(found)
    }

    /// A parameter as it came, still percent-encoded.
    pub(super) fn get(&self, name: &str) -> Option<&'a str> {
        self.0.iter().find(|(found, _)| *found == name).map(|(_, value)| *value)
    }
}

/// A search: its filter, and the number of records to show.
pub(super) struct Search {
    pub(super) filter: AuditFilter,
    pub(super) limit: i64,
}

/// Records that were found.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditPage {
    /// Newest first.
    #[schema(value_type = Vec<Object>)]
    records: Vec<serde_json::Value>,
    /// What to give as `after` to see more; left out at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

impl Search {
    /// The parameters of a search.
    pub(super) const PARAMETERS: &[&str] = &["tenant", "key", "actor", "outcome", "since", "until", "limit", "after"];

    const USUAL: i64 = 100;
    const MOST: i64 = 1000;

    pub(super) fn parse(query: &Query<'_>) -> Result<Self, Problem> {
        let mut search = Self { filter: AuditFilter::default(), limit: Self::USUAL };
        for (name, value) in &query.0 {
            let value = percent_encoding::percent_decode_str(value).decode_utf8();
            let value = value.map_err(|_| Problem::invalid_query(format!("{name} is not text (UTF-8)")))?;
            if value.contains(char::is_control) {
                return Err(Problem::invalid_query(format!(
                    "{name} has a control character, which nothing on record has"
                )));
            }
            search.set(name, &value)?;
        }
        Ok(search)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), Problem> {
        let time = || {
            let wrong = || format!("{name} takes a time as in 2026-01-31T12:00:00Z");
            Timestamp::from_rfc3339(value).ok_or_else(|| Problem::invalid_query(wrong()))
        };
        let filter = &mut self.filter;
        match name {
            "tenant" => filter.tenant = Some(value.to_owned()),
            "key" => filter.key = Some(value.to_owned()),
            "actor" => filter.actor = Some(value.to_owned()),
            "outcome" if Outcome::ALL.iter().any(|outcome| outcome.as_str() == value) => {
                filter.outcome = Some(value.to_owned());
            }
            "outcome" => {
                let words = Outcome::ALL.map(Outcome::as_str).join(", ");
                return Err(Problem::invalid_query(format!("outcome takes one of {words}")));
            }
            "since" => filter.since = Some(time()?),
            "until" => filter.until = Some(time()?),
            "after" => {
                let wrong = || Problem::invalid_query("after takes what the page before gave as next");
                filter.after = Some(parse_place(value).ok_or_else(wrong)?);
            }
            "limit" => {
                let number = value.parse().ok().filter(|number| (1..=Self::MOST).contains(number));
                let wrong = || Problem::invalid_query(format!("limit takes a number from 1 to {}", Self::MOST));
                self.limit = number.ok_or_else(wrong)?;
            }
            _ => return Err(Problem::invalid_query(format!("{name} is no parameter of a search"))),
        }
        Ok(())
    }

    /// The records that were found, with the position of the rest.
    pub(super) fn page(&self, found: &[AuditRow]) -> AuditPage {
        let is_full = i64::try_from(found.len()).is_ok_and(|found| found >= self.limit);
        let next = found.last().filter(|_| is_full).map(|last| format!("{}.{}.{}", last.at, last.chain, last.seq));
        AuditPage { records: found.iter().map(to_json).collect(), next }
    }
}

fn parse_place(text: &str) -> Option<AuditPlace> {
    let mut parts = text.splitn(3, '.');
    let (at, chain, seq) = (parts.next()?, parts.next()?, parts.next()?);
    Some(AuditPlace { at: at.parse().ok()?, chain: chain.to_owned(), seq: seq.parse().ok()? })
}
