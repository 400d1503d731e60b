//! The phase of a secret and the allowed ages of its copies: the defaults, the rules of the
//! configuration, and a tenant's own phase.

use std::time::Duration;

use globset::{Glob, GlobMatcher};
use serde::{Deserialize, Serialize};

use crate::{
    phase::Phase,
    secret::SecretKey,
    tenant::{Tenant, shared_folder},
    units,
};

/// One `[[rules]]` table: which secrets it matches, and what it changes for them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// Tenants, as a glob: `acme*`. Shared folders match only where it begins with `/`.
    #[serde(default = "everything")]
    pub tenants: String,
    /// Keys, as a glob: `WEBHOOK_*`.
    #[serde(default = "everything")]
    pub keys: String,
    /// The phase of the matching secrets, where the tenant has none of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Replaces `memory.ttl`.
    #[serde(default, with = "units::optional_duration", skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Duration>,
    /// Replaces `memory.negative_ttl`.
    #[serde(default, with = "units::optional_duration", skip_serializing_if = "Option::is_none")]
    pub negative_ttl: Option<Duration>,
    /// Replaces `database.refresh_after`.
    #[serde(default, with = "units::optional_duration", skip_serializing_if = "Option::is_none")]
    pub refresh_after: Option<Duration>,
    /// Replaces both `memory.max_stale` and `database.max_stale`.
    #[serde(default, with = "units::optional_duration", skip_serializing_if = "Option::is_none")]
    pub max_stale: Option<Duration>,
}

fn everything() -> String {
    "*".to_owned()
}

/// The allowed ages of the copies of a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ages {
    /// Memory answers without asking further for this long.
    pub ttl: Duration,
    /// An absence is answered without asking further for this long.
    pub negative_ttl: Duration,
    /// The database's copy is refreshed after this long.
    pub refresh_after: Duration,
    /// Memory's copy is never served beyond this age.
    pub memory_max_stale: Duration,
    /// The database's copy is never served beyond this age.
    pub database_max_stale: Duration,
}

/// The policy for one secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// The phase, and so the owner of the secret.
    pub phase: Phase,
    /// The setting that decided the phase.
    pub chosen_by: ChosenBy,
    /// The allowed ages of its copies.
    pub ages: Ages,
    /// The rule that matched, counted from 1 in the order of the configuration.
    pub rule: Option<usize>,
}

/// The setting that decided a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChosenBy {
    /// The tenant's own phase, stored in the database.
    Tenant,
    /// A rule of the configuration.
    Rule,
    /// `phase` in the configuration.
    Default,
}

impl ChosenBy {
    /// The word used in answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Rule => "rule",
            Self::Default => "default",
        }
    }
}

/// A pattern in the configuration that is not a valid glob.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {pattern:?} is no pattern: {reason}; write one like \"acme*\"")]
pub struct InvalidGlob {
    /// The setting, as in `rules[1].tenants`.
    pub key: String,
    /// The pattern.
    pub pattern: String,
    reason: String,
}

/// All policies of one instance.
#[derive(Debug)]
pub struct Policies {
    phase: Phase,
    ages: Ages,
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    tenants: TenantGlob,
    keys: GlobMatcher,
    config: RuleConfig,
}

impl Policies {
    /// Compiles the rules.
    ///
    /// # Errors
    /// A pattern is not a valid glob.
    pub fn build(phase: Phase, ages: Ages, rules: Vec<RuleConfig>) -> Result<Self, InvalidGlob> {
        let rules = rules.into_iter().enumerate().map(|(index, config)| {
            let (tenants, keys) = (format!("rules[{index}].tenants"), format!("rules[{index}].keys"));
            let tenants = TenantGlob::new(&tenants, &config.tenants)?;
            Ok(Rule { tenants, keys: glob(&keys, &config.keys)?, config })
        });
        Ok(Self { phase, ages, rules: rules.collect::<Result<_, _>>()? })
    }

    /// Returns the policy for one secret, given its tenant's own phase.
    ///
    /// The own phase wins: it names the owner, and a migration that switched it must
    /// take effect whatever the rules say. Then the first rule that matches, then the default.
    #[must_use]
    pub fn of(&self, tenant: &Tenant, key: &SecretKey, own: Option<Phase>) -> Policy {
        let matching = self
            .rules
            .iter()
            .enumerate()
            .find(|(_, rule)| rule.tenants.is_match(tenant.as_str()) && rule.keys.is_match(key.as_str()));
        let mut ages = self.ages;
        if let Some((_, rule)) = matching {
            let set = |age: &mut Duration, to: Option<Duration>| *age = to.unwrap_or(*age);
            set(&mut ages.ttl, rule.config.ttl);
            set(&mut ages.negative_ttl, rule.config.negative_ttl);
            set(&mut ages.refresh_after, rule.config.refresh_after);
            set(&mut ages.memory_max_stale, rule.config.max_stale);
            set(&mut ages.database_max_stale, rule.config.max_stale);
        }
        let by_rule = matching.and_then(|(_, rule)| rule.config.phase);
        let (phase, chosen_by) = match (own, by_rule) {
            (Some(phase), _) => (phase, ChosenBy::Tenant),
            (None, Some(phase)) => (phase, ChosenBy::Rule),
            (None, None) => (self.phase, ChosenBy::Default),
        };
        Policy { phase, chosen_by, ages, rule: matching.map(|(index, _)| index + 1) }
    }

    /// The phase of a tenant's secrets, except for those that a rule for certain keys matches.
    #[must_use]
    pub fn phase_of(&self, tenant: &Tenant, own: Option<Phase>) -> Phase {
        let whole = self.rules_for(tenant).find(|rule| rule.config.keys == "*");
        own.or_else(|| whole?.config.phase).unwrap_or(self.phase)
    }

    /// Whether all of a tenant's secrets are in one phase, so that the whole snapshot of it is in
    /// the database or none of it.
    #[must_use]
    pub fn is_uniform(&self, tenant: &Tenant, own: Option<Phase>) -> bool {
        let phase = self.phase_of(tenant, own);
        own.is_some() || self.rules_for(tenant).all(|rule| rule.config.phase.unwrap_or(self.phase) == phase)
    }

    /// Whether any of a tenant's secrets may be in this phase.
    #[must_use]
    pub fn has_any_in(&self, phase: Phase, tenant: &Tenant, own: Option<Phase>) -> bool {
        let by_rule = || self.rules_for(tenant).any(|rule| rule.config.phase.unwrap_or(self.phase) == phase);
        self.phase_of(tenant, own) == phase || (own.is_none() && by_rule())
    }

    /// The rules that can be the first to match one of a tenant's secrets: all rules up to the
    /// first that matches every key.
    fn rules_for(&self, tenant: &Tenant) -> impl Iterator<Item = &Rule> {
        let mut open = true;
        let matching = self.rules.iter().filter(|rule| rule.tenants.is_match(tenant.as_str()));
        matching.take_while(move |rule| std::mem::replace(&mut open, rule.config.keys != "*"))
    }

    /// Whether each secret has the same phase under the other policies, whatever its tenant's own
    /// phase.
    #[must_use]
    pub fn has_phases_of(&self, other: &Self) -> bool {
        fn phases(policies: &Policies) -> impl Iterator<Item = (&str, &str, Option<Phase>)> {
            let rules = policies.rules.iter().map(|Rule { config, .. }| config);
            rules.map(|rule| (rule.tenants.as_str(), rule.keys.as_str(), rule.phase))
        }
        self.phase == other.phase && phases(self).eq(phases(other))
    }

    /// The same for one tenant's secrets: rules of other tenants do not matter.
    #[must_use]
    pub fn has_phases_of_for(&self, other: &Self, tenant: &Tenant) -> bool {
        fn phases<'a>(policies: &'a Policies, tenant: &Tenant) -> impl Iterator<Item = (&'a str, Phase)> {
            let rules = policies.rules_for(tenant).map(|Rule { config, .. }| config);
            let rules = rules.map(|rule| (rule.keys.as_str(), rule.phase.unwrap_or(policies.phase)));
            rules.chain([("*", policies.phase)])
        }
        phases(self, tenant).eq(phases(other, tenant))
    }

    /// Whether phases and ages are the same for every secret.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        let rules = |policies: &Self| policies.rules.iter().map(|rule| rule.config.clone()).collect::<Vec<_>>();
        self.phase == other.phase && self.ages == other.ages && rules(self) == rules(other)
    }

    /// The ages where no rule changes them.
    #[must_use]
    pub fn default_ages(&self) -> Ages {
        self.ages
    }

    /// Whether any secret may be in a phase that needs upstream, or the database's copies.
    #[must_use]
    pub fn uses(&self, wanted: impl Fn(Phase) -> bool) -> bool {
        wanted(self.phase) || self.rules.iter().filter_map(|rule| rule.config.phase).any(wanted)
    }
}

/// A pattern for companies or, where it begins with `/`, for shared folders: `*` reaches no shared folder.
#[derive(Debug, Clone)]
pub struct TenantGlob(GlobMatcher);

impl TenantGlob {
    /// Compiles a pattern; `setting` is named if that fails.
    ///
    /// # Errors
    /// The pattern is not a valid glob.
    pub fn new(setting: &str, pattern: &str) -> Result<Self, InvalidGlob> {
        glob(setting, pattern).map(Self)
    }

    /// Whether the tenant matches.
    #[must_use]
    pub fn is_match(&self, tenant: &str) -> bool {
        // A class or a wildcard would match the slash too.
        shared_folder(tenant).is_some() == shared_folder(self.as_written()).is_some() && self.0.is_match(tenant)
    }

    /// The pattern as it was written.
    #[must_use]
    pub fn as_written(&self) -> &str {
        self.0.glob().glob()
    }
}

/// Compiles one pattern; `key` is the setting to name if that fails.
///
/// # Errors
/// The pattern is not a valid glob.
pub fn glob(key: &str, pattern: &str) -> Result<GlobMatcher, InvalidGlob> {
    let compiled = Glob::new(pattern).map_err(|error| InvalidGlob {
        key: key.to_owned(),
        pattern: pattern.to_owned(),
        reason: error.kind().to_string(),
    })?;
    Ok(compiled.compile_matcher())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ages() -> Ages {
        Ages {
            ttl: Duration::from_secs(300),
            negative_ttl: Duration::from_secs(30),
            refresh_after: Duration::from_secs(900),
            memory_max_stale: Duration::from_secs(86_400),
            database_max_stale: Duration::from_secs(86_400),
        }
    }

    fn policies(toml: &str) -> Policies {
        #[derive(Deserialize)]
        struct Rules {
            rules: Vec<RuleConfig>,
        }
        Policies::build(Phase::Hybrid, ages(), toml::from_str::<Rules>(toml).unwrap().rules).unwrap()
    }

    fn of(policies: &Policies, tenant: &str, key: &str, own: Option<Phase>) -> Policy {
        policies.of(&tenant.parse().unwrap(), &key.parse().unwrap(), own)
    }

    #[test]
    fn no_pattern_reaches_companies_and_shared_folders_at_once() {
        let is_match = |pattern: &str, tenant: &str| TenantGlob::new("tenants", pattern).unwrap().is_match(tenant);
        for pattern in ["*", "**", "?hono-api", "[/]hono-api", "{acme,/hono-api}", "*hono-api", "{/,}*"] {
            assert!(!is_match(pattern, "/hono-api"), "{pattern}");
        }
        for pattern in ["/hono-api", "/*", "/hono*"] {
            assert!(is_match(pattern, "/hono-api") && !is_match(pattern, "hono-api"), "{pattern}");
        }
        assert!(is_match("*", "acme") && is_match("{acme,/hono-api}", "acme"));
    }

    #[test]
    fn the_first_rule_that_matches_sets_phase_and_ages() {
        let policies = policies(
            r#"
            [[rules]]
            tenants = "acme*"
            keys = "WEBHOOK_*"
            phase = "infisical"
            ttl = "10s"
            [[rules]]
            tenants = "acme*"
            max_stale = "1h"
            "#,
        );
        let webhook = of(&policies, "acme1", "WEBHOOK_A", None);
        assert_eq!((webhook.phase, webhook.chosen_by, webhook.rule), (Phase::Infisical, ChosenBy::Rule, Some(1)));
        assert_eq!(webhook.ages, Ages { ttl: Duration::from_secs(10), ..ages() });
        let other = of(&policies, "acme1", "A/B", None);
        assert_eq!((other.phase, other.rule), (Phase::Hybrid, Some(2)));
        assert_eq!(other.ages.database_max_stale, Duration::from_secs(3600));
        assert_eq!(of(&policies, "globex", "WEBHOOK_A", None).rule, None);
        assert!(!policies.is_uniform(&"acme".parse().unwrap(), None));
        assert!(policies.is_uniform(&"globex".parse().unwrap(), None));
    }

    #[test]
    fn what_holds_for_a_whole_tenant_follows_the_first_match_too() {
        let tenant: Tenant = "acme".parse().unwrap();
        let of = |toml: &str| {
            let policies = policies(toml);
            (policies.phase_of(&tenant, None), policies.is_uniform(&tenant, None))
        };
        // A key rule without a phase keeps its keys in the default phase, whatever comes after it.
        let later = "[[rules]]\ntenants = \"acme\"\nphase = \"database\"";
        assert_eq!(of(&format!("[[rules]]\nkeys = \"W*\"\nttl = \"1s\"\n{later}")), (Phase::Database, false));
        assert_eq!(of(&format!("[[rules]]\nttl = \"1s\"\n{later}")), (Phase::Hybrid, true));
        assert_eq!(of(&format!("[[rules]]\nkeys = \"W*\"\nphase = \"database\"\n{later}")), (Phase::Database, true));
        assert_eq!(of(&format!("{later}\n[[rules]]\nkeys = \"W*\"\nphase = \"hybrid\"")), (Phase::Database, true));
        assert_eq!(of("[[rules]]\ntenants = \"globex\"\nkeys = \"W*\"\nphase = \"database\""), (Phase::Hybrid, true));
    }

    #[test]
    fn a_phase_that_a_rule_gives_to_some_keys_is_among_a_tenants() {
        let policies = policies("[[rules]]\ntenants = \"acme\"\nkeys = \"W*\"\nphase = \"database\"");
        let has = |tenant: &str, own| policies.has_any_in(Phase::Database, &tenant.parse().unwrap(), own);
        assert!(has("acme", None) && has("globex", Some(Phase::Database)));
        assert!(!has("globex", None) && !has("acme", Some(Phase::Hybrid)));
    }

    #[test]
    fn only_rules_that_can_match_a_tenant_and_speak_of_phases_change_its_phases() {
        let acme: Tenant = "acme".parse().unwrap();
        let same = |one: &str, other: &str| {
            let (one, other) = (policies(one), policies(other));
            (other.has_phases_of(&one), other.has_phases_of_for(&one, &acme), other.is_same_as(&one))
        };
        let whole = "[[rules]]\ntenants = \"acme\"\nphase = \"database\"";
        assert_eq!(same(whole, whole), (true, true, true));
        assert_eq!(same(whole, &format!("{whole}\nttl = \"1s\"")), (true, true, false), "ages are no phases");
        let others = format!("[[rules]]\ntenants = \"globex\"\nphase = \"infisical\"\n{whole}");
        assert_eq!(same(whole, &others), (false, true, false));
        let behind = format!("{whole}\n[[rules]]\nkeys = \"W*\"\nphase = \"infisical\"");
        assert_eq!(same(whole, &behind), (false, true, false), "the first rule takes all of its keys");
        let before = format!("[[rules]]\nkeys = \"W*\"\nttl = \"1s\"\n{whole}");
        assert_eq!(same(whole, &before), (false, false, false), "it puts keys into the default phase");
        let default = Policies::build(Phase::Database, ages(), Vec::new()).unwrap();
        let hybrid = Policies::build(Phase::Hybrid, ages(), Vec::new()).unwrap();
        assert!(!hybrid.has_phases_of(&default) && !hybrid.has_phases_of_for(&default, &acme));
    }

    #[test]
    fn a_tenants_own_phase_wins_over_rule_and_default() {
        let policies = policies("[[rules]]\nkeys = \"W*\"\nphase = \"infisical\"\nttl = \"1s\"");
        let own = of(&policies, "acme", "W", Some(Phase::Database));
        assert_eq!(
            (own.phase, own.chosen_by, own.ages.ttl),
            (Phase::Database, ChosenBy::Tenant, Duration::from_secs(1))
        );
    }
}
