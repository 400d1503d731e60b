//! The tenants' own phases, as this instance knows them: once all are migrated, every tenant
//! has one.

use std::{collections::HashSet, hash::BuildHasher as _};

use hashbrown::{DefaultHashBuilder, HashTable, hash_table::Entry};

use crate::{phase::Phase, tenant::Tenant};

/// Tenants' own phases. A hundred thousand take two or three megabytes: the names are stored one
/// after the other, and the table has the position where each begins.
#[derive(Default)]
pub(super) struct OwnPhases {
    /// For each tenant its phase, the length of its name, and its name. Entries are never removed:
    /// a tenant without a phase of its own has an entry that says so.
    names: Vec<u8>,
    places: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// The number of tenants whose own phase is one that upstream owns.
    upstreams: usize,
}

/// The phases as they are stored: each by its index here; the next number means none.
const PHASES: [Phase; 3] = [Phase::Infisical, Phase::Hybrid, Phase::Database];
const NONE: u8 = 3;

impl OwnPhases {
    /// A tenant's own phase, where it has one.
    pub(super) fn get(&self, tenant: &str) -> Option<Phase> {
        let place =
            self.places.find(self.hasher.hash_one(tenant), |place| name(&self.names, *place) == tenant.as_bytes());
        place.and_then(|place| phase(self.names[*place as usize]))
    }

    /// Notes a tenant's own phase, or that it has none; returns the one that was known before.
    pub(super) fn set(&mut self, tenant: &str, to: Option<Phase>) -> Option<Phase> {
        let Self { names, places, hasher, upstreams } = self;
        let entry = places.entry(
            hasher.hash_one(tenant),
            |place| name(names, *place) == tenant.as_bytes(),
            |place| hasher.hash_one(as_str(name(names, *place))),
        );
        let before = match entry {
            Entry::Occupied(entry) => {
                let kept = &mut names[*entry.get() as usize];
                phase(std::mem::replace(kept, code(to)))
            }
            Entry::Vacant(entry) => {
                if to.is_some() {
                    // A name has at most 63 bytes, and no database has sixty million tenants.
                    let Ok(place) = u32::try_from(names.len()) else { return None };
                    entry.insert(place);
                    names.extend([code(to), tenant.len() as u8]);
                    names.extend_from_slice(tenant.as_bytes());
                }
                None
            }
        };
        let is_upstreams = |phase: Option<Phase>| usize::from(phase.is_some_and(Phase::owned_upstream));
        *upstreams = *upstreams + is_upstreams(to) - is_upstreams(before);
        before
    }

    /// Every tenant that has a phase of its own, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, Phase)> {
        let places = self.places.iter().copied();
        places.filter_map(|place| Some((as_str(name(&self.names, place)), phase(self.names[place as usize])?)))
    }

    /// Whether upstream owns the secrets of any of these tenants.
    pub(super) fn owe_upstream(&self) -> bool {
        self.upstreams > 0
    }

    /// The tenants for which the two differ.
    pub(super) fn differing(&self, other: &Self) -> HashSet<Tenant> {
        let changed = self.iter().filter(|(tenant, phase)| other.get(tenant) != Some(*phase));
        let gone = other.iter().filter(|(tenant, _)| self.get(tenant).is_none());
        changed.chain(gone).map(|(tenant, _)| Tenant::checked(tenant)).collect()
    }
}

fn name(names: &[u8], place: u32) -> &[u8] {
    let place = place as usize;
    &names[place + 2..][..usize::from(names[place + 1])]
}

/// Only tenant names are stored, and they are ASCII.
fn as_str(name: &[u8]) -> &str {
    std::str::from_utf8(name).unwrap_or_default()
}

fn phase(code: u8) -> Option<Phase> {
    PHASES.get(usize::from(code)).copied()
}

fn code(phase: Option<Phase>) -> u8 {
    match phase {
        Some(Phase::Infisical) => 0,
        Some(Phase::Hybrid) => 1,
        Some(Phase::Database) => 2,
        None => NONE,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn phases() -> impl Strategy<Value = Option<Phase>> {
        prop::sample::select(vec![None, Some(Phase::Infisical), Some(Phase::Hybrid), Some(Phase::Database)])
    }

    proptest! {
        #[test]
        fn they_are_those_that_were_noted_last(
            noted in prop::collection::vec(("[a-c][a-c0-9_-]{0,3}", phases()), 0..200),
            others in prop::collection::vec(("[a-c][a-c0-9_-]{0,3}", phases()), 0..20),
        ) {
            let (mut own, mut model) = (OwnPhases::default(), HashMap::new());
            for (tenant, phase) in &noted {
                let before = model.remove(tenant);
                if let Some(phase) = phase {
                    model.insert(tenant.clone(), *phase);
                }
                prop_assert_eq!(own.set(tenant, *phase), before);
            }
            let all: HashMap<String, Phase> = own.iter().map(|(tenant, phase)| (tenant.to_owned(), phase)).collect();
            prop_assert_eq!(&all, &model);
            prop_assert_eq!(own.owe_upstream(), model.values().any(|phase| phase.owned_upstream()));
            let mut other = OwnPhases::default();
            for (tenant, phase) in &others {
                other.set(tenant, *phase);
            }
            let names = noted.iter().chain(&others).map(|(tenant, _)| tenant.as_str());
            let differing: HashSet<Tenant> =
                names.filter(|name| own.get(name) != other.get(name)).map(Tenant::checked).collect();
            prop_assert_eq!(own.differing(&other), differing);
        }
    }

    #[test]
    fn a_hundred_thousand_tenants_take_three_megabytes_at_most() {
        let mut own = OwnPhases::default();
        for number in 0..100_000 {
            own.set(&format!("tenant-{number:06}"), Some(Phase::Database));
        }
        let bytes = own.names.capacity() + own.places.allocation_size();
        assert!(bytes <= 3 << 20, "{bytes}");
    }
}
