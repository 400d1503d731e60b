//! Changes in Infisical that nobody tells of, among many tenants, found by asking.

use futures_util::StreamExt as _;
use secretier::phase::Phase;

use crate::{
    app::{Backend, ENV, Setup, TestApp, eventually},
    quick::times,
    webhooks::{MINUTE, metric},
};

/// Tenants `t0` to this one, each with two secrets, all of them held by the instance.
async fn holds_many(app: &TestApp, many: usize) {
    for number in 0..many {
        app.holds(&format!("t{number}"), &[("A", "old"), ("B", "stays")]);
    }
    // What was made a moment before it was read is read again: the clocks may differ by that much.
    app.advance(MINUTE);
    futures_util::stream::iter(0..many)
        .for_each_concurrent(32, async |number| {
            assert_eq!(app.get(&format!("t{number}"), "A").await.value(), "old");
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_changes_among_many_tenants_are_seen_within_two_polls_on_either_kind_of_server() {
    for tells in [true, false] {
        let many = times(1000, 100);
        let mut setup = Setup::new(Backend::sqlite(), Phase::Hybrid);
        setup.poll_interval = "1m";
        let mut app = setup.start().await;
        app.world().tells_changes(tells);
        app.world().set_clock(app.instance().clock.clone());
        holds_many(&app, many).await;
        app.setup.requests_per_minute = 100;
        app.restart().await;
        app.world().set_clock(app.instance().clock.clone());
        // The first poll of this instance, which sees what there is.
        app.advance(MINUTE);
        let seen = if tells { "told" } else { "read" };
        let seen = format!("secretier_change_polls_total{{outcome=\"{seen}\"}}");
        eventually(async || metric(app.instance(), &seen).await >= 1.0).await;

        let changed: Vec<String> = (0..20).map(|number| format!("t{}", number * many / 20)).collect();
        for (number, tenant) in changed.iter().enumerate() {
            match number % 4 {
                0 => assert!(app.world().delete(ENV, &format!("/tenants/{tenant}"), "A"), "{tenant}"),
                _ => app.holds(tenant, &[("A", "new")]),
            }
        }
        app.world().mark();
        app.advance(MINUTE);
        eventually(async || metric(app.instance(), &seen).await >= 2.0).await;
        app.advance(MINUTE);
        for (number, tenant) in changed.iter().enumerate() {
            let expected = if number % 4 == 0 { (404, None) } else { (200, Some("new".to_owned())) };
            eventually(async || {
                let answer = app.get(tenant, "A").await;
                (answer.status, (answer.status == 200).then(|| answer.value())) == expected
            })
            .await;
        }
        let calls = app.world().calls_since_mark().total();
        assert!(calls <= 60, "{calls} calls for twenty changes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_all_folders_are_too_long_for_one_answer_they_are_compared_in_turn() {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Hybrid);
    (setup.poll_interval, setup.infisical) = ("1m", "max_response = \"64KiB\"".to_owned());
    let app = setup.start().await;
    app.world().set_clock(app.instance().clock.clone());
    let long = "v".repeat(20_000);
    for number in 0..5 {
        app.holds(&format!("t{number}"), &[("A", "old"), ("LONG", &long)]);
    }
    for number in 0..5 {
        assert_eq!(app.get(&format!("t{number}"), "A").await.value(), "old");
    }
    app.holds("t3", &[("A", "new")]);
    app.advance(MINUTE);
    eventually(async || app.get("t3", "A").await.value() == "new").await;
    let compared = "secretier_change_polls_total{outcome=\"compared\"}";
    eventually(async || metric(app.instance(), compared).await >= 1.0).await;
    // It is not tried again at once.
    app.world().mark();
    app.advance(MINUTE);
    eventually(async || metric(app.instance(), compared).await >= 2.0).await;
    assert!(app.world().calls_since_mark().list <= 5, "{:?}", app.world().calls_since_mark());
}
