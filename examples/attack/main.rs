//! Attacks on a release build over loopback, each bounded in time and judged by what
//! `docs/SECURITY.md` tells. `scripts/attack` builds and runs it.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "what fails here ends the run")]

mod replay;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use bytesize::ByteSize;
use clap::{Parser, ValueEnum as _};

use crate::replay::{Attack, Form, Observed, Program, mb};

/// Attacks an instance over loopback; exits 1 where it spends more than it may.
#[derive(Parser)]
#[command(name = "attack")]
struct Options {
    /// These attacks alone.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<Attack>,
    /// The build to attack; else the one that was built with this program.
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// What memory the storm of 1,000 connections must fit into.
    #[arg(long = "in", value_name = "SIZE", default_value = "512MiB")]
    limit: ByteSize,
    /// Words of a command that runs the instance, as 'systemd-run --user --scope -p MemoryMax=512M'.
    #[arg(long, value_name = "WORDS", default_value = "")]
    under: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    replay::allow_connections();
    // Cargo puts examples one folder below the programs.
    let own = std::env::current_exe().unwrap();
    let built = || own.parent().and_then(Path::parent).unwrap().join("secretier");
    let program = Program {
        path: std::path::absolute(options.binary.unwrap_or_else(built)).unwrap(),
        under: options.under.split_whitespace().map(str::to_owned).collect(),
    };
    let attacks = if options.only.is_empty() { Attack::value_variants() } else { &options.only };
    let began = Instant::now();
    let mut beyond = 0;
    for attack in attacks {
        let observed = replay::replay(*attack, Form::Long, &program, Some(options.limit.as_u64())).await;
        print(&observed);
        beyond += usize::from(!observed.beyond.is_empty());
    }
    println!("\n{} attacks in {:.0?}, {beyond} beyond their bounds", attacks.len(), began.elapsed());
    if beyond == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(observed: &Observed) {
    let row = |what: &str, text: String| println!("  {what:<34} {text}");
    let name = observed.attack.to_possible_value().unwrap();
    println!("\n{}: {}", name.get_name(), observed.told);
    let [before, most, after] = observed.memory;
    row(
        "memory before, at most, 10 s after",
        format!("{}, {} (+{}), {}", mb(before), mb(most), mb(most - before), mb(after)),
    );
    row("disk before, after", format!("{}, {}", mb(observed.disk[0]), mb(observed.disk[1])));
    let Observed { rows, accounted, answered, lines, .. } = observed;
    row(
        "rows of the audit, lines of the log",
        format!("{rows} (of {accounted} requests; {answered} were answered), {lines}"),
    );
    for (what, [quiet, then]) in [("reads", &observed.reads), ("writes", &observed.writes)] {
        let [p50, p95, p50_then, p95_then] = [quiet.at(0.5), quiet.at(0.95), then.at(0.5), then.at(0.95)];
        let what = format!("a good caller's {what}: p50, p95");
        let text = format!("{p50:.2?}, {p95:.2?} before; {p50_then:.2?}, {p95_then:.2?} then");
        row(&what, format!("{text}, longest {:.2?}; {} of {} failed", then.longest(), then.failed.len(), then.count()));
    }
    for beyond in &observed.beyond {
        row("BEYOND", beyond.clone());
    }
}
