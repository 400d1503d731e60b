//! The sealed texts: a value (`s1.`), the text with references that it comes from (`t1.`), a value of
//! a rotation that is not, or no longer, the secret's (`p1.`), and a wrapped data key (`w1.`).
//!
//! All are AES-256-GCM (NIST SP 800-38D) with a random 96-bit nonce. At 2^32 values
//! under one data key the chance of a repeated nonce reaches 2^-32, the bound in its
//! section 8.3; a tenant stays far below.

use aes_gcm::{
    AeadInOut as _, Aes256Gcm, KeyInit as _, Nonce, Tag,
    aead::consts::{U12, U16},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac as _};
use rand::{TryRng as _, rngs::SysRng};
use sha2::Sha256;
use zeroize::{Zeroize as _, Zeroizing};

use super::{
    locked::lock_in_memory,
    master_keys::{KeyRing, MasterKey, MasterKeyId},
    scrub::scrub_stack,
};
use crate::{
    long_work::{SHORT, breathe},
    secret::{SecretKey, SecretValue, Version},
    tenant::Tenant,
};

const VALUE_FORMAT: &str = "s1";
const TEXT_FORMAT: &str = "t1";
const STAGED_FORMAT: &str = "p1";
const WRAPPED_FORMAT: &str = "w1";
const HEAD_FORMAT: &str = "h1";
const KEY_LEN: usize = 32;
pub(super) const NONCE_LEN: usize = 12;
const TAG_LEN: usize = 16;

/// The owner of a data key: a wrapped key opens for no other owner.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// The company's id, as text.
    pub company_id: &'a str,
    /// Its subdomain: two companies whose subdomains were swapped do not open.
    pub tenant: &'a Tenant,
}

/// The place of a value: a value sealed for one place opens at no other.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The company's id, as text.
    pub company_id: &'a str,
    /// The secret's name.
    pub key: &'a SecretKey,
    /// The value's version.
    pub version: Version,
}

/// The place of a value that a rotation holds: the value that comes, or the one that goes. It opens as
/// neither in another rotation, nor in the other's place, nor with another end.
#[derive(Debug, Clone, Copy)]
pub struct StagedPlace<'a> {
    /// The company's id, as text.
    pub company_id: &'a str,
    /// The secret's name.
    pub key: &'a SecretKey,
    /// The rotation's id.
    pub rotation: &'a str,
    /// Whether it is the value that comes.
    pub is_new: bool,
    /// Until when the value that goes is valid, in milliseconds since 1970; 0 while that is open.
    pub valid_until: i64,
}

/// A tenant's key, which seals its values. Wiped on drop.
pub struct DataKey {
    version: i64,
    // Boxed, and the box's page is locked into memory: a key that moved would leave that page.
    // Thousands are kept, so the key is expanded only when it is used: that takes less time than
    // looking up its place, and saves a kilobyte.
    bytes: Box<Zeroizing<[u8; KEY_LEN]>>,
}

impl DataKey {
    /// A new key from the system's source of randomness.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn generate(version: i64) -> Result<Self, SealError> {
        let mut bytes = Zeroizing::new([0; KEY_LEN]);
        fill_random(&mut *bytes)?;
        Ok(Self::from_bytes(version, &bytes))
    }

    fn from_bytes(version: i64, key: &[u8; KEY_LEN]) -> Self {
        let mut bytes = Box::new(Zeroizing::new([0; KEY_LEN]));
        lock_in_memory(&*bytes);
        bytes.copy_from_slice(key);
        Self { version, bytes }
    }

    /// Counts the data keys that a company has had.
    #[must_use]
    pub fn version(&self) -> i64 {
        self.version
    }

    /// Seals a value for one place.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn seal(&self, value: &SecretValue, place: Place<'_>) -> Result<String, SealError> {
        self.seal_as(VALUE_FORMAT, value, place)
    }

    /// Seals a text with references for one place. It does not open as a value.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn seal_text(&self, text: &SecretValue, place: Place<'_>) -> Result<String, SealError> {
        self.seal_as(TEXT_FORMAT, text, place)
    }

    /// Seals a value that a rotation holds. It opens as nothing else.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn seal_staged(&self, value: &SecretValue, place: StagedPlace<'_>) -> Result<String, SealError> {
        self.seal_bound(STAGED_FORMAT, value, &staged_binding(place, self.version))
    }

    fn seal_as(&self, format: &str, value: &SecretValue, place: Place<'_>) -> Result<String, SealError> {
        self.seal_bound(format, value, &value_binding(format, place, self.version))
    }

    fn seal_bound(&self, format: &str, value: &SecretValue, binding: &[u8]) -> Result<String, SealError> {
        let sealed = seal(&cipher(&self.bytes), value.expose().as_bytes(), binding)?;
        Ok(text(&[format, &self.version.to_string()], &sealed))
    }

    /// Opens a value that [`Self::seal`] made for the same place.
    ///
    /// # Errors
    /// [`OpenError`], which contains nothing of the value.
    pub fn open(&self, sealed: &str, place: Place<'_>) -> Result<SecretValue, OpenError> {
        self.open_as(VALUE_FORMAT, sealed, place)
    }

    /// Opens a text that [`Self::seal_text`] made for the same place.
    ///
    /// # Errors
    /// [`OpenError`], which contains nothing of the text.
    pub fn open_text(&self, sealed: &str, place: Place<'_>) -> Result<SecretValue, OpenError> {
        self.open_as(TEXT_FORMAT, sealed, place)
    }

    /// Opens a value that [`Self::seal_staged`] made for the same place.
    ///
    /// # Errors
    /// [`OpenError`], which contains nothing of the value.
    pub fn open_staged(&self, sealed: &str, place: StagedPlace<'_>) -> Result<SecretValue, OpenError> {
        self.open_bound(STAGED_FORMAT, sealed, &staged_binding(place, self.version))
    }

    fn open_as(&self, format: &str, sealed: &str, place: Place<'_>) -> Result<SecretValue, OpenError> {
        self.open_bound(format, sealed, &value_binding(format, place, self.version))
    }

    fn open_bound(&self, format: &str, sealed: &str, binding: &[u8]) -> Result<SecretValue, OpenError> {
        let (version, body) = split(sealed, format)?;
        if parse_version(version)? != self.version {
            return Err(OpenError::Forged);
        }
        let mut opened = open(&cipher(&self.bytes), body, binding)?;
        breathe(opened.len());
        // The buffer itself becomes the value, so there is no second copy to wipe.
        String::from_utf8(std::mem::take(&mut *opened)).map(SecretValue::new).map_err(|error| {
            error.into_bytes().zeroize();
            OpenError::NotUtf8
        })
    }
}

/// The version of the tenant's data key that opens a head.
///
/// # Errors
/// [`OpenError::Malformed`], [`OpenError::UnknownFormat`].
pub fn head_key_version(sealed: &str) -> Result<i64, OpenError> {
    parse_version(split(sealed, HEAD_FORMAT)?.0)
}

impl DataKey {
    /// Derives the key of the tenant's head. It is a separate key because the values under a data
    /// key are counted, and no key may seal too much.
    #[must_use]
    pub fn head_key(&self) -> HeadKey {
        let mut mac = Hmac::<Sha256>::new_from_slice(&**self.bytes).expect("HMAC takes a key of any length");
        mac.update(b"secretier tenant head v1");
        let mut key = Zeroizing::new([0; KEY_LEN]);
        key.copy_from_slice(&mac.finalize().into_bytes());
        HeadKey { version: self.version, cipher: cipher(&key) }
    }
}

/// Seals data about a tenant as a whole. It is expanded, in order to open a head and to seal the
/// next one, and must be kept no longer than that takes. Wiped on drop.
pub struct HeadKey {
    version: i64,
    cipher: Aes256Gcm,
}

impl HeadKey {
    /// The version of the data key that it comes from.
    #[must_use]
    pub fn version(&self) -> i64 {
        self.version
    }

    /// Seals a head, bound to these parts.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn seal(&self, plain: &[u8], bound_to: &[&[u8]]) -> Result<String, SealError> {
        let sealed = seal(&self.cipher, plain, &binding(bound_to))?;
        Ok(text(&[HEAD_FORMAT, &self.version.to_string()], &sealed))
    }

    /// Opens a head that [`Self::seal`] made for the same parts.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(&self, sealed: &str, bound_to: &[&[u8]]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        let (version, body) = split(sealed, HEAD_FORMAT)?;
        if parse_version(version)? != self.version {
            return Err(OpenError::Forged);
        }
        open(&self.cipher, body, &binding(bound_to))
    }
}

impl std::fmt::Debug for HeadKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HeadKey(of data key {}, redacted)", self.version)
    }
}

impl std::fmt::Debug for DataKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DataKey(version {}, redacted)", self.version)
    }
}

/// The version of the data key that a sealed value was sealed with.
///
/// # Errors
/// [`OpenError::Malformed`], [`OpenError::UnknownFormat`].
pub fn data_key_version(sealed: &str) -> Result<i64, OpenError> {
    parse_version(split(sealed, VALUE_FORMAT)?.0)
}

/// The version of the data key that a text with references was sealed with.
///
/// # Errors
/// [`OpenError::Malformed`], [`OpenError::UnknownFormat`].
pub fn text_key_version(sealed: &str) -> Result<i64, OpenError> {
    parse_version(split(sealed, TEXT_FORMAT)?.0)
}

/// The version of the data key that a rotation's value was sealed with.
///
/// # Errors
/// [`OpenError::Malformed`], [`OpenError::UnknownFormat`].
pub fn staged_key_version(sealed: &str) -> Result<i64, OpenError> {
    parse_version(split(sealed, STAGED_FORMAT)?.0)
}

impl MasterKey {
    /// Wraps a data key.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn wrap(&self, key: &DataKey, owner: Owner<'_>) -> Result<String, SealError> {
        let sealed = seal(&cipher(self.bytes()), &**key.bytes, &wrapped_binding(owner, key.version))?;
        Ok(text(&[WRAPPED_FORMAT, &self.id().to_string()], &sealed))
    }
}

impl KeyRing {
    /// Wraps a data key with the key of the ring that wraps.
    ///
    /// # Errors
    /// [`SealError::NoMasterKey`] on an empty ring.
    pub fn wrap(&self, key: &DataKey, owner: Owner<'_>) -> Result<(String, MasterKeyId), SealError> {
        let master = self.first().ok_or(SealError::NoMasterKey)?;
        Ok((master.wrap(key, owner)?, master.id()))
    }

    /// Unwraps a data key that [`Self::wrap`] made for the same owner and version, with the master
    /// key that wrapped it.
    ///
    /// # Errors
    /// [`OpenError`], which contains nothing of the key.
    pub fn unwrap(&self, wrapped: &str, version: i64, owner: Owner<'_>) -> Result<DataKey, OpenError> {
        let (id, body) = split(wrapped, WRAPPED_FORMAT)?;
        let id = id.parse().map_err(|_| OpenError::Malformed)?;
        if self.is_empty() {
            return Err(OpenError::NoMasterKey);
        }
        let master = self.find(id).ok_or(OpenError::UnknownMasterKey(id))?;
        let opened = open(&cipher(master.bytes()), body, &wrapped_binding(owner, version))?;
        let key = opened.as_slice().try_into().map_err(|_| OpenError::Malformed)?;
        Ok(DataKey::from_bytes(version, key))
    }
}

/// Why nothing was sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The ring is empty.
    #[error("no master key is known, so nothing can be sealed; see [keys] in the configuration")]
    NoMasterKey,
    /// The operating system gave no random bytes.
    #[error("the system's source of randomness failed")]
    NoRandomness,
}

/// Why a sealed text does not open. It contains nothing of the sealed data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Not the shape of a sealed text.
    #[error("the sealed text is malformed")]
    Malformed,
    /// A format that this program does not know, perhaps of a later version.
    #[error("the sealed text has an unknown format")]
    UnknownFormat,
    /// Wrapped by a master key that is not available.
    #[error("the master key {0} is not known; see [keys] in the configuration")]
    UnknownMasterKey(MasterKeyId),
    /// Sealed with a data key that the company does not have.
    #[error("the company has no data key of version {0}")]
    UnknownDataKey(i64),
    /// The company was shredded: its rows were put back.
    #[error("the tenant was shredded, and what was destroyed has been put back")]
    Destroyed,
    /// Authentication failed: changed, or sealed for another place.
    #[error("the sealed text was changed, or sealed for another tenant, key or version")]
    Forged,
    /// It opened, but is not UTF-8.
    #[error("the opened value is not UTF-8")]
    NotUtf8,
    /// The ring is empty.
    #[error("no master key is known, so nothing can be opened; see [keys] in the configuration")]
    NoMasterKey,
}

/// Seals: nonce, ciphertext and tag, one after the other.
pub(super) fn seal(cipher: &Aes256Gcm, plain: &[u8], binding: &[u8]) -> Result<Vec<u8>, SealError> {
    // Sized once, so that no plaintext is left behind in a smaller buffer.
    let mut sealed = Vec::with_capacity(NONCE_LEN + plain.len() + TAG_LEN);
    let nonce = draw_nonce()?;
    sealed.extend_from_slice(&nonce);
    sealed.extend_from_slice(plain);
    let tag = cipher
        .encrypt_inout_detached(&Nonce::<U12>::from(nonce), binding, (&mut sealed[NONCE_LEN..]).into())
        .expect("AES-GCM takes any text below 64 GiB");
    scrub_stack();
    sealed.extend_from_slice(&tag);
    Ok(sealed)
}

/// Opens a text that [`seal`] made and [`encode`] encoded.
pub(super) fn open(cipher: &Aes256Gcm, body: &str, binding: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    open_bytes(cipher, decode(body)?, binding)
}

/// Opens bytes that [`seal`] made, in their own buffer.
pub(super) fn open_bytes(cipher: &Aes256Gcm, sealed: Vec<u8>, binding: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let mut buffer = Zeroizing::new(sealed);
    let plain_len = buffer.len().checked_sub(NONCE_LEN + TAG_LEN).ok_or(OpenError::Malformed)?;
    let malformed = |_| OpenError::Malformed;
    let nonce = Nonce::<U12>::try_from(&buffer[..NONCE_LEN]).map_err(malformed)?;
    let tag = Tag::<U16>::try_from(&buffer[NONCE_LEN + plain_len..]).map_err(malformed)?;
    let sealed = &mut buffer[NONCE_LEN..NONCE_LEN + plain_len];
    let opened = cipher.decrypt_inout_detached(&nonce, binding, sealed.into(), &tag);
    scrub_stack();
    opened.map_err(|_| OpenError::Forged)?;
    breathe(plain_len);
    buffer.copy_within(NONCE_LEN..NONCE_LEN + plain_len, 0);
    buffer[plain_len..].zeroize();
    buffer.truncate(plain_len);
    Ok(buffer)
}

/// Decodes a text that [`encode`] wrote, in parts: each is a multiple of four letters, except for
/// the last.
fn decode(body: &str) -> Result<Vec<u8>, OpenError> {
    let mut sealed = Vec::with_capacity(body.len().div_ceil(4) * 3);
    for part in body.as_bytes().chunks(SHORT) {
        URL_SAFE_NO_PAD.decode_vec(part, &mut sealed).map_err(|_| OpenError::Malformed)?;
        breathe(part.len());
    }
    Ok(sealed)
}

/// The encoding of sealed bytes: base64url without padding.
pub(super) fn encode(sealed: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(sealed)
}

/// An expanded key, which wipes itself (aes-gcm's feature `zeroize`).
pub(super) fn cipher(key: &[u8; KEY_LEN]) -> Aes256Gcm {
    let cipher = Aes256Gcm::new(key.into());
    scrub_stack();
    cipher
}

fn draw_nonce() -> Result<[u8; NONCE_LEN], SealError> {
    let mut nonce = [0; NONCE_LEN];
    fill_random(&mut nonce)?;
    Ok(nonce)
}

fn fill_random(bytes: &mut [u8]) -> Result<(), SealError> {
    SysRng.try_fill_bytes(bytes).map_err(|_| SealError::NoRandomness)
}

fn text(head: &[&str], sealed: &[u8]) -> String {
    let mut text = head.join(".");
    text.push('.');
    URL_SAFE_NO_PAD.encode_string(sealed, &mut text);
    text
}

/// Returns the middle and the body of `<format>.<middle>.<body>`.
fn split<'a>(sealed: &'a str, format: &str) -> Result<(&'a str, &'a str), OpenError> {
    let mut parts = sealed.splitn(3, '.');
    let (Some(head), Some(middle), Some(body)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(OpenError::Malformed);
    };
    if head == format { Ok((middle, body)) } else { Err(OpenError::UnknownFormat) }
}

fn parse_version(text: &str) -> Result<i64, OpenError> {
    let version = text.parse::<i64>().map_err(|_| OpenError::Malformed)?;
    // Only one text for each version: no "+1", no "01".
    if version.to_string() == text { Ok(version) } else { Err(OpenError::Malformed) }
}

fn value_binding(format: &str, place: Place<'_>, data_key_version: i64) -> Vec<u8> {
    binding(&[
        format.as_bytes(),
        place.company_id.as_bytes(),
        place.key.as_str().as_bytes(),
        &place.version.number().to_be_bytes(),
        &data_key_version.to_be_bytes(),
    ])
}

fn staged_binding(place: StagedPlace<'_>, data_key_version: i64) -> Vec<u8> {
    binding(&[
        STAGED_FORMAT.as_bytes(),
        place.company_id.as_bytes(),
        place.key.as_str().as_bytes(),
        place.rotation.as_bytes(),
        &[u8::from(place.is_new)],
        &place.valid_until.to_be_bytes(),
        &data_key_version.to_be_bytes(),
    ])
}

fn wrapped_binding(owner: Owner<'_>, version: i64) -> Vec<u8> {
    binding(&[
        WRAPPED_FORMAT.as_bytes(),
        owner.company_id.as_bytes(),
        owner.tenant.as_str().as_bytes(),
        &version.to_be_bytes(),
    ])
}

/// Puts its length before each part, so that no two lists give the same bytes.
pub(super) fn binding(parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.len() + 8).sum());
    for part in parts {
        bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
        bytes.extend_from_slice(part);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const COMPANY: &str = "7d3f2c1e-5b7a-4c7e-9d83-0d9a4a1b2c3d";
    const OTHER: &str = "11111111-5b7a-4c7e-9d83-0d9a4a1b2c3d";

    fn ring() -> KeyRing {
        KeyRing::new(vec![MasterKey::generate().unwrap()])
    }

    fn key(name: &str) -> SecretKey {
        name.parse().unwrap()
    }

    fn tenant(name: &str) -> Tenant {
        name.parse().unwrap()
    }

    fn flip(sealed: &str, bit: usize) -> String {
        let (head, body) = sealed.rsplit_once('.').unwrap();
        let mut bytes = URL_SAFE_NO_PAD.decode(body).unwrap();
        let bit = bit % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        format!("{head}.{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    #[test]
    fn a_value_opens_whatever_its_length_and_its_base64_is_read_into_one_buffer() {
        const PART: usize = SHORT / 4 * 3;
        let (data_key, name) = (DataKey::generate(1).unwrap(), key("KEY"));
        let place = Place { company_id: COMPANY, key: &name, version: Version::new(1).unwrap() };
        for length in [0, 1, 2, 3, PART - 1, PART, PART + 1, PART + 2, 5 * PART + 7] {
            let value = SecretValue::new("v".repeat(length));
            let sealed = data_key.seal(&value, place).unwrap();
            assert!(data_key.open(&sealed, place).unwrap().same_as(&value), "{length}");
            let text = encode(&vec![7; length]);
            let decoded = decode(&text).unwrap();
            assert!(decoded == vec![7; length] && decoded.capacity() <= text.len().div_ceil(4) * 3, "{length}");
        }
        for wrong in ["=", "A", "AB\n"] {
            assert!(decode(&format!("{}{wrong}", "A".repeat(SHORT))).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn what_was_sealed_opens_the_same_and_nowhere_else(
            value in any::<String>(), name in "[A-Z_/]{1,40}", number in 1..i64::MAX, bit in any::<usize>(),
        ) {
            let data_key = DataKey::generate(3).unwrap();
            let (name, version) = (key(&name), Version::new(number).unwrap());
            let place = Place { company_id: COMPANY, key: &name, version };
            let value = SecretValue::new(value);
            let sealed = data_key.seal(&value, place).unwrap();
            prop_assert!(data_key.open(&sealed, place).unwrap().same_as(&value));
            prop_assert_eq!(data_key_version(&sealed), Ok(3));

            let forged = |sealed: &str, place| data_key.open(sealed, place).err() == Some(OpenError::Forged);
            prop_assert!(forged(&flip(&sealed, bit), place));
            let (other, next) = (key("other"), version.next());
            let elsewhere = [
                Place { company_id: OTHER, ..place },
                Place { key: &other, ..place },
                Place { version: next, ..place },
            ];
            for place in elsewhere {
                prop_assert!(forged(&sealed, place));
            }
            prop_assert!(forged(&sealed.replacen("s1.3.", "s1.4.", 1), place));
        }

        #[test]
        fn a_value_of_a_rotation_opens_in_its_place_alone(
            value in any::<String>(), name in "[A-Z_/]{1,40}", bit in any::<usize>(), valid_until in 0..i64::MAX,
        ) {
            let (data_key, name) = (DataKey::generate(3).unwrap(), key(&name));
            let place = StagedPlace { company_id: COMPANY, key: &name, rotation: "one", is_new: false, valid_until };
            let value = SecretValue::new(value);
            let sealed = data_key.seal_staged(&value, place).unwrap();
            prop_assert!(data_key.open_staged(&sealed, place).unwrap().same_as(&value));
            prop_assert_eq!(staged_key_version(&sealed), Ok(3));
            let forged = |sealed: &str, place| data_key.open_staged(sealed, place).err() == Some(OpenError::Forged);
            prop_assert!(forged(&flip(&sealed, bit), place));
            let other = key("other");
            let elsewhere = [
                StagedPlace { company_id: OTHER, ..place },
                StagedPlace { key: &other, ..place },
                StagedPlace { rotation: "two", ..place },
                StagedPlace { is_new: true, ..place },
                StagedPlace { valid_until: valid_until + 1, ..place },
            ];
            for place in elsewhere {
                prop_assert!(forged(&sealed, place));
            }
            let as_value = Place { company_id: COMPANY, key: &name, version: Version::FIRST };
            prop_assert_eq!(data_key.open(&sealed, as_value).err(), Some(OpenError::UnknownFormat));
            prop_assert!(data_key.open(&sealed.replacen("p1.", "s1.", 1), as_value).is_err());
        }

        #[test]
        fn a_wrapped_data_key_opens_for_its_owner_alone(bit in any::<usize>(), version in 1..i64::MAX) {
            let ring = ring();
            let data_key = DataKey::generate(version).unwrap();
            let acme = tenant("acme");
            let owner = Owner { company_id: COMPANY, tenant: &acme };
            let (wrapped, id) = ring.wrap(&data_key, owner).unwrap();
            let opened = ring.unwrap(&wrapped, version, owner).unwrap();
            prop_assert_eq!(opened.bytes, data_key.bytes);
            prop_assert!(wrapped.contains(&id.to_string()));

            let refused = |wrapped: &str, version, owner| {
                matches!(ring.unwrap(wrapped, version, owner), Err(OpenError::Forged))
            };
            prop_assert!(refused(&flip(&wrapped, bit), version, owner));
            prop_assert!(refused(&wrapped, version - 1, owner));
            let umbrella = tenant("umbrella");
            for owner in [Owner { company_id: OTHER, ..owner }, Owner { tenant: &umbrella, ..owner }] {
                prop_assert!(refused(&wrapped, version, owner));
            }
        }

        #[test]
        fn no_text_makes_opening_panic(text in "([sw]1|[a-z]9)?\\.?[0-9a-f]{0,20}\\.?[A-Za-z0-9_.=-]{0,60}") {
            let data_key = DataKey::generate(1).unwrap();
            let place = Place { company_id: COMPANY, key: &key("K"), version: Version::FIRST };
            prop_assert!(data_key.open(&text, place).is_err());
            let acme = tenant("acme");
            let owner = Owner { company_id: COMPANY, tenant: &acme };
            prop_assert!(ring().unwrap(&text, 1, owner).is_err());
        }
    }

    #[test]
    fn an_empty_value_and_the_largest_open_the_same() {
        let data_key = DataKey::generate(1).unwrap();
        let place = Place { company_id: COMPANY, key: &key("K"), version: Version::FIRST };
        for value in [String::new(), "鍵".repeat((1 << 20) / 3)] {
            let value = SecretValue::new(value);
            let sealed = data_key.seal(&value, place).unwrap();
            assert!(data_key.open(&sealed, place).unwrap().same_as(&value));
        }
    }

    /// Every text that differs from this one in a single bit and is a text.
    fn one_bit_away(text: &str) -> impl Iterator<Item = String> {
        (0..text.len() * 8).filter_map(move |bit| {
            let mut bytes = text.as_bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            String::from_utf8(bytes).ok()
        })
    }

    #[test]
    fn any_changed_bit_of_a_sealed_text_or_a_wrapped_key_is_refused() {
        let data_key = DataKey::generate(12).unwrap();
        let place = Place { company_id: COMPANY, key: &key("K"), version: Version::FIRST };
        let sealed = data_key.seal(&SecretValue::new("sk_live_placeholder".to_owned()), place).unwrap();
        let mut changes = 0;
        for changed in one_bit_away(&sealed) {
            assert!(data_key.open(&changed, place).is_err(), "{sealed} as {changed}");
            changes += 1;
        }
        assert!(changes >= sealed.len() * 7, "{changes}");

        let (ring, acme) = (ring(), tenant("acme"));
        let owner = Owner { company_id: COMPANY, tenant: &acme };
        let (wrapped, _) = ring.wrap(&data_key, owner).unwrap();
        for changed in one_bit_away(&wrapped) {
            assert!(ring.unwrap(&changed, 12, owner).is_err(), "{wrapped} as {changed}");
        }
    }

    #[test]
    fn what_one_key_sealed_another_of_the_same_number_does_not_open() {
        let (one, other) = (DataKey::generate(1).unwrap(), DataKey::generate(1).unwrap());
        let place = Place { company_id: COMPANY, key: &key("K"), version: Version::FIRST };
        let sealed = one.seal(&SecretValue::new("v".to_owned()), place).unwrap();
        assert_eq!(other.open(&sealed, place).err(), Some(OpenError::Forged));

        let (first, second) = (MasterKey::generate().unwrap(), MasterKey::generate().unwrap());
        let (first_id, second_id) = (first.id().to_string(), second.id().to_string());
        let (ring, acme) = (KeyRing::new(vec![first, second]), tenant("acme"));
        let owner = Owner { company_id: COMPANY, tenant: &acme };
        let (wrapped, _) = ring.wrap(&one, owner).unwrap();
        let renamed = wrapped.replace(&first_id, &second_id);
        assert_ne!(renamed, wrapped);
        assert_eq!(ring.unwrap(&renamed, 1, owner).err(), Some(OpenError::Forged));
    }

    /// Sealing a million values would take an unoptimised build a minute, so most nonces
    /// are drawn as sealing draws them.
    #[test]
    fn no_nonce_repeats_in_a_million() {
        let data_key = DataKey::generate(1).unwrap();
        let sealed = (0..20_000).map(|_| {
            let sealed = seal(&cipher(&data_key.bytes), b"v", b"place").unwrap();
            <[u8; NONCE_LEN]>::try_from(&sealed[..NONCE_LEN]).unwrap()
        });
        let nonces: HashSet<_> = sealed.chain((20_000..1_000_000).map(|_| draw_nonce().unwrap())).collect();
        assert_eq!(nonces.len(), 1_000_000);
    }

    #[test]
    fn every_key_of_the_ring_unwraps_and_the_first_wraps() {
        let (old, new) = (MasterKey::generate().unwrap(), MasterKey::generate().unwrap());
        let (old_id, new_id) = (old.id(), new.id());
        let acme = tenant("acme");
        let owner = Owner { company_id: COMPANY, tenant: &acme };
        let data_key = DataKey::generate(1).unwrap();
        let before = KeyRing::new(vec![old]);
        let (wrapped, id) = before.wrap(&data_key, owner).unwrap();
        assert_eq!(id, old_id);

        let alone = KeyRing::new(vec![new]);
        assert_eq!(alone.unwrap(&wrapped, 1, owner).err(), Some(OpenError::UnknownMasterKey(old_id)));
        let both = KeyRing::new(alone.keys().iter().chain(before.keys()).cloned().collect());
        assert!(both.unwrap(&wrapped, 1, owner).is_ok());
        assert_eq!(both.wrap(&data_key, owner).unwrap().1, new_id);
    }

    #[test]
    fn an_empty_ring_says_so() {
        let ring = KeyRing::default();
        let acme = tenant("acme");
        let owner = Owner { company_id: COMPANY, tenant: &acme };
        let data_key = DataKey::generate(1).unwrap();
        assert_eq!(ring.wrap(&data_key, owner).err(), Some(SealError::NoMasterKey));
        let (wrapped, _) = super::tests::ring().wrap(&data_key, owner).unwrap();
        assert_eq!(ring.unwrap(&wrapped, 1, owner).err(), Some(OpenError::NoMasterKey));
    }

    #[test]
    fn a_later_format_is_named_as_such() {
        let data_key = DataKey::generate(1).unwrap();
        let place = Place { company_id: COMPANY, key: &key("K"), version: Version::FIRST };
        assert_eq!(data_key.open("s2.1.AAAA", place).err(), Some(OpenError::UnknownFormat));
        assert_eq!(data_key.open("s1.01.AAAA", place).err(), Some(OpenError::Malformed));
    }

    #[test]
    fn keys_are_absent_from_debug() {
        let data_key = DataKey::generate(1).unwrap();
        assert_eq!(format!("{data_key:?}"), "DataKey(version 1, redacted)");
    }
}
