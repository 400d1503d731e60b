//! The form in which a body comes, and in which a secret goes.

use reqwest::{Method, header};
use secretier::phase::Phase;

use crate::app::{Answer, Backend, Setup, TestApp, secret};

const BATCH: &str = "/v1/tenants/acme/secrets/batch-get";

async fn start() -> TestApp {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Database);
    setup.infisical = "webhook_secret = \"hush\"".to_owned();
    let app = setup.start().await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    app
}

/// Each request that reads a body, with a good one.
fn with_bodies() -> [(Method, String, &'static str); 4] {
    [
        (Method::PUT, secret("acme", "K"), r#"{"value":"other"}"#),
        (Method::POST, format!("{}/rollback", secret("acme", "K")), r#"{"version":1}"#),
        (Method::POST, BATCH.to_owned(), r#"{"keys":["K"]}"#),
        (Method::POST, "/v1/hooks/infisical".to_owned(), "{}"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encoded_body_is_refused_wherever_one_is_read_and_told_what_is_taken() {
    let app = start().await;
    let signature = format!("t=1;{}", "a".repeat(64));
    for (method, path, body) in with_bodies() {
        for encodings in [&["gzip"][..], &["Br"], &["identity, deflate"], &["identity", "x-gzip"]] {
            let mut request = app.request(method.clone(), &path).header("x-infisical-signature", &signature);
            for encoding in encodings {
                request = request.header(header::CONTENT_ENCODING, *encoding);
            }
            let answer = Answer::of(request.body(body)).await;
            assert_eq!(answer.problem(), (415, "unsupported_encoding".to_owned()), "{method} {path} {encodings:?}");
            assert_eq!(answer.header("accept-encoding"), "identity");
            assert!(answer.json()["detail"].as_str().unwrap().contains("Content-Encoding"), "{answer:?}");
        }
    }
    assert_eq!((app.get("acme", "K").await.value(), app.get("acme", "K").await.version()), ("v".to_owned(), 1));
    let batch = app.request(Method::POST, BATCH).header(header::CONTENT_ENCODING, "Identity").body(r#"{"keys":["K"]}"#);
    assert_eq!(Answer::of(batch).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_says_it_is_no_json_is_refused_and_one_that_says_nothing_is_read() {
    let app = start().await;
    for (method, path, body) in &with_bodies()[..3] {
        for other in ["text/plain", "application/x-www-form-urlencoded", "application/xml; charset=utf-8", "json"] {
            let request = app.request(method.clone(), path).header(header::CONTENT_TYPE, other).body(*body);
            let answer = Answer::of(request).await;
            assert_eq!(answer.problem(), (415, "unsupported_media_type".to_owned()), "{method} {path} {other}");
            assert_eq!(answer.header("accept"), "application/json");
        }
    }
    assert_eq!((app.get("acme", "K").await.value(), app.get("acme", "K").await.version()), ("v".to_owned(), 1));
    for (method, path, body) in &with_bodies()[..3] {
        for json in [None, Some("application/json"), Some("Application/JSON;charset=utf-8")] {
            let request = app.request(method.clone(), path).body(*body);
            let request = json.into_iter().fold(request, |request, json| request.header(header::CONTENT_TYPE, json));
            assert_eq!(Answer::of(request).await.status, 200, "{method} {path} {json:?}");
        }
    }
    // The signature of a webhook is what counts.
    let webhook = app.request(Method::POST, "/v1/hooks/infisical").header(header::CONTENT_TYPE, "text/plain");
    let webhook = webhook.header("x-infisical-signature", format!("t=1;{}", "a".repeat(64)));
    assert_eq!(Answer::of(webhook.body("{}")).await.problem(), (401, "signature_invalid".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_goes_in_the_form_that_its_reader_prefers_from_every_tier() {
    let mut app = start().await;
    for (lines, text) in [
        (&["text/plain"][..], true),
        (&["Text/Plain;q=0.5, application/json;q=0.4"], true),
        (&["application/json;q=0.5", "text/plain"], true),
        (&["application/json;q=0, */*"], true),
        (&["text/*"], true),
        (&["text/plain;q=0.5", "APPLICATION/JSON"], false),
        (&["application/json, text/plain"], false),
        (&["text/plain;q=0, */*"], false),
        (&["image/png"], false),
        (&["*/*"], false),
        (&[], false),
    ] {
        // From the database, and then from memory.
        app.restart().await;
        for tier in ["database", "memory"] {
            let mut request = app.request(Method::GET, &secret("acme", "K"));
            for line in lines {
                request = request.header(header::ACCEPT, *line);
            }
            let answer = Answer::of(request).await;
            assert_eq!((answer.status, answer.tier()), (200, tier), "{lines:?}");
            let (kind, body) = match text {
                true => ("text/plain; charset=utf-8", "v"),
                false => ("application/json", r#"{"tenant":"acme","key":"K","value":"v","version":1}"#),
            };
            assert_eq!((answer.header("content-type"), answer.text.as_str()), (kind, body), "{lines:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_error_says_under_which_id_it_is_on_record() {
    let app = start().await;
    for (method, path, status) in [
        (Method::GET, secret("acme", "NONE"), 404),
        (Method::GET, format!("{}?version=9", secret("acme", "K")), 404),
        (Method::GET, "/nothing".to_owned(), 404),
        (Method::PATCH, secret("acme", "K"), 405),
        (Method::GET, "/healthz?x".to_owned(), 400),
    ] {
        let request = app.request(method, &path);
        let is_known = !path.starts_with("/healthz");
        let answer = Answer::of(request.header("x-request-id", "ticket-7")).await;
        assert_eq!((answer.status, answer.header("x-request-id").is_empty()), (status, false), "{path}");
        assert_eq!(answer.header("x-request-id") == "ticket-7", is_known, "{path}: {answer:?}");
    }
}
