//! The client's promises, against a server that answers whatever a test wants.

mod fake;
mod migration;
mod there;
mod writes;

use std::{
    num::{NonZeroU16, NonZeroU32},
    sync::atomic::{AtomicU32, AtomicUsize},
};

use futures_util::future::join_all;
use serde_json::json;
use tokio::net::TcpListener;

use self::fake::*;
use super::*;
use crate::{flaws::Unusable, secret::Version, setting::SecretSetting, tiers::upstream::UpstreamState};

const LOGIN: &str = "/api/v1/auth/universal-auth/login";
const LIST: &str = "/api/v3/secrets/raw";

#[tokio::test]
async fn a_folder_is_read_by_one_list_with_imports_and_references_resolved() {
    let fake = Fake::start(|seen| match seen.path() {
        LIST => Answer::with_etag(&json!({"secrets": [secret("A", "1"), secret("B", "2")], "imports": []}), "\"v1\""),
        _ => Answer::not_found(seen),
    })
    .await;
    let snapshot = fake.snapshot().await.unwrap();
    assert_eq!(values(&snapshot), [("A", "1"), ("B", "2")]);
    assert_eq!(snapshot.secrets[0].version, Version::new(3).unwrap());
    assert_eq!(snapshot.etag.as_deref(), Some("\"v1\""));
    let list = fake.seen(LIST).remove(0);
    for parameter in [
        "workspaceId=project-1",
        "environment=prod",
        "secretPath=%2Ftenants%2Facme",
        "include_imports=true",
        "expandSecretReferences=false",
        "recursive=false",
    ] {
        assert!(list.target.contains(parameter), "{}", list.target);
    }
    assert!(list.head.contains("authorization: bearer token-1"), "{}", list.head);
    assert!(!list.head.contains("if-none-match"), "{}", list.head);
}

#[tokio::test]
async fn an_unchanged_folder_is_not_sent_again() {
    let fake = Fake::start(|seen| {
        assert!(seen.head.contains("if-none-match: \"v1\""), "{}", seen.head);
        Answer::Text(304, vec![("etag", "\"v1\"".to_owned())], String::new())
    })
    .await;
    let fetched = fake.upstream.snapshot(&tenant(), Some("\"v1\""), Lane::Refresh).await.unwrap();
    assert!(matches!(fetched, Fetched::Unchanged));
}

#[tokio::test]
async fn folders_that_cannot_name_a_tenant_are_told_apart() {
    let listed = json!({"folders": [{"name": "b2"}, {"name": "x.y"}, {"name": "Not-One"}, {"name": "acme"}]});
    let fake = Fake::start(move |_| Answer::ok(listed.clone())).await;
    let folders = fake.upstream.tenants(Lane::Refresh).await.unwrap();
    assert_eq!(folders.tenants.iter().map(Tenant::as_str).collect::<Vec<_>>(), ["acme", "b2"]);
    assert_eq!(folders.unusable, ["Not-One", "x.y"]);
}

#[tokio::test]
async fn a_tenants_path_that_does_not_exist_proves_no_tenant_absent() {
    for folders in ["/api/v1/folders", "/api/v2/folders"] {
        let fake = Fake::start(move |seen| match seen.target.split("path=").nth(1) {
            _ if seen.path() != folders => Answer::not_found(seen),
            Some("%2F") => Answer::ok(json!({"folders": [{"name": "apps"}]})),
            Some("%2Fapps") => Answer::ok(json!({"folders": [{"name": "tenants"}]})),
            _ => Answer::ok(json!({"folders": []})),
        })
        .await;
        for mistyped in ["/tenants", "/apps/tenant", "/app/tenants"] {
            let upstream = fake.another(|config| config.tenants_path = mistyped.to_owned());
            let error = upstream.tenants(Lane::Interactive).await.expect_err(mistyped);
            assert!(matches!(error, UpstreamError::Rejected { status: 404, .. }), "{error}");
            assert!(error.to_string().contains("infisical.tenants_path"), "{error}");
        }
        let upstream = fake.another(|config| config.tenants_path = "/apps/tenants".to_owned());
        assert_eq!(
            upstream.tenants(Lane::Interactive).await.unwrap(),
            Folders::default(),
            "it is there, and nobody is in it"
        );
    }
    let fake = Fake::start(|_| Answer::ok(json!({"folders": []}))).await;
    let upstream = fake.another(|config| config.tenants_path = "/".to_owned());
    assert_eq!(upstream.tenants(Lane::Interactive).await.unwrap(), Folders::default());
    assert_eq!(fake.count("/api/v1/folders"), 1, "the root is always there");
}

#[tokio::test]
async fn a_hundred_callers_at_once_log_in_once() {
    let fake = Fake::start(|_| Answer::ok(json!({"secrets": []}))).await;
    for outcome in join_all((0..100).map(|_| fake.snapshot())).await {
        outcome.unwrap();
    }
    assert_eq!(fake.count(LOGIN), 1);
    assert_eq!(fake.count(LIST), 100);
}

#[tokio::test]
async fn a_token_that_went_bad_costs_a_hundred_callers_one_login() {
    for (status, body) in [
        (500, json!({"statusCode": 500, "error": "Internal Server Error", "message": "jwt expired"})),
        (500, json!({"statusCode": 500, "error": "Internal Server Error", "message": "invalid signature"})),
        (
            403,
            json!({"statusCode": 403, "message": "You are not allowed to access this resource", "error": "UnauthorizedError"}),
        ),
        (401, json!({"statusCode": 401, "message": "Your token has expired", "error": "TokenError"})),
        (
            400,
            json!({"statusCode": 400, "message": "Unable to renew because access token number of uses limit reached", "error": "BadRequest"}),
        ),
    ] {
        let bad = body.clone();
        let fake = Fake::start(move |seen| {
            if seen.head.contains("token-1") && seen.target.contains("late") {
                Answer::Json(status, bad.clone())
            } else {
                Answer::ok(json!({"secrets": []}))
            }
        })
        .await;
        fake.snapshot().await.unwrap();
        let late: Tenant = "late".parse().unwrap();
        for outcome in join_all((0..100).map(|_| fake.upstream.snapshot(&late, None, Lane::Interactive))).await {
            outcome.unwrap_or_else(|error| panic!("{body}: {error}"));
        }
        assert_eq!(fake.count(LOGIN), 2, "{body}");
        assert_eq!(fake.upstream.health().state, UpstreamState::Up);
    }
}

#[tokio::test]
async fn a_denial_is_told_at_once_and_costs_no_login() {
    for status in [401, 403] {
        let body = json!({"statusCode": status, "error": "PermissionDenied", "message": "You are not allowed to read on secrets"});
        let fake = Fake::start(move |_| Answer::Json(status, body.clone())).await;
        for _ in 0..5 {
            let error = fake.snapshot().await.expect_err("denied");
            assert!(error.is_denial(), "{error}");
        }
        assert_eq!((fake.count(LOGIN), fake.count(LIST)), (1, 5));
    }
}

#[tokio::test]
async fn a_refusal_to_a_new_token_too_is_a_denial_and_costs_one_login_in_half_a_minute() {
    let body = json!({"statusCode": 403, "message": "You are not allowed to access this resource", "error": "Identity not in project"});
    let fake = Fake::start(move |_| Answer::Json(403, body.clone())).await;
    for _ in 0..5 {
        assert!(fake.snapshot().await.expect_err("denied").is_denial());
    }
    assert_eq!(fake.count(LOGIN), 2);
    fake.clock.advance(Duration::from_secs(31));
    assert!(fake.snapshot().await.expect_err("denied").is_denial());
    assert_eq!(fake.count(LOGIN), 3);
}

#[tokio::test]
async fn a_validation_failure_is_no_denial() {
    let body = json!({"statusCode": 403, "error": "ValidationFailure", "message": [{"code": "invalid_type"}]});
    let fake = Fake::start(move |_| Answer::Json(403, body.clone())).await;
    let error = fake.snapshot().await.expect_err("rejected");
    assert!(matches!(error, UpstreamError::Rejected { status: 403, .. }), "{error}");
    assert_eq!(fake.count(LOGIN), 1);
}

#[tokio::test]
async fn a_token_library_that_refuses_a_new_token_is_a_failure_and_no_denial() {
    let fake = Fake::start(|_| Answer::Json(500, json!({"message": "jwt malformed"}))).await;
    let error = fake.snapshot().await.expect_err("failed");
    assert!(matches!(error, UpstreamError::Failed(500)), "{error}");
    assert_eq!((fake.count(LOGIN), fake.count(LIST)), (2, 2));
}

#[tokio::test]
async fn a_refused_login_is_not_tried_again_for_a_minute() {
    for status in [400, 401, 403, 404] {
        let fake = Fake::start(move |seen| match seen.path() {
            LOGIN => Answer::Json(
                status,
                json!({"statusCode": status, "message": "Invalid credentials", "error": "UnauthorizedError"}),
            ),
            _ => Answer::ok(json!({"secrets": []})),
        })
        .await;
        fake.decide_logins();
        for _ in 0..5 {
            let error = fake.snapshot().await.expect_err("refused");
            assert!(matches!(error, UpstreamError::LoginRefused { .. }), "{error}");
        }
        assert_eq!((fake.count(LOGIN), fake.count(LIST)), (1, 0));
        assert_eq!(fake.upstream.health().state, UpstreamState::LoginRefused);
        fake.clock.advance(Duration::from_secs(60));
        fake.snapshot().await.expect_err("refused again");
        fake.clock.advance(Duration::from_secs(60));
        fake.snapshot().await.expect_err("two minutes this time");
        assert_eq!(fake.count(LOGIN), 2);
    }
}

#[tokio::test]
async fn a_login_that_fails_is_a_failure_and_no_refusal() {
    let fake = Fake::start(|_| {
        Answer::Json(500, json!({"statusCode": 500, "message": "Something went wrong", "error": "Find one"}))
    })
    .await;
    fake.decide_logins();
    let error = fake.snapshot().await.expect_err("failed");
    assert!(matches!(error, UpstreamError::Failed(500)), "{error}");
    assert_eq!(fake.count(LOGIN), 2, "once more, because it may pass");
}

#[tokio::test]
async fn garbage_is_a_failure_that_opens_the_breaker_and_never_an_empty_folder() {
    type Make = fn() -> Answer;
    let garbage: [Make; 6] = [
        || Answer::Text(200, vec![("content-type", "text/html".to_owned())], "<html>welcome</html>".to_owned()),
        || Answer::Text(200, vec![], String::new()),
        || Answer::Text(200, vec![], "{\"secrets\":[".to_owned()),
        || Answer::Text(403, vec![], "<html>blocked</html>".to_owned()),
        || Answer::Text(502, vec![], "<html>bad gateway</html>".to_owned()),
        || Answer::CutOff,
    ];
    for (index, answer) in garbage.into_iter().enumerate() {
        let fake = Fake::start(move |_| answer()).await;
        for _ in 0..2 {
            let error = fake.snapshot().await.expect_err("garbage");
            let is_told = matches!(
                error,
                UpstreamError::Foreign { .. } | UpstreamError::Malformed(_) | UpstreamError::Failed(502)
            );
            assert!(is_told, "{index}: {error}");
        }
        let error = fake.snapshot().await.expect_err("open");
        assert!(matches!(error, UpstreamError::Down { .. }), "{index}: {error}");
        assert_eq!(fake.count(LIST), 3, "{index}: the fourth was not made");
        assert_eq!(fake.upstream.health().state, UpstreamState::Down);
        assert_eq!(fake.count(LOGIN), 1);
    }
}

#[tokio::test]
async fn a_value_that_is_not_text_is_left_out_and_opens_no_breaker() {
    let fake = Fake::start(|_| {
        Answer::Text(200, vec![], r#"{"secrets":[{"secretKey":"A","secretValue":"\ud800"}]}"#.to_owned())
    })
    .await;
    for _ in 0..5 {
        let snapshot = fake.snapshot().await.unwrap();
        assert!(snapshot.secrets.is_empty());
        assert_eq!(snapshot.flaws().unusable.into_values().collect::<Vec<_>>(), [Unusable::NotText]);
    }
    assert_eq!(fake.count(LIST), 5);
}

#[tokio::test]
async fn an_answer_longer_than_allowed_is_not_read() {
    let fake = Fake::start(|_| Answer::ok(json!({"secrets": [secret("A", &"x".repeat(5000))]}))).await;
    let small = fake.another(|config| config.max_response = 4096);
    let error = small.snapshot(&tenant(), None, Lane::Interactive).await.expect_err("too long");
    assert!(error.to_string().contains("max_response"), "{error}");
}

#[tokio::test]
async fn a_server_that_hangs_is_left_at_the_deadline_and_then_left_alone() {
    let fake = Fake::start(|_| Answer::Hang).await;
    let upstream = fake.another(|config| config.timeout = Duration::from_millis(100));
    for _ in 0..3 {
        let error = upstream.snapshot(&tenant(), None, Lane::Interactive).await.expect_err("hangs");
        assert!(matches!(error, UpstreamError::TimedOut), "{error}");
    }
    let error = upstream.snapshot(&tenant(), None, Lane::Interactive).await.expect_err("open");
    assert!(matches!(error, UpstreamError::Down { .. }), "{error}");
    assert_eq!(fake.count(LIST), 3);
}

#[tokio::test]
async fn the_deadline_covers_the_login() {
    let fake = Fake::start(|_| Answer::Hang).await;
    fake.decide_logins();
    let upstream = fake.another(|config| config.timeout = Duration::from_millis(100));
    let error = upstream.snapshot(&tenant(), None, Lane::Interactive).await.expect_err("hangs");
    assert!(matches!(error, UpstreamError::TimedOut), "{error}");
    assert_eq!((fake.count(LOGIN), fake.count(LIST)), (1, 0));
}

#[tokio::test]
async fn a_breaker_that_opened_lets_one_call_try_and_closes_again() {
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let fake = Fake::start(move |_| {
        if is_broken.load(Ordering::Relaxed) {
            Answer::Json(500, json!({}))
        } else {
            Answer::ok(json!({"secrets": []}))
        }
    })
    .await;
    while !matches!(fake.snapshot().await, Err(UpstreamError::Down { .. })) {}
    broken.store(false, Ordering::Relaxed);
    fake.clock.advance(Duration::from_secs(40));
    fake.snapshot().await.unwrap();
    assert_eq!(fake.upstream.health().state, UpstreamState::Up);
}

#[tokio::test]
async fn of_all_who_find_the_break_over_one_spends_budget() {
    let fake = Fake::start(|_| Answer::Json(500, json!({}))).await;
    while !matches!(fake.snapshot().await, Err(UpstreamError::Down { .. })) {}
    fake.clock.advance(Duration::from_secs(40));
    let before = fake.upstream.health().budget_left.unwrap();
    for outcome in join_all((0..40).map(|_| fake.snapshot())).await {
        outcome.expect_err("broken");
    }
    let spent = before - fake.upstream.health().budget_left.unwrap().min(before);
    assert!(spent <= 1, "{spent}");
}

#[tokio::test]
async fn callers_that_go_away_close_the_upstream_to_nobody() {
    let fake = Fake::start(|seen| match seen.target.contains("slow") {
        true => Answer::Hang,
        false => Answer::ok(json!({"secrets": []})),
    })
    .await;
    let slow: Tenant = "slow".parse().unwrap();
    for round in 0..8 {
        let asked = async {
            while fake.seen(LIST).iter().filter(|seen| seen.target.contains("slow")).count() <= round {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = asked => {}
            _ = fake.upstream.snapshot(&slow, None, Lane::Interactive) => panic!("nothing answers"),
        }
    }
    fake.snapshot().await.unwrap();
    assert!(fake.metrics.render().contains("outcome=\"cancelled\"} 8"), "{}", fake.metrics.render());
    assert_eq!(fake.upstream.health().state, UpstreamState::Up);
}

#[tokio::test]
async fn callers_that_go_away_leave_nothing_behind() {
    let hangs = Arc::new(AtomicBool::new(true));
    let is_hanging = Arc::clone(&hangs);
    let fake =
        Fake::start(
            move |_| {
                if is_hanging.load(Ordering::Relaxed) { Answer::Hang } else { Answer::ok(json!({"secrets": []})) }
            },
        )
        .await;
    // More than there are slots; each is dropped while logging in or calling.
    for round in 0..2 {
        let mut callers: Vec<_> = (0..40).map(|_| Box::pin(fake.snapshot())).collect();
        let asked = async {
            while fake.all() <= round {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = asked => {}
            _ = join_all(callers.iter_mut()) => panic!("nothing answers"),
        }
    }
    hangs.store(false, Ordering::Relaxed);
    fake.clock.advance(Duration::from_secs(60));
    fake.snapshot().await.unwrap();
    join_all((0..40).map(|_| fake.snapshot())).await.into_iter().for_each(|outcome| drop(outcome.unwrap()));
}

#[tokio::test]
async fn a_connection_that_breaks_is_tried_once_more() {
    let calls = AtomicU32::new(0);
    let fake = Fake::start(move |_| match calls.fetch_add(1, Ordering::Relaxed) {
        0 => Answer::Close,
        1 => Answer::ok(json!({"secrets": []})),
        2 => Answer::Json(500, json!({"message": "Something went wrong"})),
        _ => Answer::ok(json!({"secrets": []})),
    })
    .await;
    fake.snapshot().await.unwrap();
    fake.snapshot().await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unreachable() {
    let fake = Fake::start(|_| Answer::Hang).await;
    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let upstream = fake.another(|config| config.site_url = format!("http://{unused}"));
    let error = upstream.snapshot(&tenant(), None, Lane::Interactive).await.expect_err("nobody there");
    assert!(matches!(error, UpstreamError::Unreachable { .. }), "{error}");
}

/// A date some seconds from 2026 on, as HTTP writes it.
fn http_date(seconds: u64) -> String {
    format!("Thu, 01 Jan 2026 00:00:{seconds:02} GMT")
}

#[tokio::test]
async fn a_429_is_honoured_without_a_call_for_that_kind_of_route() {
    for (headers, pause) in [
        (vec![("retry-after", "17".to_owned())], 17),
        (vec![("retry-after", "90000".to_owned())], 600),
        (vec![("retry-after", "soon".to_owned())], 60),
        (vec![("date", http_date(0)), ("retry-after", http_date(19))], 19),
        (vec![("x-ratelimit-reset", "23".to_owned())], 23),
        (vec![], 60),
    ] {
        let fake = Fake::start(move |seen| match seen.path() {
            LIST => Answer::Text(429, headers.clone(), json!({"statusCode": 429}).to_string()),
            _ => Answer::ok(json!({"folders": [{"name": "acme"}]})),
        })
        .await;
        for _ in 0..4 {
            let error = fake.snapshot().await.expect_err("limited");
            assert!(matches!(error, UpstreamError::RateLimited { .. }), "{error}");
            let left = error.retry_after().unwrap();
            assert!(left.as_secs() <= pause && left.as_secs() + 10 > pause, "{left:?} of {pause}");
        }
        assert_eq!(fake.count(LIST), 1);
        assert_eq!(fake.upstream.health().state, UpstreamState::RateLimited);
        fake.upstream.tenants(Lane::Interactive).await.unwrap();
        fake.clock.advance(Duration::from_secs(pause));
        fake.snapshot().await.expect_err("limited again");
        assert_eq!(fake.count(LIST), 2);
    }
}

#[tokio::test]
async fn the_budget_counts_every_request_and_refreshes_do_not_wait_for_it() {
    let fake = Fake::start(|_| Answer::ok(json!({"secrets": []}))).await;
    let upstream = fake.another(|config| {
        // Two at once, and then one every 11 seconds, which is longer than a call may take.
        config.requests_per_minute = NonZeroU32::new(8).unwrap();
        config.timeout = Duration::from_secs(5);
    });
    upstream.snapshot(&tenant(), None, Lane::Interactive).await.unwrap();
    assert_eq!(upstream.health().budget_left, Some(0), "a login and a list are two");
    for lane in [Lane::Interactive, Lane::Refresh] {
        let error = upstream.snapshot(&tenant(), None, lane).await.expect_err("used up");
        assert!(matches!(error, UpstreamError::OutOfBudget { .. }), "{error}");
    }
    assert_eq!(fake.count(LIST), 1);
    fake.clock.advance(Duration::from_secs(70));
    upstream.snapshot(&tenant(), None, Lane::Refresh).await.unwrap();
}

#[tokio::test]
async fn a_server_with_only_the_newer_routes_is_asked_the_older_ones_once() {
    let fake = Fake::start(|seen| match (seen.method.as_str(), seen.path()) {
        ("GET", "/api/v4/secrets") => {
            assert!(seen.target.contains("projectId=project-1") && seen.target.contains("includeImports=true"));
            Answer::ok(json!({"secrets": [secret("A", "1")], "imports": []}))
        }
        ("GET", "/api/v2/folders") => Answer::ok(json!({"folders": [{"name": "acme"}]})),
        ("PATCH", "/api/v4/secrets/A") => {
            assert_eq!(seen.body["projectId"], "project-1");
            Answer::ok(json!({"secret": {}}))
        }
        _ => Answer::not_found(seen),
    })
    .await;
    for _ in 0..3 {
        assert_eq!(values(&fake.snapshot().await.unwrap()), [("A", "1")]);
        assert_eq!(fake.upstream.tenants(Lane::Interactive).await.unwrap().tenants.len(), 1);
    }
    fake.put("A", "2").await.unwrap();
    assert_eq!((fake.count(LIST), fake.count("/api/v1/folders")), (1, 1));
    assert_eq!(fake.count("/api/v3/secrets/raw/A"), 0, "what the reads found out holds for writes");
}

const FOLDERS: &str = "/api/v1/folders";

/// Whether a list of folders asks for the changes of a time a year from now.
fn is_control(seen: &Seen, clock: &Clock) -> bool {
    let since = seen.target.split("lastSecretModified=").nth(1).unwrap().replace("%3A", ":");
    Timestamp::from_rfc3339(&since).unwrap() > clock.now()
}

#[tokio::test]
async fn a_server_that_tells_which_folders_have_changed_is_tried_once_an_hour() {
    let clock = Clock::system();
    let folders = json!({"folders": [
        {"name": "acme", "relativePath": "/acme", "lastSecretModified": "2026-01-02T03:04:05.006Z"},
        {"name": "below", "relativePath": "/acme/below", "lastSecretModified": null},
        {"name": "globex", "relativePath": "/tenants/globex"},
        {"name": "Not One", "relativePath": "/Not One"},
    ]});
    let answering = clock.clone();
    let fake = Fake::start(move |seen| {
        assert!(seen.target.contains("recursive=true") && seen.target.contains("path=%2Ftenants"), "{}", seen.target);
        if is_control(seen, &answering) { Answer::ok(json!({"folders": []})) } else { Answer::ok(folders.clone()) }
    })
    .await;
    let ask = async || fake.upstream.changed_since(clock.now(), Lane::Refresh).await.unwrap().unwrap();
    let mut changed = ask().await;
    changed.sort_by(|one, other| one.tenant.as_str().cmp(other.tenant.as_str()));
    let changed: Vec<_> = changed.iter().map(|folder| (folder.tenant.as_str(), folder.at)).collect();
    // A path may begin at the root or at the tenants' folder, and does not say which of the two.
    let at = Timestamp::from_rfc3339("2026-01-02T03:04:05.006Z");
    assert_eq!(changed, [("acme", at), ("globex", None), ("tenants", None)]);
    assert_eq!(fake.count(FOLDERS), 2);
    ask().await;
    assert_eq!(fake.count(FOLDERS), 3, "it is known by now");
    fake.clock.advance(Duration::from_secs(3601));
    ask().await;
    assert_eq!(fake.count(FOLDERS), 5, "another may stand in its place");
}

#[tokio::test]
async fn a_server_that_answers_with_all_folders_is_not_believed_and_not_asked_for_an_hour() {
    let fake = Fake::start(|_| Answer::ok(json!({"folders": [{"name": "acme"}]}))).await;
    for requests in [2, 2, 2] {
        assert_eq!(fake.upstream.changed_since(fake.clock.now(), Lane::Refresh).await.unwrap(), None);
        assert_eq!(fake.count(FOLDERS), requests);
    }
    fake.clock.advance(Duration::from_secs(3601));
    assert_eq!(fake.upstream.changed_since(fake.clock.now(), Lane::Refresh).await.unwrap(), None);
    assert_eq!(fake.count(FOLDERS), 4);
}

#[tokio::test]
async fn a_server_that_rejects_the_question_is_one_that_does_not_tell() {
    let fake = Fake::start(|_| Answer::Json(422, json!({"message": "unknown parameter", "error": "Bad"}))).await;
    for _ in 0..2 {
        assert_eq!(fake.upstream.changed_since(fake.clock.now(), Lane::Refresh).await.unwrap(), None);
    }
    assert_eq!(fake.count(FOLDERS), 1);
}

#[tokio::test]
async fn where_nothing_has_changed_no_control_is_asked() {
    let fake = Fake::start(|_| Answer::ok(json!({"folders": []}))).await;
    for requests in [1, 2] {
        let told = fake.upstream.changed_since(fake.clock.now(), Lane::Refresh).await.unwrap();
        assert_eq!((told, fake.count(FOLDERS)), (Some(Vec::new()), requests));
    }
}

#[tokio::test]
async fn an_address_with_neither_route_is_rejected_with_a_hint() {
    let fake = Fake::start(Answer::not_found).await;
    let error = fake.snapshot().await.expect_err("no such route");
    assert!(error.to_string().contains("infisical.site_url"), "{error}");
    assert_eq!((fake.count(LIST), fake.count("/api/v4/secrets")), (1, 1));
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let fake =
        Fake::start(|_| Answer::Text(302, vec![("location", "http://127.0.0.1:1/".to_owned())], String::new())).await;
    let error = fake.snapshot().await.expect_err("redirected");
    assert!(matches!(error, UpstreamError::Rejected { status: 302, .. }), "{error}");
}

#[tokio::test]
async fn a_folder_that_newer_servers_call_missing_is_empty() {
    let fake = Fake::start(|_| Answer::Json(404, json!({"message": "Folder with path '/tenants/acme' in environment with slug 'prod' not found", "error": "NotFound"}))).await;
    assert!(fake.snapshot().await.unwrap().secrets.is_empty());
}

#[tokio::test]
async fn some_secrets_are_read_from_one_list_of_their_folder() {
    let fake = Fake::start(|seen| {
        assert!(seen.target.contains("secretPath=%2Fhono-api"), "{}", seen.target);
        Answer::ok(
            json!({"secrets": [{"secretKey": "A", "secretValue": "a"}, {"secretKey": "KEY", "secretValue": "k"}]}),
        )
    })
    .await;
    let read = fake.upstream.read("/hono-api", &["KEY", "C"], Lane::Interactive).await.unwrap();
    let read: Vec<_> = read.iter().map(|value| value.as_ref().map(SecretValue::expose)).collect();
    assert_eq!(read, [Some("k"), None]);
    assert_eq!(fake.count(LIST), 1);
    assert!(fake.upstream.read("hono.api/", &["KEY"], Lane::Interactive).await.is_err());
}

#[tokio::test]
async fn a_secret_that_is_there_is_changed() {
    let fake = Fake::start(|seen| {
        assert_eq!((seen.method.as_str(), seen.path()), ("PATCH", "/api/v3/secrets/raw/A%2FB%5FC%20%3F"));
        let body = json!({"workspaceId": "project-1", "environment": "prod", "secretPath": "/tenants/acme", "secretValue": "line\n\"two\"\n", "type": "shared"});
        assert_eq!(seen.body, body);
        Answer::ok(json!({"secret": {"secretValue": "x"}}))
    })
    .await;
    fake.put("A/B_C ?", "line\n\"two\"\n").await.unwrap();
}

#[tokio::test]
async fn a_secret_that_is_missing_is_created_with_its_folder() {
    let made = Arc::new(AtomicBool::new(false));
    let folder = Arc::clone(&made);
    let fake = Fake::start(move |seen| match (seen.method.as_str(), seen.path()) {
        ("POST", "/api/v1/folders") => {
            assert_eq!(seen.body, json!({"workspaceId": "project-1", "environment": "prod", "path": "/tenants", "name": "acme"}));
            folder.store(true, Ordering::Relaxed);
            Answer::ok(json!({"folder": {}}))
        }
        ("POST", _) if folder.load(Ordering::Relaxed) => Answer::ok(json!({"secret": {}})),
        ("POST", _) => Answer::Json(400, json!({"message": "Folder not found for the given environment slug & secret path", "error": "Create secret"})),
        ("PATCH", _) => Answer::Json(400, json!({"message": "Secret not found", "error": "BadRequest"})),
        _ => Answer::not_found(seen),
    })
    .await;
    fake.put("A", "1").await.unwrap();
    assert!(made.load(Ordering::Relaxed));
    fake.put("B", "1").await.unwrap();
    assert_eq!(fake.count("/api/v1/folders"), 1);
}

#[tokio::test]
async fn a_secret_that_someone_else_creates_meanwhile_is_changed() {
    let patches = AtomicUsize::new(0);
    let fake = Fake::start(move |seen| match seen.method.as_str() {
        "PATCH" if patches.fetch_add(1, Ordering::Relaxed) == 0 => {
            Answer::Json(400, json!({"message": "Secret not found"}))
        }
        "PATCH" => Answer::ok(json!({"secret": {}})),
        _ => Answer::Json(400, json!({"message": "Secret already exist"})),
    })
    .await;
    fake.put("A", "1").await.unwrap();
}

#[tokio::test]
async fn a_write_that_may_have_happened_is_not_repeated() {
    for answer in
        [|| Answer::Close, || Answer::Json(500, json!({"message": "Something went wrong"}))] as [fn() -> Answer; 2]
    {
        let fake = Fake::start(move |_| answer()).await;
        fake.put("A", "1").await.expect_err("unclear");
        assert_eq!(fake.count("/api/v3/secrets/raw/A"), 1);
    }
}

#[tokio::test]
async fn a_write_held_back_for_approval_says_so() {
    let fake = Fake::start(|_| Answer::ok(json!({"approval": {"id": "1"}}))).await;
    assert!(matches!(fake.put("A", "1").await, Err(UpstreamError::AwaitsApproval)));
    assert!(matches!(fake.delete("A").await, Err(UpstreamError::AwaitsApproval)));
}

#[tokio::test]
async fn what_infisical_would_alter_or_cannot_take_is_refused_before_any_call() {
    let fake = Fake::start(Answer::not_found).await;
    for value in [" a", "a ", "a\n\n", "a\r\n", "\ta", "\u{feff}a", "a\u{a0}", "a \n", " ", "\n\n"] {
        let error = fake.put("A", value).await.expect_err("altered");
        assert!(matches!(error, UpstreamError::Unstorable(Unstorable::Value(_))), "{value:?}: {error}");
        assert!(matches!(fake.write("A", value).await, Err(UpstreamError::Unstorable(_))), "{value:?}");
    }
    let is_name = |error: UpstreamError| matches!(error, UpstreamError::Unstorable(Unstorable::Name(_)));
    for name in [" A", "A ", "\u{a0}A", "A\u{feff}", "\u{3000}", "__proto__", "toString"] {
        assert!(is_name(fake.put(name, "a").await.expect_err(name)), "{name:?}");
        assert!(is_name(fake.delete(name).await.expect_err(name)), "{name:?}");
        assert!(is_name(fake.write(name, "a").await.expect_err(name)), "{name:?}");
    }
    for value in ["x".repeat(1 << 20), "\u{1}".repeat(200_000)] {
        let error = fake.put("A", &value).await.expect_err("too long");
        assert!(matches!(error, UpstreamError::Unstorable(Unstorable::Size)), "{error}");
    }
    assert_eq!(fake.all(), 0);
}

#[tokio::test]
async fn what_is_storable_is_sent_by_every_tenant_within_the_largest_body() {
    let fake = Fake::start(|seen| {
        assert!(seen.length <= 1 << 20, "{}", seen.length);
        Answer::ok(json!({"secret": {}}))
    })
    .await;
    let storable = |length: usize| {
        fake.upstream.check(&"A".parse().unwrap(), Some(&SecretValue::new("\"".repeat(length)))).is_ok()
    };
    let largest = (500_000..=1 << 19).rev().find(|length| storable(*length)).unwrap();
    let longest: Tenant = "t".repeat(Tenant::MAX_LEN).parse().unwrap();
    let value = SecretValue::new("\"".repeat(largest));
    assert!(!fake.upstream.put(&longest, &"A".parse().unwrap(), &value).await.unwrap());
    let sent = fake.seen("/api/v3/secrets/raw/A").remove(0).length;
    assert!((1 << 20) - sent < 2, "{sent}");
}

#[tokio::test]
async fn a_value_too_long_for_what_stands_in_front_of_infisical_is_unstorable() {
    let fake = Fake::start(|_| Answer::Text(413, vec![], "too large".to_owned())).await;
    assert!(matches!(fake.put("A", "1").await, Err(UpstreamError::Unstorable(Unstorable::Size))));
    let message = "Request body is too large";
    let body = json!({"statusCode": 500, "error": "Internal Server Error", "message": message});
    let fake = Fake::start(move |_| Answer::Text(500, vec![], body.to_string())).await;
    assert!(matches!(fake.put("A", "1").await, Err(UpstreamError::Unstorable(Unstorable::Size))), "newer servers");
}

#[tokio::test]
async fn deleting_tells_whether_there_was_something_and_never_opens_the_breaker() {
    let fake = Fake::start(|seen| match seen.path().rsplit('/').next() {
        Some("THERE") => {
            assert_eq!(seen.body["secretPath"], "/tenants/acme");
            assert_eq!(seen.method, "DELETE");
            Answer::ok(json!({"secret": {}}))
        }
        Some("GONE") => Answer::Json(500, json!({"statusCode": 500, "error": "Internal Server Error", "message": "Cannot read properties of undefined (reading 'encryptedValue')"})),
        Some("NEWER") => Answer::Json(404, json!({"message": "Secret with name 'NEWER' not found"})),
        _ => Answer::Json(400, json!({"message": "Folder not found for the given environment slug & secret path"})),
    })
    .await;
    assert!(fake.delete("THERE").await.unwrap());
    for _ in 0..5 {
        assert!(!fake.delete("GONE").await.unwrap());
    }
    assert!(!fake.delete("NEWER").await.unwrap());
    assert!(!fake.delete("FOLDER").await.unwrap());
    assert!(fake.delete("THERE").await.unwrap());
}

#[tokio::test]
async fn calls_are_counted_by_what_came_of_them() {
    let fake = Fake::start(|_| Answer::ok(json!({"secrets": []}))).await;
    fake.snapshot().await.unwrap();
    let page = fake.metrics.render();
    for line in [
        "secretier_upstream_calls_total{call=\"login\",outcome=\"ok\"} 1",
        "secretier_upstream_calls_total{call=\"snapshot\",outcome=\"ok\"} 1",
        "secretier_upstream_call_seconds",
        "secretier_upstream_budget_left",
    ] {
        assert!(page.contains(line), "{page}");
    }
}

#[tokio::test]
async fn neither_the_client_secret_nor_a_token_is_shown() {
    let fake = Fake::start(|_| Answer::Json(500, json!({"message": "value-1 went wrong"}))).await;
    let error = fake.snapshot().await.expect_err("failed");
    let shown = format!("{:?} {error:?} {error} {:?}", fake.upstream, config("http://x"));
    for secret in ["hush", "token-1", "value-1"] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

#[test]
fn plain_http_goes_to_this_machine_or_where_that_is_said_to_be_meant() {
    for ours in ["http://127.0.0.1:8080", "http://127.1.2.3", "http://[::1]:8080", "http://localhost:8080/prefix"] {
        config(ours).check().unwrap();
    }
    let meant = Config { allow_http: true, ..config("http://infisical:8080") };
    meant.check().unwrap();
}

#[test]
fn a_wrong_setting_names_its_key() {
    type Spoil = fn(&mut Config);
    let wrong: [(Spoil, &str); 16] = [
        (|config| config.site_url = "app.infisical.com".to_owned(), "infisical.site_url"),
        (|config| config.site_url = "ftp://infisical".to_owned(), "infisical.site_url"),
        (|config| config.site_url = "https://me:pw@infisical".to_owned(), "infisical.site_url"),
        (|config| config.site_url = "https://infisical/?a=b".to_owned(), "infisical.site_url"),
        (|config| config.site_url = "http://infisical:8080".to_owned(), "infisical.site_url"),
        (|config| config.site_url = "http://10.0.0.1".to_owned(), "infisical.site_url"),
        (|config| config.tenants_path = "tenants".to_owned(), "infisical.tenants_path"),
        (|config| config.tenants_path = "/tenants/".to_owned(), "infisical.tenants_path"),
        (|config| config.tenants_path = "/ten.ants".to_owned(), "infisical.tenants_path"),
        (|config| config.tenants_path = String::new(), "infisical.tenants_path"),
        (|config| config.project_id = String::new(), "infisical.project_id"),
        (|config| config.client_id = String::new(), "infisical.client_id"),
        (|config| config.timeout = Duration::ZERO, "infisical.timeout"),
        (|config| config.poll_interval = Duration::from_millis(999), "infisical.poll_interval"),
        (|config| config.poll_interval = Duration::from_secs(3601), "infisical.poll_interval"),
        (
            |config| config.migration_requests_per_minute = NonZeroU32::new(10_001),
            "infisical.migration_requests_per_minute",
        ),
    ];
    for (spoil, key) in wrong {
        let mut config = config("https://app.infisical.com/prefix/");
        config.check().unwrap();
        spoil(&mut config);
        let error = config.check().expect_err(key).to_string();
        assert!(error.starts_with(key) && !error.contains("pw"), "{error}");
    }
    for path in ["/", "/a/b-c/d_e"] {
        assert!(is_folder(path));
    }
}

#[tokio::test]
async fn https_is_set_up_with_the_systems_roots_or_says_that_there_are_none() {
    let https = config("https://app.infisical.com");
    let secret = https.client_secret.resolve().unwrap();
    let built = Infisical::build(
        https,
        "prod".to_owned(),
        &crate::withheld::Withheld::default(),
        secret,
        Clock::system(),
        Metrics::new(),
    );
    assert!(matches!(built, Ok(_) | Err(BuildError::Tls(crate::tls::TlsError::NoRoots))), "{built:?}");
}

#[test]
fn settings_have_defaults_and_no_strangers() {
    let text = "site_url = 'https://x'\nproject_id = 'p'\nclient_id = 'c'\nclient_secret = { env = 'S' }\n";
    let config: Config = toml::from_str(text).unwrap();
    assert_eq!((config.tenants_path.as_str(), config.timeout), ("/tenants", Duration::from_secs(2)));
    assert_eq!((config.requests_per_minute.get(), config.max_response), (100, 64 << 20));
    assert!(toml::from_str::<Config>(&format!("{text}tenant_path = '/x'")).is_err());
    assert!(toml::from_str::<Config>(&format!("{text}requests_per_minute = 0")).is_err());
    assert!(toml::from_str::<Config>(&format!("{text}migration_requests_per_minute = 0")).is_err());
    for (set, share) in [
        ("", 50),
        ("requests_per_minute = 1", 1),
        ("requests_per_minute = 31", 15),
        ("requests_per_minute = 40\nmigration_requests_per_minute = 40", 40),
        ("migration_requests_per_minute = 1", 1),
    ] {
        let config: Config = toml::from_str(&format!("{text}{set}")).unwrap();
        config.check().unwrap();
        assert_eq!(config.migration_requests_per_minute().get(), share, "{set}");
    }
    let shown = toml::to_string(&config).unwrap();
    assert!(shown.contains("timeout = \"2s\"") && shown.contains("max_response = \"64MiB\""), "{shown}");
}

#[tokio::test]
async fn a_server_that_answers_again_is_tried_at_once_and_one_that_fails_all_the_while_in_its_time() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let (is_well, says_well) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (well, says) = (Arc::clone(&is_well), Arc::clone(&says_well));
    let fake = Fake::start(move |seen| match seen.path() {
        "/api/status" if says.load(Ordering::Relaxed) => {
            Answer::ok(json!({"date": "2026-11-21T22:02:37.081Z", "message": "Ok"}))
        }
        _ if well.load(Ordering::Relaxed) => Answer::ok(json!({"folders": [{"name": "acme"}]})),
        _ => Answer::Text(500, Vec::new(), json!({"statusCode": 500, "message": "down"}).to_string()),
    })
    .await;
    let fail_until_left_alone = async || {
        for _ in 0..20 {
            fake.upstream.client.breaker().probe().failed();
        }
        let left_alone = fake.upstream.tenants(Lane::Refresh).await;
        assert!(matches!(left_alone, Err(UpstreamError::Down { .. })), "{left_alone:?}");
    };
    fail_until_left_alone().await;
    // It says that it is well, all the while: no reason to try it sooner.
    says_well.store(true, Ordering::Relaxed);
    for _ in 0..3 {
        fake.upstream.notice_recovery().await;
    }
    assert!(matches!(fake.upstream.tenants(Lane::Refresh).await, Err(UpstreamError::Down { .. })));
    // It says that it is not, and then that it is.
    says_well.store(false, Ordering::Relaxed);
    fake.upstream.notice_recovery().await;
    assert!(matches!(fake.upstream.tenants(Lane::Refresh).await, Err(UpstreamError::Down { .. })));
    says_well.store(true, Ordering::Relaxed);
    is_well.store(true, Ordering::Relaxed);
    fake.upstream.notice_recovery().await;
    assert_eq!(fake.upstream.tenants(Lane::Refresh).await.unwrap().tenants.len(), 1);
}
