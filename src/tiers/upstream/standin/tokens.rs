//! Identities, their rights, and the access tokens that they log in for.

use std::{collections::VecDeque, fmt, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha2::Sha256;
use uuid::Uuid;

use super::exchange::Reply;
use crate::{clock::Timestamp, infisical::Granted};

/// A machine identity, as it is added to a world.
#[derive(Clone)]
pub struct Identity {
    pub(super) id: Uuid,
    pub(super) client_id: String,
    pub(super) client_secret: String,
    pub(super) rights: Rights,
    ttl: Duration,
    max_ttl: Duration,
    uses: Option<u32>,
}

impl Identity {
    /// An identity with random credentials and the server's defaults: its tokens last 30 days, have
    /// unlimited uses, and cannot be renewed.
    #[must_use]
    pub fn new(rights: Rights) -> Self {
        let month = Duration::from_secs(30 * 24 * 60 * 60);
        Self {
            id: Uuid::new_v4(),
            client_id: Uuid::new_v4().to_string(),
            client_secret: hex::encode(rand::random::<[u8; 32]>()),
            rights,
            ttl: month,
            max_ttl: month,
            uses: None,
        }
    }

    /// With given credentials.
    #[must_use]
    pub fn with_credentials(mut self, client_id: &str, client_secret: &str) -> Self {
        self.client_id = client_id.to_owned();
        self.client_secret = client_secret.to_owned();
        self
    }

    /// Its tokens end this long after login or renewal, and for good after `max_ttl`.
    #[must_use]
    pub fn with_token_ttl(mut self, ttl: Duration, max_ttl: Duration) -> Self {
        (self.ttl, self.max_ttl) = (ttl, max_ttl);
        self
    }

    /// Its tokens are valid for this many requests.
    #[must_use]
    pub fn with_token_uses(mut self, uses: u32) -> Self {
        self.uses = Some(uses);
        self
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("client_id", &self.client_id)
            .field("rights", &self.rights)
            .finish_non_exhaustive()
    }
}

/// The credentials of a client.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// `clientId`.
    pub client_id: String,
    /// `clientSecret`.
    pub client_secret: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("client_id", &self.client_id).finish_non_exhaustive()
    }
}

/// The rights of an identity in the project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rights {
    /// Read and change everything.
    Full,
    /// Read everything, change nothing.
    ReadAll,
    /// Read the places named here, change nothing.
    Read(Vec<Readable>),
    /// A member of the project whose role allows nothing. It still sees the folders.
    NoAccess,
    /// Not a member of the project.
    NotMember,
}

/// A path in an environment. `/tenants/**` means all folders below `/tenants`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readable {
    /// The environment's slug.
    pub environment: String,
    /// The path.
    pub path: String,
}

impl Readable {
    /// This path in this environment.
    #[must_use]
    pub fn new(environment: &str, path: &str) -> Self {
        Self { environment: environment.to_owned(), path: path.to_owned() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Read,
    Create,
    Edit,
    Delete,
}

impl Rights {
    pub(super) fn allow(&self, action: Action, environment: &str, path: &str) -> bool {
        match self {
            Self::Full => true,
            Self::ReadAll => action == Action::Read,
            Self::Read(readable) => {
                action == Action::Read
                    && readable.iter().any(|may| may.environment == environment && matches_path(&may.path, path))
            }
            Self::NoAccess | Self::NotMember => false,
        }
    }
}

fn matches_path(pattern: &str, path: &str) -> bool {
    match pattern.strip_suffix("/**") {
        Some(above) => path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/')),
        None => pattern == path,
    }
}

/// The valid tokens, oldest first, and the key that signs them.
pub(super) struct Tokens {
    key: [u8; 64],
    issued: VecDeque<Token>,
}

struct Token {
    id: Uuid,
    identity: Uuid,
    created: Timestamp,
    renewed: Timestamp,
    uses: u32,
    past_its_ttl: bool,
}

impl Tokens {
    pub(super) fn new() -> Self {
        Self { key: rand::random(), issued: VecDeque::new() }
    }

    /// A new token: a JWT that expires at the identity's maximum.
    pub(super) fn issue(&mut self, identity: &Identity, now: Timestamp) -> String {
        if self.issued.len() >= MOST_TOKENS {
            self.issued.pop_front();
        }
        let id = Uuid::new_v4();
        self.issued.push_back(Token {
            id,
            identity: identity.id,
            created: now,
            renewed: now,
            uses: 0,
            past_its_ttl: false,
        });
        let claims = json!({
            "identityId": identity.id,
            "identityAccessTokenId": id,
            "authTokenType": "identityAccessToken",
            "iat": now.as_millis() / 1000,
            "exp": (now.plus(identity.max_ttl).as_millis() + 999) / 1000,
        });
        let signed = format!("{}.{}", encode(&json!({"alg": "HS256", "typ": "JWT"})), encode(&claims));
        let signature = URL_SAFE_NO_PAD.encode(self.sign(&signed).finalize().into_bytes());
        format!("{signed}.{signature}")
    }

    /// The answer to a login or a renewal.
    pub(super) fn grant(identity: &Identity, token: &str) -> Value {
        json!(Granted {
            access_token: token,
            expires_in: identity.ttl.as_secs(),
            max_ttl: identity.max_ttl.as_secs(),
            token_type: "Bearer".into(),
        })
    }

    /// The identity of this token; counts one use of it.
    pub(super) fn use_up<'a>(
        &mut self,
        token: &str,
        identities: &'a [Identity],
        now: Timestamp,
    ) -> Result<&'a Identity, Reply> {
        let (at, identity) = self.find_live(token, identities, now)?;
        self.issued[at].uses = self.issued[at].uses.saturating_add(1);
        Ok(identity)
    }

    /// Starts the token's TTL anew, unless that would exceed its maximum: then the token is
    /// deleted.
    pub(super) fn renew<'a>(
        &mut self,
        token: &str,
        identities: &'a [Identity],
        now: Timestamp,
    ) -> Result<&'a Identity, Reply> {
        let (at, identity) = self.find_live(token, identities, now)?;
        // Even a renewal in the millisecond of the login is not granted the full maximum.
        let passes = now.plus(identity.ttl) > self.issued[at].created.plus(identity.max_ttl);
        if passes || identity.ttl == identity.max_ttl {
            self.issued.remove(at);
            return Err(refused("Failed to renew MI access token past its Max TTL expiration"));
        }
        self.issued[at].renewed = now;
        Ok(identity)
    }

    pub(super) fn revoke(&mut self, token: &str, now: Timestamp) -> Result<(), Reply> {
        let at = self.find(token, now)?;
        self.issued.remove(at);
        Ok(())
    }

    /// Whether the token verifies, without looking for its row.
    pub(super) fn check(&self, token: &str, now: Timestamp) -> Result<(), Reply> {
        self.verify(token, now).map(drop)
    }

    pub(super) fn revoke_all(&mut self) {
        self.issued.clear();
    }

    pub(super) fn expire_all(&mut self) {
        for token in &mut self.issued {
            token.past_its_ttl = true;
        }
    }

    /// The token's row, and its identity; an expired row is deleted.
    fn find_live<'a>(
        &mut self,
        token: &str,
        identities: &'a [Identity],
        now: Timestamp,
    ) -> Result<(usize, &'a Identity), Reply> {
        let at = self.find(token, now)?;
        let row = &self.issued[at];
        let identity = identities.iter().find(|identity| identity.id == row.identity).ok_or_else(gone)?;
        if identity.uses.is_some_and(|uses| row.uses >= uses) {
            self.issued.remove(at);
            let message = "Unable to renew because access token number of uses limit reached";
            return Err(Reply::error(400, "BadRequest", message));
        }
        if row.past_its_ttl || now >= row.renewed.plus(identity.ttl) {
            self.issued.remove(at);
            return Err(refused("Failed to renew MI access token due to TTL expiration"));
        }
        Ok((at, identity))
    }

    fn find(&self, token: &str, now: Timestamp) -> Result<usize, Reply> {
        let id = self.verify(token, now)?;
        self.issued.iter().position(|row| row.id == id).ok_or_else(gone)
    }

    /// The result of `jsonwebtoken` for a token, with its checks in their order.
    fn verify(&self, token: &str, now: Timestamp) -> Result<Uuid, Reply> {
        if token.is_empty() {
            return Err(broken("jwt must be provided"));
        }
        let [header, claims, signature] = token.split('.').collect::<Vec<_>>()[..] else {
            return Err(broken("jwt malformed"));
        };
        if !decode(header).is_some_and(|header| header.is_object()) {
            return Err(broken("invalid token"));
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).unwrap_or_default();
        if self.sign(&format!("{header}.{claims}")).verify_slice(&signature).is_err() {
            return Err(broken("invalid signature"));
        }
        let claims = decode(claims).unwrap_or_default();
        if claims["exp"].as_i64().is_none_or(|end| now.as_millis() / 1000 >= end) {
            return Err(broken("jwt expired"));
        }
        claims["identityAccessTokenId"].as_str().and_then(|id| id.parse().ok()).ok_or_else(gone)
    }

    fn sign(&self, text: &str) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new(&self.key.into());
        mac.update(text.as_bytes());
        mac
    }
}

/// The answer for a token that was revoked, used up, or never issued.
pub(super) fn gone() -> Reply {
    refused("You are not allowed to access this resource")
}

/// The answer for a token that does not verify.
pub(super) fn broken(message: &str) -> Reply {
    Reply::error(500, "Internal Server Error", message)
}

fn refused(message: &str) -> Reply {
    Reply::error(403, "UnauthorizedError", message)
}

fn encode(part: &Value) -> String {
    URL_SAFE_NO_PAD.encode(part.to_string())
}

fn decode(part: &str) -> Option<Value> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}

const MOST_TOKENS: usize = 10_000;
