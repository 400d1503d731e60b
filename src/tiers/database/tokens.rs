//! The storage of access tokens, for the access layer.

use diesel::{BoolExpressionMethods as _, ExpressionMethods as _, QueryDsl as _, Queryable};

use super::{Database, calls::Call, changes::Change, error::StoreError, schema::access_tokens};
use crate::clock::Timestamp;

/// A token's row: its rights, and a hash to recognise it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// Its id, part of the token itself.
    pub id: String,
    /// Its name for people, unique except for the tokens that it has replaced.
    pub name: String,
    /// A hash of its secret part.
    pub hash: [u8; 32],
    /// Globs of tenants.
    pub tenants: Vec<String>,
    /// Globs of secret keys.
    pub keys: Vec<String>,
    /// The actions that it allows there.
    pub actions: Vec<String>,
    /// When it expires, if it does.
    pub expires_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was revoked, if it was.
    pub revoked_at: Option<Timestamp>,
    /// When it was last used, to about a minute.
    pub last_used_at: Option<Timestamp>,
    /// The id of the token that has replaced it by rotation.
    pub replaced_by: Option<String>,
}

#[derive(Queryable)]
pub(super) struct Row {
    id: String,
    name: String,
    hash: Vec<u8>,
    tenants: String,
    keys: String,
    actions: String,
    expires_at: Option<i64>,
    created_at: i64,
    revoked_at: Option<i64>,
    last_used_at: Option<i64>,
    replaced_by: Option<String>,
    seal: Option<String>,
}

impl Row {
    /// The row as a token, and its seal.
    pub(super) fn read(self) -> Result<(TokenRow, Option<String>), StoreError> {
        let wrong = |column| StoreError::broken(format!("token {}: the column {column} cannot be read", self.id));
        let token = TokenRow {
            hash: self.hash.try_into().map_err(|_| wrong("hash"))?,
            tenants: serde_json::from_str(&self.tenants).map_err(|_| wrong("tenants"))?,
            keys: serde_json::from_str(&self.keys).map_err(|_| wrong("keys"))?,
            actions: serde_json::from_str(&self.actions).map_err(|_| wrong("actions"))?,
            expires_at: self.expires_at.map(Timestamp::from_millis),
            created_at: Timestamp::from_millis(self.created_at),
            revoked_at: self.revoked_at.map(Timestamp::from_millis),
            last_used_at: self.last_used_at.map(Timestamp::from_millis),
            replaced_by: self.replaced_by,
            id: self.id,
            name: self.name,
        };
        Ok((token, self.seal))
    }
}

impl Database {
    /// Every trusted token, revoked and expired ones too, oldest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn tokens(&self) -> Result<Vec<TokenRow>, StoreError> {
        self.known_tokens().await.map(|known| known.tokens)
    }

    /// Adds a token.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::Seals`], and the database tier's failures.
    pub async fn insert_token(&self, token: &TokenRow) -> Result<(), StoreError> {
        let write = || async {
            let mut call = self.calls.write("insert_token").await?;
            let mut ledger = self.lock_register(&mut call).await?;
            ledger.may_let_in()?;
            let taken = access_tokens::table.filter(access_tokens::name.eq(&token.name)).select(access_tokens::id);
            if call.first::<_, String>(taken).await?.is_some() || !insert(&mut call, token).await? {
                call.roll_back().await?;
                return Err(StoreError::NameTaken(token.name.clone()));
            }
            ledger.seal(&mut call, &token.id).await?;
            ledger.keep(&mut call, self.clock.now()).await?;
            self.raise(&mut call, Change::Tokens).await?;
            call.commit().await
        };
        self.calls.repeated(write).await
    }

    /// Replaces a token by a new one of the same name. The old one ends at `old_ends`, or earlier
    /// if it was to; without `old_ends` it is revoked, so that it depends on no instance's clock.
    /// Does nothing and returns `false` where the old one was revoked or replaced before.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rotate_token(
        &self,
        old: &str,
        old_ends: Option<Timestamp>,
        new: &TokenRow,
    ) -> Result<bool, StoreError> {
        self.calls.repeated(|| self.rotate_token_once(old, old_ends, new)).await
    }

    async fn rotate_token_once(
        &self,
        old: &str,
        old_ends: Option<Timestamp>,
        new: &TokenRow,
    ) -> Result<bool, StoreError> {
        let mut call = self.calls.write("rotate_token").await?;
        let mut ledger = self.lock_register(&mut call).await?;
        ledger.may_let_in()?;
        ledger.check(&mut call, old).await?;
        // If two processes rotate at once, the second waits here for the first, and then finds no
        // row.
        let rotated = access_tokens::table
            .filter(access_tokens::id.eq(old))
            .filter(access_tokens::name.eq(&new.name))
            .filter(access_tokens::revoked_at.is_null())
            .filter(access_tokens::replaced_by.is_null());
        let replace = diesel::update(rotated).set(access_tokens::replaced_by.eq(&new.id));
        if call.execute(replace).await? == 0 {
            call.roll_back().await?;
            return Ok(false);
        }
        match old_ends.map(Timestamp::as_millis) {
            Some(old_ends) => {
                let outlasting = access_tokens::table
                    .filter(access_tokens::id.eq(old))
                    .filter(access_tokens::expires_at.is_null().or(access_tokens::expires_at.gt(old_ends)));
                call.execute(diesel::update(outlasting).set(access_tokens::expires_at.eq(old_ends))).await?;
            }
            None => {
                // The same time as the new token's: it identifies the revocation if the rotation is
                // undone.
                revoke(&mut call, old, new.created_at.as_millis()).await?;
            }
        }
        if !insert(&mut call, new).await? {
            call.roll_back().await?;
            return Err(StoreError::NameTaken(new.name.clone()));
        }
        ledger.seal(&mut call, old).await?;
        ledger.seal(&mut call, &new.id).await?;
        ledger.keep(&mut call, self.clock.now()).await?;
        self.raise(&mut call, Change::Tokens).await?;
        call.commit().await?;
        Ok(true)
    }

    /// Removes a token that nobody was given, as if it had never been made; the token that it
    /// replaced is valid again, as it was then. `false` where there is no such token, or it was
    /// rotated itself.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn take_back_token(&self, id: &str, replaced: Option<&TokenRow>) -> Result<bool, StoreError> {
        self.calls.repeated(|| self.take_back_token_once(id, replaced)).await
    }

    async fn take_back_token_once(&self, id: &str, replaced: Option<&TokenRow>) -> Result<bool, StoreError> {
        let mut call = self.calls.write("take_back_token").await?;
        let mut ledger = self.lock_register(&mut call).await?;
        if let Some(old) = replaced {
            ledger.check(&mut call, &old.id).await?;
        }
        let made = access_tokens::table.filter(access_tokens::id.eq(id)).filter(access_tokens::replaced_by.is_null());
        let made_at: Option<i64> =
            call.first(made.filter(access_tokens::revoked_at.is_null()).select(access_tokens::created_at)).await?;
        if call.execute(diesel::delete(made)).await? == 0 {
            call.roll_back().await?;
            return Ok(false);
        }
        ledger.forget(id);
        if let Some(old) = replaced {
            let old_row =
                access_tokens::table.filter(access_tokens::id.eq(&old.id)).filter(access_tokens::replaced_by.eq(id));
            let before = (
                access_tokens::replaced_by.eq(None::<String>),
                access_tokens::expires_at.eq(old.expires_at.map(Timestamp::as_millis)),
            );
            // If somebody has revoked the old token since, it stays revoked.
            let ended_at_once = old_row.filter(access_tokens::revoked_at.eq(made_at));
            call.execute(diesel::update(ended_at_once).set(access_tokens::revoked_at.eq(None::<i64>))).await?;
            call.execute(diesel::update(old_row).set(before)).await?;
            ledger.seal(&mut call, &old.id).await?;
        }
        ledger.keep(&mut call, self.clock.now()).await?;
        self.raise(&mut call, Change::Tokens).await?;
        call.commit().await?;
        Ok(true)
    }

    /// Revokes every token of a name, or else the one with this id. Returns the number of tokens
    /// that were not revoked before.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn revoke_token(&self, name_or_id: &str) -> Result<usize, StoreError> {
        self.calls.repeated(|| self.revoke_token_once(name_or_id)).await
    }

    async fn revoke_token_once(&self, name_or_id: &str) -> Result<usize, StoreError> {
        let mut call = self.calls.write("revoke_token").await?;
        // The token is revoked even if its seal cannot be written.
        let mut ledger = self.lock_register(&mut call).await?;
        let now = self.clock.now().as_millis();
        let named = access_tokens::table
            .filter(access_tokens::name.eq(name_or_id))
            .filter(access_tokens::revoked_at.is_null())
            .select(access_tokens::id)
            .order(access_tokens::id.asc());
        let mut revoked = Vec::new();
        // Repeated until there is none: this may have waited for a token that was being rotated,
        // and its replacement must be revoked too.
        loop {
            let ids: Vec<String> = call.load(named).await?;
            if ids.is_empty() {
                break;
            }
            // One by one in the order of their ids, as in `note_token_uses`: if two transactions
            // lock the same rows, one waits for the other, and they never wait for each other.
            for id in ids {
                if revoke(&mut call, &id, now).await? {
                    revoked.push(id);
                }
            }
        }
        let of_the_name = access_tokens::table.filter(access_tokens::name.eq(name_or_id)).select(access_tokens::id);
        if call.first::<_, String>(of_the_name).await?.is_none() && revoke(&mut call, name_or_id, now).await? {
            revoked.push(name_or_id.to_owned());
        }
        if revoked.is_empty() {
            call.roll_back().await?;
            return Ok(0);
        }
        for id in &revoked {
            ledger.seal(&mut call, id).await?;
        }
        ledger.keep(&mut call, self.clock.now()).await?;
        self.raise(&mut call, Change::Tokens).await?;
        call.commit().await?;
        Ok(revoked.len())
    }

    /// Notes when tokens were last used. A later use that another instance has noted stays. This is
    /// no change that others have to follow.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn note_token_uses(&self, mut uses: Vec<(String, Timestamp)>) -> Result<(), StoreError> {
        uses.sort_unstable();
        self.calls.repeated(|| self.note_token_uses_once(&uses)).await
    }

    async fn note_token_uses_once(&self, uses: &[(String, Timestamp)]) -> Result<(), StoreError> {
        let mut call = self.calls.write("note_token_uses").await?;
        for (id, at) in uses {
            let at = at.as_millis();
            let token = access_tokens::table
                .filter(access_tokens::id.eq(id))
                .filter(access_tokens::last_used_at.is_null().or(access_tokens::last_used_at.lt(at)));
            call.execute(diesel::update(token).set(access_tokens::last_used_at.eq(at))).await?;
        }
        call.commit().await
    }
}

/// Revokes a token; `false` where it was revoked before.
async fn revoke(call: &mut Call<'_>, id: &str, now: i64) -> Result<bool, StoreError> {
    let token = access_tokens::table.filter(access_tokens::id.eq(id)).filter(access_tokens::revoked_at.is_null());
    Ok(call.execute(diesel::update(token).set(access_tokens::revoked_at.eq(now))).await? > 0)
}

/// Adds a row; `false` where its name is in use.
async fn insert(call: &mut Call<'_>, token: &TokenRow) -> Result<bool, StoreError> {
    let insert = diesel::insert_into(access_tokens::table)
        .values((
            access_tokens::id.eq(&token.id),
            access_tokens::name.eq(&token.name),
            access_tokens::hash.eq(&token.hash[..]),
            access_tokens::tenants.eq(serde_json::json!(token.tenants).to_string()),
            access_tokens::keys.eq(serde_json::json!(token.keys).to_string()),
            access_tokens::actions.eq(serde_json::json!(token.actions).to_string()),
            access_tokens::expires_at.eq(token.expires_at.map(Timestamp::as_millis)),
            access_tokens::created_at.eq(token.created_at.as_millis()),
            access_tokens::revoked_at.eq(token.revoked_at.map(Timestamp::as_millis)),
        ))
        .on_conflict_do_nothing();
    Ok(call.execute(insert).await? > 0)
}
