//! Plans a run: its effects and its cost. Writes nothing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    num::NonZeroU32,
};

use serde::Serialize;

use super::{
    folders::Strategy,
    origin::{Content, Listed, OriginError, Problem, ProblemKind},
    run::{Options, in_the_way},
    selection::Selection,
    transfer::{Takes, Transfer},
};
use crate::{
    log,
    phase::Phase,
    tenant::Tenant,
    tiers::{
        database::{Company, Held, StoreError},
        upstream::Snapshot,
    },
};

/// The effects of a run.
#[derive(Debug, Serialize)]
pub struct Plan {
    /// Every selected tenant, at the origin and in the database, by name.
    pub tenants: Vec<Planned>,
    /// Names at the origin that cannot be a tenant's.
    pub unusable: Vec<String>,
    /// The cost of the run.
    pub cost: Cost,
    /// Notes for the operator about how the plan was made.
    pub notes: Vec<String>,
}

/// The effects of a run on one tenant.
#[derive(Debug, Serialize)]
pub struct Planned {
    /// The tenant.
    #[serde(serialize_with = "super::verify::as_text")]
    pub tenant: Tenant,
    /// The phase that holds for it now.
    pub phase: Phase,
    /// The action of the run.
    pub action: Action,
    /// Secrets at the origin; `None` where it has no such tenant, or it cannot be read.
    pub origin: Option<usize>,
    /// Secrets in the database.
    pub database: usize,
    /// Secrets that the database lacks.
    pub add: usize,
    /// Secrets whose value in the database differs.
    pub change: usize,
    /// Secrets that only the database has.
    pub remove: usize,
    /// Reasons not to migrate it, problems that are taken over as they are served today, and values
    /// that are taken over as their references give them.
    pub problems: Vec<String>,
}

/// The action of a run for a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It is migrated.
    Migrate,
    /// It is there already.
    Already,
    /// It is not migrated, because of a problem.
    Refuse,
    /// Only the database has it.
    NotThere,
}

impl Action {
    /// The word in the table.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Migrate => "migrate",
            Self::Already => "already",
            Self::Refuse => "refuse",
            Self::NotThere => "not there",
        }
    }
}

/// The cost of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Cost {
    /// Calls upstream, if nothing has to be repeated.
    pub calls: usize,
    /// Calls a minute that the migration may make; `None` where they are not limited.
    pub calls_per_minute: Option<NonZeroU32>,
    /// Minutes that the calls take at that rate.
    pub minutes: f64,
    /// How folders are read; `None` where none are.
    pub strategy: Option<Strategy>,
}

impl Cost {
    /// No calls upstream.
    #[must_use]
    pub fn none() -> Self {
        Self { calls: 0, calls_per_minute: None, minutes: 0.0, strategy: None }
    }

    /// The cost of reading this number of folders twice.
    #[must_use]
    pub fn of(tenants: usize, strategy: Strategy, calls_per_minute: Option<NonZeroU32>) -> Self {
        // A login and a list of the folders come first.
        let calls = match strategy {
            _ if tenants == 0 => 2,
            Strategy::Folder => 2 + 2 * tenants,
            Strategy::Recursive => 2 + 2,
        };
        let minutes = calls_per_minute.map_or(0.0, |per_minute| calls as f64 / f64::from(per_minute.get()));
        Self { calls, calls_per_minute, minutes: (minutes * 10.0).round() / 10.0, strategy: Some(strategy) }
    }
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The existing tenants cannot be listed.
    #[error("the tenants to migrate cannot be listed")]
    List(#[source] OriginError),
    /// Tenants were named that do not exist.
    #[error("there are no such tenants: {}", .0.join(", "))]
    Unknown(Vec<String>),
    /// The database failed.
    #[error("the database tier failed")]
    Store(#[from] StoreError),
}

impl Transfer {
    /// Plans a run with these options. Reads the origin once and the database once.
    ///
    /// # Errors
    /// [`PlanError`].
    pub async fn plan(
        &self,
        selection: &Selection,
        options: &Options,
        cost: &(dyn Fn(usize, Strategy) -> Cost + Sync),
        told: &mut (dyn FnMut(usize, usize) + Send),
    ) -> Result<Plan, PlanError> {
        let Listed { tenants: listed, unusable } = self.origin.tenants().await.map_err(PlanError::List)?;
        let stored: HashMap<Tenant, (Company, i64)> = self
            .database
            .companies()
            .await?
            .into_iter()
            .map(|(company, count)| (company.tenant.clone(), (company, count)))
            .collect();
        let known: BTreeSet<Tenant> = listed.iter().chain(stored.keys()).cloned().collect();
        let known: Vec<Tenant> = known.into_iter().collect();
        let chosen = selection.choose(&known).map_err(PlanError::Unknown)?;
        let at_origin: BTreeSet<&Tenant> = listed.iter().collect();

        let mut planned = BTreeMap::new();
        let mut open = Vec::new();
        for tenant in chosen {
            let (company, count) = match stored.get(&tenant) {
                Some((company, count)) => (Some(company), *count),
                None => (None, 0),
            };
            let phase = self.policies.phase_of(&tenant, company.and_then(|company| company.phase));
            let action = match at_origin.contains(&tenant) {
                _ if self.is_there(&tenant, company, options.to) => Action::Already,
                false => Action::NotThere,
                true => Action::Migrate,
            };
            let mut problems = Vec::new();
            let refusal = self.refusal(&tenant, company.and_then(|company| company.phase), options.to);
            let action = match refusal {
                Some(refusal) if action == Action::Migrate => {
                    problems.push(refusal);
                    Action::Refuse
                }
                _ => action,
            };
            if action == Action::Migrate {
                open.push(tenant.clone());
            }
            let database = usize::try_from(count).unwrap_or(0);
            let one = Planned {
                tenant: tenant.clone(),
                phase,
                action,
                origin: None,
                database,
                add: 0,
                change: 0,
                remove: 0,
                problems,
            };
            planned.insert(tenant, one);
        }
        let (mut rest, mut notes, total) = (&open[..], Vec::new(), open.len());
        while !rest.is_empty() {
            let size = if self.origin.reads_all_at_once() { rest.len() } else { options.batch.clamp(1, rest.len()) };
            let (round, later) = rest.split_at(size);
            let contents = self.origin.read(round).await;
            notes.extend(self.origin.told());
            if contents.iter().any(|content| matches!(content, Err(OriginError::TooMany))) {
                continue;
            }
            for (tenant, content) in round.iter().zip(contents) {
                let own = stored.get(tenant).and_then(|(company, _)| company.phase);
                if let Some(one) = planned.get_mut(tenant) {
                    self.look(one, own, content, &options.accept).await?;
                }
            }
            rest = later;
            told(total - rest.len(), total);
        }
        // The reads may have shown that the tenants cannot be read all at once.
        let strategy = if self.origin.reads_all_at_once() { Strategy::Recursive } else { Strategy::Folder };
        let migrating = planned.values().filter(|one| one.action == Action::Migrate).count();
        Ok(Plan {
            tenants: planned.into_values().collect(),
            unusable: if selection.has_every_tenant() { unusable } else { Vec::new() },
            cost: cost(migrating, strategy),
            notes,
        })
    }

    /// Adds the origin's content for one tenant to the plan.
    async fn look(
        &self,
        one: &mut Planned,
        own: Option<Phase>,
        content: Result<Content, OriginError>,
        accept: &BTreeSet<ProblemKind>,
    ) -> Result<(), StoreError> {
        let content = match content {
            Ok(content) => content,
            Err(error) => {
                one.action = Action::Refuse;
                one.problems.push(log::chain(&error));
                return Ok(());
            }
        };
        let refused = |problem: &Problem| !accept.contains(&problem.kind);
        if content.problems.iter().any(refused) {
            one.action = Action::Refuse;
        }
        one.problems = content
            .problems
            .iter()
            .map(|problem| if refused(problem) { problem.to_string() } else { format!("accepted: {problem}") })
            .chain(references(&content.snapshot))
            .collect();
        let origin = self.digests_of(&one.tenant, own, &content.snapshot);
        let rows = self.rows_of(&one.tenant, own).await?;
        let differences = self.differences(&origin, &rows.digests);
        one.origin = Some(origin.len());
        one.add = differences.only_origin.len();
        one.change = differences.different.len();
        one.remove = differences.only_database.len();
        let Takes::Rows { overwrite, .. } = self.takes else { return Ok(()) };
        let mut obstacles = differences.different;
        let own = self.database.own_writes(&one.tenant).await?;
        let deleted = own.into_iter().filter(|own| matches!(own.held, Held::Absent | Held::Unknown)).map(|own| own.key);
        obstacles.extend(deleted.filter(|key| origin.contains_key(key)));
        if !overwrite && !obstacles.is_empty() {
            one.action = Action::Refuse;
            one.problems.push(in_the_way(&obstacles));
        }
        if let Some((key, error)) = rows.unreadable.filter(|(key, _)| !(overwrite && origin.contains_key(key))) {
            one.action = Action::Refuse;
            one.problems.push(format!("what is stored of {:?} does not open: {error}", key.as_str()));
        }
        Ok(())
    }
}

/// The secrets whose references are replaced: a change of what they refer to does not follow.
fn references(snapshot: &Snapshot) -> Option<String> {
    const NAMED: usize = 5;
    let mut names: Vec<&str> =
        snapshot.secrets.iter().filter(|secret| secret.text.is_some()).map(|secret| secret.key.as_str()).collect();
    names.sort_unstable();
    let shown: Vec<String> = names.iter().take(NAMED).map(|name| format!("{name:?}")).collect();
    let more = match names.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    (!names.is_empty()).then(|| {
        format!(
            "taken over as the references in them give them now: {}{more}; later changes of what they refer to do not follow",
            shown.join(", ")
        )
    })
}
