//! The lookup on its good days: which tier answers, and what it costs upstream.

use futures_util::future::join_all;
use secretier::phase::Phase;

use crate::app::{Setup, on_both};

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_comes_from_infisical_then_from_memory_then_after_a_restart_from_the_database() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("STRIPE_KEY", "sk_1"), ("OTHER", "o")]);

        let first = app.get("acme", "STRIPE_KEY").await;
        assert_eq!((first.value().as_str(), first.tier()), ("sk_1", "infisical"));
        let second = app.get("acme", "STRIPE_KEY").await;
        assert_eq!((second.value().as_str(), second.tier()), ("sk_1", "memory"));
        assert_eq!(app.get("acme", "OTHER").await.tier(), "memory", "one snapshot brings every key");

        app.infisical.stop().await;
        app.restart().await;
        let third = app.get("acme", "STRIPE_KEY").await;
        assert_eq!((third.value().as_str(), third.tier()), ("sk_1", "database"));
        assert_eq!(first.text, third.text, "the body depends on the secret and its version alone");
        assert_eq!(first.header("etag"), third.header("etag"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_storm_costs_one_login_one_folder_list_and_one_snapshot() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        let keys: Vec<String> = (0..20).map(|number| format!("KEY_{number}")).collect();
        let secrets: Vec<(&str, &str)> = keys.iter().map(|key| (key.as_str(), key.as_str())).collect();
        app.holds("acme", &secrets);

        let answers = join_all((0..200).map(|caller| app.get("acme", &keys[caller % keys.len()]))).await;
        for (caller, answer) in answers.iter().enumerate() {
            assert_eq!(answer.value(), keys[caller % keys.len()]);
        }
        let calls = app.world().calls();
        assert_eq!((calls.login, calls.folders, calls.list, calls.get), (1, 1, 1, 0), "{calls:?}");
    })
    .await;
}
