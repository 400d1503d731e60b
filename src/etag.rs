//! The validator of a stored secret.

use sha2::{Digest as _, Sha256};

use crate::secret::{SecretKey, Version};

/// 32 hex digits that change with every version of a secret, without the quotes that HTTP puts
/// around them. They do not depend on the value, so they reveal nothing about it.
#[must_use]
pub fn of(company_id: &str, key: &SecretKey, version: Version) -> String {
    let mut hash = Sha256::new_with_prefix(b"secretier etag v1");
    for part in [company_id.as_bytes(), key.as_str().as_bytes()] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.update(version.number().to_be_bytes());
    hex::encode(&hash.finalize()[..16])
}

/// The validator of a secret whose value was made from references: it changes with the rest of its
/// folder, whose state is `stamp`.
#[must_use]
pub fn beside(etag: &str, stamp: &str) -> String {
    let mut hash = Sha256::new_with_prefix(b"secretier etag v1, referring");
    for part in [etag.as_bytes(), stamp.as_bytes()] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hex::encode(&hash.finalize()[..16])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etag_differs_by_company_key_and_version() {
        let key = |name: &str| name.parse::<SecretKey>().unwrap();
        let etag = of("c1", &key("K"), Version::FIRST);
        assert_eq!(etag.len(), 32);
        assert_eq!(etag, of("c1", &key("K"), Version::FIRST));
        assert_ne!(etag, of("c2", &key("K"), Version::FIRST));
        assert_ne!(etag, of("c1", &key("L"), Version::FIRST));
        assert_ne!(etag, of("c1", &key("K"), Version::FIRST.next()));
        assert_ne!(of("c1", &key("K"), Version::FIRST), of("c", &key("1K"), Version::FIRST));
    }
}
