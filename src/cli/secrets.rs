//! `secretier get|set|delete|list|versions|rollback|explain`: calls a running proxy over HTTP.

use std::{
    io::{IsTerminal as _, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Method, RequestBuilder, Response, header};
use serde_json::Value;
use zeroize::Zeroizing;

use super::{Failure, print_table};
use crate::{
    keys::KeySource,
    migration::tables::legacy::{self, LegacyFormat, LegacyKey},
    private_file,
    secret::{SecretName, SecretValue},
    tenant::shared_folder,
};

/// A running proxy and the right to ask it.
#[derive(Debug, Args)]
pub(super) struct Proxy {
    /// The proxy's address
    #[arg(long, env = "SECRETIER_URL", hide_env_values = true, default_value = "http://127.0.0.1:7227")]
    url: String,
    /// The token; other users of this machine can see arguments, so prefer the variable or the file
    #[arg(long, env = "SECRETIER_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// A file that holds the token
    #[arg(long, env = "SECRETIER_TOKEN_FILE", value_name = "FILE", conflicts_with = "token")]
    token_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct Get {
    #[command(flatten)]
    proxy: Proxy,
    tenant: String,
    key: String,
    /// An older version; 'secretier versions' lists those that are kept
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(i64).range(1..))]
    version: Option<i64>,
    /// Go past memory and revalidate the copy
    #[arg(long)]
    fresh: bool,
    /// Print the whole answer as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Set {
    #[command(flatten)]
    proxy: Proxy,
    tenant: String,
    key: String,
    /// Read the value from this file instead of standard input
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Keep a line break at the value's end, which is otherwise left out
    #[arg(long)]
    exact: bool,
    /// What is read is a text that an application sealed with the key in this place, env:NAME or
    /// file:PATH (mode 0600): open it here and write its value
    #[arg(long, value_name = "SOURCE", conflicts_with = "exact")]
    legacy_key: Option<String>,
    /// How it was sealed: auto, gcm-tag-first (iv:tag:ciphertext), gcm-tag-last (iv:ciphertext:tag)
    /// or cbc (iv:ciphertext)
    #[arg(long, value_name = "FORMAT", default_value_t, requires = "legacy_key")]
    legacy_format: LegacyFormat,
    /// Write only if the secret is at this ETag
    #[arg(long, value_name = "ETAG", conflicts_with = "if_absent")]
    if_match: Option<String>,
    /// Write only if there is no such secret
    #[arg(long)]
    if_absent: bool,
    /// Make the tenant where neither upstream nor the database knows it
    #[arg(long)]
    create_tenant: bool,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Delete {
    #[command(flatten)]
    proxy: Proxy,
    tenant: String,
    key: String,
}

#[derive(Debug, Args)]
pub(super) struct List {
    #[command(flatten)]
    proxy: Proxy,
    /// The tenant, or a shared folder as in /hono-api; without, all tenants are listed
    tenant: Option<String>,
    /// List the shared folders
    #[arg(long, conflicts_with = "tenant")]
    folders: bool,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Versions {
    #[command(flatten)]
    proxy: Proxy,
    tenant: String,
    key: String,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Rollback {
    #[command(flatten)]
    proxy: Proxy,
    tenant: String,
    key: String,
    /// The version whose value is to come back
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    version: i64,
    /// Write only if the secret is at this ETag
    #[arg(long, value_name = "ETAG")]
    if_match: Option<String>,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Explain {
    #[command(flatten)]
    proxy: Proxy,
    tenant: String,
    key: String,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

impl Get {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let mut request = self.proxy.request(Method::GET, &secret_path(&self.tenant, &self.key)?)?;
        if let Some(version) = self.version {
            request = request.query(&[("version", version)]);
        }
        if self.fresh {
            request = request.header(header::CACHE_CONTROL, "no-cache");
        }
        let accept = if self.json { "application/json" } else { "text/plain" };
        let answer = self.proxy.send(request.header(header::ACCEPT, accept)).await?;
        let value = answer.bytes().await.map_err(unreadable)?;
        let mut out = std::io::stdout().lock();
        // On a terminal, so that the prompt is on a line of its own; otherwise nothing is added.
        let end: &[u8] = if out.is_terminal() || self.json { b"\n" } else { b"" };
        out.write_all(&value)
            .and_then(|()| out.write_all(end))
            .map_err(|error| Failure::failed("standard output", error))?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Set {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let value = self.value()?;
        let mut request = self.proxy.request(Method::PUT, &secret_path(&self.tenant, &self.key)?)?;
        if let Some(etag) = &self.if_match {
            request = request.header(header::IF_MATCH, quoted(etag));
        }
        if self.if_absent {
            request = request.header(header::IF_NONE_MATCH, "*");
        }
        if self.create_tenant {
            request = request.query(&[("create_tenant", "true")]);
        }
        let body = crate::answer::wiped_json(&json_value(value.expose()));
        let answer = self.proxy.send(request.header(header::CONTENT_TYPE, "application/json").body(body)).await?;
        let created = answer.status() == reqwest::StatusCode::CREATED;
        let body: Value = parse(answer).await?;
        if self.json {
            println!("{body}");
        } else {
            let what = if created { "created" } else { "changed" };
            eprintln!("{what} {}/{}, version {}", self.tenant, self.key, body["version"]);
        }
        Ok(ExitCode::SUCCESS)
    }

    fn value(&self) -> Result<SecretValue, Failure> {
        let Some(source) = &self.legacy_key else {
            return read_value(self.file.as_deref(), self.exact);
        };
        // The key before the text, so that a mistyped name of it does not cost the text. Parsed
        // here: clap would repeat a refused value, which may be the key itself.
        let source: KeySource = source
            .parse()
            .map_err(|_| Failure::usage("--legacy-key names the place of the key: env:NAME or file:PATH"))?;
        let key = LegacyKey::read(&source).map_err(|error| Failure::usage(error.to_string()))?;
        legacy::open(read_value(self.file.as_deref(), self.exact)?.expose().trim(), &key, self.legacy_format)
            .map_err(|error| Failure::failed("the value does not open", error))
    }
}

/// Reads a value from a file, or from standard input. A line break at its end is left out, unless the
/// value is wanted exactly as it is there.
pub(super) fn read_value(file: Option<&Path>, exact: bool) -> Result<SecretValue, Failure> {
    let mut bytes = Zeroizing::new(Vec::new());
    let read = match file {
        Some(path) => std::fs::File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)),
        None => {
            if std::io::stdin().is_terminal() {
                eprintln!("Type the value, then Ctrl-D:");
            }
            std::io::stdin().lock().read_to_end(&mut bytes)
        }
    };
    read.map_err(|error| Failure::usage(format!("the value cannot be read: {error}")))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| Failure::usage("the value is not UTF-8 text"))?;
    let trimmed = text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text));
    Ok(SecretValue::new(if exact { text } else { trimmed }.to_owned()))
}

impl Delete {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let request = self.proxy.request(Method::DELETE, &secret_path(&self.tenant, &self.key)?)?;
        self.proxy.send(request).await?;
        eprintln!("deleted {}/{}", self.tenant, self.key);
        Ok(ExitCode::SUCCESS)
    }
}

impl List {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let path = match &self.tenant {
            Some(tenant) => format!("{}/secrets", tenant_path(tenant)),
            None if self.folders => "/v1/folders".to_owned(),
            None => "/v1/tenants".to_owned(),
        };
        let body: Value = parse(self.proxy.send(self.proxy.request(Method::GET, &path)?).await?).await?;
        if self.json {
            println!("{body}");
            return Ok(ExitCode::SUCCESS);
        }
        let (list, columns): (_, &[&str]) = match self.tenant {
            Some(_) => ("keys", &["key", "version", "updated_at"]),
            None => {
                let list = if self.folders { "folders" } else { "tenants" };
                (list, &["tenant", "phase", "keys", "snapshot_age"])
            }
        };
        print_rows(&body[list], columns);
        if body["unavailable"].is_array() {
            println!();
            print_rows(&body["unavailable"], &["key", "reason"]);
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Versions {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let path = format!("{}/versions", secret_path(&self.tenant, &self.key)?);
        let body: Value = parse(self.proxy.send(self.proxy.request(Method::GET, &path)?).await?).await?;
        if self.json {
            println!("{body}");
        } else {
            print_rows(&body["versions"], &["version", "created_at", "source", "by", "deleted", "current"]);
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Rollback {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let path = format!("{}/rollback", secret_path(&self.tenant, &self.key)?);
        let mut request = self.proxy.request(Method::POST, &path)?;
        if let Some(etag) = &self.if_match {
            request = request.header(header::IF_MATCH, quoted(etag));
        }
        let request = request.json(&serde_json::json!({ "version": self.version }));
        let body: Value = parse(self.proxy.send(request).await?).await?;
        if self.json {
            println!("{body}");
        } else {
            let Self { tenant, key, version, .. } = &self;
            eprintln!("{tenant}/{key} has the value of version {version} again, as version {}", body["version"]);
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Explain {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let path = format!("{}/explain", secret_path(&self.tenant, &self.key)?);
        let body: Value = parse(self.proxy.send(self.proxy.request(Method::GET, &path)?).await?).await?;
        if self.json {
            println!("{body}");
            return Ok(ExitCode::SUCCESS);
        }
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let rule = body["rule"].as_u64().map_or(String::new(), |rule| format!(", rule {rule} matches"));
        println!("phase      {} (by {}{rule})", text(&body["phase"]), text(&body["phase_chosen_by"]));
        for tier in ["memory", "database", "infisical"] {
            let has = &body[tier];
            let mut line = text(&has["state"]);
            for (name, unit) in [("version", ""), ("age", " s"), ("source", ""), ("listed", "")] {
                if !has[name].is_null() {
                    line = format!("{line}, {name} {}{unit}", text(&has[name]));
                }
            }
            println!("{tier:<10} {line}");
        }
        println!("answer     {}", text(&body["answer"]));
        Ok(ExitCode::SUCCESS)
    }
}

impl Proxy {
    pub(super) fn request(&self, method: Method, path: &str) -> Result<RequestBuilder, Failure> {
        let token = match (&self.token, &self.token_file) {
            (Some(token), _) => Zeroizing::new(token.clone()),
            (None, Some(path)) => {
                if let Some(mode) = private_file::exposed_mode(path) {
                    let path = path.display();
                    eprintln!(
                        "warning: {path} can be read by others than its owner (mode {mode:04o}), and holds a token: \
                         run `chmod 600 {path}`"
                    );
                }
                let read = std::fs::read_to_string(path);
                Zeroizing::new(read.map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?)
            }
            (None, None) => {
                return Err(Failure::usage(
                    "no token: set SECRETIER_TOKEN, or name a file with --token-file; 'secretier token create' makes one",
                ));
            }
        };
        self.check_url()?;
        let tls = crate::tls::client_config(&self.url, None).map_err(|error| Failure::failed("no TLS", error))?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(Duration::from_secs(30))
            .build()
            .map_err(|error| Failure::failed("no client", error))?;
        let url = format!("{}{path}", self.url.trim_end_matches('/'));
        Ok(client.request(method, url).bearer_auth(token.trim()))
    }

    /// Whether the address can be meant, so that it holds no password when it is told of.
    fn check_url(&self) -> Result<(), Failure> {
        let url = reqwest::Url::parse(&self.url).ok().filter(|url| {
            let has_user = !url.username().is_empty() || url.password().is_some();
            url.has_host() && !has_user && url.query().is_none() && url.fragment().is_none()
        });
        let url = url.ok_or_else(|| {
            Failure::usage(
                "--url (SECRETIER_URL) is an address without user, query or fragment, as in http://127.0.0.1:7227",
            )
        })?;
        if url.scheme() == "http" && !crate::tls::is_loopback(&url) {
            eprintln!("warning: the token and what is answered can be read on the way to {url}; use https://");
        }
        Ok(())
    }

    pub(super) async fn send(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let answer = request.send().await.map_err(|error| {
            let error = error.without_url();
            Failure::failed(&format!("no answer from {}; is 'secretier serve' running there?", self.url), error)
        })?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let problem: Value = answer.json().await.unwrap_or_default();
        let word = |name: &str| problem[name].as_str().map(str::to_owned);
        Err(Failure::told(match (word("code"), word("detail")) {
            (Some(code), Some(detail)) => format!("{code}: {detail}"),
            _ => format!("{} answered {status}, which no secretier would", self.url),
        }))
    }
}

/// A list of objects as a table with these of their fields.
pub(super) fn print_rows(list: &Value, columns: &[&str]) {
    let cell = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let rows = list.as_array().into_iter().flatten();
    let rows = rows.map(|row| columns.iter().map(|column| cell(&row[*column])).collect());
    let header: Vec<String> = columns.iter().map(|column| column.to_uppercase()).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    print_table(&header, &rows.collect::<Vec<_>>());
}

/// An ETag as the header wants it, which may have been given without its quotes.
fn quoted(etag: &str) -> String {
    format!("\"{}\"", etag.trim_matches('"'))
}

pub(super) async fn parse(answer: Response) -> Result<Value, Failure> {
    answer.json().await.map_err(unreadable)
}

fn unreadable(error: reqwest::Error) -> Failure {
    Failure::failed("the answer cannot be read", error.without_url())
}

fn json_value(value: &str) -> impl serde::Serialize + '_ {
    #[derive(serde::Serialize)]
    struct Put<'a> {
        value: &'a str,
    }
    Put { value }
}

/// Names are encoded whole. `.` and `..` cannot be: a URL takes them, even encoded, for
/// steps along the path.
pub(super) fn secret_path(tenant: &str, key: &str) -> Result<String, Failure> {
    SecretName::parse(tenant, key).map_err(|error| Failure::usage(error.to_string()))?;
    if matches!(key, "." | "..") {
        return Err(Failure::usage(format!("a secret named {key:?} can only be asked for by batch-get")));
    }
    Ok(format!("{}/secrets/{}", tenant_path(tenant), encoded(key)))
}

/// The path of a tenant, or of a shared folder, which has a slash before its name.
fn tenant_path(tenant: &str) -> String {
    match shared_folder(tenant) {
        Some(folder) => format!("/v1/folders/{}", encoded(folder)),
        None => format!("/v1/tenants/{}", encoded(tenant)),
    }
}

pub(super) fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_encoded_whole() {
        let path = secret_path("acme", "with/slash ?#🔑").unwrap();
        assert_eq!(path, "/v1/tenants/acme/secrets/with%2Fslash%20%3F%23%F0%9F%94%91");
        assert_eq!(secret_path("/hono-api", "A").unwrap(), "/v1/folders/hono%2Dapi/secrets/A");
        assert_eq!(secret_path("acme", "..").unwrap_err().code(), 2);
        assert_eq!(secret_path("Acme", "A").unwrap_err().code(), 2);
    }
}
