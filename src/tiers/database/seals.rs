//! Seals of tokens' rows. A seal cannot be made by write access to the database alone; it takes a
//! master key.
//!
//! A seal is `a1.<master key id>.<HMAC>.<limits>`: it covers all columns of a row except its last
//! use, under a key that is derived from the master key for this purpose alone. Its limits are when
//! the token ends, when it was revoked and what replaced it, as of the sealing. A row may allow
//! less than its seal: an older version of this program, which knows no seals, revokes and rotates
//! like any other, and its row is then revoked, or ends sooner, whatever the seal says. A row that
//! allows more is refused.
//!
//! An attacker could put back a row together with its seal, from before the token was revoked. So
//! the register, one row in `settings`, names the seal of every sealed token, is sealed itself, and
//! is written anew by every change of a token, in the same transaction. A row whose seal is not the
//! one that the register names is refused alone; so is a row whose seal was taken away.
//!
//! The register also names the ids that tenants had before they were shredded. Rows and data keys
//! are bound to the id: copies of them that are put back do not open.
//!
//! The register counts its changes. A running instance that reads a register older than the last
//! one it knows admits no token that it had not admitted already (see `Access::reload`). If tokens
//! and register are put back together while no instance runs, `audit verify` finds that by the
//! record of the last change of a token: see `cli/audit.rs`.
//!
//! Seals are introduced in two steps, for the sake of existing rows and older instances: a token
//! without a seal is admitted, and counted, until `keys seal` has sealed every row and says so in
//! the register ([`Register::sealed_at`]). Without a master key nothing is sealed, and nothing is
//! checked.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{PoisonError, atomic::Ordering},
};

use diesel::{ExpressionMethods as _, QueryDsl as _};
use serde::{Deserialize, Serialize};

use super::{
    Database, JobLock,
    calls::Call,
    error::StoreError,
    instances,
    rows::BACKGROUND_TIMEOUTS,
    schema::{access_tokens, settings},
    tokens::{Row, TokenRow},
};
use crate::{
    clock::Timestamp,
    sealing::{DerivedKey, KeyPurpose, KeyRing, MasterKey, MasterKeyId, SealError},
};

const REGISTER: &str = "token_register";
const SEAL_FORMAT: &str = "a1";
const REGISTER_FORMAT: &str = "r1";

/// The number of hexadecimal digits of a seal's HMAC that name it in the register: 128 bits.
const NAMED_BY: usize = 32;

/// The register: the seal of every sealed token.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Register {
    /// Counts its changes.
    number: u64,
    /// When it was last changed, in milliseconds since 1970; never earlier than before.
    changed_at: i64,
    /// Since when every row has a seal; from then on a row without one is refused.
    sealed_at: Option<i64>,
    /// The beginning of each token's seal, by the token's id.
    tokens: BTreeMap<String, String>,
    /// The ids that tenants had before they were shredded: rows that are put back under one of them
    /// do not open.
    #[serde(default)]
    destroyed: BTreeSet<String>,
}

/// The register, as it was read.
enum Found {
    /// Nothing was ever sealed here.
    Absent,
    /// It is as a process with a master key left it.
    Sound(Register),
    /// It is missing, or not as it was left.
    Broken(Distrust),
}

/// Why a row is not trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distrust {
    /// It has no seal, though every row was sealed.
    Unsealed,
    /// It had a seal, which is gone.
    Stripped,
    /// Its seal is not a valid seal.
    Malformed,
    /// It differs from the sealed row.
    Changed,
    /// It allows more than the sealed row.
    Widened,
    /// It was changed after this state, which was put back.
    Outdated,
    /// It was deleted, and was put back.
    Removed,
    /// It is sealed with a master key that is not available.
    UnknownKey(MasterKeyId),
    /// The register of the tokens is missing, or not as it was left.
    Register,
    /// Seals are required, and no master key is known to check them with.
    Keyless,
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unsealed => "it has no seal, though every row was sealed; an older version made it, or somebody else",
            Self::Stripped => "its seal was taken away",
            Self::Malformed => "its seal is malformed",
            Self::Changed => "it was changed by somebody without a master key",
            Self::Widened => "it allows more than it did when it was sealed",
            Self::Outdated => "an earlier state of it was put back",
            Self::Removed => "it had been removed, and was put back",
            Self::Register => "the register of the tokens is gone, or was changed by somebody without a master key",
            Self::Keyless => "keys.require_seals asks for seals, and no master key is known to check them by",
            Self::UnknownKey(id) => {
                return write!(f, "it is sealed with the master key {id}, which is not known; see [keys]");
            }
        })
    }
}

/// How far a database is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealed {
    /// There is no master key here: nothing is sealed or checked.
    Unchecked,
    /// Rows without a seal are admitted: `keys seal` has not been run yet.
    Partly,
    /// Every row has had a seal since then.
    Since(Timestamp),
}

/// The existing tokens, and whether each is trusted.
#[derive(Debug, Clone)]
pub struct KnownTokens {
    /// Every trusted token, revoked and expired ones too, oldest first.
    pub tokens: Vec<TokenRow>,
    /// Tokens whose rows are refused, and why.
    pub refused: Vec<(TokenRow, Distrust)>,
    /// The number of trusted, unrevoked tokens without a seal.
    pub unsealed: usize,
    /// How far seals go.
    pub sealed: Sealed,
    /// When a token was last changed; `None` where that is not sealed.
    pub changed_at: Option<Timestamp>,
    /// Whether this process knows of later changes that are missing here.
    pub is_set_back: bool,
}

/// The keys that make and open seals.
struct Sealer<'d> {
    environment: &'d str,
    keys: Vec<DerivedKey>,
}

impl<'d> Sealer<'d> {
    fn new(ring: &KeyRing, environment: &'d str) -> Self {
        Self { environment, keys: ring.keys().iter().map(|key| key.derive(KeyPurpose::Seal)).collect() }
    }

    fn key(&self, id: &str) -> Result<&DerivedKey, Distrust> {
        let id: MasterKeyId = id.parse().map_err(|_| Distrust::Malformed)?;
        self.keys.iter().find(|key| key.master_key() == id).ok_or(Distrust::UnknownKey(id))
    }

    /// Splits a text `<format>.<key>.<HMAC>.<body>` into its key, HMAC and body.
    fn split<'t>(&self, format: &str, text: &'t str) -> Result<(&DerivedKey, &'t str, &'t str), Distrust> {
        let mut parts = text.splitn(4, '.');
        let (Some(is), Some(key), Some(tag), Some(body)) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Distrust::Malformed);
        };
        if is != format {
            return Err(Distrust::Malformed);
        }
        Ok((self.key(key)?, tag, body))
    }

    fn open_register(&self, text: Option<&str>) -> Found {
        let Some(text) = text else { return Found::Absent };
        let opened = self.split(REGISTER_FORMAT, text).and_then(|(key, tag, body)| {
            if !is_tag(&key.tag(&self.register_parts(body)), tag) {
                return Err(Distrust::Register);
            }
            serde_json::from_str(body).map_err(|_| Distrust::Register)
        });
        match opened {
            Ok(register) => Found::Sound(register),
            Err(Distrust::UnknownKey(id)) => Found::Broken(Distrust::UnknownKey(id)),
            Err(_) => Found::Broken(Distrust::Register),
        }
    }

    fn seal_register(&self, key: &DerivedKey, register: &Register) -> String {
        let body = serde_json::json!(register).to_string();
        let tag = key.tag(&self.register_parts(&body));
        format!("{REGISTER_FORMAT}.{}.{tag}.{body}", key.master_key())
    }

    fn register_parts<'p>(&'p self, body: &'p str) -> [&'p [u8]; 3] {
        [b"token register", self.environment.as_bytes(), body.as_bytes()]
    }

    /// A row's seal, and the prefix of it that names it in the register.
    fn seal(&self, key: &DerivedKey, row: &TokenRow) -> (String, String) {
        let limits = Limits::of(row).text();
        let tag = self.tag(key, row, &limits);
        let name = tag[..NAMED_BY].to_owned();
        (format!("{SEAL_FORMAT}.{}.{tag}.{limits}", key.master_key()), name)
    }

    fn tag(&self, key: &DerivedKey, row: &TokenRow, limits: &str) -> String {
        let [tenants, keys, actions] =
            [&row.tenants, &row.keys, &row.actions].map(|list| serde_json::json!(list).to_string());
        let created_at = row.created_at.as_millis().to_be_bytes();
        let parts: [&[u8]; 10] = [
            b"token",
            self.environment.as_bytes(),
            row.id.as_bytes(),
            row.name.as_bytes(),
            &row.hash,
            tenants.as_bytes(),
            keys.as_bytes(),
            actions.as_bytes(),
            &created_at,
            limits.as_bytes(),
        ];
        key.tag(&parts).to_string()
    }

    /// Whether a row has a seal; an error where the row is not trusted.
    fn judge(&self, row: &mut TokenRow, seal: Option<&str>, found: &Found, complete: bool) -> Result<bool, Distrust> {
        let named = match found {
            Found::Broken(why) => return Err(*why),
            Found::Absent if complete => return Err(Distrust::Register),
            Found::Absent => None,
            Found::Sound(register) => Some(register.tokens.get(&row.id)),
        };
        let Some(seal) = seal else {
            return match named {
                Some(Some(_)) => Err(Distrust::Stripped),
                Some(None) | None if complete => Err(Distrust::Unsealed),
                Some(None) | None => Ok(false),
            };
        };
        let (key, tag, limits) = match self.split(SEAL_FORMAT, seal) {
            // Refusing it would gain nothing: without its seal it would be admitted.
            Err(Distrust::UnknownKey(_)) if named.is_none() => return Ok(false),
            parts => parts?,
        };
        let sealed: Limits = serde_json::from_str(limits).map_err(|_| Distrust::Malformed)?;
        if !is_tag_text(&self.tag(key, row, limits), tag) {
            return Err(Distrust::Changed);
        }
        match named {
            None => {}
            Some(None) => return Err(Distrust::Removed),
            Some(Some(name)) if tag.get(..NAMED_BY) != Some(name) => return Err(Distrust::Outdated),
            Some(Some(_)) => {}
        }
        sealed.narrow(row)?;
        Ok(true)
    }
}

/// Compared in constant time: with timing, an attacker could find a tag byte by byte.
fn is_tag(tag: &crate::sealing::Tag, hex: &str) -> bool {
    hex::decode(hex).is_ok_and(|bytes| tag.is(&bytes))
}

fn is_tag_text(one: &str, other: &str) -> bool {
    use subtle::ConstantTimeEq as _;
    one.as_bytes().ct_eq(other.as_bytes()).into()
}

/// A token's limits when it was sealed: when it ends, when it was revoked, and what replaced it.
#[derive(Debug, Serialize, Deserialize)]
struct Limits(Option<i64>, Option<i64>, Option<String>);

impl Limits {
    fn of(row: &TokenRow) -> Self {
        let millis = |at: Option<Timestamp>| at.map(Timestamp::as_millis);
        Self(millis(row.expires_at), millis(row.revoked_at), row.replaced_by.clone())
    }

    fn text(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// Lets a row allow less than these limits, but not more.
    fn narrow(self, row: &mut TokenRow) -> Result<(), Distrust> {
        let Self(expires_at, revoked_at, replaced_by) = self;
        let lasts_longer = match (expires_at, row.expires_at.map(Timestamp::as_millis)) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(sealed), Some(says)) => says > sealed,
        };
        let is_other = replaced_by.is_some() && row.replaced_by != replaced_by;
        if lasts_longer || is_other || (revoked_at.is_some() && row.revoked_at.is_none()) {
            return Err(Distrust::Widened);
        }
        Ok(())
    }
}

/// The register, locked for a change of tokens.
pub(super) enum Ledger<'d> {
    /// There is no master key here, or not that of the register. `complete` is the register's own
    /// claim.
    Keyless { complete: bool },
    /// It is as it was left.
    Open(Box<OpenLedger<'d>>),
    /// It is not as it was left, and is left alone.
    Broken(Distrust),
}

pub(super) struct OpenLedger<'d> {
    sealer: Sealer<'d>,
    key: DerivedKey,
    found: Found,
    register: Register,
    complete: bool,
}

impl Ledger<'_> {
    /// Refuses a change that would admit a token where the change could not be sealed, or where its
    /// seal would vouch for somebody else's change.
    pub(super) fn may_let_in(&self) -> Result<(), StoreError> {
        match self {
            Self::Keyless { complete: true } => Err(StoreError::Seals(
                "every token has a seal here, and without a master key none can be made; see [keys]".to_owned(),
            )),
            Self::Keyless { complete: false } | Self::Open(_) => Ok(()),
            Self::Broken(why) => Err(StoreError::Seals(format!(
                "no token is made or rotated: {why}; 'secretier audit verify' tells more, and 'secretier keys seal \
                 --accept-tokens' seals the rows as they are"
            ))),
        }
    }

    /// Refuses to change a row that is not as it was left: a new seal would vouch for it.
    pub(super) async fn check(&self, call: &mut Call<'_>, id: &str) -> Result<(), StoreError> {
        let Self::Open(open) = self else { return Ok(()) };
        let Some((mut row, seal)) = read_row(call, id).await? else { return Ok(()) };
        let judged = open.sealer.judge(&mut row, seal.as_deref(), &open.found, open.complete);
        judged.map(drop).map_err(|why| {
            StoreError::Seals(format!("the token {:?} is refused: {why}; revoke it, and make another", row.name))
        })
    }

    /// Seals a row as it is now.
    pub(super) async fn seal(&mut self, call: &mut Call<'_>, id: &str) -> Result<(), StoreError> {
        let Self::Open(open) = self else { return Ok(()) };
        let Some((row, _)) = read_row(call, id).await? else { return Ok(()) };
        let (seal, name) = open.sealer.seal(&open.key, &row);
        let sealed = diesel::update(access_tokens::table.find(id.to_owned()));
        call.execute(sealed.set(access_tokens::seal.eq(seal))).await?;
        open.register.tokens.insert(id.to_owned(), name);
        Ok(())
    }

    /// Notes that a tenant's id is no longer used.
    pub(super) fn destroy(&mut self, company: &str) {
        if let Self::Open(open) = self {
            open.register.destroyed.insert(company.to_owned());
        }
    }

    /// Forgets a row that is deleted.
    pub(super) fn forget(&mut self, id: &str) {
        if let Self::Open(open) = self {
            open.register.tokens.remove(id);
        }
    }

    /// Writes the register.
    pub(super) async fn keep(self, call: &mut Call<'_>, now: Timestamp) -> Result<(), StoreError> {
        let Self::Open(mut open) = self else { return Ok(()) };
        open.register.number += 1;
        open.register.changed_at = open.register.changed_at.max(now.as_millis());
        let text = open.sealer.seal_register(&open.key, &open.register);
        let keep = diesel::update(settings::table.find(REGISTER)).set(settings::value.eq(text));
        call.execute(keep).await.map(drop)
    }
}

async fn read_row(call: &mut Call<'_>, id: &str) -> Result<Option<(TokenRow, Option<String>)>, StoreError> {
    let row: Option<Row> = call.first(access_tokens::table.find(id.to_owned())).await?;
    row.map(Row::read).transpose()
}

async fn read_register(call: &mut Call<'_>) -> Result<Option<String>, StoreError> {
    let text: Option<String> = call.first(settings::table.find(REGISTER).select(settings::value)).await?;
    // A process that changed a token without a master key locked the row and left it empty.
    Ok(text.filter(|text| !text.is_empty()))
}

/// The result of `keys seal` for the tokens.
#[derive(Debug, Default)]
pub struct SealedTokens {
    /// Tokens that have a seal now, and had none before.
    pub sealed: usize,
    /// Tokens that stay as they are, because their rows are not as they were left.
    pub refused: Vec<(String, Distrust)>,
}

impl Database {
    /// Every token, and whether its row is trusted. A row that cannot be read is logged and left
    /// out: it must not keep the others from being read, or a revoked one among them would stay
    /// valid.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn known_tokens(&self) -> Result<KnownTokens, StoreError> {
        let (rows, text) = self.tokens_at_once().await?;
        let ring = self.keys.ring();
        let mut sealer = Sealer::new(&ring, self.environment());
        let mut found = sealer.open_register(text.as_deref());
        if let Found::Broken(Distrust::UnknownKey(missing)) = found
            && !ring.is_empty()
            && self.keys.look_for(missing).await
        {
            sealer = Sealer::new(&self.keys.ring(), self.environment());
            found = sealer.open_register(text.as_deref());
        }
        if self.is_excused(&found, text.as_deref()) {
            found = Found::Absent;
        }
        let complete = self.is_complete(&found);
        let number = if let Found::Sound(register) = &found { register.number } else { 0 };
        let newest = self.seals.number.fetch_max(number, Ordering::AcqRel);
        self.learn_destroyed(&found);
        let mut known = KnownTokens {
            tokens: Vec::with_capacity(rows.len()),
            refused: Vec::new(),
            unsealed: 0,
            sealed: match &found {
                _ if sealer.keys.is_empty() => Sealed::Unchecked,
                Found::Sound(Register { sealed_at: Some(at), .. }) => Sealed::Since(Timestamp::from_millis(*at)),
                _ => Sealed::Partly,
            },
            changed_at: match &found {
                Found::Sound(register) => Some(Timestamp::from_millis(register.changed_at)),
                Found::Absent | Found::Broken(_) => None,
            },
            is_set_back: !sealer.keys.is_empty() && number < newest,
        };
        for (mut row, seal) in rows {
            let judged = match sealer.keys.is_empty() {
                true if complete => Err(Distrust::Keyless),
                true => Ok(false),
                false => sealer.judge(&mut row, seal.as_deref(), &found, complete),
            };
            match judged {
                // A revoked token admits nobody, whatever else is wrong with its row.
                Err(_) if row.revoked_at.is_some() => known.tokens.push(row),
                Err(why) => known.refused.push((row, why)),
                Ok(has_seal) => {
                    known.unsealed += usize::from(!has_seal && row.revoked_at.is_none());
                    known.tokens.push(row);
                }
            }
        }
        self.tell_refused(&known);
        Ok(known)
    }

    /// The rows with their seals, and the register that fits them: no sealed token was changed
    /// between the two reads.
    async fn tokens_at_once(&self) -> Result<(Vec<(TokenRow, Option<String>)>, Option<String>), StoreError> {
        let mut call = self.calls.read("tokens").await?;
        let mut before = read_register(&mut call).await?;
        // The operation's deadline ends this loop at the latest.
        let (rows, register) = loop {
            let order = (access_tokens::created_at.asc(), access_tokens::name.asc());
            let rows: Vec<Row> = call.load(access_tokens::table.order(order)).await?;
            let after = read_register(&mut call).await?;
            if before == after {
                break (rows, after);
            }
            before = after;
        };
        call.done();
        let told = |error: &StoreError| tracing::error!(%error, "a stored token cannot be read");
        Ok((rows.into_iter().filter_map(|row| row.read().inspect_err(told).ok()).collect(), register))
    }

    fn learn_destroyed(&self, found: &Found) {
        if let Found::Sound(register) = found {
            let mut destroyed = self.seals.destroyed.write().unwrap_or_else(PoisonError::into_inner);
            // A destroyed id is never used again, whatever the register says later.
            destroyed.extend(register.destroyed.iter().cloned());
        }
    }

    /// Whether a tenant had this id before it was shredded.
    pub(super) fn is_destroyed(&self, company: &str) -> bool {
        self.seals.destroyed.read().unwrap_or_else(PoisonError::into_inner).contains(company)
    }

    /// Reads whether every row has a seal, and which tenants' ids are no longer used.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn read_seals(&self) -> Result<(), StoreError> {
        let mut call = self.calls.read("seals").await?;
        self.learn_seals(&mut call).await?;
        call.done();
        Ok(())
    }

    /// Does the same as part of a call.
    pub(super) async fn learn_seals(&self, call: &mut Call<'_>) -> Result<(), StoreError> {
        let text = read_register(call).await?;
        let found = Sealer::new(&self.keys.ring(), self.environment()).open_register(text.as_deref());
        self.is_complete(&found);
        self.learn_destroyed(&found);
        Ok(())
    }

    /// Whether a register that is sealed with a missing master key counts as absent. An instance
    /// with another key must not lock everybody out; and while rows without a seal are admitted, an
    /// attacker could as well have taken the register away.
    fn is_excused(&self, found: &Found, text: Option<&str>) -> bool {
        matches!(found, Found::Broken(Distrust::UnknownKey(_)))
            && !self.needs_seals()
            && !text.is_some_and(claims_complete)
    }

    fn is_complete(&self, found: &Found) -> bool {
        if let Found::Sound(Register { sealed_at: Some(_), .. }) = found {
            // This process remembers it for its lifetime, even if somebody removes it from the
            // database.
            self.seals.complete.store(true, Ordering::Release);
        }
        self.needs_seals()
    }

    /// Whether rows without a seal are refused, as far as this process knows.
    pub(super) fn needs_seals(&self) -> bool {
        self.seals.complete.load(Ordering::Acquire) || self.seals.required.load(Ordering::Acquire)
    }

    /// Has rows without a seal refused always (`true`), or only where the database says that every
    /// row has one.
    pub fn require_seals(&self, required: bool) {
        self.seals.required.store(required, Ordering::Release);
    }

    fn tell_refused(&self, known: &KnownTokens) {
        let metrics = &self.calls.metrics;
        let count = |count: usize| count as f64;
        metrics.gauge("secretier_tokens_refused", &[], count(known.refused.len()));
        metrics.gauge("secretier_tokens_unsealed", &[], count(known.unsealed));
        if let Some((row, why)) = known.refused.first()
            && let Some(others) = self.seals.refused.may_say()
        {
            let (tokens, reason) = (known.refused.len(), why);
            tracing::error!(token = row.name, id = row.id, %reason, tokens, others, "a stored token is refused");
        }
        if known.is_set_back
            && let Some(others) = self.seals.set_back.may_say()
        {
            tracing::error!(
                others,
                "the tokens are those of an earlier time: nobody is let in who was not before. Where a backup was \
                 restored, look at 'secretier token list' and start this instance anew"
            );
        }
        if known.sealed == Sealed::Unchecked && !self.seals.told_unchecked.swap(true, Ordering::AcqRel) {
            tracing::warn!("no master key is known here, so tokens are neither sealed nor checked");
        }
    }

    /// Locks the register until the transaction ends, before any token is locked: two changes of
    /// tokens wait for each other here.
    pub(super) async fn lock_register(&self, call: &mut Call<'_>) -> Result<Ledger<'_>, StoreError> {
        let lock = diesel::insert_into(settings::table)
            .values((settings::name.eq(REGISTER), settings::value.eq("")))
            .on_conflict(settings::name)
            .do_update()
            .set(settings::value.eq(settings::value));
        call.execute(lock).await?;
        let text = read_register(call).await?;
        if self.keys.ring().is_empty() {
            return Ok(Ledger::Keyless { complete: text.as_deref().is_some_and(claims_complete) });
        }
        call.share_rotations().await?;
        let key = self.wrapping_key(call).await?.derive(KeyPurpose::Seal);
        let sealer = Sealer::new(&self.keys.ring(), self.environment());
        let found = sealer.open_register(text.as_deref());
        if self.is_excused(&found, text.as_deref()) {
            // Instances with that key still go by the register.
            return Ok(Ledger::Keyless { complete: false });
        }
        let complete = self.is_complete(&found);
        let register = match &found {
            Found::Sound(register) => register.clone(),
            Found::Absent if complete => return Ok(Ledger::Broken(Distrust::Register)),
            Found::Absent => Register::default(),
            Found::Broken(why) => return Ok(Ledger::Broken(*why)),
        };
        Ok(Ledger::Open(Box::new(OpenLedger { sealer, key, found, register, complete })))
    }

    /// Seals the tokens that have no seal. A token whose row is not as it was left stays as it is,
    /// unless `accept` says to seal all rows as they are.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn seal_tokens(&self, lock: &JobLock, accept: bool) -> Result<SealedTokens, StoreError> {
        let mut call = self.calls.write_within("seal_tokens", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
        let mut ledger = self.lock_register(&mut call).await?;
        if accept && let Ledger::Broken(_) = ledger {
            ledger = self.new_register(&mut call).await?;
        }
        ledger.may_let_in()?;
        let Ledger::Open(open) = &ledger else { return Err(self.no_key_for_register()) };
        let rows: Vec<Row> = call.load(access_tokens::table.order(access_tokens::id.asc())).await?;
        let (mut outcome, mut due) = (SealedTokens::default(), Vec::new());
        for row in rows {
            let (mut row, seal) = row.read()?;
            let before = Limits::of(&row).text();
            match open.sealer.judge(&mut row, seal.as_deref(), &open.found, false) {
                // A limit that an older version tightened is sealed too.
                Ok(true) if seal.is_some_and(|seal| !seal.ends_with(&before)) => due.push(row.id),
                Ok(true) => {}
                Ok(false) => due.push(row.id),
                Err(_) if accept || row.revoked_at.is_some() => due.push(row.id),
                Err(why) => outcome.refused.push((row.name, why)),
            }
        }
        for id in &due {
            ledger.seal(&mut call, id).await?;
        }
        outcome.sealed = due.len();
        if accept && let Ledger::Open(open) = &mut ledger {
            let there: Vec<String> = call.load(access_tokens::table.select(access_tokens::id)).await?;
            open.register.tokens.retain(|id, _| there.contains(id));
        }
        self.check(&mut call, lock).await?;
        if due.is_empty() && !accept {
            call.roll_back().await?;
            return Ok(outcome);
        }
        ledger.keep(&mut call, self.clock.now()).await?;
        self.raise(&mut call, super::changes::Change::Tokens).await?;
        call.commit().await?;
        Ok(outcome)
    }

    fn no_key_for_register(&self) -> StoreError {
        match self.keys.ring().is_empty() {
            true => StoreError::Sealing(SealError::NoMasterKey),
            false => StoreError::Seals(
                "the register of the tokens is sealed with a master key that is not known; see 'secretier keys status'"
                    .to_owned(),
            ),
        }
    }

    /// A new register that replaces one that is not as it was left.
    async fn new_register(&self, call: &mut Call<'_>) -> Result<Ledger<'_>, StoreError> {
        let key = self.wrapping_key(call).await?.derive(KeyPurpose::Seal);
        let sealer = Sealer::new(&self.keys.ring(), self.environment());
        // Running instances may have counted further than a register whose count is lost.
        let number = self.seals.number.load(Ordering::Acquire);
        let register = Register { number, ..Register::default() };
        let found = Found::Sound(Register::default());
        Ok(Ledger::Open(Box::new(OpenLedger { sealer, key, found, register, complete: false })))
    }

    /// Notes that from now on every row has a seal. If an instance of an older version, which makes
    /// rows without seals, is registered, returns the names of those instead.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn complete_seals(&self, lock: &JobLock) -> Result<Vec<String>, StoreError> {
        let mut call = self.calls.write("complete_seals").await?;
        let older = older_instances(&mut call).await?;
        let mut ledger = self.lock_register(&mut call).await?;
        ledger.may_let_in()?;
        let Ledger::Open(open) = &mut ledger else { return Err(self.no_key_for_register()) };
        if !older.is_empty() || open.register.sealed_at.is_some() {
            call.roll_back().await?;
            return Ok(older);
        }
        let now = self.clock.now();
        open.register.sealed_at = Some(now.as_millis());
        self.check(&mut call, lock).await?;
        ledger.keep(&mut call, now).await?;
        self.raise(&mut call, super::changes::Change::Tokens).await?;
        call.commit().await?;
        self.seals.complete.store(true, Ordering::Release);
        Ok(older)
    }

    /// The names of the registered instances whose version makes no seals.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn older_instances(&self) -> Result<Vec<String>, StoreError> {
        let mut call = self.calls.read("older_instances").await?;
        let older = older_instances(&mut call).await?;
        call.done();
        Ok(older)
    }

    /// Seals with this master key the tokens that are sealed with another one, where they are as
    /// they were left. Returns the number of tokens.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn reseal_tokens(&self, lock: &JobLock, target: &MasterKey) -> Result<usize, StoreError> {
        let mut call = self.calls.write_within("reseal_tokens", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
        let mut ledger = self.lock_register(&mut call).await?;
        let Ledger::Open(open) = &mut ledger else {
            call.roll_back().await?;
            return Ok(0);
        };
        let rows: Vec<Row> = call.load(access_tokens::table.order(access_tokens::id.asc())).await?;
        let wanted = format!("{SEAL_FORMAT}.{}.", target.id());
        let mut due = Vec::new();
        for row in rows {
            let (mut row, seal) = row.read()?;
            let is_of_another = seal.as_ref().is_some_and(|seal| !seal.starts_with(&wanted));
            if is_of_another && open.sealer.judge(&mut row, seal.as_deref(), &open.found, false) == Ok(true) {
                due.push(row.id);
            }
        }
        let register = read_register(&mut call).await?;
        let is_of_another =
            register.is_some_and(|text| !text.starts_with(&format!("{REGISTER_FORMAT}.{}.", target.id())));
        if due.is_empty() && !is_of_another {
            call.roll_back().await?;
            return Ok(0);
        }
        open.key = target.derive(KeyPurpose::Seal);
        for id in &due {
            ledger.seal(&mut call, id).await?;
        }
        self.check(&mut call, lock).await?;
        ledger.keep(&mut call, self.clock.now()).await?;
        call.commit().await?;
        Ok(due.len())
    }
}

async fn older_instances(call: &mut Call<'_>) -> Result<Vec<String>, StoreError> {
    let registered = instances::registered(call).await?.into_iter();
    Ok(registered.filter(|instance| instance.version.is_none()).map(|instance| instance.name).collect())
}

/// The register's own claim that every row has a seal, without a check of its HMAC.
fn claims_complete(text: &str) -> bool {
    let body = text.splitn(4, '.').nth(3).unwrap_or_default();
    serde_json::from_str::<Register>(body).is_ok_and(|register| register.sealed_at.is_some())
}
