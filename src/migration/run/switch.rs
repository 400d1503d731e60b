//! Compares both sides, and switches the tenants whose secrets are equal.

use std::{collections::HashSet, time::Duration};

use super::{
    super::{
        folders,
        origin::{Content, OriginError},
        transfer::{HAS_FOLDER, Takes, patiently},
    },
    Again, Failure, LONGEST_PAUSE, Outcome, READ_AT_ONCE, Reason, RunError, Runner, Stored, UnderWay, Verified, Verify,
    by_size, bytes_of, names, opened,
};
use crate::{
    log,
    phase::Phase,
    sealing::Digests,
    secret::SecretKey,
    tenant::Tenant,
    tiers::{
        database::{Refusal, Step, Switch, TenantState},
        upstream::{Lane, UpstreamError},
    },
};

impl Runner {
    /// Reads the origin again and the rows back, and compares them.
    pub(super) async fn verify(
        &self,
        run: &UnderWay<'_>,
        stored: Vec<Stored>,
        ended: &mut Vec<Outcome>,
        again: &mut Vec<Again>,
        postponed: &mut Vec<Tenant>,
    ) -> Result<Vec<Verified>, RunError> {
        let mut second = Vec::with_capacity(stored.len());
        for part in self.parts(stored) {
            let tenants: Vec<Tenant> = part.iter().map(|stored| stored.tenant.clone()).collect();
            let contents = self.transfer.origin.read(&tenants).await;
            // From here on only the digests of the second read are kept.
            for (stored, content) in part.into_iter().zip(contents) {
                if matches!(content, Err(OriginError::TooMany)) {
                    postponed.push(stored.tenant);
                    continue;
                }
                match self.usable(run, &stored.tenant, content).await? {
                    Ok(content) => {
                        let digests = self.transfer.digests_of(&stored.tenant, stored.phase_before, &content.snapshot);
                        second.push((stored, digests, bytes_of(&content)));
                    }
                    Err(failure) => ended.push(Outcome::failed(stored.tenant, failure)),
                }
            }
        }
        let mut verified = Vec::with_capacity(second.len());
        // The database may have far more of an import's tenants than the origin has.
        let most = match self.transfer.takes {
            Takes::Folders => self.options.batch,
            Takes::Rows { .. } => self.options.batch.min(READ_AT_ONCE),
        };
        for chunk in by_size(second, most, |(_, _, bytes)| *bytes) {
            let asked: Vec<(Tenant, Option<Phase>)> =
                chunk.iter().map(|(stored, ..)| (stored.tenant.clone(), stored.phase_before)).collect();
            let rows = self.transfer.rows_of_all(&asked).await?;
            for ((stored, origin, _), rows) in chunk.into_iter().zip(rows) {
                let database = match opened(rows) {
                    Ok(digests) => digests,
                    Err(failure) => {
                        ended.push(Outcome::failed(stored.tenant, failure));
                        continue;
                    }
                };
                let differences = self.transfer.differences(&origin, &self.sampled(&origin, database));
                if differences.is_empty() {
                    let digest = self.transfer.digester.of_all(&stored.tenant, &origin);
                    verified.push(Verified { secrets: origin.len(), digest: digest.to_string(), stored });
                } else {
                    again.push(Again::different(stored.tenant, &differences));
                }
            }
        }
        Ok(verified)
    }

    /// Switches the phases of tenants that were found to be equal on both sides.
    pub(super) async fn switch(
        &self,
        run: &UnderWay<'_>,
        verified: Vec<Verified>,
        ended: &mut Vec<Outcome>,
        again: &mut Vec<Again>,
    ) -> Result<(), RunError> {
        // A tenant that the database owns already is only noted.
        let is_databases =
            |verified: &Verified| self.transfer.is_databases(&verified.stored.tenant, verified.stored.phase_before);
        let (there, verified): (Vec<_>, Vec<_>) = verified.into_iter().partition(is_databases);
        let verified = self.without_folders(verified, ended).await?;
        for (chunk, to) in there
            .chunks(self.options.batch.max(1))
            .map(|chunk| (chunk, None))
            .chain(verified.chunks(self.options.batch.max(1)).map(|chunk| (chunk, self.options.to)))
        {
            let now = self.transfer.clock.database_now();
            let states: Vec<TenantState> = chunk
                .iter()
                .map(|verified| TenantState {
                    secrets: i64::try_from(verified.secrets).unwrap_or(i64::MAX),
                    digest: Some(verified.digest.clone()),
                    phase_before: verified.stored.phase_before,
                    verified_at: Some(now),
                    switched_at: to.map(|_| now),
                    ..TenantState::new(
                        verified.stored.tenant.clone(),
                        &run.run.id,
                        if to.is_some() { Step::Switched } else { Step::Verified },
                        now,
                    )
                })
                .collect();
            let Some(to) = to else {
                patiently(|| self.transfer.database.keep_states(run.lock, &states)).await?;
                ended.extend(states.into_iter().map(Outcome::of));
                continue;
            };
            let switches: Vec<Switch> = chunk
                .iter()
                .zip(&states)
                .map(|(verified, state)| Switch {
                    expected: verified.stored.expected,
                    to: Some(to),
                    state: state.clone(),
                })
                .collect();
            let refusals = patiently(|| self.transfer.database.switch(run.lock, &switches)).await?;
            for (state, refusal) in states.into_iter().zip(refusals) {
                match refusal {
                    Ok(()) => ended.push(Outcome::of(state)),
                    Err(refusal) => again.push(self.refused(state.tenant, refusal)),
                }
            }
        }
        Ok(())
    }

    /// The tenants that upstream still has no folder for, where the import is not from upstream: a
    /// folder may have been made since, with secrets that nobody would read any more. The list is
    /// read after the tenants' rows were read: a later write through the proxy raises the
    /// generation.
    pub(super) async fn without_folders(
        &self,
        verified: Vec<Verified>,
        ended: &mut Vec<Outcome>,
    ) -> Result<Vec<Verified>, RunError> {
        let Takes::Rows { upstream: Some(upstream), .. } = &self.transfer.takes else { return Ok(verified) };
        if verified.is_empty() || self.options.to.is_none() {
            return Ok(verified);
        }
        let listed = folders::patiently(|| upstream.tenants(Lane::Migration)).await;
        let folders = listed.map_err(|error| RunError::Origin(error.into()))?.tenants;
        let (owned, free): (Vec<_>, Vec<_>) =
            verified.into_iter().partition(|verified| folders.contains(&verified.stored.tenant));
        let owned = owned.into_iter().map(|verified| {
            let failure = Failure { reason: Reason::Owned, error: HAS_FOLDER.to_owned() };
            Outcome::failed(verified.stored.tenant, failure)
        });
        ended.extend(owned);
        Ok(free)
    }

    /// The content of an origin, if it can be taken over.
    pub(super) async fn usable(
        &self,
        run: &UnderWay<'_>,
        tenant: &Tenant,
        content: Result<Content, OriginError>,
    ) -> Result<Result<Content, Failure>, RunError> {
        let content = match content {
            Ok(content) => content,
            Err(error) => return self.no_content(run, tenant, error).await,
        };
        let problems: Vec<_> =
            content.problems.iter().filter(|problem| !self.options.accept.contains(&problem.kind)).collect();
        if problems.is_empty() {
            return Ok(Ok(content));
        }
        const TOLD: usize = 10;
        let mut told: Vec<String> = problems.iter().take(TOLD).map(ToString::to_string).collect();
        if problems.len() > TOLD {
            told.push(format!("and {} more", problems.len() - TOLD));
        }
        Ok(Err(Failure { reason: Reason::Problem, error: told.join("; ") }))
    }

    pub(super) async fn no_content(
        &self,
        run: &UnderWay<'_>,
        tenant: &Tenant,
        error: OriginError,
    ) -> Result<Result<Content, Failure>, RunError> {
        let reason = match &error {
            OriginError::Upstream(UpstreamError::Denied) => {
                // Its copies must no longer be served, wherever the denial was met.
                let now = self.transfer.clock.database_now();
                patiently(|| self.transfer.database.deny_under(run.lock, tenant, now)).await?;
                Reason::Denied
            }
            OriginError::Missing => Reason::Missing,
            error if error.is_of_all() => return Err(RunError::Origin(error.clone())),
            OriginError::Upstream(_) | OriginError::Table(_) | OriginError::Unlisted | OriginError::TooMany => {
                Reason::Origin
            }
        };
        Ok(Err(Failure { reason, error: log::chain(&error) }))
    }

    /// The database's digests, as far as their values are to be compared.
    pub(super) fn sampled(&self, origin: &Digests, mut database: Digests) -> Digests {
        let Verify::Sample(count) = self.options.verify else { return database };
        let drawn: HashSet<&SecretKey> =
            rand::seq::IteratorRandom::sample(origin.keys(), &mut rand::rng(), count).into_iter().collect();
        for (key, tag) in &mut database {
            if let Some(other) = origin.get(key).filter(|_| !drawn.contains(key)) {
                *tag = *other;
            }
        }
        database
    }

    pub(super) fn refused(&self, tenant: Tenant, refusal: Refusal) -> Again {
        let (error, not_before) = match refusal {
            Refusal::Changed => return Again::changing(tenant),
            Refusal::WriteUnderWay { until } => {
                ("upstream is being told of a write to it".to_owned(), until.since(self.transfer.clock.database_now()))
            }
            Refusal::Unverified(keys) => {
                (format!("what upstream has of {} after a write was not read back yet", names(&keys)), Duration::ZERO)
            }
        };
        // The write may end long before.
        let not_before = not_before.min(LONGEST_PAUSE);
        Again { tenant, failure: Failure { reason: Reason::Changing, error }, not_before }
    }
}
