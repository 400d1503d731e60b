//! The processes: PostgreSQL, a stand-in for Infisical, three instances, each with a relay
//! between it and PostgreSQL and a wall clock of its own.

use std::{
    net::TcpListener,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use secretier::tiers::upstream::standin::{Identity, Rights, StandIn, World};
use tempfile::TempDir;

use crate::{faketime::FakeClock, postgres::Postgres, relay::Relay};

pub(crate) const INSTANCES: usize = 3;
pub(crate) const ENV: &str = "prod";

/// How long the token is good that ends while clocks are ahead.
const LASTS: Duration = Duration::from_secs(36 * 60 * 60);

/// What runs into it hangs.
const HANGS: Duration = Duration::from_secs(60);

/// All that runs.
pub(crate) struct Stage {
    pub(crate) postgres: Option<Postgres>,
    pub(crate) infisical: StandIn,
    pub(crate) scene: Arc<Scene>,
    /// The database's URL, and the port in it.
    pub(crate) database: String,
    port: u16,
    instances: Vec<Child>,
    relays: Vec<Relay>,
    /// The clock of each instance; none where no clock can be set.
    clocks: Vec<FakeClock>,
    /// How far each is ahead, in seconds.
    ahead: Vec<i64>,
    /// A token that ends, and when it was made.
    ending: (String, Instant),
    folder: Option<TempDir>,
}

/// What callers see of it.
pub(crate) struct Scene {
    pub(crate) urls: Vec<String>,
    pub(crate) token: String,
    pub(crate) world: World,
    pub(crate) client: reqwest::Client,
}

impl Stage {
    pub(crate) async fn set() -> Self {
        let folder = TempDir::with_prefix("secretier-soak-").unwrap();
        let postgres = tokio::task::spawn_blocking(Postgres::start).await.unwrap();
        let database = postgres.database().await;
        let world = World::empty();
        world.folder(ENV, "/tenants");
        let identity = world.identity(Identity::new(Rights::Full));
        let infisical = StandIn::on_loopback(world.clone()).await.unwrap();
        private(folder.path(), "master.key", &hex::encode(rand::random::<[u8; 32]>()));
        private(
            folder.path(),
            "secretier.toml",
            &format!(
                r#"
                environment = "{ENV}"
                phase = "hybrid"
                [memory]
                ttl = "3s"
                negative_ttl = "2s"
                max_stale = "30s"
                [database]
                url = "{database}"
                refresh_after = "6s"
                max_stale = "30s"
                [infisical]
                site_url = "{site}"
                project_id = "{project}"
                client_id = "{id}"
                client_secret = "{secret}"
                requests_per_minute = 100000
                [keys]
                sources = ["file:master.key"]
                [[rules]]
                tenants = "d*"
                phase = "database"
                "#,
                site = infisical.url(),
                project = world.project_id(),
                id = identity.client_id,
                secret = identity.client_secret,
            ),
        );
        let mut relays = Vec::new();
        for _ in 0..INSTANCES {
            relays.push(Relay::to(postgres.port()).await);
        }
        // The first word about a missing library is enough.
        let clock = |number: usize| FakeClock::new(folder.path().join(format!("clock-{number}")), "+0");
        let clocks = (0..INSTANCES).map_while(clock).collect();
        let urls = (0..INSTANCES).map(|_| format!("127.0.0.1:{}", free_port())).collect::<Vec<_>>();
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().unwrap();
        let scene = Scene {
            urls: urls.iter().map(|address| format!("http://{address}")).collect(),
            token: String::new(),
            world,
            client,
        };
        let mut stage = Self {
            port: postgres.port(),
            postgres: Some(postgres),
            infisical,
            scene: Arc::new(scene),
            database,
            instances: Vec::new(),
            relays,
            clocks,
            ahead: vec![0; INSTANCES],
            ending: (String::new(), Instant::now()),
            folder: Some(folder),
        };
        for number in 0..INSTANCES {
            let child = stage.launch(number);
            stage.instances.push(child);
            stage.until_serving(number).await;
        }
        let token = stage.token(&["--name", "soak", "--actions", "read,write"]);
        Arc::get_mut(&mut stage.scene).unwrap().token = token;
        let lasts = format!("{}s", LASTS.as_secs());
        stage.ending =
            (stage.token(&["--name", "ending", "--actions", "read", "--expires-in", &lasts]), Instant::now());
        stage
    }

    fn token(&self, more: &[&str]) -> String {
        let token = self.command(&[&["token", "create", "--tenants", "*"], more].concat());
        assert!(token.status.success(), "{}", String::from_utf8_lossy(&token.stderr));
        String::from_utf8(token.stdout).unwrap().trim().to_owned()
    }

    fn path(&self) -> &Path {
        self.folder.as_ref().unwrap().path()
    }

    fn program(&self) -> Command {
        // Cargo puts examples one folder below the programs.
        let own = std::env::current_exe().unwrap();
        let program = own.parent().and_then(Path::parent).unwrap().join("secretier");
        let mut command = Command::new(program);
        // A Ctrl-C is ours alone.
        command.process_group(0).current_dir(self.path()).env_clear();
        command
    }

    fn launch(&self, number: usize) -> Child {
        let log = self.path().join(format!("instance-{number}.log"));
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let address = self.scene.urls[number].trim_start_matches("http://");
        let mut command = self.program();
        command.args(["serve", "--config", "secretier.toml"]).env("SECRETIER_SERVER__LISTEN", address);
        let port = |port: u16| format!(":{port}/");
        let through = self.database.replace(&port(self.port), &port(self.relays[number].port()));
        assert_ne!(through, self.database);
        command.env("SECRETIER_DATABASE__URL", through);
        command.envs(self.clocks.get(number).map(FakeClock::variables).into_iter().flatten());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("build the program first: scripts/soak")
    }

    /// Waits until an instance answers.
    async fn until_serving(&mut self, number: usize) {
        let began = Instant::now();
        let url = format!("{}/healthz", self.scene.urls[number]);
        while self.scene.client.get(&url).send().await.is_err() {
            if self.instances[number].try_wait().unwrap().is_some() {
                // It gives up where the database is not there yet.
                self.instances[number] = self.launch(number);
            }
            assert!(began.elapsed() < HANGS, "instance {number} does not start; see {}", self.path().display());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Kills an instance and starts it anew.
    pub(crate) async fn kill_instance(&mut self, number: usize) {
        self.instances[number].kill().unwrap();
        self.instances[number].wait().unwrap();
        self.instances[number] = self.launch(number);
        self.until_serving(number).await;
    }

    /// Sends an instance a signal, by its name.
    pub(crate) fn signal(&self, number: usize, name: &str) {
        let process = self.instances[number].id().to_string();
        assert!(Command::new("kill").args(["-s", name, &process]).status().unwrap().success());
    }

    /// Cuts an instance off from PostgreSQL.
    pub(crate) async fn cut_off(&self, number: usize) {
        self.relays[number].cut().await;
    }

    /// Lets it reach PostgreSQL again.
    pub(crate) fn mend(&self, number: usize) {
        self.relays[number].mend();
    }

    /// Whether clocks can be set.
    pub(crate) fn has_clocks(&self) -> bool {
        !self.clocks.is_empty()
    }

    /// How far an instance's wall clock is ahead, in seconds.
    pub(crate) fn ahead(&self, number: usize) -> i64 {
        self.ahead[number]
    }

    /// Sets it to so far ahead.
    pub(crate) fn set_clock(&mut self, number: usize, ahead: i64) {
        self.clocks[number].set(&format!("{ahead:+}"));
        self.ahead[number] = ahead;
    }

    /// The token that ends, and whether it has by the clock of an instance; nothing where it is
    /// just about to.
    pub(crate) fn ending(&self, number: usize) -> Option<(&str, bool)> {
        let (token, made) = &self.ending;
        let elapsed = |duration: Duration| i64::try_from(duration.as_secs()).unwrap();
        let left = elapsed(LASTS) - elapsed(made.elapsed()) - self.ahead[number];
        (left.abs() > 60).then_some((token, left < 0))
    }

    /// Runs a command of the program to its end.
    pub(crate) fn command(&self, arguments: &[&str]) -> Output {
        self.program().args(arguments).args(["--config", "secretier.toml"]).output().unwrap()
    }

    /// What PostgreSQL's part blocks for holds up no caller.
    pub(crate) async fn with_postgres(&mut self, act: impl FnOnce(&mut Postgres) + Send + 'static) {
        let mut postgres = self.postgres.take().unwrap();
        let acting = tokio::task::spawn_blocking(move || {
            act(&mut postgres);
            postgres
        });
        self.postgres = Some(acting.await.unwrap());
    }

    /// The memory that each instance has, in KiB.
    pub(crate) fn resident(&self) -> Vec<u64> {
        let of = |child: &Child| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
            let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default().to_owned();
            line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        self.instances.iter().map(of).collect()
    }

    /// Leaves the folder with the logs where it is.
    pub(crate) fn keep_logs(&mut self) -> PathBuf {
        self.folder.take().unwrap().keep()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for child in &mut self.instances {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn private(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
