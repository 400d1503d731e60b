//! Access tokens, as the access layer wants them kept.

use diesel::{BoolExpressionMethods as _, ExpressionMethods as _, QueryDsl as _, Queryable};

use super::{Database, changes, error::StoreError, schema::access_tokens};
use crate::clock::Timestamp;

/// A token's row: what it may do, and a hash to know it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// Its id, part of the token itself.
    pub id: String,
    /// The name people know it by, used once.
    pub name: String,
    /// A hash of its secret part.
    pub hash: [u8; 32],
    /// Globs of tenants.
    pub tenants: Vec<String>,
    /// Globs of secret keys.
    pub keys: Vec<String>,
    /// What it may do there.
    pub actions: Vec<String>,
    /// When it ends, if it does.
    pub expires_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was revoked, if it was.
    pub revoked_at: Option<Timestamp>,
    /// When it was last used, to about a minute.
    pub last_used_at: Option<Timestamp>,
    /// The id of the token that has taken over from it by rotation.
    pub replaced_by: Option<String>,
}

#[derive(Queryable)]
struct Row {
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
}

impl TryFrom<Row> for TokenRow {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let wrong = |column| StoreError::broken(format!("token {}: the column {column} cannot be read", row.id));
        Ok(Self {
            hash: row.hash.try_into().map_err(|_| wrong("hash"))?,
            tenants: serde_json::from_str(&row.tenants).map_err(|_| wrong("tenants"))?,
            keys: serde_json::from_str(&row.keys).map_err(|_| wrong("keys"))?,
            actions: serde_json::from_str(&row.actions).map_err(|_| wrong("actions"))?,
            expires_at: row.expires_at.map(Timestamp::from_millis),
            created_at: Timestamp::from_millis(row.created_at),
            revoked_at: row.revoked_at.map(Timestamp::from_millis),
            last_used_at: row.last_used_at.map(Timestamp::from_millis),
            replaced_by: row.replaced_by,
            id: row.id,
            name: row.name,
        })
    }
}

impl Database {
    /// Every token, revoked and expired ones too, oldest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn tokens(&self) -> Result<Vec<TokenRow>, StoreError> {
        let mut call = self.calls.read("tokens").await?;
        let rows: Vec<Row> =
            call.load(access_tokens::table.order((access_tokens::created_at.asc(), access_tokens::name.asc()))).await?;
        call.done();
        rows.into_iter().map(TokenRow::try_from).collect()
    }

    /// Adds a token.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], and the tier's failures.
    pub async fn insert_token(&self, token: &TokenRow) -> Result<(), StoreError> {
        let mut call = self.calls.write("insert_token").await?;
        let taken = access_tokens::table.filter(access_tokens::name.eq(&token.name)).select(access_tokens::id);
        if call.first::<_, String>(taken).await?.is_some() {
            call.roll_back().await?;
            return Err(StoreError::NameTaken(token.name.clone()));
        }
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
        if call.execute(insert).await? == 0 {
            call.roll_back().await?;
            return Err(StoreError::NameTaken(token.name.clone()));
        }
        changes::raise(&mut call).await?;
        call.commit().await
    }

    /// Revokes a token by its name or id; `false` if there is none, or it is revoked already.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn revoke_token(&self, name_or_id: &str) -> Result<bool, StoreError> {
        let mut call = self.calls.write("revoke_token").await?;
        let token = access_tokens::table
            .filter(access_tokens::name.eq(name_or_id).or(access_tokens::id.eq(name_or_id)))
            .filter(access_tokens::revoked_at.is_null());
        let revoke = diesel::update(token).set(access_tokens::revoked_at.eq(self.clock.now().as_millis()));
        if call.execute(revoke).await? == 0 {
            call.roll_back().await?;
            return Ok(false);
        }
        changes::raise(&mut call).await?;
        call.commit().await?;
        Ok(true)
    }
}
