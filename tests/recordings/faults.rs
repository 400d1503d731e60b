//! What a test can make the stand-in do.

use std::time::Duration;

use secretier::tiers::upstream::standin::{
    Credentials, Fault, Identity, Limits, Readable, Rights, Route, StandIn, World,
};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::{
    wire::{Answer, send},
    within::within,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_refuses_connections_until_it_is_restarted() {
    let mut here = Here::start().await;
    here.server.stop().await;
    let refused = TcpStream::connect(here.server.addr()).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);

    here.server.restart().await.unwrap();
    assert_eq!(here.list().await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_cuts_requests_that_are_under_way() {
    let mut here = Here::start().await;
    here.world.fault(Fault::Hang);
    let (address, target, token) = (here.server.addr(), here.target(), here.authorization());
    let waiting =
        tokio::spawn(async move { send(address, "GET", &target, &[("authorization", &token)], None).await.is_none() });
    here.world.wait_for_calls(1).await;
    here.server.stop().await;
    assert!(waiting.await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_server_frees_its_port() {
    let Here { server, world, .. } = Here::start().await;
    let address = server.addr();
    drop(server);
    let closing = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    within("the port closes", closing).await;
    assert!(StandIn::start(TcpListener::bind(address).await.unwrap(), world).is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_down_closes_the_connection_and_counts_the_attempt() {
    let here = Here::start().await;
    here.world.fault(Fault::Down);
    assert!(here.list().await.is_none());
    assert_eq!(here.world.calls().list, 1);

    here.world.clear_faults();
    assert_eq!(here.list().await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_takes_the_request_and_never_answers() {
    let here = Here::start().await;
    here.world.fault_on(Route::List, Fault::Hang);
    assert!(timeout(Duration::from_millis(200), here.list()).await.is_err());
    assert_eq!(here.world.calls().list, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_server_gives_the_right_answer_late() {
    let here = Here::start().await;
    here.world.fault(Fault::Slow(Duration::from_millis(150)));
    let started = std::time::Instant::now();
    assert_eq!(here.list().await.unwrap().status, 200);
    assert!(started.elapsed() >= Duration::from_millis(150));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_cut_off_promises_more_than_it_holds() {
    let here = Here::start().await;
    here.world.fault(Fault::CutOff);
    assert!(here.list().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_strike_their_route_only_and_as_often_as_asked() {
    let here = Here::start().await;
    here.world.fault_next(2, Route::List, Fault::Status(500));
    assert_eq!(here.get("KEY").await.unwrap().status, 200);
    assert_eq!(here.list().await.unwrap().status, 500);
    assert_eq!(here.list().await.unwrap().status, 500);
    assert_eq!(here.list().await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_at_a_folder_strikes_lists_of_just_that_folder_until_it_is_cleared() {
    let here = Here::start().await;
    here.world.put("dev", "/tenants/globex", "KEY", "x");
    here.world.fault_at("/tenants/acme", Fault::Status(500));
    for _ in 0..2 {
        assert_eq!(here.list_of("/tenants/acme").await.unwrap().status, 500);
        assert_eq!(here.list_of("/tenants/acme/").await.unwrap().status, 500);
        assert_eq!(here.list_of("/tenants/globex").await.unwrap().status, 200);
        assert_eq!(here.list_of("/tenants").await.unwrap().status, 200);
        assert_eq!(here.list_of("/tenants&recursive=true").await.unwrap().status, 200);
        assert_eq!(here.list_of("/tenants/acme&recursive=true").await.unwrap().status, 200);
        assert_eq!(here.get("KEY").await.unwrap().status, 200);
    }
    here.world.clear_faults();
    assert_eq!(here.list_of("/tenants/acme").await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_of_one_name_are_both_listed_as_after_a_batch_that_named_it_twice() {
    let here = Here::start().await;
    here.world.duplicate("dev", "/tenants/acme", "KEY", "second");
    let listed = here.list().await.unwrap().json();
    let values: Vec<_> = listed["secrets"].as_array().unwrap().iter().map(|secret| &secret["secretValue"]).collect();
    assert_eq!(values, ["old", "second"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_refuse_has_its_recorded_form() {
    let here = Here::start().await;
    let retry_after = Duration::from_secs(17);
    let cases = [
        (Fault::RateLimited { retry_after }, 429, "Too Many Requests"),
        (Fault::Denied, 401, "PermissionDenied"),
        (Fault::TokenExpired, 500, "Internal Server Error"),
        (Fault::TokenGone, 403, "UnauthorizedError"),
        (Fault::DatabaseDown, 500, "IdAccessTokenFindOne"),
    ];
    for (fault, status, error) in cases {
        here.world.fault_next(1, None, fault);
        let answer = here.list().await.unwrap();
        assert_eq!((answer.status, answer.json()["error"].as_str()), (status, Some(error)), "{fault:?}");
    }
    here.world.fault_next(1, None, Fault::RateLimited { retry_after });
    assert_eq!(here.list().await.unwrap().header("retry-after"), Some("17"));
    here.world.fault_next(1, None, Fault::Garbage);
    let garbage = here.list().await.unwrap();
    assert_eq!((garbage.status, garbage.header("content-type")), (200, Some("text/html")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_holds_requests_which_then_see_the_world_as_it_has_become() {
    let here = Here::start().await;
    let gate = here.world.gate(Route::List);
    let (answer, ()) = tokio::join!(here.list(), async {
        gate.arrived(1).await;
        here.world.put("dev", "/tenants/acme", "KEY", "new");
        gate.open();
    });
    assert_eq!(answer.unwrap().json()["secrets"][0]["secretValue"], "new");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_on_answers_lets_out_what_was_true_when_they_were_asked_for() {
    let here = Here::start().await;
    let gate = here.world.gate_answers(Route::List);
    let (answer, ()) = tokio::join!(here.list(), async {
        gate.arrived(1).await;
        here.world.put("dev", "/tenants/acme", "KEY", "new");
        gate.open();
    });
    assert_eq!(answer.unwrap().json()["secrets"][0]["secretValue"], "old");
    assert_eq!(here.list().await.unwrap().json()["secrets"][0]["secretValue"], "new");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_gate_is_open() {
    let here = Here::start().await;
    let gate = here.world.gate(None);
    let (answer, ()) = tokio::join!(here.list(), async {
        gate.arrived(1).await;
        drop(gate);
    });
    assert_eq!(answer.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_counted_by_kind_since_a_mark() {
    let here = Here::start().await;
    here.list().await;
    here.world.mark();
    here.list().await;
    here.get("KEY").await;
    here.world.wait_for_calls(2).await;
    let calls = here.world.calls_since_mark();
    assert_eq!((calls.list, calls.get, calls.total()), (1, 1, 2));
    assert_eq!(here.world.calls().list, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_ran_out_is_refused_for_that_once_and_then_is_gone() {
    let here = Here::start().await;
    here.world.expire_tokens();
    let first = here.list().await.unwrap();
    assert_eq!(first.json()["message"], "Failed to renew MI access token due to TTL expiration");
    let second = here.list().await.unwrap();
    assert_eq!((second.status, second.json()["error"].as_str()), (403, Some("UnauthorizedError")));
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_follow_the_identity_and_not_its_token() {
    let here = Here::start().await;
    here.world.set_rights(&here.credentials, Rights::Read(vec![Readable::new("dev", "/tenants/**")]));
    assert_eq!(here.list().await.unwrap().status, 200);
    here.world.set_rights(&here.credentials, Rights::Read(vec![Readable::new("prod", "/tenants/**")]));
    assert_eq!(here.list().await.unwrap().status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_server_knows_the_newer_routes_only() {
    let here = Here::start().await;
    here.world.import("dev", "/tenants/acme", "dev", "/shared");
    here.world.put("dev", "/shared", "HOST", "db");
    here.world.put("dev", "/tenants/acme", "KEY", "${OTHER}!");
    here.world.put("dev", "/tenants/acme", "OTHER", "expanded");
    here.world.v4_only(true);

    let old = here.list().await.unwrap();
    assert_eq!((old.status, old.json()["error"].as_str()), (404, Some("Not Found")));

    let project = here.world.project_id();
    let query = format!("projectId={project}&environment=dev&secretPath=%2Ftenants%2Facme");
    let list = here.ask("GET", &format!("/api/v4/secrets?{query}"), None).await.unwrap().json();
    let values: Vec<_> = list["secrets"].as_array().unwrap().iter().map(|secret| &secret["secretValue"]).collect();
    assert!(values.contains(&&json!("expanded!")), "references are expanded unless that is refused");
    assert_eq!(list["imports"][0]["secrets"][0]["secretValue"], "db", "imports come unless they are refused");

    let body = json!({"projectId": project, "environment": "dev", "secretPath": "/tenants/acme", "secretValue": "v"});
    let created = here.ask("POST", "/api/v4/secrets/NEW", Some(&body.to_string())).await.unwrap();
    assert_eq!(created.json()["secret"]["secretKey"], "NEW");
    let deleted = here.ask("DELETE", "/api/v4/secrets/NEW", Some(&body.to_string())).await.unwrap();
    assert_eq!(deleted.status, 200);
    let missing = here.ask("GET", &format!("/api/v4/secrets/NEW?{query}"), None).await.unwrap();
    assert_eq!(missing.status, 404);

    let folders = format!("/api/v2/folders?projectId={project}&environment=dev&path=%2Ftenants");
    assert_eq!(here.ask("GET", &folders, None).await.unwrap().json()["folders"][0]["name"], "acme");

    here.world.set_rights(&here.credentials, Rights::NoAccess);
    let denied = here.ask("GET", &format!("/api/v4/secrets?{query}"), None).await.unwrap();
    assert_eq!((denied.status, denied.json()["error"].as_str()), (403, Some("PermissionDenied")));
    here.world.fault(Fault::TokenExpired);
    let expired = here.ask("GET", &format!("/api/v4/secrets?{query}"), None).await.unwrap();
    assert_eq!((expired.status, expired.json()["error"].as_str()), (403, Some("TokenError")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_one_mebibyte_is_refused_and_changes_nothing() {
    let here = Here::start().await;
    let value = "x".repeat(1024 * 1024);
    let project = here.world.project_id();
    let body =
        json!({"workspaceId": project, "environment": "dev", "secretPath": "/tenants/acme", "secretValue": value});
    let answer = here.ask("POST", "/api/v3/secrets/raw/LARGE", Some(&body.to_string())).await.unwrap();
    assert_eq!(answer.status, 413);
    assert_eq!(here.world.value("dev", "/tenants/acme", "LARGE"), None);

    let body = json!({"workspaceId": project, "environment": "dev", "secretPath": "/tenants/acme",
        "secretValue": "x".repeat(900_000)});
    let answer = here.ask("POST", "/api/v3/secrets/raw/LARGE", Some(&body.to_string())).await.unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(here.world.value("dev", "/tenants/acme", "LARGE").unwrap().len(), 900_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_caller_sends_never_ends_the_server() {
    let here = Here::start().await;
    here.world.limits(Some(Limits::recorded()));
    let project = here.world.project_id();
    let deep =
        format!(r#"{{"workspaceId":"{project}","environment":"dev","path":"{}","name":"x"}}"#, "/a".repeat(9000));
    let nested = "[".repeat(100_000);
    for (method, target, body) in [
        ("GET", "/%", None),
        ("GET", "//", None),
        ("GET", "/api", None),
        ("GET", "/api/v3/secrets/raw/%ff", None),
        ("GET", "/api/v3/secrets/raw?%ff=%ff&&=&workspaceId", None),
        ("POST", "/api/v1/folders", Some(deep.as_str())),
        ("POST", "/api/v1/folders", Some(nested.as_str())),
        ("POST", "/api/v1/folders", Some("\"\\ud800")),
        ("POST", "/api/v1/folders", Some("[1]")),
        ("PATCH", "/api/v3/secrets/batch/raw", Some(r#"{"secrets":[1,null,{}]}"#)),
        ("DELETE", "/api/v1/folders/root", Some("{}")),
        ("BREW", "/api/v3/secrets/raw", None),
    ] {
        let answer = here.ask(method, target, body).await;
        assert!(answer.is_some_and(|answer| answer.status >= 400), "{method} {target}");
    }
    assert_eq!(here.get("KEY").await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sample_world_serves_three_tenants_to_whoever_logs_in() {
    let (world, credentials) = World::sample();
    let server = StandIn::on_loopback(world.clone()).await.unwrap();
    let login = json!({"clientId": credentials.client_id, "clientSecret": credentials.client_secret}).to_string();
    let json_body = [("content-type", "application/json")];
    let path = "/api/v1/auth/universal-auth/login";
    let answer = send(server.addr(), "POST", path, &json_body, Some(&login)).await.unwrap();
    let authorization = format!("Bearer {}", answer.json()["accessToken"].as_str().unwrap());
    let target = format!("/api/v1/folders?workspaceId={}&environment=prod&path=%2Ftenants", world.project_id());
    let folders = send(server.addr(), "GET", &target, &[("authorization", &authorization)], None).await.unwrap().json();
    let names: Vec<_> = folders["folders"].as_array().unwrap().iter().map(|folder| folder["name"].clone()).collect();
    assert_eq!(names, ["acme", "globex", "initech"]);
    assert_eq!(world.secrets("prod", "/tenants/acme").len(), 5);
}

/// A world with one tenant and one secret, and an identity that may do everything.
pub(crate) struct Here {
    pub(crate) server: StandIn,
    pub(crate) world: World,
    pub(crate) credentials: Credentials,
    token: String,
}

impl Here {
    pub(crate) async fn start() -> Self {
        let world = World::empty();
        world.put("dev", "/tenants/acme", "KEY", "old");
        let credentials = world.identity(Identity::new(Rights::Full));
        let token = world.token(&credentials).expect("a known identity");
        let server = StandIn::on_loopback(world.clone()).await.expect("a free port");
        Self { server, world, credentials, token }
    }

    pub(crate) fn authorization(&self) -> String {
        format!("Bearer {}", self.token)
    }

    pub(crate) fn target(&self) -> String {
        let project = self.world.project_id();
        format!("/api/v3/secrets/raw?workspaceId={project}&environment=dev&secretPath=%2Ftenants%2Facme")
    }

    pub(crate) async fn list(&self) -> Option<Answer> {
        self.ask("GET", &self.target(), None).await
    }

    pub(crate) async fn list_of(&self, folder: &str) -> Option<Answer> {
        self.ask("GET", &self.target().replace("%2Ftenants%2Facme", folder), None).await
    }

    pub(crate) async fn get(&self, name: &str) -> Option<Answer> {
        self.ask("GET", &self.target().replace("raw?", &format!("raw/{name}?")), None).await
    }

    pub(crate) async fn ask(&self, method: &str, target: &str, body: Option<&str>) -> Option<Answer> {
        let authorization = self.authorization();
        let mut headers = vec![("authorization", authorization.as_str())];
        if body.is_some() {
            headers.push(("content-type", "application/json"));
        }
        send(self.server.addr(), method, target, &headers, body).await
    }
}
