//! `secretier dev`: everything on one machine, nothing to set up.

use std::{os::unix::fs::DirBuilderExt as _, path::PathBuf, process::ExitCode};

use clap::Args;
use serde_json::json;
use zeroize::Zeroizing;

use super::{Failure, stopped};
use crate::{
    access::{Action, ClientCredentials, Known, NewToken, Peer},
    app::{App, raise_limit_of_open_files},
    clock::Clock,
    config::{Config, ConfigError, Loaded},
    log,
    private_file::{self, FileError},
    server::{Listen, Listeners},
    tiers::upstream::standin::{StandIn, World},
};

#[derive(Debug, Args)]
pub(super) struct Dev {
    /// Where the database, the master key and the token are kept
    #[arg(long, default_value = "secretier-dev", value_name = "DIR")]
    data_dir: PathBuf,
    /// The address to listen on, or localhost with a port; port 0 lets the system choose
    #[arg(long, default_value = "127.0.0.1:7227", value_name = "ADDRESS")]
    listen: Listen,
    /// Start without the stand-in, as if Infisical were down
    #[arg(long)]
    without_infisical: bool,
    /// Print one line of JSON when ready
    #[arg(long)]
    json: bool,
}

/// The tenants of the stand-in, and its shared folder.
const TENANTS: [&str; 3] = ["acme", "globex", "initech"];
const FOLDER: &str = "hono-api";

/// The project where there was none yet.
const NO_PROJECT: &str = "none";

impl Dev {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let failed = |error: std::io::Error| Failure::told(format!("{}: {error}", self.data_dir.display()));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.data_dir).map_err(failed)?;
        let standin = match self.without_infisical {
            true => None,
            false => Some(
                Infisical::start(self.last_project())
                    .await
                    .map_err(|error| Failure::failed("the stand-in for Infisical", error))?,
            ),
        };
        let config = self.config(standin.as_ref()).map_err(|error| Failure::told(error.to_string()))??;
        let log = log::start(&config.log);
        let clock = Clock::system();
        raise_limit_of_open_files();
        let app = App::start(&config, clock.clone()).await?;
        let token = self.token(&app, &clock).await?;
        let listeners = Listeners::bind(&config.server).await?;
        let stopped = stopped();
        let address = listeners.addresses().first().map(ToString::to_string).unwrap_or_default();
        let project = config.infisical.as_ref().map_or("", |infisical| &infisical.project_id);
        self.announce(&format!("http://{address}"), &token, project, standin.as_ref());
        log.serve(&config.log, &app.service().metrics);
        let telling = tokio::spawn(log.follow());
        let served = app.serve(listeners, stopped).await;
        telling.abort();
        served?;
        Ok(ExitCode::SUCCESS)
    }

    /// The configuration that a person would write for the same, which is written down for
    /// the other commands to be tried with.
    fn config(&self, standin: Option<&Infisical>) -> Result<Result<Config, ConfigError>, FileError> {
        let key = self.data_dir.join("master.key");
        if !key.exists() {
            let text = Zeroizing::new(hex::encode(Zeroizing::new(rand::random::<[u8; 32]>()).as_slice()) + "\n");
            private_file::replace(&key, &text)?;
        }
        // Nothing listens on the discard port: it refuses, as a server that is down does.
        let (url, project) = standin.map_or_else(
            || ("http://127.0.0.1:9".to_owned(), self.last_project().unwrap_or_else(|| NO_PROJECT.to_owned())),
            |infisical| (infisical.server.url(), infisical.server.world().project_id()),
        );
        let (id, secret) =
            standin.map_or(("none", "none"), |infisical| (&infisical.client_id, &infisical.client_secret));
        let database = format!("sqlite:{}", self.data_dir.join("secretier.db").display());
        let settings = toml::toml! {
            environment = "dev"
            phase = "hybrid"
        };
        let mut settings = settings;
        let mut set = |section: &str, values: toml::Table| settings.insert(section.to_owned(), values.into());
        let face = toml::Table::from_iter([("enabled".to_owned(), true.into())]);
        let server = [("listen", self.listen.to_string().into()), ("infisical_api", toml::Value::Table(face))];
        set("server", server.map(|(key, value)| (key.to_owned(), value)).into_iter().collect());
        set("database", toml::Table::from_iter([("url".to_owned(), database.into())]));
        // A warmed memory would answer before the database, whose answers are to be seen.
        set("memory", toml::Table::from_iter([("warm_tenants".to_owned(), 0.into())]));
        let path = format!("/{FOLDER}");
        let folder = toml::Table::from_iter([("name".to_owned(), FOLDER.into()), ("path".to_owned(), path.into())]);
        let infisical = [
            ("site_url", url.into()),
            ("project_id", project.into()),
            ("client_id", id.into()),
            ("client_secret", secret.into()),
            ("requests_per_minute", toml::Value::Integer(600)),
            ("folders", vec![toml::Value::Table(folder)].into()),
        ];
        set("infisical", infisical.map(|(key, value)| (key.to_owned(), value)).into_iter().collect());
        let source = format!("file:{}", key.display());
        set("keys", toml::Table::from_iter([("sources".to_owned(), vec![source].into())]));
        set("log", toml::Table::from_iter([("level".to_owned(), "warn".into())]));
        private_file::replace(&self.config_file(), &settings.to_string())?;
        Ok(Loaded::from_table(settings).map(|loaded| loaded.config))
    }

    /// The project of the last run: an SDK names it, and its copies are answered.
    fn last_project(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.config_file()).unwrap_or_default();
        let settings = text.parse::<toml::Table>().unwrap_or_default();
        let project = settings.get("infisical").and_then(|infisical| infisical.get("project_id")?.as_str());
        project.filter(|project| *project != NO_PROJECT).map(str::to_owned)
    }

    fn config_file(&self) -> PathBuf {
        self.data_dir.join("secretier.toml")
    }

    /// The token of the last run, as long as it is good, else a new one: the lines that
    /// were printed then go on working.
    async fn token(&self, app: &App, clock: &Clock) -> Result<Zeroizing<String>, Failure> {
        let path = self.data_dir.join("token");
        if let Ok(text) = std::fs::read_to_string(&path).map(Zeroizing::new) {
            let header = http::HeaderValue::try_from(format!("Bearer {}", text.trim()));
            let access = &app.service().access;
            let caller = access.caller(Peer::Ip(self.listen.first().ip()));
            if let Ok(header) = header
                && matches!(access.recognise(&caller, Some(&header), clock.moment()), Ok(Known::As(_)))
            {
                return Ok(Zeroizing::new(text.trim().to_owned()));
            }
        }
        let new = NewToken {
            name: format!("dev-{}", hex::encode(rand::random::<[u8; 4]>())),
            tenants: vec!["*".to_owned(), "/*".to_owned()],
            keys: vec!["*".to_owned()],
            actions: Action::ALL.to_vec(),
            lifetime: None,
        };
        let failed = |error: &dyn std::error::Error| Failure::told(super::chain("the token", error));
        let (token, row) = new.draw(clock.now()).map_err(|error| failed(&error))?;
        app.service().resolver.database().insert_token(&row).await.map_err(|error| failed(&error))?;
        app.service().access.reload().await.map_err(|error| failed(&error))?;
        private_file::replace(&path, &token.line()).map_err(|error| failed(&error))?;
        Ok(Zeroizing::new(token.expose().to_owned()))
    }

    fn announce(&self, url: &str, token: &str, project: &str, standin: Option<&Infisical>) {
        let halves = ClientCredentials::of(token);
        let (id, secret) = halves.as_ref().map_or(("", ""), |halves| (&*halves.client_id, &*halves.client_secret));
        if self.json {
            let infisical_url = standin.map(|infisical| infisical.server.url());
            println!(
                "{}",
                json!({
                    "url": url, "token": token, "client_id": id, "client_secret": secret, "project_id": project,
                    "environment": "dev", "infisical_url": infisical_url, "tenants": TENANTS, "folders": [FOLDER],
                })
            );
            return;
        }
        let curl =
            format!("curl -i -H 'Authorization: Bearer {token}' {url}/v1/tenants/acme/secrets/STRIPE_SECRET_KEY");
        let (data, config) = (self.data_dir.display(), self.config_file());
        let config = config.display();
        match standin {
            Some(infisical) => println!(
                "secretier listens on {url}; a stand-in for Infisical on {}, with the tenants {}\n\
                 and the shared folder {FOLDER}\n\n\
                 1. The first answer comes from Infisical; see the header Cache-Status:\n   {curl}\n\n\
                 2. The second from memory:\n   {curl}\n\n\
                 3. Stop this (Ctrl-C), start it again as 'secretier dev --without-infisical', and the\n   \
                 third comes from the database:\n   {curl}\n\n\
                 An Infisical SDK needs another address and credentials, and nothing else:\n   \
                 siteUrl {url}, clientId {id}, clientSecret {secret},\n   \
                 projectId {}, environment dev, secretPath /tenants/acme\n\n\
                 While this runs, the other commands can be tried too, each with --config {config}:\n   \
                 secretier migrate plan --config {config}\n\n\
                 Everything is kept in {data}.",
                infisical.server.url(),
                TENANTS.join(", "),
                project,
            ),
            None => println!(
                "secretier listens on {url}, without Infisical\n\n\
                 What was asked for before comes from the database; see the header Cache-Status:\n   {curl}\n\n\
                 An Infisical SDK goes on too:\n   \
                 siteUrl {url}, clientId {id}, clientSecret {secret},\n   \
                 projectId {project}, environment dev, secretPath /tenants/acme\n\n\
                 Everything is kept in {data}.",
            ),
        }
    }
}

/// The stand-in with what is needed to log in to it.
struct Infisical {
    server: StandIn,
    client_id: String,
    client_secret: String,
}

impl Infisical {
    async fn start(project: Option<String>) -> std::io::Result<Self> {
        let (world, credentials) = World::sample();
        if let Some(project) = project {
            world.set_project_id(&project);
        }
        let server = StandIn::on_loopback(world).await?;
        Ok(Self { server, client_id: credentials.client_id, client_secret: credentials.client_secret })
    }
}
