//! `[[rotation]]`: which secrets are rotated, and how.

use std::time::Duration;

use globset::GlobMatcher;
use serde::{Deserialize, Serialize};

use super::{generate::Generate, webhook::WebhookConfig};
use crate::{
    outgoing::Destination,
    policy::{InvalidGlob, TenantGlob, glob},
    secret::SecretKey,
    tenant::Tenant,
    units,
};

/// One `[[rotation]]` table: which secrets it matches, and how they are rotated.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// Tenants, as a glob: `acme*`. Shared folders match only where it begins with `/`.
    #[serde(default = "everything")]
    pub tenants: String,
    /// Keys, as a glob: `JWT_*`.
    pub keys: String,
    /// How often they are rotated; never by themselves where this is left out.
    #[serde(default, with = "units::optional_duration", skip_serializing_if = "Option::is_none")]
    pub every: Option<Duration>,
    /// How long the previous value stays valid.
    #[serde(default = "a_day", with = "units::duration")]
    pub grace: Duration,
    /// How a new value is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generate: Option<Generate>,
    /// Who makes new values valid at their provider, and old ones invalid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotator: Option<RotatorConfig>,
    /// Whether a person brings new values, and revokes old ones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub assisted: bool,
}

/// A rotator.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum RotatorConfig {
    /// One that is reached over HTTP.
    Webhook(WebhookConfig),
}

fn everything() -> String {
    "*".to_owned()
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The shortest and the longest interval.
const EVERY: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(60)..=Duration::from_secs(10 * 366 * 24 * 60 * 60);

/// How long a previous value may stay valid at most: longer, and it is no rotation.
pub const LONGEST_GRACE: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// How long the previous value stays valid where no rule says it.
#[must_use]
pub(super) fn a_day() -> Duration {
    DAY
}

impl RuleConfig {
    /// The faults of these settings, each beginning with the setting.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.grace > LONGEST_GRACE {
            faults.push("grace: at most a year".to_owned());
        }
        match self.every {
            Some(every) if !EVERY.contains(&every) => faults.push("every: from a minute to ten years".to_owned()),
            // Else the next rotation would be due before the last one has ended.
            Some(every) if self.grace > every.mul_f64(0.8) => {
                faults.push("grace: at most four fifths of every, so that a rotation ends before the next".to_owned());
            }
            Some(_) | None => {}
        }
        if let Some(RotatorConfig::Webhook(webhook)) = &self.rotator {
            faults.extend(webhook.faults().into_iter().map(|fault| format!("rotator.{fault}")));
        }
        if self.assisted && (self.generate.is_some() || self.rotator.is_some()) {
            faults.push("assisted: a person brings the value; leave generate and rotator out".to_owned());
        }
        match &self.generate {
            None if self.assisted => {}
            // The rotator may make them.
            None if self.rotator.is_some() => {}
            None => faults
                .push("generate: says how a new value is made, as in { kind = \"random\", length = 64 }".to_owned()),
            Some(generate) => match (generate.fault(), generate.value()) {
                (Some(fault), _) => faults.push(format!("generate.{fault}")),
                (None, Err(error)) => faults.push(format!("generate: {error}")),
                (None, Ok(_)) => {}
            },
        }
        faults
    }
}

/// The faults of these rules, each beginning with its setting. Every generator is run once.
#[must_use]
pub fn faults(rules: &[RuleConfig]) -> Vec<String> {
    let mut faults = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        faults.extend(rule.faults().into_iter().map(|fault| format!("rotation[{index}].{fault}")));
        let same = |other: &RuleConfig| other.tenants == rule.tenants && other.keys == rule.keys;
        if let Some(first) = rules[..index].iter().position(same) {
            faults.push(format!(
                "rotation[{index}]: names the same secrets as rotation[{first}], which counts; take one out"
            ));
        }
    }
    faults
}

/// All rules of one instance.
#[derive(Debug, Default)]
pub struct Rules(Vec<Rule>);

/// A rule, ready to be asked.
#[derive(Debug)]
struct Rule {
    tenants: TenantGlob,
    keys: GlobMatcher,
    config: RuleConfig,
}

impl Rules {
    /// Compiles the rules.
    ///
    /// # Errors
    /// A pattern is not a valid glob.
    pub fn build(rules: &[RuleConfig]) -> Result<Self, InvalidGlob> {
        let rules = rules.iter().enumerate().map(|(index, config)| {
            let setting = |name: &str| format!("rotation[{index}].{name}");
            let tenants = TenantGlob::new(&setting("tenants"), &config.tenants)?;
            let keys = glob(&setting("keys"), &config.keys)?;
            Ok(Rule { tenants, keys, config: config.clone() })
        });
        rules.collect::<Result<_, _>>().map(Self)
    }

    /// The servers that the rules name.
    pub fn destinations(&self) -> impl Iterator<Item = Destination> {
        self.0.iter().filter_map(|rule| match rule.config.rotator.as_ref()? {
            RotatorConfig::Webhook(webhook) => webhook.destination().ok(),
        })
    }

    /// Whether any secret is rotated by itself.
    #[must_use]
    pub fn have_intervals(&self) -> bool {
        self.0.iter().any(|rule| rule.config.every.is_some())
    }

    /// The first rule that matches a secret.
    #[must_use]
    pub fn of(&self, tenant: &Tenant, key: &SecretKey) -> Option<&RuleConfig> {
        let matches = |rule: &&Rule| rule.tenants.is_match(tenant.as_str()) && rule.keys.is_match(key.as_str());
        self.0.iter().find(matches).map(|rule| &rule.config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(toml: &str) -> Vec<RuleConfig> {
        #[derive(Deserialize)]
        struct Read {
            rotation: Vec<RuleConfig>,
        }
        toml::from_str::<Read>(toml).unwrap().rotation
    }

    #[test]
    fn the_first_rule_that_matches_counts() {
        let toml = "[[rotation]]\ntenants = \"acme\"\nkeys = \"JWT_*\"\ngrace = \"1h\"\ngenerate = { kind = \"uuid\" }\n\
                    [[rotation]]\nkeys = \"JWT_SECRET\"\ngenerate = { kind = \"random\", length = 32, alphabet = \"hex\" }\n";
        let rules = rules(toml);
        assert_eq!(faults(&rules), Vec::<String>::new());
        let rules = Rules::build(&rules).unwrap();
        let of =
            |tenant: &str, key: &str| rules.of(&tenant.parse().unwrap(), &key.parse().unwrap()).map(|rule| rule.grace);
        assert_eq!(of("acme", "JWT_SECRET"), Some(Duration::from_secs(3600)));
        assert_eq!(of("globex", "JWT_SECRET"), Some(DAY));
        assert_eq!(of("globex", "JWT_OTHER"), None);
    }

    #[test]
    fn a_rule_that_cannot_be_meant_is_refused_by_its_name() {
        for (rule, told) in [
            ("", "rotation[0].generate: "),
            ("generate = { kind = \"random\", length = 5 }", "rotation[0].generate.length: "),
            ("every = \"5s\"\ngrace = \"1s\"\ngenerate = { kind = \"uuid\" }", "rotation[0].every: "),
            ("every = \"1d\"\ngenerate = { kind = \"uuid\" }", "rotation[0].grace: "),
            ("assisted = true\ngenerate = { kind = \"uuid\" }", "rotation[0].assisted: "),
            ("grace = \"400d\"\ngenerate = { kind = \"uuid\" }", "rotation[0].grace: "),
            (
                "generate = { kind = \"uuid\" }\n[[rotation]]\nkeys = \"K\"\ngenerate = { kind = \"age\" }",
                "rotation[1]: names the same",
            ),
        ] {
            let faults = faults(&rules(&format!("[[rotation]]\nkeys = \"K\"\n{rule}\n")));
            assert!(faults.len() == 1 && faults[0].starts_with(told), "{faults:?}");
        }
    }
}
