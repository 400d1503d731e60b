//! The face that Infisical's own clients know, below `/api`: they need another address and nothing else.
//! Everything behind it is what `/v1` uses: tokens, scopes, limits, resolver, writes, audit.
//!
//! `project` says what may be named, `place` where a path leads, `fields` reads what a request brings,
//! `shape` writes a secret as Infisical does. The others are the requests.

pub(super) mod auth;
pub(super) mod batch;
mod fields;
pub(super) mod folders;
mod place;
pub(super) mod project;
pub(super) mod read;
mod shape;
pub(super) mod write;

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{ask::Ask, respond::Problem};
use crate::{access::LONGEST_LOGIN, tenant::Tenant, units};

/// `[server.infisical_api]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Whether Infisical's clients are answered below `/api`.
    pub enabled: bool,
    /// The project's slug, for clients that name it; if not set, every slug is taken for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project_slug: Option<String>,
    /// How long an access token is good, unless its token ends before.
    #[serde(with = "units::duration")]
    pub access_token_ttl: Duration,
}

impl Default for Config {
    fn default() -> Self {
        // No client logs in again by itself when its access token has ended.
        Self { enabled: false, project_slug: None, access_token_ttl: Duration::from_secs(30 * 24 * 60 * 60) }
    }
}

impl Config {
    /// The faults of these settings, each beginning with the setting.
    pub(super) fn faults(&self) -> impl Iterator<Item = String> {
        let is_long = (Duration::from_secs(60)..=LONGEST_LOGIN).contains(&self.access_token_ttl);
        let ttl = (!is_long).then(|| "access_token_ttl: from \"1m\" to \"365d\"".to_owned());
        let has_slug = self.project_slug.as_ref().is_none_or(|slug| !slug.trim().is_empty());
        let slug = (!has_slug).then(|| "project_slug: must not be empty; leave it out to take every slug".to_owned());
        ttl.into_iter().chain(slug)
    }
}

/// What an instance serves, as Infisical's clients name it.
#[derive(Debug, Clone, Default)]
pub struct Project {
    /// The project's id, where there is one.
    pub id: Option<String>,
    /// The environment.
    pub environment: String,
    /// The folder that holds the tenants' folders.
    pub tenants_path: String,
    /// The shared folders with their paths; `None` where no upstream says where they are.
    pub folders: Option<Vec<(Tenant, String)>>,
}

/// The face, where it is on.
#[derive(Debug)]
pub(super) struct InfisicalApi {
    project: Project,
    slug: Option<String>,
    access_token_ttl: Duration,
}

impl InfisicalApi {
    /// The face, if it is on.
    pub(super) fn build(config: &Config, project: &Project) -> Option<Self> {
        config.enabled.then(|| Self {
            project: project.clone(),
            slug: config.project_slug.clone(),
            access_token_ttl: config.access_token_ttl,
        })
    }

    /// The face as it is when the request comes. It may have been switched off a moment ago.
    fn of(ask: &Ask<'_>) -> Result<Arc<Self>, Problem> {
        ask.service.terms.load().infisical_api.clone().ok_or_else(Problem::no_route)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_setting_is_named_with_what_is_allowed() {
        assert_eq!(Config::default().faults().count(), 0);
        let faults = |config: Config| config.faults().collect::<Vec<_>>().join(", ");
        let short = Config { access_token_ttl: Duration::from_secs(30), ..Config::default() };
        assert!(faults(short).contains("access_token_ttl: from \"1m\""));
        let empty = Config { project_slug: Some(" ".to_owned()), ..Config::default() };
        assert!(faults(empty).contains("project_slug"));
    }
}
