//! The names of secretier's own master keys, where secrets with such names could be served: nobody is given
//! a master key, whatever the token.

use std::collections::BTreeSet;

use crate::tenant::shared_folder;

/// The secrets that `keys.sources` mentions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Withheld {
    /// Names that no shared folder serves.
    names: BTreeSet<String>,
    /// Secrets of upstream, by folder and name, that no folder serves, as its own or as an imported one.
    places: BTreeSet<(String, String)>,
}

impl Withheld {
    /// Withholds a name in every shared folder.
    pub fn name(&mut self, name: &str) {
        self.names.insert(name.to_owned());
    }

    /// Withholds a secret of upstream, and its name in every shared folder.
    pub fn place(&mut self, folder: &str, name: &str) {
        self.name(name);
        self.places.insert((trimmed(folder).to_owned(), name.to_owned()));
    }

    /// Whether this key of a tenant's is withheld: only shared folders lie where master keys do.
    #[must_use]
    pub fn has(&self, tenant: &str, key: &str) -> bool {
        shared_folder(tenant).is_some() && self.names.contains(key)
    }

    /// Whether a secret in this folder of upstream is withheld.
    #[must_use]
    pub fn is_in(&self, folder: &str) -> bool {
        self.places.iter().any(|(place, _)| place == trimmed(folder))
    }

    /// Whether a master key has this name, wherever it is.
    #[must_use]
    pub fn has_name(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// Whether no master key has a name.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Whether upstream's secret of this name in this folder is withheld.
    #[must_use]
    pub fn has_at(&self, folder: &str, is_shared: bool, name: &str) -> bool {
        let is_at = |(place, key): &(String, String)| place == trimmed(folder) && key == name;
        (is_shared && self.names.contains(name)) || self.places.iter().any(is_at)
    }
}

fn trimmed(folder: &str) -> &str {
    folder.trim_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_master_keys_name_is_withheld_in_shared_folders_and_where_it_lies() {
        let mut withheld = Withheld::default();
        withheld.place("/hono-api/", "MASTER_KEY");
        withheld.name("SECRETIER_MASTER_KEY");
        for key in ["MASTER_KEY", "SECRETIER_MASTER_KEY"] {
            assert!(withheld.has("/hono-api", key) && withheld.has("/other", key) && !withheld.has("acme", key));
            assert!(withheld.has_at("/other", true, key));
        }
        assert!(!withheld.has("/hono-api", "STRIPE"));
        assert!(withheld.has_at("hono-api", false, "MASTER_KEY"));
        assert!(!withheld.has_at("/hono-api", false, "SECRETIER_MASTER_KEY"));
        assert!(!withheld.has_at("/hono-api/below", false, "MASTER_KEY"));
    }
}
