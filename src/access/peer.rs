//! Who is at the other end of a connection, before anything was asked.

use std::{fmt, net::IpAddr};

use serde::{Serialize, Serializer};

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Peer {
    /// TCP. The port is of no account: a caller has a new one each time.
    Ip(IpAddr),
    /// A process that came by the Unix socket, as the kernel tells it (`SO_PEERCRED`).
    Process {
        /// Its effective user.
        uid: u32,
        /// Its effective group.
        gid: u32,
    },
}

impl Serialize for Peer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
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
