//! The TypeScript client: what a lookup costs the process that asks, beside `node:http` that asks hyper for
//! as many bytes and headers, over TCP and over a Unix socket, and beside `node:http` that asks the program
//! itself, which leaves the client's own share; and what a lookup that it keeps costs, beside a `Map`.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use serde::Deserialize;

use crate::{
    Pace,
    stage::Server,
    table::{Line, Samples, Table, Target},
};

/// Bytes of the answer that `bench.mjs` asks for: a secret of 40 bytes in JSON.
const BODY: usize = 108;

/// One way to ask, in rounds.
#[derive(Clone, Deserialize)]
struct Asked {
    /// Microseconds.
    p50: Vec<f64>,
    /// Microseconds of the asking process for one request.
    cpu: Vec<f64>,
}

/// The output of `bench.mjs --json`.
#[derive(Deserialize)]
struct Figures {
    body: usize,
    http_tcp: Asked,
    http_unix: Asked,
    /// `node:http` that asks the program itself.
    own_tcp: Asked,
    own_unix: Asked,
    get_tcp: Asked,
    get_unix: Asked,
    fetch_tcp: Asked,
    /// Microseconds.
    cached: Vec<f64>,
    cached_of_many: Vec<f64>,
    map: Vec<f64>,
    map_of_many: Vec<f64>,
}

pub(crate) fn client(pace: &Pace, table: &mut Table) {
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/typescript");
    if !package.join("dist").exists() || !package.join("node_modules").exists() {
        return println!(
            "left out: the client is not built (scripts/bench does it, where there is Node and a network)"
        );
    }
    let folder = tempfile::TempDir::new().unwrap();
    let socket = folder.path().join("hyper");
    let hyper =
        Server::bare(&[], &["--headed", "--body", &BODY.to_string(), "--socket", socket.to_str().unwrap()], &[]);
    let measured = Command::new("node")
        .args(["bench.mjs", "--json"])
        .current_dir(&package)
        .env("SECRETIER_BIN", env!("CARGO_BIN_EXE_secretier"))
        .env("HYPER_URL", &hyper.url)
        .env("HYPER_SOCKET", &socket)
        .env("ROUNDS", if pace.quick { "15" } else { "61" })
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    hyper.end();
    assert!(measured.status.success(), "node bench.mjs: {}", measured.status);
    let figures: Figures = serde_json::from_slice(&measured.stdout).unwrap();
    assert_eq!(figures.body, BODY, "hyper is to answer with as many bytes");
    let against = |what: &str, ours: Asked, name: &str, floor: &Asked, target: Option<f64>| {
        let line = |what: String, ours: Vec<f64>, floor: &[f64]| {
            let line = Line::new("client", what, "µs", Samples(ours)).against(name, Samples(floor.to_vec()));
            match target {
                Some(most) => line.target(Target::AtMost(most)),
                None => line,
            }
        };
        [
            line(format!("{what}: p50"), ours.p50, &floor.p50),
            line(format!("{what}: CPU of the caller"), ours.cpu, &floor.cpu),
        ]
    };
    let (tcp, unix) = (figures.http_tcp, figures.http_unix);
    let [get_tcp, get_unix] = [&figures.get_tcp, &figures.get_unix].map(Asked::clone);
    let lines = [
        against("get, TCP", get_tcp, "node:http to hyper", &tcp, Some(1.15)),
        against("get, TCP, less the server", figures.get_tcp, "node:http to secretier", &figures.own_tcp, Some(1.15)),
        against("get, Unix socket", get_unix, "node:http to hyper", &unix, Some(1.15)),
        against(
            "get, Unix socket, less the server",
            figures.get_unix,
            "node:http to secretier",
            &figures.own_unix,
            Some(1.15),
        ),
        against("global fetch, TCP", figures.fetch_tcp, "node:http to hyper", &tcp, None),
    ];
    lines.into_iter().flatten().for_each(|line| table.add(line));
    let kept = |what: &str, ours: Vec<f64>, map: Vec<f64>| {
        Line::new("client", what, "µs", Samples(ours)).against("a Map", Samples(map))
    };
    table.add(Line::new("client", "get, cached", "µs", Samples(figures.cached.clone())).target(Target::AtMost(1.0)));
    table.add(kept("get, cached, one secret", figures.cached, figures.map));
    table.add(kept("get, cached, one of 10,000", figures.cached_of_many, figures.map_of_many));
}
