//! The tenant: a company, named by its subdomain. A shared folder stands where a tenant does.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

/// A tenant's subdomain: `[a-z0-9][a-z0-9_-]{0,62}`, cheap to clone.
///
/// A shared folder is a tenant of its own to everything but scopes and upstream's paths: its text is its
/// name behind a `/`, which no subdomain has.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tenant(Arc<str>);

impl Tenant {
    /// The longest subdomain, in bytes (a DNS label, RFC 1035 section 2.3.4).
    pub const MAX_LEN: usize = 63;

    /// Whether `name` may name a company or, behind a `/`, a shared folder; `parse` without the allocation.
    #[must_use]
    pub fn is_valid(name: &str) -> bool {
        Self::is_subdomain(shared_folder(name).unwrap_or(name))
    }

    /// Whether `name` may name a company.
    #[must_use]
    pub fn is_subdomain(name: &str) -> bool {
        let bytes = name.as_bytes();
        let letter = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        bytes.len() <= Self::MAX_LEN
            && bytes.first().is_some_and(letter)
            && bytes.iter().all(|byte| letter(byte) || matches!(byte, b'-' | b'_'))
    }

    /// A company, where `parse` would take a shared folder too.
    ///
    /// # Errors
    /// The name is no subdomain.
    pub fn company(name: &str) -> Result<Self, InvalidTenant> {
        if Self::is_subdomain(name) { Ok(Self(name.into())) } else { Err(InvalidTenant) }
    }

    /// A tenant from a name that was checked already.
    pub(crate) fn checked(name: &str) -> Self {
        debug_assert!(Self::is_valid(name));
        Self(name.into())
    }

    /// The subdomain as text, or the name of a shared folder behind a `/`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of the shared folder; `None` for a company.
    #[must_use]
    pub fn shared_folder(&self) -> Option<&str> {
        shared_folder(self.as_str())
    }
}

/// The name of the shared folder that a tenant's text stands for; `None` for a company's.
#[must_use]
pub fn shared_folder(tenant: &str) -> Option<&str> {
    tenant.strip_prefix('/')
}

impl FromStr for Tenant {
    type Err = InvalidTenant;

    fn from_str(name: &str) -> Result<Self, InvalidTenant> {
        if Self::is_valid(name) { Ok(Self(name.into())) } else { Err(InvalidTenant) }
    }
}

/// A tenant can be looked up by its text: the two hash and compare alike.
impl Borrow<str> for Tenant {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tenant({})", self.0)
    }
}

/// A name that no tenant can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a tenant or a shared folder is named by 1 to 63 lower-case letters, digits, '-' or '_', beginning with a letter or digit"
)]
pub struct InvalidTenant;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_is_a_lower_case_label() {
        for name in ["a", "0", "acme", "acme-corp", "a_b", &"x".repeat(63)] {
            assert_eq!(Tenant::from_str(name).unwrap().shared_folder(), None, "{name}");
        }
        for name in ["", "-a", "_a", "A", "a.b", "a b", "a/b", "..", "ä", "a\0", &"x".repeat(64)] {
            assert_eq!(Tenant::from_str(name), Err(InvalidTenant), "{name}");
        }
    }

    #[test]
    fn a_shared_folder_is_such_a_label_behind_a_slash() {
        assert_eq!(Tenant::from_str("/hono-api").unwrap().shared_folder(), Some("hono-api"));
        assert!(Tenant::from_str(&format!("/{}", "x".repeat(63))).is_ok());
        for name in ["/", "//a", "/a/", "/a/b", "/A", "/..", "/-a", "a/", &format!("/{}", "x".repeat(64))] {
            assert_eq!(Tenant::from_str(name), Err(InvalidTenant), "{name}");
        }
    }
}
