//! The sockets to serve on: TCP, with TLS or without, and a Unix socket.

use std::{
    fmt,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use rustix::fs::Mode;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, UnixListener, UnixSocket, UnixStream};

use super::{
    Config,
    inherited::{InheritError, Inherited},
    tls::{Tls, TlsError},
};
use crate::access::Peer;

/// The sockets to serve on.
#[derive(Debug)]
pub struct Listeners {
    /// TCP, at least one.
    pub(super) tcp: Vec<TcpListener>,
    /// The TLS around TCP, if configured.
    pub tls: Option<Arc<Tls>>,
    /// A Unix socket, if configured, and its file, which is removed at the end: none where the
    /// socket was handed over, for it listens on.
    pub unix: Option<(UnixListener, Option<PathBuf>)>,
}

impl Listeners {
    /// Opens the configured sockets.
    ///
    /// # Errors
    /// The address or path, and why it cannot be listened on; or the file for TLS that is
    /// at fault.
    pub async fn bind(config: &Config) -> Result<Self, BindError> {
        Self::bind_beside(config, Inherited::default()).await
    }

    /// The same, but for those that were handed over.
    ///
    /// # Errors
    /// Also where one that was handed over is another than the configured.
    pub async fn bind_beside(config: &Config, mut inherited: Inherited) -> Result<Self, BindError> {
        let tls = config.tls.as_ref().map(Tls::load).transpose()?.map(Arc::new);
        let handed_unix = inherited.unix(config.unix_socket.as_deref())?;
        let tcp = config.listen.bind(&mut inherited)?;
        let unix = match (handed_unix, &config.unix_socket) {
            (Some(handed), path) => {
                let place = || path.as_ref().map_or_else(String::new, |path| path.display().to_string());
                let listener = UnixListener::from_std(handed);
                Some((listener.map_err(|error| BindError::Socket { place: place(), error })?, None))
            }
            (None, Some(path)) => {
                Some((bind_unix(path, config.unix_mode, config.unix_owner).await?, Some(path.clone())))
            }
            (None, None) => None,
        };
        Ok(Self { tcp, tls, unix })
    }

    /// The addresses of TCP, with the ports that the system chose.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.tcp.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }
}

/// Why the proxy cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A socket cannot be opened.
    #[error("cannot listen on {place}: {error}")]
    Socket {
        /// Its address or path.
        place: String,
        /// The system's error.
        error: std::io::Error,
    },
    /// TLS cannot be set up.
    #[error("cannot serve TLS")]
    Tls(#[from] TlsError),
    /// The service manager hands over what is not configured.
    #[error("sockets that were handed over are not those of the configuration")]
    Inherited(#[from] InheritError),
}

/// Accepts on a listener that may not exist.
pub(super) async fn accept_unix(listener: Option<&UnixListener>) -> std::io::Result<(UnixStream, Peer)> {
    match listener {
        Some(listener) => {
            let (stream, _) = listener.accept().await?;
            let process = stream.peer_cred()?;
            Ok((stream, Peer::Process { uid: process.uid(), gid: process.gid() }))
        }
        None => std::future::pending().await,
    }
}

/// Opens a Unix socket. A socket file without a listener is replaced; one that
/// is in use is not.
///
/// At no moment can more users connect than may: the file is created with the socket's own
/// mode, at most its owner's, and nobody can connect to it before it listens, which it does
/// only when mode and owner are as configured.
async fn bind_unix(path: &Path, mode: SocketMode, owner: Option<SocketOwner>) -> Result<UnixListener, BindError> {
    let failed = |error| BindError::Socket { place: path.display().to_string(), error };
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return Err(failed(std::io::Error::other(
                "there is a file that is no socket; remove it or choose another path",
            )));
        }
        match UnixStream::connect(path).await {
            // No process listens on it.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            // Includes a listener whose backlog is full just now.
            Ok(_) | Err(_) => return Err(failed(std::io::ErrorKind::AddrInUse.into())),
        }
    }
    let listen = || {
        let socket = UnixSocket::new_stream()?;
        rustix::fs::fchmod(&socket, Mode::from_raw_mode(mode.0 & 0o600))?;
        socket.bind(path)?;
        // Restores the permissions that the umask removed.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode.0))?;
        if let Some(SocketOwner { uid, gid }) = owner {
            std::os::unix::fs::chown(path, Some(uid), gid)?;
        }
        socket.listen(BACKLOG)
    };
    listen().map_err(failed)
}

/// Connections that wait to be accepted, on each socket.
pub(super) const BACKLOG: u32 = 1024;

/// The users who may connect to the Unix socket, as the permissions of its file: `"0660"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct SocketMode(u32);

impl Default for SocketMode {
    fn default() -> Self {
        Self(0o600)
    }
}

/// A text that is not a mode.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no mode; write three or four octal digits in quotes, as in \"0600\" or \"0660\"")]
pub struct InvalidMode(String);

impl FromStr for SocketMode {
    type Err = InvalidMode;

    fn from_str(text: &str) -> Result<Self, InvalidMode> {
        let digits = (3..=4).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
        let mode = u32::from_str_radix(text, 8).ok().filter(|mode| digits && *mode <= 0o777);
        mode.map(Self).ok_or_else(|| InvalidMode(text.to_owned()))
    }
}

impl TryFrom<String> for SocketMode {
    type Error = InvalidMode;

    fn try_from(text: String) -> Result<Self, InvalidMode> {
        text.parse()
    }
}

impl From<SocketMode> for String {
    fn from(mode: SocketMode) -> Self {
        format!("{:04o}", mode.0)
    }
}

/// The owner of the Unix socket's file: `"1000"` or `"1000:1000"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct SocketOwner {
    uid: u32,
    gid: Option<u32>,
}

/// A text that is not an owner.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no owner; write the numbers of a user and, if need be, a group, as in \"1000\" or \"1000:1000\"")]
pub struct InvalidOwner(String);

impl FromStr for SocketOwner {
    type Err = InvalidOwner;

    fn from_str(text: &str) -> Result<Self, InvalidOwner> {
        // The highest number means "leave it as it is" to the system.
        let number = |text: &str| text.parse().ok().filter(|number| *number != u32::MAX);
        let owner = match text.split_once(':') {
            None => number(text).map(|uid| Self { uid, gid: None }),
            Some((uid, gid)) => number(uid).zip(number(gid)).map(|(uid, gid)| Self { uid, gid: Some(gid) }),
        };
        owner.ok_or_else(|| InvalidOwner(text.to_owned()))
    }
}

impl TryFrom<String> for SocketOwner {
    type Error = InvalidOwner;

    fn try_from(text: String) -> Result<Self, InvalidOwner> {
        text.parse()
    }
}

impl From<SocketOwner> for String {
    fn from(owner: SocketOwner) -> Self {
        owner.to_string()
    }
}

impl fmt::Display for SocketOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.gid {
            Some(gid) => write!(f, "{}:{gid}", self.uid),
            None => write!(f, "{}", self.uid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_owners_are_read_as_the_system_writes_them() {
        for (text, shown) in [("0600", "0600"), ("660", "0660"), ("0777", "0777")] {
            assert_eq!(String::from(text.parse::<SocketMode>().unwrap()), shown);
        }
        for wrong in ["", "6", "0o600", "0800", "1777", "00600", "rw", "+600"] {
            assert!(wrong.parse::<SocketMode>().is_err(), "{wrong}");
        }
        for text in ["0", "1000", "1000:0"] {
            assert_eq!(text.parse::<SocketOwner>().unwrap().to_string(), text);
        }
        for wrong in ["", "root", "1000:", ":1000", "1:2:3", "-1", "4294967295", "0:4294967295"] {
            assert!(wrong.parse::<SocketOwner>().is_err(), "{wrong}");
        }
    }
}
