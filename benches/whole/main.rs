//! How fast the product is, beside the least that the same work could cost, in one run on one
//! machine. `scripts/bench` builds and runs it; `docs/PERFORMANCE.md` says what each figure means.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "what fails here ends the run")]

mod bare;
mod callgrind;
mod calls;
mod client;
mod fill;
mod growth;
mod hits;
mod lower;
mod memory;
mod migration;
#[path = "../../tests/support/postgres.rs"]
mod postgres;
mod select;
mod stage;
mod table;
mod typescript;
mod upstream;
#[path = "../../tests/support/within.rs"]
mod within;
mod wrk;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Instant, SystemTime},
};

use clap::{Parser, Subcommand, ValueEnum};
use secretier::clock::Timestamp;
use serde_json::json;

use crate::table::{Kept, Table};

/// Measures the program beside its baselines.
#[derive(Parser)]
#[command(name = "bench", args_conflicts_with_subcommands = true)]
struct Options {
    /// In two minutes what matters most.
    #[arg(long)]
    quick: bool,
    /// These sections alone.
    #[arg(long, value_delimiter = ',', value_name = "SECTION")]
    only: Vec<Section>,
    /// Instructions and allocations alone, which a busy machine does not change.
    #[arg(long, conflicts_with = "only")]
    instructions: bool,
    /// Where the figures go, as JSON; else into `bench/` of cargo's target folder.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Keep instructions and allocations in benches/kept.json, for later runs to compare with.
    #[arg(long)]
    keep: bool,
    /// Exit 1 where one of them has grown by more than 5 %.
    #[arg(long)]
    check: bool,
    /// What cargo tells every bench.
    #[arg(long, hide = true)]
    bench: bool,
    #[command(subcommand)]
    process: Option<Process>,
}

/// What this program starts itself as.
#[derive(Subcommand)]
enum Process {
    #[command(hide = true)]
    Bare(bare::Bare),
    #[command(hide = true)]
    StandIn(upstream::StandInServer),
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    Instructions,
    Hits,
    Database,
    Cold,
    Many,
    Calls,
    Cached,
    Client,
    Migration,
    Start,
    Growth,
}

/// How much is done.
struct Pace {
    quick: bool,
    /// Times that each side has its turn.
    rounds: usize,
    /// The same where there are many cases.
    few: usize,
    /// How long a turn is.
    seconds: u64,
    /// The same there.
    short: u64,
    /// Times that instructions are counted.
    counts: usize,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match options.process {
        Some(Process::Bare(bare)) => {
            bare.run();
            ExitCode::SUCCESS
        }
        Some(Process::StandIn(server)) => {
            server.run();
            ExitCode::SUCCESS
        }
        None => measure(&options),
    }
}

fn measure(options: &Options) -> ExitCode {
    let pace = match options.quick {
        true => Pace { quick: true, rounds: 3, few: 2, seconds: 2, short: 1, counts: 1 },
        false => Pace { quick: false, rounds: 5, few: 5, seconds: 4, short: 3, counts: 3 },
    };
    let wanted = |section: &Section| match (options.instructions, options.only.as_slice()) {
        (true, _) => *section == Section::Instructions,
        (false, []) => true,
        (false, only) => only.contains(section),
    };
    let (began, stock, mut table) = (Instant::now(), growth::Stock::default(), Table::default());
    for section in Section::value_variants().iter().filter(|section| wanted(section)) {
        let name = section.to_possible_value().unwrap();
        println!("\n== {} ({} s)", name.get_name(), began.elapsed().as_secs());
        match section {
            Section::Instructions => hits::instructions(&pace, &mut table),
            Section::Hits => hits::hits(&pace, &mut table),
            Section::Database => lower::database(&pace, &mut table),
            Section::Cold => lower::cold(&pace, &mut table),
            Section::Many => lower::many(&pace, &mut table),
            Section::Calls => calls::calls(&mut table),
            Section::Cached => memory::cached(&pace, &mut table),
            Section::Client => typescript::client(&pace, &mut table),
            Section::Migration => migration::migration(&pace, &mut table),
            Section::Start => memory::start(&pace, &stock, &mut table),
            // The larger databases alone take longer to fill than a quick run.
            Section::Growth if pace.quick => println!("left out of a quick run"),
            Section::Growth => growth::growth(&pace, &stock, &mut table),
        }
        table.print();
    }

    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/kept.json");
    println!("\n== beside what was kept");
    let is_good = table.compare(&Kept::read(&kept));
    if options.keep {
        Kept::read(&kept).replace(&table, &kept);
    }
    for missed in table.missed() {
        println!("missed: {missed}");
    }
    let file = options.json.clone().unwrap_or_else(|| stage::target().join("bench").join(file_name()));
    write(&file, &table, options.quick);
    println!("\n{} s; all figures: {}", began.elapsed().as_secs(), file.display());
    if options.check && !is_good { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn now() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap()).to_rfc3339()
}

fn file_name() -> String {
    format!("{}.json", now().replace(':', "-"))
}

fn write(file: &Path, table: &Table, quick: bool) {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).unwrap();
    }
    let figures = json!({
        "made_at": now(),
        "version": env!("CARGO_PKG_VERSION"),
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
        "quick": quick,
        "lines": table.json(),
    });
    std::fs::write(file, serde_json::to_string_pretty(&figures).unwrap() + "\n").unwrap();
}
