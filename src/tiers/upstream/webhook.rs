//! Webhooks: an upstream's own reports that a folder has changed.

use std::fmt;

use crate::{clock::Timestamp, tenant::Tenant};

/// Verifies the webhooks that are meant for this instance.
pub trait Webhook: fmt::Debug + Send + Sync {
    /// The longest body that is read, in bytes.
    fn longest_body(&self) -> u64;

    /// The header with the signature of a webhook.
    fn header(&self) -> &'static str;

    /// Whether the header has the form of a signature.
    fn may_be_signature(&self, header: &str) -> bool;

    /// Reads a body that came with this header, if upstream has signed it just now.
    ///
    /// # Errors
    /// The reason why it is not accepted.
    fn read(&self, header: Option<&str>, body: &[u8], now: Timestamp) -> Result<WebhookCall, Unverified>;
}

/// The content of a verified webhook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookCall {
    /// The same for each copy of the webhook, and for no other webhook.
    pub digest: [u8; 32],
    /// The place of the change.
    pub about: About,
}

/// The place that a webhook reports as changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum About {
    /// The secrets in a tenant's folder, or below it.
    Tenant(Tenant),
    /// The folder that contains the tenants' folders, or one above it.
    Tenants,
    /// Nothing that concerns us: another project, environment or folder, or another event.
    Nothing,
}

/// Why a webhook is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unverified {
    /// It has no signature, or one by a sender that does not know the secret.
    #[error("the header x-infisical-signature is not the signature of this body under infisical.webhook_secret")]
    Forged,
    /// It was signed too long ago, or ahead of our time, or does not contain its time.
    #[error(
        "the notice is older than 5 minutes, lies more than a minute ahead, or does not say in its body when it was made"
    )]
    Outdated,
    /// It was signed, but cannot be read.
    #[error("the body is no notice of Infisical")]
    Unreadable,
}
