//! Validators for answers that are kept by their readers: where the secret has no version of ours, they are
//! made from its content under a key.

use super::Resolver;
use crate::{answer::Answer, phase::Phase, sealing::KeyPurpose, secret::SecretKey, tenant::Tenant};

impl Resolver {
    /// Whether a secret's own validator is made from its version in the database: then it outlives a restart,
    /// and is the same at every instance.
    #[must_use]
    pub fn has_own_versions(&self, tenant: &Tenant, key: &SecretKey) -> bool {
        self.policies().of(tenant, key, self.own_phase(tenant)).phase != Phase::Infisical
    }

    /// Makes validators of secrets that are the same for the same value, whatever its version. Without a
    /// master key they are those of the versions.
    pub fn value_tags(&self, tenant: &Tenant) -> impl Fn(&Answer) -> String + Send + use<> {
        let key = self.database.keys().ring().first().map(|key| key.derive(KeyPurpose::ContentTag));
        let tenant = tenant.clone();
        move |secret| match &key {
            Some(key) => {
                let parts: [&[u8]; 4] =
                    [b"value", tenant.as_str().as_bytes(), secret.key.as_str().as_bytes(), secret.expose().as_bytes()];
                key.tag(&parts).to_string()
            }
            None => secret.bare_etag().to_owned(),
        }
    }

    /// A validator that is the same for the same content, and says nothing of it without the key. Without a
    /// master key it is this process's own.
    #[must_use]
    pub fn content_tag(&self, tenant: &Tenant, secret: &Answer) -> String {
        let (version, updated_at) =
            (secret.version.number().to_be_bytes(), secret.updated_at.as_millis().to_be_bytes());
        let parts: [&[u8]; 6] = [
            b"content",
            tenant.as_str().as_bytes(),
            secret.key.as_str().as_bytes(),
            &version,
            &updated_at,
            secret.expose().as_bytes(),
        ];
        match self.database.keys().ring().first() {
            Some(key) => key.derive(KeyPurpose::ContentTag).tag(&parts).to_string()[..32].to_owned(),
            None => secret.bare_etag().to_owned(),
        }
    }
}
