//! Logins: access tokens in the form that Infisical's clients know, for our own tokens.
//!
//! An access token is a JWT (RFC 7519, HS256) that names one of our tokens. It gives the rights that
//! this token has at the moment, and none once it is revoked: a request looks the token up as it does
//! for one that is presented itself. The signing key is random, the same for every instance, and lies
//! in the database, sealed: so an access token outlives a restart and is good everywhere.
//!
//! The header of an access token is compared with the one that each known key writes, byte by byte,
//! and is never parsed: no other algorithm, and no key that a caller names, comes into question.

use std::{collections::HashSet, fmt, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::Zeroizing;

use super::{Refused, tokens};
use crate::{clock::Timestamp, tiers::database::LoginKey};

/// The longest access token that is looked at; ours have some 400 bytes.
const LONGEST: usize = 1024;

/// The keys that sign access tokens, and the logins that were ended.
#[derive(Default)]
pub(super) struct Logins {
    /// The newest first: it signs.
    keys: Vec<SigningKey>,
    /// The first parts of what was signed with keys that do not open here.
    unopened: Vec<String>,
    ended: HashSet<String>,
}

struct SigningKey {
    /// The first part of every access token that it signs.
    header: String,
    key: Hmac<Sha256>,
}

/// An access token that was given out.
pub struct Login {
    /// The text. A reviewer should look at every use of it.
    pub access_token: Zeroizing<String>,
    /// For how long it is good.
    pub lasts: Duration,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("lasts", &self.lasts).finish_non_exhaustive()
    }
}

/// The id of a login, and when it began. Renewed access tokens have those of the
/// first: to end one ends all of them, and none lasts longer than the first could have been given.
pub(super) struct Begin {
    id: String,
    at: Timestamp,
}

impl Begin {
    /// A new login.
    pub(super) fn at(now: Timestamp) -> Self {
        Self { id: hex::encode(rand::random::<[u8; 16]>()), at: now }
    }
}

/// A login whose access token was checked, as something remembers it that outlives a request.
#[derive(Debug, Clone)]
pub struct LoginMark {
    id: String,
    ends: Timestamp,
}

/// The claims of an access token, named as Infisical names them.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Claims {
    /// The client id of the token.
    identity_id: String,
    /// The login's own id, by which it can be ended.
    identity_access_token_id: String,
    auth_token_type: String,
    /// Seconds since 1970.
    iat: i64,
    exp: i64,
}

const TOKEN_TYPE: &str = "identityAccessToken";

impl Logins {
    /// `keys` with the newest first, and the ids of the logins that were ended before their time.
    pub(super) fn new(keys: &[LoginKey], unopened: &[String], ended: impl IntoIterator<Item = String>) -> Self {
        Self {
            keys: keys.iter().map(SigningKey::of).collect(),
            unopened: unopened.iter().map(|id| header_of(id)).collect(),
            ended: ended.into_iter().collect(),
        }
    }

    /// Whether there is a key to sign with.
    pub(super) fn can_sign(&self) -> bool {
        !self.keys.is_empty()
    }

    pub(super) fn knows(&self, login: &PresentedLogin<'_>) -> bool {
        self.key_of(login).is_some()
    }

    /// Whether a login says that it was signed with a key that does not open here.
    pub(super) fn awaits_key_of(&self, login: &PresentedLogin<'_>) -> bool {
        self.unopened.iter().any(|header| header == login.header)
    }

    /// A new access token for the token with this id; `None` where there is no key, or where the token
    /// has ended.
    pub(super) fn sign(
        &self,
        token_id: &str,
        ends: Option<Timestamp>,
        lasts: Duration,
        begin: &Begin,
        now: Timestamp,
    ) -> Option<Login> {
        let key = self.keys.first()?;
        let latest = begin.at.plus(lasts);
        let end = ends.map_or(latest, |ends| ends.min(latest));
        let claims = Claims {
            identity_id: tokens::client_id(token_id)?,
            identity_access_token_id: begin.id.clone(),
            auth_token_type: TOKEN_TYPE.to_owned(),
            iat: begin.at.as_millis().div_euclid(1000),
            exp: end.as_millis().div_euclid(1000),
        };
        // Texts and numbers always serialise.
        let claims = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&claims).unwrap_or_default());
        let mut text = Zeroizing::new(String::with_capacity(LONGEST));
        text.push_str(&key.header);
        text.push('.');
        text.push_str(&claims);
        let signature = key.mac(text.as_bytes()).finalize().into_bytes();
        text.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut text);
        Some(Login { access_token: text, lasts: end.since(now) })
    }

    /// Whether a login that was checked before is good still.
    pub(super) fn lasts(&self, login: &LoginMark, now: Timestamp) -> bool {
        now < login.ends && !self.ended.contains(&login.id)
    }

    /// Checks the signature, in constant time, before anything else that it says.
    pub(super) fn check(&self, login: &PresentedLogin<'_>, now: Timestamp) -> Result<(), Refused> {
        let Some(key) = self.key_of(login) else {
            login.opens_nothing();
            return Err(Refused::Invalid);
        };
        key.mac(login.signed).verify_slice(&login.signature).map_err(|_| Refused::Invalid)?;
        if self.ended.contains(&login.claims.identity_access_token_id) || login.claims.auth_token_type != TOKEN_TYPE {
            return Err(Refused::Invalid);
        }
        if now.as_millis().div_euclid(1000) >= login.claims.exp {
            return Err(Refused::Expired);
        }
        Ok(())
    }

    fn key_of(&self, login: &PresentedLogin<'_>) -> Option<&SigningKey> {
        self.keys.iter().find(|key| key.header == login.header)
    }
}

impl SigningKey {
    fn of(key: &LoginKey) -> Self {
        Self { header: header_of(&key.id), key: keyed(key.bytes.as_slice()) }
    }

    fn mac(&self, signed: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.key.clone();
        mac.update(signed);
        mac
    }
}

/// The header of what is signed with the key of this id.
fn header_of(id: &str) -> String {
    #[derive(Serialize)]
    struct Header<'a> {
        alg: &'static str,
        typ: &'static str,
        kid: &'a str,
    }
    // Texts always serialise.
    let header = serde_json::to_vec(&Header { alg: "HS256", typ: "JWT", kid: id });
    URL_SAFE_NO_PAD.encode(header.unwrap_or_default())
}

fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes a key of any length")
}

/// An access token as a request presents it. Nothing that it says is believed before
/// [`Logins::check`].
pub(super) struct PresentedLogin<'a> {
    header: &'a str,
    /// The header and the claims, as they were signed.
    signed: &'a [u8],
    signature: Vec<u8>,
    claims: Claims,
    token_id: String,
}

impl<'a> PresentedLogin<'a> {
    /// Reads a text of an access token's form.
    pub(super) fn parse(text: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= LONGEST && text.starts_with("eyJ"))?;
        let (signed, signature) = text.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let claims: Claims = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
        let token_id = tokens::token_id(&claims.identity_id)?;
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        Some(Self { header, signed: signed.as_bytes(), signature, claims, token_id })
    }

    pub(super) fn token_id(&self) -> &str {
        &self.token_id
    }

    /// The login's own id.
    pub(super) fn id(&self) -> &str {
        &self.claims.identity_access_token_id
    }

    /// When it ends by itself.
    pub(super) fn ends(&self) -> Timestamp {
        Timestamp::from_millis(self.claims.exp.saturating_mul(1000))
    }

    pub(super) fn begin(&self) -> Begin {
        Begin { id: self.id().to_owned(), at: Timestamp::from_millis(self.claims.iat.saturating_mul(1000)) }
    }

    pub(super) fn mark(&self) -> LoginMark {
        LoginMark { id: self.id().to_owned(), ends: self.ends() }
    }

    /// Takes as long as a check that fails.
    pub(super) fn opens_nothing(&self) {
        let mut mac = keyed(&[0; 32]);
        mac.update(self.signed);
        std::hint::black_box(mac.verify_slice(&self.signature).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_700_000_000_000);
    const HOUR: Duration = Duration::from_secs(3600);
    const ID: &str = "0123456789abcdef";

    fn key(id: &str) -> LoginKey {
        LoginKey { id: id.to_owned(), bytes: Zeroizing::new(rand::random()) }
    }

    fn parsed(text: &str) -> Option<PresentedLogin<'_>> {
        PresentedLogin::parse(text.as_bytes())
    }

    #[test]
    fn an_access_token_is_good_for_its_token_until_it_ends() {
        let (old, new) = (key("a"), key("b"));
        let before = Logins::new(std::slice::from_ref(&old), &[], []);
        let login = before.sign(ID, None, HOUR, &Begin::at(NOW), NOW).unwrap();
        let presented = parsed(&login.access_token).unwrap();
        assert_eq!((presented.token_id(), login.lasts), (ID, HOUR));
        assert_eq!(before.check(&presented, NOW), Ok(()));
        assert_eq!(before.check(&presented, NOW.plus(HOUR)), Err(Refused::Expired));
        let after = Logins::new(&[new, old], &[], []);
        assert_eq!(after.check(&presented, NOW), Ok(()), "the key before is known as long as it is needed");
        let ended = Logins::new(&[key("a")], &[], []);
        assert!(ended.knows(&presented) && ended.check(&presented, NOW) == Err(Refused::Invalid), "another key");
        let sealed_away = Logins::new(&[key("b")], &["a".to_owned()], []);
        assert!(sealed_away.awaits_key_of(&presented) && !after.awaits_key_of(&presented));
        let none = Logins::default();
        assert!(!none.knows(&presented) && none.check(&presented, NOW).is_err() && !none.can_sign());
        assert!(!format!("{login:?}").contains(login.access_token.as_str()));
        assert!(!login.access_token.starts_with("st."));
    }

    #[test]
    fn it_lasts_no_longer_than_its_token() {
        let logins = Logins::new(&[key("a")], &[], []);
        let login = logins.sign(ID, Some(NOW.plus(HOUR / 2)), HOUR, &Begin::at(NOW), NOW).unwrap();
        assert_eq!(login.lasts, HOUR / 2);
    }

    #[test]
    fn a_login_that_was_ended_is_refused_and_its_neighbour_is_not() {
        let signing = key("a");
        let logins = Logins::new(std::slice::from_ref(&signing), &[], []);
        let (one, other) = (
            logins.sign(ID, None, HOUR, &Begin::at(NOW), NOW).unwrap(),
            logins.sign(ID, None, HOUR, &Begin::at(NOW), NOW).unwrap(),
        );
        let (one, other) = (parsed(&one.access_token).unwrap(), parsed(&other.access_token).unwrap());
        let logins = Logins::new(&[signing], &[], [one.id().to_owned()]);
        assert_eq!(logins.check(&one, NOW), Err(Refused::Invalid));
        assert_eq!(logins.check(&other, NOW), Ok(()));
    }

    #[test]
    fn whatever_was_changed_in_it_does_not_pass() {
        let logins = Logins::new(&[key("a")], &[], []);
        let login = logins.sign(ID, None, HOUR, &Begin::at(NOW), NOW).unwrap();
        let parts: Vec<&str> = login.access_token.split('.').collect();
        let header = |alg: &str| URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"{alg}","typ":"JWT","kid":"a"}}"#));
        assert_eq!(header("HS256"), parts[0]);
        let claims = String::from_utf8(URL_SAFE_NO_PAD.decode(parts[1]).unwrap()).unwrap();
        let longer = URL_SAFE_NO_PAD.encode(claims.replace("\"exp\":17", "\"exp\":27"));
        for text in [
            format!("{}.{}.", parts[0], parts[1]),
            format!("{}.{}.{}", header("none"), parts[1], ""),
            format!("{}.{}.{}", header("none"), parts[1], parts[2]),
            format!("{}.{longer}.{}", parts[0], parts[2]),
            format!("{}.{}.{}", parts[0], parts[1], URL_SAFE_NO_PAD.encode([0; 32])),
            format!("{}.{}", parts[0], parts[1]),
            format!("{}.{}.{}.x", parts[0], parts[1], parts[2]),
            "eyJ.eyJ.eyJ".to_owned(),
            "st.abc.def".to_owned(),
        ] {
            let passes = parsed(&text).is_some_and(|presented| logins.check(&presented, NOW).is_ok());
            assert!(!passes, "{text}");
        }
        let (last, rest) = login.access_token.as_bytes().split_last().unwrap();
        let other = if *last == b'A' { b'E' } else { b'A' };
        let text = String::from_utf8([rest, &[other]].concat()).unwrap();
        assert!(parsed(&text).is_none_or(|presented| logins.check(&presented, NOW).is_err()));
    }
}
