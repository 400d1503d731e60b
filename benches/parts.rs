//! What the parts of a memory hit cost, and those of a database hit that are no query:
//! `cargo bench --bench parts`. Beside the opening of a value stands the cipher alone.

#![expect(clippy::unwrap_used, reason = "what fails here ends the run")]

use std::{hint::black_box, net::Ipv4Addr, os::unix::fs::OpenOptionsExt as _, sync::Arc};

use aes_gcm::{
    AeadInOut as _, Aes256Gcm, KeyInit as _, Nonce, Tag,
    aead::consts::{U12, U16},
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use http::{HeaderMap, HeaderValue, header};
use secretier::{
    access::{
        Action, Known, NewToken, Peer,
        audit::{Account, Act, Outcome, Who},
    },
    answer::Answer,
    app::App,
    clock::{Clock, Timestamp},
    config::Loaded,
    resolver::{Condition, NewTenant, Want},
    sealing::{DataKey, Place},
    secret::{SecretKey, SecretName, SecretValue, Version, Writer},
    tenant::Tenant,
};
use tempfile::TempDir;
use tokio::runtime::Runtime;

const SIZES: [usize; 3] = [100, 4 << 10, 64 << 10];
const COMPANY: &str = "7d3f2c1e-5b7a-4c7e-9d83-0d9a4a1b2c3d";

fn tenant() -> Tenant {
    "acme".parse().unwrap()
}

fn key() -> SecretKey {
    "STRIPE_SECRET_KEY".parse().unwrap()
}

fn value(bytes: usize) -> SecretValue {
    SecretValue::new("v".repeat(bytes))
}

/// A value on its way into the database and out of it.
fn sealing(criterion: &mut Criterion) {
    let (data_key, key) = (DataKey::generate(1).unwrap(), key());
    let place = Place { company_id: COMPANY, key: &key, version: Version::FIRST };
    let mut group = criterion.benchmark_group("sealing");
    for bytes in SIZES {
        group.throughput(Throughput::Bytes(bytes as u64));
        let value = value(bytes);
        group.bench_with_input(BenchmarkId::new("seal", bytes), &value, |bencher, value| {
            bencher.iter(|| data_key.seal(value, place).unwrap());
        });
        let sealed = data_key.seal(&value, place).unwrap();
        group.bench_with_input(BenchmarkId::new("open", bytes), &sealed, |bencher, sealed| {
            bencher.iter(|| data_key.open(sealed, place).unwrap());
        });
        let cipher = Aes256Gcm::new(&[7; 32].into());
        let nonce = Nonce::<U12>::from([1; 12]);
        let mut text = vec![b'v'; bytes];
        let tag: Tag<U16> = cipher.encrypt_inout_detached(&nonce, b"", text.as_mut_slice().into()).unwrap();
        group.bench_with_input(BenchmarkId::new("aes-256-gcm alone opens", bytes), &text, |bencher, text| {
            bencher.iter(|| {
                let mut buffer = text.clone();
                cipher.decrypt_inout_detached(&nonce, b"", buffer.as_mut_slice().into(), &tag).unwrap();
                buffer
            });
        });
    }
    group.finish();
}

/// The finished answer that memory keeps.
fn answer(criterion: &mut Criterion) {
    let (tenant, key) = (tenant(), key());
    let mut group = criterion.benchmark_group("answer");
    for bytes in SIZES {
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_with_input(BenchmarkId::new("serialise", bytes), &value(bytes), |bencher, value| {
            let (etag, at) = ("0123456789abcdef0123456789abcdef", Timestamp::from_millis(0));
            bencher.iter(|| Answer::new(&tenant, key.clone(), value, Version::FIRST, at, etag));
        });
    }
    group.finish();
}

/// What a request for a secret in memory goes through between its head and its answer.
fn hit(criterion: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let folder = TempDir::new().unwrap();
    let (app, token) = runtime.block_on(start(&folder));
    let service = Arc::clone(app.service());
    let (tenant, key) = (tenant(), key());
    let name = SecretName::of(&tenant, &key);
    let found = runtime.block_on(service.resolver.resolve(name, Want::Cached)).unwrap();
    assert!(found.answer().is_some(), "memory has nothing to be measured with");

    let peer = Peer::Ip(Ipv4Addr::LOCALHOST.into());
    let caller = service.access.caller(peer);
    let authorization = HeaderValue::try_from(format!("Bearer {token}")).unwrap();
    let clock = Clock::system();
    let known = service.access.recognise(&caller, Some(&authorization), clock.moment());
    let Ok(Known::As(grant)) = known else { panic!("the token is refused") };
    let mut headers = HeaderMap::new();
    headers.insert(header::USER_AGENT, HeaderValue::from_static("node"));
    let mut who = Who::at(peer);
    who.grant = Some(grant);
    let account = Account::new(who, &headers);

    let mut group = criterion.benchmark_group("hit");
    group.bench_function("authorise", |bencher| {
        bencher.iter(|| service.access.recognise(&caller, Some(black_box(&authorization)), clock.moment()).is_ok());
    });
    group.bench_function("resolve", |bencher| {
        bencher.iter(|| service.resolver.recall(black_box(name), clock.moment()).unwrap());
    });
    group.bench_function("audit", |bencher| {
        let (action, tenant, key) = ("read", tenant.as_str(), key.as_str());
        let act = Act { action, tenant, key, outcome: Outcome::Found, tier: Some("memory"), code: None };
        bencher.iter(|| service.audit.count(&account, black_box(act), clock.now()));
    });
    group.finish();
    // Before the runtime that it runs in.
    drop(app);
}

/// An instance with one secret, and a token that may read it.
async fn start(folder: &TempDir) -> (App, String) {
    let (database, master_key) = (folder.path().join("secretier.db"), folder.path().join("master.key"));
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(&master_key).unwrap();
    std::io::Write::write_all(&mut file, hex::encode(rand::random::<[u8; 32]>()).as_bytes()).unwrap();
    let text = format!(
        "environment = \"prod\"\n[memory]\nttl = \"1h\"\n[database]\nurl = \"sqlite:{}\"\n[keys]\nsources = [\"file:{}\"]\n\
         [access]\nrequests_per_second_per_token = 1000000000\nrequests_per_second_per_peer = 1000000000\n",
        database.display(),
        master_key.display()
    );
    let config = Loaded::from_table(toml::from_str(&text).unwrap()).unwrap().config;
    let clock = Clock::system();
    let app = Box::pin(App::start(&config, clock.clone())).await.unwrap();
    let (tenants, keys) = (vec!["*".to_owned()], vec!["*".to_owned()]);
    let new = NewToken { name: "bench".to_owned(), tenants, keys, actions: vec![Action::Read], lifetime: None };
    let (token, row) = new.draw(clock.now()).unwrap();
    let service = app.service();
    service.resolver.database().insert_token(&row).await.unwrap();
    service.access.reload().await.unwrap();
    let (writer, condition) = (Writer::new("bench"), Condition::None);
    service.resolver.put(&tenant(), &key(), &value(100), &condition, &writer, NewTenant::Created).await.unwrap();
    let text = token.expose().to_owned();
    (app, text)
}

criterion_group!(parts, hit, sealing, answer);
criterion_main!(parts);
