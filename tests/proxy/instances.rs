//! The register of running instances, as instances keep it.

use std::time::Duration;

use reqwest::Method;
use secretier::{access::Action, phase::Phase, tiers::database::Instance};

use crate::app::{Answer, Setup, TestApp, eventually, on_both};

async fn live(app: &TestApp) -> Vec<Instance> {
    app.instance().service.resolver.database().live_instances().await.unwrap()
}

/// Lets so much time pass that the instance announces itself again, and waits until it has.
async fn announced_anew(app: &TestApp) {
    let before = live(app).await.remove(0).seen_at;
    app.advance(Duration::from_secs(6));
    eventually(async || live(app).await.iter().any(|instance| instance.seen_at > before)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_in_the_register_before_it_serves_and_no_more_once_it_has_stopped() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        let [one] = &live(&app).await[..] else { panic!("one instance runs") };
        assert!(one.name.ends_with(&format!("/{}", std::process::id())), "{}", one.name);
        assert_eq!(one.master_keys, app.instance().service.resolver.database().keys().ring().ids().collect::<Vec<_>>());
        assert_eq!(one.master_keys.len(), 1);

        let beside = app.another().await;
        let both = live(&app).await;
        assert!(both.len() == 2 && both[0].id != both[1].id);
        beside.stop().await;
        assert_eq!(live(&app).await.iter().map(|instance| &instance.id).collect::<Vec<_>>(), [&one.id]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_runs_stays_live_and_one_that_was_killed_does_not() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        let stays = live(&app).await.remove(0);
        let beside = app.another().await;
        beside.kill().await;
        assert_eq!(live(&app).await.len(), 2, "nobody has seen its end");
        let others = format!("UPDATE instances SET seen_at = seen_at - 16000 WHERE id <> '{}'", stays.id);
        app.setup.backend.sql(&others).await;
        eventually(async || live(&app).await.len() == 1).await;
        // Time and again.
        for _ in 0..3 {
            announced_anew(&app).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_announces_a_change_once_it_is_in_force() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        let beside = app.another().await;
        let database = &app.instance().service.resolver.database();
        let following = async |change| {
            let following = database.await_instances(Duration::from_secs(60), |one| one.changes >= change).await;
            assert_eq!(following.unwrap().done.len(), 2);
        };
        let token = app.new_token("short-lived", &["*"], &[Action::Read]).await;
        following(database.changes().await.unwrap()).await;
        let ask = async || Answer::of(beside.request(Method::GET, "/v1/tenants/acme").bearer_auth(&token)).await.status;
        assert_eq!(ask().await, 404, "it is let in");
        assert_eq!(database.revoke_token("short-lived").await.unwrap(), 1);
        following(database.changes().await.unwrap()).await;
        assert_eq!(ask().await, 401);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_cannot_be_brought_into_force_is_not_announced() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        let database = &app.instance().service.resolver.database();
        app.followed().await;
        let before = live(&app).await[0].changes;
        app.setup.backend.sql("ALTER TABLE access_tokens RENAME TO hidden").await;
        let change = database.changes().await.unwrap() + 1;
        app.setup
            .backend
            .sql(&format!(
                "UPDATE counters SET value = {change} WHERE name = 'changes';
                 INSERT INTO changes (number, what, made_by) VALUES ({change}, 'tokens', '')"
            ))
            .await;
        // It looks, fails, and says all the same that it runs.
        announced_anew(&app).await;
        assert_eq!(live(&app).await[0].changes, before);

        app.setup.backend.sql("ALTER TABLE hidden RENAME TO access_tokens").await;
        eventually(async || live(&app).await[0].changes == change).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_cannot_announce_itself_serves_all_the_same() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Database).start().await;
        assert_eq!(app.put("acme", "K", "v").await.status, 201);
        app.setup.backend.sql("ALTER TABLE instances RENAME TO hidden").await;
        app.advance(Duration::from_secs(6));
        // It starts and stops without the register, too.
        app.restart().await;
        assert_eq!(app.get("acme", "K").await.value(), "v");
        app.setup.backend.sql("ALTER TABLE hidden RENAME TO instances").await;
        eventually(async || !live(&app).await.is_empty()).await;
    })
    .await;
}
