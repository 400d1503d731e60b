//! Opens the texts that applications seal themselves today, so that their values can be imported.
//! Nothing here seals.
//!
//! - `iv:tag:ciphertext` and `iv:ciphertext:tag`: AES-256-GCM (NIST SP 800-38D) without
//!   associated data, the iv of 12 bytes or, as Node.js applications often draw it, of 16.
//! - `iv:ciphertext`: AES-256-CBC (NIST SP 800-38A) with PKCS#7 padding (RFC 5652
//!   section 6.3).
//!
//! Every part is hex, in either case. GCM authenticates the key and the text. **CBC authenticates
//! neither**: about one wrong key in 256 gets past the padding, and most of its results are then
//! not UTF-8; and anybody who can change the text can change bits of the value. Its errors also
//! show whether the padding was right, which is a padding oracle: somebody who may send texts and
//! sees the errors can open a text without the key. So open only your own texts, on your own
//! machine.

use std::{fmt, str::FromStr};

use aes::Aes256;
use aes_gcm::{
    AeadInOut as _, AesGcm, KeyInit as _, Nonce, Tag,
    aead::{
        array::ArraySize,
        consts::{U12, U16},
    },
};
use cbc::cipher::{BlockModeDecrypt as _, KeyIvInit as _, block_padding::Pkcs7};
use hex::FromHexError;
use zeroize::{Zeroize as _, Zeroizing};

use crate::{
    keys::KeySource,
    private_file::{self, FileError},
    sealing::{self, WeakKey},
    secret::SecretValue,
};

const KEY_LEN: usize = 32;
const TAG_LEN: usize = 16;
const CBC_IV_LEN: usize = 16;
const CBC_BLOCK: usize = 16;

/// The longest text that is read: twice the largest value in hex.
pub const MAX_LEN: usize = 4 << 20;

/// An application's own key. Wiped on drop, absent from logs.
///
/// Unlike a master key it may be weak: it protects nothing here, and a value under a weak key
/// should be imported first.
pub struct LegacyKey(Zeroizing<[u8; KEY_LEN]>);

impl LegacyKey {
    /// Reads 64 hex digits, or base64 of 32 bytes, as a master key is written.
    ///
    /// # Errors
    /// [`WeakKey`]: empty, malformed, or of another length.
    pub fn parse(text: &str) -> Result<Self, WeakKey> {
        sealing::decode_key(text).map(Self)
    }

    /// Reads the only key in a file or a variable.
    ///
    /// # Errors
    /// [`LegacyKeyError`], which names the source but never the key.
    pub fn read(source: &KeySource) -> Result<Self, LegacyKeyError> {
        let missing = || LegacyKeyError::Missing(source.clone());
        let refused = |reason| LegacyKeyError::Refused { origin: source.clone(), reason };
        let text = match source {
            KeySource::File(path) => private_file::read(path)?.ok_or_else(missing)?,
            KeySource::Env(name) => match std::env::var(name) {
                Ok(text) => Zeroizing::new(text),
                Err(std::env::VarError::NotPresent) => return Err(missing()),
                Err(std::env::VarError::NotUnicode(text)) => {
                    text.into_encoded_bytes().zeroize();
                    return Err(refused(WeakKey::Malformed));
                }
            },
            _ => return Err(LegacyKeyError::Elsewhere(source.clone())),
        };
        Self::parse(&text).map_err(refused)
    }
}

impl fmt::Debug for LegacyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LegacyKey(redacted)")
    }
}

/// Why an application's key was not read. It contains nothing of the key.
#[derive(Debug, thiserror::Error)]
pub enum LegacyKeyError {
    /// A kind of source that only master keys can have.
    #[error("an application's key is read from \"env:NAME\" or \"file:PATH\", not from {0}")]
    Elsewhere(KeySource),
    /// No such file, or the variable is not set.
    #[error("there is no {0}")]
    Missing(KeySource),
    /// The content is not a key.
    #[error("the key in {origin} is refused: {reason}")]
    Refused {
        /// Its place.
        origin: KeySource,
        /// The fault.
        reason: WeakKey,
    },
    /// The file cannot be read, or others can read it too.
    #[error(transparent)]
    File(#[from] FileError),
}

/// The format of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LegacyFormat {
    /// Recognised by the number of parts; of two parts, the one with the length of a tag is GCM's
    /// tag, and where both have it, the one that authenticates.
    #[default]
    Auto,
    /// `iv:tag:ciphertext`.
    GcmTagFirst,
    /// `iv:ciphertext:tag`.
    GcmTagLast,
    /// `iv:ciphertext`.
    Cbc,
}

impl LegacyFormat {
    const WORDS: [(&str, Self); 4] = [
        ("auto", Self::Auto),
        ("gcm-tag-first", Self::GcmTagFirst),
        ("gcm-tag-last", Self::GcmTagLast),
        ("cbc", Self::Cbc),
    ];
}

impl FromStr for LegacyFormat {
    type Err = UnknownLegacyFormat;

    fn from_str(word: &str) -> Result<Self, UnknownLegacyFormat> {
        Self::WORDS.iter().find(|(known, _)| *known == word).map(|(_, format)| *format).ok_or(UnknownLegacyFormat)
    }
}

impl fmt::Display for LegacyFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::GcmTagFirst => "gcm-tag-first",
            Self::GcmTagLast => "gcm-tag-last",
            Self::Cbc => "cbc",
        })
    }
}

/// A word that names no format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a format is one of auto, gcm-tag-first, gcm-tag-last, cbc")]
pub struct UnknownLegacyFormat;

/// Opens a text that an application sealed with its own key. The work is limited: at most
/// [`MAX_LEN`] bytes, decoded once and deciphered at most twice.
///
/// # Errors
/// [`LegacyError`], which says the reason and contains nothing of the text.
pub fn open(sealed: &str, key: &LegacyKey, format: LegacyFormat) -> Result<SecretValue, LegacyError> {
    if sealed.len() > MAX_LEN {
        return Err(LegacyError::TooLong);
    }
    let mut parts = sealed.split(':');
    let [iv, second, third] = [parts.next(), parts.next(), parts.next()].map(Option::unwrap_or_default);
    match (format, sealed.split(':').count()) {
        (LegacyFormat::GcmTagFirst, 3) => {
            let (iv, tag) = (Part::Iv.bytes(iv)?, Part::Tag.bytes(second)?);
            open_gcm(&iv, &tag, &Part::Ciphertext.bytes(third)?, key).and_then(text)
        }
        (LegacyFormat::GcmTagLast, 3) => {
            let (iv, ciphertext) = (Part::Iv.bytes(iv)?, Part::Ciphertext.bytes(second)?);
            open_gcm(&iv, &Part::Tag.bytes(third)?, &ciphertext, key).and_then(text)
        }
        (LegacyFormat::Auto, 3) => {
            let iv = Part::Iv.bytes(iv)?;
            let (second, third) = (Part::Second.bytes(second)?, Part::Third.bytes(third)?);
            open_either(&iv, &second, &third, key).and_then(text)
        }
        (LegacyFormat::Cbc | LegacyFormat::Auto, 2) => {
            open_cbc(&Part::Iv.bytes(iv)?, Part::Ciphertext.bytes(second)?, key).and_then(text)
        }
        (LegacyFormat::Auto, found) => Err(LegacyError::Parts { found, expected: "2 or 3" }),
        (LegacyFormat::Cbc, found) => Err(LegacyError::Parts { found, expected: "2" }),
        (LegacyFormat::GcmTagFirst | LegacyFormat::GcmTagLast, found) => {
            Err(LegacyError::Parts { found, expected: "3" })
        }
    }
}

/// Why a text was not opened. It contains nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LegacyError {
    /// Longer than any value can be.
    #[error("the text is longer than {} MiB", MAX_LEN >> 20)]
    TooLong,
    /// Another number of parts than the format has.
    #[error("the text has {found} part(s) between colons where {expected} are expected")]
    Parts {
        /// The number of parts.
        found: usize,
        /// The expected number.
        expected: &'static str,
    },
    /// Something else than hex digits.
    #[error("{0} holds something else than hex digits")]
    NotHex(Part),
    /// Half a byte at the end.
    #[error("{0} has an odd number of hex digits")]
    Odd(Part),
    /// Valid hex, but of an impossible length.
    #[error("{part} has {found} bytes where {expected} are expected")]
    Length {
        /// The part.
        part: Part,
        /// Its length.
        found: usize,
        /// The allowed lengths.
        expected: &'static str,
    },
    /// Neither of two parts is as long as a tag.
    #[error("neither the second nor the third part has the 16 bytes of a tag")]
    NoTag,
    /// GCM does not authenticate.
    #[error("authentication failed: another key, a changed text, or the tag stands elsewhere")]
    Forged,
    /// CBC's padding is invalid.
    #[error("the padding is wrong: another key, or a changed text")]
    Padding,
    /// It opened, but is not UTF-8.
    #[error("what was opened is not UTF-8: another key, or no text")]
    NotUtf8,
}

/// A part of a text, for an error message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The first part.
    Iv,
    /// The tag, where the format says which it is.
    Tag,
    /// The ciphertext, where the format says which it is.
    Ciphertext,
    /// The second part, which may be either.
    Second,
    /// The third part, which may be either.
    Third,
}

impl Part {
    fn bytes(self, text: &str) -> Result<Zeroizing<Vec<u8>>, LegacyError> {
        hex::decode(text).map(Zeroizing::new).map_err(|error| match error {
            FromHexError::OddLength => LegacyError::Odd(self),
            FromHexError::InvalidHexCharacter { .. } | FromHexError::InvalidStringLength => LegacyError::NotHex(self),
        })
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Iv => "the iv",
            Self::Tag => "the tag",
            Self::Ciphertext => "the ciphertext",
            Self::Second => "the second part",
            Self::Third => "the third part",
        })
    }
}

/// A part without the length of a tag is the ciphertext. If both have that length, the
/// authentication decides.
fn open_either(iv: &[u8], second: &[u8], third: &[u8], key: &LegacyKey) -> Result<Zeroizing<Vec<u8>>, LegacyError> {
    match (second.len() == TAG_LEN, third.len() == TAG_LEN) {
        (false, false) => Err(LegacyError::NoTag),
        (true, false) => open_gcm(iv, second, third, key),
        (false, true) => open_gcm(iv, third, second, key),
        (true, true) => match open_gcm(iv, second, third, key) {
            Err(LegacyError::Forged) => open_gcm(iv, third, second, key),
            opened => opened,
        },
    }
}

fn open_gcm(iv: &[u8], tag: &[u8], ciphertext: &[u8], key: &LegacyKey) -> Result<Zeroizing<Vec<u8>>, LegacyError> {
    let wrong_tag = LegacyError::Length { part: Part::Tag, found: tag.len(), expected: "16" };
    let tag = Tag::<U16>::try_from(tag).map_err(|_| wrong_tag)?;
    let buffer = Zeroizing::new(ciphertext.to_vec());
    match iv.len() {
        12 => open_gcm_with::<U12>(iv, &tag, buffer, key),
        16 => open_gcm_with::<U16>(iv, &tag, buffer, key),
        found => Err(LegacyError::Length { part: Part::Iv, found, expected: "12 or 16" }),
    }
}

fn open_gcm_with<IvLen: ArraySize>(
    iv: &[u8],
    tag: &Tag<U16>,
    mut buffer: Zeroizing<Vec<u8>>,
    key: &LegacyKey,
) -> Result<Zeroizing<Vec<u8>>, LegacyError> {
    let cipher = AesGcm::<Aes256, IvLen>::new((&*key.0).into());
    let iv = Nonce::<IvLen>::try_from(iv).expect("the caller chose the type by the length");
    cipher.decrypt_inout_detached(&iv, &[], buffer.as_mut_slice().into(), tag).map_err(|_| LegacyError::Forged)?;
    Ok(buffer)
}

fn open_cbc(iv: &[u8], mut buffer: Zeroizing<Vec<u8>>, key: &LegacyKey) -> Result<Zeroizing<Vec<u8>>, LegacyError> {
    let iv: [u8; CBC_IV_LEN] =
        iv.try_into().map_err(|_| LegacyError::Length { part: Part::Iv, found: iv.len(), expected: "16" })?;
    if buffer.is_empty() || !buffer.len().is_multiple_of(CBC_BLOCK) {
        let expected = "a multiple of 16, and not none,";
        return Err(LegacyError::Length { part: Part::Ciphertext, found: buffer.len(), expected });
    }
    let cipher = cbc::Decryptor::<Aes256>::new((&*key.0).into(), &iv.into());
    let length = cipher.decrypt_padded::<Pkcs7>(&mut buffer).map_err(|_| LegacyError::Padding)?.len();
    buffer[length..].zeroize();
    buffer.truncate(length);
    Ok(buffer)
}

/// The buffer itself becomes the value, so there is no second copy to wipe.
fn text(mut opened: Zeroizing<Vec<u8>>) -> Result<SecretValue, LegacyError> {
    String::from_utf8(std::mem::take(&mut *opened)).map(SecretValue::new).map_err(|error| {
        error.into_bytes().zeroize();
        LegacyError::NotUtf8
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Vectors {
        key: String,
        wrong_key: String,
        opens: Vec<Sealed>,
        refused: Vec<Sealed>,
        not_utf8: Vec<Sealed>,
    }

    #[derive(Deserialize)]
    struct Sealed {
        name: String,
        #[serde(default)]
        format: String,
        sealed: String,
        #[serde(default)]
        value: String,
    }

    const FORMATS: [LegacyFormat; 4] =
        [LegacyFormat::Auto, LegacyFormat::GcmTagFirst, LegacyFormat::GcmTagLast, LegacyFormat::Cbc];

    fn vectors() -> (Vectors, LegacyKey) {
        let vectors: Vectors = serde_json::from_str(include_str!("../../../tests/vectors/legacy.json")).unwrap();
        let key = LegacyKey::parse(&vectors.key).unwrap();
        (vectors, key)
    }

    fn refusal(sealed: &str, format: LegacyFormat) -> LegacyError {
        open(sealed, &vectors().1, format).expect_err(sealed)
    }

    #[test]
    fn what_node_sealed_opens_in_its_format_and_told_by_itself() {
        let (vectors, key) = vectors();
        assert!(vectors.opens.len() > 20);
        for Sealed { name, format, sealed, value } in &vectors.opens {
            for format in [format.parse().unwrap(), LegacyFormat::Auto] {
                for sealed in [sealed.clone(), sealed.to_uppercase()] {
                    let opened = open(&sealed, &key, format).unwrap_or_else(|error| panic!("{name} {format}: {error}"));
                    assert_eq!(opened.expose(), value, "{name} as {format}");
                }
            }
        }
    }

    #[test]
    fn what_was_sealed_in_one_format_opens_in_no_other() {
        let (vectors, key) = vectors();
        for Sealed { name, format, sealed, .. } in &vectors.opens {
            let known: LegacyFormat = format.parse().unwrap();
            for other in FORMATS.into_iter().filter(|other| ![known, LegacyFormat::Auto].contains(other)) {
                assert!(open(sealed, &key, other).is_err(), "{name}, {known}, as {other}");
            }
        }
    }

    #[test]
    fn a_wrong_key_is_an_error() {
        let (vectors, _) = vectors();
        let wrong = LegacyKey::parse(&vectors.wrong_key).unwrap();
        for Sealed { name, format, sealed, .. } in &vectors.opens {
            let error = open(sealed, &wrong, LegacyFormat::Auto).expect_err(name);
            let expected: &[_] = match format.as_str() {
                "cbc" => &[LegacyError::Padding, LegacyError::NotUtf8],
                _ => &[LegacyError::Forged],
            };
            assert!(expected.contains(&error), "{name}: {error}");
        }
    }

    #[test]
    fn any_changed_bit_of_a_gcm_text_is_refused() {
        let (vectors, key) = vectors();
        for Sealed { name, sealed, .. } in &vectors.refused {
            let error = open(sealed, &key, LegacyFormat::Auto).expect_err(name);
            assert_eq!(name.starts_with("tampered"), error == LegacyError::Forged, "{name}: {error}");
        }
        let sample = vectors.opens.iter().find(|case| case.format.starts_with("gcm")).unwrap();
        let parts: Vec<Vec<u8>> = sample.sealed.split(':').map(|part| hex::decode(part).unwrap()).collect();
        for (part, bit) in (0..3).flat_map(|part| (0..parts[part].len() * 8).map(move |bit| (part, bit))) {
            let mut changed = parts.clone();
            changed[part][bit / 8] ^= 1 << (bit % 8);
            let changed: Vec<String> = changed.iter().map(hex::encode).collect();
            assert_eq!(refusal(&changed.join(":"), LegacyFormat::Auto), LegacyError::Forged);
        }
    }

    #[test]
    fn an_error_names_the_part_and_the_reason() {
        use LegacyFormat::{Auto, Cbc, GcmTagFirst, GcmTagLast};
        let (iv, tag) = ("00".repeat(12), "00".repeat(16));
        for (sealed, format, error) in [
            (String::new(), Auto, LegacyError::Parts { found: 1, expected: "2 or 3" }),
            ("a:b:c:d".to_owned(), Auto, LegacyError::Parts { found: 4, expected: "2 or 3" }),
            ("a:b:c".to_owned(), Cbc, LegacyError::Parts { found: 3, expected: "2" }),
            ("a:b".to_owned(), GcmTagFirst, LegacyError::Parts { found: 2, expected: "3" }),
            ("a:b".to_owned(), GcmTagLast, LegacyError::Parts { found: 2, expected: "3" }),
            (format!("xx:{tag}:00"), Auto, LegacyError::NotHex(Part::Iv)),
            (format!("000:{tag}:00"), Auto, LegacyError::Odd(Part::Iv)),
            (format!("{iv}:{tag}:0g"), GcmTagFirst, LegacyError::NotHex(Part::Ciphertext)),
            (format!("{iv}:{tag}:0g"), Auto, LegacyError::NotHex(Part::Third)),
            (format!("{iv}:0:{tag}"), Auto, LegacyError::Odd(Part::Second)),
            (format!("{iv}:{tag}:0"), GcmTagLast, LegacyError::Odd(Part::Tag)),
            (format!("{iv}:00:00"), Auto, LegacyError::NoTag),
            (format!("{iv}:00:{tag}"), GcmTagFirst, {
                LegacyError::Length { part: Part::Tag, found: 1, expected: "16" }
            }),
            (format!("0000:{tag}:00"), Auto, LegacyError::Length { part: Part::Iv, found: 2, expected: "12 or 16" }),
            (format!("{iv}:{tag}"), Auto, LegacyError::Length { part: Part::Iv, found: 12, expected: "16" }),
            (format!("{iv}:{tag}:"), Auto, LegacyError::Forged),
            ("0".repeat(MAX_LEN + 1), Auto, LegacyError::TooLong),
        ] {
            let shown: String = sealed.chars().take(80).collect();
            assert_eq!(refusal(&sealed, format), error, "{shown} as {format}");
        }
        for ciphertext in ["", "00", &"00".repeat(17)] {
            let error = refusal(&format!("{tag}:{ciphertext}"), Auto);
            assert!(matches!(error, LegacyError::Length { part: Part::Ciphertext, .. }), "{error}");
        }
        for Sealed { sealed, .. } in vectors().0.not_utf8 {
            assert_eq!(refusal(&sealed, Auto), LegacyError::NotUtf8);
        }
    }

    #[test]
    fn a_format_is_written_as_it_is_read() {
        for format in FORMATS {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert_eq!("gcm".parse::<LegacyFormat>(), Err(UnknownLegacyFormat));
    }

    #[test]
    fn a_key_that_repeats_itself_still_opens_and_no_key_is_shown() {
        assert!(LegacyKey::parse(&"0123456789abcdef".repeat(4)).is_ok());
        assert_eq!(LegacyKey::parse("hunter2!").err(), Some(WeakKey::Malformed));
        assert_eq!(format!("{:?}", vectors().1), "LegacyKey(redacted)");
    }

    proptest! {
        #[test]
        fn no_text_makes_opening_panic(
            text in prop_oneof![any::<String>(), "[0-9a-fA-FxX:]{0,120}", "([0-9a-f]{2}){0,40}(:([0-9a-f]{2}){0,40}){1,3}"],
            format in prop::sample::select(FORMATS.to_vec()),
        ) {
            let key = LegacyKey(Zeroizing::new([7; KEY_LEN]));
            if let Ok(value) = open(&text, &key, format) {
                // CBC authenticates nothing, so a made-up text may open; GCM does, so none opens.
                prop_assert_eq!(text.matches(':').count(), 1);
                prop_assert!(value.len() < text.len());
            }
        }
    }
}
