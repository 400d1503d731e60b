//! The one TLS stack: rustls with the ring provider, trusting the system's roots.

use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore, crypto::ring};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// There is nobody to trust.
    #[error(
        "no root certificates were found on this system; install its package ca-certificates, or name a bundle in SSL_CERT_FILE"
    )]
    NoRoots,
    /// The library refuses its own defaults.
    #[error("TLS cannot be set up")]
    Setup(#[from] rustls::Error),
}

/// For a client of `url`; the roots are read only where it begins with `https:`.
pub(crate) fn client_config(url: &str) -> Result<ClientConfig, TlsError> {
    let roots = if url.starts_with("https:") { system_roots() } else { RootCertStore::empty() };
    if roots.is_empty() && url.starts_with("https:") {
        return Err(TlsError::NoRoots);
    }
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// The roots that this system trusts; those that cannot be read are left out.
pub(crate) fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}
