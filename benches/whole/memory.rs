//! How much memory an instance takes, and how soon it is ready.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use crate::{
    Pace,
    client::Client,
    fill::{Shape, fill},
    growth::Stock,
    stage::{Engine, Place, Process, Server, free_port},
    table::{Line, Samples, Table, Target},
};

const MIB: f64 = (1 << 20) as f64;

/// What it takes before anybody has asked for anything, and when it is ready for that.
pub(crate) fn start(pace: &Pace, stock: &Stock, table: &mut Table) {
    for engine in Engine::BOTH {
        let place = Place::new(engine);
        starts(&place, engine, "an empty database", pace, table);
    }
    if !pace.quick {
        for engine in Engine::BOTH {
            starts(stock.million(engine), engine, "a million secrets", pace, table);
        }
    }
}

fn starts(place: &Place, engine: Engine, what: &str, pace: &Pace, table: &mut Table) {
    let (mut took, mut resident, mut anonymous) = (Samples::default(), Samples::default(), Samples::default());
    let mut hyper = Samples::default();
    for _ in 0..pace.rounds {
        let (ready, [whole, own]) = until_ready(place);
        took.add(ready);
        resident.add(whole / MIB);
        anonymous.add(own / MIB);
        let began = Instant::now();
        let bare = Server::bare_of(100);
        Client::connect(&bare.url, "").get("/").ok();
        hyper.add(began.elapsed().as_secs_f64() * 1e3);
    }
    let name = engine.name();
    let line = Line::new("start", format!("{name}, {what}: until ready"), "ms", took);
    table.add(line.target(Target::AtMost(100.0)));
    let line = Line::new("start", format!("{name}, {what}: resident"), "MiB", resident);
    table.add(if what.contains("empty") { line.target(Target::AtMost(15.0)) } else { line });
    table.add(Line::new("start", format!("{name}, {what}: of that not the program's file"), "MiB", anonymous));
    table.add(Line::new("start", format!("{name}, {what}: hyper's start beside it"), "ms", hyper));
}

/// Milliseconds from the start of the process until it says that it is ready, what is
/// resident then, in bytes, and what of that is its own.
fn until_ready(place: &Place) -> (f64, [f64; 2]) {
    let address = format!("127.0.0.1:{}", free_port());
    let mut command = place.command(&[], &["serve"], &[("SECRETIER_SERVER__LISTEN", &address)]);
    let began = Instant::now();
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let is_ready = || {
        let mut client = Client::try_connect(&address, "").ok()?;
        (client.try_get("/readyz").ok()?.status == 200).then_some(())
    };
    while is_ready().is_none() {
        assert!(began.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none(), "it does not start");
        std::thread::sleep(Duration::from_micros(200));
    }
    let took = began.elapsed().as_secs_f64() * 1e3;
    let process = Process(child.id());
    let resident = [process.resident().unwrap(), process.anonymous().unwrap()];
    child.kill().unwrap();
    child.wait().unwrap();
    (took, resident)
}

/// What a secret in memory takes beyond its name, its value and its finished answer.
pub(crate) fn cached(pace: &Pace, table: &mut Table) {
    let secrets = if pace.quick { 20_000 } else { 100_000 };
    for keys in [5, 100] {
        let shape = Shape { prefix: "t", tenants: secrets / keys, keys, value: 100 };
        let place = Place::new(Engine::Sqlite);
        fill(&place, shape);
        let size_of = |server: Server| {
            // Both have answered something, and have done what is done once.
            let answer = Client::connect(&server.url, &place.token).get(&shape.path(1, 1)).ok();
            (server.process().resident().unwrap(), answer.len())
        };
        let (without, json) =
            size_of(place.serve(&[("SECRETIER_MEMORY__CAPACITY", "4GiB"), ("SECRETIER_MEMORY__WARM_TENANTS", "0")]));
        let (with, _) = size_of(place.serve_from_memory(shape));
        let beyond_answer = (with - without) / secrets as f64 - ("KEY_10".len() + json) as f64;
        let line = |what: &str, bytes: f64| {
            let what = format!("{secrets} secrets of 100 B, {keys} a tenant: beyond {what}");
            Line::new("cached", what, "B a secret", Samples::one(bytes))
        };
        // The value is kept once, in the answer.
        table.add(line("name and answer", beyond_answer));
        let least = line("name, value and answer", beyond_answer - shape.value as f64);
        // Among few secrets, what an instance takes once weighs too much.
        table.add(if pace.quick { least } else { least.target(Target::AtMost(400.0)) });
    }
}
