//! No secret leaves by the back door: everything that is said while everything is done
//! and goes wrong, searched for every secret there is.

use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD, Engine as _};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Method, RequestBuilder};
use secretier::tiers::upstream::standin::{Fault, Rights};
use serde_json::json;

use crate::program::{Infisical, Place, client, master_key};

/// Everything that was said.
#[derive(Default)]
struct Said(Vec<String>);

impl Said {
    /// Sends a request, and keeps the answer, head and all, if it is not one that holds values.
    async fn ask(&mut self, request: RequestBuilder) -> u16 {
        let answer = request.send().await.unwrap();
        let status = answer.status();
        self.0.push(format!("{:?}", answer.headers()));
        let body = answer.text().await.unwrap();
        if !status.is_success() {
            self.0.push(body);
        }
        status.as_u16()
    }

    /// Sends a request whose answer must hold no value, and keeps it.
    async fn ask_page(&mut self, request: RequestBuilder) -> String {
        let page = request.send().await.unwrap().text().await.unwrap();
        self.0.push(page.clone());
        page
    }
}

/// A secret as it may be written.
fn spellings(secret: &str) -> Vec<String> {
    let bytes = secret.as_bytes();
    let mut spellings = vec![
        secret.to_owned(),
        BASE64_STANDARD.encode(bytes),
        BASE64_STANDARD_NO_PAD.encode(bytes),
        BASE64_URL_SAFE_NO_PAD.encode(bytes),
        hex::encode(bytes),
        hex::encode_upper(bytes),
        utf8_percent_encode(secret, NON_ALPHANUMERIC).to_string(),
        format!("{bytes:?}").trim_matches(['[', ']']).to_owned(),
    ];
    // A key that is written in hex stands for bytes, which may be written otherwise.
    if let Ok(raw) = hex::decode(secret) {
        spellings.extend([BASE64_STANDARD.encode(&raw), BASE64_URL_SAFE_NO_PAD.encode(&raw), secret.to_uppercase()]);
        spellings.push(format!("{raw:?}").trim_matches(['[', ']']).to_owned());
    }
    spellings
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_is_logged_answered_as_an_error_or_shown_holds_a_secret() {
    let infisical = Infisical::start().await;
    let (world, key) = (infisical.world(), master_key());
    let odd = format!("p/{} ?#{}", hex::encode(rand::random::<[u8; 8]>()), "ü+");
    let values: Vec<String> =
        (0..6).map(|n| format!("value-{n}-{}", hex::encode(rand::random::<[u8; 12]>()))).chain([odd]).collect();
    world.put("prod", "/hono-api", "MASTER_ENCRYPTION_KEY", &key);
    for tenant in ["acme", "globex"] {
        for (number, value) in values[..4].iter().chain(&values[6..]).enumerate() {
            world.put("prod", &format!("/tenants/{tenant}"), &format!("K{number}"), value);
        }
    }
    let mut place = Place::new(&format!(
        "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[memory]\nttl = \"1ms\"\n\
         [database]\nrefresh_after = \"1ms\"\n{}requests_per_minute = 6000\ntimeout = \"3s\"\n\
         [keys]\nsources = [\"infisical:/hono-api/MASTER_ENCRYPTION_KEY\", \"file:master.key\"]\n\
         [[rules]]\ntenants = \"owned\"\nphase = \"database\"\n",
        infisical.section(),
    ));
    place.write("master.key", &key);
    let client_secret = infisical.credentials.client_secret.clone();
    place.set("INFISICAL_CLIENT_SECRET", &client_secret);
    place.set("SECRETIER_LOG__LEVEL", "trace");
    let mut said = Said::default();
    let mut secrets: Vec<String> = values.iter().cloned().chain([key.clone(), client_secret.clone()]).collect();
    let (mut serving, url) = place.serve();
    let mut create = async |name: &str, actions: &str, expires: &str| {
        let create = ["token", "create", "--name", name, "--tenants", "acme,globex,owned,new", "--actions", actions];
        let token = place.run(&[&create[..], &["--expires-in", expires]].concat()).ok().trim().to_owned();
        secrets.push(token.clone());
        // The part that proves its holder, too.
        secrets.extend(token.rsplit(['_', '.']).next().map(str::to_owned).filter(|part| part.len() > 16));
        token
    };
    let token = create("all", "read,write,admin", "1d").await;
    let reader = create("reader", "read", "1d").await;
    let expired = create("expired", "read", "1ms").await;
    let http = client();
    let to = |token: &str, method: Method, path: &str| http.request(method, format!("{url}{path}")).bearer_auth(token);
    let secret = |tenant: &str, key: &str| format!("/v1/tenants/{tenant}/secrets/{key}");
    let put = |token: &str, path: &str, value: &str| {
        to(token, Method::PUT, path).query(&[("create_tenant", "true")]).json(&json!({ "value": value }))
    };

    // Lookups, lists, batches and writes that succeed.
    for tenant in ["acme", "globex"] {
        for number in 0..5 {
            assert_eq!(said.ask(to(&token, Method::GET, &secret(tenant, &format!("K{number}")))).await, 200);
        }
        said.ask(to(&token, Method::GET, &format!("/v1/tenants/{tenant}/secrets?values=true"))).await;
        said.ask(to(&token, Method::POST, &format!("/v1/tenants/{tenant}/refresh"))).await;
        said.ask(to(&token, Method::GET, &secret(tenant, "K0")).header("cache-control", "no-cache")).await;
    }
    let batch = json!({ "keys": ["K0", "K1", "NONE"] });
    assert_eq!(said.ask(to(&token, Method::POST, &secret("acme", "batch-get")).json(&batch)).await, 200);
    assert_eq!(said.ask(put(&token, &secret("acme", "K0"), &values[4])).await, 200);
    assert_eq!(said.ask(put(&token, &secret("owned", "K"), &values[5])).await, 201);
    assert_eq!(said.ask(put(&token, &secret("new", "K"), &values[4])).await, 201);
    said.ask(to(&token, Method::DELETE, &secret("new", "K"))).await;
    assert_eq!(said.ask(put(&token, &secret("owned", "K"), &values[4])).await, 200);
    for path in [secret("owned", "K"), secret("acme", "K0")] {
        assert_eq!(said.ask(to(&token, Method::GET, &format!("{path}?version=1"))).await, 200);
        let back = to(&token, Method::POST, &format!("{path}/rollback")).json(&json!({ "version": 1 }));
        assert_eq!(said.ask(back).await, 200);
        said.ask_page(to(&token, Method::GET, &format!("{path}/versions"))).await;
    }

    // Every kind of refusal.
    let key_path = secret("acme", "K0");
    for (expected, request) in [
        (401, http.get(format!("{url}{key_path}"))),
        (401, to("st_wrong", Method::GET, &key_path)),
        (401, to(&format!("{token}x"), Method::GET, &key_path)),
        (401, to(&expired, Method::GET, &key_path)),
        (403, put(&reader, &key_path, &values[1])),
        (403, to(&token, Method::GET, &secret("initech", "K"))),
        (404, to(&token, Method::GET, &secret("acme", "NONE"))),
        (404, to(&token, Method::GET, &format!("/{}", values[0]))),
        (400, to(&token, Method::GET, &secret("acme", "%01"))),
        (400, to(&token, Method::GET, &format!("{key_path}?value={}", values[0]))),
        (405, to(&token, Method::PATCH, &key_path)),
        (400, to(&token, Method::PUT, &key_path).body(format!("{{\"value\": {}}}", values[0]))),
        (400, to(&token, Method::PUT, &key_path).body(format!("{{\"{}\": 1}}", values[0]))),
        (400, to(&token, Method::PUT, &key_path).body(format!("{{\"value\": [\"{}\"]}}", values[0]))),
        (413, put(&token, &key_path, &values[0].repeat(60_000))),
        (409, put(&token, &key_path, &values[1]).header("if-none-match", "*")),
        (409, put(&token, &secret("owned", "K"), &values[1]).header("if-match", "\"x\"")),
    ] {
        let (request, shown) = (request.build().unwrap(), expected);
        let line = format!("{} {}", request.method(), request.url());
        let got = said.ask(RequestBuilder::from_parts(http.clone(), request)).await;
        // The test's own line may hold a value: only its end is shown.
        assert_eq!(got, shown, "{}", line.chars().take(60).collect::<String>());
    }

    // Everything that goes wrong upstream, for a tenant with copies and one without.
    for fault in [
        Fault::Down,
        Fault::Hang,
        Fault::Status(500),
        Fault::Garbage,
        Fault::CutOff,
        Fault::Denied,
        Fault::TokenExpired,
        Fault::TokenGone,
        Fault::DatabaseDown,
        Fault::CacheDown,
        Fault::RateLimited { retry_after: std::time::Duration::from_secs(1) },
    ] {
        world.fault(fault);
        for path in [secret("acme", "K1"), secret("new", "K1")] {
            said.ask(to(&token, Method::GET, &path).header("cache-control", "no-cache")).await;
            said.ask(put(&token, &path, &values[2])).await;
        }
        world.clear_faults();
    }
    world.set_rights(&infisical.credentials, Rights::NoAccess);
    said.ask(to(&token, Method::GET, &key_path).header("cache-control", "no-cache")).await;
    world.set_client_secret(&infisical.credentials.client_id, "another");
    world.revoke_tokens();
    said.ask(to(&token, Method::GET, &key_path).header("cache-control", "no-cache")).await;

    // Rows that were damaged and moved.
    let database = place.path().join("secretier.db");
    let mut rows = <diesel::SqliteConnection as diesel::Connection>::establish(database.to_str().unwrap()).unwrap();
    diesel::connection::SimpleConnection::batch_execute(
        &mut rows,
        "PRAGMA busy_timeout = 5000; UPDATE company_secrets SET secret_value_encrypted = \
         substr(secret_value_encrypted, 1, length(secret_value_encrypted) - 4) || 'AAAA';",
    )
    .unwrap();
    drop(rows);
    for path in [secret("owned", "K"), secret("acme", "K2")] {
        said.ask(to(&token, Method::GET, &path).header("cache-control", "no-cache")).await;
        said.ask(to(&token, Method::GET, &format!("{path}?version=1"))).await;
        let back = to(&token, Method::POST, &format!("{path}/rollback")).json(&json!({ "version": 1 }));
        said.ask(back).await;
    }

    // Pages, and what the commands show.
    for path in ["/metrics", "/readyz", "/openapi.json", "/v1/tenants", "/v1/tenants/acme", "/v1/tenants/acme/secrets"]
    {
        said.ask_page(to(&token, Method::GET, path)).await;
    }
    for (tenant, key) in [("acme", "K1"), ("owned", "K"), ("new", "K")] {
        said.ask_page(to(&token, Method::GET, &format!("{}/explain", secret(tenant, key)))).await;
    }
    assert_eq!(serving.terminate(), 0);
    for arguments in
        [&["config", "show"][..], &["config", "show", "--json"], &["config", "check"], &["token", "list", "--json"]]
    {
        said.0.push(place.run(arguments).ok());
    }
    let shredded = place.run(&["tenant", "shred", "owned", "--yes"]);
    said.0.extend([shredded.stderr.clone(), shredded.ok()]);
    place.set("SECRETIER_TOKEN", &token);
    place.set("SECRETIER_URL", &url);
    said.0.push(place.run_with(&["get", "acme", "K0"], "").failed(1));
    said.0.push(place.run_with(&["set", "acme", "K0"], &values[3]).failed(1));
    let log = serving.stderr();
    assert!(log.contains("TRACE") || log.contains("DEBUG"), "the log is at its most talkative");
    assert!(said.0.len() > 60, "something was said");
    said.0.push(log);

    // A request for a path is answered without its path, but a log line may name a key: none here is a value.
    for secret in &secrets {
        for spelling in spellings(secret) {
            let found = said.0.iter().position(|text| text.contains(&spelling));
            let number = secrets.iter().position(|other| other == secret);
            assert!(found.is_none(), "secret number {number:?} stands in text number {found:?} of {}", said.0.len());
        }
    }
}
