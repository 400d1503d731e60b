//! The content of a tenant's folder, as upstream has it at one moment.

use crate::{
    clock::Timestamp,
    flaws::{Flaws, Unresolved, Unusable},
    secret::{SecretKey, SecretValue, Version},
};

/// The complete content of one tenant's folder, imports and references resolved.
#[derive(Debug, Default, Clone)]
pub struct Snapshot {
    /// The secrets, each key once.
    pub secrets: Vec<UpstreamSecret>,
    /// A validator to send as `known` next time; `None` where the secrets depend on more than the
    /// folder.
    pub etag: Option<String>,
    /// Everything in the folder that is not among the secrets, or that is served otherwise than its
    /// writer may expect; by name.
    pub oddities: Vec<Oddity>,
    /// Whether another folder that values refer to could not be read. The values that are missing
    /// because of it may be unchanged.
    pub fell_short: bool,
}

impl Snapshot {
    /// The oddities, grouped by kind.
    #[must_use]
    pub fn flaws(&self) -> Flaws {
        let mut flaws = Flaws::default();
        for Oddity { name, kind } in &self.oddities {
            match (name.parse(), kind) {
                (Ok(key), OddityKind::Unusable(reason)) => drop(flaws.unusable.insert(key, *reason)),
                (Ok(key), OddityKind::Reference(reason)) => drop(flaws.unresolved.insert(key, *reason)),
                (_, OddityKind::InvalidName) | (Err(_), _) => drop(flaws.names.insert(name.clone())),
            }
        }
        flaws
    }
}

/// Something in a folder that a migration must report.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Oddity {
    /// The secret's name, as it is written there.
    pub name: String,
    /// The kind of oddity.
    pub kind: OddityKind,
}

/// The ways in which a secret can be odd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OddityKind {
    /// It is left out: its name cannot be a [`SecretKey`].
    InvalidName,
    /// It is left out: its value cannot be used.
    Unusable(Unusable),
    /// Its value contains a reference that is not replaced.
    Reference(Unresolved),
}

/// A secret as upstream has it.
#[derive(Debug, Clone)]
pub struct UpstreamSecret {
    /// Its name.
    pub key: SecretKey,
    /// Its value, with references replaced.
    pub value: SecretValue,
    /// The text that upstream has, if it contains a reference.
    pub text: Option<SecretValue>,
    /// Upstream's own count of its values: it restarts when a secret is created again.
    pub version: Version,
    /// When it was last changed, where upstream says so.
    pub updated_at: Option<Timestamp>,
}

impl UpstreamSecret {
    /// The text that upstream has.
    #[must_use]
    pub fn written(&self) -> &SecretValue {
        self.text.as_ref().unwrap_or(&self.value)
    }
}
