//! A key from a passphrase, by Argon2id (RFC 9106).
//!
//! New keys are derived with 64 MiB, three passes and one lane, above the minimum of OWASP's
//! Password Storage Cheat Sheet (19 MiB and two passes, or 46 MiB and one). The parameters in a
//! text must be between that minimum and a ceiling: an attacker who can write where they are stored
//! can neither weaken the derivation nor exhaust our memory.

use std::{fmt, str::FromStr};

use argon2::{Algorithm, Argon2, Block, Params};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::{TryRng as _, rngs::SysRng};
use zeroize::Zeroizing;

use super::envelope::SealError;
use crate::secret::SecretValue;

const KEY_LEN: usize = 32;
/// The parameters that [`Derivation::draw`] chooses.
const MEMORY: u32 = 65_536;
const PASSES: u32 = 3;
const LANES: u32 = 1;
const SALT_LEN: usize = 16;
/// OWASP's minimum: at least this many KiB with at least this many passes.
const MINIMA: [(u32, u32); 2] = [(19_456, 2), (47_104, 1)];
const MAX_MEMORY: u32 = 1 << 20;
const MAX_PASSES: u32 = 20;
const MAX_LANES: u32 = 16;
const MAX_SALT_LEN: usize = 64;
/// The smallest number of characters of a passphrase.
const MIN_CHARACTERS: usize = 12;

/// The parameters of a derivation: Argon2id's parameters and a salt, none of which is secret.
///
/// Written as `argon2id$v=19$m=65536,t=3,p=1$<salt>`: KiB, passes and lanes, and the salt
/// in base64url without padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Derivation {
    memory: u32,
    passes: u32,
    lanes: u32,
    salt: Vec<u8>,
}

impl Derivation {
    /// Today's parameters with a new random salt.
    ///
    /// # Errors
    /// [`SealError::NoRandomness`].
    pub fn draw() -> Result<Self, SealError> {
        let mut salt = vec![0; SALT_LEN];
        SysRng.try_fill_bytes(&mut salt).map_err(|_| SealError::NoRandomness)?;
        Ok(Self { memory: MEMORY, passes: PASSES, lanes: LANES, salt })
    }

    /// Derives the key that belongs to a passphrase. Its bytes are used unchanged, including
    /// spaces; the caller removes a line break at the end.
    ///
    /// This keeps a core busy, for about half a second with the parameters of [`Self::draw`] and up
    /// to a minute at the ceiling: call it only where blocking is allowed.
    ///
    /// # Errors
    /// [`PassphraseError`], which contains nothing of the passphrase.
    pub fn derive(&self, passphrase: &SecretValue) -> Result<Zeroizing<[u8; KEY_LEN]>, PassphraseError> {
        let text = passphrase.expose();
        if text.chars().count() < MIN_CHARACTERS {
            return Err(PassphraseError::TooShort);
        }
        if text.chars().zip(text.chars().skip(1)).all(|(one, next)| one == next) {
            return Err(PassphraseError::Repeats);
        }
        let params = Params::new(self.memory, self.passes, self.lanes, Some(KEY_LEN));
        let params = params.expect("the parameters were checked when the derivation was read");
        // Allocated here, so that too little memory is an error and not an abort, and so that it is
        // wiped: argon2 frees its own blocks unwiped.
        let mut blocks = Zeroizing::new(Vec::new());
        let count = params.block_count();
        blocks.try_reserve_exact(count).map_err(|_| PassphraseError::NoMemory(self.memory / 1024))?;
        blocks.resize(count, Block::new());
        let mut key = Zeroizing::new([0; KEY_LEN]);
        Argon2::new(Algorithm::Argon2id, argon2::Version::V0x13, params)
            .hash_password_into_with_memory(text.as_bytes(), &self.salt, &mut *key, blocks.as_mut_slice())
            .expect("the lengths of salt, key and memory were checked");
        Ok(key)
    }

    fn check(self) -> Result<Self, DerivationError> {
        if !MINIMA.iter().any(|&(memory, passes)| self.memory >= memory && self.passes >= passes) || self.lanes < 1 {
            return Err(DerivationError::TooWeak);
        }
        if self.salt.len() < SALT_LEN {
            return Err(DerivationError::TooWeak);
        }
        if self.memory > MAX_MEMORY || self.passes > MAX_PASSES || self.lanes > MAX_LANES {
            return Err(DerivationError::TooCostly);
        }
        if self.salt.len() > MAX_SALT_LEN {
            return Err(DerivationError::TooCostly);
        }
        Ok(self)
    }
}

impl fmt::Display for Derivation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { memory, passes, lanes, salt } = self;
        write!(f, "argon2id$v=19$m={memory},t={passes},p={lanes}${}", URL_SAFE_NO_PAD.encode(salt))
    }
}

impl FromStr for Derivation {
    type Err = DerivationError;

    fn from_str(text: &str) -> Result<Self, DerivationError> {
        let rest = text.strip_prefix("argon2id$v=19$").ok_or(DerivationError::Unknown)?;
        let (costs, salt) = rest.split_once('$').ok_or(DerivationError::Malformed)?;
        let mut costs = costs.splitn(3, ',');
        let mut cost = |name| {
            let digits = costs.next().and_then(|cost| cost.strip_prefix(name));
            digits.and_then(|digits| digits.parse::<u32>().ok()).ok_or(DerivationError::Malformed)
        };
        let (memory, passes, lanes) = (cost("m=")?, cost("t=")?, cost("p=")?);
        let salt = URL_SAFE_NO_PAD.decode(salt).map_err(|_| DerivationError::Malformed)?;
        let derivation = Self { memory, passes, lanes, salt };
        // Only one text for each derivation: no "+3", no "03".
        if derivation.to_string() == text { derivation.check() } else { Err(DerivationError::Malformed) }
    }
}

/// Why a text is refused as a derivation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DerivationError {
    /// Another algorithm, or another version of it.
    #[error("it is not by Argon2id, version 19")]
    Unknown,
    /// Not the shape of a derivation.
    #[error("it is not written as argon2id$v=19$m=...,t=...,p=...$SALT")]
    Malformed,
    /// Its parameters are weaker than is allowed.
    #[error("it is too weak: at least 19456 KiB and 2 passes, or 47104 KiB and 1, and a salt of 16 bytes")]
    TooWeak,
    /// Its parameters cost more work than is allowed.
    #[error("it takes too much: at most 1 GiB, 20 passes, 16 lanes, and a salt of 64 bytes")]
    TooCostly,
}

/// Why no key was derived. It contains nothing of the passphrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PassphraseError {
    /// Too few characters.
    #[error("the passphrase has fewer than {MIN_CHARACTERS} characters; take several random words")]
    TooShort,
    /// One repeated character.
    #[error("the passphrase repeats one character; take several random words")]
    Repeats,
    /// The system gave too little memory.
    #[error("deriving the key takes {0} MiB of memory, which the system did not give")]
    NoMemory(u32),
}

#[cfg(test)]
mod tests {
    use super::*;

    const SALT: &str = "AAECAwQFBgcICQoLDA0ODw";

    fn passphrase(text: &str) -> SecretValue {
        SecretValue::new(text.to_owned())
    }

    fn derivation(costs: &str, salt: &str) -> Result<Derivation, DerivationError> {
        format!("argon2id$v=19${costs}${salt}").parse()
    }

    /// Compared with another implementation: OpenSSL's, called from Python.
    #[test]
    fn a_passphrase_gives_the_key_that_argon2id_defines() {
        for (costs, key) in [
            ("m=19456,t=2,p=1", "3070a20538d8dab46216b9fc3cf4f28f049371c342ffc2fe50f1eed967c50550"),
            ("m=47104,t=1,p=2", "c235a6b03aa506448214d04038b883e9900fa81e371e0aecc1a56e342d1477d7"),
        ] {
            let derived = derivation(costs, SALT).unwrap().derive(&passphrase("correct horse – battery 鍵")).unwrap();
            assert_eq!(hex::encode(*derived), key, "{costs}");
        }
    }

    #[test]
    fn another_salt_or_passphrase_gives_another_key() {
        let derivation = derivation("m=19456,t=2,p=1", SALT).unwrap();
        let other = Derivation { salt: vec![1; SALT_LEN], ..derivation };
        let key = derivation.derive(&passphrase("correct horse")).unwrap();
        assert_eq!(key, derivation.derive(&passphrase("correct horse")).unwrap());
        assert_ne!(key, derivation.derive(&passphrase("correct horsf")).unwrap());
        assert_ne!(key, other.derive(&passphrase("correct horse")).unwrap());
    }

    #[test]
    fn a_drawn_derivation_is_above_the_minimum_and_reads_as_it_is_written() {
        let (one, other) = (Derivation::draw().unwrap(), Derivation::draw().unwrap());
        assert_ne!(one.salt, other.salt);
        assert!(one.to_string().starts_with("argon2id$v=19$m=65536,t=3,p=1$"), "{one}");
        assert_eq!(one.to_string().parse(), Ok(one));
    }

    #[test]
    fn what_is_too_weak_or_too_costly_is_refused() {
        use DerivationError::{TooCostly, TooWeak};
        for (costs, error) in [
            ("m=19455,t=2,p=1", TooWeak),
            ("m=19456,t=1,p=1", TooWeak),
            ("m=47103,t=1,p=1", TooWeak),
            ("m=8,t=20,p=1", TooWeak),
            ("m=65536,t=0,p=1", TooWeak),
            ("m=65536,t=3,p=0", TooWeak),
            ("m=1048577,t=1,p=1", TooCostly),
            ("m=4294967295,t=1,p=1", TooCostly),
            ("m=65536,t=21,p=1", TooCostly),
            ("m=65536,t=3,p=17", TooCostly),
        ] {
            assert_eq!(derivation(costs, SALT), Err(error), "{costs}");
        }
        let costs = "m=65536,t=3,p=1";
        assert_eq!(derivation(costs, &URL_SAFE_NO_PAD.encode([1; 15])), Err(TooWeak));
        assert_eq!(derivation(costs, &URL_SAFE_NO_PAD.encode([1; 65])), Err(TooCostly));
        for costs in ["m=19456,t=2,p=1", "m=47104,t=1,p=1", "m=1048576,t=20,p=16"] {
            assert!(derivation(costs, SALT).is_ok(), "{costs}");
        }
    }

    #[test]
    fn what_is_no_derivation_is_refused() {
        use DerivationError::{Malformed, Unknown};
        for (text, error) in [
            ("", Unknown),
            ("argon2i$v=19$m=65536,t=3,p=1$AAECAwQFBgcICQoLDA0ODw", Unknown),
            ("argon2id$v=16$m=65536,t=3,p=1$AAECAwQFBgcICQoLDA0ODw", Unknown),
            ("argon2id$v=19$m=65536,t=3,p=1", Malformed),
            ("argon2id$v=19$m=65536,t=3$AAECAwQFBgcICQoLDA0ODw", Malformed),
            ("argon2id$v=19$m=065536,t=3,p=1$AAECAwQFBgcICQoLDA0ODw", Malformed),
            ("argon2id$v=19$m=+65536,t=3,p=1$AAECAwQFBgcICQoLDA0ODw", Malformed),
            ("argon2id$v=19$t=3,m=65536,p=1$AAECAwQFBgcICQoLDA0ODw", Malformed),
            ("argon2id$v=19$m=65536,t=3,p=1,k=1$AAECAwQFBgcICQoLDA0ODw", Malformed),
            ("argon2id$v=19$m=65536,t=3,p=1$AAECAwQFBgcICQoLDA0ODw==", Malformed),
            ("argon2id$v=19$m=65536,t=3,p=1$AAECAwQFBgcICQoLDA0ODx", Malformed),
            ("argon2id$v=19$m=99999999999,t=3,p=1$AAECAwQFBgcICQoLDA0ODw", Malformed),
        ] {
            assert_eq!(text.parse::<Derivation>(), Err(error), "{text}");
        }
    }

    #[test]
    fn a_passphrase_that_is_easy_to_guess_is_refused_and_told_what_to_do() {
        let derivation = derivation("m=19456,t=2,p=1", SALT).unwrap();
        for (text, error) in [
            ("", PassphraseError::TooShort),
            ("correct-hor", PassphraseError::TooShort),
            ("鍵鍵鍵鍵", PassphraseError::TooShort),
            ("aaaaaaaaaaaaaaaaaaaaa", PassphraseError::Repeats),
        ] {
            let refused = derivation.derive(&passphrase(text)).unwrap_err();
            assert_eq!(refused, error);
            assert!(refused.to_string().contains("random words"));
        }
    }
}
