//! Looks at the certificate that a server shows, whether it is accepted or not.

use std::{
    io,
    path::Path,
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use x509_cert::der::Decode as _;

use crate::tls::{TlsError, client_roots};

/// A certificate, as far as people want to know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Summary {
    /// The name that it was made for.
    pub(crate) subject: String,
    /// The authority that signed it.
    pub(crate) issuer: String,
    /// Its end.
    pub(crate) ends: SystemTime,
}

/// Makes a TLS connection to `host`, and closes it. Returns the certificate that it showed, if it
/// came to that, and whether [`crate::tls::client_config`] accepts it.
///
/// # Errors
/// TLS cannot be set up, or there is no TCP connection.
pub(crate) async fn look(
    url: &str,
    ca_file: Option<&Path>,
    host: &str,
    port: u16,
) -> Result<(Option<Summary>, io::Result<()>), LookError> {
    let (roots, provider) = (Arc::new(client_roots(url, ca_file)?), Arc::new(ring::default_provider()));
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider).build();
    let verifier = verifier.map_err(|error| LookError::Tls(TlsError::Setup(Error::General(error.to_string()))))?;
    let shown = Arc::new(ShownCertificate { verifier: Some(verifier), shown: OnceLock::new() });
    let config = shown.client_config()?;
    let name = ServerName::try_from(host.to_owned()).map_err(|_| LookError::Name)?;
    let stream = TcpStream::connect((host, port)).await.map_err(LookError::Connect)?;
    let outcome = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map(drop);
    Ok((shown.summary(), outcome))
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

/// The certificate that a server has shown, and that it has the key of.
///
/// The default accepts any. It is for a client that tells nothing and is told nothing secret: the
/// check of this program's own health on this machine. A certificate that lies in the file may not be
/// served yet, and the instance is well all the same.
#[derive(Debug, Default)]
pub(crate) struct ShownCertificate {
    verifier: Option<Arc<WebPkiServerVerifier>>,
    shown: OnceLock<CertificateDer<'static>>,
}

impl ShownCertificate {
    /// The configuration for a client that looks at the certificate in this way.
    pub(crate) fn client_config(self: &Arc<Self>) -> Result<ClientConfig, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let verifier = Arc::<Self>::clone(self);
        Ok(config.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
    }

    /// Whether it is the first one in the file.
    pub(crate) fn is_in(&self, file: &Path) -> bool {
        let held = CertificateDer::pem_file_iter(file).ok().and_then(|mut held| held.next()?.ok());
        held.is_some_and(|held| self.shown.get() == Some(&held))
    }

    fn summary(&self) -> Option<Summary> {
        let certificate = x509_cert::Certificate::from_der(self.shown.get()?).ok()?.tbs_certificate;
        Some(Summary {
            subject: certificate.subject.to_string(),
            issuer: certificate.issuer.to_string(),
            ends: certificate.validity.not_after.to_system_time(),
        })
    }
}

impl ServerCertVerifier for ShownCertificate {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let _ = self.shown.set(end_entity.clone().into_owned());
        match &self.verifier {
            Some(verifier) => verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now),
            None => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
