//! TLS on the port, with certificates that are replaced while it serves.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use reqwest::{Certificate, Client, Identity};
use secretier::{config::Loaded, phase::Phase, server::Listeners};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt as _, net::TcpStream};

use crate::{
    app::{Answer, Backend, Instance, Setup, TestApp, client_builder, eventually, secret},
    within::{output, within},
};

/// A folder with authorities and what they have signed.
struct Authority {
    folder: TempDir,
}

impl Authority {
    fn new() -> Self {
        let authority = Self { folder: TempDir::new().unwrap() };
        std::fs::write(authority.path("ext"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n").unwrap();
        authority.openssl(&format!("req -x509 {KEY} -keyout root.key -out root.pem -days 2 -subj /CN=test-root"));
        authority
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn openssl(&self, arguments: &str) {
        let output = output(Command::new("openssl").args(arguments.split(' ')).current_dir(self.folder.path()));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Puts a certificate and its key into the files that the proxy reads.
    fn sign(&self, name: &str) {
        self.openssl(&format!("req {KEY} -keyout {name}.key -out {name}.csr -subj /CN={name}"));
        let signing = "-CA root.pem -CAkey root.key -CAcreateserial -days 2 -extfile ext";
        self.openssl(&format!("x509 -req -in {name}.csr {signing} -out {name}.pem"));
        private(&self.path(&format!("{name}.key")));
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    fn settings(&self, name: &str) -> String {
        let (certificate, key) = (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
        format!("tls.certificate = {certificate:?}\ntls.private_key = {key:?}\n")
    }

    /// A client that trusts this authority.
    fn client(&self) -> reqwest::ClientBuilder {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let root = Certificate::from_pem(&self.read("root.pem")).unwrap();
        client_builder().pool_max_idle_per_host(0).tls_certs_only([root])
    }
}

const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";

fn private(path: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

async fn start(server: &str) -> (TestApp, Instance, String) {
    let mut app = Setup::new(Backend::sqlite(), Phase::Database).start().await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    app.setup.server = server.to_owned();
    let instance = app.another().await;
    let url = instance.url.replace("127.0.0.1", "localhost");
    (app, instance, url)
}

async fn reads(client: &Client, app: &TestApp, url: &str) -> bool {
    let answer = client.get(format!("{url}{}", secret("acme", "K"))).bearer_auth(&app.token).send().await;
    answer.is_ok_and(|answer| answer.status() == 200)
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_serves_both_protocols_to_who_trusts_it_and_nothing_in_the_clear() {
    let authority = Authority::new();
    authority.sign("server");
    let (app, _instance, url) = start(&authority.settings("server")).await;
    let client = authority.client().build().unwrap();
    let answer = Answer::of(client.get(format!("{url}{}", secret("acme", "K"))).bearer_auth(&app.token)).await;
    assert_eq!(answer.value(), "v");
    assert!(!reads(&Authority::new().client().build().unwrap(), &app, &url).await, "not to who does not trust it");
    let plain = url.replace("https", "http");
    assert!(!reads(&client, &app, &plain).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_certificate_is_served_and_a_broken_one_is_not() {
    let authority = Authority::new();
    authority.sign("server");
    let (app, _instance, url) = start(&authority.settings("server")).await;
    let before = authority.client().build().unwrap();
    assert!(reads(&before, &app, &url).await);

    // The key comes first, and for a while the two do not match.
    let other = Authority::new();
    other.sign("server");
    let after = other.client().build().unwrap();
    std::fs::copy(other.path("server.key"), authority.path("server.key")).unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    assert!(reads(&before, &app, &url).await, "the one before stays");
    std::fs::write(authority.path("server.pem"), &other.read("server.pem")[..100]).unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    assert!(reads(&before, &app, &url).await, "half of a file changes nothing");
    std::fs::copy(other.path("server.pem"), authority.path("server.pem")).unwrap();
    eventually(async || reads(&after, &app, &url).await).await;
    assert!(!reads(&before, &app, &url).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_clients_are_signed_one_without_a_certificate_of_the_authority_of_the_moment_is_refused() {
    let authority = Authority::new();
    authority.sign("server");
    authority.sign("client");
    std::fs::copy(authority.path("root.pem"), authority.path("ca.pem")).unwrap();
    let settings = format!("{}tls.client_ca = {:?}\n", authority.settings("server"), authority.path("ca.pem"));
    let (app, _instance, url) = start(&settings).await;
    let identity = |authority: &Authority| {
        Identity::from_pem(&[authority.read("client.pem"), authority.read("client.key")].concat()).unwrap()
    };
    assert!(!reads(&authority.client().build().unwrap(), &app, &url).await);
    let signed = authority.client().identity(identity(&authority)).build().unwrap();
    assert!(reads(&signed, &app, &url).await);
    let other = Authority::new();
    other.sign("client");
    let foreign = authority.client().identity(identity(&other)).build().unwrap();
    assert!(!reads(&foreign, &app, &url).await);

    // A session from before is not resumed where the certificate would be refused now.
    assert!(reads(&signed, &app, &url).await);
    std::fs::copy(other.path("root.pem"), authority.path("ca.pem")).unwrap();
    eventually(async || reads(&foreign, &app, &url).await).await;
    assert!(!reads(&signed, &app, &url).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_does_not_come_ends_and_keeps_nobody_waiting() {
    let authority = Authority::new();
    authority.sign("server");
    let (app, instance, url) = start(&format!("header_timeout = \"1s\"\n{}", authority.settings("server"))).await;
    let address = instance.url.trim_start_matches("https://").to_owned();
    let mut silent = TcpStream::connect(&address).await.unwrap();
    assert!(reads(&authority.client().build().unwrap(), &app, &url).await, "others are served meanwhile");
    let mut rest = Vec::new();
    within("it is closed", silent.read_to_end(&mut rest)).await.unwrap();
    // Nor does one hold up the end.
    let _silent = TcpStream::connect(&address).await.unwrap();
    instance.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_file_stops_the_start_and_is_named() {
    let authority = Authority::new();
    authority.sign("server");
    authority.sign("other");
    let path = |name: &str| authority.path(name).display().to_string();
    std::fs::write(authority.path("empty"), "").unwrap();
    private(&authority.path("empty"));
    std::fs::copy(authority.path("server.key"), authority.path("open.key")).unwrap();
    std::fs::set_permissions(authority.path("open.key"), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    for (certificate, key, ca, named) in [
        ("none.pem", "server.key", None, "none.pem"),
        ("server.pem", "none.key", None, "none.key"),
        ("empty", "server.key", None, "empty"),
        ("server.pem", "empty", None, "empty"),
        ("server.pem", "other.key", None, "other.key"),
        ("server.pem", "open.key", None, "open.key"),
        ("server.pem", "server.key", Some("empty"), "empty"),
    ] {
        let ca = ca.map_or(String::new(), |ca| format!("client_ca = {:?}", path(ca)));
        let toml = format!(
            "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[server.tls]\ncertificate = {:?}\nprivate_key = {:?}\n{ca}\n",
            path(certificate),
            path(key),
        );
        let config = Loaded::from_table(toml::from_str(&toml).unwrap()).unwrap().config.server;
        let error = Listeners::bind(&config).await.expect_err(&toml);
        let told = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(told.contains(named), "{told}");
    }
}
