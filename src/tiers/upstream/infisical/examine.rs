//! Examines Infisical for `secretier doctor`: step by step along the way that a lookup goes.

use std::time::{Duration, SystemTime};

use http::Method;
use reqwest::Url;

use super::{
    super::{Cause, Fetched, Folders, Lane, UpstreamError},
    Config, Infisical,
    status::{NoStatus, Status},
};
use crate::{
    certificate::{self, LookError, Summary},
    clock::Timestamp,
    diagnosis::Area,
    log,
    secret::SecretKey,
    tenant::Tenant,
};

/// How far the clocks may be apart. The server tells its own to the second.
const CLOCKS_APART: Duration = Duration::from_secs(5);

/// How long a TLS handshake may take, with its connection.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// A certificate that ends sooner than this is warned of.
const ENDS_SOON: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// The name of no secret: a change of it is refused to who may not write, and changes nothing for
/// who may.
const NO_SECRET: &str = "SECRETIER_DOCTOR_NO_SUCH_SECRET";

impl Infisical {
    /// Examines it as far as it goes. Each step needs the one before.
    pub(super) async fn examine_all(&self, settings: &Config, area: &Area) {
        area.begins("address");
        // Both were checked with the configuration.
        let Some((url, host)) = Url::parse(&settings.site_url).ok().and_then(|url| {
            let host = url.host_str()?.trim_matches(['[', ']']).to_owned();
            Some((url, host))
        }) else {
            return area.failure(
                "address",
                "infisical.site_url is no address",
                "write it as in \"https://app.infisical.com\"",
            );
        };
        address(&url, &settings.site_url, area);
        let Some(port) = url.port_or_known_default() else { return };
        // Through a proxy, names and certificates are seen from there.
        if self.client.has_proxy() {
            area.ok("proxy", "requests go through infisical.proxy");
        } else if !(resolves(&host, port, area).await && shakes_hands(settings, &url, &host, port, area).await) {
            return;
        }
        area.begins("server");
        match self.client.status().await {
            Ok(status) if !self.is_there(&status, area) => return,
            Ok(_) => {}
            Err(no_status) => return refused(area, "server", no_status),
        }
        let Some(folders) = self.lists_tenants(settings, area).await else { return };
        self.speaks(area).await;
        if let Some(tenant) = folders.tenants.first() {
            self.reads(tenant, area).await;
            self.may_write(tenant, area).await;
        }
        self.reads_shared(area).await;
        self.allows(settings, area);
    }

    /// The shared folders: that each is there, and can be read.
    async fn reads_shared(&self, area: &Area) {
        let there = match self.list_shared(Lane::Interactive, self.client.deadline()).await {
            Ok(there) => there,
            Err(error) => {
                let advice = error.cause().map_or("try again in a while", Cause::advice);
                return area.failure(
                    "shared folders",
                    format!("they cannot be listed: {}", log::chain(&error)),
                    advice,
                );
            }
        };
        for (folder, path) in self.places.shared() {
            match there.contains(&folder) {
                true => self.reads(&folder, area).await,
                false => area.warning(
                    "shared folders",
                    format!("there is no folder {path}"),
                    "make it in Infisical, or correct its path in [[infisical.folders]]",
                ),
            }
        }
    }

    /// Whether Infisical answers there, with its clock.
    fn is_there(&self, status: &Status, area: &Area) -> bool {
        match status.status {
            300..=399 => {
                let place = status.location.as_deref().unwrap_or("another address");
                area.failure(
                    "server",
                    format!("it redirects to {place}, which is not followed"),
                    Cause::Redirected.advice(),
                );
                return false;
            }
            500..=599 => area.failure(
                "server",
                format!("it says that it is broken: status {}", status.status),
                Cause::Failed.advice(),
            ),
            _ if !status.is_json => {
                area.failure(
                    "server",
                    format!("what answers is not Infisical: status {}, and no JSON", status.status),
                    Cause::NotInfisical.advice(),
                );
                return false;
            }
            200..=299 => area.ok("server", "Infisical answers"),
            other => area.warning(
                "server",
                format!("it answers a question for its own state with status {other}"),
                "the next lines say more; an Infisical answers /api/status with 200",
            ),
        }
        if let Some(theirs) = status.date {
            clocks(self.clock.now(), theirs, area);
        }
        true
    }

    /// Logs in, and lists the tenants.
    async fn lists_tenants(&self, settings: &Config, area: &Area) -> Option<Folders> {
        area.begins("login");
        if let Err(error) = self.client.log_in(self.client.deadline()).await {
            let advice = error.cause().map_or("try again in a while", Cause::advice);
            area.failure("login", format!("there is no login: {}", log::chain(&error)), advice);
            return None;
        }
        area.ok("login", "the identity is let in");
        area.begins("tenants");
        let place =
            format!("{} in environment {} of project {}", settings.tenants_path, self.environment, settings.project_id);
        match self.list_tenants(Lane::Interactive, self.client.deadline()).await {
            Ok(folders) if folders.tenants.is_empty() => {
                area.warning(
                    "tenants",
                    format!("{place} holds no tenant's folder that this identity may see"),
                    "make a folder for each tenant there, or check infisical.tenants_path, environment and the identity's role",
                );
                Some(folders)
            }
            Ok(folders) => {
                area.ok("tenants", format!("{place} holds {} tenants", folders.tenants.len()));
                if !folders.unusable.is_empty() {
                    let some: Vec<&str> = folders.unusable.iter().take(3).map(String::as_str).collect();
                    area.warning(
                        "tenant names",
                        format!("{} folders there cannot name a tenant: {}", folders.unusable.len(), some.join(", ")),
                        "rename them if they are meant as tenants: letters, digits and hyphens",
                    );
                }
                Some(folders)
            }
            Err(UpstreamError::Denied) => {
                area.failure(
                    "tenants",
                    format!("the identity may not list {place}"),
                    format!("{}, with a role that may read the tenants' folders", Cause::Project.advice()),
                );
                None
            }
            Err(error) => {
                let advice = error.cause().map_or("try again in a while", Cause::advice);
                area.failure("tenants", format!("{place} cannot be listed: {}", log::chain(&error)), advice);
                None
            }
        }
    }

    /// Which of the servers' dialects it speaks, and whether it tells what has changed.
    async fn speaks(&self, area: &Area) {
        area.begins("changes");
        let (deadline, now) = (self.client.deadline(), self.clock.now());
        let text = match self.list_changed(now, Lane::Interactive, deadline).await {
            Ok(Some(_)) => "it tells which folders have changed",
            Ok(None) => "it does not tell which folders have changed: all are read in one call, if it is not too long",
            Err(error) => {
                return area.warning(
                    "changes",
                    format!("it cannot be asked which folders have changed: {}", log::chain(&error)),
                    "changes are seen when copies are past database.refresh_after",
                );
            }
        };
        area.ok("changes", text);
    }

    async fn reads(&self, tenant: &Tenant, area: &Area) {
        area.begins("read");
        let Ok(folder) = self.folder(tenant) else { return };
        let read = self.list_secrets(super::Call::Snapshot, &folder, None, Lane::Interactive, self.client.deadline());
        match read.await {
            Ok(Fetched::Changed(snapshot)) => {
                area.ok("read", format!("{folder} can be read: {} secrets", snapshot.secrets.len()));
                if !snapshot.oddities.is_empty() {
                    area.warning(
                        "read",
                        format!("{} secrets of it cannot be served as they are", snapshot.oddities.len()),
                        "'secretier list' and 'secretier explain' tell which, and why",
                    );
                }
            }
            Ok(Fetched::Unchanged) => area.ok("read", format!("{folder} can be read")),
            Err(UpstreamError::Denied) => area.failure(
                "read",
                format!("the identity may not read {folder}"),
                "give it a role that may read the secrets in all tenants' folders",
            ),
            Err(error) => {
                let advice = error.cause().map_or("try again in a while", Cause::advice);
                area.failure("read", format!("{folder} cannot be read: {}", log::chain(&error)), advice);
            }
        }
    }

    /// Whether writes are let through, as far as that can be told without one: by a change of a
    /// secret that does not exist.
    async fn may_write(&self, tenant: &Tenant, area: &Area) {
        area.begins("write");
        let Ok(name) = NO_SECRET.parse::<SecretKey>() else { return };
        let Ok(folder) = self.folder(tenant) else { return };
        let value = crate::secret::SecretValue::new(String::new());
        let tried = self.write_one(Method::PATCH, &folder, &name, Some(&value), self.client.deadline()).await;
        match tried {
            Err(UpstreamError::Denied) => area.warning(
                "write",
                format!("the identity may not change secrets in {folder}"),
                "give it a role that may create, edit and delete there, if writes or 'secretier migrate' are used; reads need none",
            ),
            Ok(reply) if reply.problem.is_secret_not_found() => area.ok(
                "write",
                format!(
                    "a change of a secret that does not exist is not denied in {folder}; a server that looks for the \
                     secret first says so to everybody"
                ),
            ),
            Ok(reply) => area.ok("write", format!("it cannot be told without a write whether the identity may: status {}", reply.status)),
            Err(error) => area.warning(
                "write",
                format!("it cannot be told whether the identity may write: {}", log::chain(&error)),
                "look again when this has passed",
            ),
        }
    }

    /// Compares the configured rate with what the server tells of its limit.
    fn allows(&self, settings: &Config, area: &Area) {
        let configured = settings.requests_per_minute.get();
        match self.client.told_limit() {
            0 => area.ok("rate", format!("the server tells no limit of its rate; infisical.requests_per_minute is {configured}")),
            limit if limit < configured => area.warning(
                "rate",
                format!("the server takes {limit} requests a minute on a route, and infisical.requests_per_minute is {configured}"),
                "set it to no more than the server takes, divided by the instances that share this machine's address",
            ),
            limit => area.ok("rate", format!("the server takes {limit} requests a minute on a route; infisical.requests_per_minute is {configured}")),
        }
    }
}

fn address(url: &Url, written: &str, area: &Area) {
    if !matches!(url.path(), "" | "/") {
        area.warning(
            "address",
            format!("infisical.site_url has a path: {written}"),
            "it is the address of the site alone, without /api at its end, unless a proxy serves Infisical under that path",
        );
    } else if url.scheme() == "http" && !crate::tls::is_loopback(url) {
        area.warning(
            "address",
            format!("{written} is not protected: values can be read on the way"),
            "use https, unless all of the network between is trusted",
        );
    } else {
        area.ok("address", written);
    }
}

async fn resolves(host: &str, port: u16, area: &Area) -> bool {
    area.begins("dns");
    match tokio::net::lookup_host((host, port)).await.map(Iterator::collect::<Vec<_>>) {
        Ok(found) if !found.is_empty() => {
            let mut addresses: Vec<String> = found.iter().map(|address| address.ip().to_string()).collect();
            addresses.dedup();
            area.ok("dns", format!("{host} is {}", addresses.join(", ")));
            true
        }
        Ok(_) => {
            area.failure("dns", format!("{host} has no address"), Cause::Dns.advice());
            false
        }
        Err(error) => {
            area.failure("dns", format!("{host} is not known: {error}"), Cause::Dns.advice());
            false
        }
    }
}

/// Whether the TLS handshake succeeds, where there is to be one.
async fn shakes_hands(settings: &Config, url: &Url, host: &str, port: u16, area: &Area) -> bool {
    if url.scheme() != "https" {
        return true;
    }
    area.begins("tls");
    let looking = certificate::look(&settings.site_url, settings.ca_file.as_deref(), host, port);
    let (shown, outcome) = match tokio::time::timeout(HANDSHAKE, looking).await {
        Ok(Ok(looked)) => looked,
        Err(_) => {
            area.failure("tls", format!("{host}, port {port}, does not answer in time"), Cause::Timeout.advice());
            return false;
        }
        Ok(Err(LookError::Connect(error))) => {
            let cause = Cause::of_connection(&error);
            area.failure("tls", format!("there is no connection to {host}, port {port}: {error}"), cause.advice());
            return false;
        }
        Ok(Err(error)) => {
            area.failure("tls", log::chain(&error), "check infisical.ca_file, and this system's ca-certificates");
            return false;
        }
    };
    let shown_text = shown.as_ref().map_or_else(|| "it showed no certificate".to_owned(), said);
    match outcome {
        Err(error) => {
            area.failure("tls", format!("{error}; {shown_text}"), Cause::of_connection(&error).advice());
            false
        }
        Ok(()) => {
            let left = shown.and_then(|shown| shown.ends.duration_since(SystemTime::now()).ok());
            match left.filter(|left| *left < ENDS_SOON) {
                Some(_) => area.warning("tls", shown_text, "it ends soon: renew it"),
                None => area.ok("tls", shown_text),
            }
            true
        }
    }
}

fn said(Summary { subject, issuer, ends }: &Summary) -> String {
    format!("certificate of {subject}, from {issuer}, until {}", humantime::format_rfc3339_seconds(*ends))
}

fn refused(area: &Area, check: &'static str, NoStatus { cause, words }: NoStatus) {
    let words = words.unwrap_or_else(|| cause.as_str().to_owned());
    area.failure(check, format!("it cannot be reached: {words}"), cause.advice());
}

fn clocks(ours: Timestamp, theirs: Timestamp, area: &Area) {
    let (ahead, apart) = match ours > theirs {
        true => ("ahead of", ours.since(theirs)),
        false => ("behind", theirs.since(ours)),
    };
    let text = format!(
        "this machine's clock is {} {ahead} Infisical's",
        humantime::format_duration(Duration::from_secs(apart.as_secs()))
    );
    match apart > CLOCKS_APART {
        true => area.warning("clock", text, "set up time synchronisation on both machines"),
        false => area.ok("clock", "this machine's clock agrees with Infisical's"),
    }
}
