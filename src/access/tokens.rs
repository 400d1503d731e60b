//! Bearer tokens: their form, the hash that is stored of them, and the rights that they give.

use std::{
    fmt,
    str::FromStr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use globset::GlobMatcher;
use http::HeaderValue;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use siphasher::sip128::SipHasher24;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::{
    Refused,
    logins::{Logins, PresentedLogin},
};
use crate::{
    budget::Holds,
    clock::Timestamp,
    legible,
    policy::{InvalidGlob, TenantGlob, glob},
    tenant::shared_folder,
    tiers::database::TokenRow,
};

/// An action that a token may allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Read secrets, list keys, refresh a snapshot.
    Read,
    /// Write and delete secrets.
    Write,
    /// Rotate secrets, and decide how a rotation goes on.
    Rotate,
    /// Actions on the instance rather than on one secret.
    Admin,
}

impl Action {
    /// Every action.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Rotate, Self::Admin];

    /// The word used on the command line and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Rotate => "rotate",
            Self::Admin => "admin",
        }
    }
}

impl FromStr for Action {
    type Err = InvalidToken;

    fn from_str(word: &str) -> Result<Self, InvalidToken> {
        Self::ALL
            .into_iter()
            .find(|action| action.as_str() == word)
            .ok_or_else(|| InvalidToken::Action(word.to_owned()))
    }
}

/// Why a token cannot be made, or a stored one not read.
#[derive(Debug, thiserror::Error)]
pub enum InvalidToken {
    /// No name, or one that is too long.
    #[error("a token needs a name of 1 to 100 characters, all of which can be seen")]
    Name,
    /// A word that is not an action.
    #[error("{0:?} is no action; the actions are read, write, rotate, admin")]
    Action(String),
    /// No actions at all.
    #[error("a token needs at least one action: read, write, rotate, admin")]
    NoAction,
    /// An invalid pattern of tenants or keys.
    #[error(transparent)]
    Glob(#[from] InvalidGlob),
}

/// A token's text: `st_<id>_<secret>`, 256 random bits behind a public id. Shown once.
pub struct Token(Zeroizing<String>);

const PREFIX: &str = "st_";
const ID_LEN: usize = 16;
const SECRET_LEN: usize = 43;

/// The client id and the client secret of a token, for clients that log in with them (Infisical's
/// universal auth). They are the two halves of the token in another form, so they are stored, sealed,
/// rotated and revoked as the token is.
pub struct ClientCredentials {
    /// A UUID, made from the public part.
    pub client_id: String,
    /// The secret part, without which the id is of no use.
    pub client_secret: Zeroizing<String>,
}

impl ClientCredentials {
    /// The credentials of the token with this text; `None` where it has not the form of one.
    #[must_use]
    pub fn of(token: &str) -> Option<Self> {
        let text = PresentedToken::parse(token.as_bytes())?;
        let client_secret = token.get(PREFIX.len() + ID_LEN + 1..)?;
        Some(Self { client_id: client_id(text.id)?, client_secret: Zeroizing::new(client_secret.to_owned()) })
    }

    /// The token that these are the halves of; `None` where they cannot be.
    pub(super) fn token(client_id: &str, client_secret: &str) -> Option<Zeroizing<String>> {
        let id = token_id(client_id)?;
        let token = Zeroizing::new(format!("{PREFIX}{id}_{client_secret}"));
        PresentedToken::parse(token.as_bytes()).map(drop)?;
        Some(token)
    }
}

impl fmt::Debug for ClientCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCredentials").field("client_id", &self.client_id).finish_non_exhaustive()
    }
}

/// The client id of the token with this id: its eight bytes, around eight that follow from them. The
/// form is that of a random UUID (RFC 9562, version 4), which every client takes.
#[must_use]
pub fn client_id(token_id: &str) -> Option<String> {
    let mut id = [0; ID_LEN / 2];
    hex::decode_to_slice(token_id, &mut id).ok()?;
    let filling = Sha256::new_with_prefix(b"secretier client id v1").chain_update(id).finalize();
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&id[..4]);
    bytes[4..12].copy_from_slice(&filling[..8]);
    bytes[12..].copy_from_slice(&id[4..]);
    Some(uuid::Builder::from_random_bytes(bytes).into_uuid().to_string())
}

/// The id of the token with this client id.
pub(super) fn token_id(client: &str) -> Option<String> {
    let bytes = *uuid::Uuid::parse_str(client).ok()?.as_bytes();
    let id = hex::encode([&bytes[..4], &bytes[12..]].concat());
    let is_ours = client_id(&id).is_some_and(|ours| ours.eq_ignore_ascii_case(client));
    is_ours.then_some(id)
}

impl Token {
    /// The text. A reviewer should look at every use of it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The text as a line of a file, with a line break at its end.
    #[must_use]
    pub fn line(&self) -> Zeroizing<String> {
        Zeroizing::new(format!("{}\n", self.expose()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(redacted)")
    }
}

/// The description of a token to be made.
#[derive(Debug, Clone)]
pub struct NewToken {
    /// Its name, for people; unique.
    pub name: String,
    /// The tenants it reaches, as globs, and the shared folders, as globs that begin with `/`.
    pub tenants: Vec<String>,
    /// The secret keys it reaches there, as globs.
    pub keys: Vec<String>,
    /// The actions that it may do there.
    pub actions: Vec<Action>,
    /// How long it is valid; if not set, for ever.
    pub lifetime: Option<Duration>,
}

impl NewToken {
    /// Draws the token: its text, and the row to store, which holds a hash of it only.
    ///
    /// A plain SHA-256 is enough: with 256 random bits there is nothing to guess.
    ///
    /// # Errors
    /// An invalid name, pattern or list of actions.
    pub fn draw(self, now: Timestamp) -> Result<(Token, TokenRow), InvalidToken> {
        // Tokens with such a name that were made earlier stay valid.
        if self.name.contains(legible::is_unfit) {
            return Err(InvalidToken::Name);
        }
        let id = hex::encode(rand::random::<[u8; ID_LEN / 2]>());
        let secret = Zeroizing::new(rand::random::<[u8; 32]>());
        let secret = Zeroizing::new(URL_SAFE_NO_PAD.encode(secret.as_slice()));
        let text = Zeroizing::new(format!("{PREFIX}{id}_{}", secret.as_str()));
        let row = TokenRow {
            id,
            name: self.name,
            hash: Sha256::digest(text.as_bytes()).into(),
            tenants: self.tenants,
            keys: self.keys,
            actions: self.actions.into_iter().map(|action| action.as_str().to_owned()).collect(),
            expires_at: self.lifetime.map(|lifetime| now.plus(lifetime)),
            created_at: now,
            revoked_at: None,
            last_used_at: None,
            replaced_by: None,
        };
        Grant::from_row(row.clone(), Arc::default())?;
        Ok((Token(text), row))
    }
}

/// The rights of a valid token.
pub struct Grant {
    /// The public part of the token.
    pub id: String,
    /// Its name, for people.
    pub name: String,
    hash: [u8; 32],
    /// The mark of the token, once the token was found valid.
    mark: OnceLock<u128>,
    tenants: TenantGlobs,
    keys: KeyGlobs,
    actions: Vec<Action>,
    expires_at: Option<Timestamp>,
    lasting: Arc<Lasting>,
}

/// A valid token as it is kept for a start without the database: its content admits nobody.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptToken {
    pub(super) id: String,
    name: String,
    /// The hash of the whole token, in hex.
    hash: String,
    tenants: Vec<String>,
    keys: Vec<String>,
    actions: Vec<String>,
    /// In milliseconds since 1970.
    expires_at: Option<i64>,
}

impl KeptToken {
    pub(super) fn of(grant: &Grant) -> Self {
        Self {
            id: grant.id.clone(),
            name: grant.name.clone(),
            hash: hex::encode(grant.hash),
            tenants: grant.tenants().map(str::to_owned).collect(),
            keys: grant.keys().map(str::to_owned).collect(),
            actions: grant.actions.iter().map(|action| action.as_str().to_owned()).collect(),
            expires_at: grant.expires_at.map(Timestamp::as_millis),
        }
    }

    /// The row that it was made from; `None` where its hash is malformed.
    pub(super) fn into_row(self) -> Option<TokenRow> {
        let mut hash = [0; 32];
        hex::decode_to_slice(&self.hash, &mut hash).ok()?;
        Some(TokenRow {
            id: self.id,
            name: self.name,
            hash,
            tenants: self.tenants,
            keys: self.keys,
            actions: self.actions,
            expires_at: self.expires_at.map(Timestamp::from_millis),
            // Not needed to authorise a request.
            created_at: Timestamp::from_millis(0),
            revoked_at: None,
            last_used_at: None,
            replaced_by: None,
        })
    }
}

impl fmt::Debug for KeptToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeptToken").field("id", &self.id).field("name", &self.name).finish_non_exhaustive()
    }
}

/// A token's state that lasts as long as the token, however often its row is read again.
#[derive(Debug, Default)]
pub(super) struct Lasting {
    pub(super) last_use: LastUse,
    holds: Holds,
}

/// When a token was last used, as far as this instance knows.
#[derive(Debug, Default)]
pub(super) struct LastUse {
    /// Milliseconds since 1970; 0 where it was never used.
    at: AtomicI64,
    /// The last use that the database was told.
    told: AtomicI64,
}

impl LastUse {
    /// The precision in milliseconds. Nobody needs a better one, and a store at every request would
    /// make the cores that answer wait for each other.
    const EVERY: u64 = 1000;

    fn note(&self, now: Timestamp) {
        // Also where the clock was set back: the record is of the wall clock.
        if now.as_millis().abs_diff(self.at.load(Ordering::Relaxed)) >= Self::EVERY {
            self.at.store(now.as_millis(), Ordering::Relaxed);
        }
    }

    /// The last use, where the database was not told it yet.
    pub(super) fn untold(&self) -> Option<Timestamp> {
        let at = self.at.load(Ordering::Relaxed);
        (at != self.told.load(Ordering::Relaxed)).then(|| Timestamp::from_millis(at))
    }

    /// Notes that the database was told of the use at this time.
    pub(super) fn told(&self, at: Timestamp) {
        self.told.store(at.as_millis(), Ordering::Relaxed);
    }
}

/// The tenants that a token reaches, and the shared folders.
struct TenantGlobs {
    patterns: Vec<TenantGlob>,
    /// Whether `*` is among them, so that no pattern is tried for a company.
    every: bool,
}

impl TenantGlobs {
    fn build(patterns: &[String]) -> Result<Self, InvalidGlob> {
        let every = patterns.iter().any(|pattern| pattern == "*");
        let patterns = patterns.iter().map(|pattern| TenantGlob::new("tenants", pattern)).collect::<Result<_, _>>()?;
        Ok(Self { patterns, every })
    }

    fn reach(&self, tenant: &str) -> bool {
        (self.every && shared_folder(tenant).is_none()) || self.patterns.iter().any(|pattern| pattern.is_match(tenant))
    }

    fn as_written(&self) -> impl Iterator<Item = &str> {
        self.patterns.iter().map(TenantGlob::as_written)
    }
}

/// The keys that a token reaches.
struct KeyGlobs {
    patterns: Vec<GlobMatcher>,
    /// Whether `*` is among them, so that no pattern is tried.
    every: bool,
}

impl KeyGlobs {
    fn build(patterns: &[String]) -> Result<Self, InvalidGlob> {
        let every = patterns.iter().any(|pattern| pattern == "*");
        let patterns = patterns.iter().map(|pattern| glob("keys", pattern)).collect::<Result<_, _>>()?;
        Ok(Self { patterns, every })
    }

    fn reach(&self, key: &str) -> bool {
        self.every || self.patterns.iter().any(|pattern| pattern.is_match(key))
    }

    fn as_written(&self) -> impl Iterator<Item = &str> {
        self.patterns.iter().map(|pattern| pattern.glob().glob())
    }
}

impl Grant {
    pub(super) fn from_row(row: TokenRow, lasting: Arc<Lasting>) -> Result<Self, InvalidToken> {
        if !(1..=100).contains(&row.name.chars().count()) {
            return Err(InvalidToken::Name);
        }
        if row.actions.is_empty() {
            return Err(InvalidToken::NoAction);
        }
        let actions = row.actions.iter().map(|word| word.parse()).collect::<Result<_, _>>()?;
        Ok(Self {
            tenants: TenantGlobs::build(&row.tenants)?,
            keys: KeyGlobs::build(&row.keys)?,
            id: row.id,
            name: row.name,
            hash: row.hash,
            mark: OnceLock::new(),
            actions,
            expires_at: row.expires_at,
            lasting,
        })
    }

    /// Whether it is the grant of the same token, with the same scope.
    pub(super) fn is_as(&self, other: &Self) -> bool {
        self.hash == other.hash
            && self.tenants().eq(other.tenants())
            && self.keys().eq(other.keys())
            && self.actions == other.actions
    }

    /// Whether a row allows the same as this grant, or ends sooner.
    pub(super) fn is_of(&self, row: &TokenRow) -> bool {
        let ends_sooner = match (self.expires_at, row.expires_at) {
            (Some(ends), Some(end)) => end <= ends,
            (None, _) => true,
            (Some(_), None) => false,
        };
        let actions = self.actions.iter().map(|action| action.as_str());
        self.hash == row.hash
            && ends_sooner
            && self.tenants().eq(row.tenants.iter().map(String::as_str))
            && self.keys().eq(row.keys.iter().map(String::as_str))
            && actions.eq(row.actions.iter().map(String::as_str))
    }

    /// The amounts that requests with this token hold at once.
    #[must_use]
    pub fn holds(&self) -> &Holds {
        &self.lasting.holds
    }

    /// Whether the token reaches this tenant, or this shared folder.
    #[must_use]
    pub fn reaches(&self, tenant: &str) -> bool {
        self.tenants.reach(tenant)
    }

    /// Whether the token reaches this key, in the tenants that it reaches.
    #[must_use]
    pub fn reaches_key(&self, key: &str) -> bool {
        self.keys.reach(key)
    }

    /// Whether the token reaches every key.
    #[must_use]
    pub fn reaches_every_key(&self) -> bool {
        self.keys.every
    }

    /// Allows an action on one secret.
    ///
    /// # Errors
    /// [`Refused::OutOfScope`].
    pub fn allow(&self, action: Action, tenant: &str, key: &str) -> Result<(), Refused> {
        self.allow_tenant(action, tenant)?;
        if self.reaches_key(key) { Ok(()) } else { Err(Refused::OutOfScope) }
    }

    /// Allows an action on a tenant; its keys are checked one by one.
    ///
    /// # Errors
    /// [`Refused::OutOfScope`].
    pub fn allow_tenant(&self, action: Action, tenant: &str) -> Result<(), Refused> {
        self.allow_action(action)?;
        if self.reaches(tenant) { Ok(()) } else { Err(Refused::OutOfScope) }
    }

    /// Counts as a use, unless the token has expired.
    fn used(&self, now: Timestamp) -> Result<(), Refused> {
        if self.expires_at.is_some_and(|end| now >= end) {
            return Err(Refused::Expired);
        }
        self.lasting.last_use.note(now);
        Ok(())
    }

    /// Whether it reaches everything in this tenant and this key, where `None` stands for all.
    /// All tenants do not include shared folders.
    #[must_use]
    pub fn reaches_all(&self, tenant: Option<&str>, key: Option<&str>) -> bool {
        tenant.map_or(self.tenants.every, |tenant| self.reaches(tenant))
            && key.map_or(self.keys.every, |key| self.reaches_key(key))
    }

    /// Whether the token reaches every shared folder.
    #[must_use]
    pub fn reaches_every_folder(&self) -> bool {
        self.tenants().any(|pattern| pattern == "/*")
    }

    /// Allows an action; its tenants are checked one by one.
    ///
    /// # Errors
    /// [`Refused::OutOfScope`].
    pub fn allow_action(&self, action: Action) -> Result<(), Refused> {
        if self.actions.contains(&action) { Ok(()) } else { Err(Refused::OutOfScope) }
    }

    /// The tenants that the token reaches, as globs, and the shared folders, as globs that begin with `/`.
    pub fn tenants(&self) -> impl Iterator<Item = &str> {
        self.tenants.as_written()
    }

    /// The keys that the token reaches, as globs.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys.as_written()
    }

    /// The actions that the token allows.
    #[must_use]
    pub fn actions(&self) -> &[Action] {
        &self.actions
    }

    /// When the token expires, if it does.
    #[must_use]
    pub fn expires_at(&self) -> Option<Timestamp> {
        self.expires_at
    }
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant").field("id", &self.id).field("name", &self.name).finish_non_exhaustive()
    }
}

/// Marks tokens with SipHash-2-4 under a key of this process: 128 bits tell whether a token is the
/// one that opened a grant before, without hashing it with SHA-256 again.
///
/// SipHash is made for this: without the key, a second text with the same mark can be found only
/// by trying, 1 in 2^128 each time, and neither key nor marks ever leave the
/// process. A mark is no copy of the token, and of no use to another process.
pub(super) struct Marker(SipHasher24);

impl Marker {
    pub(super) fn new() -> Self {
        Self(SipHasher24::new_with_key(&rand::random()))
    }

    fn mark(&self, text: &[u8]) -> u128 {
        self.0.hash(text).as_u128()
    }
}

/// What a request presents in its `Authorization` header: a token, or an access token that a login
/// gave for one.
pub(super) enum Presented<'a> {
    Token(PresentedToken<'a>),
    Login(Box<PresentedLogin<'a>>),
}

/// A token as a request presents it.
pub(super) struct PresentedToken<'a> {
    text: &'a [u8],
    id: &'a str,
}

/// Extracts the token from an `Authorization` header.
pub(super) fn presented(header: &HeaderValue) -> Result<Presented<'_>, Refused> {
    let header = header.as_bytes();
    let token = match header.split_first_chunk::<7>() {
        // The usual spelling.
        Some((b"Bearer ", token)) => token,
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => token,
        _ => return Err(Refused::Missing),
    };
    let token = token.trim_ascii();
    match PresentedToken::parse(token) {
        Some(token) => Ok(Presented::Token(token)),
        None => PresentedLogin::parse(token).map(|login| Presented::Login(Box::new(login))).ok_or(Refused::Invalid),
    }
}

impl Presented<'_> {
    /// The public part of the token, of the one that was logged in with too.
    pub(super) fn id(&self) -> &str {
        match self {
            Self::Token(token) => token.id,
            Self::Login(login) => login.token_id(),
        }
    }

    /// Whether it can be checked with what is known here: the key that an access token says it is
    /// signed with may have been made a moment ago.
    pub(super) fn can_be_checked(&self, logins: &ArcSwap<Logins>) -> bool {
        match self {
            Self::Token(_) => true,
            Self::Login(login) => logins.load().knows(login),
        }
    }

    /// Whether it says that it was signed with a key of ours that does not open just now.
    pub(super) fn awaits_its_key(&self, logins: &ArcSwap<Logins>) -> bool {
        match self {
            Self::Token(_) => false,
            Self::Login(login) => logins.load().awaits_key_of(login),
        }
    }

    /// Takes as long as a check that fails: the time of an answer must not reveal which ids
    /// exist.
    pub(super) fn opens_nothing(&self, marker: &Marker) {
        match self {
            Self::Token(token) => token.opens_nothing(marker),
            Self::Login(login) => login.opens_nothing(),
        }
    }

    /// Checks the secret part, in constant time, before the expiry: a caller without
    /// the token learns nothing about it. A token that opens counts as used.
    pub(super) fn opens(
        &self,
        grant: &Grant,
        marker: &Marker,
        logins: &ArcSwap<Logins>,
        now: Timestamp,
    ) -> Result<(), Refused> {
        match self {
            Self::Token(token) => token.opens(grant, marker)?,
            Self::Login(login) => logins.load().check(login, now)?,
        }
        grant.used(now)
    }
}

impl<'a> PresentedToken<'a> {
    /// Reads a text of a token's form.
    pub(super) fn parse(text: &'a [u8]) -> Option<Self> {
        let id = std::str::from_utf8(text.get(PREFIX.len()..PREFIX.len() + ID_LEN)?).ok()?;
        let has_form = text.len() == PREFIX.len() + ID_LEN + 1 + SECRET_LEN
            && text.is_ascii()
            && text.starts_with(PREFIX.as_bytes())
            && text[PREFIX.len() + ID_LEN] == b'_';
        has_form.then_some(Self { text, id })
    }

    /// As in [`Presented::opens_nothing`].
    fn opens_nothing(&self, marker: &Marker) {
        std::hint::black_box((marker.mark(self.text), Sha256::digest(self.text)));
    }

    /// Checks the secret part, in constant time.
    fn opens(&self, grant: &Grant, marker: &Marker) -> Result<(), Refused> {
        let mark = marker.mark(self.text);
        if grant.mark.get().is_some_and(|opened| opened.ct_eq(&mark).into()) {
            return Ok(());
        }
        let hash: [u8; 32] = Sha256::digest(self.text).into();
        if !bool::from(hash.ct_eq(&grant.hash)) {
            return Err(Refused::Invalid);
        }
        // If another request has set it meanwhile, it is the same.
        let _ = grant.mark.set(mark);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_000_000);

    fn made(tenants: &[&str], actions: &[Action], lifetime: Option<Duration>) -> (Token, Arc<Grant>) {
        made_for(tenants, &["*"], actions, lifetime)
    }

    fn made_for(
        tenants: &[&str],
        keys: &[&str],
        actions: &[Action],
        lifetime: Option<Duration>,
    ) -> (Token, Arc<Grant>) {
        let owned = |patterns: &[&str]| patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        let (tenants, keys, actions) = (owned(tenants), owned(keys), actions.to_vec());
        let new = NewToken { name: "api".to_owned(), tenants, keys, actions, lifetime };
        let (token, row) = new.draw(NOW).unwrap();
        (token, Arc::new(Grant::from_row(row, Arc::default()).unwrap()))
    }

    fn header(token: &str) -> HeaderValue {
        HeaderValue::from_str(&format!("Bearer {token}")).unwrap()
    }

    #[test]
    fn a_token_opens_its_own_grant_only_until_it_expires() {
        let marker = Marker::new();
        let (token, grant) = made(&["*"], &[Action::Read], Some(Duration::from_secs(60)));
        let header = header(token.expose());
        let (presented, logins) = (presented(&header).unwrap(), ArcSwap::default());
        assert_eq!(presented.id(), grant.id);
        assert_eq!(presented.opens(&grant, &marker, &logins, NOW), Ok(()));
        let end = NOW.plus(Duration::from_secs(60));
        assert_eq!(presented.opens(&grant, &marker, &logins, end).err(), Some(Refused::Expired));
        let (_, other) = made(&["*"], &[Action::Read], None);
        assert_eq!(presented.opens(&other, &marker, &logins, NOW).err(), Some(Refused::Invalid));
        assert!(!format!("{token:?}{grant:?}").contains(&token.expose()[20..]));
    }

    #[test]
    fn a_token_that_has_opened_is_known_by_its_mark_and_no_other_is() {
        let marker = Marker::new();
        let (token, grant) = made(&["*"], &[Action::Read], Some(Duration::from_secs(60)));
        let right = header(token.expose());
        let right = presented(&right).unwrap();
        // The same id, and a secret that differs in one character at its end or its beginning.
        let text = token.expose();
        let changed = |at: usize| {
            let other = if &text[at..=at] == "A" { "B" } else { "A" };
            header(&[&text[..at], other, &text[at + 1..]].concat())
        };
        let wrong = [changed(text.len() - 1), changed(PREFIX.len() + ID_LEN + 1)];
        let open = |header: &HeaderValue| presented(header).unwrap().opens(&grant, &marker, &ArcSwap::default(), NOW);
        let is_refused = || wrong.iter().all(|wrong| open(wrong) == Err(Refused::Invalid));
        assert!(is_refused() && grant.mark.get().is_none(), "who does not open it leaves no mark");
        assert_eq!(right.opens(&grant, &marker, &ArcSwap::default(), NOW), Ok(()));
        assert_eq!(grant.mark.get(), Some(&marker.mark(text.as_bytes())));
        assert!(is_refused(), "nor is it let in by the mark of the right one");
        assert_eq!(right.opens(&grant, &marker, &ArcSwap::default(), NOW), Ok(()), "now by its mark");
        let end = NOW.plus(Duration::from_secs(60));
        assert_eq!(right.opens(&grant, &marker, &ArcSwap::default(), end), Err(Refused::Expired), "known or not");
        assert_ne!(Marker::new().mark(text.as_bytes()), marker.mark(text.as_bytes()), "another process, another mark");
    }

    #[test]
    fn the_last_use_is_the_last_time_that_the_token_opened_and_is_told_once() {
        let marker = Marker::new();
        let (token, grant) = made(&["*"], &[Action::Read], Some(Duration::from_secs(60)));
        let (wrong, _) = made(&["*"], &[Action::Read], None);
        assert_eq!(grant.lasting.last_use.untold(), None);
        let (good, bad) = (header(token.expose()), header(wrong.expose()));
        let (good, bad) = (presented(&good).unwrap(), presented(&bad).unwrap());
        assert!(
            bad.opens(&grant, &marker, &ArcSwap::default(), NOW).is_err()
                && good.opens(&grant, &marker, &ArcSwap::default(), NOW.plus(Duration::from_secs(60))).is_err()
        );
        assert_eq!(grant.lasting.last_use.untold(), None, "neither was let in");
        good.opens(&grant, &marker, &ArcSwap::default(), NOW).unwrap();
        assert_eq!(grant.lasting.last_use.untold(), Some(NOW));
        let later = NOW.plus(Duration::from_secs(5));
        good.opens(&grant, &marker, &ArcSwap::default(), later).unwrap();
        grant.lasting.last_use.told(NOW);
        assert_eq!(grant.lasting.last_use.untold(), Some(later), "used again while the database was told");
        grant.lasting.last_use.told(later);
        assert_eq!(grant.lasting.last_use.untold(), None);
    }

    #[test]
    fn whatever_else_a_header_holds_is_refused() {
        let (token, _) = made(&["*"], &[Action::Read], None);
        let text = token.expose();
        for wrong in [&text[..text.len() - 1], &format!("{text}x"), "", "st_", &"ä".repeat(31)] {
            let header = HeaderValue::from_bytes(format!("Bearer {wrong}").as_bytes()).unwrap();
            assert_eq!(presented(&header).err(), Some(Refused::Invalid), "{wrong}");
        }
        assert_eq!(presented(&HeaderValue::from_static("Basic abc")).err(), Some(Refused::Missing));
        assert_eq!(presented(&HeaderValue::from_static("Bearer")).err(), Some(Refused::Missing));
    }

    #[test]
    fn a_grant_reaches_its_tenants_keys_and_actions_and_no_others() {
        let (_, grant) = made_for(&["acme*", "globex"], &["STRIPE_*", "db/*"], &[Action::Read], None);
        for (tenant, key) in [("acme-1", "STRIPE_A"), ("globex", "STRIPE_"), ("acme", "db/a/b")] {
            assert_eq!(grant.allow(Action::Read, tenant, key), Ok(()), "{tenant} {key}");
        }
        for (action, tenant, key) in [
            (Action::Read, "globex2", "STRIPE_A"),
            (Action::Read, "initech", "STRIPE_A"),
            (Action::Write, "acme", "STRIPE_A"),
            (Action::Read, "acme", "stripe_A"),
            (Action::Read, "acme", "A_STRIPE_A"),
            (Action::Read, "acme", "*"),
        ] {
            assert_eq!(grant.allow(action, tenant, key), Err(Refused::OutOfScope), "{action:?} {tenant} {key}");
        }
        assert!(grant.allow_tenant(Action::Read, "acme").is_ok() && !grant.reaches_every_key());
        assert_eq!(grant.keys().collect::<Vec<_>>(), ["STRIPE_*", "db/*"]);
        assert!(made(&["acme"], &[Action::Read], None).1.reaches_every_key());
    }

    #[test]
    fn a_tokens_halves_make_the_token_and_no_other_client_id_does() {
        let (token, grant) = made(&["*"], &[Action::Read], None);
        let halves = ClientCredentials::of(token.expose()).unwrap();
        assert_eq!(uuid::Uuid::parse_str(&halves.client_id).unwrap().get_version_num(), 4);
        assert_eq!(token_id(&halves.client_id).as_deref(), Some(grant.id.as_str()));
        let again = ClientCredentials::token(&halves.client_id, &halves.client_secret).unwrap();
        assert_eq!(again.as_str(), token.expose());
        assert!(!format!("{halves:?}").contains(halves.client_secret.as_str()));
        let other = uuid::Uuid::new_v4().to_string();
        for (id, secret) in [
            (other.as_str(), halves.client_secret.as_str()),
            (halves.client_id.as_str(), "short"),
            ("", halves.client_secret.as_str()),
            (grant.id.as_str(), halves.client_secret.as_str()),
        ] {
            assert!(ClientCredentials::token(id, secret).is_none(), "{id}");
        }
        assert!(ClientCredentials::of("st_x").is_none());
    }
}
