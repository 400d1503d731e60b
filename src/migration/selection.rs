//! Selects tenants: by patterns, a list, or all.

use serde::Serialize;

use crate::{
    policy::{InvalidGlob, TenantGlob},
    tenant::Tenant,
};

/// The patterns that match everything.
const ALL: [&str; 2] = ["*", "/*"];

/// The tenants that a command is for.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Selection {
    /// The patterns as they were written, sorted.
    patterns: Vec<String>,
    #[serde(skip)]
    globs: Vec<TenantGlob>,
}

impl Selection {
    /// Every tenant and every shared folder.
    ///
    /// # Errors
    /// Never: these are patterns like any other.
    pub fn all() -> Result<Self, InvalidGlob> {
        Self::of(ALL.map(str::to_owned).to_vec())
    }

    /// The tenants that match one of these patterns.
    ///
    /// # Errors
    /// An invalid pattern.
    pub fn of(mut patterns: Vec<String>) -> Result<Self, InvalidGlob> {
        patterns.sort();
        patterns.dedup();
        let globs = patterns.iter().map(|pattern| TenantGlob::new("--tenants", pattern)).collect::<Result<_, _>>()?;
        Ok(Self { patterns, globs })
    }

    /// Whether every tenant is among them.
    #[must_use]
    pub fn has_every_tenant(&self) -> bool {
        self.patterns.iter().any(|pattern| pattern == "*")
    }

    /// Whether a tenant is among them.
    #[must_use]
    pub fn has(&self, tenant: &Tenant) -> bool {
        self.globs.iter().any(|glob| glob.is_match(tenant.as_str()))
    }

    /// The tenants among these that are selected, in their order.
    ///
    /// # Errors
    /// The patterns that match no tenant: a mistyped name is not silently ignored.
    pub fn choose(&self, tenants: &[Tenant]) -> Result<Vec<Tenant>, Vec<String>> {
        let is_idle = |glob: &TenantGlob| {
            !ALL.contains(&glob.as_written()) && !tenants.iter().any(|tenant| glob.is_match(tenant.as_str()))
        };
        let idle = self.patterns.iter().zip(&self.globs).filter(|(_, glob)| is_idle(glob));
        let idle: Vec<String> = idle.map(|(pattern, _)| pattern.clone()).collect();
        if !idle.is_empty() {
            return Err(idle);
        }
        Ok(tenants.iter().filter(|tenant| self.has(tenant)).cloned().collect())
    }
}
