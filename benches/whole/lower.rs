//! What memory does not have: a secret from the database, a tenant from upstream; and answers
//! that hold many secrets.

use std::time::{Duration, Instant};

use aes_gcm::{
    AeadInOut as _, Aes256Gcm, KeyInit as _, Nonce, Tag,
    aead::consts::{U12, U16},
};

use crate::{
    Pace,
    client::{Client, ask_all},
    fill::{Shape, fill, key_name},
    hits::Load,
    select,
    stage::{Engine, Place, Server},
    table::{Line, Samples, Table, Target},
    upstream::Upstream,
    wrk::{Requests, Script},
};

/// Asked for in turn, these are gone from so little memory before their turn comes again.
const STORED: Shape<'static> = Shape { prefix: "t", tenants: 1000, keys: 20, value: 100 };
/// The least that can be set, nobody warmed up, and no copy that stands in.
pub(crate) const FORGETFUL: &[(&str, &str)] =
    &[("SECRETIER_MEMORY__CAPACITY", "64KiB"), ("SECRETIER_MEMORY__WARM_TENANTS", "0")];

pub(crate) fn database(pace: &Pace, table: &mut Table) {
    for engine in Engine::BOTH {
        hits_of(engine, pace, table);
    }
}

fn hits_of(engine: Engine, pace: &Pace, table: &mut Table) {
    let place = Place::new(engine);
    fill(&place, STORED);
    let server = place.serve(FORGETFUL);
    let paths = STORED.spread(usize::MAX);
    let body = Client::connect(&server.url, &place.token).get(&paths[0]).ok().len();
    let hyper = Server::bare_of(body);
    let selecting = Server::bare(&[], &["--select", &place.database], &[]);
    let mut rows = Rows::open(&place);
    let ids: Vec<String> = rows.ids(STORED.count());
    let rows_paths: Vec<String> = ids.iter().map(|id| format!("/{id}")).collect();
    let of_secrets = Script::write(place.path(), "secrets", &place.token, &Requests::InTurn(&paths));
    let of_rows = Script::write(place.path(), "rows", "", &Requests::InTurn(&rows_paths));
    let of_hyper = Script::write(place.path(), "hyper", "", &Requests::Of("/"));

    let name = engine.name();
    let before = place.answered(&server);
    for connections in [1, 16] {
        let (mut select, mut ours, mut both, mut alone) =
            (Samples::default(), Load::default(), Load::default(), Load::default());
        for _ in 0..pace.few {
            select.add(rows.time(&ids[..ids.len().min(2000)]));
            ours.round(&server, &of_secrets, connections, pace.short);
            both.round(&selecting, &of_rows, connections, pace.short);
            alone.round(&hyper, &of_hyper, connections, pace.short);
        }
        let line = |figure: &str, unit: &'static str, ours: &Samples| {
            Line::new("database", format!("{name}, {connections} connections: {figure}"), unit, ours.clone())
        };
        if connections == 1 {
            let least = select.plus(&alone.p50);
            table.add(line("p50", "µs", &ours.p50).against("SELECT + hyper", least).target(Target::AtMost(1.5)));
        }
        table.add(line("p50", "µs", &ours.p50).against("hyper that SELECTs", both.p50));
        table.add(line("throughput", "requests/s", &ours.per_second).against("hyper that SELECTs", both.per_second));
        table.add(line("CPU a request", "µs", &ours.cpu).against("hyper that SELECTs", both.cpu));
        table.add(line("p50 of the baselines", "µs", &alone.p50).against("SELECT in process", select));
    }
    let after = place.answered(&server);
    let [memory, database, _] = [0, 1, 2].map(|tier| after[tier] - before[tier]);
    let shares = [
        ("answered by the database", database / (database + memory)),
        ("too many to be recorded one by one", place.summed(&server) / (database + memory)),
    ];
    for (what, share) in shares {
        table.add(Line::new("database", format!("{name}: {what}, of all"), "", Samples::one(share)));
    }
    if engine == Engine::Sqlite {
        table.add(Line::new("database", "AES-256-GCM opens 100 B", "µs", open_plainly(100)));
    }
}

/// A plain SELECT in process.
enum Rows {
    Sqlite(select::Rows),
    Postgres(Box<(tokio::runtime::Runtime, select::Client)>),
}

impl Rows {
    fn open(place: &Place) -> Self {
        match place.file() {
            Some(file) => Self::Sqlite(select::Rows::open(file)),
            None => {
                // On one thread: the answer need not be handed from one to another.
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let client = runtime.block_on(select::Client::connect(&place.database));
                Self::Postgres(Box::new((runtime, client)))
            }
        }
    }

    fn ids(&mut self, most: usize) -> Vec<String> {
        match self {
            Self::Sqlite(rows) => rows.ids(most),
            Self::Postgres(both) => both.0.block_on(both.1.ids(most)),
        }
    }

    /// The median over these rows, in microseconds.
    fn time(&mut self, ids: &[String]) -> f64 {
        let took = ids.iter().map(|id| {
            let began = Instant::now();
            let text = match self {
                Self::Sqlite(rows) => rows.one(id),
                Self::Postgres(both) => both.0.block_on(both.1.one(id)),
            };
            assert!(!text.is_empty());
            began.elapsed().as_secs_f64() * 1e6
        });
        Samples(took.collect()).median()
    }
}

/// What the cipher alone takes to open so many bytes, in microseconds.
fn open_plainly(bytes: usize) -> Samples {
    const TIMES: u32 = 20_000;
    let cipher = Aes256Gcm::new(&[7; 32].into());
    let nonce = Nonce::<U12>::from([1; 12]);
    let mut sealed = vec![b'v'; bytes];
    let tag: Tag<U16> = cipher.encrypt_inout_detached(&nonce, b"", sealed.as_mut_slice().into()).unwrap();
    let round = || {
        let began = Instant::now();
        for _ in 0..TIMES {
            let mut buffer = sealed.clone();
            cipher.decrypt_inout_detached(&nonce, b"", buffer.as_mut_slice().into(), &tag).unwrap();
            std::hint::black_box(&buffer);
        }
        began.elapsed().as_secs_f64() * 1e6 / f64::from(TIMES)
    };
    Samples((0..5).map(|_| round()).collect())
}

/// A tenant that nobody has asked for yet: its folder is read from upstream, stored sealed,
/// and kept in memory.
pub(crate) fn cold(pace: &Pace, table: &mut Table) {
    const A_ROUND: usize = 60;
    let shape = Shape { prefix: "t", tenants: A_ROUND * pace.rounds, keys: 20, value: 100 };
    let upstream = Upstream::start(shape);
    let place = Place::before(&upstream, "hybrid");
    let server = place.serve(&[]);
    let mut ours = Client::connect(&server.url, &place.token);
    let mut direct = Client::connect(&upstream.url, &upstream.token);
    // The login and the list of tenants are for all.
    ours.get("/v1/tenants/nobody/secrets/KEY");
    let (mut cold, mut read) = (Samples::default(), Samples::default());
    for round in 0..pace.rounds {
        let tenants = round * A_ROUND..(round + 1) * A_ROUND;
        cold.add(Samples(tenants.clone().map(|tenant| ours.time(&shape.path(tenant, 0))).collect()).median());
        let folders = tenants.map(|tenant| upstream.folder(&shape.tenant(tenant)));
        read.add(Samples(folders.map(|folder| direct.time(&folder)).collect()).median());
    }
    let line = Line::new("cold", "a tenant of 20 secrets, from upstream: p50", "µs", cold);
    table.add(line.against("reading its folder", read));
}

/// Many secrets in one answer.
pub(crate) fn many(pace: &Pace, table: &mut Table) {
    const SHAPE: Shape<'static> = Shape { prefix: "t", tenants: 1, keys: 100, value: 100 };
    let place = Place::new(Engine::Sqlite);
    fill(&place, SHAPE);
    let server = place.serve(&[]);
    let all: Vec<String> = (0..SHAPE.keys).map(|key| SHAPE.path(0, key)).collect();
    ask_all(&server.url, &place.token, &all, 1);
    let tenant = format!("/v1/tenants/{}/secrets", SHAPE.tenant(0));
    let (path, list) = (format!("{tenant}/batch-get"), format!("{tenant}?values=true"));
    let keys: Vec<String> = (0..20).map(key_name).collect();
    let asked = serde_json::json!({ "keys": keys }).to_string();
    let batch = Script::write(place.path(), "batch", &place.token, &Requests::Post(&path, &asked));
    let whole = Script::write(place.path(), "list", &place.token, &Requests::Of(&list));
    // Where upstream owns them, memory answers for all of a folder; the database answers for its own.
    let upstream = Upstream::start(SHAPE);
    let of_upstream = Place::before(&upstream, "infisical");
    let remembering = of_upstream.serve(&[]);
    let length = Client::connect(&remembering.url, &of_upstream.token).get(&list).ok().len();
    let remembered = Script::write(of_upstream.path(), "list", &of_upstream.token, &Requests::Of(&list));
    let single: usize = Client::connect(&server.url, &place.token).get(&all[0]).ok().len();
    let cases = [
        ("batch-get of 20 from memory", &server, &batch, single * 20),
        ("?values=true of 100 from memory", &remembering, &remembered, length),
        ("?values=true of 100 from SQLite", &server, &whole, length),
    ];
    for (what, server, script, body) in cases {
        let hyper = Server::bare_of(body);
        let (mut ours, mut alone) = (Load::default(), Load::default());
        for _ in 0..pace.few {
            ours.round(server, script, 16, pace.short);
            alone.round(&hyper, script, 16, pace.short);
        }
        let line = |figure: &str, unit: &'static str, ours: Samples, hyper: Samples| {
            Line::new("many", format!("{what}, 16 connections: {figure}"), unit, ours).against("hyper", hyper)
        };
        table.add(line("throughput", "requests/s", ours.per_second, alone.per_second));
        table.add(line("p50", "µs", ours.p50, alone.p50));
        table.add(line("CPU a request", "µs", ours.cpu, alone.cpu));
        // What the one before has left to do is no part of the next.
        std::thread::sleep(Duration::from_millis(100));
    }
}
