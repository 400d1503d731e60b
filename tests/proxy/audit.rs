//! Who asked for what: every access and every attempt is on record, whatever fails.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use reqwest::Method;
use secretier::{
    access::{
        Action, Peer,
        audit::{self, Fault, Misuse, Walked},
    },
    legible,
    phase::Phase,
    tiers::database::{AuditFilter, AuditRow},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    app::{Answer, Backend, Setup, TestApp, eventually, on_both, secret},
    postgres::Postgres,
    within::within_a_tests_time,
};

/// A window that ends only with the instance.
const LONG: &str = "[audit]\nwindow = \"1h\"\n";

async fn started(backend: Backend, audit: &str) -> TestApp {
    let app = Setup::new(backend, Phase::Hybrid).with(audit).start().await;
    app.holds("acme", &[("A", "value-of-a"), ("B", "value-of-b")]);
    app
}

/// How many accesses the records count that match.
async fn counted(app: &TestApp, matching: &str) -> i64 {
    let sql = format!("SELECT CAST(coalesce(sum(count), 0) AS BIGINT) FROM {{}}audit_records WHERE {matching}");
    app.setup.backend.number(&sql).await
}

async fn records(app: &TestApp, matching: &str) -> i64 {
    app.setup.backend.number(&format!("SELECT count(*) FROM {{}}audit_records WHERE {matching}")).await
}

async fn found(app: &TestApp, filter: AuditFilter) -> Vec<AuditRow> {
    app.instance().service.resolver.database().search_audit(&filter, 1000).await.unwrap()
}

async fn verified(app: &TestApp, ends: &[(String, i64, [u8; 32])]) -> Vec<Walked> {
    let database = &app.instance().service.resolver.database();
    audit::verify(database, &database.keys().ring(), ends).await.unwrap()
}

async fn is_sound(app: &TestApp) -> bool {
    verified(app, &[]).await.iter().all(|chain| chain.findings.is_empty())
}

/// The faults that are found, with their places.
async fn faults(app: &TestApp) -> Vec<(String, i64, Fault)> {
    let findings = verified(app, &[]).await.into_iter().flat_map(|chain| chain.findings);
    findings.map(|finding| (finding.chain, finding.seq, finding.fault)).collect()
}

/// Makes the audit refuse every record, as a full disk does, or takes that back.
async fn refuse_records(backend: &Backend, refuse: bool) {
    let sql = match (backend, refuse) {
        (Backend::Sqlite(_), true) => {
            "CREATE TRIGGER full BEFORE INSERT ON audit_records BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
        }
        (Backend::Sqlite(_), false) => "DROP TRIGGER full",
        (Backend::Postgres(_), true) => {
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'could not extend file: No \
             space left on device' USING ERRCODE = '53100'; END $$; \
             CREATE TRIGGER full_disk BEFORE INSERT ON audit_records FOR EACH ROW EXECUTE FUNCTION refuse()"
        }
        (Backend::Postgres(_), false) => "DROP TRIGGER full_disk ON audit_records; DROP FUNCTION refuse()",
    };
    backend.sql(sql).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_below_memory_is_on_record_with_who_where_from_and_what_came_of_it() {
    on_both(async |backend| {
        let app = started(backend, LONG).await;
        let request =
            app.request(Method::GET, &secret("acme", "A")).header("user-agent", "hono/4").header("x-request-id", "r-1");
        let answer =
            Answer::of(request.header("x-audit-user-email", "eve@example.org").header("X-Audit-Agency", "7")).await;
        assert_eq!(answer.value(), "value-of-a");
        eventually(async || records(&app, "chain = 'lookup' AND secret_key = 'A'").await == 1).await;

        let filter = AuditFilter { key: Some("A".to_owned()), ..AuditFilter::default() };
        let record = found(&app, filter).await.remove(0);
        let detail: Value = serde_json::from_str(&record.detail).unwrap();
        assert_eq!(record.actor_name.as_deref(), Some("test"));
        assert!(app.token.contains(record.actor_id.as_deref().unwrap()), "the public part of the token");
        assert_eq!(
            (record.action.as_str(), record.tenant.as_deref(), record.outcome.as_str()),
            ("read", Some("acme"), "found")
        );
        assert_eq!((record.tier.as_deref(), record.count), (Some("infisical"), 1));
        assert_eq!(detail["peer"], "127.0.0.1");
        assert_eq!((&detail["agent"], &detail["request_id"]), (&json!("hono/4"), &json!("r-1")));
        assert_eq!(detail["fields"], json!({ "user-email": "eve@example.org", "agency": "7" }));
        assert!(!format!("{record:?}").contains("value-of-a"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_hits_that_are_alike_are_one_record_a_window_and_none_is_lost() {
    on_both(async |backend| {
        let mut app = started(backend, LONG).await;
        let mut tokens = Vec::new();
        for number in 0..4 {
            tokens.push(app.new_token(&format!("api-{number}"), &["acme"], &[Action::Read]).await);
        }
        const EACH: usize = 25;
        let asks =
            (0..EACH).flat_map(|_| tokens.iter().flat_map(|token| ["A", "B", "MISSING"].map(|key| (token, key))));
        join_all(asks.map(async |(token, key)| {
            let request = app.instance().request(Method::GET, &secret("acme", key)).bearer_auth(token);
            let expected = if key == "MISSING" { 404 } else { 200 };
            assert_eq!(Answer::of(request).await.status, expected);
        }))
        .await;
        app.restart().await;
        let each = EACH as i64;
        assert_eq!(counted(&app, "action = 'read'").await, each * 4 * 3);
        for name in ["api-0", "api-1", "api-2", "api-3"] {
            assert_eq!(counted(&app, &format!("action = 'read' AND actor_name = '{name}'")).await, each * 3);
        }
        assert_eq!(counted(&app, "secret_key = 'MISSING' AND outcome = 'absent'").await, each * 4);
        assert_eq!(counted(&app, "secret_key = 'A' AND outcome = 'found'").await, each * 4);
        let from_memory = records(&app, "tier = 'memory'").await;
        assert!(from_memory <= 4 * 3, "one a token and key: {from_memory}");
        assert!(is_sound(&app).await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_list_hands_out_is_on_record_by_key() {
    let mut app = started(Backend::sqlite(), LONG).await;
    app.ask_tenant("acme", "/secrets?values=true").await;
    app.ask_tenant("acme", "/secrets").await;
    for keys in [json!(["A", "NONE"]), json!([])] {
        let batch = app.request(Method::POST, "/v1/tenants/acme/secrets/batch-get").json(&json!({ "keys": keys }));
        assert_eq!(Answer::of(batch).await.status, 200);
    }
    app.restart().await;
    assert_eq!(counted(&app, "action = 'list'").await, 2);
    assert_eq!(counted(&app, "action = 'batch'").await, 1, "the one that named no key");
    assert_eq!(counted(&app, "action = 'read' AND secret_key = 'A' AND outcome = 'found'").await, 2);
    assert_eq!(counted(&app, "action = 'read' AND secret_key = 'B'").await, 1);
    assert_eq!(counted(&app, "action = 'read' AND secret_key = 'NONE' AND outcome = 'absent'").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_before_the_answer_has_asked_all_the_same() {
    let mut app = started(Backend::sqlite(), LONG).await;
    // The body never comes, and then neither does anything else.
    let mut stream = tokio::net::TcpStream::connect(app.instance().url.trim_start_matches("http://")).await.unwrap();
    let head = format!(
        "PUT {} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\ncontent-length: 100\r\n\r\n",
        secret("acme", "A"),
        app.token
    );
    tokio::io::AsyncWriteExt::write_all(&mut stream, head.as_bytes()).await.unwrap();
    eventually(async || app.metrics().await.contains("secretier_requests_in_flight 2")).await;
    drop(stream);
    eventually(async || app.metrics().await.contains("secretier_requests_in_flight 1")).await;
    app.restart().await;
    assert_eq!(counted(&app, "action = 'put' AND actor_name = 'test' AND outcome <> 'begun'").await, 1);
    assert_eq!(counted(&app, "action = 'put' AND outcome = 'begun'").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_is_on_record_before_it_is_answered() {
    on_both(async |backend| {
        let app = started(backend, LONG).await;
        let narrow = app.new_token("narrow", &["globex"], &[Action::Read]).await;
        let asks: [(Method, &str, Option<&str>, &str); 5] = [
            (Method::GET, "/v1/tenants/acme/secrets/A", None, "token_missing"),
            (Method::GET, "/v1/tenants/acme/secrets/A", Some("st_0123456789abcdef_no"), "token_invalid"),
            (Method::GET, "/v1/tenants/acme/secrets/A%2FB", Some(&narrow), "out_of_scope"),
            (Method::DELETE, "/v1/tenants/globex/secrets/A", Some(&narrow), "out_of_scope"),
            (Method::GET, "/v1/audit", Some(&narrow), "out_of_scope"),
        ];
        for (index, (method, path, token, code)) in asks.into_iter().enumerate() {
            let mut request = app.instance().request(method, path);
            if let Some(token) = token {
                request = request.bearer_auth(token);
            }
            let answer = Answer::of(request).await;
            assert_eq!(answer.problem().1, code);
            // No waiting: it is there when the answer is.
            assert_eq!(records(&app, "chain = 'denial'").await, index as i64 + 1);
            let newest =
                &found(&app, AuditFilter { outcome: Some("denied".to_owned()), ..AuditFilter::default() }).await[0];
            let detail: Value = serde_json::from_str(&newest.detail).unwrap();
            assert_eq!((&detail["code"], &detail["request_id"]), (&json!(code), &json!(answer.header("x-request-id"))));
        }
        assert_eq!(records(&app, "chain = 'denial' AND actor_name = 'narrow'").await, 3);
        assert_eq!(records(&app, "chain = 'denial' AND tenant = 'acme' AND secret_key = 'A/B'").await, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_on_record_before_it_is_begun_and_before_it_is_answered() {
    on_both(async |backend| {
        let app = started(backend, LONG).await;
        assert_eq!(app.put("acme", "NEW", "value-of-new").await.status, 201);
        assert_eq!(records(&app, "chain = 'write' AND action = 'put' AND secret_key = 'NEW'").await, 2);
        let again = app.request(Method::PUT, &secret("acme", "NEW")).header("if-none-match", "*");
        assert_eq!(Answer::of(again.json(&json!({ "value": "value-of-other" }))).await.status, 409);
        assert_eq!(app.delete("acme", "NEW").await.status, 204);
        assert_eq!(app.delete("acme", "NEW").await.status, 404);
        let outcomes = found(&app, AuditFilter { key: Some("NEW".to_owned()), ..AuditFilter::default() }).await;
        let outcomes: Vec<_> =
            outcomes.iter().rev().map(|record| (record.action.as_str(), record.outcome.as_str())).collect();
        let pairs = [
            ("put", "begun"),
            ("put", "done"),
            ("put", "begun"),
            ("put", "conflict"),
            ("delete", "begun"),
            ("delete", "done"),
            ("delete", "begun"),
            ("delete", "absent"),
        ];
        assert_eq!(outcomes, pairs);
        assert_eq!(records(&app, "detail LIKE '%value-of%'").await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_audit_takes_no_records_writes_are_refused_reads_are_counted_and_all_heals() {
    on_both(async |backend| {
        let mut app = started(backend.clone(), "[audit]\nwindow = \"20ms\"\n").await;
        assert_eq!(app.get("acme", "A").await.status, 200);
        refuse_records(&backend, true).await;

        let refused = app.put("acme", "NEW", "n").await;
        assert_eq!(refused.problem(), (503, "audit_unavailable".to_owned()));
        assert!(refused.header("retry-after").parse::<u32>().unwrap() >= 1);
        assert_eq!(app.delete("acme", "A").await.problem().1, "audit_unavailable");
        assert_eq!(Answer::of(app.instance().request(Method::GET, "/v1/tenants")).await.status, 401);
        for _ in 0..50 {
            assert_eq!(app.get("acme", "A").await.value(), "value-of-a");
        }
        assert!(app.metrics().await.contains("secretier_audit_up 0"));
        assert_eq!(app.ready().await.json()["audit"]["state"], "down");

        refuse_records(&backend, false).await;
        eventually(async || app.ready().await.json()["audit"]["state"] == "up").await;
        assert_eq!(app.get("acme", "NEW").await.status, 404, "nothing was written");
        assert_eq!(app.put("acme", "NEW", "n").await.status, 201);
        app.restart().await;
        assert_eq!(counted(&app, "action = 'read' AND secret_key = 'A'").await, 51);
        assert_eq!(counted(&app, "chain = 'denial' AND action = 'tenants'").await, 1);
        assert_eq!(counted(&app, "action = 'put' AND outcome = 'begun'").await, 1, "what was refused never began");
        assert_eq!(counted(&app, "action IN ('put', 'delete') AND outcome = 'failed'").await, 2);
        assert!(is_sound(&app).await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_of_an_unwritable_audit_is_configured() {
    for (choice, read, written) in [("refuse_all", 503, 503), ("refuse_writes", 200, 503), ("go_on", 200, 201)] {
        let backend = Backend::sqlite();
        let app = started(backend.clone(), &format!("[audit]\nif_unavailable = \"{choice}\"\n")).await;
        assert_eq!(app.get("acme", "A").await.status, 200);
        refuse_records(&backend, true).await;
        // The first that cannot be recorded tells the others.
        assert_eq!(app.put("acme", "NEW", "n").await.status, written, "{choice}");
        assert_eq!(app.get("acme", "A").await.status, read, "{choice}");
        assert_eq!(Answer::of(app.instance().request(Method::GET, "/healthz")).await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_away_and_comes_back_costs_no_count() {
    let mut postgres = Postgres::start();
    let backend = Backend::Postgres(postgres.database().await);
    let mut setup = Setup::new(backend, Phase::Infisical).with("[audit]\nwindow = \"20ms\"\nqueue = 5\n");
    setup.database_timeout = "1s";
    let mut app = setup.start().await;
    app.holds("acme", &[("A", "value-of-a")]);
    let mut asked = 0;
    let mut ask = async |app: &TestApp, times| {
        for _ in 0..times {
            assert_eq!(app.get("acme", "A").await.value(), "value-of-a");
            // Each of these is recorded by itself.
            assert_eq!(app.get_fresh("acme", "A").await.value(), "value-of-a");
            asked += 2;
        }
    };
    ask(&app, 10).await;
    for outage in ["killed", "frozen"] {
        if outage == "killed" {
            postgres.kill()
        } else {
            postgres.freeze()
        }
        ask(&app, 20).await;
        assert_eq!(app.put("acme", "A", "other").await.status, 503, "{outage}");
        if outage == "killed" {
            postgres.start_again()
        } else {
            postgres.thaw()
        }
        ask(&app, 10).await;
        eventually(async || app.ready().await.json()["audit"]["state"] == "up").await;
    }
    app.restart().await;
    assert_eq!(counted(&app, "action = 'read'").await, asked);
    assert_eq!(counted(&app, "action = 'read' AND actor_id IS NULL").await, 0, "who asked is always told");
    assert!(is_sound(&app).await, "{:?}", faults(&app).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_its_queue_the_audit_counts_lookups_and_still_tells_who_asked_for_what() {
    let backend = Backend::sqlite();
    let mut app = started(backend.clone(), "[audit]\nqueue = 2\n").await;
    refuse_records(&backend, true).await;
    for _ in 0..20 {
        // Each would be recorded by itself.
        assert_eq!(app.get_fresh("acme", "A").await.status, 200);
    }
    refuse_records(&backend, false).await;
    app.restart().await;
    assert_eq!(counted(&app, "action = 'read' AND secret_key = 'A' AND actor_name IS NOT NULL").await, 20);
    assert!(counted(&app, "action = 'read' AND count > 1").await > 1, "not each by itself");
    assert!(is_sound(&app).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_its_bounds_the_audit_counts_without_names() {
    let mut app = started(Backend::sqlite(), "[audit]\nwindow = \"1h\"\nmax_sums = 3\n").await;
    for number in 0..20 {
        assert_eq!(app.get("acme", &format!("NONE_{number}")).await.status, 404);
        assert_eq!(app.get("acme", &format!("NONE_{number}")).await.status, 404);
    }
    let service = &app.instance().service;
    assert!(service.audit.waiting().1 <= 3 + 2, "{:?}", service.audit.waiting());
    app.restart().await;
    assert_eq!(counted(&app, "action = 'read' AND outcome = 'absent'").await, 40);
    assert!(counted(&app, "action = 'read' AND detail LIKE '%\"summed\":true%'").await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_loses_one_window_of_counts_and_nothing_else() {
    on_both(async |backend| {
        let app = started(backend, "[audit]\nwindow = \"20ms\"\n").await;
        for _ in 0..30 {
            assert_eq!(app.get("acme", "A").await.status, 200);
        }
        eventually(async || counted(&app, "action = 'read'").await == 30).await;
        assert_eq!(app.put("acme", "NEW", "n").await.status, 201);
        let app = app.kill_and_start_again().await;
        assert_eq!(counted(&app, "action = 'read'").await, 30);
        assert_eq!(counted(&app, "action = 'put'").await, 2);
        assert!(is_sound(&app).await);
        assert_eq!(app.put("acme", "NEWER", "n").await.status, 201);
        assert!(is_sound(&app).await);
    })
    .await;
}

/// An instance with six records in the chain of writes, all at rest.
async fn with_records(backend: Backend) -> TestApp {
    let app = started(backend, LONG).await;
    for number in 0..3 {
        assert_eq!(app.put("acme", &format!("KEY_{number}"), "v").await.status, 201);
    }
    eventually(async || is_sound(&app).await).await;
    app
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_tampered_with_is_found_and_its_place_named() {
    let write = |seq, fault| ("write".to_owned(), seq, fault);
    type Case = (&'static str, &'static str, Vec<(String, i64, Fault)>);
    let cases: [Case; 9] = [
        (
            "a flipped byte",
            "UPDATE audit_records SET tenant = 'acmf' WHERE chain = 'write' AND seq = 3",
            vec![write(3, Fault::Changed)],
        ),
        (
            "a changed count",
            "UPDATE audit_records SET count = 2 WHERE chain = 'write' AND seq = 1",
            vec![write(1, Fault::Changed)],
        ),
        (
            "a changed hash",
            "UPDATE audit_records SET hash = (SELECT hash FROM audit_records WHERE chain = 'write' AND seq = 1) \
             WHERE chain = 'write' AND seq = 4",
            vec![write(4, Fault::Changed)],
        ),
        (
            "a removed row",
            "DELETE FROM audit_records WHERE chain = 'write' AND seq = 3",
            vec![write(3, Fault::Missing(3))],
        ),
        (
            "a removed beginning",
            "DELETE FROM audit_records WHERE chain = 'write' AND seq < 3",
            vec![write(1, Fault::Missing(2))],
        ),
        (
            "two swapped rows",
            "UPDATE audit_records SET seq = 99 WHERE chain = 'write' AND seq = 3; \
             UPDATE audit_records SET seq = 3 WHERE chain = 'write' AND seq = 4; \
             UPDATE audit_records SET seq = 4 WHERE chain = 'write' AND seq = 99",
            vec![write(3, Fault::Changed), write(4, Fault::Changed)],
        ),
        (
            "a truncated tail",
            "DELETE FROM audit_records WHERE chain = 'write' AND seq > 4",
            vec![write(5, Fault::Truncated(6))],
        ),
        (
            "a truncated tail with the end set back",
            "DELETE FROM audit_records WHERE chain = 'write' AND seq > 4; UPDATE audit_chains SET seq = 4, \
             hash = (SELECT hash FROM audit_records WHERE chain = 'write' AND seq = 4) WHERE chain = 'write'",
            vec![write(4, Fault::End)],
        ),
        (
            "everything gone",
            "DELETE FROM audit_records WHERE chain = 'write'; UPDATE audit_chains SET seq = 0, vouched_seq = NULL, \
             vouched_hash = NULL, signed_with = NULL, signature = NULL, hash = (SELECT start_hash FROM audit_chains WHERE chain = 'write') WHERE chain = 'write'",
            vec![write(0, Fault::Unsigned)],
        ),
    ];
    on_both(async |backend| {
        for (what, sql, expected) in &cases {
            let backend = match &backend {
                Backend::Sqlite(_) => Backend::sqlite(),
                Backend::Postgres(_) => Backend::Postgres(Postgres::shared().database().await),
            };
            let mut app = with_records(backend).await;
            // Nobody writes any more.
            app.stop().await;
            app.setup.backend.sql(sql).await;
            let found = app.verify_at_rest().await;
            let found: Vec<_> = found.into_iter().map(|finding| (finding.chain, finding.seq, finding.fault)).collect();
            assert_eq!(&found, expected, "{what}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_does_not_vouch_for_a_chain_that_was_cut_while_it_ran() {
    on_both(async |backend| {
        let app = with_records(backend).await;
        let cut = "DELETE FROM audit_records WHERE chain = 'write' AND seq > 4; UPDATE audit_chains SET seq = 4, \
                   hash = (SELECT hash FROM audit_records WHERE chain = 'write' AND seq = 4), \
                   vouched_seq = NULL, vouched_hash = NULL, signed_with = NULL, signature = NULL WHERE chain = 'write'";
        app.setup.backend.sql(cut).await;
        assert_eq!(app.put("acme", "LATER", "v").await.status, 201);
        let found = faults(&app).await;
        assert!(found.iter().any(|(chain, _, fault)| chain == "write" && *fault == Fault::Unsigned), "{found:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nor_does_the_next_instance_for_one_that_was_cut_while_none_ran() {
    let set_back = "DELETE FROM audit_records WHERE chain = 'write' AND seq > 4; UPDATE audit_chains SET seq = 4, \
                    hash = (SELECT hash FROM audit_records WHERE chain = 'write' AND seq = 4)";
    let without_signature = ", vouched_seq = NULL, vouched_hash = NULL, signed_with = NULL, signature = NULL";
    let with_a_checkpoint = ", vouched_seq = 4, \
         vouched_hash = (SELECT hash FROM audit_records WHERE chain = 'write' AND seq = 4), \
         signature = (SELECT signature FROM audit_records WHERE chain = 'write' AND seq = 4)";
    on_both(async |backend| {
        for end in [without_signature, with_a_checkpoint] {
            let backend = match &backend {
                Backend::Sqlite(_) => Backend::sqlite(),
                Backend::Postgres(_) => Backend::Postgres(Postgres::shared().database().await),
            };
            let mut app = with_records(backend).await;
            app.stop().await;
            app.setup.backend.sql(&format!("{set_back}{end} WHERE chain = 'write'")).await;
            let app = app.start_again().await;
            assert_eq!(app.put("acme", "LATER", "v").await.status, 201);
            let found = faults(&app).await;
            assert!(found.iter().any(|(chain, ..)| chain == "write"), "{end}: {found:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_kept_elsewhere_tells_of_a_database_that_was_set_back() {
    let app = with_records(Backend::sqlite()).await;
    let ends: Vec<_> =
        verified(&app, &[]).await.iter().map(|chain| (chain.chain.clone(), chain.end.0, chain.end.1)).collect();
    assert_eq!(app.put("acme", "LATER", "v").await.status, 201);
    assert!(verified(&app, &ends).await.iter().all(|chain| chain.findings.is_empty()));
    let never: Vec<_> = ends.iter().map(|(chain, seq, _)| (chain.clone(), *seq, [7; 32])).collect();
    let walked = verified(&app, &never).await;
    let write = walked.iter().find(|chain| chain.chain == "write").unwrap();
    assert_eq!(write.findings[0].fault, Fault::NotThatHistory);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_old_is_removed_by_kind_and_the_rest_verifies() {
    on_both(async |backend| {
        let retention = "[audit]\nwindow = \"20ms\"\n[audit.retention]\nlookups = \"1h\"\nwrites = \"30d\"\n";
        let app = started(backend, retention).await;
        assert_eq!(app.get("acme", "A").await.status, 200);
        assert_eq!(app.put("acme", "NEW", "v").await.status, 201);
        eventually(async || records(&app, "chain = 'lookup'").await > 0).await;
        app.advance(Duration::from_secs(2 * 60 * 60));
        eventually(async || records(&app, "chain = 'lookup' AND secret_key = 'A'").await == 0).await;
        assert_eq!(records(&app, "chain = 'write'").await, 2);
        eventually(async || is_sound(&app).await).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_searches_the_audit_and_is_on_record_for_it() {
    let app = started(Backend::sqlite(), LONG).await;
    for number in 0..3 {
        assert_eq!(app.put("acme", &format!("KEY_{number}"), "v").await.status, 201);
    }
    let page = app.ask(Method::GET, "/v1/audit?tenant=acme&outcome=begun&limit=1").await.json();
    assert_eq!(page["records"][0]["action"], "audit.search", "it is on record before it is answered");
    let page = app.ask(Method::GET, "/v1/audit?tenant=acme&outcome=done&limit=2").await.json();
    let keys = |page: &Value| -> Vec<String> {
        let records = page["records"].as_array().unwrap().iter();
        records.filter_map(|record| record["key"].as_str().map(str::to_owned)).collect()
    };
    assert_eq!(keys(&page), ["KEY_2", "KEY_1"]);
    let next = page["next"].as_str().unwrap();
    let rest = app.ask(Method::GET, &format!("/v1/audit?tenant=acme&outcome=done&limit=2&after={next}")).await.json();
    assert_eq!((keys(&rest), &rest["next"]), (vec!["KEY_0".to_owned()], &Value::Null));
    assert_eq!(records(&app, "chain = 'admin' AND action = 'audit.search'").await, 3);

    let some = app.new_token("some", &["globex"], &[Action::Admin]).await;
    let ask = async |path: &str| Answer::of(app.instance().request(Method::GET, path).bearer_auth(&some)).await.status;
    assert_eq!(ask("/v1/audit").await, 403, "it reaches one tenant");
    assert_eq!(ask("/v1/audit?tenant=acme").await, 403);
    assert_eq!(ask("/v1/audit?tenant=globex").await, 200);
    for wrong in
        ["limit=0", "outcome=good", "since=yesterday", "after=1", "tenants=acme", "tenant=a%00b", "after=1.%00.1"]
    {
        assert_eq!(app.ask(Method::GET, &format!("/v1/audit?{wrong}")).await.problem().1, "invalid_query");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_callers_write_about_themselves_is_recorded_as_it_can_be_read() {
    on_both(async |backend| {
        let app = started(backend, LONG).await;
        let odd = "é\u{85}\u{9b}2J\u{202e}\u{2066}\u{200b}\u{feff}\u{2028}".as_bytes();
        let put = app.request(Method::PUT, &secret("acme", "NEW")).json(&json!({"value": "v"}));
        let odd = put.header("user-agent", odd).header("x-audit-user", odd);
        assert_eq!(Answer::of(odd).await.status, 201);
        let found = found(&app, AuditFilter { key: Some("NEW".to_owned()), ..AuditFilter::default() }).await;
        assert_eq!(found.len(), 2);
        for row in found {
            let shown = r"é\u0085\u009b2J\u202e\u2066\u200b\ufeff\u2028";
            let detail: Value = serde_json::from_str(&row.detail).unwrap();
            assert_eq!((&detail["agent"], &detail["fields"]["user"]), (&shown.into(), &shown.into()));
            assert!(!row.detail.contains(legible::is_unfit));
        }
        assert!(is_sound(&app).await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_that_cannot_be_recorded_are_refused() {
    let app = started(Backend::sqlite(), LONG).await;
    let long = "x".repeat(257);
    let many: Vec<(String, &str)> = (0..9).map(|number| (format!("x-audit-{number}"), "v")).collect();
    let ask = async |headers: &[(String, &str)]| {
        let request = app.request(Method::GET, &secret("acme", "A"));
        let request = headers.iter().fold(request, |request, (name, value)| request.header(name, *value));
        Answer::of(request).await
    };
    assert_eq!(ask(&many[..8]).await.status, 200);
    let twice = [("x-audit-user".to_owned(), "a"), ("x-audit-user".to_owned(), "b")];
    for wrong in [&many[..], &[("x-audit-user".to_owned(), &long)], &twice] {
        assert_eq!(ask(wrong).await.problem(), (400, "invalid_audit_field".to_owned()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_looks_like_an_attack_is_counted() {
    let signals = "[audit]\nwindow = \"20ms\"\n[audit.signals]\ndenials = 5\nmalformed = 6\ntenants = 3\nabsent = 4\n";
    let app = started(Backend::sqlite(), signals).await;
    let told = async |signal: &str| {
        let metrics = app.metrics().await;
        let line = format!("secretier_signals_total{{signal=\"{signal}\"}} 1");
        metrics.lines().any(|found| found == line)
    };
    let signals = [
        "denied_burst",
        "many_tenants",
        "enumeration",
        "expired_token",
        "malformed_flood",
        "rapid_resets",
        "unread_answers",
    ];
    for signal in signals {
        assert!(!told(signal).await, "{signal}");
    }
    for number in 0..4 {
        app.get("acme", &format!("GUESS_{number}")).await;
        app.get(&format!("tenant-{number}"), "A").await;
    }
    eventually(async || told("enumeration").await && told("many_tenants").await).await;
    for _ in 0..5 {
        Answer::of(app.instance().request(Method::GET, &secret("acme", "A"))).await;
    }
    eventually(async || told("denied_burst").await).await;
    for number in 0..6 {
        assert_eq!(app.ask(Method::GET, &format!("/v1/none/{number}")).await.status, 404);
    }
    eventually(async || told("malformed_flood").await).await;
    let peer = Peer::Ip([192, 0, 2, 1].into());
    for (misuse, signal) in [(Misuse::RapidResets, "rapid_resets"), (Misuse::UnreadAnswer, "unread_answers")] {
        app.instance().service.audit.misused(peer, None, misuse);
        eventually(async || told(signal).await).await;
    }
    eventually(async || counted(&app, "action = 'connection' AND outcome = 'invalid'").await == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn denials_beyond_their_rate_are_counted_and_do_not_fill_the_disk() {
    let mut app = started(Backend::sqlite(), "[audit]\nwindow = \"1h\"\ndenials_per_second = 1\n").await;
    let narrow = app.new_token("narrow", &["globex"], &[Action::Read]).await;
    let began = Instant::now();
    for number in 0..50 {
        let request = app.instance().request(Method::GET, &secret("acme", &format!("K{number}")));
        assert_eq!(Answer::of(request.bearer_auth(&narrow)).await.status, 403);
    }
    app.stop().await;
    assert_eq!(counted(&app, "chain = 'denial' AND actor_name = 'narrow'").await, 50);
    let most = 10 + 1 + i64::try_from(began.elapsed().as_secs()).unwrap();
    assert!(records(&app, "chain = 'denial' AND secret_key IS NOT NULL").await <= most);
    assert!(records(&app, "chain = 'denial' AND secret_key IS NULL").await <= 1, "one sum, by who and where from");
}

/// Sends requests as fast as one connection takes them, and waits until each is answered.
async fn flood(app: &TestApp, requests: impl Iterator<Item = String>) {
    const BEGINNING: &[u8] = b"HTTP/1.1 ";
    let stream = TcpStream::connect(app.instance().url.trim_start_matches("http://")).await.unwrap();
    let (mut answers, mut sending) = stream.into_split();
    let sent = AtomicUsize::new(0);
    let send = async {
        let (mut some, mut number) = (String::new(), 0);
        for request in requests {
            some.push_str(&request);
            number += 1;
            if some.len() > 32 << 10 {
                sending.write_all(some.as_bytes()).await.unwrap();
                some.clear();
            }
        }
        sent.store(number, Ordering::Relaxed);
        sending.write_all(some.as_bytes()).await.unwrap();
    };
    let read = async {
        let (mut text, mut answered) = (Vec::new(), 0);
        while answered == 0 || answered != sent.load(Ordering::Relaxed) {
            assert_ne!(answers.read_buf(&mut text).await.unwrap(), 0, "closed after {answered} answers");
            answered += text.windows(BEGINNING.len()).filter(|found| *found == BEGINNING).count();
            // One of which the beginning is here in part is counted with what follows.
            text.drain(..text.len().saturating_sub(BEGINNING.len() - 1));
        }
    };
    within_a_tests_time("the last of them is answered", async { tokio::join!(send, read) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_of_which_each_is_different_are_a_few_records_and_hold_back_no_write() {
    const EACH: usize = 25_000;
    const CLOSED: usize = 100;
    let mut app = started(Backend::sqlite(), "[audit]\nwindow = \"1s\"\n").await;
    let headers = |number: usize| {
        format!(
            "Host: localhost\r\nUser-Agent: agent/{number}\r\nX-Request-Id: r-{number}\r\nX-Audit-User: user-{number}\r\n"
        )
    };
    // Without a token: health is asked for with what it does not take, and requests that are none,
    // after each of which the connection is closed.
    let strange = |number: usize| format!("GET /healthz?q{number}=1 HTTP/1.1\r\n{}\r\n", headers(number));
    let none = |number: usize| {
        let twice = "Authorization: a\r\nAuthorization: b\r\n";
        format!("GET /v1/none/{number} HTTP/1.1\r\n{twice}{}\r\n", headers(number))
    };
    let token = app.token.clone();
    let unroutable = |number: usize| {
        format!("GET /v1/none/{number} HTTP/1.1\r\nAuthorization: Bearer {token}\r\n{}\r\n", headers(number))
    };
    let unreadable = |number: usize| {
        format!(
            "GET /v1/tenants/acme/secrets/K%FF{number} HTTP/1.1\r\nAuthorization: Bearer {token}\r\n{}\r\n",
            headers(number)
        )
    };
    let is_over = AtomicBool::new(false);
    let floods = async {
        tokio::join!(
            flood(&app, (0..EACH).map(strange)),
            flood(&app, (EACH..2 * EACH).map(strange)),
            async {
                for number in 0..CLOSED {
                    flood(&app, std::iter::once(none(number))).await;
                }
            },
            flood(&app, (0..EACH).map(unroutable)),
            flood(&app, (0..EACH).map(unreadable)),
        );
        is_over.store(true, Ordering::Relaxed);
    };
    let writes = async {
        let mut written = 0;
        while !is_over.load(Ordering::Relaxed) {
            let answer = app.put("acme", "GOOD", "v").await;
            assert!(matches!(answer.status, 200 | 201), "{answer:?}");
            written += 1;
        }
        written
    };
    let ((), written) = tokio::join!(floods, writes);
    app.stop().await;
    let flooded = "action <> 'put' AND outcome IN ('invalid', 'limited')";
    assert_eq!(counted(&app, flooded).await, (4 * EACH + CLOSED) as i64, "no count is lost");
    let rows = records(&app, "action <> 'put'").await;
    assert!(rows < 1000, "{rows}");
    let texts = "tenant IS NOT NULL OR secret_key IS NOT NULL OR detail LIKE '%agent%' OR detail LIKE '%user%'";
    assert_eq!(records(&app, &format!("{flooded} AND ({texts})")).await, 0);
    assert_eq!(counted(&app, "chain = 'write' AND outcome = 'done'").await, written);
    assert!(written > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_number_of_strangers_keeps_the_denial_of_a_known_token_from_being_recorded_with_its_names() {
    let app = started(Backend::sqlite(), "[audit]\nwindow = \"1h\"\ndenials_per_second = 1\n").await;
    let narrow = app.new_token("narrow", &["globex"], &[Action::Read]).await;
    let ask = || app.instance().request(Method::GET, &secret("acme", "A"));
    for _ in 0..30 {
        assert_eq!(Answer::of(ask()).await.status, 401);
    }
    assert_eq!(Answer::of(ask().bearer_auth(&narrow)).await.status, 403);
    assert_eq!(records(&app, "actor_name = 'narrow' AND tenant = 'acme' AND secret_key = 'A'").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_stranger_writes_is_kept() {
    on_both(async |backend| {
        let app = started(backend, LONG).await;
        let narrow = app.new_token("narrow", &["globex"], &[Action::Read]).await;
        let ask = async |token: Option<&str>| {
            let request = app.instance().request(Method::GET, &secret("strange", "STRANGE"));
            let request = request.header("user-agent", "strange").header("x-audit-user", "strange");
            let request = request.header("x-request-id", "strange");
            let answer =
                Answer::of(token.map_or(request.try_clone().unwrap(), |token| request.bearer_auth(token))).await;
            let newest =
                found(&app, AuditFilter { outcome: Some("denied".to_owned()), ..AuditFilter::default() }).await;
            (answer.header("x-request-id").to_owned(), newest.into_iter().next().unwrap())
        };
        let form = |id: &str| format!("st_{id}_{}", "A".repeat(43));
        let guesses = [
            (None, None),
            (Some("strange".to_owned()), None),
            (Some(form("strange.STRANGE.")), None),
            (Some(form("0123456789abcdef")), Some("0123456789abcdef")),
        ];
        for (token, id) in guesses {
            let (given, record) = ask(token.as_deref()).await;
            let detail: Value = serde_json::from_str(&record.detail).unwrap();
            assert_eq!(record.actor_id.as_deref(), id);
            assert_eq!((&detail["peer"], &detail["request_id"]), (&json!("127.0.0.1"), &json!(given)));
            assert!(!format!("{record:?}{given}").to_lowercase().contains("strange"), "{record:?}");
        }
        // Of a token that is known, what it was used for is on record.
        let (given, record) = ask(Some(&narrow)).await;
        assert_eq!((record.tenant.as_deref(), record.key.as_deref()), (Some("strange"), Some("STRANGE")));
        let detail: Value = serde_json::from_str(&record.detail).unwrap();
        assert_eq!(
            (given.as_str(), &detail["agent"], &detail["fields"]["user"]),
            ("strange", &json!("strange"), &json!("strange"))
        );
    })
    .await;
}

/// Bytes that the records take, with their indexes.
async fn size(backend: &Backend) -> i64 {
    match backend {
        Backend::Sqlite(_) => backend.number("SELECT sum(pgsize) FROM dbstat WHERE name LIKE '%audit_records%'").await,
        Backend::Postgres(_) => backend.number("SELECT pg_total_relation_size('secretier.audit_records')").await,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_of_denials_takes_less_than_is_configured_for_strangers_and_loses_no_count() {
    const A_DAY: i64 = 1 << 20;
    on_both(async |backend| {
        let config = "[audit]\nwindow = \"20ms\"\ndenials_per_second = 0\nstrangers_per_day = \"1MiB\"\n\
                      [access]\ntrusted_proxies = [\"127.0.0.0/8\"]\n";
        let mut app = started(backend.clone(), config).await;
        let narrow = app.new_token("narrow", &["globex"], &[Action::Read]).await;
        let before = size(&backend).await;
        let (hours, peers, each) = (24, 8, 12);
        let mut known = 0;
        for hour in 0..hours {
            join_all((0..peers).map(async |peer| {
                for _ in 0..each {
                    let request = app.instance().request(Method::GET, &secret("acme", "A"));
                    let request = request.header("x-forwarded-for", format!("192.0.2.{peer}"));
                    assert_eq!(Answer::of(request).await.status, 401);
                }
            }))
            .await;
            if hour > 0 {
                // However many strangers there are.
                let request = app.instance().request(Method::GET, &secret("acme", "A")).bearer_auth(&narrow);
                assert_eq!(Answer::of(request.header("x-forwarded-for", "192.0.2.200")).await.status, 403);
                known += 1;
            }
            app.advance(Duration::from_secs(3600));
        }
        let paid = metric(&app, "secretier_audit_strangers_bytes_total").await;
        let grown = size(&backend).await - before;
        assert!(paid <= A_DAY, "{paid} of {A_DAY}");
        assert!(grown <= paid && paid < 3 * grown, "{grown} bytes were written, and {paid} paid for");
        assert_eq!(records(&app, "actor_name = 'narrow' AND tenant = 'acme'").await, known, "each with its names");
        app.stop().await;
        assert_eq!(counted(&app, "chain = 'denial'").await, hours * peers * each + known);
    })
    .await;
}

async fn metric(app: &TestApp, series: &str) -> i64 {
    let page = app.metrics().await;
    let value = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {series}")).parse::<f64>().unwrap() as i64
}
