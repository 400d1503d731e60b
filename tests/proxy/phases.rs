//! Who owns a secret, and so which tiers take part: phases, tenants' own ones, rules.

use std::time::Duration;

use reqwest::Method;
use secretier::{phase::Phase, tiers::upstream::standin::Calls};

use crate::app::{ENV, FORGETFUL, Setup, on_both};

#[tokio::test(flavor = "multi_thread")]
async fn in_phase_infisical_no_row_is_ever_written_to_company_secrets() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Infisical).start().await;
        app.holds("acme", &[("A", "1"), ("B", "2")]);
        for _ in 0..2 {
            assert_eq!(app.get("acme", "A").await.value(), "1");
            assert_eq!(app.get("acme", "NONE").await.status, 404);
            assert_eq!(app.put("acme", "C", "3").await.status, 201);
            assert_eq!(app.ask_tenant("acme", "/secrets?values=true").await.json()["keys"][2]["value"], "3");
            assert_eq!(app.refresh("acme").await.status, 200);
            assert_eq!(app.get_fresh("acme", "C").await.value(), "3");
            assert_eq!(app.delete("acme", "C").await.status, 204);
            app.restart().await;
        }
        assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}company_secrets").await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_phase_hybrid_a_snapshot_leaves_a_copy_of_each_secret_and_writes_go_to_infisical() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "1"), ("B", "2")]);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        app.stored(2).await;
        assert_eq!(app.put("acme", "A", "one").await.status, 200);
        assert_eq!(app.world().value(ENV, "/tenants/acme", "A").as_deref(), Some("one"));
        assert_eq!(app.delete("acme", "B").await.status, 204);
        assert_eq!(app.world().value(ENV, "/tenants/acme", "B"), None);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_phase_database_upstream_is_never_called_and_writes_stay_in_the_database() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Database).start().await;
        app.holds("acme", &[("UPSTREAM_ONLY", "x")]);
        app.world().mark();
        assert_eq!(app.get("acme", "UPSTREAM_ONLY").await.problem(), (404, "secret_not_found".to_owned()));
        assert_eq!(app.put("acme", "A", "1").await.status, 201);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        app.advance(Duration::from_hours(72));
        app.restart().await;
        assert_eq!(app.get("acme", "A").await.tier(), "database");
        assert_eq!(app.get_fresh("acme", "A").await.tier(), "database");
        for below in ["", "/secrets", "/secrets?values=true", "/secrets/A/explain"] {
            assert_eq!(app.ask_tenant("acme", below).await.status, 200, "{below}");
        }
        assert_eq!(app.ask(Method::GET, "/v1/tenants").await.json()["tenants"][0]["keys"], 1);
        assert_eq!(app.refresh("acme").await.problem(), (409, "not_owned_upstream".to_owned()));
        assert_eq!(app.delete("acme", "A").await.status, 204);
        assert_eq!(app.get("acme", "A").await.status, 404);
        assert_eq!(app.world().calls_since_mark(), Calls::default());
        assert_eq!(app.world().secrets(ENV, "/tenants/acme").len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_own_phase_wins_over_rule_and_default() {
    on_both(async |backend| {
        let rule = "[[rules]]\ntenants = \"acme\"\nphase = \"infisical\"\n";
        let app = Setup::new(backend, Phase::Hybrid).with(rule).start().await;
        app.holds("acme", &[("A", "upstream")]);
        let chosen = async || {
            let told = app.explain("acme", "A").await;
            (told["phase"].as_str().unwrap().to_owned(), told["phase_chosen_by"].as_str().unwrap().to_owned())
        };
        assert_eq!(chosen().await, ("infisical".to_owned(), "rule".to_owned()));

        app.set_phase("acme", Some(Phase::Database)).await;
        assert_eq!(chosen().await, ("database".to_owned(), "tenant".to_owned()));
        assert_eq!(app.put("acme", "A", "own").await.status, 201);
        assert_eq!(app.get("acme", "A").await.value(), "own");
        assert_eq!(app.world().value(ENV, "/tenants/acme", "A").as_deref(), Some("upstream"));
        assert_eq!(app.ask_tenant("acme", "").await.json()["phase"], "database");

        app.set_phase("acme", None).await;
        assert_eq!(chosen().await.1, "rule");
        assert_eq!(app.get_fresh("acme", "A").await.value(), "upstream");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_a_rule_leaves_to_infisical_is_never_written_to_the_database() {
    on_both(async |backend| {
        let rule = "[[rules]]\nkeys = \"WEBHOOK_*\"\nphase = \"infisical\"\n";
        let mut app = Setup::new(backend, Phase::Hybrid).with(rule).start().await;
        app.holds("acme", &[("WEBHOOK_A", "w"), ("B", "b")]);
        assert_eq!(app.get("acme", "B").await.value(), "b");
        assert_eq!(app.get("acme", "WEBHOOK_A").await.value(), "w");
        assert_eq!(app.put("acme", "WEBHOOK_A", "w2").await.status, 200);
        assert_eq!(app.get("acme", "WEBHOOK_A").await.value(), "w2");
        app.refresh("acme").await;
        app.stored(1).await;
        assert_eq!(app.ask_tenant("acme", "/secrets?values=true").await.json()["keys"][1]["value"], "w2");
        let sql = "SELECT count(*) FROM {}company_secrets WHERE secret_key = 'WEBHOOK_A'";
        assert_eq!(app.setup.backend.number(sql).await, 0);

        app.restart().await;
        assert_eq!(app.get("acme", "B").await.tier(), "database");
        assert_eq!(app.get("acme", "WEBHOOK_A").await.tier(), "infisical");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_a_rule_gives_to_the_database_is_never_overwritten_by_a_snapshot() {
    on_both(async |backend| {
        let rule = "[[rules]]\nkeys = \"OWN_*\"\nphase = \"database\"\n";
        let mut app = Setup::new(backend, Phase::Hybrid).with(rule).start().await;
        app.holds("acme", &[("OWN_A", "upstream"), ("B", "b")]);
        assert_eq!(app.put("acme", "OWN_A", "own").await.status, 201);
        assert_eq!(app.put("acme", "OWN_B", "own too").await.status, 201);
        for _ in 0..2 {
            assert_eq!(app.get("acme", "B").await.value(), "b");
            assert_eq!(app.refresh("acme").await.status, 200);
            assert_eq!(app.get("acme", "OWN_A").await.value(), "own");
            assert_eq!(app.get_fresh("acme", "OWN_B").await.value(), "own too");
            let listed = app.ask_tenant("acme", "/secrets?values=true").await.json();
            let values: Vec<_> = listed["keys"].as_array().unwrap().iter().map(|key| &key["value"]).collect();
            assert_eq!(values, ["b", "own", "own too"]);
            app.restart().await;
        }
        assert_eq!(app.world().value(ENV, "/tenants/acme", "OWN_A").as_deref(), Some("upstream"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_sets_how_old_a_keys_copies_may_grow_in_lookups_and_lists() {
    on_both(async |backend| {
        let rule = "[[rules]]\nkeys = \"WEBHOOK_*\"\nttl = \"10s\"\nrefresh_after = \"10s\"\nmax_stale = \"20s\"\n";
        let mut app = Setup::new(backend, Phase::Hybrid).with(rule).start().await;
        app.holds("acme", &[("WEBHOOK_A", "w"), ("B", "b")]);
        assert_eq!(app.get("acme", "WEBHOOK_A").await.value(), "w");
        app.stored(2).await;

        app.infisical.stop().await;
        app.advance(Duration::from_secs(15));
        assert_eq!(app.get("acme", "WEBHOOK_A").await.value(), "w");
        app.advance(Duration::from_secs(6));
        assert_eq!(app.get("acme", "WEBHOOK_A").await.problem(), (503, "unavailable".to_owned()));
        assert_eq!(app.get("acme", "B").await.value(), "b", "the others may grow older");
        assert_eq!(app.ask_tenant("acme", "/secrets?values=true").await.status, 503, "a list shows nothing too old");
        assert_eq!(app.explain("acme", "WEBHOOK_A").await["rule"], 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_rule_that_matches_counts() {
    let rules = "[[rules]]\ntenants = \"acme\"\nkeys = \"A*\"\nttl = \"10s\"\n\
                 [[rules]]\ntenants = \"ac*\"\nttl = \"1h\"\n";
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Infisical).with(FORGETFUL).with(rules).start().await;
        app.holds("acme", &[("A", "a"), ("B", "b")]);
        for (key, rule) in [("A", 1), ("B", 2)] {
            assert_eq!(app.explain("acme", key).await["rule"], rule);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_changes_hands_is_followed_without_a_read_of_all_who_ever_did() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        let beside = app.another().await;
        for phase in [Some(Phase::Database), None, Some(Phase::Infisical), Some(Phase::Database)] {
            app.set_phase("acme", phase).await;
            app.followed().await;
        }
        app.holds("acme", &[("K", "upstream")]);
        assert_eq!(app.get_from(&beside, "acme", "K").await.status, 404, "the database owns it");
        let reads = "secretier_database_calls_total{call=\"own_phases\",outcome=\"ok\"} ";
        let page = beside.service.metrics.render();
        let count = page.lines().find_map(|line| line.strip_prefix(reads)).expect("the start reads them");
        assert_eq!(count, "1");
    })
    .await;
}
