//! Looks at the certificate that a server shows, whether it is accepted or not.

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::ring,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use x509_cert::der::Decode as _;

use crate::tls::{TlsError, client_roots};

/// A certificate, as far as people want to know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shown {
    /// Whom it is for.
    pub(crate) subject: String,
    /// Who has signed it.
    pub(crate) issuer: String,
    /// When it ends.
    pub(crate) ends: SystemTime,
}

/// Makes a TLS connection to `host`, and closes it. Returns the certificate that it showed, if it
/// came to that, and whether it is accepted by whom [`crate::tls::client_config`] trusts.
///
/// # Errors
/// TLS cannot be set up, or there is no TCP connection.
pub(crate) async fn look(
    url: &str,
    ca_file: Option<&Path>,
    host: &str,
    port: u16,
) -> Result<(Option<Shown>, io::Result<()>), LookError> {
    let provider = Arc::new(ring::default_provider());
    let roots = client_roots(url, ca_file)?;
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build();
    let verifier = verifier.map_err(|error| LookError::Tls(TlsError::Setup(Error::General(error.to_string()))))?;
    let seen = Arc::new(Seeing { verifier, certificate: Mutex::default() });
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::<Seeing>::clone(&seen))
        .with_no_client_auth();
    let name = ServerName::try_from(host.to_owned()).map_err(|_| LookError::Name)?;
    let stream = TcpStream::connect((host, port)).await.map_err(LookError::Connect)?;
    let outcome = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map(drop);
    let certificate = seen.certificate.lock().unwrap_or_else(PoisonError::into_inner).take();
    Ok((certificate.and_then(|bytes| read(&bytes)), outcome))
}

/// Why nothing could be looked at.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("a certificate cannot be for this name")]
    Name,
    #[error("there is no connection")]
    Connect(#[source] io::Error),
}

fn read(bytes: &[u8]) -> Option<Shown> {
    let certificate = x509_cert::Certificate::from_der(bytes).ok()?.tbs_certificate;
    Some(Shown {
        subject: certificate.subject.to_string(),
        issuer: certificate.issuer.to_string(),
        ends: certificate.validity.not_after.to_system_time(),
    })
}

/// Verifies as usual, and keeps what it has verified.
#[derive(Debug)]
struct Seeing {
    verifier: Arc<WebPkiServerVerifier>,
    certificate: Mutex<Option<Vec<u8>>>,
}

impl ServerCertVerifier for Seeing {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        *self.certificate.lock().unwrap_or_else(PoisonError::into_inner) = Some(end_entity.to_vec());
        self.verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}
