//! `server.listen`: the addresses to listen on, as they are written and as they are opened.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    sync::atomic::{AtomicUsize, Ordering},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::{
    inherited::Inherited,
    listeners::{BACKLOG, BindError},
};

/// One or more addresses to listen on; port 0 lets the system choose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen(Vec<Place>);

/// One of these, as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Address(SocketAddr),
    /// `localhost`: both loopback addresses, if this machine has both.
    Localhost(u16),
}

/// A text that is no address to listen on.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no address to listen on: {1}; write address and port, as in \"127.0.0.1:7227\", \"[::1]:7227\" or \"localhost:7227\""
)]
pub struct InvalidListen(String, &'static str);

impl Listen {
    /// The addresses that are listened on, where this machine has them.
    pub(super) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.0.iter().flat_map(|place| place.addresses())
    }

    /// The first of them, by which an instance is known to its successor.
    #[must_use]
    pub fn first(&self) -> SocketAddr {
        self.addresses().next().unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
    }

    /// The names that a request may call these addresses by.
    pub(super) fn hosts(&self) -> Vec<String> {
        let mut hosts = Vec::new();
        for place in &self.0 {
            hosts.extend(matches!(place, Place::Localhost(_)).then(|| "localhost".to_owned()));
            for address in place.addresses() {
                match address.ip() {
                    address if address.is_unspecified() => {}
                    IpAddr::V4(address) => hosts.push(address.to_string()),
                    IpAddr::V6(address) => hosts.push(format!("[{address}]")),
                }
            }
        }
        hosts
    }

    /// The first address that is written twice.
    pub(super) fn repeated(&self) -> Option<SocketAddr> {
        let addresses: Vec<SocketAddr> = self.addresses().collect();
        let is_repeated =
            |(at, address): &(usize, &SocketAddr)| address.port() != 0 && addresses[..*at].contains(address);
        addresses.iter().enumerate().find(is_repeated).map(|(_, address)| *address)
    }

    /// Opens all of them but those that were handed over.
    pub(super) fn bind(&self, inherited: &mut Inherited) -> Result<Vec<TcpListener>, BindError> {
        let mut opened = Vec::new();
        for place in &self.0 {
            let failed = |error| BindError::Socket { place: place.to_string(), error };
            match place {
                Place::Address(address) => opened.push(self.open(*address, inherited).map_err(failed)?),
                Place::Localhost(port) => opened.extend(self.open_localhost(*port, inherited).map_err(failed)?),
            }
        }
        inherited.no_more_tcp(self)?;
        Ok(opened)
    }

    fn open(&self, address: SocketAddr, inherited: &mut Inherited) -> io::Result<TcpListener> {
        if let Some(handed) = inherited.tcp(address) {
            return TcpListener::from_std(handed);
        }
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        // Connections of a process that has just ended must not keep the port.
        socket.set_reuseaddr(true)?;
        let has_v4 = self.addresses().any(|other| other.is_ipv4() && other.port() == address.port());
        if address.is_ipv6() && address.ip().is_unspecified() && has_v4 {
            // Otherwise it would take the port of IPv4 as well.
            rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
        }
        socket.bind(address)?;
        socket.listen(BACKLOG)
    }

    /// Both loopback addresses at one port; one of them where this machine lacks the other.
    fn open_localhost(&self, port: u16, inherited: &mut Inherited) -> io::Result<Vec<TcpListener>> {
        // A port that the system chooses may be taken at the other address.
        const TRIES: u32 = 16;
        let is_missing = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported)
                || error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
        };
        let mut tries = 0;
        loop {
            tries += 1;
            let v4 = match self.open((Ipv4Addr::LOCALHOST, port).into(), inherited) {
                Err(error) if is_missing(&error) => None,
                opened => Some(opened?),
            };
            let chosen = v4.as_ref().map_or(Ok(port), |v4| v4.local_addr().map(|address| address.port()))?;
            match self.open((Ipv6Addr::LOCALHOST, chosen).into(), inherited) {
                Ok(v6) => return Ok(v4.into_iter().chain([v6]).collect()),
                Err(error) if is_missing(&error) && v4.is_some() => return Ok(v4.into_iter().collect()),
                Err(error) if port == 0 && error.kind() == io::ErrorKind::AddrInUse && tries < TRIES => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Accepts on several listeners, each in its turn where several have connections.
pub(super) struct Accepting<'a> {
    listeners: &'a [TcpListener],
    next: AtomicUsize,
}

impl<'a> Accepting<'a> {
    pub(super) fn new(listeners: &'a [TcpListener]) -> Self {
        Self { listeners, next: AtomicUsize::new(0) }
    }

    pub(super) async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        std::future::poll_fn(|context| {
            let (first, count) = (self.next.load(Ordering::Relaxed), self.listeners.len());
            for at in (first..first + count).map(|at| at % count) {
                if let ready @ std::task::Poll::Ready(_) = self.listeners[at].poll_accept(context) {
                    self.next.store(at + 1, Ordering::Relaxed);
                    return ready;
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}

impl Place {
    fn addresses(self) -> impl Iterator<Item = SocketAddr> {
        let (one, other) = match self {
            Self::Address(address) => (address, None),
            Self::Localhost(port) => {
                ((Ipv4Addr::LOCALHOST, port).into(), Some(SocketAddr::from((Ipv6Addr::LOCALHOST, port))))
            }
        };
        [one].into_iter().chain(other)
    }
}

impl FromStr for Place {
    type Err = InvalidListen;

    fn from_str(text: &str) -> Result<Self, InvalidListen> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        let wrong = |reason| Err(InvalidListen(text.to_owned(), reason));
        if text.parse::<IpAddr>().is_ok() {
            return wrong("it has no port, and IPv6 stands in brackets");
        }
        let Some((host, port)) = text.rsplit_once(':') else { return wrong("it has no port") };
        let Ok(port) = port.parse() else { return wrong("its port is no number from 0 to 65535") };
        match host {
            _ if host.eq_ignore_ascii_case("localhost") => Ok(Self::Localhost(port)),
            "" | "*" => wrong("it has no address; all addresses of this machine are 0.0.0.0 and [::]"),
            _ if host.contains(':') => wrong("IPv6 stands in brackets"),
            _ => wrong("names other than localhost are not looked up"),
        }
    }
}

impl FromStr for Listen {
    type Err = InvalidListen;

    fn from_str(text: &str) -> Result<Self, InvalidListen> {
        Ok(Self(vec![text.parse()?]))
    }
}

impl Default for Listen {
    fn default() -> Self {
        Self(vec![Place::Address((Ipv4Addr::LOCALHOST, 7227).into())])
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Localhost(port) => write!(f, "localhost:{port}"),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places: Vec<String> = self.0.iter().map(Place::to_string).collect();
        f.write_str(&places.join(","))
    }
}

/// One address as a text, several as a list.
impl Serialize for Listen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [one] => serializer.collect_str(one),
            several => serializer.collect_seq(several.iter().map(Place::to_string)),
        }
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Form)
    }
}

struct Form;

impl<'de> de::Visitor<'de> for Form {
    type Value = Listen;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "an address in quotes, as in \"127.0.0.1:7227\", or a list of them, [\"127.0.0.1:7227\", \"[::1]:7227\"]",
        )
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Listen, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut texts: A) -> Result<Listen, A::Error> {
        let mut places = Vec::new();
        while let Some(text) = texts.next_element::<String>()? {
            places.push(text.parse().map_err(de::Error::custom)?);
        }
        if places.is_empty() { Err(de::Error::invalid_length(0, &self)) } else { Ok(Listen(places)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, Serialize)]
    struct Settings {
        listen: Listen,
    }

    fn read(listen: &str) -> Result<Listen, String> {
        let settings: Result<Settings, _> = toml::from_str(&format!("listen = {listen}"));
        settings.map(|settings| settings.listen).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn one_address_or_a_list_is_taken_and_written_as_it_was() {
        for (written, addresses) in [
            ("\"127.0.0.1:7227\"", &["127.0.0.1:7227"][..]),
            ("\"[::1]:0\"", &["[::1]:0"]),
            ("\"localhost:7227\"", &["127.0.0.1:7227", "[::1]:7227"]),
            ("[\"10.0.0.1:1\", \"localhost:2\"]", &["10.0.0.1:1", "127.0.0.1:2", "[::1]:2"]),
        ] {
            let listen = read(written).unwrap();
            assert_eq!(listen.addresses().map(|address| address.to_string()).collect::<Vec<_>>(), addresses);
            assert_eq!(toml::to_string(&Settings { listen }).unwrap(), format!("listen = {written}\n"));
        }
        assert_eq!(read("[\"[::]:1\", \"LOCALHOST:2\"]").unwrap().hosts(), ["localhost", "127.0.0.1", "[::1]"]);
    }

    #[test]
    fn what_is_no_address_is_told_with_what_to_write() {
        for (wrong, told) in [
            ("\"7227\"", "it has no port"),
            ("\":7227\"", "0.0.0.0 and [::]"),
            ("\"127.0.0.1\"", "it has no port"),
            ("\"::1\"", "brackets"),
            ("\"fe80::1:x\"", "its port is no number"),
            ("\"fe80::1%eth0:1\"", "brackets"),
            ("\"127.0.0.1:70000\"", "from 0 to 65535"),
            ("\"secrets.internal:7227\"", "names other than localhost"),
            ("[\"127.0.0.1:1\", \"127.0.0.2\"]", "\"127.0.0.2\" is no address"),
        ] {
            let message = read(wrong).expect_err(wrong);
            assert!(message.contains(told) && message.contains("\"localhost:7227\""), "{wrong}: {message}");
        }
        for wrong in ["[]", "7227", "true", "[7227]"] {
            let message = read(wrong).expect_err(wrong);
            assert!(message.contains("127.0.0.1:7227") || message.contains("a string"), "{wrong}: {message}");
        }
    }

    #[test]
    fn an_address_that_stands_there_twice_is_found() {
        let repeated = |listen: &str| read(listen).unwrap().repeated().map(|address| address.to_string());
        assert_eq!(repeated("[\"127.0.0.1:1\", \"localhost:1\"]").as_deref(), Some("127.0.0.1:1"));
        assert_eq!(repeated("[\"127.0.0.1:0\", \"127.0.0.1:0\", \"127.0.0.1:1\", \"127.0.0.1:2\"]"), None);
    }

    #[tokio::test]
    async fn localhost_is_both_addresses_at_one_port_and_all_addresses_may_stand_side_by_side() {
        let opened = read("\"localhost:0\"").unwrap().bind(&mut Inherited::default()).unwrap();
        let ports: Vec<u16> = opened.iter().map(|listener| listener.local_addr().unwrap().port()).collect();
        assert!(ports.iter().all(|port| *port == ports[0] && *port != 0), "{ports:?}");
        let has_v6 = std::net::TcpListener::bind("[::1]:0").is_ok();
        assert_eq!(opened.len(), if has_v6 { 2 } else { 1 });
        if has_v6 {
            let port = std::net::TcpListener::bind("[::]:0").unwrap().local_addr().unwrap().port();
            let opened =
                read(&format!("[\"[::]:{port}\", \"0.0.0.0:{port}\"]")).unwrap().bind(&mut Inherited::default());
            // Another process may have taken the port meanwhile.
            assert!(opened.is_ok_and(|opened| opened.len() == 2));
        }
    }

    #[tokio::test]
    async fn listeners_take_turns() {
        let opened = read("[\"127.0.0.1:0\", \"127.0.0.1:0\"]").unwrap().bind(&mut Inherited::default()).unwrap();
        let addresses: Vec<SocketAddr> = opened.iter().map(|listener| listener.local_addr().unwrap()).collect();
        let mut clients = Vec::new();
        for address in addresses.iter().chain(&addresses) {
            clients.push(std::net::TcpStream::connect(address).unwrap());
        }
        let accepting = Accepting::new(&opened);
        let mut came_to = Vec::new();
        for _ in &clients {
            came_to.push(accepting.accept().await.unwrap().0.local_addr().unwrap());
        }
        assert_eq!(came_to[0], came_to[2]);
        assert_ne!(came_to[0], came_to[1]);
    }
}
