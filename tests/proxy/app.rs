//! An instance to test: the real server on a port that the system picks, on SQLite or
//! PostgreSQL, with the stand-in for Infisical. Time is moved, not waited for.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use diesel::{Connection as _, RunQueryDsl as _, SqliteConnection, connection::SimpleConnection as _};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proptest::test_runner::{Config as TestConfig, RngAlgorithm, TestRng, TestRunner};
use reqwest::{
    Method, RequestBuilder,
    header::{self, HeaderMap},
};
use secretier::{
    access::{
        Action, NewToken,
        audit::{self, Finding},
    },
    app::{App, Base, Changes, Reload, ReloadError, StartError},
    clock::Clock,
    config::{Config, Loaded},
    diagnosis::{Area, Outcome},
    metrics::Metrics,
    phase::Phase,
    server::{Listeners, Service},
    tiers::{
        database::{Expected, Refusal},
        upstream::{
            self,
            standin::{Credentials, Dialect, Identity, Rights, StandIn, World},
        },
    },
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{sync::oneshot, task::JoinHandle};

pub(crate) use crate::within::eventually;
use crate::{
    described::DESCRIPTION,
    metrics,
    postgres::{self, Postgres},
    relay::Relay,
    within::{HANGS, within, within_a_tests_time},
};

/// The environment that the instances serve.
pub(crate) const ENV: &str = "prod";

/// A database to start instances on.
#[derive(Clone)]
pub(crate) enum Backend {
    Sqlite(Arc<TempDir>),
    Postgres(String),
}

/// Memory that never stands in for another tier: what is past its ttl is gone.
pub(crate) const FORGETFUL: &str = "[memory]\nmax_stale = \"5m\"\n";

/// Runs a test on each database.
#[track_caller]
pub(crate) fn on_both(test: impl AsyncFn(Backend)) -> impl Future<Output = ()> {
    let both = async move {
        test(Backend::sqlite()).await;
        test(Backend::postgres().await).await;
    };
    within_a_tests_time("the test ends on both databases", both)
}

tokio::task_local! {
    /// As which kind of server the stand-ins of a test answer.
    static DIALECT: Dialect;
}

/// Runs a test on each database, and once more before a server of October 2024.
pub(crate) async fn on_both_and_before_october(test: impl AsyncFn(Backend)) {
    on_both(&test).await;
    DIALECT.scope(Dialect::October2024, test(Backend::sqlite())).await;
}

impl Backend {
    pub(crate) fn sqlite() -> Self {
        Self::Sqlite(Arc::new(TempDir::new().unwrap()))
    }

    pub(crate) async fn postgres() -> Self {
        Self::Postgres(Postgres::shared().database().await)
    }

    pub(crate) fn url(&self) -> String {
        match self {
            Self::Sqlite(folder) => format!("sqlite:{}", folder.path().join("test.db").display()),
            Self::Postgres(url) => url.clone(),
        }
    }

    /// The same PostgreSQL as it is reached through a relay.
    pub(crate) fn through(&self, relay: &Relay) -> Self {
        let Self::Postgres(url) = self else { panic!("SQLite is reached without a network") };
        let port = format!(":{}/", Postgres::shared().port());
        assert!(url.contains(&port), "{url}");
        Self::Postgres(url.replace(&port, &format!(":{}/", relay.port())))
    }

    /// Runs SQL behind the program's back.
    pub(crate) async fn sql(&self, sql: &str) {
        match self {
            Self::Sqlite(_) => self.connection().batch_execute(sql).expect(sql),
            Self::Postgres(url) => postgres::execute(url, &format!("SET search_path TO secretier; {sql}")).await,
        }
    }

    /// Holds a table of PostgreSQL, as a session does that hangs, until it is dropped or terminated.
    pub(crate) async fn hold(&self, table: &str) -> tokio_postgres::Client {
        let Self::Postgres(url) = self else { panic!("SQLite has no locks of tables") };
        postgres::session(url, &format!("BEGIN; LOCK TABLE secretier.{table}")).await
    }

    /// A number, behind the program's back. Tables are written `{}companies`.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        #[derive(diesel::QueryableByName)]
        struct Number {
            #[diesel(sql_type = diesel::sql_types::BigInt)]
            number: i64,
        }
        match self {
            Self::Sqlite(_) => {
                let sql = format!("SELECT ({}) AS number", sql.replace("{}", ""));
                diesel::sql_query(&sql).get_result::<Number>(&mut self.connection()).expect(&sql).number
            }
            Self::Postgres(url) => postgres::number(url, &sql.replace("{}", "secretier.")).await,
        }
    }

    fn connection(&self) -> SqliteConnection {
        let mut connection = SqliteConnection::establish(self.url().trim_start_matches("sqlite:")).unwrap();
        connection.batch_execute("PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = ON").unwrap();
        connection
    }
}

/// How an instance is to be.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) backend: Backend,
    pub(crate) phase: Phase,
    /// More TOML, after the sections that are always there: rules, other sections.
    pub(crate) more: String,
    /// The environment that the instances say they serve.
    pub(crate) environment: &'static str,
    /// More lines of `[server]`.
    pub(crate) server: String,
    /// More lines of `[database]`.
    pub(crate) database: String,
    /// How long a caller without a copy waits, and a call upstream takes at most.
    pub(crate) upstream_timeout: &'static str,
    /// Calls upstream that may be made in a minute.
    pub(crate) requests_per_minute: u32,
    /// How long a database operation takes at most.
    pub(crate) database_timeout: &'static str,
    /// How often is asked which folders have changed; never, unless a test is about it.
    pub(crate) poll_interval: &'static str,
    /// Another address of Infisical than the stand-in's.
    pub(crate) site_url: Option<String>,
    /// More lines of `[infisical]`.
    pub(crate) infisical: String,
    /// More entries of `keys.sources`, each behind a comma.
    pub(crate) keys: String,
    /// The section `[directory]`, in place of `[infisical]`.
    pub(crate) directory: Option<String>,
}

impl Setup {
    pub(crate) fn new(backend: Backend, phase: Phase) -> Self {
        // Nothing here is about speed: a slow machine must not make a test fail.
        Self {
            backend,
            phase,
            more: String::new(),
            environment: ENV,
            server: String::new(),
            database: String::new(),
            upstream_timeout: "30s",
            requests_per_minute: 100_000,
            database_timeout: "30s",
            poll_interval: "0s",
            site_url: None,
            infisical: String::new(),
            keys: String::new(),
            directory: None,
        }
    }

    /// Lets a lookup take as long as the settings allow: an unoptimised build that has other work
    /// takes long to open a long list, on threads that come behind all others.
    pub(crate) fn patient(self) -> Self {
        Self { upstream_timeout: "1m", database_timeout: "1m", ..self }
    }

    /// With more TOML.
    pub(crate) fn with(mut self, more: &str) -> Self {
        self.more.push_str(more);
        self
    }

    /// Starts an instance, with an empty stand-in of its own.
    pub(crate) async fn start(self) -> TestApp {
        self.start_at(Clock::system()).await
    }

    /// The same for an instance that goes by this clock.
    pub(crate) async fn start_at(self, clock: Clock) -> TestApp {
        let world = World::empty();
        world.speak(DIALECT.try_get().unwrap_or_default());
        world.folder(ENV, "/tenants");
        let identity = world.identity(Identity::new(Rights::Full));
        let infisical = StandIn::on_loopback(world).await.unwrap();
        let folder = TempDir::new().unwrap();
        let key_file = folder.path().join("master.key");
        std::fs::write(&key_file, hex::encode(rand::random::<[u8; 32]>())).unwrap();
        std::fs::set_permissions(&key_file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let instance = Instance::start(&self.config(&infisical, &identity, &key_file), clock).await;
        let mut app = TestApp {
            setup: self,
            infisical,
            identity,
            instance: Some(instance),
            key_file,
            token: String::new(),
            folder,
        };
        app.token = app.new_token("test", &["*", "/*"], &Action::ALL).await;
        app
    }

    fn config(&self, infisical: &StandIn, identity: &Credentials, key_file: &Path) -> String {
        format!(
            r#"
            environment = "{environment}"
            phase = "{phase}"
            [server]
            listen = "127.0.0.1:0"
            {server}
            [database]
            url = "{database}"
            timeout = "{database_timeout}"
            {more_database}
            {upstream}
            [keys]
            sources = ["file:{keys}"{more_keys}]
            {more}
            "#,
            environment = self.environment,
            phase = self.phase,
            database = self.backend.url(),
            database_timeout = self.database_timeout,
            upstream = self.directory.clone().unwrap_or_else(|| self.section_infisical(infisical, identity)),
            keys = key_file.display(),
            more_keys = self.keys,
            more = self.more,
            server = self.server,
            more_database = self.database,
        )
    }

    fn section_infisical(&self, infisical: &StandIn, identity: &Credentials) -> String {
        format!(
            r#"
            [infisical]
            site_url = "{site}"
            {project}
            client_id = "{id}"
            client_secret = "{secret}"
            requests_per_minute = {requests_per_minute}
            timeout = "{upstream_timeout}"
            poll_interval = "{poll_interval}"
            {more_infisical}
            "#,
            site = self.site_url.clone().unwrap_or_else(|| infisical.url()),
            project = match self.infisical.contains("project_id") {
                true => String::new(),
                false => format!("project_id = \"{}\"", infisical.world().project_id()),
            },
            id = identity.client_id,
            secret = identity.client_secret,
            upstream_timeout = self.upstream_timeout,
            requests_per_minute = self.requests_per_minute,
            poll_interval = self.poll_interval,
            // As long as a caller waits, unless a test is about that.
            more_infisical = match self.infisical.contains("read_timeout") {
                true => self.infisical.clone(),
                false => format!("read_timeout = \"{}\"\n{}", self.upstream_timeout, self.infisical),
            },
        )
    }
}

/// A running instance with all that is around it.
pub(crate) struct TestApp {
    pub(crate) setup: Setup,
    pub(crate) infisical: StandIn,
    pub(crate) identity: Credentials,
    /// May read, write and administer everything.
    pub(crate) token: String,
    instance: Option<Instance>,
    pub(crate) key_file: PathBuf,
    folder: TempDir,
}

impl TestApp {
    pub(crate) fn world(&self) -> &World {
        self.infisical.world()
    }

    pub(crate) fn instance(&self) -> &Instance {
        self.instance.as_ref().unwrap()
    }

    pub(crate) fn url(&self) -> &str {
        &self.instance().url
    }

    /// Moves the instance's time ahead.
    pub(crate) fn advance(&self, by: Duration) {
        self.instance().clock.advance(by);
    }

    /// A folder of the test's own.
    #[allow(dead_code, reason = "it also keeps the folder for as long as the instance lives")]
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Ends the process's part and starts it anew on the same database: memory is empty.
    pub(crate) async fn restart(&mut self) {
        let instance = self.instance.take().unwrap();
        let clock = instance.clock.clone();
        instance.stop().await;
        self.instance = Some(self.start_instance(clock).await);
    }

    /// Takes the instance out, to be ended as the test wants it.
    pub(crate) fn take(&mut self) -> Instance {
        self.instance.take().unwrap()
    }

    /// Ends it for good: nobody writes to the database any more.
    pub(crate) async fn stop(&mut self) {
        self.instance.take().unwrap().stop().await;
    }

    /// What `secretier doctor` finds wrong with upstream, with its advice.
    pub(crate) async fn faults_of_upstream(&self) -> Vec<String> {
        let text = self.setup.config(&self.infisical, &self.identity, &self.key_file);
        let config = Instance::config(&text);
        let (settings, area) = (config.upstream().unwrap(), Area::new("upstream"));
        let built = upstream::build(
            Some(settings),
            config.environment.as_str(),
            &config.keys.withheld(),
            &Clock::system(),
            &Metrics::new(),
        );
        built.unwrap().unwrap().examine(settings, &area).await;
        let faults = area.into_findings().into_iter().filter(|finding| finding.outcome == Outcome::Failure);
        faults.map(|fault| format!("{}: {}; {}", fault.check, fault.text, fault.advice.unwrap())).collect()
    }

    /// What does not fit in the audit of an instance that has ended.
    pub(crate) async fn verify_at_rest(&self) -> Vec<Finding> {
        let text = self.setup.config(&self.infisical, &self.identity, &self.key_file);
        let config = Loaded::from_table(toml::from_str(&text).unwrap()).unwrap().config;
        let database = Base::open(&config, &Clock::system()).await.unwrap().database;
        let walked = audit::verify(&database, &database.keys().ring(), &[]).await.unwrap();
        walked.into_iter().flat_map(|chain| chain.findings).collect()
    }

    /// Ends it as SIGKILL would, and starts it anew on the same database.
    pub(crate) async fn kill_and_start_again(mut self) -> Self {
        let instance = self.instance.take().unwrap();
        instance.kill().await;
        self.start_again().await
    }

    /// Starts an instance where the last one has ended.
    pub(crate) async fn start_again(mut self) -> Self {
        self.instance = Some(self.start_instance(Clock::system()).await);
        self
    }

    /// Tries to start an instance where the last one has ended.
    pub(crate) async fn try_start(&mut self, clock: Clock) -> Result<(), StartError> {
        let config = self.setup.config(&self.infisical, &self.identity, &self.key_file);
        self.instance = Some(Instance::try_start(&config, clock).await?);
        Ok(())
    }

    /// Ends it as SIGKILL would, for good.
    pub(crate) async fn kill(&mut self) {
        self.instance.take().unwrap().kill().await;
    }

    /// Waits until the instance has ended by itself; gives why.
    pub(crate) async fn ended(&mut self) -> Result<(), StartError> {
        within("the instance ends by itself", self.instance.take().unwrap().server).await.unwrap()
    }

    /// Sets the wall clock of the instance's machine by so many milliseconds.
    pub(crate) fn step(&self, by: i64) {
        self.instance().clock.step(by);
    }

    /// One more instance beside this one, on the same database and stand-in.
    pub(crate) async fn another(&self) -> Instance {
        self.another_at(self.instance().clock.clone()).await
    }

    /// One more on a machine with a clock of its own.
    pub(crate) async fn another_at(&self, clock: Clock) -> Instance {
        self.start_instance(clock).await
    }

    /// One more with settings of its own.
    pub(crate) async fn another_as(&self, setup: &Setup) -> Instance {
        let text = setup.config(&self.infisical, &self.identity, &self.key_file);
        Instance::start(&text, self.instance().clock.clone()).await
    }

    /// One more that reaches its PostgreSQL through a relay.
    pub(crate) async fn another_through(&self, relay: &Relay) -> Instance {
        let mut setup = Setup::new(self.setup.backend.through(relay), self.setup.phase);
        setup.database.clone_from(&self.setup.database);
        self.another_as(&setup).await
    }

    /// Starts anew, and reaches its PostgreSQL through a relay from then on.
    pub(crate) async fn go_through(&mut self, relay: &Relay) {
        self.setup.backend = self.setup.backend.through(relay);
        self.restart().await;
    }

    async fn start_instance(&self, clock: Clock) -> Instance {
        Instance::start(&self.setup.config(&self.infisical, &self.identity, &self.key_file), clock).await
    }

    /// Has the instance go by its setup as `change` makes it; for this once.
    pub(crate) async fn reload(&self, change: impl FnOnce(&mut Setup)) -> Result<Changes, ReloadError> {
        self.reload_of(self.instance(), change).await
    }

    pub(crate) async fn reload_of(
        &self,
        instance: &Instance,
        change: impl FnOnce(&mut Setup),
    ) -> Result<Changes, ReloadError> {
        let mut setup = self.setup.clone();
        change(&mut setup);
        let text = setup.config(&self.infisical, &self.identity, &self.key_file);
        instance.reload.apply(&Instance::config(&text)).await
    }

    pub(crate) async fn new_token(&self, name: &str, tenants: &[&str], actions: &[Action]) -> String {
        let tenants = tenants.iter().map(|&pattern| pattern.to_owned()).collect();
        let new = NewToken {
            name: name.to_owned(),
            tenants,
            keys: vec!["*".to_owned()],
            actions: actions.to_vec(),
            lifetime: None,
        };
        let (token, row) = new.draw(self.instance().clock.now()).unwrap();
        self.instance().service.resolver.database().insert_token(&row).await.unwrap();
        self.instance().service.access.reload().await.unwrap();
        token.expose().to_owned()
    }

    /// Gives a tenant a folder with these secrets at the stand-in.
    pub(crate) fn holds(&self, tenant: &str, secrets: &[(&str, &str)]) {
        let path = folder(tenant);
        self.world().folder(ENV, &path);
        for (name, value) in secrets {
            self.world().put(ENV, &path, name, value);
        }
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.instance().request(method, path).bearer_auth(&self.token)
    }

    pub(crate) async fn ask(&self, method: Method, path: &str) -> Answer {
        Answer::of(self.request(method, path)).await
    }

    /// What the tenant's path, or what is below it, answers.
    pub(crate) async fn ask_tenant(&self, tenant: &str, below: &str) -> Answer {
        self.ask(Method::GET, &format!("{}{below}", resource(tenant))).await
    }

    pub(crate) async fn refresh(&self, tenant: &str) -> Answer {
        self.ask(Method::POST, &format!("{}/refresh", resource(tenant))).await
    }

    pub(crate) async fn explain(&self, tenant: &str, key: &str) -> Value {
        self.ask(Method::GET, &format!("{}/explain", secret(tenant, key))).await.json()
    }

    /// Newest values in the database, copies and own ones.
    pub(crate) async fn rows(&self) -> i64 {
        let sql = "SELECT count(*) FROM {}company_secrets \
                   WHERE secret_value_encrypted IS NOT NULL AND superseded_at IS NULL";
        self.setup.backend.number(sql).await
    }

    /// Waits until so many values are in the database: a write-back may end after its answer.
    pub(crate) async fn stored(&self, rows: i64) {
        eventually(async || self.rows().await == rows).await;
    }

    /// Waits until every instance has brought into force what has changed by now.
    pub(crate) async fn followed(&self) {
        let database = &self.instance().service.resolver.database();
        let last = database.changes().await.unwrap();
        let following = database.await_instances(Duration::from_secs(60), |one| one.changes >= last).await.unwrap();
        assert!(following.behind.is_empty(), "{following:?}");
    }

    /// Gives a tenant a phase of its own, or takes it away.
    pub(crate) async fn set_phase(&self, tenant: &str, phase: Option<Phase>) {
        self.hand_over(tenant, self.look(tenant).await, phase).await.unwrap();
        self.instance().service.resolver.follow().await.unwrap();
    }

    /// What must hold for a tenant to change hands as it is now.
    pub(crate) async fn look(&self, tenant: &str) -> Expected {
        let company = self.instance().service.resolver.database().company(&tenant.parse().unwrap()).await.unwrap();
        Expected::of(company.as_ref())
    }

    /// Hands a tenant over in the database, which the instances are yet to hear of.
    pub(crate) async fn hand_over(&self, tenant: &str, from: Expected, to: Option<Phase>) -> Result<i64, Refusal> {
        let database = &self.instance().service.resolver.database();
        database.hand_over(&tenant.parse().unwrap(), from, to).await.unwrap()
    }

    pub(crate) async fn get(&self, tenant: &str, key: &str) -> Answer {
        self.get_from(self.instance(), tenant, key).await
    }

    pub(crate) async fn get_from(&self, instance: &Instance, tenant: &str, key: &str) -> Answer {
        let request = instance.request(Method::GET, &secret(tenant, key)).bearer_auth(&self.token);
        Answer::of(request).await
    }

    pub(crate) async fn get_fresh(&self, tenant: &str, key: &str) -> Answer {
        Answer::of(self.request(Method::GET, &secret(tenant, key)).header(header::CACHE_CONTROL, "no-cache")).await
    }

    /// Writes a secret, and makes its tenant where it is new.
    pub(crate) async fn put(&self, tenant: &str, key: &str, value: &str) -> Answer {
        let path = new_secret(tenant, key);
        Answer::of(self.request(Method::PUT, &path).json(&json!({ "value": value }))).await
    }

    /// Writes a secret of a tenant that somebody knows.
    pub(crate) async fn put_known(&self, tenant: &str, key: &str, value: &str) -> Answer {
        Answer::of(self.request(Method::PUT, &secret(tenant, key)).json(&json!({ "value": value }))).await
    }

    pub(crate) async fn delete(&self, tenant: &str, key: &str) -> Answer {
        Answer::of(self.request(Method::DELETE, &secret(tenant, key))).await
    }

    pub(crate) async fn metrics(&self) -> String {
        let page = Answer::of(self.request(Method::GET, "/metrics")).await;
        let flaws = if page.status == 200 { metrics::flaws(&page.text) } else { Vec::new() };
        assert!(flaws.is_empty(), "{flaws:#?}");
        page.text
    }

    pub(crate) async fn ready(&self) -> Answer {
        Answer::of(self.instance().request(Method::GET, "/readyz")).await
    }
}

/// One instance: the server and its address.
pub(crate) struct Instance {
    pub(crate) url: String,
    pub(crate) clock: Clock,
    pub(crate) service: Arc<Service>,
    pub(crate) reload: Arc<Reload>,
    client: reqwest::Client,
    shutdown: oneshot::Sender<()>,
    server: JoinHandle<Result<(), StartError>>,
}

impl Instance {
    pub(crate) async fn start(toml: &str, clock: Clock) -> Self {
        Self::try_start(toml, clock).await.unwrap()
    }

    fn config(toml: &str) -> Config {
        let mut table: toml::Table = toml::from_str(toml).unwrap();
        // What memory knows ahead of the first question would hide what the tiers below say.
        let memory = table.entry("memory").or_insert_with(|| toml::Table::new().into());
        memory.as_table_mut().unwrap().entry("warm_tenants").or_insert(0.into());
        Loaded::from_table(table).unwrap().config
    }

    pub(crate) async fn try_start(toml: &str, clock: Clock) -> Result<Self, StartError> {
        let config = Self::config(toml);
        let app = within("the instance starts, or says why not", App::start(&config, clock.clone())).await?;
        let listeners = Listeners::bind(&config.server).await.unwrap();
        let scheme = if listeners.tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}", listeners.addresses()[0]);
        let (service, reload) = (Arc::clone(app.service()), Arc::clone(app.reload()));
        let (shutdown, stopped) = oneshot::channel();
        let server = tokio::spawn(async move {
            app.serve(listeners, async {
                let _ = stopped.await;
            })
            .await
        });
        Ok(Self { url, clock, service, reload, client: client(), shutdown, server })
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    /// Ends it as SIGKILL would, without waiting for that.
    pub(crate) fn abort(&self) {
        self.server.abort();
    }

    /// Whether it has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.server.is_finished()
    }

    /// Ends it as SIGKILL would: it says goodbye to nobody.
    pub(crate) async fn kill(self) {
        self.server.abort();
        let _ = within("the instance is gone", self.server).await;
    }

    /// Ends it as SIGTERM would.
    pub(crate) async fn stop(self) {
        let Self { client, shutdown, server, .. } = self;
        drop(client);
        let _ = shutdown.send(());
        within("the instance stops", server).await.unwrap().unwrap();
    }
}

/// What draws by chance. To see a failure again: SECRETIER_TEST_SEED=<what was printed>.
#[expect(clippy::print_stdout, reason = "with the seed a failure is seen again")]
pub(crate) fn drawn_anew() -> TestRunner {
    let seed = std::env::var("SECRETIER_TEST_SEED").ok().map(|seed| hex::decode(seed).unwrap());
    let seed = seed.unwrap_or_else(|| rand::random::<[u8; 32]>().to_vec());
    println!("SECRETIER_TEST_SEED={}", hex::encode(&seed));
    TestRunner::new_with_rng(TestConfig::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &seed))
}

fn client() -> reqwest::Client {
    // Tests speak plain HTTP; the client wants to be able to do TLS all the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    client_builder().pool_max_idle_per_host(0).build().unwrap()
}

/// A client whose every request ends.
pub(crate) fn client_builder() -> reqwest::ClientBuilder {
    reqwest::Client::builder().no_proxy().timeout(HANGS)
}

/// The path of a tenant, or of a shared folder, whose name has a slash before it.
pub(crate) fn resource(tenant: &str) -> String {
    if tenant.starts_with('/') { format!("/v1/folders{tenant}") } else { format!("/v1/tenants/{tenant}") }
}

/// The folder of a tenant at the stand-in, or the shared folder.
fn folder(tenant: &str) -> String {
    if tenant.starts_with('/') { tenant.to_owned() } else { format!("/tenants/{tenant}") }
}

/// A secret's path.
pub(crate) fn secret(tenant: &str, key: &str) -> String {
    format!("{}/secrets/{}", resource(tenant), utf8_percent_encode(key, NON_ALPHANUMERIC))
}

/// The path of one whose tenant is made with it.
pub(crate) fn new_secret(tenant: &str, key: &str) -> String {
    format!("{}?create_tenant=true", secret(tenant, key))
}

/// An answer, read whole, and held to the description of the API.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) async fn of(request: RequestBuilder) -> Self {
        let (client, request) = request.build_split();
        let request = request.unwrap();
        let (method, path) = (request.method().clone(), request.url().path().to_owned());
        let mut answer = client.execute(request).await.unwrap();
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let is_stream = headers.get("content-type").is_some_and(|content| content == "text/event-stream");
        let text = match is_stream {
            // It does not end by itself.
            true => String::from_utf8(answer.chunk().await.unwrap().unwrap_or_default().to_vec()).unwrap(),
            false => answer.text().await.unwrap(),
        };
        let answer = Self { status, headers, text };
        DESCRIPTION.check(&method, &path, status, &answer.headers, &answer.text);
        answer
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    /// The secret's value.
    pub(crate) fn value(&self) -> String {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()["value"].as_str().unwrap().to_owned()
    }

    /// The version.
    pub(crate) fn version(&self) -> i64 {
        self.json()["version"].as_i64().unwrap()
    }

    /// The validator, quotes and all.
    pub(crate) fn etag(&self) -> &str {
        self.header("etag")
    }

    /// `Age`, in seconds.
    pub(crate) fn age(&self) -> u64 {
        self.header("age").parse().unwrap()
    }

    /// The status and the code of a problem.
    pub(crate) fn problem(&self) -> (u16, String) {
        assert_eq!(self.header("content-type"), "application/problem+json", "{self:?}");
        (self.status, self.json()["code"].as_str().unwrap().to_owned())
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The tier that answered.
    pub(crate) fn tier(&self) -> &str {
        let status = self.header("cache-status");
        let member = |name: &str| status.split(", ").any(|member| member.starts_with(&format!("{name}; hit")));
        match () {
            () if member("memory") => "memory",
            () if member("database") => "database",
            () if status.contains("infisical; fwd") && status.contains("fwd-status") => "infisical",
            () => panic!("no tier: {self:?}"),
        }
    }
}
