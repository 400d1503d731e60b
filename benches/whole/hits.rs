//! A secret that memory has, asked for over HTTP with all that a request meets: its token, the
//! limits, the audit, the metrics. Beside it hyper alone, which knows one body.

use crate::{
    Pace,
    callgrind::{self, Cost, SETTINGS},
    client::Client,
    fill::{Shape, fill},
    stage::{Engine, Place, Server},
    table::{Line, Samples, Table, Target},
    wrk::{Requests, Script},
};

const SIZES: [(usize, &str); 3] = [(100, "100 B"), (4 << 10, "4 KiB"), (64 << 10, "64 KiB")];
const SHAPES: [Shape<'static>; 3] = [
    Shape { prefix: "small", tenants: 1, keys: 1, value: SIZES[0].0 },
    Shape { prefix: "middle", tenants: 1, keys: 1, value: SIZES[1].0 },
    Shape { prefix: "large", tenants: 1, keys: 1, value: SIZES[2].0 },
];

fn place() -> Place {
    let place = Place::new(Engine::Sqlite);
    for shape in SHAPES {
        fill(&place, shape);
    }
    place
}

/// Bytes of the answer's body, for hyper to send as many.
fn body(server: &Server, token: &str, path: &str) -> usize {
    Client::connect(&server.url, token).get(path).ok().len()
}

pub(crate) fn hits(pace: &Pace, table: &mut Table) {
    let place = place();
    let server = place.serve(&[]);
    for ((_, size), shape) in SIZES.into_iter().zip(SHAPES) {
        let path = shape.path(0, 0);
        let bare = Server::bare_of(body(&server, &place.token, &path));
        let script = Script::write(place.path(), shape.prefix, &place.token, &Requests::Of(&path));
        let (all, seconds): (&[usize], _) = match pace.quick {
            true if shape.value > 100 => (&[64], pace.short),
            true => (&[1, 64], pace.seconds),
            false => (&[1, 16, 64], pace.seconds),
        };
        for &connections in all {
            let mut both = [Load::default(), Load::default()];
            for _ in 0..pace.rounds {
                both[0].round(&server, &script, connections, seconds);
                both[1].round(&bare, &script, connections, seconds);
            }
            let [ours, hyper] = both;
            let what = |figure: &str| format!("{size}, {connections} connections: {figure}");
            let line = |figure: &str, unit: &'static str, ours: Samples, hyper: Samples| {
                Line::new("hits", what(figure), unit, ours).against("hyper", hyper)
            };
            let throughput = line("throughput", "requests/s", ours.per_second, hyper.per_second);
            let p99 = line("p99", "µs", ours.p99, hyper.p99);
            let (throughput, p99) = match connections {
                64 => (throughput.target(Target::AtLeast(0.95)), p99.target(Target::AtMost(1.2))),
                _ => (throughput, p99),
            };
            table.add(throughput);
            table.add(line("p50", "µs", ours.p50, hyper.p50));
            table.add(p99);
            table.add(line("CPU a request", "µs", ours.cpu, hyper.cpu));
        }
    }
}

/// What rounds of load show of one server.
#[derive(Default)]
pub(crate) struct Load {
    pub(crate) per_second: Samples,
    pub(crate) p50: Samples,
    pub(crate) p99: Samples,
    /// Of the server, in microseconds a request.
    pub(crate) cpu: Samples,
}

impl Load {
    pub(crate) fn round(&mut self, server: &Server, script: &Script, connections: usize, seconds: u64) {
        let before = server.process().cpu();
        let seen = script.run(&server.url, connections, seconds);
        let spent = server.process().cpu() - before;
        self.per_second.add(seen.per_second);
        self.p50.add(seen.p50);
        self.p99.add(seen.p99);
        self.cpu.add(spent * 1e6 / seen.requests);
    }
}

/// The same in instructions and allocations, which do not depend on what else the machine does.
/// Beside it hyper that sends a body, and hyper that sends a head like ours before it.
pub(crate) fn instructions(pace: &Pace, table: &mut Table) {
    let place = place();
    for ((_, size), shape) in SIZES.into_iter().zip(SHAPES) {
        let path = shape.path(0, 0);
        let body = body(&place.serve(&[]), &place.token, &path).to_string();
        let serve = |valgrind: &[&str]| place.serve_under(valgrind, SETTINGS);
        let bare = |valgrind: &[&str]| Server::bare(valgrind, &["--body", &body], SETTINGS);
        let headed = |valgrind: &[&str]| Server::bare(valgrind, &["--body", &body, "--headed"], SETTINGS);
        let with_head = !pace.quick || shape.value == SIZES[0].0;
        let count = |name: &str, start: &(dyn Fn(&[&str]) -> Server + Sync)| {
            callgrind::per_request(place.path(), name, start, &place.token, &path)
        };
        let (mut ours, mut hyper, mut head) = (Costs::default(), Costs::default(), Costs::default());
        for _ in 0..pace.counts {
            // Side by side, for none is changed by what else the machine does.
            std::thread::scope(|scope| {
                let of_hyper = scope.spawn(|| count("hyper", &bare));
                ours.add(count("ours", &serve));
                hyper.add(of_hyper.join().unwrap());
            });
            if with_head {
                head.add(count("headed", &headed));
            }
        }
        let line = |unit, ours: &Samples, beside: &str, of_beside: &Samples| {
            Line::new("instructions", size, unit, ours.clone()).against(beside, of_beside.clone())
        };
        let (least, like_ours) = ("hyper", "hyper with our headers");
        let [unit, allocations] = ["instructions a request", "allocations a request"];
        table.add(line(unit, &ours.instructions, least, &hyper.instructions).target(Target::AtMost(1.25)).repeats());
        if with_head {
            table.add(line(unit, &ours.instructions, like_ours, &head.instructions));
        }
        // Hyper alone makes two; two more are the bound.
        table
            .add(line(allocations, &ours.allocations, least, &hyper.allocations).target(Target::AtMost(2.0)).repeats());
    }
}

#[derive(Default)]
struct Costs {
    instructions: Samples,
    allocations: Samples,
}

impl Costs {
    fn add(&mut self, cost: Cost) {
        self.instructions.add(cost.instructions);
        self.allocations.add(cost.allocations);
    }
}
