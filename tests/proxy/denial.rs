//! A folder that Infisical refuses to us after a good login: an answer, not an outage.

use std::time::Duration;

use secretier::{
    phase::Phase,
    tiers::upstream::standin::{Readable, Rights},
};

use crate::app::{Backend, ENV, Setup, TestApp, on_both};

/// Two tenants that were read, of which `acme` is refused from now on.
async fn denied(backend: Backend, phase: Phase) -> TestApp {
    let app = Setup::new(backend, phase).start().await;
    for tenant in ["acme", "globex"] {
        app.holds(tenant, &[("A", tenant)]);
    }
    for tenant in ["acme", "globex"] {
        assert_eq!(app.get(tenant, "A").await.value(), tenant);
    }
    if phase == Phase::Hybrid {
        app.stored(2).await;
    }
    app.world().set_rights(&app.identity, Rights::Read(vec![Readable::new(ENV, "/tenants/globex")]));
    app
}

async fn is_denied(app: &TestApp) {
    for answer in [
        app.get("acme", "A").await,
        app.get_fresh("acme", "A").await,
        app.ask_tenant("acme", "/secrets?values=true").await,
    ] {
        assert_eq!(answer.problem(), (503, "upstream_denied".to_owned()));
        assert_ne!(answer.header("retry-after"), "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_folder_is_no_longer_served_once_it_was_read_and_nothing_is_deleted() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = denied(backend, phase).await;
            assert_eq!(app.get_fresh("acme", "A").await.problem(), (503, "upstream_denied".to_owned()));
            is_denied(&app).await;
            assert_eq!(app.get_fresh("globex", "A").await.value(), "globex", "the others are served");
            assert_eq!(app.rows().await, if phase == Phase::Hybrid { 2 } else { 0 });
            assert_eq!(app.explain("acme", "A").await["memory"]["state"], "denied");
            assert_eq!(app.put("acme", "A", "b").await.problem(), (503, "upstream_denied".to_owned()));
            let ready = app.ready().await;
            assert_eq!((ready.status, &ready.json()["status"]), (200, &"ready".into()), "an answer, and no outage");
            assert!(app.metrics().await.contains("outcome=\"denied\""));

            app.world().set_rights(&app.identity, Rights::Full);
            app.advance(Duration::from_secs(31));
            let restored = app.get("acme", "A").await;
            assert_eq!((restored.value().as_str(), restored.tier()), ("acme", "infisical"));
            assert_eq!(app.get("acme", "A").await.tier(), "memory");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_restart_nor_an_outage_brings_back_what_a_denial_took_away() {
    on_both(async |backend| {
        let mut app = denied(backend, Phase::Hybrid).await;
        assert_eq!(app.refresh("acme").await.problem(), (503, "upstream_denied".to_owned()));
        app.infisical.stop().await;
        for _ in 0..2 {
            app.advance(Duration::from_secs(61));
            assert_eq!(app.get("acme", "A").await.problem(), (503, "upstream_denied".to_owned()));
            assert_eq!(app.ask_tenant("acme", "/secrets?values=true").await.status, 503);
            assert_eq!(app.get("globex", "A").await.value(), "globex");
            app.restart().await;
        }
        app.infisical.restart().await.unwrap();
        app.advance(Duration::from_secs(61));
        is_denied(&app).await;

        app.world().set_rights(&app.identity, Rights::Full);
        app.advance(Duration::from_secs(61));
        assert_eq!(app.get("acme", "A").await.value(), "acme");
        app.infisical.stop().await;
        app.restart().await;
        assert_eq!(app.get("acme", "A").await.tier(), "database", "the good read has lifted it for good");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_empty_folder_is_not_an_empty_list() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Infisical).start().await;
        app.holds("acme", &[]);
        assert_eq!(app.ask_tenant("acme", "/secrets").await.status, 200);
        app.world().set_rights(&app.identity, Rights::NoAccess);
        assert_eq!(app.refresh("acme").await.problem(), (503, "upstream_denied".to_owned()));
        assert_eq!(app.ask_tenant("acme", "/secrets").await.problem(), (503, "upstream_denied".to_owned()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_folder_is_asked_for_again_only_after_a_pause() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = denied(backend, phase).await;
            assert_eq!(app.get_fresh("acme", "A").await.problem(), (503, "upstream_denied".to_owned()));
            for asked in [0, 1] {
                app.world().mark();
                app.advance(Duration::from_secs(31 * asked));
                for _ in 0..5 {
                    assert_eq!(app.get("acme", "A").await.problem(), (503, "upstream_denied".to_owned()));
                }
                assert_eq!(app.world().calls_since_mark().list, asked);
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_tenant_is_said_to_be_asked_again_when_it_is() {
    let app = denied(Backend::sqlite(), Phase::Infisical).await;
    assert_eq!(app.get_fresh("acme", "A").await.problem(), (503, "upstream_denied".to_owned()));
    let wait = async || app.get("acme", "A").await.header("retry-after").parse::<u64>().unwrap();
    let first = wait().await;
    assert!((2..=30).contains(&first), "memory.negative_ttl is 30 s: {first}");
    app.advance(Duration::from_secs(20));
    let later = wait().await;
    assert!((1..=10).contains(&later), "{later}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_the_identity_may_not_do_asks_for_edit_access_and_reads_go_on() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        let app = Setup::new(Backend::sqlite(), phase).start().await;
        app.holds("acme", &[("A", "acme")]);
        app.world().set_rights(&app.identity, Rights::Read(vec![Readable::new(ENV, "/tenants/acme")]));
        assert_eq!(app.get("acme", "A").await.value(), "acme");
        for answer in [app.put("acme", "A", "b").await, app.put("acme", "NEW", "b").await] {
            assert_eq!(answer.problem(), (503, "upstream_denied".to_owned()));
            let detail = answer.json()["detail"].as_str().unwrap().to_owned();
            assert!(detail.contains("edit access") && !detail.contains("read access"), "{detail}");
            assert_eq!(answer.header("retry-after"), "30");
        }
        assert_eq!(app.get("acme", "A").await.value(), "acme");
        assert_eq!(app.get_fresh("acme", "A").await.value(), "acme");
    }
}
