//! TLS to PostgreSQL, with libpq's words for the modes
//! (<https://www.postgresql.org/docs/current/libpq-ssl.html>).

use std::sync::Arc;

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
    server::ParsedCertificate,
};
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::error::StoreError;

/// How a connection to PostgreSQL is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tls {
    mode: Mode,
    root: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl Tls {
    /// Built from `sslmode` and `sslrootcert`, a file of PEM certificates; without a file, or with
    /// `system`, the system's own roots are trusted.
    pub(super) fn new(mode: Option<&str>, root: Option<String>) -> Result<Self, StoreError> {
        let mode = match mode {
            Some("disable") => Mode::Disable,
            // libpq's `allow` tries without TLS first; trying with TLS first is no worse.
            None | Some("allow" | "prefer") => Mode::Prefer,
            // libpq verifies the chain when it is given a root for `require`.
            Some("require") if root.is_some() => Mode::VerifyCa,
            Some("require") => Mode::Require,
            Some("verify-ca") => Mode::VerifyCa,
            Some("verify-full") => Mode::VerifyFull,
            Some(_) => {
                return Err(StoreError::InvalidUrl(
                    "sslmode is one of disable, allow, prefer, require, verify-ca, verify-full".to_owned(),
                ));
            }
        };
        Ok(Self { mode, root })
    }

    /// The nearest mode that tokio-postgres knows; the verifier does the rest.
    pub(super) fn wire_mode(&self) -> SslMode {
        match self.mode {
            Mode::Disable => SslMode::Disable,
            Mode::Prefer => SslMode::Prefer,
            Mode::Require | Mode::VerifyCa | Mode::VerifyFull => SslMode::Require,
        }
    }

    /// The TLS connector; `None` where TLS is off.
    pub(super) fn connector(&self) -> Result<Option<MakeRustlsConnect>, StoreError> {
        let provider = Arc::new(ring::default_provider());
        let verifier: Arc<dyn ServerCertVerifier> = match self.mode {
            Mode::Disable => return Ok(None),
            Mode::Prefer | Mode::Require => Arc::new(Lenient { roots: None, provider: Arc::clone(&provider) }),
            Mode::VerifyCa => Arc::new(Lenient { roots: Some(self.roots()?), provider: Arc::clone(&provider) }),
            Mode::VerifyFull => {
                WebPkiServerVerifier::builder_with_provider(Arc::new(self.roots()?), Arc::clone(&provider))
                    .build()
                    .map_err(|error| StoreError::InvalidUrl(format!("sslrootcert: {error}")))?
            }
        };
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| StoreError::InvalidUrl(format!("TLS cannot be set up: {error}")))?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        Ok(Some(MakeRustlsConnect::new(config)))
    }

    fn roots(&self) -> Result<RootCertStore, StoreError> {
        let mut roots = RootCertStore::empty();
        match self.root.as_deref() {
            None | Some("system") => roots = crate::tls::system_roots(),
            Some(path) => {
                let refused = |reason: String| StoreError::InvalidUrl(format!("sslrootcert {path:?}: {reason}"));
                let certificates = CertificateDer::pem_file_iter(path).map_err(|error| refused(error.to_string()))?;
                for certificate in certificates {
                    let certificate = certificate.map_err(|error| refused(error.to_string()))?;
                    roots.add(certificate).map_err(|error| refused(error.to_string()))?;
                }
            }
        }
        if roots.is_empty() {
            return Err(StoreError::InvalidUrl(
                "sslmode asks for a verified server, and no root certificate was found; set sslrootcert=FILE"
                    .to_owned(),
            ));
        }
        Ok(roots)
    }
}

/// Verifies less than TLS on the web does, as `require` and `verify-ca` ask for: the chain alone,
/// or nothing. That the server holds its key is always proved.
#[derive(Debug)]
struct Lenient {
    roots: Option<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(roots) = &self.roots {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&certificate, roots, intermediates, now, algorithms)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
