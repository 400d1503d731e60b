//! The keys that sign access tokens, and the logins that were ended before their time.
//!
//! The keys are random, and lie sealed in one row of `settings`, each under a key that is derived from
//! a master key for this purpose alone. `keys rotate` seals them anew; with new data keys it also draws
//! a new one, which signs from then on. An older key is kept for as long as an access token that it has
//! signed may be good.

use std::{fmt, time::Duration};

use diesel::{ExpressionMethods as _, QueryDsl as _, dsl::count_star};
use rand::{TryRng as _, rngs::SysRng};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{
    Database, JobLock,
    calls::Call,
    changes::Change,
    error::StoreError,
    schema::{ended_logins, settings},
};
use crate::{
    clock::Timestamp,
    sealing::{KeyPurpose, KeyRing, MasterKey, MasterKeyId, SealError},
};

/// The longest that an access token may be good.
pub const LONGEST_LOGIN: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The most logins of one token that were ended and would not have ended by themselves yet.
const MOST_ENDED: i64 = 5_000;

const KEYS: &str = "login_keys";

/// A key that signs access tokens. Wiped on drop.
#[derive(Clone)]
pub struct LoginKey {
    /// Its id, which is no secret.
    pub id: String,
    /// The key.
    pub bytes: Zeroizing<[u8; 32]>,
}

impl fmt::Debug for LoginKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoginKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What is known of logins.
#[derive(Debug, Default)]
pub struct KnownLogins {
    /// The keys that can be opened here, the newest first.
    pub keys: Vec<LoginKey>,
    /// The ids of those that cannot, for want of their master key.
    pub unopened: Vec<String>,
    /// The ids of the logins that were ended.
    pub ended: Vec<String>,
}

/// A key as the row holds it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Sealed {
    id: String,
    master_key: String,
    /// In hex, sealed.
    key: String,
    /// Since when another one signs, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    replaced_at: Option<i64>,
}

impl Sealed {
    fn of(key: &LoginKey, master: &MasterKey, environment: &str, replaced_at: Option<i64>) -> Result<Self, SealError> {
        let text = Zeroizing::new(hex::encode(key.bytes.as_slice()));
        let sealed = master.derive(KeyPurpose::Login).seal(&text, &bound_to(environment, &key.id))?;
        Ok(Self { id: key.id.clone(), master_key: master.id().to_string(), key: sealed, replaced_at })
    }

    fn master_key(&self) -> Option<MasterKeyId> {
        self.master_key.parse().ok()
    }

    fn open(&self, ring: &KeyRing, environment: &str) -> Option<LoginKey> {
        let master = ring.find(self.master_key()?)?;
        let text = master.derive(KeyPurpose::Login).open(&self.key, &bound_to(environment, &self.id)).ok()?;
        let mut bytes = Zeroizing::new([0; 32]);
        hex::decode_to_slice(text.as_bytes(), bytes.as_mut_slice()).ok()?;
        Some(LoginKey { id: self.id.clone(), bytes })
    }
}

fn bound_to<'a>(environment: &'a str, id: &'a str) -> [&'a [u8]; 3] {
    [b"login key", environment.as_bytes(), id.as_bytes()]
}

fn draw() -> Result<LoginKey, SealError> {
    let mut bytes = Zeroizing::new([0; 32]);
    SysRng.try_fill_bytes(bytes.as_mut_slice()).map_err(|_| SealError::NoRandomness)?;
    Ok(LoginKey { id: hex::encode(rand::random::<[u8; 8]>()), bytes })
}

impl Database {
    /// The keys, and the logins that were ended.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn known_logins(&self) -> Result<KnownLogins, StoreError> {
        let mut call = self.calls.read("known_logins").await?;
        let sealed = read_keys(&mut call).await?;
        let now = self.clock.now().as_millis();
        let ended = ended_logins::table.filter(ended_logins::until.gt(now)).select(ended_logins::id);
        let ended = call.load(ended).await?;
        call.done();
        let keys = self.open_login_keys(&sealed).await;
        let is_open = |id: &String| keys.iter().any(|key| key.id == *id);
        let unopened = sealed.into_iter().map(|sealed| sealed.id).filter(|id| !is_open(id)).collect();
        Ok(KnownLogins { keys, unopened, ended })
    }

    /// Keys that do not open are left out, and logged.
    async fn open_login_keys(&self, sealed: &[Sealed]) -> Vec<LoginKey> {
        let mut keys = Vec::new();
        for sealed in sealed {
            let mut key = sealed.open(&self.keys.ring(), self.environment());
            if key.is_none()
                && let Some(missing) = sealed.master_key().filter(|id| self.keys.ring().find(*id).is_none())
                && !self.keys.ring().is_empty()
                && self.keys.look_for(missing).await
            {
                key = sealed.open(&self.keys.ring(), self.environment());
            }
            if key.is_none() {
                tracing::warn!(key = sealed.id, master_key = sealed.master_key, "a key of access tokens does not open");
            }
            keys.extend(key);
        }
        keys
    }

    /// Makes a key, where there is none that opens here.
    ///
    /// # Errors
    /// [`StoreError`]; also where no master key is known to seal it with.
    pub async fn ensure_login_key(&self) -> Result<(), StoreError> {
        self.calls.repeated(|| self.ensure_login_key_once()).await
    }

    async fn ensure_login_key_once(&self) -> Result<(), StoreError> {
        let mut call = self.calls.write("ensure_login_key").await?;
        lock_keys(&mut call).await?;
        let (mut keys, ring) = (read_keys(&mut call).await?, self.keys.ring());
        if keys.iter().any(|sealed| sealed.open(&ring, self.environment()).is_some()) {
            return call.roll_back().await;
        }
        call.share_rotations().await?;
        let master = self.wrapping_key(&mut call).await?;
        // Those that are here are of a master key that others may have, or that is lost.
        let now = self.clock.now().as_millis();
        keys.iter_mut().for_each(|key| key.replaced_at = key.replaced_at.or(Some(now)));
        keys.insert(0, Sealed::of(&draw()?, &master, self.environment(), None)?);
        keep_keys(&mut call, &keys).await?;
        self.raise(&mut call, Change::Tokens).await?;
        call.commit().await
    }

    /// Seals the keys with this master key, and draws a new one where `anew` says so and none was drawn
    /// since. Returns how many were sealed anew; a key that does not open stays as it is.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn reseal_login_keys(
        &self,
        lock: &JobLock,
        target: &MasterKey,
        anew: Option<Timestamp>,
    ) -> Result<usize, StoreError> {
        self.calls.repeated(|| self.reseal_login_keys_once(lock, target, anew)).await
    }

    async fn reseal_login_keys_once(
        &self,
        lock: &JobLock,
        target: &MasterKey,
        anew: Option<Timestamp>,
    ) -> Result<usize, StoreError> {
        let mut call = self.calls.write("reseal_login_keys").await?;
        lock_keys(&mut call).await?;
        let before = read_keys(&mut call).await?;
        let (ring, now) = (self.keys.ring(), self.clock.now().as_millis());
        let (mut keys, mut done) = (Vec::new(), 0);
        for sealed in &before {
            let opened = sealed.open(&ring, self.environment()).filter(|_| sealed.master_key() != Some(target.id()));
            match opened {
                Some(key) => {
                    keys.push(Sealed::of(&key, target, self.environment(), sealed.replaced_at)?);
                    done += 1;
                }
                None => keys.push(sealed.clone()),
            }
        }
        if let Some(since) = anew
            && let Some(newest) = keys.first_mut()
            // The same rotation may be continued.
            && !before.iter().any(|key| key.replaced_at.is_some_and(|at| at >= since.as_millis()))
        {
            newest.replaced_at = Some(now.max(since.as_millis()));
            keys.insert(0, Sealed::of(&draw()?, target, self.environment(), None)?);
        }
        let longest = i64::try_from(LONGEST_LOGIN.as_millis()).unwrap_or(i64::MAX);
        keys.retain(|key| key.replaced_at.is_none_or(|at| now.saturating_sub(at) < longest));
        if keys == before {
            call.roll_back().await?;
            return Ok(0);
        }
        keep_keys(&mut call, &keys).await?;
        self.check(&mut call, lock).await?;
        self.raise(&mut call, Change::Tokens).await?;
        call.commit().await?;
        Ok(done)
    }

    /// Ends a login of this token before its time, on every instance. `false` where so many of the
    /// token's were ended that one more is not taken.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn end_login(&self, id: &str, token_id: &str, until: Timestamp) -> Result<bool, StoreError> {
        self.calls.repeated(|| self.end_login_once(id, token_id, until)).await
    }

    async fn end_login_once(&self, id: &str, token_id: &str, until: Timestamp) -> Result<bool, StoreError> {
        let mut call = self.calls.write("end_login").await?;
        let now = self.clock.now().as_millis();
        call.execute(diesel::delete(ended_logins::table.filter(ended_logins::until.le(now)))).await?;
        let of_the_token = ended_logins::table.filter(ended_logins::token_id.eq(token_id)).select(count_star());
        if call.first::<_, i64>(of_the_token).await?.unwrap_or_default() >= MOST_ENDED {
            call.roll_back().await?;
            return Ok(false);
        }
        let end = diesel::insert_into(ended_logins::table)
            .values((
                ended_logins::id.eq(id),
                ended_logins::token_id.eq(token_id),
                ended_logins::until.eq(until.as_millis()),
            ))
            .on_conflict_do_nothing();
        call.execute(end).await?;
        self.raise(&mut call, Change::Tokens).await?;
        call.commit().await?;
        Ok(true)
    }
}

/// Locks the row until the transaction ends.
async fn lock_keys(call: &mut Call<'_>) -> Result<(), StoreError> {
    let lock = diesel::insert_into(settings::table)
        .values((settings::name.eq(KEYS), settings::value.eq("[]")))
        .on_conflict(settings::name)
        .do_update()
        .set(settings::value.eq(settings::value));
    call.execute(lock).await.map(drop)
}

async fn read_keys(call: &mut Call<'_>) -> Result<Vec<Sealed>, StoreError> {
    let text: Option<String> = call.first(settings::table.find(KEYS).select(settings::value)).await?;
    let read = |text: String| {
        serde_json::from_str(&text).map_err(|_| StoreError::broken("the keys of access tokens cannot be read"))
    };
    text.map_or(Ok(Vec::new()), read)
}

async fn keep_keys(call: &mut Call<'_>, keys: &[Sealed]) -> Result<(), StoreError> {
    let text = serde_json::json!(keys).to_string();
    call.execute(diesel::update(settings::table.find(KEYS)).set(settings::value.eq(text))).await.map(drop)
}
