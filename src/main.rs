//! The `secretier` command: parse, run, exit.

use std::process::ExitCode;

use clap::Parser as _;
use secretier::cli::{Cli, Failure};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::failed("the asynchronous runtime cannot be started", error)),
    };
    match runtime.block_on(cli.run()) {
        Ok(code) => code,
        Err(failure) => report(&failure),
    }
}

#[expect(clippy::print_stderr, reason = "this is where a command's failure is told")]
fn report(failure: &Failure) -> ExitCode {
    eprintln!("secretier: {failure}");
    ExitCode::from(failure.code())
}
