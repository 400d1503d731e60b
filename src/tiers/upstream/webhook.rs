//! What an upstream can say by itself: that a folder has changed.

use std::fmt;

use crate::{clock::Timestamp, tenant::Tenant};

/// Tells the notices that are meant for this instance.
pub trait Webhook: fmt::Debug + Send + Sync {
    /// The longest body that is looked at, in bytes.
    fn longest_body(&self) -> u64;

    /// The header that proves a notice.
    fn header(&self) -> &'static str;

    /// Whether the header has the form of one that proves something.
    fn may_be_signature(&self, header: &str) -> bool;

    /// What a body says that came with this header, if upstream has signed it just now.
    ///
    /// # Errors
    /// Why it is not believed.
    fn read(&self, header: Option<&str>, body: &[u8], now: Timestamp) -> Result<WebhookCall, Unproved>;
}

/// What a notice says that was proved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookCall {
    /// The same for each copy of the notice, and for no other.
    pub digest: [u8; 32],
    /// What has changed.
    pub about: About,
}

/// What a notice is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum About {
    /// The secrets in a tenant's folder, or below it.
    Tenant(Tenant),
    /// The folder that holds the tenants', or one above it.
    Tenants,
    /// Nothing here: another project, environment or folder, or another event.
    Nothing,
}

/// Why a notice is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unproved {
    /// It has no signature, or one by somebody who does not know the secret.
    #[error("the header x-infisical-signature is not the signature of this body under infisical.webhook_secret")]
    Forged,
    /// It was signed too long ago, or ahead of our time, or does not say when.
    #[error(
        "the notice is older than 5 minutes, lies more than a minute ahead, or does not say in its body when it was made"
    )]
    Outdated,
    /// It was signed, and is none that we can read.
    #[error("the body is no notice of Infisical")]
    Unreadable,
}
