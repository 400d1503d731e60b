//! Makes new values, as a rule says.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bech32::{Bech32, Hrp};
use rand::{TryRng as _, rngs::SysRng};
use ring::{rand::SystemRandom, signature::Ed25519KeyPair};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use crate::secret::SecretValue;

/// How a new value is made.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Generate {
    /// Characters that are drawn one by one.
    Random {
        /// How many.
        #[serde(default = "default_length")]
        length: u32,
        /// Which ones.
        #[serde(default)]
        alphabet: Alphabet,
    },
    /// A random UUID (version 4, RFC 9562).
    Uuid,
    /// A private key for Ed25519 signatures: PKCS #8 (RFC 5958) as PEM.
    Ed25519,
    /// An identity of age: a private key for X25519.
    Age,
}

/// The characters of a random value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Alphabet {
    /// Letters, digits, `-` and `_`: what base64url writes.
    #[default]
    Base64url,
    /// Lower-case hexadecimal digits.
    Hex,
    /// Letters and digits.
    Alnum,
    /// What can be seen of ASCII, without what shells, URLs, JSON and references read in their own way: quotes,
    /// backslash, grave accent, `$` and `%`.
    Printable,
}

fn default_length() -> u32 {
    64
}

/// The fewest bits of chance in a random value: nobody guesses it (NIST SP 800-131A).
const FEWEST_BITS: f64 = 128.0;

/// The longest random value, in characters.
const LONGEST: u32 = 65_536;

/// The system's source of randomness gave nothing.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the system's source of randomness failed")]
pub struct NoRandomness;

impl Alphabet {
    fn characters(self) -> &'static [u8] {
        match self {
            Self::Base64url => b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_",
            Self::Hex => b"0123456789abcdef",
            Self::Alnum => b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789",
            Self::Printable => {
                b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#&()*+,-./:;<=>?@[]^_{|}~"
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "an alphabet has less than a hundred characters")]
    fn bits(self) -> f64 {
        (self.characters().len() as f64).log2()
    }
}

impl Generate {
    /// What is wrong with these settings, if anything.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        let Self::Random { length, alphabet } = self else { return None };
        if *length > LONGEST {
            return Some(format!("length: at most {LONGEST} characters"));
        }
        let least = (1..=LONGEST).find(|length| f64::from(*length) * alphabet.bits() >= FEWEST_BITS)?;
        (*length < least)
            .then(|| format!("length: at least {least} characters of this alphabet, so that nobody guesses it"))
    }

    /// Makes a value.
    ///
    /// # Errors
    /// [`NoRandomness`].
    pub fn value(&self) -> Result<SecretValue, NoRandomness> {
        match self {
            Self::Random { length, alphabet } => random(*length, alphabet.characters()),
            Self::Uuid => {
                let mut bytes = [0; 16];
                fill(&mut bytes)?;
                Ok(SecretValue::new(uuid::Builder::from_random_bytes(bytes).into_uuid().to_string()))
            }
            Self::Ed25519 => {
                let pair = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| NoRandomness)?;
                let body = Zeroizing::new(STANDARD.encode(pair.as_ref()));
                Ok(SecretValue::new(pem("PRIVATE KEY", &body)))
            }
            Self::Age => {
                let mut key = Zeroizing::new([0; 32]);
                fill(&mut *key)?;
                let text = bech32::encode_upper::<Bech32>(Hrp::parse_unchecked("age-secret-key-"), &*key);
                // An identity is shorter than the longest text that bech32 can hold.
                text.map(SecretValue::new).map_err(|_| NoRandomness)
            }
        }
    }
}

/// Draws each character with the same chance: bytes that would favour some are drawn again.
fn random(length: u32, characters: &[u8]) -> Result<SecretValue, NoRandomness> {
    let length = usize::try_from(length).map_err(|_| NoRandomness)?;
    let fair = 256 / characters.len() * characters.len();
    // Sized once, so that nothing of the value is left behind in a smaller buffer.
    let mut text = String::with_capacity(length);
    let mut drawn = Zeroizing::new([0; 256]);
    while text.len() < length {
        fill(&mut *drawn)?;
        let fitting = drawn.iter().map(|byte| usize::from(*byte)).filter(|byte| *byte < fair);
        let missing = length - text.len();
        text.extend(fitting.take(missing).map(|byte| char::from(characters[byte % characters.len()])));
    }
    Ok(SecretValue::new(text))
}

/// The text of a PEM file (RFC 7468).
fn pem(label: &str, base64: &str) -> String {
    let (head, tail) = (format!("-----BEGIN {label}-----\n"), format!("-----END {label}-----\n"));
    let mut text = String::with_capacity(head.len() + base64.len() + base64.len() / 64 + 1 + tail.len());
    text.push_str(&head);
    for line in base64.as_bytes().chunks(64) {
        text.extend(line.iter().map(|byte| char::from(*byte)));
        text.push('\n');
    }
    text.push_str(&tail);
    text
}

fn fill(bytes: &mut [u8]) -> Result<(), NoRandomness> {
    SysRng.try_fill_bytes(bytes).map_err(|_| {
        bytes.zeroize();
        NoRandomness
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const ALPHABETS: [Alphabet; 4] = [Alphabet::Base64url, Alphabet::Hex, Alphabet::Alnum, Alphabet::Printable];

    #[test]
    fn a_random_value_has_its_length_and_every_character_of_its_alphabet_and_no_other() {
        for alphabet in ALPHABETS {
            let value = Generate::Random { length: 20_000, alphabet }.value().unwrap();
            assert_eq!(value.len(), 20_000);
            let seen: HashSet<u8> = value.expose().bytes().collect();
            assert_eq!(seen, alphabet.characters().iter().copied().collect(), "{alphabet:?}");
            // Each is as likely as every other: none is drawn twice as often as it should be, or half as often.
            let fair = 20_000 / alphabet.characters().len();
            for character in alphabet.characters() {
                let count = value.expose().bytes().filter(|byte| byte == character).count();
                assert!((fair / 2..fair * 2).contains(&count), "{alphabet:?} {character} {count}");
            }
        }
    }

    #[test]
    fn a_value_that_could_be_guessed_is_refused_and_one_that_cannot_is_not() {
        for (alphabet, least) in [(Alphabet::Base64url, 22), (Alphabet::Hex, 32), (Alphabet::Alnum, 22)] {
            assert!(Generate::Random { length: least - 1, alphabet }.fault().is_some(), "{alphabet:?}");
            assert_eq!(Generate::Random { length: least, alphabet }.fault(), None, "{alphabet:?}");
        }
        assert!(Generate::Random { length: LONGEST + 1, alphabet: Alphabet::Hex }.fault().is_some());
    }

    #[test]
    fn no_two_values_are_the_same() {
        let random = Generate::Random { length: 22, alphabet: Alphabet::Base64url };
        for generate in [random, Generate::Uuid, Generate::Ed25519, Generate::Age] {
            let values: HashSet<String> = (0..50).map(|_| generate.value().unwrap().expose().to_owned()).collect();
            assert_eq!(values.len(), 50, "{generate:?}");
        }
    }

    #[test]
    fn a_signing_key_signs() {
        let value = Generate::Ed25519.value().unwrap();
        let body = value.expose().strip_prefix("-----BEGIN PRIVATE KEY-----\n").unwrap();
        let body = body.strip_suffix("-----END PRIVATE KEY-----\n").unwrap();
        assert!(body.lines().all(|line| line.len() <= 64));
        let pair = Ed25519KeyPair::from_pkcs8(&STANDARD.decode(body.replace('\n', "")).unwrap()).unwrap();
        assert_eq!(pair.sign(b"text").as_ref().len(), 64);
    }

    #[test]
    fn an_identity_of_age_has_the_form_of_its_specification() {
        // "AGE-SECRET-KEY-1", 52 digits for 32 bytes, and 6 of the checksum (C2SP age.md).
        let value = Generate::Age.value().unwrap();
        assert!(value.expose().starts_with("AGE-SECRET-KEY-1") && value.len() == 16 + 52 + 6, "{}", value.len());
        let (prefix, bytes) = bech32::decode(value.expose()).unwrap();
        assert_eq!((prefix.to_lowercase().as_str(), bytes.len()), ("age-secret-key-", 32));
        let uuid: uuid::Uuid = Generate::Uuid.value().unwrap().expose().parse().unwrap();
        assert_eq!(uuid.get_version_num(), 4);
    }
}
