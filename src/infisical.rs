//! The forms of Infisical's API that several parts write or read: our client of it, and the face that this
//! server shows to its clients.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// The answer to a login, and to its renewal.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Granted<T> {
    /// The access token.
    pub access_token: T,
    /// Seconds that it is good for; 0 where it does not expire.
    #[serde(default)]
    pub expires_in: u64,
    /// Seconds that it can be good for, however often it is renewed.
    #[serde(default, rename = "accessTokenMaxTTL")]
    pub max_ttl: u64,
    /// How it is sent: `Bearer`.
    #[serde(default)]
    pub token_type: Cow<'static, str>,
}

/// The answer to a request that was not done.
#[derive(Serialize)]
pub struct Failure<'a> {
    /// The request's id; there is none for a route that does not exist.
    #[serde(rename = "reqId", skip_serializing_if = "Option::is_none")]
    pub request_id: Option<Cow<'a, str>>,
    /// The HTTP status.
    #[serde(rename = "statusCode")]
    pub status: u16,
    /// What is wrong, for people; always a text.
    pub message: Cow<'a, str>,
    /// The kind of error.
    pub error: Cow<'a, str>,
}

/// A list of secrets.
#[derive(Serialize)]
pub struct Listed<S> {
    /// The secrets of the folder.
    pub secrets: Vec<S>,
    /// The folders that are imported into it.
    pub imports: Vec<()>,
}
