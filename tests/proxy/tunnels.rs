//! Infisical behind a proxy that makes tunnels (`infisical.proxy`).

use std::path::Path;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use secretier::phase::Phase;
use tempfile::TempDir;

use crate::{
    app::{Backend, Setup, TestApp},
    causes::{at, behind_tls, certificate, says},
    lines::{Lines, logging},
    proxy::{Manner, Proxy},
};

/// An instance with a stand-in that has a secret, and the stand-in's address behind TLS.
async fn behind(folder: &Path) -> (TestApp, String) {
    let app = Setup::new(Backend::sqlite(), Phase::Infisical).start().await;
    app.holds("acme", &[("K", "behind a proxy")]);
    certificate(folder, "localhost", 2);
    let site = behind_tls(folder, &app.infisical.url()).await;
    (app, site)
}

/// The lines of `[infisical]` for a proxy, and the private authority in this folder.
fn through(folder: &Path, proxy: &str) -> String {
    format!("ca_file = {:?}\nproxy = {proxy}\n", folder.join("root.pem"))
}

fn asking(user: &str, password: &str) -> Manner {
    Manner::Asks(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
}

#[tokio::test(flavor = "multi_thread")]
async fn infisical_is_reached_through_a_proxy() {
    let folder = TempDir::new().unwrap();
    let (mut app, site) = behind(folder.path()).await;
    let proxy = Proxy::start(Manner::Open).await;
    app.setup.site_url = Some(site);
    app.setup.infisical = through(folder.path(), &format!("\"http://{}\"", proxy.address()));
    app.restart().await;
    assert_eq!(app.get("acme", "K").await.value(), "behind a proxy");
    assert!(proxy.tunnels() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxys_password_stands_in_its_address_or_in_a_file_and_is_replaced_without_a_restart() {
    let folder = TempDir::new().unwrap();
    let (mut app, site) = behind(folder.path()).await;
    let proxy = Proxy::start(asking("me", "p@ss:word")).await;
    let address = |password: &str| format!("http://me:{password}@{}", proxy.address());
    app.setup.site_url = Some(site);
    app.setup.infisical = through(folder.path(), &format!("\"{}\"", address("p%40ss:word")));
    app.restart().await;
    assert_eq!(app.get("acme", "K").await.value(), "behind a proxy");

    let file = folder.path().join("proxy");
    std::fs::write(&file, format!("{}\n", address("p%40ss:word"))).unwrap();
    app.setup.infisical = through(folder.path(), &format!("{{ file = {file:?} }}"));
    app.restart().await;
    assert_eq!(app.get("acme", "K").await.value(), "behind a proxy");

    // Connections that are open stay; so this instance makes none before.
    app.restart().await;
    proxy.turns(asking("me", "another"));
    says(&app, "proxy_login_refused", "down", "infisical.proxy").await;
    std::fs::write(&file, address("another")).unwrap();
    app.reload(|_| ()).await.unwrap();
    crate::app::eventually(async || app.get("acme", "K").await.status == 200).await;
}

#[test]
fn what_is_wrong_with_a_proxy_is_told_as_that_and_never_its_password() {
    let lines = Lines::default();
    logging(&lines, is_told(&lines));
}

async fn is_told(lines: &Lines) {
    let folder = TempDir::new().unwrap();
    let (app, site) = behind(folder.path()).await;
    let to = async |address: &str, more: &str| {
        let through = through(folder.path(), &format!("\"http://me:hunter2@{address}\""));
        at(site.clone(), &format!("{through}{more}")).await
    };
    let proxy = Proxy::start(asking("me", "another")).await;
    says(&to(&proxy.address(), "").await, "proxy_login_refused", "down", "user and password").await;
    for status in ["403 Forbidden", "502 Bad Gateway", "504 Gateway Timeout"] {
        proxy.turns(Manner::Refuses(status));
        says(&to(&proxy.address(), "").await, "proxy_refused", "down", "allows CONNECT").await;
    }
    proxy.turns(Manner::Closes);
    says(&to(&proxy.address(), "").await, "proxy_refused", "down", "its own log").await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    says(&to(&nobody.to_string(), "").await, "proxy_unreachable", "down", "whether the proxy runs").await;
    says(&to("proxy.invalid:3128", "").await, "proxy_unreachable", "down", "check host and port").await;
    proxy.turns(Manner::Hangs);
    let hanging = Setup {
        site_url: Some(site.clone()),
        infisical: through(folder.path(), &format!("\"http://me:hunter2@{}\"", proxy.address())),
        upstream_timeout: "1s",
        ..Setup::new(Backend::sqlite(), Phase::Infisical)
    };
    says(&hanging.start().await, "proxy_timeout", "down", "check that the proxy answers").await;

    // Behind a proxy that does its part, Infisical's own faults are its own.
    proxy.turns(Manner::Open);
    certificate(folder.path(), "other.example", 2);
    let misnamed = behind_tls(folder.path(), &app.infisical.url()).await;
    let through = through(folder.path(), &format!("\"http://me:hunter2@{}\"", proxy.address()));
    says(&at(misnamed, &through).await, "tls_certificate_name", "down", "another host").await;

    let log = lines.text();
    assert!(log.contains("proxy_login_refused") && log.contains("tunnel error"), "{log}");
    assert!(!log.contains("hunter2") && !log.contains(&STANDARD.encode("me:hunter2")));
}
