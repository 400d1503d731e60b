//! Who is let in.

use std::time::Duration;

use reqwest::{Method, header};
use secretier::{
    access::{Action, NewToken},
    phase::Phase,
};

use crate::{
    app::{Answer, Backend, Instance, Setup, TestApp, eventually, on_both, secret},
    postgres::Postgres,
    within::within,
};

async fn ask_with(app: &TestApp, authorization: &str) -> Answer {
    let request = app.instance().request(Method::GET, &secret("acme", "A"));
    Answer::of(request.header(header::AUTHORIZATION, authorization)).await
}

async fn serving(backend: Backend) -> TestApp {
    let app = Setup::new(backend, Phase::Database).start().await;
    app.put("acme", "A", "1").await;
    app
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_good_token_nothing_but_health_is_told() {
    on_both(async |backend| {
        let app = serving(backend).await;
        let missing = (401, "token_missing".to_owned());
        for path in ["/v1/tenants", "/v1/tenants/acme/secrets/A", "/metrics", "/openapi.json", "/nothing"] {
            let answer = Answer::of(app.instance().request(Method::GET, path)).await;
            assert_eq!(answer.problem(), missing, "{path}");
            assert_eq!(answer.header("www-authenticate"), "Bearer");
        }
        assert_eq!(ask_with(&app, "Basic YTpi").await.problem(), missing);
        let invalid = (401, "token_invalid".to_owned());
        let (id, secret_part) = app.token.rsplit_once('_').unwrap();
        let other = app.new_token("other", &["*"], &[Action::Read]).await;
        let (_, other_secret) = other.rsplit_once('_').unwrap();
        for wrong in [
            "Bearer x".to_owned(),
            "Bearer ".to_owned(),
            format!("Bearer {id}_{}", "A".repeat(secret_part.len())),
            format!("Bearer {id}_{other_secret}"),
            format!("Bearer {}x", app.token),
            format!("Bearer st_0123456789abcdef_{secret_part}"),
        ] {
            assert_eq!(ask_with(&app, &wrong).await.status, 401, "{wrong}");
            if wrong != "Bearer " {
                assert_eq!(ask_with(&app, &wrong).await.problem(), invalid, "{wrong}");
            }
        }
        assert_eq!(ask_with(&app, &format!("bearer {}", app.token)).await.status, 200);
        assert_eq!(Answer::of(app.instance().request(Method::GET, "/healthz")).await.status, 200);
        assert_eq!(app.ready().await.status, 200);
    })
    .await;
}

fn new(name: &str, lifetime: Option<Duration>) -> NewToken {
    NewToken {
        name: name.to_owned(),
        tenants: vec!["*".to_owned()],
        keys: vec!["*".to_owned()],
        actions: vec![Action::Read],
        lifetime,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_works_at_once_wherever_it_was_made_until_it_expires() {
    on_both(async |backend| {
        let app = serving(backend).await;
        let (token, row) = new("short", Some(Duration::from_mins(1))).draw(app.instance().clock.now()).unwrap();
        // Another process, as far as this instance can tell: it is told nothing.
        app.another().await.service.resolver.database().insert_token(&row).await.unwrap();
        let bearer = format!("Bearer {}", token.expose());
        assert_eq!(ask_with(&app, &bearer).await.value(), "1");
        app.advance(Duration::from_secs(61));
        assert_eq!(ask_with(&app, &bearer).await.problem(), (401, "token_expired".to_owned()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_stops_soon_and_for_good() {
    on_both(async |backend| {
        let mut app = serving(backend).await;
        let bearer = format!("Bearer {}", app.new_token("leaked", &["*"], &[Action::Read]).await);
        assert_eq!(ask_with(&app, &bearer).await.status, 200);
        assert_eq!(app.instance().service.resolver.database().revoke_token("leaked").await.unwrap(), 1);
        eventually(async || ask_with(&app, &bearer).await.status == 401).await;
        assert_eq!(ask_with(&app, &bearer).await.problem(), (401, "token_invalid".to_owned()));
        app.restart().await;
        assert_eq!(ask_with(&app, &bearer).await.problem(), (401, "token_invalid".to_owned()));
        assert_eq!(app.get("acme", "A").await.status, 200, "the others go on");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_token_that_cannot_be_read_keeps_the_others_neither_valid_nor_out() {
    on_both(async |backend| {
        let mut app = serving(backend).await;
        let bearer = format!("Bearer {}", app.new_token("leaked", &["*"], &[Action::Read]).await);
        app.new_token("broken", &["*"], &[Action::Read]).await;
        app.setup.backend.sql("UPDATE access_tokens SET tenants = 'none' WHERE name = 'broken'").await;
        assert_eq!(app.instance().service.resolver.database().revoke_token("leaked").await.unwrap(), 1);
        eventually(async || ask_with(&app, &bearer).await.status == 401).await;
        app.restart().await;
        assert_eq!(app.get("acme", "A").await.status, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_is_refused_by_every_instance_a_few_looks_later() {
    on_both(async |backend| {
        let app = serving(backend).await;
        let beside = app.another().await;
        let token = app.new_token("leaked", &["*"], &[Action::Read]).await;
        let instances = [app.instance(), &beside];
        let looks = async |instance: &Instance| {
            let metrics = Answer::of(instance.request(Method::GET, "/metrics").bearer_auth(&app.token)).await.text;
            let mut lines = metrics.lines().filter(|line| line.starts_with("secretier_database_calls_total{"));
            let line = lines.find(|line| line.contains("call=\"changes\"") && line.contains("outcome=\"ok\"")).unwrap();
            line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()
        };
        let ask = async |instance: &Instance| {
            Answer::of(instance.request(Method::GET, &secret("acme", "A")).bearer_auth(&token)).await.status
        };
        for instance in instances {
            assert_eq!(ask(instance).await, 200);
        }
        assert_eq!(app.instance().service.resolver.database().revoke_token("leaked").await.unwrap(), 1);
        for instance in instances {
            let before = looks(instance).await;
            let refused = async {
                loop {
                    // The first may have begun before the change, the second finds it, and the
                    // third begins when what the second found is in force.
                    let is_late = looks(instance).await >= before + 3;
                    match ask(instance).await {
                        401 => break,
                        status => assert!(!is_late, "{status} after three looks"),
                    }
                }
            };
            within("it is refused", refused).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_is_refused_also_where_the_instance_cannot_announce_itself() {
    let backend = Backend::Postgres(Postgres::shared().database().await);
    let mut setup = Setup::new(backend, Phase::Database);
    setup.database_timeout = "10m";
    let app = setup.start().await;
    app.put("acme", "A", "1").await;
    let bearer = format!("Bearer {}", app.new_token("leaked", &["*"], &[Action::Read]).await);
    let lock = app.setup.backend.hold("instances").await;
    let waits = "SELECT count(*) FROM pg_locks \
                 WHERE relation = '{}instances'::regclass AND mode = 'RowExclusiveLock' AND NOT granted";
    eventually(async || app.setup.backend.number(waits).await == 1).await;
    assert_eq!(app.instance().service.resolver.database().revoke_token("leaked").await.unwrap(), 1);
    eventually(async || ask_with(&app, &bearer).await.status == 401).await;
    drop(lock);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_use_is_told_once_a_minute_from_whichever_instance_it_was() {
    on_both(async |backend| {
        let app = serving(backend).await;
        let beside = app.another().await;
        let token = app.new_token("used", &["*"], &[Action::Read]).await;
        app.new_token("idle", &["*"], &[Action::Read]).await;
        let database = &app.instance().service.resolver.database();
        let last_use = async |name: &str| {
            database.tokens().await.unwrap().into_iter().find(|token| token.name == name).unwrap().last_used_at
        };
        let mut before = app.instance().clock.now();
        for instance in [app.instance(), &beside, app.instance()] {
            let request = instance.request(Method::GET, &secret("acme", "A")).bearer_auth(&token);
            assert_eq!(Answer::of(request).await.status, 200);
            // A reading of the tokens in between loses nothing.
            instance.service.access.reload().await.unwrap();
            let used = app.instance().clock.now();
            app.advance(Duration::from_secs(61));
            eventually(async || last_use("used").await.is_some_and(|at| at >= before)).await;
            assert!(last_use("used").await.unwrap() <= used);
            before = app.instance().clock.now();
        }
        assert_eq!(last_use("idle").await, None);

        // The last use of a token that was revoked since is told too.
        let beside_token = beside.request(Method::GET, &secret("acme", "A")).bearer_auth(&token);
        assert_eq!(Answer::of(beside_token).await.status, 200);
        database.revoke_token("used").await.unwrap();
        beside.service.access.reload().await.unwrap();
        beside.stop().await;
        assert!(last_use("used").await.unwrap() >= before);
    })
    .await;
}
