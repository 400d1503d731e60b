//! A tenant's head: it proves that the tenant's newest versions are those that were left there.
//!
//! Each value is bound to its company, key and version, so nobody can make one without the data
//! key. But with write access to the database, an attacker can put an older version in the place of
//! the newest, or remove the mark of a deletion: every row still opens. The head shows it. It holds
//!
//! - the sum, modulo 2^128, of a pseudorandom value for each key's newest version: an HMAC of
//!   key, version, source and whether it is a value or a deletion, under a random key of the
//!   head's own. A write takes the old version's away and adds the new one's, so it costs the
//!   same however many secrets the tenant has. The sum leaves out versions that are not the
//!   newest, and placeholder rows, which stand for a version that nobody has seen;
//! - how often it was changed, when it began, and when it was last changed;
//!
//! and is sealed with a key that is derived from the tenant's data key, bound to company, subdomain
//! and the time of the last shredding. Every writer to a tenant holds its data key; a rotation of
//! the master key does not change the data key; and a shredding destroys it, so no earlier head
//! opens after a shredding.
//!
//! **Why that holds.** An attacker without the key cannot make a head, only put an earlier one
//! back. Neither the sum nor the key of the HMAC is stored in clear text: the attacker learns no
//! pseudorandom value, and cannot add sums of several heads. So if the rows are not those of the
//! head that the attacker chose, the difference of the two sums is a sum of pseudorandom values,
//! not all of which cancel (each row is there once: key and version are unique), and is zero with a
//! chance of 2^-128 or so (this is the additive multiset hash of Clarke et al., ASIACRYPT 2003,
//! with a hidden sum). A write changes both sums alike and leaves the difference as it was: an
//! honest write does not vouch for earlier changes by others.
//!
//! **What it does not detect:** rows *and* head of a tenant that are put back together. The audit
//! detects that: it has a write on record that is later than the head's last change, see
//! `cli/audit.rs`.
//!
//! **Where it is compared.** The sum needs all of the tenant's rows. So it is compared wherever all
//! of them are read anyway (lists, the warm start, copies that are taken over from another
//! instance, migrations), and by `audit verify`. A read of one secret does not compare it.
//!
//! **Older instances, which know no heads.** A row that an older version wrote is marked as not
//! counted. A head that does not fit such rows is stale, which is no evidence of an attack, and the
//! next write by this version that meets such a row removes the head. `keys seal` makes heads for
//! all tenants, of the rows as they are, once no such instance is left. From then on every tenant
//! with secrets has a head that fits, and any mismatch is an error.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use diesel::{ExpressionMethods as _, QueryDsl as _};
use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::{TryRng as _, rngs::SysRng};
use sha2::Sha256;
use zeroize::Zeroizing;

use super::{
    Database, JobLock,
    calls::Call,
    companies::{self, COLUMNS, Company, CompanyRow, Purpose},
    data_keys::Chain,
    error::StoreError,
    prepared::Prepared,
    rows::{BACKGROUND_TIMEOUTS, NewSecret, SecretRow},
    schema::{companies as company_table, company_secrets},
    secrets::PLACEHOLDER,
};
use crate::{
    clock::Timestamp,
    long_work::{Large, SHORT, weight_of},
    sealing::{DataKey, HeadKey, OpenError, SealError, head_key_version},
    tenant::Tenant,
};

const LEN: usize = 32 + 16 + 4 * 8;

/// A tenant's head, opened.
struct Head {
    key: Zeroizing<[u8; 32]>,
    sum: u128,
    /// Counts its changes.
    number: i64,
    /// When it began, in milliseconds since 1970.
    since: i64,
    /// When it was last changed; never earlier than before.
    changed_at: i64,
    /// When it was made from existing rows; 0 if it was made before the tenant had rows.
    adopted_at: i64,
}

impl Head {
    fn begin(now: Timestamp) -> Result<Self, SealError> {
        let mut key = Zeroizing::new([0; 32]);
        SysRng.try_fill_bytes(&mut *key).map_err(|_| SealError::NoRandomness)?;
        let now = now.as_millis();
        Ok(Self { key, sum: 0, number: 0, since: now, changed_at: now, adopted_at: 0 })
    }

    fn seal(&self, company: &Company, with: &HeadKey) -> Result<String, SealError> {
        let mut plain = Zeroizing::new([0; LEN]);
        plain[..32].copy_from_slice(&*self.key);
        plain[32..48].copy_from_slice(&self.sum.to_be_bytes());
        let numbers = [self.number, self.since, self.changed_at, self.adopted_at];
        for (place, number) in plain[48..].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_be_bytes());
        }
        with.seal(&*plain, &bound_to(company, &shredded_at(company)))
    }

    fn open(text: &str, company: &Company, with: &HeadKey) -> Result<Self, OpenError> {
        let plain = with.open(text, &bound_to(company, &shredded_at(company)))?;
        let plain: &[u8; LEN] = plain.as_slice().try_into().map_err(|_| OpenError::Malformed)?;
        let (mut key, mut sum) = (Zeroizing::new([0; 32]), [0; 16]);
        key.copy_from_slice(&plain[..32]);
        sum.copy_from_slice(&plain[32..48]);
        let number = |place: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&plain[48 + 8 * place..56 + 8 * place]);
            i64::from_be_bytes(bytes)
        };
        let [counted, since, changed_at, adopted_at] = std::array::from_fn(number);
        Ok(Self { key, sum: u128::from_be_bytes(sum), number: counted, since, changed_at, adopted_at })
    }

    fn changed(&mut self, now: Timestamp) {
        self.number += 1;
        self.changed_at = self.changed_at.max(now.as_millis());
    }

    /// The pseudorandom function that gives each row its part of the sum.
    fn parts(&self) -> Parts {
        Parts(Hmac::<Sha256>::new_from_slice(&*self.key).expect("HMAC takes a key of any length"))
    }
}

struct Parts(Hmac<Sha256>);

impl Parts {
    fn of(&self, row: &Element<'_>) -> u128 {
        let mut mac = self.0.clone();
        mac.update(&row.version.to_be_bytes());
        mac.update(&[u8::from(row.has_value)]);
        mac.update(&(row.source.len() as u64).to_be_bytes());
        mac.update(row.source.as_bytes());
        mac.update(row.key.as_bytes());
        let mut part = [0; 16];
        part.copy_from_slice(&mac.finalize().into_bytes()[..16]);
        u128::from_be_bytes(part)
    }

    fn sum(&self, rows: &[Element<'_>]) -> u128 {
        rows.iter().fold(0, |sum: u128, row| sum.wrapping_add(self.of(row)))
    }
}

fn bound_to<'b>(company: &'b Company, shredded_at: &'b [u8; 8]) -> [&'b [u8]; 3] {
    [company.id.as_bytes(), company.tenant.as_str().as_bytes(), shredded_at]
}

fn shredded_at(company: &Company) -> [u8; 8] {
    company.shredded_at.unwrap_or(i64::MIN).to_be_bytes()
}

/// A newest version, as the sum counts it.
#[derive(Debug, Clone)]
struct Element<'r> {
    key: Cow<'r, str>,
    version: i64,
    source: Cow<'r, str>,
    has_value: bool,
}

impl<'r> Element<'r> {
    /// `None` for a placeholder row, which stands for a version that nobody has seen.
    fn of(row: &'r SecretRow) -> Option<Self> {
        let (key, source) = (row.key.as_str().into(), row.source.as_str().into());
        let element = Self { key, version: row.version, source, has_value: row.sealed.is_some() };
        (!row.is_forgotten()).then_some(element)
    }

    fn owned(self) -> Element<'static> {
        Element { key: self.key.into_owned().into(), source: self.source.into_owned().into(), ..self }
    }
}

/// All of a tenant's newest versions.
pub(super) struct Newest<'r> {
    elements: Vec<Element<'r>>,
    /// Whether a program that knows no heads wrote one of them.
    has_uncounted: bool,
}

impl<'r> Newest<'r> {
    pub(super) fn of(rows: &'r [SecretRow]) -> Self {
        let has_uncounted = rows.iter().any(|row| !row.is_forgotten() && row.counted != Some(true));
        Self { elements: rows.iter().filter_map(Element::of).collect(), has_uncounted }
    }
}

impl Newest<'static> {
    /// Reads them without their values.
    async fn read(call: &mut Call<'_>, company: &str) -> Result<Self, StoreError> {
        let rows = company_secrets::table
            .filter(company_secrets::company_id.eq(company.to_owned()))
            .filter(company_secrets::superseded_at.is_null())
            .filter(company_secrets::source.ne(PLACEHOLDER))
            .select((
                company_secrets::secret_key,
                company_secrets::version,
                company_secrets::source,
                company_secrets::secret_value_encrypted.is_not_null(),
                company_secrets::counted,
            ));
        let rows: Vec<(String, i64, String, bool, Option<bool>)> = call.load(rows).await?;
        let has_uncounted = rows.iter().any(|(.., counted)| *counted != Some(true));
        let element = |(key, version, source, has_value, _): (String, i64, String, bool, Option<bool>)| Element {
            key: key.into(),
            version,
            source: source.into(),
            has_value,
        };
        Ok(Self { elements: rows.into_iter().map(element).collect(), has_uncounted })
    }
}

/// The changes of a write to one tenant's newest versions. The tenant is locked.
pub(super) struct Touched {
    company: Company,
    /// The data keys, as far as they are available.
    chain: Chain,
    /// The data key that seals the written values.
    sealing: Option<Arc<DataKey>>,
    /// Whether the tenant never had a data key, and so has no secret.
    is_new: bool,
    gone: Vec<Element<'static>>,
    made: Vec<Element<'static>>,
    /// Whether a replaced row was written by a program that knows no heads.
    meets_uncounted: bool,
}

impl Touched {
    pub(super) fn new(company: &Company) -> Self {
        Self {
            company: company.clone(),
            chain: Chain::new(),
            sealing: None,
            is_new: false,
            gone: Vec::new(),
            made: Vec::new(),
            meets_uncounted: false,
        }
    }

    /// Sets all data keys that the tenant had before, and the one that seals the written values.
    pub(super) fn with_keys(&mut self, chain: Chain, sealing: Option<Arc<DataKey>>) {
        self.is_new = chain.is_empty();
        (self.chain, self.sealing) = (chain, sealing);
    }

    pub(super) fn goes(&mut self, row: &SecretRow) {
        if let Some(element) = Element::of(row) {
            self.meets_uncounted |= row.counted != Some(true);
            self.gone.push(element.owned());
        }
    }

    pub(super) fn comes(&mut self, new: &NewSecret) {
        if new.source != PLACEHOLDER {
            self.made.push(Element {
                key: new.secret_key.clone().into(),
                version: new.version,
                source: new.source.into(),
                has_value: new.secret_value_encrypted.is_some(),
            });
        }
    }
}

/// Heads to be written, by company; `None` removes a head.
pub(super) type NewHeads = BTreeMap<String, Option<String>>;

/// How a tenant's rows compare with its head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// They are the rows that were left there.
    Sound,
    /// There is no head yet.
    Unsealed,
    /// An older version of this program has written here since.
    Stale,
    /// A master key is missing, so the head does not open; nor do the values.
    Unknown,
    /// They are not the rows that were left there.
    SetBack,
}

/// The times in a head, for its tenant's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadTimes {
    /// When it began.
    pub since: Timestamp,
    /// When it was last changed.
    pub changed_at: Timestamp,
}

/// A verified tenant.
#[derive(Debug)]
pub struct VerifiedTenant {
    /// The tenant.
    pub tenant: Tenant,
    /// How its rows compare with its head.
    pub verdict: Verdict,
    /// The head's times, where it opens.
    pub times: Option<HeadTimes>,
    /// When it was last shredded: proved by the head, where that opens.
    pub shredded_at: Option<Timestamp>,
    /// Whether it has any secret, or the mark of a deletion.
    pub has_rows: bool,
}

/// The number of tenants whose newest versions are read at once.
const AT_ONCE: i64 = 100;

/// The result of `keys seal` for some tenants.
#[derive(Debug, Default)]
pub struct SealedTenants {
    /// Tenants that have a head now, and had none that fitted before.
    pub sealed: usize,
    /// Tenants that stay as they are, because their rows are not those that were left there.
    pub set_back: Vec<Tenant>,
    /// Tenants whose data key does not open.
    pub unreadable: Vec<Tenant>,
    /// Where the next batch begins; `None` if this was the last.
    pub after: Option<String>,
}

impl Database {
    /// The new heads of the tenants that are written to. Where a tenant keeps a head, its new rows
    /// are marked as counted.
    pub(super) async fn heads_of(
        &self,
        call: &mut Call<'_>,
        touched: BTreeMap<String, Touched>,
        rows: &mut [NewSecret],
        now: Timestamp,
    ) -> Result<NewHeads, StoreError> {
        let mut heads = NewHeads::new();
        for (id, touched) in touched {
            if touched.gone.is_empty() && touched.made.is_empty() {
                continue;
            }
            match self.next_head(call, &touched, now).await? {
                Next::Is(text) => {
                    for row in rows.iter_mut().filter(|row| row.company_id == id) {
                        row.counted = Some(true);
                    }
                    heads.insert(id, Some(text));
                }
                Next::Ends => {
                    heads.insert(id, None);
                }
                Next::Stays => {}
            }
        }
        Ok(heads)
    }

    async fn next_head(&self, call: &mut Call<'_>, touched: &Touched, now: Timestamp) -> Result<Next, StoreError> {
        let Touched { company, chain, sealing, is_new, gone, made, meets_uncounted } = touched;
        let (mut head, opened_with) = match &company.head {
            // A tenant without a data key has no secret.
            None if *is_new => (Head::begin(now)?, None),
            None => return Ok(Next::Stays),
            // An older version shredded the tenant and left the old head, while the tenant began
            // anew.
            Some(_) if *is_new && !self.needs_seals() => (Head::begin(now)?, None),
            Some(text) => match self.open_head(call, company, chain, text).await? {
                Ok((head, key)) => (head, Some(key)),
                Err(OpenError::UnknownDataKey(_) | OpenError::Forged | OpenError::Malformed) if !self.needs_seals() => {
                    return Ok(Next::Ends);
                }
                Err(OpenError::UnknownMasterKey(_) | OpenError::NoMasterKey) => return Ok(Next::Stays),
                Err(reason) => {
                    self.tell_set_back(&company.tenant, &reason);
                    return Ok(Next::Stays);
                }
            },
        };
        if *meets_uncounted && head.adopted_at == 0 && !self.needs_seals() {
            return Ok(Next::Ends);
        }
        let parts = head.parts();
        head.sum = head.sum.wrapping_sub(parts.sum(gone)).wrapping_add(parts.sum(made));
        head.changed(now);
        // Usually this is the key that opened the head, which is derived already.
        let key = match (sealing, opened_with) {
            (Some(key), Some(opened_with)) if key.version() == opened_with.version() => opened_with,
            (Some(key), _) => key.head_key(),
            (None, Some(opened_with)) => opened_with,
            (None, None) => return Ok(Next::Stays),
        };
        Ok(Next::Is(head.seal(company, &key)?))
    }

    async fn open_head(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        chain: &Chain,
        text: &str,
    ) -> Result<Result<(Head, HeadKey), OpenError>, StoreError> {
        let number = match head_key_version(text) {
            Ok(number) => number,
            Err(reason) => return Ok(Err(reason)),
        };
        let key = match chain.get(&number) {
            Some(key) => key.clone(),
            None => self.data_key(call, company, number).await?,
        };
        let key = key.map(|key| key.head_key());
        Ok(key.and_then(|key| Ok((Head::open(text, company, &key)?, key))))
    }

    /// Seals a head with the newest data key, so that the one before can be destroyed.
    pub(super) async fn reseal_head(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        chain: &Chain,
    ) -> Result<(), StoreError> {
        let (Some(text), Some((newest, Ok(key)))) = (&company.head, chain.last_key_value()) else { return Ok(()) };
        if head_key_version(text) == Ok(*newest) {
            return Ok(());
        }
        if let Ok((head, _)) = self.open_head(call, company, chain, text).await? {
            let heads = NewHeads::from([(company.id.clone(), Some(head.seal(company, &key.head_key())?))]);
            keep(call, &heads).await?;
        }
        Ok(())
    }

    /// Whether these rows, all of a tenant's, are those that were left there. `complete` says
    /// whether every tenant has a head.
    fn verdict(complete: bool, company: &Company, rows: &Newest<'_>, chain: &Chain) -> (Verdict, Option<HeadTimes>) {
        let excused = |excuse| if complete { Verdict::SetBack } else { excuse };
        let Some(text) = &company.head else {
            let is_empty = rows.elements.is_empty();
            return (if is_empty { Verdict::Sound } else { excused(Verdict::Unsealed) }, None);
        };
        let opened = head_key_version(text).and_then(|number| {
            let key = chain.get(&number).ok_or(OpenError::UnknownDataKey(number))?;
            Head::open(text, company, &key.as_ref().map_err(|reason| *reason)?.head_key())
        });
        let head = match opened {
            Ok(head) => head,
            Err(OpenError::UnknownMasterKey(_) | OpenError::NoMasterKey) => return (Verdict::Unknown, None),
            Err(_) => return (excused(Verdict::Stale), None),
        };
        let times = HeadTimes {
            since: Timestamp::from_millis(head.since),
            changed_at: Timestamp::from_millis(head.changed_at),
        };
        let verdict = match head.parts().sum(&rows.elements) == head.sum {
            true => Verdict::Sound,
            false if head.adopted_at != 0 || rows.has_uncounted => excused(Verdict::Stale),
            false => Verdict::SetBack,
        };
        (verdict, Some(times))
    }

    /// Compares these rows, all of a tenant's, with its head. Returns the rows too.
    pub(super) async fn verdict_of(
        &self,
        company: &Company,
        rows: Vec<SecretRow>,
        chain: &Chain,
    ) -> (Verdict, Large<Vec<SecretRow>>) {
        let (complete, rows) = (self.needs_seals(), self.large_rows(rows));
        // The cost depends on the number of rows, not on their values.
        if weight_of(rows.iter(), |_| 0) <= SHORT {
            return (Self::verdict(complete, company, &Newest::of(&rows), chain).0, rows);
        }
        let (company, chain) = (company.clone(), chain.clone());
        self.work.run(move || (Self::verdict(complete, &company, &Newest::of(&rows), &chain).0, rows)).await
    }

    /// Counts the verdict, and refuses rows that are not those that were left there.
    pub(super) fn accept(&self, company: &Company, verdict: Verdict) -> Result<(), StoreError> {
        let count = |state| self.calls.metrics.count("secretier_tenants_read_total", &[("seal", state)]);
        match verdict {
            Verdict::Sound => count("sound"),
            Verdict::Unknown => count("unknown"),
            Verdict::Unsealed => count("none"),
            Verdict::Stale => count("stale"),
            Verdict::SetBack => {
                count("set_back");
                self.tell_set_back(&company.tenant, &"its secrets are not those that were left there");
                return Err(StoreError::Seals(format!(
                    "the secrets of {} are not those that were left in the database: an older version was put back, or \
                     one was taken away; 'secretier audit verify' tells more",
                    company.tenant
                )));
            }
        }
        Ok(())
    }

    fn tell_set_back(&self, tenant: &Tenant, reason: &dyn std::fmt::Display) {
        if let Some(others) = self.seals.tampered.may_say() {
            tracing::error!(%tenant, %reason, others, "somebody without a data key changed a tenant's rows");
        }
    }

    /// Verifies the next tenants, in the order of their ids; also returns where the tenants after
    /// them begin. A tenant that is written to meanwhile is read again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn verify_tenants(
        &self,
        after: Option<&str>,
    ) -> Result<(Vec<VerifiedTenant>, Option<String>), StoreError> {
        let mut call = self.calls.read("verify_tenants").await?;
        let companies = next_companies(&mut call, after).await?;
        let mut verified = Vec::with_capacity(companies.len());
        for company in &companies {
            let mut seen = company.clone();
            // Rows and head are read one after the other: if the head has changed in between, both
            // are read again.
            let (rows, chain, now) = loop {
                let rows = Newest::read(&mut call, &seen.id).await?;
                let chain = self.chain(&mut call, &seen).await?;
                match companies::find(&mut call, &seen.tenant).await? {
                    Some(now) if now.id == seen.id && now.head == seen.head => break (rows, chain, Some(now)),
                    Some(now) => seen = now,
                    None => break (rows, chain, None),
                }
            };
            let Some(now) = now else { continue };
            let (verdict, times) = Self::verdict(self.needs_seals(), &now, &rows, &chain);
            let has_rows = !rows.elements.is_empty();
            let shredded_at = now.shredded_at.map(Timestamp::from_millis);
            verified.push(VerifiedTenant { tenant: now.tenant, verdict, times, shredded_at, has_rows });
        }
        call.done();
        let last = companies.last().filter(|_| companies.len() as i64 == AT_ONCE);
        Ok((verified, last.map(|company| company.id.clone())))
    }

    /// Gives heads to the next tenants that have none, from their rows as they are. A tenant whose
    /// rows are not those that were left there stays as it is, unless it is among `accepted`.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing of these has changed.
    pub async fn seal_tenants(
        &self,
        lock: &JobLock,
        after: Option<&str>,
        accepted: &[Tenant],
    ) -> Result<SealedTenants, StoreError> {
        let mut call = self.calls.write_within("seal_tenants", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
        let companies = next_companies(&mut call, after).await?;
        let last = companies.last().filter(|_| companies.len() as i64 == AT_ONCE).map(|company| company.id.clone());
        let mut outcome = SealedTenants { after: last, ..SealedTenants::default() };
        let now = self.clock.now();
        let mut tenants: Vec<&Tenant> = companies.iter().map(|company| &company.tenant).collect();
        tenants.sort();
        let locked = companies::lock_all(&mut call, &tenants, now, Purpose::Look).await?;
        let mut heads = NewHeads::new();
        for (company, made) in &locked {
            if *made {
                companies::remove(&mut call, company).await?;
                continue;
            }
            let rows = Newest::read(&mut call, &company.id).await?;
            let chain = self.chain(&mut call, company).await?;
            let accepts = accepted.contains(&company.tenant);
            match Self::verdict(self.needs_seals(), company, &rows, &chain).0 {
                Verdict::Sound => continue,
                Verdict::Unsealed | Verdict::Stale => {}
                Verdict::SetBack if accepts => {}
                Verdict::SetBack => {
                    outcome.set_back.push(company.tenant.clone());
                    continue;
                }
                Verdict::Unknown => {
                    outcome.unreadable.push(company.tenant.clone());
                    continue;
                }
            }
            let Some((_, Ok(key))) = chain.last_key_value() else {
                outcome.unreadable.push(company.tenant.clone());
                continue;
            };
            let mut head = Head::begin(now)?;
            head.sum = head.parts().sum(&rows.elements);
            head.adopted_at = now.as_millis();
            heads.insert(company.id.clone(), Some(head.seal(company, &key.head_key())?));
        }
        outcome.sealed = heads.len();
        self.check(&mut call, lock).await?;
        if heads.is_empty() {
            call.roll_back().await?;
        } else {
            keep(&mut call, &heads).await?;
            call.commit().await?;
        }
        Ok(outcome)
    }
}

/// The next state of a head.
enum Next {
    /// It becomes this one.
    Is(String),
    /// It is removed: its correct value cannot be known.
    Ends,
    /// It stays as it is.
    Stays,
}

/// Writes heads.
pub(super) async fn keep(call: &mut Call<'_>, heads: &NewHeads) -> Result<(), StoreError> {
    let mut heads = heads.clone().into_iter();
    match (heads.next(), heads.len()) {
        (None, _) => Ok(()),
        (Some((id, head)), 0) => {
            let kept = diesel::update(company_table::table.find(id)).set(company_table::head.eq(head));
            call.execute(Prepared(kept)).await.map(drop)
        }
        (Some(first), _) => call.keep_heads(std::iter::once(first).chain(heads).collect()).await,
    }
}

async fn next_companies(call: &mut Call<'_>, after: Option<&str>) -> Result<Vec<Company>, StoreError> {
    let next = company_table::table
        .filter(company_table::id.gt(after.unwrap_or_default().to_owned()))
        .order(company_table::id.asc())
        .limit(AT_ONCE)
        .select(COLUMNS);
    let rows: Vec<CompanyRow> = call.load(next).await?;
    rows.into_iter().map(Company::try_from).collect()
}
