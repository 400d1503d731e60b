//! Folders of the application's own: served like tenants', to tokens of their own scope, and never with a
//! master key in them.

use reqwest::{Method, header};
use secretier::{
    access::Action,
    phase::Phase,
    tiers::upstream::standin::{Fault, Readable, Rights},
};
use serde_json::{Value, json};

use crate::{
    app::{
        Answer, Backend, ENV, Instance, Setup, TestApp, eventually, on_both, on_both_and_before_october, resource,
        secret,
    },
    infisical_api::{Answer as Face, Client, ON},
    webhooks::{MINUTE, metric},
};

/// The setting of one shared folder.
pub(crate) const SHARED: &str = "folders = [{ name = \"hono-api\", path = \"/hono-api\" }]";

const FOLDER: &str = "/hono-api";

fn setup(backend: Backend, phase: Phase) -> Setup {
    let mut setup = Setup::new(backend, phase);
    setup.infisical = SHARED.to_owned();
    setup
}

async fn ask(app: &TestApp, token: &str, method: Method, path: &str, body: Value) -> Answer {
    Answer::of(app.instance().request(method, path).bearer_auth(token).json(&body)).await
}

/// How often it was found out which folders have changed, in whichever way.
async fn polls(instance: &Instance) -> f64 {
    let of = |outcome: &str| format!("secretier_change_polls_total{{outcome=\"{outcome}\"}}");
    metric(instance, &of("told")).await + metric(instance, &of("read")).await
}

fn keys(answer: &Answer) -> Vec<String> {
    let body = answer.json();
    body["keys"].as_array().unwrap().iter().map(|one| one["key"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_folder_has_the_requests_of_a_tenant_in_every_phase() {
    for phase in Phase::ALL {
        on_both(async |backend| {
            let app = setup(backend, phase).start().await;
            if phase.owned_upstream() {
                app.holds(FOLDER, &[("A", "one")]);
            } else {
                assert_eq!(app.put(FOLDER, "A", "one").await.status, 201);
            }
            let first = app.get(FOLDER, "A").await;
            assert_eq!((first.value(), &first.json()["tenant"]), ("one".to_owned(), &json!(FOLDER)));
            assert_eq!(app.get(FOLDER, "A").await.tier(), "memory");
            assert_eq!(app.get(FOLDER, "NONE").await.status, 404);
            assert_eq!(app.get("hono-api", "A").await.status, 404, "a tenant of that name is another");

            // A conditional write, which another instance then serves.
            let other = app.another().await;
            let change = |etag: String| {
                app.request(Method::PUT, &secret(FOLDER, "A"))
                    .header(header::IF_MATCH, etag)
                    .json(&json!({"value": "two"}))
            };
            let first = app.get_fresh(FOLDER, "A").await;
            assert_eq!(Answer::of(change(first.etag().to_owned())).await.status, 200);
            assert_eq!(Answer::of(change(first.etag().to_owned())).await.status, 409);
            app.followed().await;
            assert_eq!(app.get_from(&other, FOLDER, "A").await.value(), "two");
            other.stop().await;

            assert_eq!(app.put(FOLDER, "B", "beside").await.status, 201);
            assert_eq!(keys(&app.ask_tenant(FOLDER, "/secrets").await), ["A", "B"]);
            assert_eq!(app.ask_tenant(FOLDER, "/secrets?format=map").await.json(), json!({"A": "two", "B": "beside"}));
            let batch = format!("{}/secrets/batch-get", resource(FOLDER));
            let batch = ask(&app, &app.token, Method::POST, &batch, json!({"keys": ["A", "NONE"]})).await.json();
            assert_eq!((&batch["secrets"][0]["value"], &batch["missing"]), (&json!("two"), &json!(["NONE"])));

            let versions = app.ask_tenant(FOLDER, "/secrets/A/versions").await.json();
            let versions = versions["versions"].as_array().unwrap().clone();
            if phase.reads_database() {
                let oldest = versions.last().unwrap()["version"].as_i64().unwrap();
                let rollback = format!("{}/rollback", secret(FOLDER, "A"));
                let back = ask(&app, &app.token, Method::POST, &rollback, json!({"version": oldest})).await;
                assert_eq!(back.status, 200, "{back:?}");
                assert_eq!(app.get(FOLDER, "A").await.value(), "one");
            }
            let refreshed = app.refresh(FOLDER).await;
            assert_eq!(refreshed.status, if phase.owned_upstream() { 200 } else { 409 });
            assert_eq!(app.explain(FOLDER, "A").await["phase"], phase.to_string());
            let listed = app.ask(Method::GET, "/v1/folders").await.json();
            assert_eq!(listed["folders"][0]["tenant"], FOLDER);
            assert_eq!(app.ask_tenant(FOLDER, "").await.json()["phase"], phase.to_string());
            assert_eq!(app.ask(Method::GET, "/v1/tenants").await.json(), json!({"tenants": []}));

            assert_eq!(app.delete(FOLDER, "A").await.status, 204);
            assert_eq!(app.get(FOLDER, "A").await.status, 404);
            let upstream = if phase.owned_upstream() { vec![("B".to_owned(), "beside".to_owned())] } else { vec![] };
            assert_eq!(app.world().secrets(ENV, FOLDER), upstream);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_pattern_for_tenants_reaches_a_shared_folder_nor_one_for_folders_a_tenant() {
    let app = setup(Backend::sqlite(), Phase::Hybrid).with(ON).start().await;
    app.holds(FOLDER, &[("A", "of the folder")]);
    app.holds("hono-api", &[("A", "of the tenant")]);
    let every = app.new_token("tenants", &["*", "hono-api", "?hono-api", "[/]hono-api"], &Action::ALL).await;
    let folder = app.new_token("folder", &[FOLDER], &Action::ALL).await;
    for (token, reached, other) in [(&every, "hono-api", FOLDER), (&folder, FOLDER, "hono-api")] {
        assert_eq!(ask(&app, token, Method::GET, &secret(reached, "A"), json!(null)).await.status, 200);
        let of = |below: &str| format!("{}{below}", resource(other));
        for (method, path) in [
            (Method::GET, secret(other, "A")),
            (Method::PUT, secret(other, "A")),
            (Method::DELETE, secret(other, "A")),
            (Method::GET, of("/secrets")),
            (Method::GET, of("/secrets?format=map")),
            (Method::POST, of("/secrets/batch-get")),
            (Method::GET, of("/secrets/A/explain")),
            (Method::GET, of("/secrets/A/versions")),
            (Method::POST, of("/secrets/A/rollback")),
            (Method::POST, of("/refresh")),
            (Method::GET, of("")),
            (Method::GET, format!("/v1/events?tenants={}", other.replace('/', "%2F"))),
            (Method::GET, format!("/v1/audit?tenant={}", other.replace('/', "%2F"))),
        ] {
            let body = json!({"value": "x", "keys": ["A"], "version": 1});
            let body =
                if method == Method::POST && path.ends_with("batch-get") { json!({"keys": ["A"]}) } else { body };
            let answer = ask(&app, token, method.clone(), &path, body).await;
            assert!(answer.status == 403 || answer.status == 400, "{method} {path}: {answer:?}");
            assert!(!answer.text.contains("of the"), "{answer:?}");
        }
    }
    // A slash that is escaped makes no folder of a tenant, nor the other way round.
    for path in ["/v1/tenants/%2Fhono-api/secrets/A", "/v1/folders/%2Fhono-api/secrets/A", "/v1/folders//secrets/A"] {
        let answer = app.ask(Method::GET, path).await;
        assert_eq!(answer.problem(), (400, "invalid_tenant".to_owned()), "{path}");
    }
    // Who may search the audit of all tenants is not told of the folder's secrets.
    eventually(async || {
        let records = ask(&app, &folder, Method::GET, "/v1/audit?tenant=%2Fhono-api", json!(null)).await;
        records.status == 200 && records.text.contains("\"read\"")
    })
    .await;
    let of_all = ask(&app, &every, Method::GET, "/v1/audit?limit=1000", json!(null)).await;
    assert!(of_all.status == 200 && of_all.text.contains("\"hono-api\""), "{of_all:?}");
    assert!(!of_all.text.contains("\"/hono-api\""), "{of_all:?}");

    let list = async |token: &str, path: &str| ask(&app, token, Method::GET, path, json!(null)).await.json();
    assert_eq!(list(&every, "/v1/folders").await, json!({"folders": []}));
    assert_eq!(list(&folder, "/v1/tenants").await, json!({"tenants": []}));
    assert_eq!(list(&folder, "/v1/folders").await["folders"][0]["tenant"], FOLDER);
    let who = list(&folder, "/v1/whoami").await;
    assert_eq!((&who["tenants"], &who["folders"]), (&json!([]), &json!(["hono-api"])));

    let (of_tenants, of_folder) =
        (Client::new(&app, "c1", &["*"], &Action::ALL).await, Client::new(&app, "c2", &[FOLDER], &Action::ALL).await);
    for (client, reached, refused) in
        [(&of_tenants, "/tenants/hono-api", FOLDER), (&of_folder, FOLDER, "/tenants/hono-api")]
    {
        assert_eq!(client.list(app.instance(), reached, "").await.status, 200);
        assert_eq!(client.list(app.instance(), refused, "").await.error().0, 403);
        assert_eq!(client.get(app.instance(), refused, "A").await.error().0, 403);
    }
    let paths = |answer: &Face| {
        let secrets = answer.json()["secrets"].as_array().unwrap().clone();
        secrets.iter().map(|one| one["secretPath"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    for (client, tenants, root) in
        [(&of_tenants, vec!["/tenants/hono-api"], vec!["/tenants/hono-api"]), (&of_folder, vec![], vec![FOLDER])]
    {
        assert_eq!(paths(&client.list(app.instance(), "/tenants", "&recursive=true").await), tenants);
        assert_eq!(paths(&client.list(app.instance(), "/", "&recursive=true").await), root);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unmodified_client_reads_writes_and_lists_a_shared_folder() {
    let app = setup(Backend::sqlite(), Phase::Hybrid).with(ON).start().await;
    let client = Client::new(&app, "c", &["acme", "/*"], &Action::ALL).await;
    let folders = async |path: &str| {
        let path = format!("/api/v1/folders?environment={ENV}&path={path}");
        let answer = Face::of(client.request(app.instance(), Method::GET, &path)).await;
        let folders = answer.json()["folders"].as_array().unwrap().clone();
        folders.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let change = async |method: Method, route: &str, body: Value| {
        let mut whole = json!({"workspaceId": client.project, "environment": ENV, "path": "/"});
        whole.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        Face::of(client.request(app.instance(), method, &format!("/api/v1/folders{route}")).json(&whole)).await
    };
    assert_eq!(change(Method::POST, "", json!({"name": "hono-api"})).await.status, 200);
    assert!(app.world().secrets(ENV, FOLDER).is_empty());
    assert_eq!(change(Method::POST, "", json!({"name": "other"})).await.error().0, 403);
    assert_eq!(folders("/").await, ["hono-api", "tenants"]);
    assert_eq!(folders(FOLDER).await, [""; 0]);
    let write = |method, value: &str| {
        client.write_to(&app, method, "raw/A", FOLDER, json!({"secretValue": value.to_owned(), "type": "shared"}))
    };
    assert_eq!(write(Method::POST, "one").await.status, 200);
    assert_eq!(app.world().value(ENV, FOLDER, "A").as_deref(), Some("one"));
    let got = client.get(app.instance(), FOLDER, "A").await;
    assert_eq!(got.value(), "one");
    assert_eq!(got.json()["secret"]["secretPath"], FOLDER);
    let id = got.json()["secret"]["id"].as_str().unwrap().to_owned();
    let by_id = format!("/api/v3/secrets/raw/id/{id}");
    assert_eq!(Face::of(client.request(app.instance(), Method::GET, &by_id)).await.value(), "one");
    assert_eq!(change(Method::DELETE, "/hono-api", json!({})).await.error().0, 400, "it has a secret");
    assert_eq!(write(Method::PATCH, "two").await.status, 200);
    assert_eq!(client.list(app.instance(), FOLDER, "").await.values(), [("/hono-api A".to_owned(), "two".to_owned())]);
    assert_eq!(write(Method::DELETE, "").await.status, 200);
    assert_eq!(client.get(app.instance(), FOLDER, "A").await.error().0, 404);
    assert_eq!(change(Method::DELETE, "/hono-api", json!({})).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_in_a_shared_folder_are_found_by_polls_and_told_by_webhooks() {
    for tells in [true, false] {
        let mut setup = setup(Backend::sqlite(), Phase::Hybrid);
        setup.poll_interval = "1m";
        let app = setup.start().await;
        app.world().tells_changes(tells);
        app.world().set_clock(app.instance().clock.clone());
        app.holds(FOLDER, &[("A", "old"), ("B", "stays")]);
        app.holds("acme", &[("A", "1")]);
        app.advance(MINUTE);
        assert_eq!(app.get(FOLDER, "A").await.value(), "old");
        assert_eq!(app.get("acme", "A").await.value(), "1");
        app.stored(3).await;
        let polled = format!("secretier_change_polls_total{{outcome=\"{}\"}}", if tells { "told" } else { "read" });
        for (round, value) in ["new", "newer"].into_iter().enumerate() {
            app.world().put(ENV, FOLDER, "A", value);
            app.advance(MINUTE);
            eventually(async || metric(app.instance(), &polled).await >= 1.0 + round as f64).await;
            eventually(async || app.get(FOLDER, "A").await.value() == value).await;
        }
        // One that is gone is gone here too.
        app.world().delete_folder(ENV, FOLDER);
        app.advance(MINUTE);
        eventually(async || {
            app.advance(MINUTE);
            app.get(FOLDER, "B").await.status == 404
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_folder_is_served_from_its_copy_while_infisical_is_down() {
    on_both(async |backend| {
        let mut app = setup(backend, Phase::Hybrid).start().await;
        app.holds(FOLDER, &[("A", "one")]);
        assert_eq!(app.get(FOLDER, "A").await.value(), "one");
        app.stored(1).await;
        app.world().fault(Fault::Status(500));
        app.restart().await;
        let answer = app.get(FOLDER, "A").await;
        assert_eq!((answer.value(), answer.tier()), ("one".to_owned(), "database"));
        assert_eq!(app.get(FOLDER, "NONE").await.status, 404);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_not_configured_or_not_there_holds_nothing_and_says_why_it_takes_nothing() {
    on_both_and_before_october(async |backend| {
        let app = setup(backend, Phase::Hybrid).start().await;
        app.holds("/other", &[("A", "not for anybody")]);
        assert_eq!(app.get("/other", "A").await.status, 404);
        assert_eq!(app.ask_tenant("/other", "/secrets").await.status, 404);
        let refused = app.put("/other", "A", "x").await;
        assert_eq!(refused.problem(), (404, "tenant_unknown".to_owned()));
        assert!(refused.text.contains("[[infisical.folders]]"), "{refused:?}");
        assert_eq!(app.world().value(ENV, "/other", "A").as_deref(), Some("not for anybody"));
        // One that is configured and not there proves nothing absent by being empty.
        assert_eq!(app.get(FOLDER, "A").await.status, 404);
        assert_eq!(app.put_known(FOLDER, "A", "x").await.status, 404);
        assert_eq!(app.put(FOLDER, "A", "made").await.status, 201);
        assert_eq!(app.world().value(ENV, FOLDER, "A").as_deref(), Some("made"));
        assert_eq!(app.get(FOLDER, "A").await.value(), "made");
        // A folder that an identity may not see beside is believed to be there.
        assert_eq!(app.refresh(FOLDER).await.status, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_the_database_owns_needs_no_upstream_and_no_setting() {
    on_both(async |backend| {
        let mut app = setup(backend, Phase::Hybrid).start().await;
        app.holds(FOLDER, &[("A", "one")]);
        assert_eq!(app.get(FOLDER, "A").await.value(), "one");
        app.stored(1).await;
        app.set_phase(FOLDER, Some(Phase::Database)).await;
        assert_eq!(app.put_known(FOLDER, "A", "two").await.status, 200);
        app.setup.infisical = String::new();
        app.restart().await;
        assert_eq!(app.get(FOLDER, "A").await.value(), "two");
        assert_eq!(app.world().value(ENV, FOLDER, "A").as_deref(), Some("one"));
        app.setup.directory = Some(String::new());
        app.setup.phase = Phase::Database;
        app.restart().await;
        assert_eq!(app.get(FOLDER, "A").await.value(), "two");
        assert_eq!(app.ask(Method::GET, "/v1/folders").await.json()["folders"][0]["tenant"], FOLDER);
    })
    .await;
}

/// The name of the master key that lies in the shared folder.
const KEY: &str = "SECRETIER_KEY";

#[tokio::test(flavor = "multi_thread")]
async fn a_master_key_is_served_by_no_request_in_no_phase_and_never_written() {
    let value = "never-to-be-told";
    for phase in Phase::ALL {
        on_both(async |backend| {
            let mut app = setup(backend, phase).with(ON).start().await;
            let names = [KEY, "SECRETIER_KEY_PREVIOUS", "OTHER_SECRETIER_KEY"];
            if !phase.owned_upstream() {
                // From a time before the configuration named them.
                for name in names {
                    assert_eq!(app.put(FOLDER, name, value).await.status, 201);
                }
            }
            app.setup.keys = format!(", \"infisical:/hono-api/{KEY}\", \"env:OTHER_SECRETIER_KEY\"");
            app.restart().await;
            if phase.owned_upstream() {
                for name in names {
                    app.holds(FOLDER, &[(name, value)]);
                }
                app.holds(FOLDER, &[("A", "one"), ("REFERS", &format!("it is ${{{KEY}}}"))]);
                app.holds("acme", &[("B", "two"), ("REFERS", &format!("it is ${{prod.hono-api.{KEY}}}"))]);
                // The server lists what an imported folder imports as if it were that one's own.
                app.world().folder(ENV, "/common");
                app.world().import(ENV, "/common", ENV, FOLDER);
                app.world().import(ENV, "/tenants/acme", ENV, "/common");
            } else {
                assert_eq!(app.put(FOLDER, "A", "one").await.status, 201);
            }
            for name in names {
                let below = |below: &str| format!("{}{below}", secret(FOLDER, name));
                for (method, path, body) in [
                    (Method::GET, below(""), json!(null)),
                    (Method::GET, below("?version=1"), json!(null)),
                    (Method::GET, below("/versions"), json!(null)),
                    (Method::PUT, below(""), json!({"value": "x"})),
                    (Method::POST, below("/rollback"), json!({"version": 1})),
                ] {
                    let answer = ask(&app, &app.token, method.clone(), &path, body).await;
                    assert_eq!(answer.problem(), (403, "secret_withheld".to_owned()), "{method} {path}");
                }
                // What the database has of it from before may go.
                let deleted = ask(&app, &app.token, Method::DELETE, &below(""), json!(null)).await;
                assert_eq!(deleted.status, if phase.owned_upstream() { 403 } else { 204 }, "{deleted:?}");
                if phase.owned_upstream() {
                    assert_eq!(app.world().value(ENV, FOLDER, name).as_deref(), Some(value));
                }
            }
            let client = Client::new(&app, "c", &["*", "/*"], &Action::ALL).await;
            let mut told = Vec::new();
            for tenant in [FOLDER, "acme"] {
                for below in ["/secrets?values=true", "/secrets", "/secrets?format=map", "/secrets/REFERS", ""] {
                    told.push(app.ask_tenant(tenant, below).await.text);
                }
            }
            let batch = format!("{}/secrets/batch-get", resource(FOLDER));
            let keys = json!({"keys": ["A", KEY]});
            told.push(ask(&app, &app.token, Method::POST, &batch, keys).await.text);
            for path in [FOLDER, "/tenants/acme"] {
                told.push(client.list(app.instance(), path, "").await.text);
            }
            told.push(client.list(app.instance(), "/", "&recursive=true").await.text);
            assert!(told.iter().all(|text| !text.contains(value)), "{told:?}");
            assert!(told[1].contains("\"A\"") && !told[1].contains("\"SECRETIER_KEY"), "{}", told[1]);
            for name in names {
                assert_eq!(client.get(app.instance(), FOLDER, name).await.error().0, 403);
            }
            assert_eq!(app.get(FOLDER, "A").await.value(), "one");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_key_is_in_no_value_that_refers_to_it() {
    let (value, refers) = ("never-to-be-told", format!("it is ${{{KEY}}}"));
    let mut setup = setup(Backend::sqlite(), Phase::Hybrid);
    setup.infisical = format!("{SHARED}\nreferences = [\"/shared\"]");
    let mut app = setup.start().await;
    // A copy from before the configuration named it.
    app.holds(FOLDER, &[(KEY, value), ("REFERS", &refers)]);
    assert_eq!(app.get(FOLDER, "REFERS").await.value(), format!("it is {value}"));
    app.stored(2).await;
    app.setup.keys = format!(", \"env:{KEY}\"");
    app.world().fault(Fault::Status(500));
    app.restart().await;
    assert_eq!(app.get(FOLDER, "REFERS").await.value(), refers);
    app.world().clear_faults();
    // Nor may one be written, though the token reaches every key.
    let refused = app.put_known(FOLDER, "X", &refers).await;
    assert_eq!(refused.problem(), (400, "reference_not_allowed".to_owned()));
    // One whose name is only that of a variable, in a folder that all may refer to, and in an imported one.
    app.holds("/shared", &[(KEY, value), ("B", "2")]);
    let of_shared = |name: &str| format!("${{prod.shared.{name}}}");
    app.holds("acme", &[("REFERS", &of_shared(KEY)), ("FINE", &of_shared("B"))]);
    app.world().import(ENV, "/tenants/acme", ENV, "/shared");
    app.world().folder(ENV, "/vars");
    app.world().put(ENV, "/vars", KEY, value);
    app.world().import(ENV, FOLDER, ENV, "/vars");
    assert_eq!(app.get("acme", "FINE").await.value(), "2");
    assert_eq!(app.get("acme", "REFERS").await.value(), of_shared(KEY));
    assert_eq!(app.get("acme", KEY).await.status, 404);
    assert_eq!(app.refresh(FOLDER).await.status, 200);
    for tenant in [FOLDER, "acme"] {
        let all = app.ask_tenant(tenant, "/secrets?values=true").await;
        assert!(all.status == 200 && !all.text.contains(value), "{all:?}");
    }
    assert_eq!(app.explain(FOLDER, KEY).await["code"], "secret_withheld");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_not_configured_for_a_folder_takes_nothing_from_those_that_are() {
    on_both(async |backend| {
        let app = setup(backend, Phase::Hybrid).start().await;
        app.holds(FOLDER, &[("A", "one")]);
        app.holds("acme", &[("A", "1")]);
        assert_eq!(app.get(FOLDER, "A").await.value(), "one");
        app.stored(1).await;
        let mut setup = app.setup.clone();
        setup.infisical = String::new();
        setup.poll_interval = "1m";
        let other = app.another_as(&setup).await;
        // Its poll, which finds what is gone; and a lookup that wants to know it now.
        other.clock.advance(MINUTE);
        eventually(async || polls(&other).await >= 1.0).await;
        let fresh = other.request(Method::GET, &secret(FOLDER, "A")).bearer_auth(&app.token);
        let fresh = Answer::of(fresh.header(header::CACHE_CONTROL, "no-cache")).await;
        assert!(fresh.status == 503 || fresh.value() == "one", "{fresh:?}");
        let refresh = other.request(Method::POST, &format!("{}/refresh", resource(FOLDER))).bearer_auth(&app.token);
        let refresh = Answer::of(refresh).await;
        assert!(refresh.status == 503 && refresh.text.contains("[[infisical.folders]]"), "{refresh:?}");
        app.followed().await;
        assert_eq!(app.rows().await, 1);
        assert_eq!(app.get(FOLDER, "A").await.value(), "one");
        other.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_folders_that_fail_keep_no_tenants_change_from_being_found() {
    let mut setup = setup(Backend::sqlite(), Phase::Hybrid);
    setup.poll_interval = "1m";
    let app = setup.start().await;
    app.world().set_clock(app.instance().clock.clone());
    app.holds(FOLDER, &[("A", "one")]);
    app.holds("acme", &[("A", "old")]);
    app.advance(MINUTE);
    assert_eq!(app.get(FOLDER, "A").await.value(), "one");
    assert_eq!(app.get("acme", "A").await.value(), "old");
    app.stored(2).await;
    app.world().fault_at(FOLDER, Fault::Status(503));
    app.advance(MINUTE);
    eventually(async || polls(app.instance()).await >= 1.0).await;
    app.world().put(ENV, "/tenants/acme", "A", "new");
    app.advance(MINUTE);
    eventually(async || app.get("acme", "A").await.value() == "new").await;
    assert_eq!(app.get(FOLDER, "A").await.value(), "one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_listed_by_its_place_and_known_by_its_id() {
    let mut setup = setup(Backend::sqlite(), Phase::Hybrid).with(ON);
    setup.infisical =
        "folders = [{ name = \"background\", path = \"/apps/jobs\" }, { name = \"api\", path = \"/api\" }]".to_owned();
    let app = setup.start().await;
    for path in ["/apps/jobs", "/api"] {
        app.world().folder(ENV, path);
    }
    app.world().put(ENV, "/apps/jobs", "A", "1");
    app.holds("api", &[("A", "of the tenant")]);
    let client = Client::new(&app, "c", &["*", "/*"], &Action::ALL).await;
    let list = async |query: &str| {
        let path = format!("/api/v1/folders?environment={ENV}&{query}");
        let answer = Face::of(client.request(app.instance(), Method::GET, &path)).await;
        let folders = answer.json()["folders"].as_array().unwrap().clone();
        let word = |one: &Value, name: &str| one[name].as_str().unwrap().to_owned();
        folders.iter().map(|one| (word(one, "name"), word(one, "id"))).collect::<Vec<_>>()
    };
    let of = |name: &str, id: &str| (name.to_owned(), id.to_owned());
    let root = [of("api", "folder.~api"), of("apps", "folder.apps"), of("tenants", "folder.tenants")];
    assert_eq!(list("path=/").await, root);
    assert_eq!(list("path=/apps").await, [of("jobs", "folder.~background")]);
    let all = [of("api", "folder.~api"), of("jobs", "folder.~background"), of("api", "folder.api")];
    assert_eq!(list("path=/&recursive=true").await, all);
    assert_eq!(client.get(app.instance(), "/apps/jobs", "A").await.value(), "1");
    let delete = async |id: &str, path: &str| {
        let body = json!({"workspaceId": client.project, "environment": ENV, "path": path});
        let request = client.request(app.instance(), Method::DELETE, &format!("/api/v1/folders/{id}"));
        Face::of(request.json(&body)).await
    };
    assert_eq!(delete("folder.~api", "/tenants").await.status, 403);
    assert_eq!(delete("folder.~api", "/").await.status, 200);
    assert_eq!(app.world().value(ENV, "/tenants/api", "A").as_deref(), Some("of the tenant"));
    assert_eq!(delete("jobs", "/apps").await.error().0, 400, "it has a secret");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_shared_folder_is_denied_and_its_neighbours_are_served() {
    let app = setup(Backend::sqlite(), Phase::Hybrid).start().await;
    app.holds(FOLDER, &[("A", "one")]);
    app.holds("acme", &[("A", "1")]);
    app.world().set_rights(&app.identity, Rights::Read(vec![Readable::new(ENV, "/tenants/**")]));
    assert_eq!(app.get("acme", "A").await.value(), "1");
    let denied = app.get(FOLDER, "A").await;
    assert_eq!(denied.status, 503, "{denied:?}");
    assert!(denied.text.contains("upstream_denied"), "{denied:?}");
}
