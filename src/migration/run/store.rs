//! Stores the content that was read of tenants in the database.

use std::collections::HashMap;

use super::{
    super::{
        origin::{Content, OriginError},
        transfer::{Takes, patiently},
    },
    Again, Failure, LOOKED_AT, MOST_BYTES, Outcome, READ_AT_ONCE, Reason, RunError, Runner, Stored, UnderWay, by_size,
    bytes_of, in_the_way,
};
use crate::{
    log,
    phase::Phase,
    secret::{SecretKey, Writer},
    tenant::Tenant,
    tiers::database::{
        Began, Company, Import, ImportOutcome, JobLock, Step, StoreError, StoreOutcome, Taken, TenantState,
    },
};

impl Runner {
    /// Reads the origin and stores its content.
    pub(super) async fn store(
        &self,
        run: &UnderWay<'_>,
        tenants: Vec<Tenant>,
        ended: &mut Vec<Outcome>,
        again: &mut Vec<Again>,
        postponed: &mut Vec<Tenant>,
    ) -> Result<Vec<Stored>, RunError> {
        // Before the origin is read: a write to a tenant from here on raises its
        // generation, and then neither the store nor the switch is done.
        let mut companies = HashMap::with_capacity(tenants.len());
        for some in tenants.chunks(LOOKED_AT) {
            companies.extend(patiently(|| self.transfer.database.companies_of(some)).await?);
        }
        let mut open = Vec::new();
        for tenant in tenants {
            let own = companies.get(&tenant).and_then(|company| company.phase);
            let refusal = self.transfer.refusal(&tenant, own, self.options.to);
            if let Some(error) = refusal {
                ended.push(Outcome::failed(tenant, Failure { reason: Reason::Owned, error }));
            } else if matches!(self.transfer.takes, Takes::Folders) && own == Some(Phase::Database) {
                ended.push(self.owned(run, tenant).await?);
            } else {
                open.push(tenant);
            }
        }
        let (mut stored, mut superseded) = (Vec::with_capacity(open.len()), Vec::new());
        let mut parts = self.parts(open).into_iter().peekable();
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(part) = parts.next() {
            let contents = self.transfer.origin.read(&part).await;
            for (tenant, content) in part.into_iter().zip(contents) {
                if matches!(content, Err(OriginError::TooMany)) {
                    postponed.push(tenant);
                    continue;
                }
                match self.usable(run, &tenant, content).await? {
                    Ok(content) => {
                        bytes += bytes_of(&content);
                        taken.push((tenant, content));
                    }
                    Err(failure) => ended.push(Outcome::failed(tenant, failure)),
                }
            }
            if bytes < MOST_BYTES && parts.peek().is_some() {
                continue;
            }
            bytes = 0;
            for chunk in by_size(std::mem::take(&mut taken), self.options.batch, |(_, content)| bytes_of(content)) {
                let outcomes = self.store_chunk(run, &chunk, &companies).await?;
                for ((tenant, _), outcome) in chunk.into_iter().zip(outcomes) {
                    match outcome {
                        Ok(StoreOutcome::Stored { company, .. }) => stored.push(Stored::of(&company)),
                        Ok(StoreOutcome::Superseded) => superseded.push(tenant),
                        Err(failure) => ended.push(Outcome::failed(tenant, failure)),
                    }
                }
            }
        }
        // Where the proxy has stored a later read than ours, that one serves as well: it is
        // compared whoever stored it.
        let now = patiently(|| self.transfer.database.companies_of(&superseded)).await?;
        for tenant in superseded {
            match now.get(&tenant).filter(|company| company.phase != Some(Phase::Database)) {
                Some(company) => stored.push(Stored::of(company)),
                None => again.push(Again::changing(tenant)),
            }
        }
        Ok(stored)
    }

    /// Splits the tenants by calls of the origin: all of them in one where it reads all at once,
    /// else a few in each, because a call's whole result is held in memory.
    pub(super) fn parts<T>(&self, tenants: Vec<T>) -> Vec<Vec<T>> {
        let most = if self.transfer.origin.reads_all_at_once() { usize::MAX } else { READ_AT_ONCE };
        let mut tenants = tenants.into_iter().peekable();
        let mut parts = Vec::new();
        while tenants.peek().is_some() {
            parts.push(tenants.by_ref().take(most).collect());
        }
        parts
    }

    async fn store_chunk(
        &self,
        run: &UnderWay<'_>,
        chunk: &[(Tenant, Content)],
        companies: &HashMap<Tenant, Company>,
    ) -> Result<Vec<Result<StoreOutcome, Failure>>, RunError> {
        let now = self.transfer.clock.database_now();
        let state_of = |place: usize, company: &Company| {
            let secrets = chunk[place].1.snapshot.secrets.len();
            let mut state = TenantState::new(company.tenant.clone(), &run.run.id, Step::Stored, now);
            state.secrets = i64::try_from(secrets).unwrap_or(i64::MAX);
            state
        };
        let stored = match &self.transfer.takes {
            Takes::Folders => self.store_copies(run.lock, chunk, companies, &state_of).await,
            Takes::Rows { overwrite, .. } => self.store_rows(run.lock, chunk, companies, *overwrite, &state_of).await,
        };
        match stored {
            Ok(outcomes) => Ok(outcomes),
            Err(error @ (StoreError::Unavailable { .. } | StoreError::LeaseLost)) => Err(error.into()),
            // One of them is refused: each is stored by itself to find out which.
            Err(error) if chunk.len() == 1 => {
                Ok(vec![Err(Failure { reason: Reason::Database, error: log::chain(&error) })])
            }
            Err(_) => {
                let mut outcomes = Vec::with_capacity(chunk.len());
                for one in chunk.chunks(1) {
                    outcomes.extend(Box::pin(self.store_chunk(run, one, companies)).await?);
                }
                Ok(outcomes)
            }
        }
    }

    async fn store_copies(
        &self,
        lock: &JobLock,
        chunk: &[(Tenant, Content)],
        companies: &HashMap<Tenant, Company>,
        state_of: &(dyn Fn(usize, &Company) -> TenantState + Sync),
    ) -> Result<Vec<Result<StoreOutcome, Failure>>, StoreError> {
        let speaks_for = |tenant: &Tenant, company: Option<&Company>| {
            let (tenant, own) = (tenant.clone(), company.and_then(|company| company.phase));
            move |key: &SecretKey| self.transfer.policies.of(&tenant, key, own).phase.owned_upstream()
        };
        let speaks: Vec<_> = chunk.iter().map(|(tenant, _)| speaks_for(tenant, companies.get(tenant))).collect();
        let taken: Vec<Taken<'_>> = chunk
            .iter()
            .zip(&speaks)
            .map(|((tenant, content), speaks_for)| Taken {
                tenant,
                snapshot: &content.snapshot,
                began: Began { generation: companies.get(tenant).map(|company| company.generation) },
                at: content.began,
                speaks_for,
            })
            .collect();
        let outcomes = patiently(|| self.transfer.database.store_snapshots(lock, &taken, state_of)).await?;
        Ok(outcomes.into_iter().map(Ok).collect())
    }

    async fn store_rows(
        &self,
        lock: &JobLock,
        chunk: &[(Tenant, Content)],
        companies: &HashMap<Tenant, Company>,
        overwrite: bool,
        state_of: &(dyn Fn(usize, &Company) -> TenantState + Sync),
    ) -> Result<Vec<Result<StoreOutcome, Failure>>, StoreError> {
        let imports: Vec<Import<'_>> = chunk
            .iter()
            .map(|(tenant, content)| Import {
                tenant,
                secrets: &content.snapshot.secrets,
                owned_in: companies.get(tenant).and_then(|company| company.phase),
                overwrite,
            })
            .collect();
        let writer = Writer::new("migrate import");
        let outcomes = patiently(|| self.transfer.database.import(lock, &imports, &writer, state_of)).await?;
        let outcome = |outcome| match outcome {
            ImportOutcome::Stored(company) => Ok(StoreOutcome::Stored { company, secrets: Vec::new() }),
            ImportOutcome::Moved => Ok(StoreOutcome::Superseded),
            ImportOutcome::Conflict(keys) => Err(Failure { reason: Reason::Different, error: in_the_way(&keys) }),
        };
        Ok(outcomes.into_iter().map(outcome).collect())
    }
}
