//! Master keys: where they come from, and the ring that holds them.

use std::{
    fmt,
    io::Read as _,
    path::{Path, PathBuf},
    str::FromStr,
};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::{TryRng as _, rngs::SysRng};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::Zeroizing;

use super::envelope::SealError;
use crate::tiers::upstream::Upstream;

const KEY_LEN: usize = 32;
const ID_MESSAGE: &[u8] = b"secretier master key id v1";
/// A repeated pattern up to this long is no key.
const LONGEST_PATTERN: usize = 16;

/// A key that wraps data keys. Wiped on drop, absent from logs.
#[derive(Clone)]
pub struct MasterKey {
    id: MasterKeyId,
    bytes: Zeroizing<[u8; KEY_LEN]>,
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

    /// Reads 64 hex digits, or base64 (standard or URL alphabet, padded or not) of 32
    /// bytes; white space around it is left out.
    ///
    /// # Errors
    /// [`WeakKey`]: malformed, of another length, or a repeated pattern.
    pub fn parse(text: &str) -> Result<Self, WeakKey> {
        let text = text.trim();
        let mut bytes = Zeroizing::new([0; KEY_LEN]);
        if text.is_empty() {
            return Err(WeakKey::Empty);
        }
        if hex::decode_to_slice(text, &mut *bytes).is_err() {
            decode_base64(text, &mut bytes)?;
        }
        let repeats = |period: usize| bytes[period..].iter().zip(bytes.iter()).all(|(late, early)| late == early);
        if (1..=LONGEST_PATTERN).any(repeats) {
            return Err(WeakKey::Repeats);
        }
        Ok(Self::from_bytes(bytes))
    }

    fn from_bytes(bytes: Zeroizing<[u8; KEY_LEN]>) -> Self {
        Self { id: MasterKeyId::of(&bytes), bytes }
    }

    /// The name it goes by.
    #[must_use]
    pub fn id(&self) -> MasterKeyId {
        self.id
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

/// Names a master key without giving any of it away: 64 bits of an HMAC under it.
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
        Ok(Self(id))
    }
}

/// Why a text is not taken as a key. Holds nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WeakKey {
    /// Nothing there.
    #[error("it is empty")]
    Empty,
    /// Neither hex nor base64.
    #[error("it is neither 64 hex digits nor base64 of 32 bytes")]
    Malformed,
    /// Well written, but not 256 bits.
    #[error("it holds {0} bytes, not 32")]
    Length(usize),
    /// One byte, or a short pattern, over and over.
    #[error("it repeats a pattern; make one with `openssl rand -hex 32`")]
    Repeats,
}

/// The master keys at hand: the first wraps, all unwrap.
#[derive(Debug, Default)]
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

    /// Whether no key is known: then nothing seals or opens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The names of the keys, the one that wraps first.
    pub fn ids(&self) -> impl Iterator<Item = MasterKeyId> + '_ {
        self.0.iter().map(MasterKey::id)
    }

    /// The keys themselves.
    #[must_use]
    pub fn into_keys(self) -> Vec<MasterKey> {
        self.0
    }

    /// The key that wraps.
    pub(super) fn newest(&self) -> Option<&MasterKey> {
        self.0.first()
    }

    pub(super) fn find(&self, id: MasterKeyId) -> Option<&MasterKey> {
        self.0.iter().find(|key| key.id == id)
    }
}

/// A place that may hold master keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum KeySource {
    /// A secret in Infisical, outside the tenants' folders.
    Infisical {
        /// Its folder, `/` for the root.
        folder: String,
        /// Its name.
        name: String,
    },
    /// A file with one key a line, readable by its owner alone.
    File(PathBuf),
    /// An environment variable.
    Env(String),
}

impl FromStr for KeySource {
    type Err = UnknownSource;

    fn from_str(text: &str) -> Result<Self, UnknownSource> {
        let unknown = || UnknownSource(text.split_once(':').map_or("", |(kind, _)| kind).to_owned());
        let (kind, rest) = text.split_once(':').ok_or_else(unknown)?;
        match (kind, rest) {
            (_, "") => Err(unknown()),
            ("file", path) => Ok(Self::File(path.into())),
            ("env", name) if !name.contains(['=', '\0']) => Ok(Self::Env(name.to_owned())),
            ("infisical", path) => {
                let (folder, name) = path.rsplit_once('/').ok_or_else(unknown)?;
                if name.is_empty() || !path.starts_with('/') {
                    return Err(unknown());
                }
                let folder = if folder.is_empty() { "/" } else { folder };
                Ok(Self::Infisical { folder: folder.to_owned(), name: name.to_owned() })
            }
            _ => Err(unknown()),
        }
    }
}

impl TryFrom<String> for KeySource {
    type Error = UnknownSource;

    fn try_from(text: String) -> Result<Self, UnknownSource> {
        text.parse()
    }
}

impl From<KeySource> for String {
    fn from(source: KeySource) -> Self {
        source.to_string()
    }
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Infisical { folder, name } => write!(f, "infisical:{}/{name}", folder.trim_end_matches('/')),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Env(name) => write!(f, "env:{name}"),
        }
    }
}

/// A text that names no source. Only its kind is kept: someone may have put a key there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} with what follows it names no source of master keys: write \"infisical:/FOLDER/NAME\", \"file:PATH\" or \"env:NAME\""
)]
pub struct UnknownSource(String);

/// What became of one source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceReport {
    /// The source.
    pub source: KeySource,
    /// What it gave.
    pub outcome: SourceOutcome,
}

/// Whether a source answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceOutcome {
    /// It gave these keys.
    Gave(Vec<MasterKeyId>),
    /// It gave none, for this reason.
    Silent(String),
}

/// A source that holds something wrong, which must not pass for a source without a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// What it holds is no key.
    #[error("the master key in {origin} is refused: {reason}")]
    Weak {
        /// Where it stands.
        origin: KeySource,
        /// What is wrong with it.
        reason: WeakKey,
    },
    /// Others can read the file.
    #[error("{path} can be read by others than its owner; run `chmod 600 {path}`", path = .0.display())]
    Exposed(PathBuf),
    /// The file is there and cannot be read.
    #[error("the master key file {path} cannot be read: {reason}", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

/// Asks every source, in order. One that does not answer is left out and reported; one
/// that holds something wrong stops the start.
///
/// # Errors
/// [`KeyError`], which names the source and never the key.
pub async fn load(
    sources: &[KeySource],
    upstream: Option<&dyn Upstream>,
) -> Result<(KeyRing, Vec<SourceReport>), KeyError> {
    let mut keys = Vec::new();
    let mut reports = Vec::new();
    for source in sources {
        let outcome = match ask(source, upstream).await? {
            Answer::Keys(found) => {
                let ids = found.iter().map(MasterKey::id).collect();
                keys.extend(found);
                SourceOutcome::Gave(ids)
            }
            Answer::Silent(reason) => SourceOutcome::Silent(reason),
        };
        reports.push(SourceReport { source: source.clone(), outcome });
    }
    Ok((KeyRing::new(keys), reports))
}

enum Answer {
    Keys(Vec<MasterKey>),
    Silent(String),
}

async fn ask(source: &KeySource, upstream: Option<&dyn Upstream>) -> Result<Answer, KeyError> {
    let silent = |reason: &str| Ok(Answer::Silent(reason.to_owned()));
    let weak = |reason| KeyError::Weak { origin: source.clone(), reason };
    match source {
        KeySource::File(path) => match read_file(path)? {
            Some(text) => keys_by_line(&text).map(Answer::Keys).map_err(weak),
            None => silent("there is no such file"),
        },
        KeySource::Env(name) => match std::env::var(name) {
            Ok(text) => {
                let text = Zeroizing::new(text);
                MasterKey::parse(&text).map(|key| Answer::Keys(vec![key])).map_err(weak)
            }
            Err(std::env::VarError::NotPresent) => silent("the variable is not set"),
            Err(std::env::VarError::NotUnicode(_)) => Err(weak(WeakKey::Malformed)),
        },
        KeySource::Infisical { folder, name } => {
            let Some(upstream) = upstream else {
                return silent("[infisical] is not configured");
            };
            match upstream.read(folder, name).await {
                Ok(Some(value)) => MasterKey::parse(value.expose()).map(|key| Answer::Keys(vec![key])).map_err(weak),
                Ok(None) => silent("there is no such secret"),
                Err(error) => silent(&error.to_string()),
            }
        }
    }
}

/// The file's text; nothing if there is no such file.
fn read_file(path: &Path) -> Result<Option<Zeroizing<String>>, KeyError> {
    let unreadable = |error: std::io::Error| KeyError::Unreadable { path: path.to_owned(), reason: error.to_string() };
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    };
    let metadata = file.metadata().map_err(unreadable)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        if metadata.is_file() && metadata.permissions().mode() & 0o077 != 0 {
            return Err(KeyError::Exposed(path.to_owned()));
        }
    }
    // Room for all of it at once: a buffer that grows leaves copies behind.
    let size = usize::try_from(metadata.len()).unwrap_or(0).saturating_add(1).min(1 << 20);
    let mut text = Zeroizing::new(String::with_capacity(size));
    file.read_to_string(&mut text).map_err(unreadable)?;
    Ok(Some(text))
}

/// One key a line; blank lines and comments are passed over.
fn keys_by_line(text: &str) -> Result<Vec<MasterKey>, WeakKey> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys = lines.map(MasterKey::parse).collect::<Result<Vec<_>, _>>()?;
    if keys.is_empty() { Err(WeakKey::Empty) } else { Ok(keys) }
}

fn decode_base64(text: &str, bytes: &mut [u8; KEY_LEN]) -> Result<(), WeakKey> {
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let alphabet = if text.contains(['-', '_']) { alphabet::URL_SAFE } else { alphabet::STANDARD };
    let decoded = GeneralPurpose::new(&alphabet, config).decode(text).map_err(|_| WeakKey::Malformed)?;
    let decoded = Zeroizing::new(decoded);
    if decoded.len() != KEY_LEN {
        return Err(WeakKey::Length(decoded.len()));
    }
    bytes.copy_from_slice(&decoded);
    Ok(())
}

#[cfg(test)]
mod tests {
    use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE, BASE64_URL_SAFE_NO_PAD};
    use futures_util::future::BoxFuture;

    use super::*;
    use crate::{
        secret::{SecretKey, SecretValue},
        tenant::Tenant,
        tiers::upstream::{Fetched, Health, Lane, UpstreamError},
    };

    const HEX: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    struct Vault(Result<Option<&'static str>, UpstreamError>);

    impl Upstream for Vault {
        fn tenants(&self, _: Lane) -> BoxFuture<'_, Result<Vec<Tenant>, UpstreamError>> {
            unreachable!("not asked")
        }
        fn snapshot<'a>(
            &'a self,
            _: &'a Tenant,
            _: Option<&'a str>,
            _: Lane,
        ) -> BoxFuture<'a, Result<Fetched, UpstreamError>> {
            unreachable!("not asked")
        }
        fn put<'a>(
            &'a self,
            _: &'a Tenant,
            _: &'a SecretKey,
            _: &'a SecretValue,
        ) -> BoxFuture<'a, Result<bool, UpstreamError>> {
            unreachable!("not asked")
        }
        fn delete<'a>(&'a self, _: &'a Tenant, _: &'a SecretKey) -> BoxFuture<'a, Result<bool, UpstreamError>> {
            unreachable!("not asked")
        }
        fn read<'a>(
            &'a self,
            folder: &'a str,
            name: &'a str,
        ) -> BoxFuture<'a, Result<Option<SecretValue>, UpstreamError>> {
            assert_eq!((folder, name), ("/hono-api", "MASTER_ENCRYPTION_KEY"));
            let answer = self.0.clone().map(|value| value.map(|text| SecretValue::new(text.to_owned())));
            Box::pin(std::future::ready(answer))
        }
        fn health(&self) -> Health {
            unreachable!("not asked")
        }
    }

    fn private_file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text).unwrap();
        file
    }

    fn source(text: &str) -> KeySource {
        text.parse().unwrap()
    }

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
    }

    #[test]
    fn a_weak_key_is_refused() {
        for (text, reason) in [
            (String::new(), WeakKey::Empty),
            ("hunter2!".to_owned(), WeakKey::Malformed),
            (HEX[..62].to_owned(), WeakKey::Malformed),
            (hex::encode([0; 16]), WeakKey::Length(24)),
            (BASE64_STANDARD.encode([7; 33]), WeakKey::Length(33)),
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

    #[test]
    fn a_source_is_written_as_it_is_read_and_an_unknown_kind_lists_the_known() {
        for text in ["infisical:/hono-api/MASTER_ENCRYPTION_KEY", "infisical:/KEY", "file:/etc/key", "env:KEY"] {
            assert_eq!(source(text).to_string(), text);
        }
        for text in ["passphrase:x", "", "file", "file:", "env:A=B", "infisical:KEY", "infisical:/folder/", HEX] {
            let error = text.parse::<KeySource>().unwrap_err().to_string();
            assert!(error.contains("infisical:/FOLDER/NAME") && error.contains("env:NAME"), "{error}");
            assert!(!error.contains(HEX));
        }
        assert!(serde_json::from_str::<KeySource>("\"vault:x\"").is_err());
    }

    #[tokio::test]
    async fn every_source_that_answers_adds_its_keys_in_order() {
        let second = "ab86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        let file = private_file(&format!("# newest first\n\n{second}\n{HEX}\n"));
        let sources = [
            source("infisical:/hono-api/MASTER_ENCRYPTION_KEY"),
            KeySource::File(file.path().into()),
            source("file:/nowhere/at/all"),
            source("env:SECRETIER_TEST_UNSET"),
        ];
        let (ring, reports) = load(&sources, Some(&Vault(Ok(Some(HEX))))).await.unwrap();
        let ids = [HEX, second].map(|text| MasterKey::parse(text).unwrap().id());
        assert_eq!(ring.ids().collect::<Vec<_>>(), ids);
        assert_eq!(reports[1].outcome, SourceOutcome::Gave(vec![ids[1], ids[0]]));
        assert!(matches!(&reports[2].outcome, SourceOutcome::Silent(_)));
        assert!(matches!(&reports[3].outcome, SourceOutcome::Silent(_)));
    }

    #[tokio::test]
    async fn an_upstream_that_gives_no_key_is_reported_and_passed_over() {
        let sources = [source("infisical:/hono-api/MASTER_ENCRYPTION_KEY")];
        for answer in [Ok(None), Err(UpstreamError::Denied), Err(UpstreamError::TimedOut)] {
            let (ring, reports) = load(&sources, Some(&Vault(answer))).await.unwrap();
            assert!(ring.is_empty());
            assert!(matches!(&reports[0].outcome, SourceOutcome::Silent(_)));
        }
        let (_, reports) = load(&sources, None).await.unwrap();
        assert_eq!(reports[0].outcome, SourceOutcome::Silent("[infisical] is not configured".to_owned()));
    }

    #[tokio::test]
    async fn a_wrong_key_stops_the_start_and_names_its_source() {
        let file = private_file(&HEX[..40]);
        let sources = [KeySource::File(file.path().into())];
        let error = load(&sources, None).await.unwrap_err().to_string();
        assert!(error.contains(&file.path().display().to_string()) && !error.contains(&HEX[..8]), "{error}");
        let sources = [source("infisical:/hono-api/MASTER_ENCRYPTION_KEY")];
        assert!(load(&sources, Some(&Vault(Ok(Some("short"))))).await.is_err());
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_file_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let file = private_file(HEX);
        for mode in [0o640, 0o604, 0o620] {
            std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            let error = load(&[KeySource::File(file.path().into())], None).await.unwrap_err();
            assert!(error.to_string().contains(&format!("chmod 600 {}", file.path().display())), "{error}");
        }
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o400)).unwrap();
        assert!(load(&[KeySource::File(file.path().into())], None).await.is_ok());
    }
}
