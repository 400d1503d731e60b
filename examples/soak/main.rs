//! A soak: three instances of the real program on one PostgreSQL, with a stand-in for
//! Infisical, under mixed load while things fail at random. Each answer is checked against
//! a small model of what may be answered. `scripts/soak` builds and runs it.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "what fails here ends the soak")]

#[path = "../../tests/support/faketime.rs"]
mod faketime;
mod faults;
mod load;
mod model;
#[path = "../../tests/support/postgres.rs"]
mod postgres;
#[path = "../../tests/support/relay.rs"]
mod relay;
mod report;
mod stage;
#[path = "../../tests/support/within.rs"]
mod within;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use tokio::sync::watch;

use crate::{model::Model, report::Report, stage::Stage};

/// Runs three instances under load and faults, and checks every answer.
///
/// PostgreSQL and Infisical fail, together too; instances are killed, stopped, cut off from
/// PostgreSQL, and their wall clocks are set by a second, an hour or three days, either way. The
/// clocks need libfaketime (Debian's package 'faketime'): where it is missing that is said, and
/// they are left as they are.
#[derive(Parser)]
struct Options {
    /// How long, in minutes. Ctrl-C ends it earlier, with the table.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// What the choices are drawn from. What runs at the same time still falls as it falls.
    #[arg(long)]
    seed: Option<u64>,
    /// Callers at the same time.
    #[arg(long, default_value_t = 16)]
    callers: u64,
    /// After how many seconds with the database within reach the other instances must know of
    /// an acknowledged write.
    #[arg(long, default_value_t = 1.0)]
    others_within: f64,
    /// Whether nothing is made to fail.
    #[arg(long)]
    calm: bool,
}

#[tokio::main]
async fn main() -> std::process::ExitCode {
    let options = Options::parse();
    let seed = options.seed.unwrap_or_else(rand::random);
    println!("seed {seed}");
    let _ = rustls::crypto::ring::default_provider().install_default();

    let mut stage = Stage::set().await;
    let model = Arc::new(Model::new(Duration::from_secs_f64(options.others_within)));
    let report = Arc::new(Report::new());
    load::prepare(&stage.scene, &model).await;
    report.memory_at_start(&stage.resident());

    let (stop, stopped) = watch::channel(false);
    let callers: Vec<_> = (0..options.callers)
        .map(|number| {
            let scene = Arc::clone(&stage.scene);
            let (model, report, stopped) = (Arc::clone(&model), Arc::clone(&report), stopped.clone());
            tokio::spawn(load::caller(seed ^ (number + 1), scene, model, report, stopped))
        })
        .collect();
    let end = Instant::now() + Duration::from_secs_f64(options.minutes * 60.0);
    let failing = faults::strike(seed, &mut stage, &model, &report, stopped, options.calm);
    let over = async {
        tokio::select! {
            () = tokio::time::sleep_until(end.into()) => {}
            _ = tokio::signal::ctrl_c() => println!("ending"),
        }
        stop.send_replace(true);
    };
    tokio::join!(failing, over);
    for caller in callers {
        caller.await.unwrap();
    }
    report.memory_at_end(&stage.resident());
    let is_good = report.print(&model, seed);
    if !is_good {
        println!("the logs of the instances are in {}", stage.keep_logs().display());
    }
    if is_good { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}
