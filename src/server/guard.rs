//! Checks every request before anything else, health included: that it is exactly one
//! well-formed request, and that it was meant for this server.
//!
//! A page in a browser can be made to ask `localhost` under a name of its own (DNS
//! rebinding), and a service can be talked into asking for others (server-side request
//! forgery). The first names a foreign host, the second mostly comes through a proxy that
//! adds a header. CORS is not answered at all: no page may read an answer.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Version, header};

use super::{listen::Listen, respond::Problem};
use crate::access::{self, Network, Peer};

/// The rules, from the configuration.
#[derive(Debug)]
pub(super) struct Guard {
    hosts: Vec<String>,
    proxies: Vec<Network>,
}

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

impl Guard {
    pub(super) fn build(config: &access::Config, listen: &Listen) -> Self {
        let mut hosts = config.hosts.clone();
        hosts.extend(listen.hosts());
        Self { hosts, proxies: config.trusted_proxies.clone() }
    }

    /// Admits a request, and returns the address that it comes from, its peer's or the one that a
    /// trusted proxy names, and the scan of its headers.
    ///
    /// hyper has already refused requests that it cannot read: a length that is invalid or differs
    /// from another, an encoding that does not end in `chunked`, white space before a colon,
    /// folded lines. A line may end in a bare line feed. Where a length stands beside
    /// `Transfer-Encoding`, before or after it, hyper goes by the encoding and removes the
    /// length, so that it cannot be seen here, and closes the connection after the answer:
    /// nothing that follows is read as a request. Equal lengths are one length.
    pub(super) fn pass<'h, B>(&self, peer: Peer, request: &'h Request<B>) -> Result<(Peer, HeaderScan<'h>), Problem> {
        // Other targets are `*`, and `host:port` of CONNECT.
        if !request.uri().path().starts_with('/') {
            return Err(Problem::invalid_request("the target is a path, as in GET /healthz"));
        }
        let seen = HeaderScan::of(request.headers())?;
        match peer {
            // No browser reaches the Unix socket, whatever name it was made to believe.
            Peer::Process { .. } if request.version() != Version::HTTP_11 || seen.host.is_some() => {}
            Peer::Process { .. } => return Err(no_host()),
            Peer::Ip(_) => {
                let authority = request.uri().authority().map(|authority| authority.as_str());
                let host = seen.host.map(HeaderValue::as_bytes);
                if host.is_none() && (authority.is_none() || request.version() <= Version::HTTP_11) {
                    return Err(no_host());
                }
                if !authority.map(str::as_bytes).into_iter().chain(host).all(|host| self.is_ours(host)) {
                    return Err(Problem::bad_host());
                }
            }
        }
        if !seen.was_forwarded {
            return Ok((peer, seen));
        }
        match peer {
            Peer::Ip(address) if self.trusts(address) => {
                Ok((self.origin(request.headers()).map_or(peer, Peer::Ip), seen))
            }
            Peer::Ip(_) | Peer::Process { .. } => Err(Problem::forwarded()),
        }
    }

    fn is_ours(&self, host: &[u8]) -> bool {
        without_port(host).is_some_and(|host| {
            // Nearly every client writes it in our case.
            self.hosts.iter().any(|ours| host == ours.as_bytes())
                || self.hosts.iter().any(|ours| host.eq_ignore_ascii_case(ours.as_bytes()))
        })
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.proxies.iter().any(|proxy| proxy.contains(address))
    }

    /// The address that a request came from, by a trusted proxy: the last one in the chain that is
    /// not trusted itself. Anybody may have written the entries to the left of it.
    /// `None` where it cannot be read; also where both headers are there, because the proxy
    /// has written one, and may have passed on the other as the caller made it up.
    fn origin(&self, headers: &HeaderMap) -> Option<IpAddr> {
        let lines = |name| headers.get_all(name).iter().rev().map(|line| line.to_str().ok());
        let untrusted = |found: &Option<IpAddr>| found.is_none_or(|address| !self.trusts(address));
        match (headers.contains_key(X_FORWARDED_FOR), headers.contains_key(header::FORWARDED)) {
            (true, false) => {
                let hops = lines(X_FORWARDED_FOR).flat_map(|line| line.unwrap_or_default().rsplit(','));
                hops.map(address).find(untrusted)?
            }
            (false, true) => {
                let hops = lines(header::FORWARDED).flat_map(|line| line.unwrap_or_default().rsplit(','));
                hops.map(forwarded_for).find(untrusted)?
            }
            (true, true) | (false, false) => None,
        }
    }
}

fn no_host() -> Problem {
    Problem::invalid_request("a request names its server, in one header Host")
}

/// The findings of one pass over the headers.
#[derive(Debug)]
pub(super) struct HeaderScan<'a> {
    host: Option<&'a HeaderValue>,
    pub(super) authorization: Option<&'a HeaderValue>,
    was_forwarded: bool,
    /// Whether a header asks for something other than a secret as it is:
    /// `Cache-Control`, `If-None-Match`.
    pub(super) is_conditional: bool,
    /// Whether there is an `Accept` header.
    pub(super) has_preference: bool,
    /// Whether there is an `X-Audit-*` header.
    pub(super) has_audit_fields: bool,
}

impl<'a> HeaderScan<'a> {
    fn of(headers: &'a HeaderMap) -> Result<Self, Problem> {
        let mut seen = Self {
            host: None,
            authorization: None,
            was_forwarded: false,
            is_conditional: false,
            has_preference: false,
            has_audit_fields: false,
        };
        let (mut lengths, mut encodings) = (0, 0);
        for (name, value) in headers {
            match *name {
                header::HOST if seen.host.is_some() => return Err(no_host()),
                header::HOST => seen.host = Some(value),
                header::AUTHORIZATION if seen.authorization.is_some() => {
                    return Err(Problem::invalid_request("one header Authorization is enough"));
                }
                header::AUTHORIZATION => seen.authorization = Some(value),
                header::CACHE_CONTROL | header::IF_NONE_MATCH => seen.is_conditional = true,
                header::ACCEPT => seen.has_preference = true,
                header::CONTENT_LENGTH => lengths += 1,
                header::TRANSFER_ENCODING => {
                    encodings += 1;
                    if !value.as_bytes().eq_ignore_ascii_case(b"chunked") {
                        return Err(Problem::invalid_request("the only encoding of a body is chunked"));
                    }
                }
                header::FORWARDED | header::VIA => seen.was_forwarded = true,
                _ => {
                    if let Some(name) = name.as_str().strip_prefix("x-") {
                        seen.was_forwarded |= name.starts_with("forwarded-");
                        seen.has_audit_fields |= name.starts_with("audit-");
                    }
                }
            }
        }
        if lengths + encodings > 1 {
            return Err(Problem::invalid_request("a body has one Content-Length, or Transfer-Encoding: chunked"));
        }
        Ok(seen)
    }
}

/// The host of `[::1]:80` is `[::1]`; `None` where it is no host with or without a port.
fn without_port(host: &[u8]) -> Option<&[u8]> {
    let end = match host {
        [b'[', ..] => host.iter().position(|&byte| byte == b']')? + 1,
        _ => host.iter().position(|&byte| byte == b':').unwrap_or(host.len()),
    };
    let (name, port) = host.split_at(end);
    match port {
        [] => Some(name),
        [b':', digits @ ..] if digits.iter().all(u8::is_ascii_digit) => Some(name),
        _ => None,
    }
}

/// The address of an element of `X-Forwarded-For`, with or without a port.
fn address(hop: &str) -> Option<IpAddr> {
    let hop = hop.trim();
    let bare = hop.strip_prefix('[').and_then(|hop| hop.strip_suffix(']')).unwrap_or(hop);
    bare.parse().ok().or_else(|| hop.parse().ok().map(|address: SocketAddr| address.ip()))
}

/// The address in one element of `Forwarded` (RFC 7239): `proto=https;for="[2001:db8::1]:80"`.
fn forwarded_for(hop: &str) -> Option<IpAddr> {
    let mut pairs = hop.split(';').filter_map(|pair| pair.trim().split_once('='));
    let (_, node) = pairs.find(|(name, _)| name.eq_ignore_ascii_case("for"))?;
    address(node.strip_prefix('"').and_then(|node| node.strip_suffix('"')).unwrap_or(node))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: Peer = Peer::Ip(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
    const PROXY: &str = "10.0.0.1";
    const PROCESS: Peer = Peer::Process { uid: 1000, gid: 1000 };

    fn guard() -> Guard {
        let config = access::Config { trusted_proxies: vec!["10.0.0.0/8".parse().unwrap()], ..Default::default() };
        Guard::build(&config, &"192.0.2.7:7227".parse().unwrap())
    }

    fn passes(peer: Peer, version: Version, target: &str, headers: &[(&str, &str)]) -> Result<Peer, &'static str> {
        let mut request = http::Request::builder().version(version).uri(target);
        for &(name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(()).unwrap();
        guard().pass(peer, &request).map(|(peer, _)| peer).map_err(|problem| problem.code)
    }

    fn with_host(host: &str) -> Result<Peer, &'static str> {
        passes(LOOPBACK, Version::HTTP_11, "/", &[("host", host)])
    }

    #[test]
    fn a_host_is_one_of_ours_whatever_its_port_and_case() {
        for ours in ["localhost", "LocalHost:7227", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:7227", "192.0.2.7:7227"]
        {
            assert_eq!(with_host(ours), Ok(LOOPBACK), "{ours}");
        }
        for other in [
            "evil.example",
            "localhost.evil.example",
            "localhost.",
            "evil@localhost",
            "localhost@evil",
            "localhost:80@evil",
            "localhost:80:80",
            "::1",
            "[::1",
            "[::1]x",
            "192.0.2.8",
            "",
        ] {
            assert_eq!(with_host(other), Err("bad_host"), "{other}");
        }
    }

    #[test]
    fn where_a_server_is_named_twice_both_names_must_be_ours() {
        let (ours, other) = (("host", "localhost"), ("host", "evil.example"));
        for (version, target, headers, outcome) in [
            (Version::HTTP_11, "http://localhost/", &[ours][..], Ok(LOOPBACK)),
            (Version::HTTP_11, "http://evil.example/", &[ours], Err("bad_host")),
            (Version::HTTP_11, "http://localhost/", &[other], Err("bad_host")),
            (Version::HTTP_11, "http://localhost/", &[], Err("invalid_request")),
            (Version::HTTP_11, "/", &[], Err("invalid_request")),
            (Version::HTTP_10, "/", &[], Err("invalid_request")),
            (Version::HTTP_11, "/", &[ours, ours], Err("invalid_request")),
            (Version::HTTP_2, "http://localhost/", &[], Ok(LOOPBACK)),
            (Version::HTTP_2, "http://localhost:7227/", &[other], Err("bad_host")),
            (Version::HTTP_2, "http://evil.example/", &[], Err("bad_host")),
            (Version::HTTP_2, "/", &[], Err("invalid_request")),
        ] {
            assert_eq!(passes(LOOPBACK, version, target, headers), outcome, "{version:?} {target} {headers:?}");
        }
        assert_eq!(passes(PROCESS, Version::HTTP_11, "/", &[other]), Ok(PROCESS), "no browser comes this way");
        assert_eq!(passes(PROCESS, Version::HTTP_11, "/", &[]), Err("invalid_request"));
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for headers in [
            &[("authorization", "Bearer a"), ("authorization", "Bearer b")][..],
            &[("content-length", "1"), ("content-length", "1")],
            &[("content-length", "1"), ("transfer-encoding", "chunked")],
            &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
            &[("transfer-encoding", "gzip, chunked")],
        ] {
            let headers = [&[("host", "localhost")], headers].concat();
            assert_eq!(passes(LOOPBACK, Version::HTTP_11, "/", &headers), Err("invalid_request"), "{headers:?}");
        }
        for target in ["*", "localhost:80"] {
            let outcome = passes(LOOPBACK, Version::HTTP_11, target, &[("host", "localhost")]);
            assert_eq!(outcome, Err("invalid_request"), "{target}");
        }
    }

    #[test]
    fn a_forwarded_request_passes_only_from_a_trusted_proxy() {
        for name in ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Anything", "Via"] {
            let headers = [("host", "localhost"), (name, "1.1 proxy")];
            for peer in [LOOPBACK, PROCESS] {
                assert_eq!(passes(peer, Version::HTTP_11, "/", &headers), Err("forwarded_request"), "{name}");
            }
            let proxy = Peer::Ip(PROXY.parse().unwrap());
            assert_eq!(passes(proxy, Version::HTTP_11, "/", &headers), Ok(proxy), "{name}");
        }
    }

    #[test]
    fn who_asks_is_the_last_that_no_trusted_proxy_has_vouched_for() {
        let from = |headers: &[(&str, &str)]| {
            let headers = [&[("host", "localhost")], headers].concat();
            let peer = passes(Peer::Ip(PROXY.parse().unwrap()), Version::HTTP_11, "/", &headers).unwrap();
            peer.to_string()
        };
        let x = "x-forwarded-for";
        for (headers, origin) in [
            (&[(x, "192.0.2.1")][..], "192.0.2.1"),
            (&[(x, "6.6.6.6, 192.0.2.1,10.2.2.2")], "192.0.2.1"),
            (&[(x, "6.6.6.6"), (x, "192.0.2.1")], "192.0.2.1"),
            (&[(x, "192.0.2.1:4711")], "192.0.2.1"),
            (&[(x, "[2001:db8::1]:4711")], "2001:db8::1"),
            (&[(x, "2001:db8::1")], "2001:db8::1"),
            (&[(x, "6.6.6.6, unknown")], PROXY),
            (&[(x, "6.6.6.6,")], PROXY),
            (&[(x, "10.0.0.9")], PROXY),
            (&[(x, "")], PROXY),
            (&[("forwarded", "for=192.0.2.1;proto=http;by=10.0.0.1")], "192.0.2.1"),
            (&[("forwarded", "for=6.6.6.6, proto=https; For=\"[2001:db8::1]:80\"")], "2001:db8::1"),
            (&[("forwarded", "for=_hidden")], PROXY),
            (&[("forwarded", "for=6.6.6.6"), (x, "192.0.2.1")], PROXY),
            (&[("via", "1.1 proxy")], PROXY),
        ] {
            assert_eq!(from(headers), origin, "{headers:?}");
        }
    }
}
