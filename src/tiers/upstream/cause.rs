//! Why upstream cannot be used: one stable word for programs, and one sentence for operators.

use std::error::Error;

use rustls::CertificateError;

/// The causes that can be told apart from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The host's name is not known.
    Dns,
    /// Nothing listens there.
    Refused,
    /// There is no connection, or it broke.
    Connection,
    /// Nothing came in time.
    Timeout,
    /// The certificate's issuer is not trusted.
    TlsCertificateUnknown,
    /// The certificate is not valid any more, or not yet.
    TlsCertificateExpired,
    /// The certificate is for another name.
    TlsCertificateName,
    /// TLS failed in another way.
    Tls,
    /// There is no connection to the proxy in between.
    ProxyUnreachable,
    /// The proxy wants another user and password.
    ProxyLoginRefused,
    /// The proxy makes no tunnel.
    ProxyRefused,
    /// No connection through the proxy came about in time.
    ProxyTimeout,
    /// Something else than Infisical answers.
    NotInfisical,
    /// It redirects elsewhere.
    Redirected,
    /// It knows no such route.
    NoRoute,
    /// It says that it is broken.
    Failed,
    /// It refuses the login.
    LoginRefused,
    /// It has locked the identity.
    IdentityLocked,
    /// It lets the identity in from other addresses only.
    AddressNotAllowed,
    /// There is no such project, or the identity is not in it.
    Project,
    /// There is no such environment.
    Environment,
    /// There is no such folder.
    TenantsPath,
    /// It rejects the request for another reason.
    Rejected,
    /// The directory cannot be read.
    Directory,
}

impl Cause {
    /// All causes; the position of each is its number plus one.
    pub const ALL: [Self; 24] = [
        Self::Dns,
        Self::Refused,
        Self::Connection,
        Self::Timeout,
        Self::TlsCertificateUnknown,
        Self::TlsCertificateExpired,
        Self::TlsCertificateName,
        Self::Tls,
        Self::ProxyUnreachable,
        Self::ProxyLoginRefused,
        Self::ProxyRefused,
        Self::ProxyTimeout,
        Self::NotInfisical,
        Self::Redirected,
        Self::NoRoute,
        Self::Failed,
        Self::LoginRefused,
        Self::IdentityLocked,
        Self::AddressNotAllowed,
        Self::Project,
        Self::Environment,
        Self::TenantsPath,
        Self::Rejected,
        Self::Directory,
    ];

    /// The number by which it is kept in an atomic; 0 is no cause.
    pub(super) fn to_number(this: Option<Self>) -> u8 {
        let place = this.and_then(|this| Self::ALL.iter().position(|cause| *cause == this));
        place.map_or(0, |place| u8::try_from(place + 1).unwrap_or(0))
    }

    pub(super) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// The word in answers, `/readyz`, metrics and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Refused => "refused",
            Self::Connection => "connection",
            Self::Timeout => "timeout",
            Self::TlsCertificateUnknown => "tls_certificate_unknown",
            Self::TlsCertificateExpired => "tls_certificate_expired",
            Self::TlsCertificateName => "tls_certificate_name",
            Self::Tls => "tls",
            Self::ProxyUnreachable => "proxy_unreachable",
            Self::ProxyLoginRefused => "proxy_login_refused",
            Self::ProxyRefused => "proxy_refused",
            Self::ProxyTimeout => "proxy_timeout",
            Self::NotInfisical => "not_infisical",
            Self::Redirected => "redirected",
            Self::NoRoute => "no_route",
            Self::Failed => "failed",
            Self::LoginRefused => "login_refused",
            Self::IdentityLocked => "identity_locked",
            Self::AddressNotAllowed => "address_not_allowed",
            Self::Project => "project",
            Self::Environment => "environment",
            Self::TenantsPath => "tenants_path",
            Self::Rejected => "rejected",
            Self::Directory => "directory",
        }
    }

    /// A sentence for operators: the fault, then the remedy.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::Dns => "the host name in infisical.site_url is not known; check the name, and this machine's DNS",
            Self::Refused => {
                "nothing listens at infisical.site_url; check its host and port, and whether Infisical runs"
            }
            Self::Connection => {
                "there is no connection to infisical.site_url, or it broke; check the network and the firewalls between"
            }
            Self::Timeout => {
                "upstream did not answer in time (infisical.timeout, directory.timeout); check the network, and what it is \
                 busy with"
            }
            Self::TlsCertificateUnknown => {
                "the certificate of infisical.site_url comes from an authority that is not trusted; name that authority's \
                 certificate in infisical.ca_file"
            }
            Self::TlsCertificateExpired => {
                "the certificate of infisical.site_url is not valid now; renew it, and check the clock of this machine"
            }
            Self::TlsCertificateName => {
                "the certificate of infisical.site_url is for another host; use the name that the certificate has"
            }
            Self::Tls => {
                "no TLS connection to infisical.site_url, or a certificate that cannot be used; check that its port speaks HTTPS, \
                 and see the log"
            }
            Self::ProxyUnreachable => {
                "there is no connection to the proxy; check host and port in infisical.proxy, and whether the proxy runs"
            }
            Self::ProxyLoginRefused => {
                "the proxy refuses user and password, or wants some (407); check those in infisical.proxy"
            }
            Self::ProxyRefused => {
                "the proxy makes no tunnel to infisical.site_url; check that it allows CONNECT to that host and port, and \
                 reaches them: its own log has the reason"
            }
            Self::ProxyTimeout => {
                "no connection through infisical.proxy in time (infisical.timeout); check that the proxy answers, and that it \
                 reaches infisical.site_url"
            }
            Self::NotInfisical => {
                "what answers at infisical.site_url is not Infisical; check the address, and the proxies and firewalls \
                 in front of it"
            }
            Self::Redirected => {
                "infisical.site_url redirects elsewhere, which is not followed; set it to the final address"
            }
            Self::NoRoute => {
                "infisical.site_url knows no such route; it is the address of the site alone, without /api at its end"
            }
            Self::Failed => {
                "Infisical, or a proxy in front of it, answers that it is broken (5xx); its own log has the reason"
            }
            Self::LoginRefused => {
                "Infisical refuses the login; check infisical.client_id and infisical.client_secret, and that \
                 infisical.site_url is the region that the identity is in"
            }
            Self::IdentityLocked => {
                "Infisical has locked the identity after failed logins; wait a few minutes, or unlock it there"
            }
            Self::AddressNotAllowed => {
                "Infisical does not let the identity in from this machine's address; add it to the identity's trusted IPs"
            }
            Self::Project => {
                "Infisical has no such project, or the identity is not in it; check infisical.project_id, and add the \
                 identity to the project"
            }
            Self::Environment => "Infisical has no such environment in the project; check environment",
            Self::TenantsPath => "the folder infisical.tenants_path does not exist in this environment; check both",
            Self::Rejected => {
                "Infisical rejects the request; check infisical.project_id, environment and infisical.tenants_path"
            }
            Self::Directory => {
                "directory.path, or something in it, cannot be read; check that it exists, is mounted, and may be read"
            }
        }
    }

    /// Whether the fault is at the proxy in between, or beyond it and only the proxy can tell.
    #[must_use]
    pub fn is_of_proxy(self) -> bool {
        matches!(self, Self::ProxyUnreachable | Self::ProxyLoginRefused | Self::ProxyRefused | Self::ProxyTimeout)
    }

    /// Reads the chain of an error of a connection. Its texts are the libraries' own, and stand in
    /// tests: a library that words them otherwise fails there.
    pub(super) fn of_connection(error: &(dyn Error + 'static)) -> Self {
        let mut cause = Self::Connection;
        let mut link = Some(error);
        while let Some(error) = link {
            if let Some(found) = Self::of_link(error) {
                cause = found;
            }
            // The sources below say the same of the proxy: that nothing listens there, say.
            if cause.is_of_proxy() {
                break;
            }
            link = error.source();
        }
        cause
    }

    fn of_link(error: &(dyn Error + 'static)) -> Option<Self> {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            // An error of TLS is carried in one of io, and is no source of it.
            if let Some(inner) = io.get_ref() {
                return Self::of_link(inner);
            }
            return match io.kind() {
                std::io::ErrorKind::ConnectionRefused => Some(Self::Refused),
                _ => None,
            };
        }
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(match tls {
                rustls::Error::InvalidCertificate(problem) => match problem {
                    CertificateError::Expired
                    | CertificateError::ExpiredContext { .. }
                    | CertificateError::NotValidYet
                    | CertificateError::NotValidYetContext { .. } => Self::TlsCertificateExpired,
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                        Self::TlsCertificateName
                    }
                    CertificateError::UnknownIssuer => Self::TlsCertificateUnknown,
                    _ => Self::Tls,
                },
                _ => Self::Tls,
            });
        }
        let text = error.to_string();
        match text.strip_prefix("tunnel error: ") {
            Some("failed to create underlying connection") => Some(Self::ProxyUnreachable),
            Some("proxy authorization required") => Some(Self::ProxyLoginRefused),
            Some(_) => Some(Self::ProxyRefused),
            None => text.starts_with("dns error").then_some(Self::Dns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn each_cause_has_a_number_and_a_word_of_its_own() {
        let mut words = std::collections::HashSet::new();
        let metrics = Metrics::new().render();
        for cause in Cause::ALL {
            let series = format!("secretier_upstream_failures_total{{cause=\"{}\"}} 0\n", cause.as_str());
            assert!(metrics.contains(&series), "an alert waits for it: {series}");
            assert_eq!(Cause::from_number(Cause::to_number(Some(cause))), Some(cause));
            assert!(words.insert(cause.as_str()), "{cause:?}");
        }
        assert_eq!((Cause::to_number(None), Cause::from_number(0), Cause::from_number(200)), (0, None, None));
    }
}
