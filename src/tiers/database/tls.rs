//! TLS to PostgreSQL, with libpq's words for the modes
//! (<https://www.postgresql.org/docs/current/libpq-ssl.html>).

use std::sync::Arc;

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{
        CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature, verify_tls13_signature_with_raw_key,
    },
    pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime, pem::PemObject as _},
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
        let trusted = match self.mode {
            Mode::Disable => return Ok(None),
            Mode::Prefer | Mode::Require => None,
            Mode::VerifyCa | Mode::VerifyFull => Some(self.trusted()?),
        };
        let checks_name = self.mode == Mode::VerifyFull;
        let verifier = Arc::new(Verifier { trusted, checks_name, provider: Arc::clone(&provider) });
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| StoreError::InvalidUrl(format!("TLS cannot be set up: {error}")))?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        Ok(Some(MakeRustlsConnect::new(config)))
    }

    fn trusted(&self) -> Result<Trusted, StoreError> {
        let (mut roots, mut named) = (RootCertStore::empty(), Vec::new());
        match self.root.as_deref() {
            None | Some("system") => roots = crate::tls::system_roots(),
            Some(path) => {
                let refused = |reason: String| StoreError::InvalidUrl(format!("sslrootcert {path:?}: {reason}"));
                let certificates = CertificateDer::pem_file_iter(path).map_err(|error| refused(error.to_string()))?;
                for certificate in certificates {
                    let certificate = certificate.map_err(|error| refused(error.to_string()))?;
                    roots.add(certificate.clone()).map_err(|error| refused(error.to_string()))?;
                    named.push(certificate);
                }
            }
        }
        if roots.is_empty() {
            return Err(StoreError::InvalidUrl(
                "sslmode asks for a verified server, and no root certificate was found; set sslrootcert=FILE"
                    .to_owned(),
            ));
        }
        Ok(Trusted { roots, named })
    }
}

/// The certificates that a server's must be signed by.
#[derive(Debug)]
struct Trusted {
    roots: RootCertStore,
    /// Those of the file: a server may present one of them as its own.
    named: Vec<CertificateDer<'static>>,
}

/// Verifies as much as a mode asks for: nothing, the chain alone, or the chain and the name. That
/// the server holds its key is always proved.
#[derive(Debug)]
struct Verifier {
    /// `None` where nothing is verified.
    trusted: Option<Trusted>,
    checks_name: bool,
    provider: Arc<CryptoProvider>,
}

impl Trusted {
    /// A certificate that the file has itself needs no signature of another: as in libpq, a server's
    /// self-signed certificate is its own root. Mostly it says of itself that it is an authority,
    /// which the library takes in no server; it looks at the time before that.
    fn accepts(&self, certificate: &CertificateDer<'_>, verified: Result<(), Error>) -> Result<(), Error> {
        match verified {
            Err(Error::InvalidCertificate(CertificateError::Other(reason)))
                if reason.to_string() == "CaUsedAsEndEntity" && self.named.contains(certificate) =>
            {
                Ok(())
            }
            verified => verified,
        }
    }
}

impl Verifier {
    /// Whether nothing is verified of a certificate, and it has a version that the library does not
    /// read: X.509 v1, as tools make it that are told no extension.
    fn only_needs_its_key(&self, certificate: &CertificateDer<'_>) -> bool {
        self.trusted.is_none() && ParsedCertificate::try_from(certificate).is_err()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(trusted) = &self.trusted {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            let algorithms = self.provider.signature_verification_algorithms.all;
            let roots = &trusted.roots;
            let verified =
                verify_server_cert_signed_by_trust_anchor(&certificate, roots, intermediates, now, algorithms);
            trusted.accepts(end_entity, verified)?;
            if self.checks_name {
                verify_server_name(&certificate, server_name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        if !self.only_needs_its_key(certificate) {
            return verify_tls12_signature(message, certificate, signature, algorithms);
        }
        let key = PublicKey::of(certificate)?;
        let (algorithm, bits) = key.parts().ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let possible = algorithms.mapping.iter().find(|(scheme, _)| *scheme == signature.scheme);
        let mut possible = possible.map_or(&[][..], |(_, possible)| possible).iter();
        let fitting = possible.find(|possible| possible.public_key_alg_id().as_ref() == algorithm);
        let verified = fitting.map(|fitting| fitting.verify_signature(bits, message, signature.signature()));
        match verified {
            Some(Ok(())) => Ok(HandshakeSignatureValid::assertion()),
            Some(Err(_)) => Err(Error::InvalidCertificate(CertificateError::BadSignature)),
            None => Err(Error::General("no signature algorithm in common".to_owned())),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        if !self.only_needs_its_key(certificate) {
            return verify_tls13_signature(message, certificate, signature, algorithms);
        }
        verify_tls13_signature_with_raw_key(message, &PublicKey::of(certificate)?.in_der(), signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A certificate's public key: the content of its `SubjectPublicKeyInfo` (RFC 5280, 4.1).
struct PublicKey(Vec<u8>);

impl PublicKey {
    /// The library reads roots of version 1, and keeps their keys.
    fn of(certificate: &CertificateDer<'_>) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone())?;
        let key = roots.roots.first().map(|root| root.subject_public_key_info.as_ref().to_vec());
        key.map(Self).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))
    }

    fn in_der(&self) -> SubjectPublicKeyInfoDer<'static> {
        const SEQUENCE: u8 = 0x30;
        let length = self.0.len();
        let mut der = vec![SEQUENCE];
        match u8::try_from(length) {
            Ok(short @ 0..0x80) => der.push(short),
            _ => {
                let bytes = length.to_be_bytes();
                let bytes = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
                // At most eight bytes of length.
                der.push(0x80 | u8::try_from(bytes.len()).unwrap_or(0x7f));
                der.extend_from_slice(bytes);
            }
        }
        der.extend_from_slice(&self.0);
        der.into()
    }

    /// The content of its algorithm's identifier, and the key's own bits.
    fn parts(&self) -> Option<(&[u8], &[u8])> {
        const BIT_STRING: u8 = 0x03;
        let (_, algorithm, rest) = element(&self.0)?;
        let (tag, bits, _) = element(rest)?;
        // The first byte counts the bits that are left over, of which a key has none.
        let bits = bits.strip_prefix(&[0])?;
        (tag == BIT_STRING).then_some((algorithm, bits))
    }
}

/// The tag and the content of the first element of DER, and what follows it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..0x80 => (usize::from(first), rest),
        _ => {
            let (length, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (length.iter().try_fold(0_usize, |all, byte| all.checked_mul(256)?.checked_add(usize::from(*byte)))?, rest)
        }
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}
