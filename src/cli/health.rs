//! `secretier health`: asks the instance that runs with this configuration, for the health check of a
//! container or a service manager.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::Args;
use reqwest::{StatusCode, header};
use serde_json::{Value, json};

use super::{ConfigFile, Failure, chain};
use crate::{
    certificate::ShownCertificate,
    config::{Loaded, Reach},
    tls,
};

#[derive(Debug, Args)]
pub(super) struct Health {
    #[command(flatten)]
    config: ConfigFile,
    /// Ask only whether the process answers, not whether lookups can be answered
    #[arg(long)]
    live: bool,
    /// Print the state as JSON
    #[arg(long)]
    json: bool,
}

/// How long the instance may take to answer, connection included.
const TIMEOUT: Duration = Duration::from_secs(2);

/// More than the longest state.
const MAX_LEN: usize = 64 << 10;

impl Health {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let reach = Loaded::reach(self.config.config.as_deref())?;
        let instance = Instance::of(reach)?;
        let path = if self.live { "/healthz" } else { "/readyz" };
        let asked = tokio::time::timeout(TIMEOUT, instance.ask(path)).await;
        let (status, body) = asked.unwrap_or_else(|_| {
            Err(Failure::told(format!("no answer from {instance} within {} s", TIMEOUT.as_secs())))
        })?;
        let state = if self.live { alive(status) } else { readiness(&body) };
        let Some(state) = state else {
            return Err(Failure::told(match status {
                StatusCode::FORBIDDEN => format!("{instance} answers 403: is access.hosts what it was started with?"),
                _ => format!("{instance} answers {}, which tells no state", status.as_u16()),
            }));
        };
        match self.json {
            true => println!("{state}"),
            false => println!("{}", line(&state)),
        }
        Ok(if status.is_success() { ExitCode::SUCCESS } else { ExitCode::from(1) })
    }
}

fn alive(status: StatusCode) -> Option<Value> {
    status.is_success().then(|| json!({ "status": "alive" }))
}

/// The answer of `/readyz`, whether it is good news or not.
fn readiness(body: &[u8]) -> Option<Value> {
    serde_json::from_slice(body).ok().filter(|state: &Value| state["status"].is_string() && state["tiers"].is_object())
}

/// The state in one line: a word, and the parts that it comes from.
fn line(state: &Value) -> String {
    let parts = [
        ("database", "/tiers/database/state"),
        ("writes", "/tiers/database/writes"),
        ("upstream", "/tiers/infisical/state"),
        ("cause", "/tiers/infisical/cause"),
        ("audit", "/audit/state"),
        ("started_from", "/started_from"),
        ("detached_since", "/detached_since"),
    ];
    let word = |place| state.pointer(place).and_then(Value::as_str);
    let parts = parts.into_iter().filter_map(|(name, place)| Some(format!(" {name}={}", word(place)?)));
    [word("/status").unwrap_or_default().to_owned()].into_iter().chain(parts).collect()
}

/// The instance's nearest listener: the Unix socket where there is one, for it needs neither TLS
/// nor a name.
#[derive(Debug)]
enum Instance {
    Unix(PathBuf),
    Tcp {
        address: SocketAddr,
        /// A name that it answers to.
        host: String,
        /// The file of its certificate, where it serves TLS.
        certificate: Option<PathBuf>,
    },
}

impl Instance {
    /// # Errors
    /// The configuration tells of no listener that can be asked.
    fn of(reach: Reach) -> Result<Self, Failure> {
        if let Some(path) = reach.server.unix_socket {
            return Ok(Self::Unix(path));
        }
        let listen = reach.server.listen.first();
        if listen.port() == 0 {
            return Err(Failure::usage(
                "server.listen leaves the port to the system, so nobody else knows it: name one, or set server.unix_socket",
            ));
        }
        if reach.server.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some()) {
            return Err(Failure::usage(
                "server.tls.client_ca asks every client for a certificate: set server.unix_socket too, and health asks there",
            ));
        }
        let address = SocketAddr::new(nearest(listen.ip()), listen.port());
        let own = match address.ip() {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        };
        let answers_to_address = !listen.ip().is_unspecified() || reach.access.hosts.contains(&own);
        let host = if answers_to_address { own } else { reach.access.hosts.into_iter().next().unwrap_or(own) };
        Ok(Self::Tcp { address, host, certificate: reach.server.tls.map(|tls| tls.certificate) })
    }

    /// Asks without a token. Gives the status and the body of whatever answers.
    async fn ask(&self, path: &str) -> Result<(StatusCode, Vec<u8>), Failure> {
        let client =
            reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).pool_max_idle_per_host(0);
        let no_tls = |error| Failure::failed("no TLS", error);
        let (client, url, host, shown) = match self {
            Self::Unix(socket) => {
                let tls = tls::client_config("http:", None).map_err(no_tls)?;
                let client = client.tls_backend_preconfigured(tls).unix_socket(socket.as_path());
                (client, format!("http://localhost{path}"), "localhost", None)
            }
            Self::Tcp { address, host, certificate: None } => {
                let tls = tls::client_config("http:", None).map_err(no_tls)?;
                (client.tls_backend_preconfigured(tls), format!("http://{address}{path}"), host.as_str(), None)
            }
            Self::Tcp { address, host, certificate: Some(file) } => {
                let shown = Arc::new(ShownCertificate::default());
                let tls = shown.client_config().map_err(no_tls)?;
                let client = client.tls_backend_preconfigured(tls);
                (client, format!("https://{address}{path}"), host.as_str(), Some((shown, file)))
            }
        };
        let client = client.build().map_err(|error| Failure::failed("no client", error))?;
        let failed =
            |error: reqwest::Error| Failure::told(chain(&format!("no answer from {self}"), &error.without_url()));
        let mut answer = client.get(url).header(header::HOST, host).send().await.map_err(failed)?;
        if let Some((shown, file)) = shown
            && !shown.is_in(file)
        {
            eprintln!("warning: {self} serves another certificate than {} holds", file.display());
        }
        let mut body = Vec::new();
        while let Some(part) = answer.chunk().await.map_err(failed)? {
            body.extend_from_slice(&part);
            if body.len() > MAX_LEN {
                return Err(Failure::told(format!("{self} does not end its answer")));
            }
        }
        Ok((answer.status(), body))
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp { address, certificate: None, .. } => write!(f, "http://{address}"),
            Self::Tcp { address, certificate: Some(_), .. } => write!(f, "https://{address}"),
        }
    }
}

/// Where this machine reaches an address that is listened on.
fn nearest(listen: IpAddr) -> IpAddr {
    match listen {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(toml: &str) -> Result<Instance, Failure> {
        Instance::of(toml::from_str(toml).unwrap())
    }

    #[test]
    fn it_asks_the_nearest_listener_by_a_name_that_it_answers_to() {
        for (toml, asked, name) in [
            ("", "http://127.0.0.1:7227", "127.0.0.1"),
            ("[server]\nlisten = \"[::]:1\"", "http://[::1]:1", "[::1]"),
            (
                "[server]\nlisten = \"0.0.0.0:1\"\n[access]\nhosts = [\"proxy.internal\"]",
                "http://127.0.0.1:1",
                "proxy.internal",
            ),
            ("[server]\nlisten = \"192.0.2.1:1\"\n[access]\nhosts = []", "http://192.0.2.1:1", "192.0.2.1"),
            (
                "[server]\nlisten = \"127.0.0.1:1\"\n[server.tls]\ncertificate = \"c\"\nprivate_key = \"k\"",
                "https://127.0.0.1:1",
                "127.0.0.1",
            ),
        ] {
            let found = instance(toml).unwrap();
            assert_eq!(found.to_string(), asked);
            assert!(matches!(&found, Instance::Tcp { host, .. } if host == name), "{found:?}");
        }
        let both = instance("[server]\nlisten = \"127.0.0.1:0\"\nunix_socket = \"/run/s.sock\"").unwrap();
        assert_eq!(both.to_string(), "/run/s.sock");
    }

    #[test]
    fn the_state_is_one_line() {
        let state = json!({
            "status": "degraded",
            "tiers": {
                "memory": { "state": "up" },
                "database": { "state": "up", "writes": "refused" },
                "infisical": { "state": "down", "cause": "timeout" },
            },
            "audit": { "state": "up" },
        });
        assert_eq!(line(&state), "degraded database=up writes=refused upstream=down cause=timeout audit=up");
        assert_eq!(line(&alive(StatusCode::OK).unwrap()), "alive");
        assert!(readiness(b"{\"code\":\"bad_host\",\"status\":403}").is_none(), "a problem tells no state");
    }
}
