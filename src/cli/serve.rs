//! `secretier serve`

use std::process::ExitCode;

use clap::Args;

use super::{
    ConfigFile, Failure,
    reload::{Hangups, Look, Reloading},
    service_manager::ServiceManager,
    stopped,
};
use crate::{
    app::{App, StartError, raise_limit_of_open_files},
    clock::Clock,
    log,
    server::{BindError, Inherited, Listeners},
    tiers::database::StoreError,
};

#[derive(Debug, Args)]
pub(super) struct Serve {
    #[command(flatten)]
    config: ConfigFile,
}

impl Serve {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let inherited = Inherited::take();
        let hangups = Hangups::listen();
        let found = Look::at(self.config.config.as_deref());
        // Everything read beside the values is dropped here: it may hold secrets in plain text.
        let (config, file, warnings) = {
            let loaded = self.config.read()?;
            let warnings = loaded.warnings();
            (loaded.config, loaded.file, warnings)
        };
        let log = log::start(&config.log);
        warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        raise_limit_of_open_files();
        let inherited = inherited.map_err(BindError::from)?;
        let app = App::start(&config, Clock::system()).await?;
        let listeners = Listeners::bind_beside(&config.server, inherited).await?;
        let stopped = stopped();
        let address: Vec<String> = listeners.addresses().iter().map(ToString::to_string).collect();
        let (address, environment) = (address.join(","), config.environment.as_str());
        tracing::info!(%address, environment, phase = %config.phase(), "serving");
        let manager = ServiceManager::new(format!("serving on {address}"));
        log.serve(&config.log, &app.service().metrics);
        let telling = tokio::spawn(log.clone().follow());
        let reloading = Reloading::new(file, found, config.server.watch_config, log.clone(), &app, manager.clone());
        let reloading = tokio::spawn(reloading.follow(hangups));
        // From here on connections are taken: those that have come to the sockets wait there.
        manager.serving().await;
        let watched = tokio::spawn(ServiceManager::keep_watchdog());
        let stopped = async {
            stopped.await;
            manager.stopping().await;
        };
        let served = app.serve(listeners, stopped).await;
        watched.abort();
        reloading.abort();
        telling.abort();
        log.tell_left_out();
        served?;
        Ok(ExitCode::SUCCESS)
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let failure = Self::failed("cannot start", &error);
        match error {
            StartError::Database(
                StoreError::InvalidUrl(_) | StoreError::InvalidConfig(_) | StoreError::SharedSessions,
            )
            | StartError::Upstream(_)
            | StartError::Rules(_)
            | StartError::Outgoing(_)
            | StartError::Keys(_)
            | StartError::NoKey(_) => Self { code: 2, ..failure },
            StartError::Database(_)
            | StartError::DatabaseDown(_)
            | StartError::OfflineCopy { .. }
            | StartError::OtherDerivation => failure,
        }
    }
}

impl From<BindError> for Failure {
    fn from(error: BindError) -> Self {
        let failure = Self::failed("cannot start", &error);
        match error {
            BindError::Tls(_) | BindError::Inherited(_) => Self { code: 2, ..failure },
            BindError::Socket { .. } => failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_cannot_be_meant_is_wrong_configuration() {
        let code = |error: StoreError| Failure::from(StartError::Database(error)).code;
        assert_eq!(code(StoreError::InvalidUrl("the folder /nowhere does not exist".to_owned())), 2);
        assert_eq!(code(StoreError::InvalidConfig("pool_size")), 2);
        assert_eq!(code(StoreError::SharedSessions), 2);
        assert_eq!(code(StoreError::NameTaken("ci".to_owned())), 1);
    }
}
