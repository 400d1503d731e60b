//! Secrets: found and opened, sealed and written.

use std::{collections::HashMap, sync::Arc};

use diesel::{
    BoolExpressionMethods as _, ExpressionMethods as _, JoinOnDsl as _, NullableExpressionMethods as _, QueryDsl as _,
};

use super::{
    Database,
    calls::Call,
    changes::Change,
    companies::{self, COLUMNS, Company, CompanyRow, Purpose},
    data_keys::Chain,
    error::{StoreError, WriteError},
    heads::Verdict,
    new_id,
    rows::{NewSecret, ROWS, SecretRow},
    schema::{
        companies as company_table,
        company_secrets::{
            self, company_id, counted, id, previous_version_id, secret_key, secret_text_encrypted,
            secret_value_encrypted, source, superseded_at, unusable, updated_at, version, written_by,
        },
    },
    versions::{Batch, Next},
};
use crate::{
    answer::Answer,
    clock::Timestamp,
    etag,
    flaws::Unusable,
    long_work::{Large, LongWork, SHORT, weight_of},
    phase::Phase,
    sealing::{DataKey, OpenError, Place, SealError, data_key_version, text_key_version},
    secret::{SecretKey, SecretValue, Version, Writer},
    tenant::Tenant,
};

/// The result of a lookup: the database's state of a tenant's key.
#[derive(Debug, Clone)]
pub struct Lookup {
    /// The tenant, if it is known here.
    pub company: Option<Company>,
    /// The secret.
    pub copy: Held,
}

/// All secrets that the database has for a tenant.
#[derive(Debug)]
pub struct Listing {
    /// The tenant, if it is known here.
    pub company: Option<Company>,
    /// Its secrets, in the order of their names: values, rows that do not open, and values that
    /// cannot be used.
    pub secrets: Large<Vec<(SecretKey, Held)>>,
    /// The keys whose newest version is a deletion.
    pub deleted: Vec<SecretKey>,
    /// Whether this is exactly the folder as of the last snapshot: no key was left out of it,
    /// forgotten since, or written or deleted by the database as owner.
    pub is_snapshot: bool,
}

/// The database's state of a key.
#[derive(Debug, Clone)]
pub enum Held {
    /// No row, or the mark that the last snapshot lacks the secret.
    Absent,
    /// No value, which proves an absence only where the database is the owner: the database deleted
    /// the secret as its owner, or forgot its copy when upstream was told to change it.
    Unknown,
    /// A value.
    Present(Stored),
    /// A row that does not open. It is neither a value nor a proof of absence.
    Unreadable(OpenError),
    /// The last snapshot has the secret, and its value cannot be used.
    Unusable(Unusable),
}

/// A value with its metadata.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The value. Where there is a text, the value that the text stood for when it was stored.
    pub value: SecretValue,
    /// The text with references, as upstream has it. While upstream owns the secret, its value is
    /// whatever this stands for at the time of the answer.
    pub text: Option<Result<SecretValue, OpenError>>,
    /// Counts the values that the secret has had here.
    pub version: Version,
    /// When it was written here.
    pub updated_at: Timestamp,
    /// The source of the value.
    pub source: Source,
    /// Its validator.
    pub etag: String,
}

/// A secret's newest version, without its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Current {
    /// Its name.
    pub key: SecretKey,
    /// Counts the values that the secret has had here.
    pub version: Version,
    /// When it was written here.
    pub updated_at: Timestamp,
    /// Its validator.
    pub etag: String,
}

/// The source of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A snapshot of the upstream folder.
    Infisical,
    /// A write to the database itself.
    Database,
}

impl Source {
    /// The word in the table.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Infisical => "infisical",
            Self::Database => "database",
        }
    }

    /// The source of that word, if it is one.
    pub(super) fn of(word: &str) -> Option<Self> {
        [Self::Infisical, Self::Database].into_iter().find(|from| from.as_str() == word)
    }
}

/// The word in the table for a row that stands for a version that nobody here has seen: upstream
/// was told to make it. It is no [`Source`], because nobody has given or deleted a value; the next
/// version with a value or a deletion takes its place and its number.
pub(super) const PLACEHOLDER: &str = "forgotten";

impl Stored {
    /// Sets the value that its text stands for now. Where that differs from the value at storing,
    /// the validator gets the folder's `stamp` added.
    pub fn stands_for(&mut self, value: SecretValue, stamp: &str) {
        if !self.value.same_as(&value) {
            self.etag = etag::beside(&self.etag, stamp);
            self.value = value;
        }
    }

    /// The size of its value, and of its text where there is one, in bytes.
    #[must_use]
    pub fn weight(&self) -> usize {
        let text = self.text.iter().flatten().map(SecretValue::len);
        self.value.len() + text.sum::<usize>()
    }

    /// The secret, ready to be sent.
    #[must_use]
    pub fn into_answer(self, tenant: &Tenant, key: &SecretKey) -> Answer {
        let refers = self.text.is_some() && self.source == Source::Infisical;
        let answer = Answer::new(tenant, key.clone(), &self.value, self.version, self.updated_at, &self.etag);
        answer.referring(refers)
    }
}

impl Held {
    /// The size of the value in bytes, where there is one.
    #[must_use]
    pub fn weight(&self) -> usize {
        match self {
            Self::Present(stored) => stored.weight(),
            Self::Absent | Self::Unknown | Self::Unreadable(_) | Self::Unusable(_) => 0,
        }
    }
}

/// The condition for a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Precondition {
    /// No condition.
    None,
    /// The secret exists, whatever its version (`If-Match: *`).
    IfMatchAny,
    /// The secret exists at one of these etags, without quotes (`If-Match`).
    IfMatch(Vec<String>),
    /// The secret does not exist (`If-None-Match: *`).
    IfNoneMatchAny,
}

impl Precondition {
    /// Whether it holds for a secret with this etag, or for none.
    #[must_use]
    pub fn holds(&self, current: Option<&str>) -> bool {
        match self {
            Self::None => true,
            Self::IfMatchAny => current.is_some(),
            Self::IfMatch(etags) => current.is_some_and(|current| etags.iter().any(|etag| etag == current)),
            Self::IfNoneMatchAny => current.is_none(),
        }
    }
}

/// The result of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The new version.
    pub version: Version,
    /// Whether the secret did not exist before.
    pub created: bool,
    /// When it was written.
    pub updated_at: Timestamp,
    /// The new validator.
    pub etag: String,
}

/// The columns that a [`SecretRow`] is read from.
type Columns = (
    id,
    secret_key,
    secret_value_encrypted,
    version,
    previous_version_id,
    source,
    written_by,
    updated_at,
    superseded_at,
    secret_text_encrypted,
    unusable,
    counted,
);

pub(super) const ROW: Columns = (
    id,
    secret_key,
    secret_value_encrypted,
    version,
    previous_version_id,
    source,
    written_by,
    updated_at,
    superseded_at,
    secret_text_encrypted,
    unusable,
    counted,
);

/// A value sealed for one place, and the text with references that it comes from, if any.
#[derive(Default)]
pub(super) struct Sealed {
    pub(super) value: Option<String>,
    pub(super) text: Option<String>,
}

impl Sealed {
    /// No value: a deletion, or a secret that upstream lacks.
    pub(super) fn nothing() -> Self {
        Self::default()
    }

    pub(super) fn of(
        key: &DataKey,
        value: &SecretValue,
        text: Option<&SecretValue>,
        place: Place<'_>,
    ) -> Result<Self, SealError> {
        let text = text.map(|text| key.seal_text(text, place)).transpose()?;
        Ok(Self { value: Some(key.seal(value, place)?), text })
    }
}

impl NewSecret {
    /// The version that a snapshot has for a key, or the mark that the snapshot lacks it. Where the
    /// proxy told upstream to make that version, the row names that writer.
    pub(super) fn of_upstream(
        company: &Company,
        key: &SecretKey,
        sealed: Sealed,
        next: Next<'_>,
        now: Timestamp,
    ) -> Self {
        let writer = next.unseen().and_then(|row| row.written_by.clone());
        Self::new(company, key, sealed, next, Source::Infisical.as_str(), writer, now)
    }

    /// A value that the database owns, or the mark that it deleted one.
    pub(super) fn own(
        company: &Company,
        key: &SecretKey,
        sealed: Sealed,
        next: Next<'_>,
        writer: &Writer,
        now: Timestamp,
    ) -> Self {
        Self::new(company, key, sealed, next, Source::Database.as_str(), Some(writer.as_str().to_owned()), now)
    }

    /// The mark that the version that `writer` made upstream is not known.
    pub(super) fn forgotten(
        company: &Company,
        key: &SecretKey,
        next: Next<'_>,
        writer: &Writer,
        now: Timestamp,
    ) -> Self {
        Self::new(company, key, Sealed::nothing(), next, PLACEHOLDER, Some(writer.as_str().to_owned()), now)
    }

    /// The mark that a snapshot has the key with a value that cannot be used.
    pub(super) fn unusable(
        company: &Company,
        key: &SecretKey,
        reason: Unusable,
        next: Next<'_>,
        now: Timestamp,
    ) -> Self {
        let writer = next.unseen().and_then(|row| row.written_by.clone());
        let row = Self::new(company, key, Sealed::nothing(), next, PLACEHOLDER, writer, now);
        Self { unusable: Some(reason.as_str()), ..row }
    }

    fn new(
        company: &Company,
        key: &SecretKey,
        sealed: Sealed,
        next: Next<'_>,
        from: &'static str,
        writer: Option<String>,
        now: Timestamp,
    ) -> Self {
        Self {
            id: new_id(),
            company_id: company.id.clone(),
            secret_key: key.as_str().to_owned(),
            secret_value_encrypted: sealed.value,
            secret_text_encrypted: sealed.text,
            unusable: None,
            version: next.number.number(),
            previous_version_id: next.previous().map(str::to_owned),
            source: from,
            written_by: writer,
            created_at: now.as_millis(),
            updated_at: now.as_millis(),
            counted: None,
        }
    }

    pub(super) fn weight(&self) -> usize {
        [&self.secret_value_encrypted, &self.secret_text_encrypted].into_iter().flatten().map(String::len).sum()
    }
}

impl SecretRow {
    pub(super) fn key(&self) -> Result<SecretKey, StoreError> {
        self.key.parse().map_err(|_| StoreError::broken(format!("secret {}: its key cannot be read", self.id)))
    }

    pub(super) fn version(&self) -> Result<Version, StoreError> {
        Version::new(self.version)
            .ok_or_else(|| StoreError::broken(format!("secret {}: its version cannot be read", self.id)))
    }

    pub(super) fn current(&self, company: &Company) -> Result<Current, StoreError> {
        let (key, number) = (self.key()?, self.version()?);
        let etag = etag::of(&company.id, &key, number);
        Ok(Current { key, version: number, updated_at: Timestamp::from_millis(self.updated_at), etag })
    }

    /// When a newer version was made.
    pub(super) fn superseded_at(&self) -> Option<Timestamp> {
        self.superseded_at.map(Timestamp::from_millis)
    }

    /// Whether this stands for a version that nobody here has seen.
    pub(super) fn is_forgotten(&self) -> bool {
        self.source == PLACEHOLDER
    }

    /// Whether a snapshot left this as a copy, or as the mark that it lacked the key.
    pub(super) fn is_of_upstream(&self) -> bool {
        self.source == Source::Infisical.as_str()
    }

    /// Why the last snapshot's value of the key cannot be used, if it cannot.
    pub(super) fn unusable(&self) -> Option<Unusable> {
        self.unusable.as_deref().and_then(Unusable::of)
    }

    /// Whether the database wrote or deleted this as the owner.
    pub(super) fn is_own(&self) -> bool {
        self.source == Source::Database.as_str()
    }

    /// Opens the value, with the data key that it was sealed with.
    pub(super) fn open(&self, company: &Company, chain: &Chain) -> Result<Option<SecretValue>, OpenError> {
        self.open_with(self.sealed.as_deref(), data_key_version, company, chain, DataKey::open)
    }

    /// Opens the text with references that the value comes from, if any.
    pub(super) fn open_text(&self, company: &Company, chain: &Chain) -> Result<Option<SecretValue>, OpenError> {
        self.open_with(self.text.as_deref(), text_key_version, company, chain, DataKey::open_text)
    }

    fn open_with(
        &self,
        sealed: Option<&str>,
        key_version: impl FnOnce(&str) -> Result<i64, OpenError>,
        company: &Company,
        chain: &Chain,
        open: impl FnOnce(&DataKey, &str, Place<'_>) -> Result<SecretValue, OpenError>,
    ) -> Result<Option<SecretValue>, OpenError> {
        let Some(sealed) = sealed else { return Ok(None) };
        let number = key_version(sealed)?;
        let key = chain.get(&number).ok_or(OpenError::UnknownDataKey(number))?.as_ref().map_err(|error| *error)?;
        let name = self.key.parse().map_err(|_| OpenError::Malformed)?;
        let place =
            Place { company_id: &company.id, key: &name, version: self.version().map_err(|_| OpenError::Malformed)? };
        open(key, sealed, place).map(Some)
    }

    /// The data keys that value and text were sealed with. It is one, unless a rotation by the
    /// previous version, which knows no text, came in between.
    fn data_keys(&self) -> impl Iterator<Item = i64> {
        let value = self.sealed.as_deref().map(data_key_version).and_then(Result::ok);
        let text = self.text.as_deref().map(text_key_version).and_then(Result::ok);
        value.into_iter().chain(text.filter(|text| Some(*text) != value))
    }

    /// The size of its sealed data in bytes.
    pub(super) fn weight(&self) -> usize {
        [&self.sealed, &self.text].into_iter().flatten().map(String::len).sum()
    }

    /// The row's state, opened with these keys.
    pub(super) fn held(&self, company: &Company, chain: &Chain) -> Result<Held, StoreError> {
        let current = self.current(company)?;
        Ok(match self.open(company, chain) {
            Ok(None) if self.is_of_upstream() => Held::Absent,
            Ok(None) => self.unusable().map_or(Held::Unknown, Held::Unusable),
            Ok(Some(value)) => Held::Present(Stored {
                value,
                text: self.open_text(company, chain).transpose(),
                version: current.version,
                updated_at: current.updated_at,
                source: if self.source == Source::Database.as_str() { Source::Database } else { Source::Infisical },
                etag: current.etag,
            }),
            Err(reason) => Held::Unreadable(reason),
        })
    }
}

/// A change to one secret, in progress: the tenant is locked.
pub(super) struct OpenWrite<'d> {
    pub(super) call: Call<'d>,
    pub(super) company: Company,
    /// The newest version, if there ever was one.
    pub(super) row: Option<SecretRow>,
    /// The newest version, if it has a value.
    current: Option<Current>,
    now: Timestamp,
}

impl Database {
    /// Finds a key's state, with the tenant's row, in one round trip (and one more for a data key
    /// that is not cached).
    ///
    /// # Errors
    /// [`StoreError`]. A row that does not open is no error here: see [`Held::Unreadable`].
    pub async fn find(&self, tenant: &Tenant, key: &SecretKey) -> Result<Lookup, StoreError> {
        let mut found = self.find_once(tenant, key).await?;
        if Box::pin(self.may_open_now(&found.copy)).await {
            found = Box::pin(self.find_once(tenant, key)).await?;
        }
        self.tell_unreadable(&found.copy, tenant, key);
        Ok(found)
    }

    async fn find_once(&self, tenant: &Tenant, key: &SecretKey) -> Result<Lookup, StoreError> {
        let mut call = self.calls.read("find").await?;
        let Some((company, row)) = find_newest(&mut call, tenant, key).await? else {
            call.done();
            return Ok(Lookup { company: None, copy: Held::Absent });
        };
        let copy = match row {
            None => Held::Absent,
            Some(row) => self.open_row(&mut call, &company, &row).await?,
        };
        call.done();
        Ok(Lookup { company: Some(company), copy })
    }

    /// Logs that a row does not open, though not for every lookup.
    pub(super) fn tell_unreadable(&self, held: &Held, tenant: &Tenant, key: &SecretKey) {
        if let Held::Unreadable(reason) = held
            && let Some(others) = self.unreadable.may_say()
        {
            tracing::error!(%tenant, %key, %reason, others, "a stored secret does not open");
        }
    }

    /// Whether an unreadable row may open at another read: it was sealed anew between the read of
    /// the row and that of its data key, which then was destroyed; or its data key is wrapped with
    /// a master key that the sources have now.
    pub(super) async fn may_open_now(&self, held: &Held) -> bool {
        match held {
            Held::Unreadable(OpenError::UnknownDataKey(_)) => true,
            Held::Unreadable(OpenError::UnknownMasterKey(missing)) => self.keys.look_for(*missing).await,
            // The text beside a value that opens may have been sealed with another data key.
            Held::Present(Stored { text: Some(Err(OpenError::UnknownMasterKey(missing))), .. }) => {
                self.keys.look_for(*missing).await
            }
            Held::Unreadable(_) | Held::Present(_) | Held::Absent | Held::Unknown | Held::Unusable(_) => false,
        }
    }

    /// Opens one row.
    pub(super) async fn open_row(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        row: &SecretRow,
    ) -> Result<Held, StoreError> {
        let mut chain = Chain::new();
        for number in row.data_keys() {
            chain.insert(number, self.data_key(call, company, number).await?);
        }
        let held = row.held(company, &chain)?;
        // The cached key may be outdated: its row was deleted, and another instance gave its number
        // to a new key.
        if let (Held::Unreadable(OpenError::Forged), Some(number)) = (&held, row.data_keys().next())
            && self.forget_data_key(company, number)
        {
            chain.insert(number, Box::pin(self.data_key(call, company, number)).await?);
            return row.held(company, &chain);
        }
        Ok(held)
    }

    /// Finds all secrets of a tenant, opened.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn find_all(&self, tenant: &Tenant) -> Result<Listing, StoreError> {
        let mut listing = self.find_all_once(tenant).await?;
        for (_, held) in listing.secrets.iter() {
            if self.may_open_now(held).await {
                listing = self.find_all_once(tenant).await?;
                break;
            }
        }
        for (key, held) in listing.secrets.iter() {
            self.tell_unreadable(held, tenant, key);
        }
        Ok(listing)
    }

    /// Finds all secrets of each of these tenants, as [`Self::find_all`] does for one, with few
    /// statements. Data keys that are not cached are not cached by this. Tenants without a row are
    /// left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn find_all_of(&self, tenants: &[Tenant]) -> Result<HashMap<Tenant, Listing>, StoreError> {
        let mut call = self.calls.read("find_all_of").await?;
        let companies = companies::find_all(&mut call, tenants.iter()).await?;
        let known: Vec<&Company> = companies.values().collect();
        let mut rows = all_of(&mut call, &known).await?;
        let mut chains = self.chains(&mut call, &known).await?;
        call.done();
        let mut listings = HashMap::with_capacity(companies.len());
        for (tenant, company) in companies {
            let rows = rows.remove(&company.id).unwrap_or_default();
            let chain = chains.remove(&company.id).unwrap_or_default();
            let (verdict, rows) = self.verdict_of(&company, rows, &chain).await;
            let fits = verdict != Verdict::SetBack;
            let mut listing = self.listing_of(company, rows, chain).await?;
            // A mismatch at the first read may be gone at another.
            if !fits || listing.secrets.iter().any(|(_, held)| matches!(held, Held::Unreadable(_))) {
                listing = self.find_all(&tenant).await?;
            }
            listings.insert(tenant, listing);
        }
        Ok(listings)
    }

    async fn find_all_once(&self, tenant: &Tenant) -> Result<Listing, StoreError> {
        let mut call = self.calls.read("find_all").await?;
        let mut known = companies::find(&mut call, tenant).await?;
        // Rows and head are read one after the other: if something was written in between, both are
        // read again, until the operation's time is over.
        let (company, rows, chain, verdict) = loop {
            let Some(company) = known else {
                call.done();
                let secrets = Large::small(Vec::new());
                return Ok(Listing { company: None, secrets, deleted: Vec::new(), is_snapshot: false });
            };
            let rows = all(&mut call, &company.id).await?;
            let chain = self.chain(&mut call, &company).await?;
            let (verdict, rows) = self.verdict_of(&company, rows, &chain).await;
            if verdict == Verdict::SetBack {
                known = companies::find(&mut call, tenant).await?;
                if known.as_ref().is_none_or(|now| now.id != company.id || now.head != company.head) {
                    continue;
                }
            }
            break (company, rows, chain, verdict);
        };
        call.done();
        self.accept(&company, verdict)?;
        self.listing_of(company, rows, chain).await
    }

    /// Opens these rows, all that a company has. Each row is dropped as soon as it is opened.
    async fn listing_of(
        &self,
        company: Company,
        mut rows: Large<Vec<SecretRow>>,
        chain: Chain,
    ) -> Result<Listing, StoreError> {
        let is_told = |row: &SecretRow| row.is_of_upstream() || row.unusable().is_some();
        let is_snapshot = company.snapshot_whole && rows.iter().all(is_told);
        let is_deleted = |row: &&SecretRow| row.sealed.is_none() && row.unusable().is_none() && !row.is_forgotten();
        let deleted = rows.iter().filter(is_deleted).map(SecretRow::key).collect::<Result<_, _>>()?;
        rows.retain(|row| row.sealed.is_some() || row.unusable().is_some());
        let of = company.clone();
        let open = move |row: SecretRow| Ok((row.key()?, row.held(&of, &chain)?));
        let mut opened = self.work.each(rows.take(), SecretRow::weight, open).await;
        if let Some(broken) = opened.iter().position(Result::is_err) {
            return Err(opened.swap_remove(broken).err().unwrap_or_else(|| StoreError::broken("a row was lost")));
        }
        let secrets = opened.map(|opened| opened.into_iter().flatten().collect());
        Ok(Listing { company: Some(company), secrets, deleted, is_snapshot })
    }

    /// Wraps rows so that dropping them delays nobody.
    pub(super) fn large_rows(&self, rows: Vec<SecretRow>) -> Large<Vec<SecretRow>> {
        let weight = weight_of(rows.iter(), SecretRow::weight);
        self.work.large(rows, weight)
    }

    /// Writes a value that the database owns: always a new version, also of an equal value. Writers
    /// of one tenant run one after another, so of two that name the same etag one gets
    /// [`WriteError::Conflict`]. `owned_in` is the tenant's own phase that made the database the
    /// owner: if it has changed since, nothing is written.
    ///
    /// # Errors
    /// [`WriteError`]; on a conflict, and where the tenant has changed its owner, nothing has
    /// changed.
    pub async fn put(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        value: &SecretValue,
        precondition: &Precondition,
        writer: &Writer,
        owned_in: Option<Phase>,
    ) -> Result<Written, WriteError> {
        self.calls.repeated(|| self.put_once(tenant, key, value, precondition, writer, owned_in)).await
    }

    async fn put_once(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        value: &SecretValue,
        precondition: &Precondition,
        writer: &Writer,
        owned_in: Option<Phase>,
    ) -> Result<Written, WriteError> {
        let mut change = self.change("put", tenant, key, precondition, owned_in).await?;
        let chain = self.chain(&mut change.call, &change.company).await?;
        self.write(change, chain, key, value, writer).await
    }

    /// Deletes a secret that the database owns; `false` if there is none. The earlier versions stay
    /// for as long as they are kept, so the secret can be restored. `owned_in` is as in
    /// [`Self::put`].
    ///
    /// # Errors
    /// [`WriteError`]; on a conflict, and where the tenant has changed its owner, nothing has
    /// changed.
    pub async fn delete(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        precondition: &Precondition,
        writer: &Writer,
        owned_in: Option<Phase>,
    ) -> Result<bool, WriteError> {
        self.calls.repeated(|| self.delete_once(tenant, key, precondition, writer, owned_in)).await
    }

    async fn delete_once(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        precondition: &Precondition,
        writer: &Writer,
        owned_in: Option<Phase>,
    ) -> Result<bool, WriteError> {
        let OpenWrite { mut call, company, row, current, now } =
            self.change("delete", tenant, key, precondition, owned_in).await?;
        if current.is_none() {
            call.roll_back().await?;
            return Ok(false);
        }
        let next = Next::after(row.as_ref())?;
        let mut batch = Batch::default();
        batch.add(&company, next, NewSecret::own(&company, key, Sealed::nothing(), next, writer, now));
        batch.write(self, &mut call, now).await?;
        self.raise(&mut call, Change::Secret(company.tenant, key.clone())).await?;
        call.commit().await?;
        Ok(true)
    }

    /// Locks the tenant, which must still have that phase of its own, and finds the secret, for a
    /// change that the precondition allows.
    pub(super) async fn change(
        &self,
        name: &'static str,
        tenant: &Tenant,
        key: &SecretKey,
        precondition: &Precondition,
        owned_in: Option<Phase>,
    ) -> Result<OpenWrite<'_>, WriteError> {
        let now = self.clock.now();
        let mut call = self.calls.write(name).await?;
        let (company, _) = companies::lock(&mut call, tenant, now, Purpose::Change).await?;
        // Checked first: rows that another owner left here must not decide a precondition.
        if company.phase != owned_in {
            call.roll_back().await?;
            return Err(WriteError::Moved);
        }
        let row = newest(&mut call, &company.id, key).await?;
        let current = current_of(row.as_ref(), &company)?;
        if !precondition.holds(current.as_ref().map(|current| current.etag.as_str())) {
            call.roll_back().await?;
            return Err(WriteError::Conflict);
        }
        Ok(OpenWrite { call, company, row, current, now })
    }

    /// Seals a value. Others wait for this writer, so a large value does not queue for long work.
    async fn seal(
        &self,
        data_key: &Arc<DataKey>,
        company: &Company,
        key: &SecretKey,
        number: Version,
        value: &SecretValue,
    ) -> Result<Sealed, SealError> {
        let (data_key, company, key, value) = (Arc::clone(data_key), company.id.clone(), key.clone(), value.clone());
        let is_long = value.len() > SHORT;
        let seal =
            move || Sealed::of(&data_key, &value, None, Place { company_id: &company, key: &key, version: number });
        if is_long { LongWork::run_now(seal).await } else { seal() }
    }

    /// Finishes a change by writing a value that the database owns.
    pub(super) async fn write(
        &self,
        change: OpenWrite<'_>,
        chain: Chain,
        key: &SecretKey,
        value: &SecretValue,
        writer: &Writer,
    ) -> Result<Written, WriteError> {
        let OpenWrite { mut call, company, row, current, now } = change;
        let next = Next::after(row.as_ref())?;
        let data_key = self.sealing_key(&mut call, &company, &chain, 1).await?;
        let sealed = self.seal(&data_key, &company, key, next.number, value).await.map_err(StoreError::from)?;
        let mut batch = Batch::default();
        batch.add(&company, next, NewSecret::own(&company, key, sealed, next, writer, now));
        batch.keys(&company, chain, Some(data_key));
        batch.write(self, &mut call, now).await?;
        self.raise(&mut call, Change::Secret(company.tenant, key.clone())).await?;
        call.commit().await?;
        let etag = etag::of(&company.id, key, next.number);
        Ok(Written { version: next.number, created: current.is_none(), updated_at: now, etag })
    }
}

/// Finds a tenant with a key's newest row, a tombstone included, in one round trip.
pub(super) async fn find_newest(
    call: &mut Call<'_>,
    tenant: &Tenant,
    key: &SecretKey,
) -> Result<Option<(Company, Option<SecretRow>)>, StoreError> {
    let on = company_id.eq(company_table::id).and(secret_key.eq(key.as_str().to_owned())).and(superseded_at.is_null());
    let query = company_table::table
        .left_join(company_secrets::table.on(on))
        .filter(company_table::subdomain.eq(tenant.as_str().to_owned()))
        .select((COLUMNS, ROW.nullable()));
    let found: Option<(CompanyRow, Option<SecretRow>)> = call.first_at_once(query).await?;
    found.map(|(company, row)| Ok((Company::try_from(company)?, row))).transpose()
}

/// Finds a key's newest row, a tombstone included.
pub(super) async fn newest(
    call: &mut Call<'_>,
    company: &str,
    key: &SecretKey,
) -> Result<Option<SecretRow>, StoreError> {
    let row = company_secrets::table
        .filter(company_id.eq(company))
        .filter(secret_key.eq(key.as_str()))
        .filter(superseded_at.is_null())
        .select(ROW);
    call.first(row).await
}

/// Finds every key's newest row, tombstones included, in the order of the names.
pub(super) async fn all(call: &mut Call<'_>, company: &str) -> Result<Vec<SecretRow>, StoreError> {
    let rows = company_secrets::table.filter(company_id.eq(company.to_owned())).filter(superseded_at.is_null());
    call.load_large(rows.order(secret_key.asc()).select(ROW), SecretRow::bytes).await
}

/// The same for these companies, by company.
pub(super) async fn all_of(
    call: &mut Call<'_>,
    companies: &[&Company],
) -> Result<HashMap<String, Vec<SecretRow>>, StoreError> {
    let mut found: HashMap<String, Vec<SecretRow>> = HashMap::with_capacity(companies.len());
    for companies in companies.chunks(ROWS) {
        let ids: Vec<String> = companies.iter().map(|company| company.id.clone()).collect();
        let rows = company_secrets::table
            .filter(company_id.eq_any(ids))
            .filter(superseded_at.is_null())
            .order((company_id.asc(), secret_key.asc()))
            .select((company_id, ROW));
        let bytes = |(_, row): &(String, SecretRow)| row.bytes();
        for (company, row) in call.load_large(rows, bytes).await? {
            found.entry(company).or_default().push(row);
        }
    }
    Ok(found)
}

fn current_of(row: Option<&SecretRow>, company: &Company) -> Result<Option<Current>, StoreError> {
    row.filter(|row| row.sealed.is_some()).map(|row| row.current(company)).transpose()
}
