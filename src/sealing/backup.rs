//! The master keys in one file, sealed under a passphrase: an instance can start with it when every
//! source of keys is gone. The caller reads and writes the file.
//!
//! The keys are stored one after the other under AES-256-GCM, with a key that Argon2id derives from
//! the passphrase. Every other field is bound to them as associated data, as the text that it is in
//! the file: if anybody changes one of them, the file no longer opens.

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{
    envelope::{self, NONCE_LEN, SealError},
    master_keys::{KeyRing, MasterKey, MasterKeyId},
    passphrase::{Derivation, DerivationError, PassphraseError},
};
use crate::{clock::Timestamp, secret::SecretValue};

const KEY_LEN: usize = 32;
const ABOUT: &str = "The master keys of a secretier environment, sealed under a passphrase. \
                     Who has both can read every secret in its database.";
const VERSION: u64 = 1;
const CIPHER: &str = "aes-256-gcm";
const BINDING: &[u8] = b"secretier key backup v1";
/// The nonce's length in base64, without a remainder: 12 bytes are whole groups of three.
const NONCE_TEXT_LEN: usize = NONCE_LEN / 3 * 4;

/// The longest text that is read as a backup: enough for thousands of keys.
pub const MAX_LEN: usize = 1 << 20;

/// Seals a ring into the text of a file. Derives a key, so it blocks, as
/// [`Derivation::derive`] says.
///
/// # Errors
/// [`BackupError`]: an empty ring, a refused passphrase.
pub fn seal(
    ring: &KeyRing,
    passphrase: &SecretValue,
    environment: &str,
    now: Timestamp,
) -> Result<String, BackupError> {
    if ring.is_empty() {
        return Err(SealError::NoMasterKey.into());
    }
    let derivation = Derivation::draw()?;
    let key = derivation.derive(passphrase)?;
    seal_under(&key, &derivation, ring, environment, now)
}

/// A backup that was read but not yet opened: nothing in it is proved before.
#[derive(Debug, Clone)]
pub struct Backup {
    file: File,
    created_at: Timestamp,
    key_ids: Vec<MasterKeyId>,
    derivation: Derivation,
}

impl Backup {
    /// Parses a text that [`seal`] wrote.
    ///
    /// # Errors
    /// [`BackupError`]: too long, malformed, of another version, or a derivation that is
    /// too weak or asks for too much.
    pub fn parse(text: &str) -> Result<Self, BackupError> {
        #[derive(Deserialize)]
        struct Probe {
            version: u64,
        }
        if text.len() > MAX_LEN {
            return Err(BackupError::TooLarge);
        }
        // A later version may have other fields, so the version number is read first.
        let Probe { version } = serde_json::from_str(text).map_err(|error| unreadable(&error))?;
        if version != VERSION {
            return Err(BackupError::UnknownVersion(version));
        }
        Self::check(serde_json::from_str(text).map_err(|error| unreadable(&error))?)
    }

    /// The ids of the keys inside, the one that wraps first.
    #[must_use]
    pub fn key_ids(&self) -> &[MasterKeyId] {
        &self.key_ids
    }

    /// The environment that the keys belong to.
    #[must_use]
    pub fn environment(&self) -> &str {
        &self.file.environment
    }

    /// When it was made.
    #[must_use]
    pub fn created_at(&self) -> Timestamp {
        self.created_at
    }

    /// Opens it. Derives a key, so it blocks, as [`Derivation::derive`] says.
    ///
    /// # Errors
    /// [`BackupError::Refused`] if the passphrase is wrong or the file was changed.
    pub fn open(&self, passphrase: &SecretValue) -> Result<KeyRing, BackupError> {
        self.open_under(&*self.derivation.derive(passphrase)?)
    }

    fn open_under(&self, key: &[u8; KEY_LEN]) -> Result<KeyRing, BackupError> {
        // 16 base64 digits are 12 bytes, so the two texts joined are nonce and sealed text.
        let body = format!("{}{}", self.file.nonce, self.file.sealed);
        let opened = envelope::open(&envelope::cipher(key), &body, &self.file.binding());
        let opened = opened.map_err(|_| BackupError::Refused)?;
        let (keys, rest) = opened.as_chunks::<KEY_LEN>();
        let keys = keys.iter().map(|bytes| {
            let mut key = Zeroizing::new([0; KEY_LEN]);
            key.copy_from_slice(bytes);
            MasterKey::from_derived(key)
        });
        let ring = KeyRing::new(keys.collect());
        if rest.is_empty() && ring.ids().eq(self.key_ids.iter().copied()) {
            Ok(ring)
        } else {
            Err(BackupError::Malformed("the keys inside are not those that it names".to_owned()))
        }
    }

    /// Every value has one spelling: a text that would be written differently is refused.
    fn check(file: File) -> Result<Self, BackupError> {
        let malformed = |what: &str| BackupError::Malformed(what.to_owned());
        if file.cipher != CIPHER {
            return Err(malformed("its cipher is not aes-256-gcm"));
        }
        let created_at = Timestamp::from_rfc3339(&file.created_at)
            .filter(|time| time.to_rfc3339() == file.created_at)
            .ok_or_else(|| malformed("created_at is no time"))?;
        let key_ids = file.master_keys.iter().map(|text| {
            let id = text.parse::<MasterKeyId>().ok().filter(|id| id.to_string() == *text);
            id.ok_or_else(|| malformed("master_keys holds something else than ids"))
        });
        let key_ids: Vec<_> = key_ids.collect::<Result<_, _>>()?;
        if key_ids.is_empty() {
            return Err(malformed("it names no master key"));
        }
        if file.nonce.len() != NONCE_TEXT_LEN {
            return Err(malformed("the nonce is not of 12 bytes"));
        }
        let derivation = file.derivation.parse()?;
        Ok(Self { file, created_at, key_ids, derivation })
    }
}

/// Why there is no backup, or it does not open. It contains nothing of keys or passphrase.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackupError {
    /// The ring is empty, or there is no randomness.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The passphrase is refused.
    #[error(transparent)]
    Passphrase(#[from] PassphraseError),
    /// Longer than any backup.
    #[error("this is no backup of master keys: it is longer than {} MiB", MAX_LEN >> 20)]
    TooLarge,
    /// Not the shape of a backup.
    #[error("this is no backup of master keys: {0}")]
    Malformed(String),
    /// Made by a later version of this program.
    #[error("the backup has the format version {0}; this program knows version {VERSION}")]
    UnknownVersion(u64),
    /// Its derivation is refused.
    #[error("the backup's derivation is refused: {0}")]
    Derivation(#[from] DerivationError),
    /// Authentication failed.
    #[error("the passphrase is wrong, or the file was changed")]
    Refused,
}

/// The file, field by field.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    about: String,
    version: u64,
    created_at: String,
    environment: String,
    master_keys: Vec<String>,
    derivation: String,
    cipher: String,
    nonce: String,
    sealed: String,
}

impl File {
    /// All fields except for nonce and sealed text, which GCM itself authenticates.
    fn binding(&self) -> Vec<u8> {
        let (version, count) = (self.version.to_be_bytes(), (self.master_keys.len() as u64).to_be_bytes());
        let mut parts: Vec<&[u8]> = vec![BINDING, self.about.as_bytes(), &version];
        parts.extend([&self.created_at, &self.environment, &self.derivation, &self.cipher].map(|text| text.as_bytes()));
        parts.push(&count);
        parts.extend(self.master_keys.iter().map(|id| id.as_bytes()));
        envelope::binding(&parts)
    }
}

/// Seals under the key that was derived.
fn seal_under(
    key: &[u8; KEY_LEN],
    derivation: &Derivation,
    ring: &KeyRing,
    environment: &str,
    now: Timestamp,
) -> Result<String, BackupError> {
    let keys: Vec<_> = ring.ids().filter_map(|id| ring.find(id)).collect();
    let mut plain = Zeroizing::new(Vec::with_capacity(keys.len() * KEY_LEN));
    keys.iter().for_each(|key| plain.extend_from_slice(key.bytes()));
    let mut file = File {
        about: ABOUT.to_owned(),
        version: VERSION,
        created_at: now.to_rfc3339(),
        environment: environment.to_owned(),
        master_keys: keys.iter().map(|key| key.id().to_string()).collect(),
        derivation: derivation.to_string(),
        cipher: CIPHER.to_owned(),
        nonce: String::new(),
        sealed: String::new(),
    };
    let mut body = envelope::encode(&envelope::seal(&envelope::cipher(key), &plain, &file.binding())?);
    file.sealed = body.split_off(NONCE_TEXT_LEN);
    file.nonce = body;
    let text = serde_json::to_string_pretty(&file).expect("texts and numbers always serialise");
    Ok(text + "\n")
}

/// Names the place of the error, not the text there: somebody may have given a file of keys.
fn unreadable(error: &serde_json::Error) -> BackupError {
    BackupError::Malformed(format!("it is wrong at line {}, column {}", error.line(), error.column()))
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_795_298_459_022);

    fn passphrase() -> SecretValue {
        SecretValue::new("correct horse battery".to_owned())
    }

    /// The cheapest derivation that is accepted.
    fn cheap() -> Derivation {
        "argon2id$v=19$m=19456,t=2,p=1$AAECAwQFBgcICQoLDA0ODw".parse().unwrap()
    }

    /// The key that the passphrase gives with it, derived once for all tests.
    static KEY: LazyLock<Zeroizing<[u8; KEY_LEN]>> = LazyLock::new(|| cheap().derive(&passphrase()).unwrap());

    fn ring(keys: usize) -> KeyRing {
        KeyRing::new((0..keys).map(|_| MasterKey::generate().unwrap()).collect())
    }

    fn sample(keys: usize) -> (KeyRing, String) {
        let ring = ring(keys);
        let text = seal_under(&KEY, &cheap(), &ring, "prod", NOW).unwrap();
        (ring, text)
    }

    fn keys(ring: &KeyRing) -> Vec<[u8; KEY_LEN]> {
        ring.ids().map(|id| *ring.find(id).unwrap().bytes()).collect()
    }

    #[test]
    fn a_sealed_ring_opens_the_same_and_tells_what_it_is() {
        let ring = ring(3);
        let text = seal(&ring, &passphrase(), "prod", NOW).unwrap();
        let backup = Backup::parse(&text).unwrap();
        assert_eq!(backup.key_ids(), ring.ids().collect::<Vec<_>>());
        assert_eq!((backup.environment(), backup.created_at()), ("prod", NOW));
        assert_eq!(keys(&backup.open(&passphrase()).unwrap()), keys(&ring), "in order, the one that wraps first");
        for part in ["master keys", "\"version\": 1", "2026-11-21T", "argon2id$v=19$m=65536,t=3,p=1$", "aes-256-gcm"] {
            assert!(text.contains(part), "{text}");
        }
        for key in keys(&ring) {
            assert!(!text.contains(&hex::encode(key)) && !text.contains(&envelope::encode(&key)));
        }
    }

    #[test]
    fn a_wrong_passphrase_is_an_error_that_says_so() {
        let (_, text) = sample(1);
        let wrong = SecretValue::new("correct horse batterz".to_owned());
        let error = Backup::parse(&text).unwrap().open(&wrong).unwrap_err();
        assert_eq!(error, BackupError::Refused);
        assert!(error.to_string().contains("the passphrase is wrong"), "{error}");
        let short = Backup::parse(&text).unwrap().open(&SecretValue::new("short".to_owned()));
        assert_eq!(short.unwrap_err(), BackupError::Passphrase(PassphraseError::TooShort));
    }

    #[test]
    fn an_empty_ring_or_a_weak_passphrase_makes_no_backup() {
        let empty = seal(&KeyRing::default(), &passphrase(), "prod", NOW);
        assert_eq!(empty.unwrap_err(), BackupError::Seal(SealError::NoMasterKey));
        let weak = seal(&ring(1), &SecretValue::new("a".repeat(20)), "prod", NOW);
        assert_eq!(weak.unwrap_err(), BackupError::Passphrase(PassphraseError::Repeats));
    }

    #[test]
    fn a_later_version_a_refused_derivation_and_another_file_are_told_apart() {
        let (_, text) = sample(2);
        let with = |from: &str, to: &str| {
            assert!(text.contains(from), "{from}");
            Backup::parse(&text.replacen(from, to, 1)).unwrap_err()
        };
        assert_eq!(with("\"version\": 1", "\"version\": 2, \"more\": []"), BackupError::UnknownVersion(2));
        assert_eq!(with("m=19456", "m=8"), BackupError::Derivation(DerivationError::TooWeak));
        assert_eq!(with("m=19456", "m=4000000"), BackupError::Derivation(DerivationError::TooCostly));
        assert_eq!(with("argon2id", "scrypt"), BackupError::Derivation(DerivationError::Unknown));
        let malformed = |error| matches!(error, BackupError::Malformed(_));
        assert!(malformed(with("aes-256-gcm", "aes-128-gcm")));
        assert!(malformed(with("\"about\"", "\"comment\"")));
        assert!(malformed(with("\"about\"", "\"environment\": \"dev\", \"about\"")));
        assert!(malformed(with("22Z", "22+00:00")));
        let key = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        for other in ["", "null", "{}", key, "{\"version\": 1}", &format!("{{\"{key}\": 1}}")] {
            let error = Backup::parse(other).unwrap_err();
            assert!(matches!(error, BackupError::Malformed(_)) && !error.to_string().contains(&key[..8]), "{error}");
        }
        assert_eq!(Backup::parse(&" ".repeat(MAX_LEN + 1)).unwrap_err(), BackupError::TooLarge);
    }

    #[test]
    fn keys_that_are_not_those_it_names_are_refused() {
        let (one, other) = (ring(1), ring(1));
        let id = one.ids().next().unwrap();
        let (_, text) = sample(1);
        // Sealed by somebody who knows the passphrase, with the id of another key.
        let mut file: File = serde_json::from_str(&text).unwrap();
        file.master_keys = vec![id.to_string()];
        let sealed = envelope::seal(&envelope::cipher(&KEY), &keys(&other)[0], &file.binding()).unwrap();
        let mut body = envelope::encode(&sealed);
        file.sealed = body.split_off(NONCE_TEXT_LEN);
        file.nonce = body;
        let error = Backup::check(file).unwrap().open(&passphrase()).unwrap_err();
        assert!(matches!(error, BackupError::Malformed(_)), "{error}");
    }

    /// Whether it opens, even if a changed derivation gave the same key.
    fn opens(text: &str) -> bool {
        Backup::parse(text).and_then(|backup| backup.open_under(&KEY)).is_ok()
    }

    #[test]
    fn any_changed_bit_of_a_backup_is_refused() {
        let (_, text) = sample(2);
        assert!(opens(&text));
        for bit in 0..text.trim_end().len() * 8 {
            let mut bytes = text.clone().into_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let Ok(changed) = String::from_utf8(bytes) else { continue };
            assert!(!opens(&changed), "bit {} of {:?}", bit % 8, &text[bit / 8..bit / 8 + 1]);
        }
    }

    proptest! {
        #[test]
        fn any_change_of_any_field_is_refused(
            environment in any::<String>(), other in any::<String>(), keys in 1..4_usize, field in 0..9_usize,
        ) {
            let ring = ring(keys);
            let text = seal_under(&KEY, &cheap(), &ring, &environment, NOW).unwrap();
            prop_assert!(opens(&text));
            let mut file: serde_json::Value = serde_json::from_str(&text).unwrap();
            let name = ["about", "version", "created_at", "environment", "master_keys", "derivation", "cipher", "nonce",
                "sealed"][field];
            let mut value = serde_json::Value::from(other);
            if name == "master_keys" {
                value = file[name].clone();
                value.as_array_mut().unwrap().rotate_left(1);
            }
            prop_assume!(file[name] != value);
            file[name] = value;
            prop_assert!(!opens(&file.to_string()));
        }

        #[test]
        fn no_text_makes_reading_a_backup_panic(text in any::<String>()) {
            prop_assert!(Backup::parse(&text).is_err());
        }
    }
}
