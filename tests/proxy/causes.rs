//! An upstream that cannot be used is told by what is wrong with it: in the answer, in `/readyz`, to `explain`, in the
//! metrics.

use std::{path::Path, process::Command, sync::Arc};

use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use secretier::{
    phase::Phase,
    tiers::upstream::standin::{Identity, Rights},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    app::{Backend, ENV, Setup, TestApp},
    within::output,
};

/// Answers everything with these bytes, and closes.
async fn answering(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut seen = [0; 4096];
                let _ = stream.read(&mut seen).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    format!("http://{address}")
}

async fn refusing() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

pub(crate) async fn at(site_url: String, more: &str) -> TestApp {
    let setup = Setup {
        site_url: Some(site_url),
        infisical: more.to_owned(),
        ..Setup::new(Backend::sqlite(), Phase::Infisical)
    };
    setup.start().await
}

/// That a lookup fails because of this, and that everything says so.
pub(crate) async fn says(app: &TestApp, cause: &str, state: &str, advice: &str) {
    let answer = app.get("acme", "K").await;
    assert_eq!((answer.status, answer.json()["cause"].as_str()), (503, Some(cause)), "{answer:?}");
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains(advice), "{cause}: {detail}");
    let blames = detail.contains("client_secret");
    assert_eq!(blames, cause == "login_refused", "only the server can blame credentials: {detail}");

    let ready = app.ready().await.json();
    let infisical = &ready["tiers"]["infisical"];
    assert_eq!((infisical["cause"].as_str(), ready["status"].as_str()), (Some(cause), Some("degraded")), "{ready}");
    assert_eq!(infisical["state"], state, "{cause}");

    let explained = app.explain("acme", "K").await;
    assert_eq!(explained["infisical"]["cause"], cause, "{explained}");
    assert!(explained["answer"].as_str().unwrap().contains(advice), "{explained}");

    let page = app.metrics().await;
    let uncounted = format!("secretier_upstream_failures_total{{cause=\"{cause}\"}} 0\n");
    assert!(!page.contains(&uncounted), "{page}");
    let shown = [("cause", cause), ("state", state)];
    for (label, word) in shown {
        let is_shown = format!("secretier_upstream_{label}{{{label}=\"{word}\"}} 1\n");
        assert!(
            page.contains(&is_shown) && page.matches(&format!("secretier_upstream_{label}{{")).count() > 5,
            "{page}"
        );
        let others = page.lines().filter(|line| line.starts_with(&format!("secretier_upstream_{label}{{")));
        assert_eq!(others.filter(|line| line.ends_with(" 1")).count(), 1, "{page}");
    }

    let faults = app.faults_of_upstream().await;
    assert!(faults.iter().any(|fault| fault.contains(advice)), "{cause}: {faults:?}");
    assert_eq!(faults.iter().any(|fault| fault.contains("client_secret")), cause == "login_refused", "{faults:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_under_the_settings_is_told_by_the_setting_that_is_wrong() {
    let app = Setup::new(Backend::sqlite(), Phase::Infisical).start().await;
    app.holds("acme", &[("K", "where the settings lead")]);
    for (lines, environment, cause, advice) in [
        ("tenants_path = \"/nowhere\"", ENV, "tenants_path", "infisical.tenants_path"),
        ("", "nowhere", "environment", "no such environment"),
        ("project_id = \"00000000-0000-4000-8000-000000000000\"", ENV, "project", "infisical.project_id"),
    ] {
        let mut wrong = Setup::new(Backend::sqlite(), Phase::Infisical);
        (wrong.environment, wrong.infisical) = (environment, lines.to_owned());
        let wrong = wrong.start().await;
        says(&wrong, cause, "rejected", advice).await;
    }
    assert_eq!(app.faults_of_upstream().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_that_is_not_in_the_project_is_told_as_that() {
    let mut app = Setup::new(Backend::sqlite(), Phase::Infisical).start().await;
    app.holds("acme", &[("K", "for members")]);
    app.identity = app.world().identity(Identity::new(Rights::NotMember));
    app.restart().await;
    let answer = app.get("acme", "K").await;
    assert_eq!((answer.status, answer.json()["code"].as_str()), (503, Some("upstream_denied")), "{answer:?}");
    let ready = app.ready().await.json();
    let infisical = &ready["tiers"]["infisical"];
    assert_eq!((&infisical["state"], &infisical["cause"]), (&"rejected".into(), &"project".into()), "{ready}");
    let faults = app.faults_of_upstream().await;
    assert!(faults.iter().any(|fault| fault.contains("add the identity to the project")), "{faults:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_connection_is_told() {
    says(&at("http://nowhere.invalid".to_owned(), "allow_http = true").await, "dns", "down", "host name").await;
    says(&at(refusing().await, "").await, "refused", "down", "nothing listens").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_infisical_is_told_from_an_infisical_that_refuses() {
    const OK: &str =
        "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\nconnection: close\r\n\r\n<html>";
    const FORBIDDEN: &str =
        "HTTP/1.1 403 Forbidden\r\ncontent-type: text/html\r\ncontent-length: 6\r\nconnection: close\r\n\r\n<html>";
    const MOVED: &str =
        "HTTP/1.1 301 Moved\r\nlocation: https://other.example/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    for html in [OK, FORBIDDEN] {
        says(&at(answering(html).await, "").await, "not_infisical", "down", "is not Infisical").await;
    }
    says(&at(answering(MOVED).await, "").await, "redirected", "rejected", "redirects elsewhere").await;

    let told = |message: &str| {
        let body = format!("{{\"statusCode\":403,\"message\":\"{message}\",\"error\":\"Forbidden\"}}");
        let head = "HTTP/1.1 403 Forbidden\r\ncontent-type: application/json\r\nconnection: close\r\n";
        &*format!("{head}content-length: {}\r\n\r\n{body}", body.len()).leak()
    };
    for (message, cause, advice) in [
        ("Invalid credentials", "login_refused", "client_secret"),
        ("This identity auth method is temporarily locked, please try again later", "identity_locked", "locked"),
        ("You are not allowed to access this resource from this IP address", "address_not_allowed", "trusted IPs"),
    ] {
        says(&at(answering(told(message)).await, "").await, cause, "login_refused", advice).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_ends_in_api_is_told_as_that_and_no_fault_of_the_credentials() {
    let app = Setup::new(Backend::sqlite(), Phase::Infisical).start().await;
    let wrong = at(format!("{}/api", app.infisical.url()), "").await;
    says(&wrong, "no_route", "rejected", "without /api").await;
}

/// Authorities and a certificate of one of them, made by openssl.
pub(crate) fn certificate(folder: &Path, name: &str, days: i32) {
    let openssl = |arguments: &str| {
        let output = output(Command::new("openssl").args(arguments.split(' ')).current_dir(folder));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    std::fs::write(folder.join("ext"), format!("subjectAltName=DNS:{name}\nbasicConstraints=CA:FALSE\n")).unwrap();
    openssl(&format!("req -x509 {key} -keyout root.key -out root.pem -days 2 -subj /CN=private-root"));
    openssl(&format!("req {key} -keyout site.key -out site.csr -subj /CN=site"));
    openssl(&format!(
        "x509 -req -in site.csr -CA root.pem -CAkey root.key -CAcreateserial -out site.pem -days {days} -extfile ext"
    ));
}

/// The stand-in behind TLS with the certificate in that folder.
pub(crate) async fn behind_tls(folder: &Path, to: &str) -> String {
    let certificate = CertificateDer::from_pem_file(folder.join("site.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(folder.join("site.key")).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    let acceptor = TlsAcceptor::from(Arc::new(config.with_single_cert(vec![certificate], key).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, to) = (listener.local_addr().unwrap().port(), to.trim_start_matches("http://").to_owned());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, to) = (acceptor.clone(), to.clone());
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut there = TcpStream::connect(to).await.unwrap();
                let _ = copy_bidirectional(&mut stream, &mut there).await;
            });
        }
    });
    format!("https://localhost:{port}")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_certificate_is_told_and_a_private_authority_can_be_named() {
    let mut app = Setup::new(Backend::sqlite(), Phase::Infisical).start().await;
    app.holds("acme", &[("K", "behind a private authority")]);
    let folder = TempDir::new().unwrap();
    let trusting = format!("ca_file = {:?}", folder.path().join("root.pem"));

    certificate(folder.path(), "localhost", 2);
    let site = behind_tls(folder.path(), &app.infisical.url()).await;
    says(&at(site.clone(), "").await, "tls_certificate_unknown", "down", "infisical.ca_file").await;
    // The setting that the answer names mends it.
    app.setup.site_url = Some(site);
    app.setup.infisical = trusting.clone();
    app.restart().await;
    assert_eq!(app.get("acme", "K").await.value(), "behind a private authority");

    certificate(folder.path(), "other.example", 2);
    let site = behind_tls(folder.path(), &app.infisical.url()).await;
    says(&at(site, &trusting).await, "tls_certificate_name", "down", "another host").await;
    certificate(folder.path(), "localhost", -1);
    let site = behind_tls(folder.path(), &app.infisical.url()).await;
    says(&at(site, &trusting).await, "tls_certificate_expired", "down", "not valid now").await;
    says(
        &at(format!("https://{}", app.infisical.url().trim_start_matches("http://")), "").await,
        "tls",
        "down",
        "HTTPS",
    )
    .await;
}
