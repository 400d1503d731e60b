//! The `secretier` command: parse, run, exit.

use std::{process::ExitCode, time::Duration};

use clap::Parser as _;
use rustix::process::{Resource, Rlimit, setrlimit};
use secretier::cli::{Cli, Failure};
use tikv_jemallocator::Jemalloc;
use zeroizing_alloc::ZeroAlloc;

/// Wipes all freed memory. Our own types wipe themselves; this is for data that passes through the
/// buffers of others: hyper's, reqwest's, serde's, or a text that grows and moves.
///
/// Freed memory goes back to the system within about ten seconds. glibc keeps memory that many
/// requests took at once for as long as something small lies behind it.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<Jemalloc> = ZeroAlloc(Jemalloc);

fn main() -> ExitCode {
    forbid_core_dumps();
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::failed("the asynchronous runtime cannot be started", error)),
    };
    let outcome = runtime.block_on(cli.run());
    // All work for the end is done. A thread may hang with its disk, perhaps for ever.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match outcome {
        Ok(code) => code,
        Err(failure) => report(&failure),
    }
}

/// A core dump holds the memory as it is, with values and keys in it. The limit keeps it from being
/// written to a file. A process that is not dumpable is also not piped to a crash handler, which
/// the limit does not prevent (core(5)), and cannot be read by other processes of its user.
#[expect(clippy::print_stderr, reason = "the log is not started yet, and commands have none")]
fn forbid_core_dumps() {
    let warn = |what: &str, error: rustix::io::Errno| {
        eprintln!("secretier: warning: {what}, so a crash may write secrets to disk: {error}");
    };
    if let Err(error) = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }) {
        warn("core dumps cannot be switched off", error);
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
            warn("this process cannot be made undumpable", error);
        }
    }
}

#[expect(clippy::print_stderr, reason = "this is where a command's failure is told")]
fn report(failure: &Failure) -> ExitCode {
    eprintln!("secretier: {failure}");
    ExitCode::from(failure.code())
}
