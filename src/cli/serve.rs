//! `secretier serve`

use std::process::ExitCode;

use clap::Args;

use super::{ConfigFile, Failure, stopped};
use crate::{
    app::{App, StartError},
    clock::Clock,
    log,
    server::Listeners,
};

#[derive(Debug, Args)]
pub(super) struct Serve {
    #[command(flatten)]
    config: ConfigFile,
}

impl Serve {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        // What was read beside the values ends here: it may hold secrets as they were written.
        let config = self.config.read()?.config;
        log::start(&config.log);
        let app = App::start(&config, Clock::system()).await?;
        let listeners = Listeners::bind(&config.server).await;
        let listeners = listeners.map_err(|error| Failure::failed("cannot start", error))?;
        let stopped = stopped();
        if let Ok(address) = listeners.tcp.local_addr() {
            tracing::info!(%address, environment = config.environment.as_str(), phase = %config.phase(), "serving");
        }
        app.serve(listeners, stopped).await;
        Ok(ExitCode::SUCCESS)
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let failure = Self::failed("cannot start", &error);
        match error {
            StartError::Database(_) => failure,
            StartError::Setting(_)
            | StartError::Upstream(_)
            | StartError::Rules(_)
            | StartError::Keys(_)
            | StartError::NoKey(_) => Self { code: 2, ..failure },
        }
    }
}
