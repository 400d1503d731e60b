//! A search in the audit.

use http::StatusCode;
use serde::Serialize;
use utoipa::{OpenApi, ToSchema};

use crate::{
    access::{
        Action, Refused,
        audit::{Act, AuditFilter, AuditPlace, AuditRow, Kind, Line, Outcome, to_json},
    },
    clock::Timestamp,
    resolver::ResolveError,
    server::{
        ask::{Ask, json},
        operation::{Operation, Run},
        query::Query,
        respond::{Answer, JSON, Problem, respond},
    },
};

#[derive(OpenApi)]
#[openapi(paths(search))]
pub(super) struct Document;

pub(in crate::server) const SEARCH: Operation = Operation {
    action: "audit.search",
    parameters: Search::PARAMETERS,
    run: Run::Read(|ask, _| Box::pin(search(ask))),
};

#[utoipa::path(
    get, path = "/v1/audit", operation_id = "search_audit",
    description = "Who asked for what, newest first. For tokens that may administer; one that reaches some tenants or \
        keys names one of those.",
    params(
        ("tenant" = Option<String>, Query, pattern = r"^[^\u0000-\u001f\u007f-\u009f]*$", description = "Of this tenant"),
        ("key" = Option<String>, Query, pattern = r"^[^\u0000-\u001f\u007f-\u009f]*$", description = "Of this secret"),
        ("actor" = Option<String>, Query, pattern = r"^[^\u0000-\u001f\u007f-\u009f]*$",
            description = "By this token, by name or id, or by `uid:N`"),
        ("outcome" = Option<String>, Query, pattern = "^(found|absent|begun|done|conflict|denied|limited|invalid|failed)$",
            description = "With this outcome"),
        ("since" = Option<String>, Query, format = DateTime, pattern = "^(19[7-9]|[2-9][0-9][0-9])[0-9]-.*Z$",
            description = "From then on; UTC, 1970 at the earliest"),
        ("until" = Option<String>, Query, format = DateTime, pattern = "^(19[7-9]|[2-9][0-9][0-9])[0-9]-.*Z$",
            description = "Before then; UTC, 1970 at the earliest"),
        ("limit" = Option<i64>, Query, minimum = 1, maximum = 1000, description = "At most so many; 100 by default"),
        ("after" = Option<String>, Query, pattern = r"^[0-9]{1,15}\.[a-z]{1,16}\.[0-9]{1,15}$",
            description = "What the page before gave as `next`")
    ),
    responses((status = 200, body = AuditPage, description = "The records"))
)]
async fn search(ask: &Ask<'_>) -> Result<Answer, Problem> {
    ask.grant.allow_action(Action::Admin)?;
    let mut search = Search::parse(&ask.query)?;
    // A token that reaches some tenants or keys sees the records of those it names.
    if !ask.grant.reaches_all(search.filter.tenant.as_deref(), search.filter.key.as_deref()) {
        return Err(Refused::OutOfScope.into());
    }
    search.filter.no_folders = !ask.grant.reaches_every_folder();
    let (tenant, key) = (search.filter.tenant.as_deref(), search.filter.key.as_deref());
    let (tenant, key) = (tenant.unwrap_or_default(), key.unwrap_or_default());
    let act = Act { action: "audit.search", tenant, key, outcome: Outcome::Begun, tier: None, code: None };
    ask.service.audit.write(Kind::Admin, ask.account, act).await?;
    let found = ask.service.resolver.database().search_audit(&search.filter, search.limit).await;
    let found = found.map_err(|error| ResolveError::Database(std::sync::Arc::new(error)))?;
    Ok(respond(StatusCode::OK, JSON, json(&search.page(&found))))
}

/// A search: its filter, and the number of records to show.
struct Search {
    filter: AuditFilter,
    limit: i64,
}

/// Records that were found.
#[derive(Serialize, ToSchema)]
struct AuditPage {
    /// Newest first.
    #[schema(value_type = Vec<Line>)]
    records: Vec<serde_json::Value>,
    /// What to give as `after` to see more; left out at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

impl Search {
    /// The parameters of a search.
    const PARAMETERS: &[&str] = &["tenant", "key", "actor", "outcome", "since", "until", "limit", "after"];

    const USUAL: i64 = 100;
    const MOST: i64 = 1000;

    fn parse(query: &Query<'_>) -> Result<Self, Problem> {
        let mut search = Self { filter: AuditFilter::default(), limit: Self::USUAL };
        for (name, value) in query.each() {
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
    fn page(&self, found: &[AuditRow]) -> AuditPage {
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
