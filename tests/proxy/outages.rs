//! Bad days: Infisical, the database, or both fail in every way we know.

use std::time::{Duration, Instant};

use diesel::{Connection as _, SqliteConnection, connection::SimpleConnection as _};
use futures_util::future::join_all;
use reqwest::Method;
use secretier::{
    phase::Phase,
    tiers::upstream::standin::{Fault, Route},
};
use serde_json::json;

use crate::{
    app::{Answer, Backend, ENV, Setup, TestApp, eventually, on_both},
    postgres::{self, Postgres},
    within::{HANGS, within},
};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// A way in which Infisical can fail.
#[derive(Debug, Clone, Copy)]
enum BadDay {
    PortClosed,
    LoginRefused,
    Fails(Fault),
}

const BAD_DAYS: [BadDay; 14] = [
    BadDay::PortClosed,
    BadDay::LoginRefused,
    BadDay::Fails(Fault::Down),
    BadDay::Fails(Fault::Hang),
    BadDay::Fails(Fault::Slow(Duration::from_secs(45))),
    BadDay::Fails(Fault::RateLimited { retry_after: Duration::from_secs(30) }),
    // Says for how long to stay away as little as what stands in front of it may.
    BadDay::Fails(Fault::Status(429)),
    BadDay::Fails(Fault::Status(500)),
    BadDay::Fails(Fault::Status(503)),
    BadDay::Fails(Fault::Garbage),
    BadDay::Fails(Fault::CutOff),
    BadDay::Fails(Fault::TokenExpired),
    BadDay::Fails(Fault::DatabaseDown),
    BadDay::Fails(Fault::CacheDown),
];

impl BadDay {
    async fn begins(self, app: &mut TestApp) {
        match self {
            Self::PortClosed => app.infisical.stop().await,
            Self::LoginRefused => {
                app.world().set_client_secret(&app.identity.client_id, "another");
                app.world().revoke_tokens();
            }
            Self::Fails(fault) => app.world().fault(fault),
        }
        // That a folder is unchanged is said without a body, which nothing can cut off.
        app.holds("acme", &[("LATER", "l")]);
    }

    /// What `/readyz` says of Infisical, and how the calls end that `/metrics` counts.
    fn looks(self) -> (&'static str, &'static str) {
        match self {
            Self::LoginRefused => ("login_refused", "refused"),
            Self::Fails(Fault::RateLimited { .. } | Fault::Status(429)) => ("rate_limited", "rate_limited"),
            Self::Fails(Fault::Hang | Fault::Slow(_)) => ("down", "timeout"),
            Self::PortClosed | Self::Fails(_) => ("down", "failed"),
        }
    }

    async fn ends(self, app: &mut TestApp) {
        match self {
            Self::PortClosed => app.infisical.restart().await.unwrap(),
            Self::LoginRefused => {
                app.world().set_client_secret(&app.identity.client_id, &app.identity.client_secret);
            }
            Self::Fails(_) => app.world().clear_faults(),
        }
    }
}

/// Runs a test on each bad day, on both databases.
async fn on_every_bad_day(test: impl AsyncFn(BadDay, Backend)) {
    // Started before: what blocks one of the days would hold up all of them.
    tokio::task::spawn_blocking(Postgres::shared).await.unwrap();
    let test = &test;
    join_all(BAD_DAYS.map(async |day| on_both(async |backend| test(day, backend).await).await)).await;
}

/// How soon "at once" must be while a call upstream may take 30 s.
const AT_ONCE: Duration = Duration::from_secs(15);

/// An answer that must come at once, and its tier.
async fn at_once(app: &TestApp, tenant: &str, key: &str, day: &str) -> (String, String) {
    let began = Instant::now();
    let answer = app.get(tenant, key).await;
    assert_eq!(answer.status, 200, "{day}: {answer:?}");
    assert!(began.elapsed() < AT_ONCE, "{day}: it took {:?}", began.elapsed());
    (answer.value(), answer.tier().to_owned())
}

/// An answer that must be 503 with `Retry-After`.
fn assert_unavailable(answer: &Answer, day: &str) {
    assert_eq!(answer.status, 503, "{day}: {answer:?}");
    assert_eq!(answer.problem(), (503, "unavailable".to_owned()), "{day}: {answer:?}");
    assert!(answer.header("retry-after").parse::<u64>().is_ok_and(|seconds| seconds >= 1), "{day}: {answer:?}");
}

/// A write that cannot be recorded, in a database that is down, is not begun.
fn assert_unrecorded(answer: &Answer, day: &str) {
    assert_eq!(answer.problem(), (503, "audit_unavailable".to_owned()), "{day}: {answer:?}");
    assert!(answer.header("retry-after").parse::<u64>().is_ok_and(|seconds| seconds >= 1), "{day}: {answer:?}");
}

/// Asks until the answer is 200; it must never be an absence or empty meanwhile.
async fn until_served(app: &TestApp, tenant: &str, key: &str, day: &str) -> Answer {
    let asking = async {
        loop {
            let answer = app.get(tenant, key).await;
            match answer.status {
                200 => return answer,
                503 => tokio::time::sleep(Duration::from_millis(20)).await,
                other => panic!("{day}: {other}: {answer:?}"),
            }
        }
    };
    within(&format!("{day}: it heals"), asking).await
}

/// Waits until `/readyz` says this.
async fn until_ready(app: &TestApp, status: &str, database: &str) -> Answer {
    let asking = async {
        loop {
            let answer = app.ready().await;
            let body = answer.json();
            if body["status"] == status && body["tiers"]["database"]["state"] == database {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(HANGS, asking).await {
        Ok(answer) => answer,
        Err(_) => panic!("never {status} with the database {database}: {:?}", app.ready().await),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_a_servable_copy_gets_it_at_once_however_infisical_fails() {
    on_every_bad_day(async |day, backend| {
        let name = format!("{day:?}");
        let mut app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("K", "v"), ("OTHER", "o")]);
        assert_eq!(app.get("acme", "K").await.value(), "v");
        day.begins(&mut app).await;
        assert_eq!(at_once(&app, "acme", "K", &name).await, ("v".into(), "memory".into()), "{name}");
        app.restart().await;
        assert_eq!(at_once(&app, "acme", "K", &name).await, ("v".into(), "database".into()), "{name}: a fresh copy");
        app.advance(6 * MINUTE);
        assert_eq!(at_once(&app, "acme", "K", &name).await.0, "v", "{name}: past memory.ttl");
        app.advance(HOUR);
        assert_eq!(
            at_once(&app, "acme", "OTHER", &name).await,
            ("o".into(), "database".into()),
            "{name}: a stale copy"
        );
        app.advance(22 * HOUR);
        assert_eq!(at_once(&app, "acme", "K", &name).await.0, "v", "{name}: almost too old");
        let began = Instant::now();
        let listed = Answer::of(app.request(Method::GET, "/v1/tenants/acme/secrets?values=true")).await;
        assert_eq!(listed.json()["keys"][0]["value"], "v", "{name}: {listed:?}");
        assert!(began.elapsed() < AT_ONCE, "{name}: the list took {:?}", began.elapsed());
        app.advance(2 * HOUR);
        if !matches!(day, BadDay::Fails(Fault::Hang | Fault::Slow(_))) {
            assert_unavailable(&app.get("acme", "K").await, &name);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_in_memory_past_its_ttl_is_served_at_once_however_infisical_fails() {
    on_every_bad_day(async |day, backend| {
        let name = format!("{day:?}");
        let mut app = Setup::new(backend, Phase::Infisical).start().await;
        app.holds("acme", &[("K", "v")]);
        assert_eq!(app.get("acme", "K").await.value(), "v");
        day.begins(&mut app).await;
        for age in [6 * MINUTE, HOUR, 22 * HOUR] {
            app.advance(age);
            assert_eq!(at_once(&app, "acme", "K", &name).await, ("v".into(), "memory".into()), "{name}");
        }
        app.advance(2 * HOUR);
        if !matches!(day, BadDay::Fails(Fault::Hang | Fault::Slow(_))) {
            assert_unavailable(&app.get("acme", "K").await, &name);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_no_copy_gets_503_within_the_deadline_and_the_secret_once_infisical_is_back() {
    on_every_bad_day(async |day, backend| {
        let name = format!("{day:?}");
        let mut setup = Setup::new(backend, Phase::Hybrid);
        setup.upstream_timeout = "1s";
        let mut app = setup.start().await;
        app.holds("acme", &[("K", "v")]);
        app.holds("globex", &[("K", "g")]);
        assert_eq!(until_served(&app, "acme", "K", &name).await.value(), "v");
        // A list of tenants younger than a minute would prove that some do not exist.
        app.advance(2 * MINUTE);
        day.begins(&mut app).await;
        for (tenant, key) in [("globex", "K"), ("globex", "MADE_UP"), ("nobody", "K")] {
            let began = Instant::now();
            assert_unavailable(&app.get(tenant, key).await, &name);
            assert!(began.elapsed() < Duration::from_secs(10), "{name}: it took {:?}", began.elapsed());
        }
        day.ends(&mut app).await;
        // Past the breaker's longest wait, a 429's and a refused login's.
        app.advance(10 * MINUTE);
        assert_eq!(until_served(&app, "globex", "K", &name).await.value(), "g");
        let healing = async {
            // A call that had hung all the while may end, and be told of, only now.
            while app.ready().await.json()["tiers"]["infisical"]["state"] != "up" {
                app.get_fresh("globex", "K").await;
            }
        };
        within(&format!("{name}: it is up again"), healing).await;
    })
    .await;
}

/// All values of a tenant, in the order of their keys.
async fn list(app: &TestApp, tenant: &str) -> Answer {
    app.ask_tenant(tenant, "/secrets?values=true").await
}

async fn batch(app: &TestApp, tenant: &str, keys: &[&str]) -> Answer {
    let asked = app.request(Method::POST, &format!("/v1/tenants/{tenant}/secrets/batch-get"));
    Answer::of(asked.json(&json!({ "keys": keys }))).await
}

/// The values of a list, or of a batch.
fn values(answer: &Answer) -> Vec<String> {
    assert_eq!(answer.status, 200, "{answer:?}");
    let body = answer.json();
    let secrets = body["keys"].as_array().or(body["secrets"].as_array()).unwrap();
    secrets.iter().map(|secret| secret["value"].as_str().unwrap().to_owned()).collect()
}

/// Whether `/metrics` counts any of these.
async fn counts(app: &TestApp, name: &str, labels: &[&str]) -> bool {
    let page = app.metrics().await;
    page.lines().any(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_way_in_which_infisical_fails_is_told_and_over_without_a_restart() {
    on_every_bad_day(async |day, backend| {
        let name = format!("{day:?}");
        let (state, outcome) = day.looks();
        let mut setup = Setup::new(backend, Phase::Hybrid);
        setup.upstream_timeout = "1s";
        let mut app = setup.start().await;
        for tenant in ["acme", "globex", "initech"] {
            app.holds(tenant, &[("K", "v"), ("L", "l")]);
        }
        for tenant in ["acme", "globex"] {
            assert_eq!(until_served(&app, tenant, "K", &name).await.value(), "v");
        }
        app.stored(4).await;
        app.restart().await;
        assert_eq!(at_once(&app, "acme", "K", &name).await.1, "database");
        assert_eq!(at_once(&app, "acme", "K", &name).await.1, "memory");
        app.advance(2 * MINUTE);
        day.begins(&mut app).await;

        for tenant in ["acme", "globex"] {
            assert_eq!(at_once(&app, tenant, "K", &name).await.0, "v");
            assert_eq!(values(&list(&app, tenant).await), ["v", "l"], "{name}");
            assert_eq!(values(&batch(&app, tenant, &["K", "L"]).await), ["v", "l"], "{name}");
            assert_eq!(app.get_fresh(tenant, "K").await.value(), "v", "{name}: it cannot be revalidated");
        }
        let nothing = [app.get("initech", "K").await, list(&app, "initech").await];
        for answer in nothing.iter().chain([&batch(&app, "initech", &["K"]).await]) {
            assert_unavailable(answer, &name);
        }
        assert_unavailable(&app.put("acme", "K", "w").await, &name);
        assert_eq!(at_once(&app, "acme", "K", &name).await.0, "v", "{name}: after a write that failed");

        let told = async {
            loop {
                let ready = app.ready().await;
                let told = ready.json();
                assert_eq!((ready.status, &told["tiers"]["database"]["state"]), (200, &"up".into()), "{name}: {told}");
                if told["tiers"]["infisical"]["state"] == state {
                    return told["status"].clone();
                }
                // A call that hung may be told of late, and a pause that was told may be over.
                app.get("initech", "K").await;
            }
        };
        assert_eq!(within(&format!("{name}: {state}"), told).await, "degraded");
        assert!(counts(&app, "secretier_upstream_up 0", &[]).await, "{name}");
        let outcome = format!("outcome=\"{outcome}\"");
        assert!(counts(&app, "secretier_upstream_calls_total", &[&outcome]).await, "{name}");
        assert!(counts(&app, "secretier_errors_total", &["code=\"unavailable\""]).await, "{name}");

        day.ends(&mut app).await;
        // Past the breaker's longest wait, a 429's and a refused login's.
        app.advance(10 * MINUTE);
        let healed = async || app.ready().await.json()["status"] == "ready";
        eventually(healed).await;
        assert_eq!(until_served(&app, "initech", "K", &name).await.value(), "v");
        let written = async || app.put("acme", "K", "x").await.status == 200;
        eventually(written).await;
        assert_eq!(app.get("acme", "K").await.value(), "x", "{name}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_nobody_asks_any_more_hears_that_infisical_is_back() {
    let (server, mut app) = on_postgres(Phase::Hybrid).await;
    app.holds("acme", &[("K", "v")]);
    app.infisical.stop().await;
    assert_unavailable(&app.get("acme", "K").await, "closed");
    let server = Blow::Stopped.strikes(server).await;
    // With this answer, nobody who looks at it sends another request.
    assert_eq!(until_ready(&app, "unavailable", "down").await.status, 503);
    app.infisical.restart().await.unwrap();
    app.advance(2 * MINUTE);
    assert_eq!(until_ready(&app, "degraded", "down").await.status, 200);
    assert_eq!(app.get("acme", "K").await.value(), "v");
    drop(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_memory_has_whole_is_served_up_to_max_stale_however_infisical_fails() {
    on_every_bad_day(async |day, backend| {
        let name = format!("{day:?}");
        let mut app = Setup::new(backend, Phase::Infisical).start().await;
        app.holds("acme", &[("A", "1"), ("B", "2")]);
        app.holds("empty", &[]);
        assert_eq!(values(&list(&app, "acme").await), ["1", "2"]);
        assert_eq!(list(&app, "empty").await.status, 200);
        day.begins(&mut app).await;
        for age in [MINUTE, 6 * MINUTE, HOUR, 22 * HOUR] {
            app.advance(age);
            let began = Instant::now();
            let listed = list(&app, "acme").await;
            assert_eq!(values(&listed), ["1", "2"], "{name}");
            assert!(began.elapsed() < AT_ONCE, "{name}: it took {:?}", began.elapsed());
            assert!(listed.age() >= age.as_secs(), "{name}: {listed:?}");
        }
        app.advance(2 * HOUR);
        if !matches!(day, BadDay::Fails(Fault::Hang | Fault::Slow(_))) {
            assert_unavailable(&list(&app, "acme").await, &name);
            assert_unavailable(&list(&app, "empty").await, &name);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_infisical_that_fails_is_not_stormed() {
    on_every_bad_day(async |day, backend| {
        let name = format!("{day:?}");
        let mut setup = Setup::new(backend, Phase::Hybrid);
        setup.upstream_timeout = "1s";
        let mut app = setup.start().await;
        app.holds("acme", &[("K", "v")]);
        assert_eq!(until_served(&app, "acme", "K", &name).await.value(), "v");
        app.advance(2 * MINUTE);
        day.begins(&mut app).await;
        app.world().mark();
        let tenants: Vec<String> = (0..10).map(|number| format!("tenant-{number}")).collect();
        for _ in 0..4 {
            let answers = join_all((0..50).map(|caller| app.get(&tenants[caller % tenants.len()], "K"))).await;
            for answer in answers {
                assert_unavailable(&answer, &name);
            }
        }
        // With time the breaker lets one call through now and then, ever more seldom.
        let calls = app.world().calls_since_mark();
        assert!(calls.total() <= 24, "{name}: {calls:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_ends_mid_way_costs_a_login_and_nobody_notices() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("K", "v")]);
        assert_eq!(app.get("acme", "K").await.value(), "v");
        app.world().expire_tokens();
        assert_eq!(app.get_fresh("acme", "K").await.tier(), "infisical");
        app.world().revoke_tokens();
        assert_eq!(app.get_fresh("acme", "K").await.tier(), "infisical");
        app.world().fault_next(1, Route::List, Fault::TokenExpired);
        assert_eq!(app.get_fresh("acme", "K").await.tier(), "infisical");
        assert_eq!(app.world().calls().login, 4);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_a_revalidated_copy_gets_the_copy_where_infisical_hangs() {
    let both = [Phase::Hybrid, Phase::Infisical].map(async |phase| {
        on_both(async |backend| {
            let mut setup = Setup::new(backend, phase);
            setup.upstream_timeout = "4s";
            let mut app = setup.start().await;
            app.holds("acme", &[("K", "v")]);
            assert_eq!(until_served(&app, "acme", "K", "").await.value(), "v");
            app.world().fault(Fault::Hang);
            assert_eq!(app.get_fresh("acme", "K").await.value(), "v", "memory has it");
            if phase == Phase::Hybrid {
                app.restart().await;
                let twice = [app.get_fresh("acme", "K"), app.get_fresh("acme", "K")];
                for answer in join_all(twice).await {
                    assert_eq!(answer.value(), "v", "the database has it");
                }
                let list = app.request(Method::GET, "/v1/tenants/acme/secrets").header("cache-control", "no-cache");
                let listed = Answer::of(list).await;
                assert_eq!(listed.status, 200, "{listed:?}");
            }
        })
        .await;
    });
    join_all(both).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_infisical_that_is_slow_but_in_time_is_waited_for() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("K", "v")]);
        app.world().fault(Fault::Slow(Duration::from_millis(300)));
        assert_eq!(app.get("acme", "K").await.value(), "v");
    })
    .await;
}

/// What happens to PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Blow {
    Stopped,
    Killed,
    Frozen,
    /// It refuses the logins of our role, and has ended its connections.
    LoginRefused,
    /// Others have all connections that our role may have.
    Crowded,
}

impl Blow {
    const ALL: [Self; 5] = [Self::Stopped, Self::Killed, Self::Frozen, Self::LoginRefused, Self::Crowded];

    async fn strikes(self, server: Postgres) -> Postgres {
        match self {
            Self::Stopped => aside(server, Postgres::stop).await,
            Self::Killed => aside(server, Postgres::kill).await,
            Self::Frozen => aside(server, |server| server.freeze()).await,
            Self::LoginRefused => shut_out(server, "NOLOGIN").await,
            Self::Crowded => shut_out(server, "CONNECTION LIMIT 0").await,
        }
    }

    async fn is_over(self, server: Postgres) -> Postgres {
        match self {
            Self::Stopped | Self::Killed => aside(server, Postgres::start_again).await,
            Self::Frozen => aside(server, |server| server.thaw()).await,
            Self::LoginRefused | Self::Crowded => {
                postgres::execute(&server.url("postgres"), "ALTER ROLE app LOGIN CONNECTION LIMIT -1").await;
                server
            }
        }
    }
}

async fn shut_out(server: Postgres, how: &str) -> Postgres {
    let ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'";
    postgres::execute(&server.url("postgres"), &format!("ALTER ROLE app {how}; {ended}")).await;
    server
}

/// Does something that blocks where it holds up nothing else: a client whose test stands
/// still for long is cut off, as any client is that sends no headers.
async fn aside(mut server: Postgres, act: impl FnOnce(&mut Postgres) + Send + 'static) -> Postgres {
    let acting = tokio::task::spawn_blocking(move || {
        act(&mut server);
        server
    });
    acting.await.unwrap()
}

/// An instance on a PostgreSQL of its own.
async fn on_postgres(phase: Phase) -> (Postgres, TestApp) {
    on_postgres_with(phase, "").await
}

/// An operator's choice: an instance goes on longer without the database than any copy lasts.
const DETACHED: &str = "max_detached = \"7d\"\n";

async fn on_postgres_with(phase: Phase, lines: &str) -> (Postgres, TestApp) {
    let server = tokio::task::spawn_blocking(Postgres::start).await.unwrap();
    // Not as the superuser, whom neither a limit nor anything else holds back.
    let url = server.database().await;
    postgres::execute(&url, "CREATE ROLE app LOGIN; GRANT CREATE ON DATABASE test_0 TO app").await;
    let mut setup = Setup::new(Backend::Postgres(url.replace("//postgres@", "//app@")), phase);
    setup.database_timeout = "5s";
    setup.database = lines.to_owned();
    (server, setup.start().await)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_postgresql_lookups_go_on_and_write_back_resumes_when_it_is_back() {
    let all = Blow::ALL.map(async |blow| {
        let name = format!("{blow:?}");
        let (server, app) = on_postgres(Phase::Hybrid).await;
        for tenant in ["acme", "globex", "initech"] {
            app.holds(tenant, &[("K", tenant)]);
        }
        assert_eq!(app.get("acme", "K").await.value(), "acme");
        let server = blow.strikes(server).await;
        assert_eq!(at_once(&app, "acme", "K", &name).await, ("acme".into(), "memory".into()), "{name}");
        assert_eq!(app.get("globex", "K").await.value(), "globex", "{name}: from Infisical");
        assert_eq!(until_ready(&app, "degraded", "down").await.status, 200);
        assert!(counts(&app, "secretier_database_up 0", &[]).await, "{name}");
        let unavailable = "outcome=\"unavailable\"";
        assert!(counts(&app, "secretier_database_calls_total", &[unavailable]).await, "{name}");
        assert_eq!(values(&list(&app, "globex").await), ["globex"], "{name}");
        assert_eq!(values(&batch(&app, "globex", &["K"]).await), ["globex"], "{name}");
        app.advance(6 * MINUTE);
        assert_eq!(app.get("acme", "K").await.value(), "acme", "{name}: past memory.ttl");
        assert_eq!(app.get("acme", "MADE_UP").await.problem().0, 404, "{name}: Infisical proves an absence");
        let _server = blow.is_over(server).await;
        assert_eq!(until_ready(&app, "ready", "up").await.status, 200);
        assert_eq!(app.get("initech", "K").await.value(), "initech");
        let rows = "SELECT count(*) FROM {}company_secrets s JOIN {}companies c ON c.id = s.company_id \
                    WHERE c.subdomain = 'initech'";
        let written = async { while app.setup.backend.number(rows).await != 1 {} };
        within("write-back resumes", written).await;
    });
    join_all(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_key_is_answered_by_infisical_within_the_deadline_while_postgresql_hangs() {
    let server = Postgres::start();
    let mut setup = Setup::new(Backend::Postgres(server.database().await), Phase::Hybrid);
    // As the defaults are to each other: the deadline twice what the database may take.
    (setup.database_timeout, setup.upstream_timeout) = ("5s", "10s");
    let app = setup.start().await;
    app.holds("acme", &[("K", "v")]);
    app.holds("globex", &[("K", "g")]);
    server.freeze();
    let list = Answer::of(app.request(Method::GET, "/v1/tenants/globex/secrets?values=true"));
    let (listed, answer) = tokio::join!(list, app.get("acme", "K"));
    assert_eq!(answer.value(), "v");
    assert_eq!(listed.json()["keys"][0]["value"], "g", "{listed:?}");
    server.thaw();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_postgresql_goes_unnoticed_by_those_who_ask_meanwhile() {
    let (mut server, app) = on_postgres(Phase::Hybrid).await;
    for tenant in ["acme", "globex", "initech"] {
        app.holds(tenant, &[("K", tenant)]);
    }
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let traffic = ["acme", "globex", "initech"].map(async |tenant| {
        let mut asked = 0;
        while !*stopped.borrow() {
            let answer = if asked % 2 == 0 { app.get(tenant, "K").await } else { app.get_fresh(tenant, "K").await };
            assert_eq!(answer.value(), tenant);
            asked += 1;
        }
        asked
    });
    let restarts = async {
        for _ in 0..2 {
            server = aside(server, Postgres::restart).await;
            until_ready(&app, "ready", "up").await;
            server = aside(server, Postgres::kill).await;
            until_ready(&app, "degraded", "down").await;
            server = aside(server, Postgres::start_again).await;
            until_ready(&app, "ready", "up").await;
        }
        stop.send_replace(true);
    };
    let (asked, ()) = tokio::join!(join_all(traffic), restarts);
    assert!(asked.iter().all(|asked| *asked > 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_database_owns_is_answered_from_memory_up_to_max_stale_while_it_is_down() {
    let all = Blow::ALL.map(async |blow| {
        let name = format!("{blow:?}");
        let (server, app) = on_postgres_with(Phase::Database, DETACHED).await;
        assert_eq!(app.put("acme", "K", "v").await.status, 201);
        assert_eq!(app.put("acme", "COLD", "c").await.status, 201);
        assert_eq!(app.get("acme", "K").await.value(), "v");
        let server = blow.strikes(server).await;
        assert_eq!(at_once(&app, "acme", "K", &name).await, ("v".into(), "memory".into()), "{name}");
        for age in [6 * MINUTE, HOUR, 22 * HOUR] {
            app.advance(age);
            assert_eq!(at_once(&app, "acme", "K", &name).await, ("v".into(), "memory".into()), "{name}");
        }
        assert_eq!(values(&batch(&app, "acme", &["K"]).await), ["v"], "{name}");
        assert_unavailable(&batch(&app, "acme", &["K", "COLD"]).await, &name);
        assert_unavailable(&list(&app, "acme").await, &name);
        assert_unavailable(&app.get("acme", "COLD").await, &name);
        assert_unavailable(&app.get("nobody", "K").await, &name);
        assert_eq!(until_ready(&app, "unavailable", "down").await.status, 503);
        app.advance(2 * HOUR);
        assert_unavailable(&app.get("acme", "K").await, &name);
        assert_unrecorded(&app.put("acme", "K", "w").await, &name);
        let _server = blow.is_over(server).await;
        until_ready(&app, "ready", "up").await;
        assert_eq!(until_served(&app, "acme", "COLD", &name).await.value(), "c");
        assert_eq!(until_served(&app, "acme", "K", &name).await.value(), "v");
        assert_eq!(app.world().calls().total(), 0, "{name}: Infisical is not asked in phase database");
    });
    join_all(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_refused_and_nothing_written_upstream_while_the_database_is_down() {
    let all = Blow::ALL.map(async |blow| {
        let name = format!("{blow:?}");
        let (server, app) = on_postgres(Phase::Hybrid).await;
        app.holds("acme", &[("K", "v")]);
        assert_eq!(app.get("acme", "K").await.value(), "v");
        let server = blow.strikes(server).await;
        assert_unrecorded(&app.put("acme", "K", "w").await, &name);
        assert_unrecorded(&app.put("acme", "NEW", "n").await, &name);
        assert_unrecorded(&app.delete("acme", "K").await, &name);
        assert_eq!(app.world().calls().write, 0, "{name}");
        assert_eq!(app.world().secrets(ENV, "/tenants/acme"), [("K".to_owned(), "v".to_owned())]);
        assert_eq!(app.get("acme", "K").await.value(), "v");
        let _server = blow.is_over(server).await;
        until_ready(&app, "ready", "up").await;
        assert_eq!(app.put("acme", "K", "w").await.status, 200);
        assert_eq!(app.get("acme", "K").await.value(), "w");
        assert_eq!(app.ready().await.json()["audit"]["state"], "up", "{name}");
    });
    join_all(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_database_and_infisical_down_memory_answers_up_to_max_stale_and_then_nobody() {
    let all = Blow::ALL.map(async |blow| {
        let name = format!("{blow:?}");
        let (server, mut app) = on_postgres_with(Phase::Hybrid, DETACHED).await;
        app.holds("acme", &[("K", "v")]);
        assert_eq!(app.get("acme", "K").await.value(), "v");
        let server = blow.strikes(server).await;
        app.infisical.stop().await;
        for age in [MINUTE, 6 * MINUTE, HOUR, 22 * HOUR] {
            app.advance(age);
            assert_eq!(at_once(&app, "acme", "K", &name).await, ("v".into(), "memory".into()), "{name}");
        }
        assert_unavailable(&app.get("acme", "OTHER").await, &name);
        app.advance(2 * HOUR);
        assert_unavailable(&app.get("acme", "K").await, &name);
        assert_eq!(until_ready(&app, "unavailable", "down").await.status, 503);
        app.infisical.restart().await.unwrap();
        app.advance(HOUR);
        assert_eq!(until_served(&app, "acme", "K", &name).await.value(), "v", "{name}: Infisical is back");
        let _server = blow.is_over(server).await;
        until_ready(&app, "ready", "up").await;
    });
    join_all(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_answers_with_errors_is_a_tier_that_failed_and_proves_nothing() {
    on_both(async |backend| {
        let mut setup = Setup::new(backend, Phase::Hybrid);
        setup.more = "[[rules]]\ntenants = \"owned\"\nphase = \"database\"\n".to_owned();
        let app = setup.start().await;
        app.holds("acme", &[("K", "v")]);
        assert_eq!(app.put("owned", "K", "o").await.status, 201);
        app.advance(6 * MINUTE);
        app.setup.backend.sql("ALTER TABLE company_secrets RENAME TO elsewhere").await;
        assert_eq!(app.get("acme", "K").await.value(), "v", "Infisical answers");
        assert_unavailable(&app.get("owned", "K").await, "errors");
        assert_unavailable(&app.get("owned", "MADE_UP").await, "errors");
        app.setup.backend.sql("ALTER TABLE elsewhere RENAME TO company_secrets").await;
        assert_eq!(until_served(&app, "owned", "K", "errors").await.value(), "o");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_database_nothing_is_said_not_to_exist_that_it_alone_knows() {
    let rules = "[[rules]]\ntenants = \"owned\"\nphase = \"database\"\n\
                 [[rules]]\ntenants = \"mixed\"\nkeys = \"OWNED_*\"\nphase = \"database\"\n";
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).with(rules).start().await;
        app.holds("mixed", &[("K", "k")]);
        assert_eq!(app.put("mixed", "OWNED_K", "o").await.status, 201);
        assert_eq!(app.put("owned", "K", "o").await.status, 201);
        let all = ["k", "o"];
        assert_eq!(values(&list(&app, "mixed").await), all);
        assert_eq!(app.ask_tenant("owned", "").await.status, 200);
        app.setup.backend.sql("ALTER TABLE company_secrets RENAME TO elsewhere").await;
        assert_unavailable(&list(&app, "mixed").await, "a list without one of its keys");
        assert_unavailable(&app.ask_tenant("owned", "").await, "a tenant without a folder");
        assert_eq!(app.ask_tenant("mixed", "").await.status, 200, "it has a folder");
        assert_eq!(app.ask_tenant("nobody", "").await.status, 404, "it would have a folder");
        app.setup.backend.sql("ALTER TABLE elsewhere RENAME TO company_secrets").await;
        assert_eq!(values(&list(&app, "mixed").await), all);
        assert_eq!(app.ask_tenant("owned", "").await.status, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_infisical_a_tenant_is_not_said_not_to_exist_that_it_may_have() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("K", "v")]);
        assert_eq!(app.get("acme", "K").await.value(), "v");
        assert_eq!(app.ask_tenant("later", "").await.status, 404);
        app.world().fault(Fault::Status(500));
        app.holds("later", &[("K", "v")]);
        app.advance(2 * MINUTE);
        assert_unavailable(&app.ask_tenant("later", "").await, "made since the list was read");
        assert_eq!(app.ask_tenant("acme", "").await.status, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_someone_else_has_locked_holds_up_no_copy_and_nothing_that_infisical_has() {
    let url = Postgres::shared().database().await;
    let mut setup = Setup::new(Backend::Postgres(url.clone()), Phase::Hybrid);
    setup.database_timeout = "1s";
    let app = setup.with("[[rules]]\ntenants = \"owned\"\nphase = \"database\"\n").start().await;
    for tenant in ["acme", "globex"] {
        app.holds(tenant, &[("K", tenant)]);
    }
    // A slow machine may take longer than the database may; what it has answered is in memory.
    for key in ["K", "COLD"] {
        eventually(async || app.put("owned", key, key).await.status < 300).await;
    }
    assert_eq!(until_served(&app, "owned", "K", "").await.value(), "K");
    assert_eq!(app.get("acme", "K").await.value(), "acme");
    let lock = "BEGIN; LOCK TABLE secretier.company_secrets IN ACCESS EXCLUSIVE MODE";
    let other = postgres::session(&url, lock).await;
    for _ in 0..2 {
        assert_eq!(at_once(&app, "owned", "K", "locked").await.0, "K");
        assert_eq!(at_once(&app, "acme", "K", "locked").await.0, "acme");
        app.advance(6 * MINUTE);
    }
    assert_eq!(app.get("globex", "K").await.value(), "globex", "from Infisical");
    assert_unavailable(&app.get("owned", "COLD").await, "locked");
    assert_unavailable(&batch(&app, "owned", &["COLD"]).await, "locked");
    assert_eq!(app.put("owned", "K", "w").await.status, 503);
    assert!(counts(&app, "secretier_database_calls_total", &["call=\"find\"", "outcome=\"unavailable\""]).await);
    drop(other);
    assert_eq!(until_served(&app, "owned", "COLD", "locked").await.value(), "COLD");
    eventually(async || app.put("owned", "K", "w").await.status == 200).await;
    assert_eq!(until_served(&app, "owned", "K", "locked").await.value(), "w");
    until_ready(&app, "ready", "up").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_that_someone_else_writes_for_long_holds_up_no_lookup() {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Hybrid);
    setup.database_timeout = "1s";
    let app = setup.with("[[rules]]\ntenants = \"owned\"\nphase = \"database\"\n").start().await;
    for key in ["A", "B", "C"] {
        eventually(async || app.put("owned", key, key).await.status < 300).await;
    }
    for tenant in ["acme", "globex", "initech"] {
        app.holds(tenant, &[("K", tenant)]);
    }
    assert_eq!(app.get("acme", "K").await.value(), "acme");
    let url = app.setup.backend.url();
    let mut other = SqliteConnection::establish(url.trim_start_matches("sqlite:")).unwrap();
    other.batch_execute("PRAGMA busy_timeout = 5000; BEGIN EXCLUSIVE").unwrap();
    for cold in ["A", "B", "C"] {
        assert_unrecorded(&app.put("owned", "NEW", "n").await, "locked");
        assert_eq!(at_once(&app, "owned", cold, "locked").await, (cold.into(), "database".into()));
        let told = app.ready().await.json();
        assert_eq!(
            (&told["status"], &told["tiers"]["database"]["state"]),
            (&"degraded".into(), &"up".into()),
            "{told}"
        );
        assert_eq!(at_once(&app, "globex", "K", "locked").await.0, "globex");
        app.advance(6 * MINUTE);
        assert_eq!(at_once(&app, "acme", "K", "locked").await.0, "acme");
    }
    assert_unrecorded(&app.put("acme", "K", "w").await, "locked");
    assert_eq!(app.world().value(ENV, "/tenants/acme", "K").as_deref(), Some("acme"));
    other.batch_execute("ROLLBACK").unwrap();
    until_ready(&app, "ready", "up").await;
    let written = async { while app.put("acme", "K", "w").await.status != 200 {} };
    within("writes go on", written).await;
    assert_eq!(app.get("acme", "K").await.value(), "w");
    assert_eq!(app.get("initech", "K").await.value(), "initech");
    let rows = "SELECT count(*) FROM companies WHERE subdomain = 'initech'";
    let written = async { while app.setup.backend.number(rows).await != 1 {} };
    within("write-back resumes", written).await;
}
