//! Master keys, and the ring that holds them.

use std::{fmt, str::FromStr, sync::Arc};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::{TryRng as _, rngs::SysRng};
use sha2::Sha256;
use zeroize::Zeroizing;

use super::{envelope::SealError, locked::lock_in_memory};
use crate::secret::SecretValue;

const KEY_LEN: usize = 32;
const ID_MESSAGE: &[u8] = b"secretier master key id v1";
/// The longest repeated pattern that is refused as a key.
const LONGEST_PATTERN: usize = 16;

/// A key that wraps data keys. Wiped with its last holder, absent from logs.
#[derive(Clone)]
pub struct MasterKey {
    id: MasterKeyId,
    // Shared, so that a clone is not another copy of the key, and the key stays in its place.
    bytes: Arc<Zeroizing<[u8; KEY_LEN]>>,
}

impl MasterKey {
    /// A new key from the system's source of randomness.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn generate() -> Result<Self, SealError> {
        let mut bytes = Zeroizing::new([0; KEY_LEN]);
        SysRng.try_fill_bytes(&mut *bytes).map_err(|_| SealError::NoRandomness)?;
        Ok(Self::from_bytes(bytes))
    }

    /// Reads 64 hex digits, or base64 (standard or URL alphabet, padded or not) of 32 bytes;
    /// surrounding white space is ignored.
    ///
    /// # Errors
    /// [`WeakKey`]: malformed, of another length, or a repeated pattern.
    pub fn parse(text: &str) -> Result<Self, WeakKey> {
        let bytes = decode(text)?;
        let repeats = |period: usize| bytes[period..].iter().zip(bytes.iter()).all(|(late, early)| late == early);
        if (1..=LONGEST_PATTERN).any(repeats) {
            return Err(WeakKey::Repeats);
        }
        Ok(Self::from_bytes(bytes))
    }

    /// A key that was derived from a passphrase, or that comes from a backup.
    pub(crate) fn from_derived(bytes: Zeroizing<[u8; KEY_LEN]>) -> Self {
        Self::from_bytes(bytes)
    }

    fn from_bytes(bytes: Zeroizing<[u8; KEY_LEN]>) -> Self {
        let (id, bytes) = (MasterKeyId::of(&bytes), Arc::new(bytes));
        lock_in_memory(&**bytes);
        Self { id, bytes }
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> MasterKeyId {
        self.id
    }

    /// The key as 64 hex digits, to be stored in a source.
    #[must_use]
    pub fn to_hex(&self) -> SecretValue {
        let mut digits = Zeroizing::new([0; 2 * KEY_LEN]);
        // Twice as many digits as bytes always fit, and digits are UTF-8.
        let _ = hex::encode_to_slice(**self.bytes, &mut *digits);
        SecretValue::new(String::from_utf8_lossy(&*digits).into_owned())
    }

    pub(super) fn bytes(&self) -> &[u8; KEY_LEN] {
        &self.bytes
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MasterKey({}, redacted)", self.id)
    }
}

/// The id of a master key, which reveals nothing about it: 64 bits of an HMAC under it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MasterKeyId([u8; 8]);

impl MasterKeyId {
    fn of(key: &[u8; KEY_LEN]) -> Self {
        let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
        mac.update(ID_MESSAGE);
        let mut id = [0; 8];
        id.copy_from_slice(&mac.finalize().into_bytes()[..8]);
        Self(id)
    }
}

impl fmt::Display for MasterKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for MasterKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MasterKeyId({self})")
    }
}

impl FromStr for MasterKeyId {
    type Err = hex::FromHexError;

    fn from_str(text: &str) -> Result<Self, hex::FromHexError> {
        let mut id = [0; 8];
        hex::decode_to_slice(text, &mut id)?;
        // Only one text for each id.
        match text.char_indices().find(|(_, c)| c.is_ascii_uppercase()) {
            Some((index, c)) => Err(hex::FromHexError::InvalidHexCharacter { c, index }),
            None => Ok(Self(id)),
        }
    }
}

/// Why a text is refused as a key. It contains nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WeakKey {
    /// The text is empty.
    #[error("it is empty")]
    Empty,
    /// Neither hex nor base64.
    #[error("it is neither 64 hex digits nor base64 of 32 bytes")]
    Malformed,
    /// Valid text, but not 256 bits.
    #[error(
        "its {characters} characters are {bytes} bytes in {spelling}, and a key has 32: 64 characters of hex, or 44 of base64"
    )]
    Length {
        /// The length of the text.
        characters: usize,
        /// The length of what it spells.
        bytes: usize,
        /// How it spells that.
        spelling: &'static str,
    },
    /// One byte, or a short pattern, repeated.
    #[error("it repeats a pattern; make one with `openssl rand -hex 32`")]
    Repeats,
}

/// Some master keys: the first wraps, all unwrap.
#[derive(Debug, Clone, Default)]
pub struct KeyRing(Vec<MasterKey>);

impl KeyRing {
    /// A ring of these keys, each once, in order.
    #[must_use]
    pub fn new(keys: Vec<MasterKey>) -> Self {
        let mut ring = Vec::<MasterKey>::with_capacity(keys.len());
        for key in keys {
            if !ring.iter().any(|known| known.id == key.id) {
                ring.push(key);
            }
        }
        Self(ring)
    }

    /// Whether no key is known: nothing can be sealed or opened then.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ids of the keys, the one that wraps first.
    pub fn ids(&self) -> impl Iterator<Item = MasterKeyId> + '_ {
        self.0.iter().map(MasterKey::id)
    }

    /// The keys themselves, the one that wraps first.
    #[must_use]
    pub fn keys(&self) -> &[MasterKey] {
        &self.0
    }

    /// The key that wraps.
    #[must_use]
    pub fn first(&self) -> Option<&MasterKey> {
        self.0.first()
    }

    /// The key with this id.
    #[must_use]
    pub fn find(&self, id: MasterKeyId) -> Option<&MasterKey> {
        self.0.iter().find(|key| key.id == id)
    }
}

/// Decodes the 256 bits of a text in hex or base64, weak or not.
pub(crate) fn decode(text: &str) -> Result<Zeroizing<[u8; KEY_LEN]>, WeakKey> {
    let text = text.trim();
    let mut bytes = Zeroizing::new([0; KEY_LEN]);
    if text.is_empty() {
        return Err(WeakKey::Empty);
    }
    if hex::decode_to_slice(text, &mut *bytes).is_err() {
        decode_base64(text, &mut bytes)?;
    }
    Ok(bytes)
}

fn decode_base64(text: &str, bytes: &mut [u8; KEY_LEN]) -> Result<(), WeakKey> {
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let alphabet = if text.contains(['-', '_']) { alphabet::URL_SAFE } else { alphabet::STANDARD };
    let decoded = GeneralPurpose::new(&alphabet, config).decode(text).map(Zeroizing::new);
    let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit()) && text.len().is_multiple_of(2);
    let wrong = |bytes, spelling| Err(WeakKey::Length { characters: text.len(), bytes, spelling });
    let decoded = match decoded {
        Ok(decoded) if decoded.len() == KEY_LEN => decoded,
        _ if is_hex => return wrong(text.len() / 2, "hex"),
        Ok(decoded) => return wrong(decoded.len(), "base64"),
        Err(_) => return Err(WeakKey::Malformed),
    };
    bytes.copy_from_slice(&decoded);
    Ok(())
}

#[cfg(test)]
mod tests {
    use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE, BASE64_URL_SAFE_NO_PAD};

    use super::*;

    const HEX: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    #[test]
    fn a_key_reads_the_same_in_every_spelling() {
        let bytes = hex::decode(HEX).unwrap();
        let id = MasterKey::parse(HEX).unwrap().id();
        for text in [
            format!("  {HEX}\r\n"),
            HEX.to_uppercase(),
            BASE64_STANDARD.encode(&bytes),
            BASE64_STANDARD_NO_PAD.encode(&bytes),
            BASE64_URL_SAFE.encode(&bytes),
            BASE64_URL_SAFE_NO_PAD.encode(&bytes),
        ] {
            assert_eq!(MasterKey::parse(&text).unwrap().id(), id);
        }
        assert!(!HEX.contains(&id.to_string()));
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(MasterKey::parse(HEX).unwrap().to_hex().expose(), HEX);
    }

    #[test]
    fn a_weak_key_is_refused() {
        for (text, reason) in [
            (String::new(), WeakKey::Empty),
            ("hunter2!".to_owned(), WeakKey::Malformed),
            (HEX[..61].to_owned(), WeakKey::Malformed),
            (HEX[..62].to_owned(), WeakKey::Length { characters: 62, bytes: 31, spelling: "hex" }),
            (hex::encode([0; 16]), WeakKey::Length { characters: 32, bytes: 16, spelling: "hex" }),
            (
                "correct.horse.battery.staple.123".replace('.', "+"),
                WeakKey::Length { characters: 32, bytes: 24, spelling: "base64" },
            ),
            (BASE64_STANDARD.encode([7; 33]), WeakKey::Length { characters: 44, bytes: 33, spelling: "base64" }),
            ("00".repeat(32), WeakKey::Repeats),
            ("0123456789abcdef".repeat(4), WeakKey::Repeats),
            (HEX[..32].repeat(2), WeakKey::Repeats),
            (BASE64_STANDARD.encode("abcabcabcabcabcabcabcabcabcabcab"), WeakKey::Repeats),
        ] {
            assert_eq!(MasterKey::parse(&text).err(), Some(reason), "{text}");
        }
    }

    #[test]
    fn keys_are_absent_from_debug() {
        let key = MasterKey::parse(HEX).unwrap();
        let ring = KeyRing::new(vec![key.clone()]);
        for text in [format!("{key:?}"), format!("{ring:?}")] {
            assert!(text.contains("redacted") && !text.contains(&HEX[..8]), "{text}");
        }
    }
}
