//! Keys that are derived from a master key for one purpose each, so that none of them can be used
//! in place of another: HMAC-SHA256 as the pseudorandom function, one block (NIST SP 800-108r1,
//! 4.1).

use std::fmt;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::{
    envelope::{self, OpenError, SealError},
    master_keys::{MasterKey, MasterKeyId},
};

const LEN: usize = 32;

/// The purpose of a derived key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Digests of values that a migration compares.
    MigrationDigest,
    /// The signature of a migration's manifest.
    MigrationManifest,
    /// The archives of folders.
    Archive,
    /// The signatures of the audit's chains.
    Audit,
    /// The offline copy of an instance, kept for a start without the database.
    OfflineCopy,
    /// The seals of rows that are not secret but must not be changed.
    Seal,
    /// The keys that sign access tokens.
    Login,
    /// Validators of content that has no version of ours.
    ContentTag,
}

impl Purpose {
    fn label(self) -> &'static [u8] {
        match self {
            Self::MigrationDigest => b"secretier migration digest v1",
            Self::MigrationManifest => b"secretier migration manifest v1",
            Self::Archive => b"secretier archive v1",
            Self::Audit => b"secretier audit v1",
            Self::OfflineCopy => b"secretier last good v1",
            Self::Seal => b"secretier seal v1",
            Self::Login => b"secretier login v1",
            Self::ContentTag => b"secretier content tag v1",
        }
    }
}

/// A key for one purpose. Wiped on drop, absent from logs.
pub struct DerivedKey {
    id: MasterKeyId,
    bytes: Zeroizing<[u8; LEN]>,
}

impl MasterKey {
    /// Derives the key for this purpose: always the same one.
    #[must_use]
    pub fn derive(&self, purpose: Purpose) -> DerivedKey {
        let mut mac = keyed(self.bytes());
        mac.update(purpose.label());
        let mut bytes = Zeroizing::new([0; LEN]);
        bytes.copy_from_slice(&mac.finalize().into_bytes());
        DerivedKey { id: self.id(), bytes }
    }
}

impl DerivedKey {
    /// The master key that it was derived from.
    #[must_use]
    pub fn master_key(&self) -> MasterKeyId {
        self.id
    }

    /// Derives a separate key for whatever these parts name. So however much is sealed under this
    /// one, no key comes near the number of random nonces that it may be used with.
    #[must_use]
    pub fn narrowed(&self, to: &[&[u8]]) -> Self {
        let mut bytes = Zeroizing::new([0; LEN]);
        bytes.copy_from_slice(self.tag(to).as_bytes());
        Self { id: self.id, bytes }
    }

    /// Authenticates these parts, each with its length, so that no bytes can be moved from one part
    /// to the next.
    #[must_use]
    pub fn tag(&self, parts: &[&[u8]]) -> Tag {
        let mut mac = keyed(&self.bytes);
        for part in parts {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        Tag(mac.finalize().into_bytes().into())
    }

    /// Seals a text and binds it to these parts (AES-256-GCM, random nonce).
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn seal(&self, text: &str, bound_to: &[&[u8]]) -> Result<String, SealError> {
        let cipher = envelope::cipher(&self.bytes);
        Ok(envelope::encode(&envelope::seal(&cipher, text.as_bytes(), &envelope::binding(bound_to))?))
    }

    /// Seals bytes, as [`Self::seal`] does.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn seal_bytes(&self, plain: &[u8], bound_to: &[&[u8]]) -> Result<Vec<u8>, SealError> {
        envelope::seal(&envelope::cipher(&self.bytes), plain, &envelope::binding(bound_to))
    }

    /// Opens what [`Self::seal_bytes`] made for the same parts, in the same buffer.
    ///
    /// # Errors
    /// [`OpenError`], which holds nothing of the bytes.
    pub fn open_bytes(&self, sealed: Vec<u8>, bound_to: &[&[u8]]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        envelope::open_bytes(&envelope::cipher(&self.bytes), sealed, &envelope::binding(bound_to))
    }

    /// Opens what [`Self::seal`] made for the same parts.
    ///
    /// # Errors
    /// [`OpenError`], which holds nothing of the text.
    pub fn open(&self, sealed: &str, bound_to: &[&[u8]]) -> Result<Zeroizing<String>, OpenError> {
        let mut opened = envelope::open(&envelope::cipher(&self.bytes), sealed, &envelope::binding(bound_to))?;
        String::from_utf8(std::mem::take(&mut *opened)).map(Zeroizing::new).map_err(|error| {
            drop(Zeroizing::new(error.into_bytes()));
            OpenError::NotUtf8
        })
    }
}

impl fmt::Debug for DerivedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DerivedKey(from {}, redacted)", self.id)
    }
}

/// An authentication tag: without the key it reveals nothing about the content.
#[derive(Clone, Copy, Eq)]
pub struct Tag([u8; LEN]);

impl Tag {
    /// Whether these are the tag's bytes; compares in constant time.
    #[must_use]
    pub fn is(&self, bytes: &[u8]) -> bool {
        self.0.ct_eq(bytes).into()
    }

    /// The tag as bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Compares in constant time.
impl PartialEq for Tag {
    fn eq(&self, other: &Self) -> bool {
        self.is(&other.0)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tag({self})")
    }
}

fn keyed(key: &[u8; LEN]) -> Hmac<Sha256> {
    Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_two_purposes_or_two_masters_have_nothing_in_common() {
        let (one, other) = (MasterKey::generate().unwrap(), MasterKey::generate().unwrap());
        let digest = |key: &MasterKey, purpose| key.derive(purpose).tag(&[b"x"]);
        assert_eq!(digest(&one, Purpose::Archive), digest(&one, Purpose::Archive));
        assert_ne!(digest(&one, Purpose::Archive), digest(&one, Purpose::MigrationDigest));
        assert_ne!(digest(&one, Purpose::Archive), digest(&other, Purpose::Archive));
    }

    #[test]
    fn a_narrowed_key_opens_neither_what_its_parent_sealed_nor_what_its_sibling_did() {
        let key = MasterKey::generate().unwrap().derive(Purpose::OfflineCopy);
        let (one, other) = (key.narrowed(&[b"one"]), key.narrowed(&[b"other"]));
        let sealed = one.seal_bytes(b"hush", &[b"x"]).unwrap();
        assert_eq!(**one.open_bytes(sealed.clone(), &[b"x"]).unwrap(), *b"hush");
        for (opener, bound_to) in [(&key, b"x"), (&other, b"x"), (&one, b"y")] {
            assert_eq!(opener.open_bytes(sealed.clone(), &[bound_to]).unwrap_err(), OpenError::Forged);
        }
        assert_eq!(one.open_bytes(sealed[..20].to_vec(), &[b"x"]).unwrap_err(), OpenError::Malformed);
    }

    #[test]
    fn parts_cannot_be_moved_into_each_other() {
        let key = MasterKey::generate().unwrap().derive(Purpose::MigrationDigest);
        assert_ne!(key.tag(&[b"ab", b"c"]), key.tag(&[b"a", b"bc"]));
        assert_ne!(key.tag(&[b"ab"]), key.tag(&[b"ab", b""]));
    }

    #[test]
    fn what_is_sealed_opens_only_where_it_belongs() {
        let key = MasterKey::generate().unwrap().derive(Purpose::Archive);
        let sealed = key.seal("hush", &[b"acme"]).unwrap();
        assert_eq!(*key.open(&sealed, &[b"acme"]).unwrap(), "hush");
        assert!(key.open(&sealed, &[b"globex"]).is_err());
        assert!(MasterKey::generate().unwrap().derive(Purpose::Archive).open(&sealed, &[b"acme"]).is_err());
    }
}
