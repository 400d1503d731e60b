//! The peer at the other end of a connection, known before its first request.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use serde::{Serialize, Serializer};

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Peer {
    /// TCP. The port does not matter: a caller has a new one each time.
    Ip(IpAddr),
    /// A process that uses the Unix socket, as the kernel reports it (`SO_PEERCRED`).
    Process {
        /// Its effective user.
        uid: u32,
        /// Its effective group.
        gid: u32,
    },
}

impl Peer {
    /// Whether both count as one peer: many addresses of one host give no more of anything.
    #[must_use]
    pub fn is_one_with(self, other: Self) -> bool {
        PeerId::from(self) == PeerId::from(other)
    }

    /// The first of the addresses that count as one peer, so that a host with many of them is
    /// counted once.
    pub(super) fn host(self) -> Self {
        match (PeerId::from(self), self) {
            (PeerId::V4(octets), _) => Self::Ip(octets.into()),
            (PeerId::V6([a, b, c, d]), _) => Self::Ip([a, b, c, d, 0, 0, 0, 0].into()),
            (PeerId::Loopback, Self::Ip(address)) if address.to_canonical().is_ipv4() => {
                Self::Ip(Ipv4Addr::LOCALHOST.into())
            }
            (PeerId::Loopback | PeerId::User(_), same) => same,
        }
    }
}

impl Serialize for Peer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The unit that counts as one peer, for limits and for signs of an attack: an IPv4 address, the
/// /64 that an IPv6 host can draw addresses from, this machine with its 16 million addresses, a
/// user of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum PeerId {
    V4([u8; 4]),
    V6([u16; 4]),
    Loopback,
    User(u32),
}

impl From<Peer> for PeerId {
    fn from(peer: Peer) -> Self {
        match peer {
            Peer::Ip(address) => match address.to_canonical() {
                address if address.is_loopback() => Self::Loopback,
                IpAddr::V4(address) => Self::V4(address.octets()),
                IpAddr::V6(address) => {
                    let [a, b, c, d, ..] = address.segments();
                    Self::V6([a, b, c, d])
                }
            },
            Peer::Process { uid, .. } => Self::User(uid),
        }
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::V4(octets) => IpAddr::from(octets).fmt(f),
            Self::V6([a, b, c, d]) => write!(f, "{}/64", IpAddr::from([a, b, c, d, 0, 0, 0, 0])),
            Self::Loopback => f.write_str("loopback"),
            Self::User(uid) => write!(f, "uid:{uid}"),
        }
    }
}

/// An address, or `uid:1000`.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.to_canonical().fmt(f),
            Self::Process { uid, .. } => write!(f, "uid:{uid}"),
        }
    }
}
