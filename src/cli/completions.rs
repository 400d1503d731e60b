//! `secretier completions`

use std::process::ExitCode;

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, Failure};

#[derive(Debug, Args)]
pub(super) struct Completions {
    /// The shell that the script is for
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        clap_complete::generate(self.shell, &mut Cli::command(), "secretier", &mut std::io::stdout());
        Ok(ExitCode::SUCCESS)
    }
}
