//! `[access]`: which peers and hosts are admitted, and the limits of each caller.

use std::{fmt, net::IpAddr, num::NonZeroU32, str::FromStr, sync::Arc};

use governor::Quota;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Action, Grant, InvalidToken, Peer};
use crate::{clock::Timestamp, tiers::database::TokenRow};

/// `[access]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The names that a request may call this server by, without port.
    pub hosts: Vec<String>,
    /// The proxies whose headers are trusted to say where a request came from.
    pub trusted_proxies: Vec<Network>,
    /// Requests a second that come with one token; 0 for no limit.
    pub requests_per_second_per_token: u32,
    /// How many of them may come at once; if not set, one second's worth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst_per_token: Option<u32>,
    /// Requests a second that come from one peer; 0 for no limit.
    pub requests_per_second_per_peer: u32,
    /// How many of them may come at once; if not set, one second's worth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst_per_peer: Option<u32>,
    /// The most peers that are remembered.
    pub peers: usize,
    /// Processes that need no token on the Unix socket; the first that matches counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unix_peers: Vec<UnixPeer>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hosts: ["localhost", "127.0.0.1", "[::1]"].map(str::to_owned).to_vec(),
            trusted_proxies: Vec::new(),
            requests_per_second_per_token: 100_000,
            burst_per_token: None,
            requests_per_second_per_peer: 200_000,
            burst_per_peer: None,
            peers: 10_000,
            unix_peers: Vec::new(),
        }
    }
}

/// The setting of [`Config`] that says by which names the instance is asked; the others may be wrong.
#[derive(Debug, Deserialize)]
#[serde(default)]
pub struct Names {
    /// As in [`Config::hosts`].
    pub hosts: Vec<String>,
}

impl Default for Names {
    fn default() -> Self {
        let Config { hosts, .. } = Config::default();
        Self { hosts }
    }
}

impl Config {
    /// The faults of these settings, each beginning with the setting below `access`.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for host in &self.hosts {
            let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            let is_address = bare.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6() == (bare.len() < host.len()));
            let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            if !is_address && (host.is_empty() || !host.chars().all(is_name)) {
                faults.push(format!(
                    "hosts: {host:?} is no host; write a name or address without port, as in \"localhost\" or \"[::1]\""
                ));
            }
        }
        for (name, rate, burst) in [
            ("token", self.requests_per_second_per_token, self.burst_per_token),
            ("peer", self.requests_per_second_per_peer, self.burst_per_peer),
        ] {
            if rate > 0 && burst == Some(0) {
                faults.push(format!(
                    "burst_per_{name}: at least 1 is needed; for no limit, set requests_per_second_per_{name} = 0"
                ));
            }
        }
        if self.peers == 0 {
            faults.push("peers: at least 1 is needed".to_owned());
        }
        for (index, peer) in self.unix_peers.iter().enumerate() {
            if peer.uid.is_none() && peer.gid.is_none() {
                faults.push(format!("unix_peers[{index}]: uid or gid is needed, as in uid = 1000"));
            }
            faults.extend(peer.grant().err().map(|error| format!("unix_peers[{index}]: {error}")));
        }
        faults
    }

    pub(super) fn per_token(&self) -> Option<Quota> {
        quota(self.requests_per_second_per_token, self.burst_per_token)
    }

    pub(super) fn per_peer(&self) -> Option<Quota> {
        quota(self.requests_per_second_per_peer, self.burst_per_peer)
    }
}

fn quota(rate: u32, burst: Option<u32>) -> Option<Quota> {
    let rate = NonZeroU32::new(rate)?;
    Some(Quota::per_second(rate).allow_burst(burst.and_then(NonZeroU32::new).unwrap_or(rate)))
}

/// The rights of a process that uses the Unix socket without a token: `[[access.unix_peers]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct UnixPeer {
    /// Its name, for people.
    pub name: String,
    /// Its effective user, as the kernel reports it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Its effective group; where both are given, both must be its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// The tenants it reaches, as globs.
    pub tenants: Vec<String>,
    /// The secret keys it reaches there, as globs.
    #[serde(default = "every_key")]
    pub keys: Vec<String>,
    /// The actions that it may do there.
    pub actions: Vec<Action>,
}

fn every_key() -> Vec<String> {
    vec!["*".to_owned()]
}

impl UnixPeer {
    pub(super) fn is(&self, peer: Peer) -> bool {
        let Peer::Process { uid, gid } = peer else { return false };
        (self.uid.is_some() || self.gid.is_some())
            && self.uid.is_none_or(|wanted| wanted == uid)
            && self.gid.is_none_or(|wanted| wanted == gid)
    }

    /// The process's grant, by the rules of tokens. No token opens it: its id is none that a
    /// token can have, and it is kept apart from the tokens' grants.
    pub(super) fn grant(&self) -> Result<Grant, InvalidToken> {
        let id = match (self.uid, self.gid) {
            (Some(uid), _) => format!("uid:{uid}"),
            (None, Some(gid)) => format!("gid:{gid}"),
            (None, None) => "nobody".to_owned(),
        };
        let row = TokenRow {
            id,
            name: self.name.clone(),
            hash: rand::random(),
            tenants: self.tenants.clone(),
            keys: self.keys.clone(),
            actions: self.actions.iter().map(|action| action.as_str().to_owned()).collect(),
            expires_at: None,
            created_at: Timestamp::from_millis(0),
            revoked_at: None,
            last_used_at: None,
            replaced_by: None,
        };
        Grant::from_row(row, Arc::default())
    }
}

/// A range of addresses: `10.0.0.0/8`, or a single one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network(IpNet);

impl Network {
    /// Whether the address is one of them; an IPv4-mapped IPv6 address counts as IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

/// A text that is not a network.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no network; write one as in \"10.0.0.0/8\", \"fd00::/8\" or \"10.1.2.3\"")]
pub struct InvalidNetwork(String);

impl FromStr for Network {
    type Err = InvalidNetwork;

    fn from_str(text: &str) -> Result<Self, InvalidNetwork> {
        let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network.map(Self).map_err(|_| InvalidNetwork(text.to_owned()))
    }
}

impl TryFrom<String> for Network {
    type Error = InvalidNetwork;

    fn try_from(text: String) -> Result<Self, InvalidNetwork> {
        text.parse()
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.to_string()
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_meant_is_named() {
        for (toml, told) in [
            ("hosts = [\"localhost:80\"]", "without port"),
            ("hosts = [\"::1\"]", "[::1]"),
            ("hosts = [\"http://localhost\"]", "hosts"),
            ("hosts = [\"\"]", "hosts"),
            ("trusted_proxies = [\"10.0.0.0/33\"]", "10.0.0.0/8"),
            ("burst_per_peer = 0", "burst_per_peer"),
            ("peers = 0", "at least 1"),
            ("[[unix_peers]]\nname = \"a\"\ntenants = [\"*\"]\nactions = [\"read\"]", "uid or gid"),
            ("[[unix_peers]]\nname = \"a\"\nuid = 1\ntenants = [\"[\"]\nactions = [\"read\"]", "pattern"),
            ("[[unix_peers]]\nname = \"a\"\nuid = 1\ntenants = [\"*\"]\nactions = []", "action"),
        ] {
            let message = match toml::from_str::<Config>(toml) {
                Ok(config) => config.faults().join(", "),
                Err(error) => error.to_string(),
            };
            assert!(message.contains(told), "{toml} gave {message:?}");
        }
        assert!(Config::default().faults().is_empty());
    }

    #[test]
    fn a_process_is_known_by_what_is_configured_of_it() {
        let peer = |uid, gid| UnixPeer {
            name: "api".to_owned(),
            uid,
            gid,
            tenants: every_key(),
            keys: every_key(),
            actions: vec![Action::Read],
        };
        let process = Peer::Process { uid: 1000, gid: 100 };
        assert!(peer(Some(1000), None).is(process) && peer(None, Some(100)).is(process));
        assert!(peer(Some(1000), Some(100)).is(process) && !peer(Some(1000), Some(101)).is(process));
        assert!(!peer(Some(0), None).is(process) && !peer(None, None).is(process));
        assert!(!peer(Some(1000), None).is(Peer::Ip(IpAddr::from([127, 0, 0, 1]))));
        assert_eq!(peer(Some(1000), Some(100)).grant().unwrap().id, "uid:1000");
        assert_eq!(peer(None, Some(100)).grant().unwrap().id, "gid:100");
    }

    #[test]
    fn a_network_holds_its_addresses_in_either_form() {
        let network: Network = "10.0.0.0/8".parse().unwrap();
        assert!(network.contains(IpAddr::from([10, 1, 2, 3])) && network.contains("::ffff:10.1.2.3".parse().unwrap()));
        assert!(!network.contains(IpAddr::from([11, 0, 0, 0])));
        let alone: Network = "fd00::1".parse().unwrap();
        assert!(alone.contains("fd00::1".parse().unwrap()) && !alone.contains("fd00::2".parse().unwrap()));
    }
}
