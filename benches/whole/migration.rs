//! From upstream to the database, by the command, where upstream sets no limit. Beside it what
//! cannot be done without: reading the folders, and writing as many rows.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use diesel::{Connection as _, SqliteConnection, connection::SimpleConnection as _};

use crate::{
    Pace,
    client::Client,
    fill::{Shape, sealed},
    stage::{Engine, Place, Process},
    table::{Line, Samples, Table, Target},
    upstream::Upstream,
};

const MIB: f64 = (1 << 20) as f64;
const KEYS: usize = 5;

pub(crate) fn migration(pace: &Pace, table: &mut Table) {
    let sizes: &[usize] = if pace.quick { &[1000] } else { &[1000, 10_000] };
    for &tenants in sizes {
        let shape = Shape { prefix: "t", tenants, keys: KEYS, value: 100 };
        for strategy in ["folder", "recursive"] {
            let (mut wall, mut cpu, mut peak, mut calls) =
                (Samples::default(), Samples::default(), Samples::default(), Samples::default());
            let (mut read, mut insert) = (Samples::default(), Samples::default());
            for _ in 0..if pace.quick { 1 } else { 3 } {
                let mut upstream = Upstream::start(shape);
                let seen = run(&mut upstream, shape, strategy);
                let secrets = shape.count() as f64;
                wall.add(secrets / seen.seconds);
                cpu.add(seen.cpu * 1e6 / secrets);
                peak.add(seen.peak / MIB);
                calls.add(seen.calls);
                read.add(secrets / read_and_forget(&upstream, shape));
                insert.add(secrets / insert_plainly(shape));
            }
            let line = |figure: &str, unit: &'static str, samples: Samples| {
                let what = format!("{tenants} tenants of {KEYS}, --strategy {strategy}: {figure}");
                Line::new("migration", what, unit, samples)
            };
            table.add(line("throughput", "secrets/s", wall.clone()).target(Target::AtLeast(20_000.0)));
            table.add(line("throughput", "secrets/s", wall.clone()).against("reading the folders once", read));
            table.add(line("throughput", "secrets/s", wall).against("plain INSERTs into SQLite", insert));
            table.add(line("our CPU a secret", "µs", cpu));
            table.add(line("most memory", "MiB", peak));
            table.add(line("calls upstream", "calls", calls));
        }
    }
}

struct Seen {
    seconds: f64,
    cpu: f64,
    peak: f64,
    calls: f64,
}

fn run(upstream: &mut Upstream, shape: Shape<'_>, strategy: &str) -> Seen {
    let place = Place::before(upstream, "infisical");
    upstream.calls();
    let arguments = ["migrate", "run", "--all", "--cutover", "--json", "--strategy", strategy];
    let mut command = place.command(&[], &arguments, &[]);
    let began = Instant::now();
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let process = Process(child.id());
    let mut peak = 0.0_f64;
    while !process.has_ended() {
        peak = peak.max(process.peak().unwrap_or(0.0));
        std::thread::sleep(Duration::from_millis(2));
    }
    let seconds = began.elapsed().as_secs_f64();
    // As long as nobody has asked how it ended, the kernel knows what it took.
    let cpu = process.cpu();
    assert!(child.wait().unwrap().success(), "the migration of {} tenants failed", shape.tenants);
    let calls = upstream.calls()["total"].as_f64().unwrap();
    Seen { seconds, cpu, peak, calls }
}

/// Seconds to read every folder once, as many at a time as the product does, and to throw away
/// what comes.
fn read_and_forget(upstream: &Upstream, shape: Shape<'_>) -> f64 {
    const AT_ONCE: usize = 16;
    let began = Instant::now();
    std::thread::scope(|scope| {
        for reader in 0..AT_ONCE {
            scope.spawn(move || {
                let mut client = Client::connect(&upstream.url, &upstream.token);
                for tenant in (reader..shape.tenants).step_by(AT_ONCE) {
                    client.get(&upstream.folder(&shape.tenant(tenant))).ok();
                }
            });
        }
    });
    began.elapsed().as_secs_f64()
}

/// Seconds to insert as many rows of that size into the same tables, as durable as the
/// product's, in transactions as large as its batches become.
fn insert_plainly(shape: Shape<'_>) -> f64 {
    const BATCH: usize = 200;
    let place = Place::new(Engine::Sqlite);
    let mut connection = SqliteConnection::establish(place.file().unwrap()).unwrap();
    let setup =
        "PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = ON; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON";
    connection.batch_execute(setup).unwrap();
    let batches: Vec<_> = sealed(&place, shape, BATCH).collect();
    let began = Instant::now();
    for batch in batches {
        batch.insert(&mut connection);
    }
    began.elapsed().as_secs_f64()
}
