//! The one TLS stack: rustls with the ring provider, trusting the system's roots.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, pem::PemObject as _},
};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// There are no root certificates to trust.
    #[error(
        "no root certificates were found on this system; install its package ca-certificates, or name a bundle in SSL_CERT_FILE"
    )]
    NoRoots,
    /// The file of further authorities cannot be used.
    #[error("the certificates in {} cannot be used: {reason}", path.display())]
    Authorities {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The library refuses its own defaults.
    #[error("TLS cannot be set up")]
    Setup(#[from] rustls::Error),
}

/// The configuration for a client of `url`, which trusts the authorities in `ca_file` beside the
/// system's roots; they are read only where the URL begins with `https:`.
pub(crate) fn client_config(url: &str, ca_file: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let roots = client_roots(url, ca_file)?;
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// The authorities that a client of `url` trusts.
pub(crate) fn client_roots(url: &str, ca_file: Option<&Path>) -> Result<RootCertStore, TlsError> {
    let mut roots = if url.starts_with("https:") { system_roots() } else { RootCertStore::empty() };
    if let Some(path) = ca_file {
        add_authorities(&mut roots, path)?;
    }
    if roots.is_empty() && url.starts_with("https:") {
        return Err(TlsError::NoRoots);
    }
    Ok(roots)
}

fn add_authorities(roots: &mut RootCertStore, path: &Path) -> Result<(), TlsError> {
    let refused = |reason: String| TlsError::Authorities { path: path.to_owned(), reason };
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| refused(error.to_string()))?;
    let mut any = false;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| refused(error.to_string()))?;
        roots.add(certificate).map_err(|error| refused(error.to_string()))?;
        any = true;
    }
    if any { Ok(()) } else { Err(refused("it has no certificate in PEM (BEGIN CERTIFICATE)".to_owned())) }
}

/// Whether a URL leads to this machine without a network.
pub(crate) fn is_loopback(url: &reqwest::Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    is_this_machine(host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host))
}

/// Whether a host is this machine by its name or address.
pub(crate) fn is_this_machine(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// The roots that this system trusts; unreadable ones are left out.
pub(crate) fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_known_however_its_address_is_written() {
        let is_loopback = |url: &str| is_loopback(&url.parse().unwrap());
        for ours in
            ["http://localhost", "http://LOCALHOST:1/a", "http://127.0.0.1", "http://127.8.9.1:8080", "http://[::1]"]
        {
            assert!(is_loopback(ours), "{ours}");
        }
        assert!(is_loopback("http://[::ffff:127.0.0.1]:1") && is_loopback("http://2130706433"), "as it is dialled");
        for other in
            ["http://infisical", "http://10.0.0.1", "http://localhost.evil.example", "http://[::2]", "http://0.0.0.0"]
        {
            assert!(!is_loopback(other), "{other}");
        }
    }
}
