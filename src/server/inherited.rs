//! The sockets that a service manager has opened and hands over: socket activation, as
//! sd_listen_fds(3) describes it. Connections wait in them while an instance starts, and from the
//! end of one to the start of the next.

use std::{
    env, fmt, io,
    net::{SocketAddr, TcpListener},
    os::{fd::AsFd, unix::net::UnixListener},
    path::Path,
};

use listenfd::ListenFd;

/// The sockets that were handed over, each with the name that tells of it.
#[derive(Debug, Default)]
pub struct Inherited {
    tcp: Vec<(String, SocketAddr, TcpListener)>,
    unix: Vec<(String, UnixListener)>,
}

/// Why sockets that were handed over cannot be served on.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// It is no socket that connections come by.
    #[error("the service manager's {name} cannot be served on: {error}")]
    Unusable {
        /// Its number and name.
        name: String,
        /// The system's error.
        error: io::Error,
    },
    /// It is another one than the configuration tells of.
    #[error("the service manager's {name} listens on {place}, but {wanted}; let both say the same")]
    Unfit {
        /// Its number and name.
        name: String,
        /// Its address or path.
        place: String,
        /// The configuration's words.
        wanted: String,
    },
    /// There are two Unix sockets.
    #[error("the service manager hands over {name} beside another Unix socket, and only one is served on")]
    Further {
        /// Its number and name.
        name: String,
    },
}

/// The number of the first socket (sd_listen_fds(3)).
const FIRST: usize = 3;

impl Inherited {
    /// Takes what was handed to this process: nothing, where `LISTEN_FDS` is not set or `LISTEN_PID` is another
    /// process. To be called once, before others read the environment: the variables are removed.
    ///
    /// # Errors
    /// [`InheritError::Unusable`].
    pub fn take() -> Result<Self, InheritError> {
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let names: Vec<&str> = names.split(':').collect();
        let (mut handed, mut taken) = (ListenFd::from_env(), Self::default());
        for index in 0..handed.len() {
            let name = match names.get(index).filter(|name| !name.is_empty()) {
                Some(name) => format!("socket {} ({name})", FIRST + index),
                None => format!("socket {}", FIRST + index),
            };
            let unusable = |error| InheritError::Unusable { name: name.clone(), error };
            // It stays where it is if it is no Unix socket.
            if let Ok(Some(socket)) = handed.take_unix_listener(index) {
                accepts(&socket).map_err(unusable)?;
                socket.set_nonblocking(true).map_err(unusable)?;
                taken.unix.push((name, socket));
            } else if let Some(socket) = handed.take_tcp_listener(index).map_err(unusable)? {
                accepts(&socket).map_err(unusable)?;
                socket.set_nonblocking(true).map_err(unusable)?;
                let place = socket.local_addr().map_err(unusable)?;
                taken.tcp.push((name, place, socket));
            }
        }
        Ok(taken)
    }

    /// The TCP socket that listens at this address, if it was handed over. Only where the configuration says, for
    /// that was checked: what other machines reach has TLS. Port 0 stands for any port.
    pub(super) fn tcp(&mut self, listen: SocketAddr) -> Option<TcpListener> {
        let fits = |(_, place, _): &(String, SocketAddr, TcpListener)| {
            (listen.port() == 0 || listen.port() == place.port())
                && listen.ip().to_canonical() == place.ip().to_canonical()
        };
        let found = self.tcp.iter().position(fits)?;
        Some(self.tcp.swap_remove(found).2)
    }

    /// Refuses what is left once all that is configured was taken.
    ///
    /// # Errors
    /// [`InheritError::Unfit`].
    pub(super) fn no_more_tcp(&self, listen: impl fmt::Display) -> Result<(), InheritError> {
        match self.tcp.first() {
            None => Ok(()),
            Some((name, place, _)) => {
                let wanted = format!("server.listen is {listen}");
                Err(InheritError::Unfit { name: name.clone(), place: place.to_string(), wanted })
            }
        }
    }

    /// The Unix socket, if one was handed over. Mode and owner of its file are the service manager's.
    pub(super) fn unix(&mut self, wanted: Option<&Path>) -> Result<Option<UnixListener>, InheritError> {
        let Some((name, socket)) = one(&mut self.unix)? else { return Ok(None) };
        let place = socket.local_addr().map_err(|error| InheritError::Unusable { name: name.clone(), error })?;
        let place = place.as_pathname();
        if place.zip(wanted).is_some_and(|(place, wanted)| is_same(place, wanted)) {
            return Ok(Some(socket));
        }
        let place = place.map_or("no path".to_owned(), |place| place.display().to_string());
        let wanted = match wanted {
            Some(path) => format!("server.unix_socket is {}", path.display()),
            None => "server.unix_socket is not set".to_owned(),
        };
        Err(InheritError::Unfit { name, place, wanted })
    }
}

/// The only one.
fn one<T>(handed: &mut Vec<(String, T)>) -> Result<Option<(String, T)>, InheritError> {
    let last = handed.pop();
    match last {
        Some((name, _)) if !handed.is_empty() => Err(InheritError::Further { name }),
        last => Ok(last),
    }
}

/// Refuses a connection, which is handed over in place of the socket where a unit says `Accept=yes`.
fn accepts(socket: &impl AsFd) -> io::Result<()> {
    match rustix::net::sockopt::socket_acceptconn(socket) {
        Ok(true) => Ok(()),
        Ok(false) => Err(io::Error::other("it does not listen; a socket unit needs Accept=no")),
        Err(error) => Err(error.into()),
    }
}

fn is_same(place: &Path, wanted: &Path) -> bool {
    let resolved = |path: &Path| path.canonicalize().ok();
    place == wanted || resolved(place).is_some_and(|place| Some(place) == resolved(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handed(addresses: &[&str]) -> Inherited {
        let open = |address: &&str| {
            let socket = TcpListener::bind(*address).unwrap();
            ("socket 3".to_owned(), socket.local_addr().unwrap(), socket)
        };
        Inherited { tcp: addresses.iter().map(open).collect(), unix: Vec::new() }
    }

    #[test]
    fn a_tcp_socket_is_taken_only_where_the_configuration_says() {
        let mut two = handed(&["127.0.0.1:0", "127.0.0.1:0"]);
        let exactly = two.tcp[1].1;
        assert_eq!(two.tcp(exactly).unwrap().local_addr().unwrap(), exactly);
        assert!(two.tcp(exactly).is_none());
        assert!(two.tcp("127.0.0.1:0".parse().unwrap()).is_some(), "any port");
        assert!(two.no_more_tcp("127.0.0.1:0").is_ok());
        // The configuration allows loopback without TLS; another address was not checked.
        for (place, listen) in
            [("0.0.0.0:0", "127.0.0.1:0"), ("127.0.0.1:0", "127.0.0.1:1"), ("127.0.0.1:0", "[::1]:0")]
        {
            let mut other = handed(&[place]);
            assert!(other.tcp(listen.parse().unwrap()).is_none());
            let told = other.no_more_tcp(listen).unwrap_err().to_string();
            assert!(told.contains("socket 3") && told.contains(listen), "{told}");
        }
    }

    #[test]
    fn a_unix_socket_is_taken_only_at_the_configured_path() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("a.sock"), folder.path().join("link"));
        std::os::unix::fs::symlink(folder.path(), &link).unwrap();
        let socket = UnixListener::bind(&path).unwrap();
        let handed = || Inherited { tcp: Vec::new(), unix: vec![("socket 3".to_owned(), socket.try_clone().unwrap())] };
        assert!(handed().unix(Some(&path)).unwrap().is_some());
        assert!(handed().unix(Some(&link.join("a.sock"))).unwrap().is_some(), "by another way");
        for wanted in [None, Some(folder.path().join("b.sock"))] {
            let told = handed().unix(wanted.as_deref()).unwrap_err().to_string();
            assert!(told.contains("a.sock") && told.contains("server.unix_socket"), "{told}");
        }
    }

    #[test]
    fn a_connection_is_no_socket_to_serve_on() {
        let (connected, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(accepts(&connected).unwrap_err().to_string().contains("Accept=no"));
        assert!(accepts(&TcpListener::bind("127.0.0.1:0").unwrap()).is_ok());
    }
}
