//! What the upstream budget is spent on: calls in scenes that are always the same, as the
//! stand-in counts them.

use std::time::Duration;

use serde_json::Value;

use crate::{
    client::{Client, ask_all},
    fill::Shape,
    stage::Place,
    table::{Line, Samples, Table, Target},
    upstream::Upstream,
};

const SHAPE: Shape<'static> = Shape { prefix: "t", tenants: 20, keys: 5, value: 100 };
const AT_ONCE: usize = 50;

pub(crate) fn calls(table: &mut Table) {
    let mut upstream = Upstream::start(SHAPE);
    let place = Place::before(&upstream, "hybrid");
    let short = [("SECRETIER_MEMORY__TTL", "1s"), ("SECRETIER_DATABASE__REFRESH_AFTER", "1s")];
    let mut add = |what: &str, most: f64, calls: &Value| {
        let kinds =
            format!("{} logins, {} lists of tenants, {} folders", calls["login"], calls["folders"], calls["list"]);
        let total = Samples::one(calls["total"].as_f64().unwrap());
        table.add(Line::new("calls", format!("{what} ({kinds})"), "calls", total).target(Target::AtMost(most)));
    };

    let server = place.serve(&short);
    let storm: Vec<String> = (0..AT_ONCE).map(|caller| SHAPE.path(0, caller % SHAPE.keys)).collect();
    settled(&mut upstream);
    ask_all(&server.url, &place.token, &storm, AT_ONCE);
    add("50 at once miss one tenant, the first that are asked for", 3.0, &settled(&mut upstream));

    // Memory's copy, and the database's, have outlived their ages when this is over.
    std::thread::sleep(Duration::from_millis(1200));
    ask_all(&server.url, &place.token, &storm, AT_ONCE);
    add("50 at once ask for one tenant that is past its ages", 1.0, &settled(&mut upstream));
    server.end();

    let server = place.serve(&[]);
    let made_up: Vec<String> = (0..10_000).map(|number| format!("/v1/tenants/made-up-{number}/secrets/KEY")).collect();
    ask_all(&server.url, &place.token, &made_up, 16);
    add("10,000 tenants that do not exist", 2.0, &settled(&mut upstream));

    let all: Vec<String> = (0..SHAPE.tenants).map(|tenant| SHAPE.path(tenant, 0)).collect();
    ask_all(&server.url, &place.token, &all, 4);
    let filled = settled(&mut upstream);
    // One of them is known from the storms.
    add("20 tenants, 19 of them for the first time", 19.0, &filled);
    server.end();

    let server = place.serve(&[("SECRETIER_MEMORY__WARM_TENANTS", "0")]);
    ask_all(&server.url, &place.token, &all, 4);
    let answer = Client::connect(&server.url, &place.token).get(&all[0]);
    assert_eq!(answer.status, 200, "{}", answer.head);
    add("the same 20 after a start with an empty memory", 0.0, &settled(&mut upstream));
}

/// The calls since this was last asked, once there come no more.
fn settled(upstream: &mut Upstream) -> Value {
    let mut all = [0_u64; 4];
    loop {
        let calls = upstream.calls();
        let kinds = ["login", "folders", "list", "total"];
        for (sum, kind) in all.iter_mut().zip(kinds) {
            *sum += calls[kind].as_u64().unwrap();
        }
        if calls["total"] == 0 {
            return kinds.into_iter().zip(all).map(|(kind, sum)| (kind.to_owned(), Value::from(sum))).collect();
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}
