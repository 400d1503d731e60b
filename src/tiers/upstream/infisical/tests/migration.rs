//! The client's part in a migration, against the stand-in as an older and as a newer server.

use std::collections::BTreeMap;

use super::{there::There, there::on_old_and_new, *};
use crate::tiers::upstream::{
    Oddity, OddityKind, UpstreamSecret,
    standin::{Fault, Readable, Rights, Route},
};

#[tokio::test]
async fn all_tenants_are_read_by_one_call_as_they_are_one_by_one() {
    on_old_and_new(async |there| {
        there.fill(&["acme", "globex", "initech"]);
        there.world.put("prod", "/shared", "HOST", "db.internal");
        there.world.put("prod", "/tenants/acme", "URL", "https://${prod.shared.HOST}/${NAME}?a=${NOPE}");
        there.world.put("prod", "/tenants/acme", "LINES", "one\ntwo\n");
        there.world.put("prod", "/tenants/globex", "EMPTY", "");
        there.world.put("prod", "/tenants/globex", "new\nline", "x");
        there.world.duplicate("prod", "/tenants/initech", "NAME", "again");
        // None of these belongs to a tenant.
        there.world.put("prod", "/tenants", "TOP", "x");
        there.world.put("prod", "/tenants/Not-One", "ODD", "x");
        there.world.put("prod", "/tenants-old/acme", "OLD", "x");
        there.world.put("dev", "/tenants/acme", "DEV", "x");
        there.world.folder("prod", "/tenants/nothing");
        there.world.mark();

        let everything = there.everything().await.unwrap();
        assert_eq!(there.world.calls_since_mark().list, 1);
        assert!(!everything.has_imports);
        assert_eq!(names(&everything), ["acme", "globex", "initech"]);
        for (tenant, snapshot) in &everything.tenants {
            let alone = there.snapshot(tenant.as_str()).await.unwrap();
            assert_eq!(described(snapshot), described(&alone), "{tenant}");
            assert_eq!(snapshot.oddities, alone.oddities, "{tenant}");
            assert!(snapshot.etag.is_none(), "it would not be this folder's");
        }
        let url = everything.tenants["acme"].secrets.iter().find(|secret| secret.key.as_str() == "URL").unwrap();
        assert_eq!(url.value.expose(), "https://${prod.shared.HOST}/acme?a=${NOPE}");
    })
    .await;
}

#[tokio::test]
async fn a_folder_that_is_refused_to_us_is_missing_without_a_word() {
    on_old_and_new(async |there| {
        there.fill(&["acme", "globex", "initech"]);
        let readable = ["/tenants/acme", "/tenants/initech"].map(|path| Readable::new("prod", path));
        there.world.set_rights(&there.credentials, Rights::Read(readable.to_vec()));
        assert_eq!(names(&there.everything().await.unwrap()), ["acme", "initech"]);
        assert!(there.snapshot("globex").await.expect_err("not readable").is_denial());
        there.world.set_rights(&there.credentials, Rights::NoAccess);
        assert_eq!(names(&there.everything().await.unwrap()), [""; 0]);
    })
    .await;
}

#[tokio::test]
async fn an_import_anywhere_below_is_told_for_its_secrets_are_nobodys() {
    for importing in ["/tenants/acme", "/tenants/acme/deeper"] {
        on_old_and_new(async |there| {
            there.fill(&["acme", "globex"]);
            there.world.put("prod", "/shared", "IMPORTED", "x");
            assert!(!there.everything().await.unwrap().has_imports);
            there.world.import("prod", importing, "prod", "/shared");
            let everything = there.everything().await.unwrap();
            assert!(everything.has_imports);
            let keys = everything.tenants.values().flat_map(|snapshot| &snapshot.secrets);
            assert!(keys.clone().count() > 0 && keys.into_iter().all(|secret| secret.key.as_str() != "IMPORTED"));
        })
        .await;
    }
}

#[tokio::test]
async fn a_tenants_folder_that_is_not_there_has_nothing_in_it() {
    on_old_and_new(async |there| {
        let everything = there.everything().await.unwrap();
        assert!(everything.tenants.is_empty() && !everything.has_imports);
    })
    .await;
    let fake = Fake::start(|_| {
        Answer::Json(404, json!({"message": "Folder with path '/tenants' in environment with slug 'prod' not found"}))
    })
    .await;
    assert!(fake.upstream.everything(Lane::Migration).await.unwrap().tenants.is_empty());
}

#[tokio::test]
async fn the_list_of_everything_asks_for_imports_and_never_for_expansion() {
    let fake = Fake::start(|_| Answer::ok(json!({"secrets": [], "imports": []}))).await;
    fake.upstream.everything(Lane::Migration).await.unwrap();
    let list = fake.seen(LIST).remove(0);
    for parameter in
        ["secretPath=%2Ftenants&", "include_imports=true", "expandSecretReferences=false", "recursive=true"]
    {
        assert!(list.target.contains(parameter), "{}", list.target);
    }
    assert!(!list.head.contains("if-none-match"), "{}", list.head);
}

#[tokio::test]
async fn a_list_of_everything_that_is_not_whole_is_none() {
    let secrets = json!([secret("A", "1"), {"secretKey": "B", "secretValue": "2"}]);
    let fake = Fake::start(move |_| Answer::ok(json!({"secrets": secrets}))).await;
    let error = fake.upstream.everything(Lane::Migration).await.expect_err("not whole");
    assert!(matches!(error, UpstreamError::Malformed(_)), "{error}");
    let fake = Fake::start(|_| Answer::ok(json!({"secrets": [secret("A", &"x".repeat(5000))]}))).await;
    let small = fake.another(|config| config.max_response = 4096);
    let error = small.everything(Lane::Migration).await.expect_err("too long");
    assert!(error.to_string().contains("max_response"), "{error}");
    let there = There::start(false).await;
    there.fill(&["acme"]);
    there.world.fault_on(Route::List, Fault::CutOff);
    assert!(matches!(there.everything().await, Err(UpstreamError::Malformed(_))));
}

#[tokio::test]
async fn the_list_of_everything_may_take_longer_than_a_call_that_someone_waits_for() {
    let there = There::start(false).await;
    there.fill(&["acme"]);
    let upstream = there.another(|config| config.timeout = Duration::from_millis(300));
    let gate = there.world.gate(Route::List);
    let acme = tenant();
    let (everything, ()) = tokio::join!(upstream.everything(Lane::Migration), async {
        gate.arrived(1).await;
        let error = upstream.snapshot(&acme, None, Lane::Interactive).await.expect_err("held");
        assert!(matches!(error, UpstreamError::TimedOut), "{error}");
        gate.open();
    });
    assert_eq!(names(&everything.unwrap()), ["acme"]);
}

#[tokio::test]
async fn the_list_of_everything_keeps_nobody_from_the_only_connection_and_nobody_from_a_login() {
    let fake = Fake::start(|_| Answer::Hang).await;
    let upstream = fake.another(|config| {
        config.timeout = Duration::from_millis(300);
        config.max_connections = NonZeroU16::MIN;
    });
    let begun = Instant::now();
    assert!(matches!(upstream.everything(Lane::Migration).await, Err(UpstreamError::TimedOut)));
    fake.decide_logins();
    let upstream = fake.another(|config| config.timeout = Duration::from_millis(300));
    assert!(matches!(upstream.everything(Lane::Migration).await, Err(UpstreamError::TimedOut)));
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert_eq!((fake.count(LOGIN), fake.count(LIST)), (2, 1));
}

#[tokio::test]
async fn a_thousand_tenants_are_read_by_one_call() {
    let there = There::start(false).await;
    let tenants: Vec<String> = (0..1000).map(|number| format!("tenant-{number}")).collect();
    for tenant in &tenants {
        for key in ["A", "B", "C", "D", "E"] {
            there.world.put("prod", &format!("/tenants/{tenant}"), key, &format!("{key} of {tenant}"));
        }
    }
    let upstream = there.another(|config| config.max_response = 64 << 20);
    let everything = upstream.everything(Lane::Migration).await.unwrap();
    assert_eq!(everything.tenants.len(), 1000);
    for tenant in &tenants {
        let snapshot = &everything.tenants[tenant.as_str()];
        assert_eq!(snapshot.secrets.len(), 5);
        assert!(snapshot.secrets.iter().all(|secret| *secret.value.expose() == format!("{} of {tenant}", secret.key)));
    }
}

#[tokio::test]
async fn a_folder_is_removed_with_what_is_in_it_and_the_others_stay() {
    on_old_and_new(async |there| {
        there.fill(&["acme", "globex"]);
        there.world.put("dev", "/tenants/acme", "NAME", "dev");
        assert!(there.remove("acme").await.unwrap());
        assert!(!there.remove("acme").await.unwrap());
        assert!(!there.remove("unknown").await.unwrap());
        let folders = there.upstream.tenants(Lane::Migration).await.unwrap();
        assert_eq!(folders.tenants, ["globex".parse().unwrap()]);
        assert_eq!(there.world.value("dev", "/tenants/acme", "NAME").as_deref(), Some("dev"));
        there.world.set_rights(&there.credentials, Rights::ReadAll);
        assert!(there.remove("globex").await.expect_err("read only").is_denial());
        assert_eq!(there.world.value("prod", "/tenants/globex", "NAME").as_deref(), Some("globex"));
    })
    .await;
}

#[tokio::test]
async fn a_folder_with_folders_in_it_is_not_removed() {
    on_old_and_new(async |there| {
        there.fill(&["acme"]);
        there.world.put("prod", "/tenants/acme/deeper", "HIDDEN", "h");
        let error = there.remove("acme").await.expect_err("nobody has read what is deeper");
        assert!(error.to_string().contains("folders in"), "{error}");
        assert!(!there.world.secrets("prod", "/tenants/acme").is_empty());
        there.world.delete_folder("prod", "/tenants/acme/deeper");
        assert!(there.remove("acme").await.unwrap());
        assert!(!there.remove("acme").await.unwrap(), "it is gone");
    })
    .await;
}

#[tokio::test]
async fn a_folder_is_removed_by_its_name_below_the_tenants_folder_full_or_not() {
    let fake = Fake::start(|seen| {
        if seen.method == "GET" {
            return Answer::ok(json!({"folders": []}));
        }
        assert_eq!((seen.method.as_str(), seen.path()), ("DELETE", "/api/v1/folders/acme"));
        let body = json!({"workspaceId": "project-1", "environment": "prod", "path": "/tenants", "forceDelete": true});
        assert_eq!(seen.body, body);
        Answer::ok(json!({"folder": {}}))
    })
    .await;
    assert!(fake.upstream.remove_folder(&tenant(), Removal::Whole, Lane::Migration).await.unwrap());
}

#[tokio::test]
async fn where_only_an_empty_folder_may_go_the_server_is_not_told_to_delete_secrets() {
    let fake = Fake::start(|seen| match (seen.method.as_str(), seen.path()) {
        ("GET", "/api/v1/folders") => Answer::ok(json!({"folders": []})),
        ("GET", _) => Answer::ok(json!({"secrets": []})),
        _ => {
            assert_eq!(seen.body["forceDelete"], false);
            Answer::ok(json!({"folder": {}}))
        }
    })
    .await;
    assert!(fake.upstream.remove_folder(&tenant(), Removal::Empty, Lane::Migration).await.unwrap());
    // An older server does not look.
    let fake = Fake::start(|seen| match (seen.method.as_str(), seen.path()) {
        ("GET", "/api/v1/folders") => Answer::ok(json!({"folders": []})),
        ("GET", _) => Answer::ok(json!({"secrets": [secret("A", "1")]})),
        _ => panic!("{} {}", seen.method, seen.path()),
    })
    .await;
    let refused = fake.upstream.remove_folder(&tenant(), Removal::Empty, Lane::Migration).await;
    assert!(matches!(refused, Err(UpstreamError::Rejected { status: 409, .. })), "{refused:?}");
}

#[tokio::test]
async fn only_a_folder_that_is_missing_counts_as_none_to_remove() {
    for (status, message) in [
        (400, "Folder not found"),
        (404, "Target folder not found"),
        (404, "Folder with ID 'acme' not found"),
        (404, "Folder with path '/tenants' in environment with slug 'prod' not found"),
    ] {
        let fake = Fake::start(move |_| Answer::Json(status, json!({"message": message}))).await;
        assert!(!fake.upstream.remove_folder(&tenant(), Removal::Whole, Lane::Migration).await.unwrap(), "{message}");
    }
    for (status, message, hint) in [
        (404, "Environment with slug 'folder' not found", "environment"),
        (404, "Project with ID 'folder' not found", "infisical.project_id"),
        (
            400,
            "You cannot delete the selected folder because it contains one or more secrets that are protected by the change policy \"not found\"",
            "change policy",
        ),
    ] {
        let fake = Fake::start(move |_| Answer::Json(status, json!({"message": message}))).await;
        let error = fake.upstream.remove_folder(&tenant(), Removal::Whole, Lane::Migration).await.expect_err(message);
        assert!(error.to_string().contains(hint), "{error}");
    }
    let fake = Fake::start(Answer::not_found).await;
    let error =
        fake.upstream.remove_folder(&tenant(), Removal::Whole, Lane::Migration).await.expect_err("no such route");
    assert!(error.to_string().contains("infisical.site_url"), "{error}");
}

#[tokio::test]
async fn a_removal_that_may_have_happened_is_not_repeated() {
    for answer in
        [|| Answer::Close, || Answer::Json(500, json!({"message": "Something went wrong"}))] as [fn() -> Answer; 2]
    {
        let empty = || Answer::ok(json!({"folders": []}));
        let fake = Fake::start(move |seen| if seen.method == "GET" { empty() } else { answer() }).await;
        fake.upstream.remove_folder(&tenant(), Removal::Whole, Lane::Migration).await.expect_err("unclear");
        assert_eq!(fake.count("/api/v1/folders/acme"), 1);
    }
}

#[tokio::test]
async fn a_tenant_whose_name_may_be_another_folders_id_is_not_removed() {
    on_old_and_new(async |there| {
        there.fill(&["acme"]);
        let id = there.world.folder("prod", "/tenants/acme").to_string();
        assert!(matches!(there.remove(&id).await, Err(UpstreamError::Rejected { .. })));
        assert!(!there.world.secrets("prod", "/tenants/acme").is_empty());
        // Other names of hexadecimal digits are ordinary names.
        let digits = id.replace('-', "");
        there.fill(&[&digits]);
        assert!(there.remove(&digits).await.unwrap());
    })
    .await;
}

#[tokio::test]
async fn what_is_odd_in_a_folder_is_told_with_it() {
    on_old_and_new(async |there| {
        there.fill(&["acme", "globex"]);
        there.world.put("prod", "/shared", "NAME", "imported");
        there.world.import("prod", "/tenants/acme", "prod", "/shared");
        assert!(there.snapshot("acme").await.unwrap().oddities.is_empty(), "its own wins over an imported one");
        there.world.duplicate("prod", "/tenants/acme", "NAME", "again");
        there.world.duplicate("prod", "/tenants/acme", "NAME", "and again");
        there.world.put("prod", "/tenants/acme", "new\nline", "x");
        let snapshot = there.snapshot("acme").await.unwrap();
        let odd = |name: &str, kind| Oddity { name: name.to_owned(), kind };
        let oddities =
            [odd("NAME", OddityKind::Unusable(Unusable::Duplicate)), odd("new\nline", OddityKind::InvalidName)];
        assert_eq!(snapshot.oddities, oddities);
        assert_eq!(values(&snapshot), [("PORT", "5432")], "which of them is meant, nobody knows");
        assert!(there.snapshot("globex").await.unwrap().oddities.is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_reference_that_leads_nowhere_or_in_a_circle_stays_and_is_told() {
    on_old_and_new(async |there| {
        there.world.put("prod", "/tenants/acme/deeper", "DEEP", "found");
        for (name, value) in [
            ("PORT", "5432"),
            ("URL", "pg://${PORT}/${prod.tenants.acme.deeper.DEEP}"),
            ("NONE", "$PORT {PORT} ${} $${"),
            ("MISSING", "a${NOPE}b"),
            ("ELSEWHERE", "${prod.nope.NOPE}"),
            ("HALF", "${PORT}${NOPE}"),
            ("LATE", "${} ${NOPE}"),
            ("NESTED", "${${PORT}}"),
            ("ITSELF", "${ITSELF}"),
            ("THERE", "${BACK}"),
            ("BACK", "x${THERE}"),
        ] {
            there.world.put("prod", "/tenants/acme", name, value);
        }
        let snapshot = there.snapshot("acme").await.unwrap();
        let unresolved = snapshot.flaws().unresolved;
        let nowhere: Vec<_> = unresolved.iter().map(|(key, reason)| (key.as_str(), reason.as_str())).collect();
        assert_eq!(
            nowhere,
            [
                ("BACK", "cycle"),
                ("ELSEWHERE", "not_allowed"),
                ("HALF", "not_there"),
                ("ITSELF", "cycle"),
                ("LATE", "not_there"),
                ("MISSING", "not_there"),
                ("NESTED", "not_there"),
                ("THERE", "cycle"),
                ("URL", "not_allowed"),
            ]
        );
        assert!(snapshot.secrets.iter().any(|secret| secret.value.expose() == "5432${NOPE}"));
    })
    .await;
}

#[tokio::test]
async fn a_migration_that_is_out_of_budget_is_told_when_to_come_back_and_keeps_nobody_waiting() {
    let there = There::start(false).await;
    there.fill(&["acme"]);
    let upstream = there.another(|config| {
        // Two at once, one of which a migration leaves to others.
        config.requests_per_minute = NonZeroU32::new(8).unwrap();
        config.timeout = Duration::from_secs(5);
    });
    let error = upstream.everything(Lane::Migration).await.expect_err("the login was the one that it may make");
    assert!(matches!(error, UpstreamError::OutOfBudget { .. }), "{error}");
    assert_eq!((there.world.calls().login, there.world.calls().list), (1, 0));
    upstream.snapshot(&tenant(), None, Lane::Refresh).await.unwrap();
    let mut lists = 1;
    for _ in 0..5 {
        while let Err(error) = upstream.everything(Lane::Migration).await {
            there.clock.advance(error.retry_after().unwrap());
        }
        lists += 1;
    }
    assert_eq!((there.world.calls().login, there.world.calls().list), (1, lists));
}

#[tokio::test]
async fn a_migration_leaves_half_of_the_connections_to_who_waits() {
    let there = There::start(false).await;
    there.fill(&["acme"]);
    let upstream = there.another(|config| config.max_connections = NonZeroU16::new(4).unwrap());
    let acme = tenant();
    upstream.snapshot(&acme, None, Lane::Interactive).await.unwrap();
    let gate = there.world.gate_next_answers(2, Route::List);
    let reads = join_all((0..10).map(|_| upstream.snapshot(&acme, None, Lane::Migration)));
    let (reads, ()) = tokio::join!(reads, async {
        gate.arrived(2).await;
        upstream.snapshot(&acme, None, Lane::Interactive).await.unwrap();
        gate.open();
    });
    reads.into_iter().for_each(|read| drop(read.unwrap()));
}

fn names(everything: &Everything) -> Vec<&str> {
    let mut names: Vec<_> = everything.tenants.keys().map(Tenant::as_str).collect();
    names.sort_unstable();
    names
}

fn described(snapshot: &Snapshot) -> BTreeMap<&str, (&str, Version, Option<i64>)> {
    let describe = |secret: &UpstreamSecret| (secret.version, secret.updated_at.map(|at| at.as_millis()));
    let described = snapshot.secrets.iter().map(|secret| {
        let (version, updated_at) = describe(secret);
        (secret.key.as_str(), (secret.value.expose(), version, updated_at))
    });
    described.collect()
}
