//! Names and values as odd as people make them.

use reqwest::Method;
use secretier::{
    phase::Phase,
    resolver::{Condition, NewTenant},
    secret::{SecretValue, Writer},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    app::{Backend, ENV, Setup, TestApp, on_both_and_before_october, secret},
    within::within,
};

const ODD: [&str; 12] = [
    "a/b",
    "what?",
    "100%",
    "%2F",
    "with space",
    "a#b",
    "k\u{1f511}y",
    "it's",
    "say \"hi\"",
    "a+b&c=d;e",
    "\u{e9}e\u{301}",
    "..a",
];

#[tokio::test(flavor = "multi_thread")]
async fn odd_names_are_written_read_listed_and_deleted_like_any_other() {
    for phase in Phase::ALL {
        on_both_and_before_october(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            for name in ODD {
                assert_eq!(app.put("acme", name, name).await.status, 201, "{name}");
            }
            app.restart().await;
            for name in ODD {
                let answer = app.get("acme", name).await;
                assert_eq!((answer.value().as_str(), answer.json()["key"].as_str()), (name, Some(name)));
            }
            let listed = app.ask_tenant("acme", "/secrets").await.json();
            let mut sorted = ODD;
            sorted.sort_unstable();
            let keys: Vec<_> =
                listed["keys"].as_array().unwrap().iter().map(|key| key["key"].as_str().unwrap()).collect();
            assert_eq!(keys, sorted);
            for name in ODD {
                assert_eq!(app.delete("acme", name).await.status, 204, "{name}");
                assert_eq!(app.get("acme", name).await.status, 404, "{name}");
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_255_bytes_or_of_dots_is_written_and_read_like_any_other() {
    for phase in Phase::ALL {
        on_both_and_before_october(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            let names = ["n".repeat(255), format!("{}abc", "\u{1f511}".repeat(63)), "..".to_owned(), ".".to_owned()];
            for name in &names {
                // A client's URL would lose the dots, so it is written past HTTP.
                let key = name.parse().unwrap();
                let value = SecretValue::new(name.clone());
                let condition = Condition::None;
                let resolver = &app.instance().service.resolver;
                let tenant = "acme".parse().unwrap();
                resolver
                    .put(&tenant, &key, &value, &condition, &Writer::new("test"), NewTenant::Created)
                    .await
                    .unwrap();
            }
            for name in &names {
                let (status, body) = raw(&app, &secret("acme", name)).await;
                assert_eq!(status, 200, "{name} {body}");
                assert_eq!(serde_json::from_str::<serde_json::Value>(&body).unwrap()["value"], name.as_str());
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_cannot_be_are_refused_before_any_lookup() {
    let app = Setup::new(Backend::sqlite(), Phase::Hybrid).start().await;
    let long = "x".repeat(256);
    for key in ["%00", "a%0Ab", "%7F", "%C2%85", "%ff", "%C3", "%ED%A0%80", long.as_str(), ""] {
        let (status, body) = raw(&app, &format!("/v1/tenants/acme/secrets/{key}")).await;
        assert!(status == 400 && body.contains("invalid_key"), "{key}: {status} {body}");
    }
    let long = "x".repeat(64);
    for tenant in ["Acme", "-acme", "_a", "a.b", "%2E%2E", "a%2Fb", "a%00", "%ff", "%C3%A4", "a%20b", long.as_str(), ""]
    {
        for below in ["/secrets/A", "/secrets", ""] {
            let (status, body) = raw(&app, &format!("/v1/tenants/{tenant}{below}")).await;
            assert!(status == 400 && body.contains("invalid_tenant"), "{tenant}{below}: {status} {body}");
        }
    }
    assert_eq!(app.world().calls().total(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn imports_and_references_are_resolved() {
    on_both_and_before_october(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("HOST", "db.acme"), ("URL", "postgres://${HOST}/x"), ("OWN", "own")]);
        app.world().put(ENV, "/shared", "OWN", "imported");
        app.world().put(ENV, "/shared", "SENTRY", "dsn");
        app.world().import(ENV, "/tenants/acme", ENV, "/shared");
        for (key, value) in [("URL", "postgres://db.acme/x"), ("SENTRY", "dsn"), ("OWN", "own")] {
            assert_eq!(app.get("acme", key).await.value(), value);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_of_every_kind_come_back_byte_by_byte() {
    let values =
        ["", "line one\nline two\n", "tab\tquote\"back\\slash", "\u{1f511} \u{e9} \u{feff}x", "a\0b", "{\"json\":1}"];
    for phase in Phase::ALL {
        on_both_and_before_october(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            for (number, value) in values.iter().enumerate() {
                assert_eq!(app.put("acme", &format!("V{number}"), value).await.status, 201, "{value:?}");
            }
            for _ in 0..2 {
                for (number, value) in values.iter().enumerate() {
                    let key = format!("V{number}");
                    assert_eq!(app.get("acme", &key).await.value(), *value);
                    let plain = app.request(Method::GET, &secret("acme", &key)).header("accept", "text/plain");
                    let plain = crate::app::Answer::of(plain).await;
                    assert_eq!((plain.status, plain.text.as_str()), (200, *value));
                    assert_eq!(plain.header("content-type"), "text/plain; charset=utf-8");
                }
                app.restart().await;
            }
        })
        .await;
    }
}

/// The status and the body of a request whose path no client has touched.
async fn raw(app: &TestApp, path: &str) -> (u16, String) {
    let mut connection = TcpStream::connect(app.url().trim_start_matches("http://")).await.unwrap();
    let head = format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nConnection: close\r\n\r\n",
        app.token
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within("an answer comes", connection.read_to_string(&mut answer)).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}
