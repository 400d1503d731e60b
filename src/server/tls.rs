//! TLS on the TCP port. Certificates are replaced while the proxy serves: the files are
//! checked every two seconds, and new connections get the new certificate.

use std::{
    fmt,
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use rustls::{
    InconsistentKeys, RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio_rustls::TlsAcceptor;
use zeroize::{Zeroize as _, Zeroizing};

use crate::private_file::{self, FileError};

/// `[server.tls]`: files in PEM.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The server's certificate, and those between it and its root.
    pub certificate: PathBuf,
    /// The certificate's key, readable by its owner alone.
    pub private_key: PathBuf,
    /// The signers of clients' certificates; where it is set, a client without one is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<PathBuf>,
}

/// Why TLS cannot be served. Never holds a file's content.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("the file {path} cannot be read: {reason}", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        reason: String,
    },
    /// A file holds something else.
    #[error("the file {path} holds no {wanted} in PEM", path = .path.display())]
    Lacking {
        /// The file.
        path: PathBuf,
        /// The kind of content that is expected.
        wanted: &'static str,
    },
    /// The key's file cannot be used.
    #[error(transparent)]
    Key(#[from] FileError),
    /// The certificate cannot be served with the key.
    #[error("the certificate in {certificate} cannot be served with the key in {key}: {reason}",
        certificate = .certificate.display(), key = .key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// The fault in them.
        reason: String,
    },
    /// These certificates cannot authenticate clients.
    #[error("the certificates in {path} cannot sign those of clients: {reason}", path = .path.display())]
    ClientCa {
        /// The file.
        path: PathBuf,
        /// The fault in them.
        reason: String,
    },
}

/// The TLS state for connections.
pub struct Tls {
    files: Config,
    serving: ArcSwap<ServerConfig>,
    /// The digest of the contents that were tried last: each is tried once.
    tried: Mutex<[u8; 32]>,
}

/// How often the files are checked.
const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// More than the length of any chain of certificates.
const MAX_LEN: u64 = 1 << 20;

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError`], which names the file that is at fault.
    pub fn load(files: &Config) -> Result<Self, TlsError> {
        let contents = Contents::read(files)?;
        let serving = ArcSwap::from_pointee(contents.build(files)?);
        Ok(Self { files: files.clone(), serving, tried: Mutex::new(contents.digest()) })
    }

    /// The acceptor for a connection that comes now.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.serving.load_full())
    }

    /// Checks the files periodically, for as long as it is polled.
    pub(super) async fn follow(self: Arc<Self>) {
        loop {
            tokio::time::sleep(RELOAD_INTERVAL).await;
            let tls = Arc::clone(&self);
            // The files may be on a disk that hangs.
            let _ = tokio::task::spawn_blocking(move || tls.look()).await;
        }
    }

    /// Takes over the files' content, if it is new and valid. Files are replaced one after the
    /// other, so a pair that does not match is usually one that is about to match.
    fn look(&self) {
        let contents = Contents::read(&self.files);
        let digest = match &contents {
            Ok(contents) => contents.digest(),
            Err(error) => Sha256::digest(error.to_string()).into(),
        };
        let mut tried = self.tried.lock().unwrap_or_else(PoisonError::into_inner);
        if *tried == digest {
            return;
        }
        *tried = digest;
        match contents.and_then(|contents| contents.build(&self.files)) {
            Ok(config) => {
                self.serving.store(Arc::new(config));
                tracing::info!(certificate = %self.files.certificate.display(), "serving the new certificate");
            }
            Err(error) => {
                tracing::error!(%error, "the new certificate cannot be served; the one before stays");
            }
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

/// The content of the files.
struct Contents {
    certificate: Vec<u8>,
    key: Zeroizing<String>,
    client_ca: Option<Vec<u8>>,
}

impl Contents {
    fn read(files: &Config) -> Result<Self, TlsError> {
        let key = private_file::read(&files.private_key)?;
        let key = key.ok_or_else(|| TlsError::Unreadable {
            path: files.private_key.clone(),
            reason: "there is no such file".to_owned(),
        })?;
        let client_ca = files.client_ca.as_deref().map(read).transpose()?;
        Ok(Self { certificate: read(&files.certificate)?, key, client_ca })
    }

    /// A digest of the contents; it does not reveal the key.
    fn digest(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        for part in [&self.certificate, self.key.as_bytes(), self.client_ca.as_deref().unwrap_or_default()] {
            digest.update(Sha256::digest(part));
        }
        digest.finalize().into()
    }

    fn build(&self, files: &Config) -> Result<ServerConfig, TlsError> {
        let chain = certificates(&files.certificate, &self.certificate)?;
        let mut key = PrivateKeyDer::from_pem_slice(self.key.as_bytes())
            .map_err(|_| TlsError::Lacking { path: files.private_key.clone(), wanted: "private key" })?;
        let signing = ring::sign::any_supported_type(&key);
        key.zeroize();
        let pair = |error: rustls::Error| TlsError::Pair {
            certificate: files.certificate.clone(),
            key: files.private_key.clone(),
            reason: error.to_string(),
        };
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(Arc::clone(&provider));
        let config = config.with_safe_default_protocol_versions().map_err(pair)?;
        let config = match files.client_ca.as_ref().zip(self.client_ca.as_ref()) {
            None => config.with_no_client_auth(),
            Some((path, text)) => {
                let wrong = |reason: String| TlsError::ClientCa { path: path.clone(), reason };
                let mut roots = RootCertStore::empty();
                for root in certificates(path, text)? {
                    roots.add(root).map_err(|error| wrong(error.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                config.with_client_cert_verifier(verifier.map_err(|error| wrong(error.to_string()))?)
            }
        };
        let certified = CertifiedKey::new(chain, signing.map_err(pair)?);
        match certified.keys_match() {
            // The library cannot tell for every kind of key.
            Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
            Err(error) => return Err(pair(error)),
        }
        let mut config = config.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let mut content = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_LEN).read_to_end(&mut content));
    read.map_err(|error| TlsError::Unreadable { path: path.to_owned(), reason: error.to_string() })?;
    Ok(content)
}

fn certificates(path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let lacking = || TlsError::Lacking { path: path.to_owned(), wanted: "certificates" };
    let found: Vec<_> = CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().map_err(|_| lacking())?;
    if found.is_empty() { Err(lacking()) } else { Ok(found) }
}
