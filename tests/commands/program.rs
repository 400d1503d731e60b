//! Runs the executable: to its end, or beside the test until that ends.

use std::{
    io::{BufRead as _, BufReader, Read, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, LazyLock, Mutex},
    time::{Duration, Instant},
};

use diesel::{Connection as _, SqliteConnection, connection::SimpleConnection as _};
use secretier::tiers::upstream::standin::{Credentials, Identity, Rights, StandIn, World};
use tempfile::TempDir;

use crate::{
    postgres,
    within::{output, until},
};

/// Far above what a command takes, with all that it does: what runs into it hangs.
pub(crate) const HANGS: Duration = Duration::from_secs(300);

/// A folder to run commands in, with its configuration in `secretier.toml`.
pub(crate) struct Place {
    folder: TempDir,
    variables: Vec<(String, String)>,
    /// Another program than Cargo's.
    program: Option<String>,
}

/// Where its database is.
enum Target {
    Sqlite(PathBuf),
    Postgres(String),
}

fn connect(file: &Path) -> SqliteConnection {
    SqliteConnection::establish(file.to_str().unwrap()).unwrap()
}

/// The executable: Cargo's, or another build of it that a variable names.
fn program() -> &'static str {
    static PROGRAM: LazyLock<String> = LazyLock::new(|| {
        std::env::var("SECRETIER_TEST_PROGRAM").unwrap_or_else(|_| env!("CARGO_BIN_EXE_secretier").to_owned())
    });
    &PROGRAM
}

/// What a command left.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}", self.stderr);
        self.stdout
    }

    /// What it told, having failed with this code; nothing may stand on standard output.
    #[track_caller]
    pub(crate) fn failed(self, code: i32) -> String {
        assert_eq!((self.code, self.stdout.as_str()), (code, ""), "{}", self.stderr);
        self.stderr
    }
}

impl Place {
    pub(crate) fn new(config: &str) -> Self {
        let mut place = Self { folder: TempDir::new().unwrap(), variables: Vec::new(), program: None };
        place.write("secretier.toml", config);
        // At a moment of its own after the start, memory would be filled with what was asked for
        // last, and hide what the tiers below say.
        place.set("SECRETIER_MEMORY__WARM_TENANTS", "0");
        place
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file that only its owner can read.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// Sets a variable for all commands from now on.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// Has commands run by this program from now on.
    pub(crate) fn run_by(&mut self, program: &str) {
        self.program = Some(program.to_owned());
    }

    /// Runs SQL behind the program's back.
    pub(crate) async fn sql(&self, sql: &str) {
        match self.database() {
            Target::Sqlite(file) => connect(&file).batch_execute(sql).unwrap(),
            Target::Postgres(url) => postgres::execute(&url, &format!("SET search_path TO secretier; {sql}")).await,
        }
    }

    /// Whether nobody is in the middle of writing. On SQLite nobody else could write until it goes
    /// on; PostgreSQL ends the transaction after a while, for which others wait.
    fn can_be_written_to(&self) -> bool {
        const AT_WORK: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                               AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND state <> 'idle'";
        match self.database() {
            Target::Sqlite(file) => connect(&file).batch_execute("BEGIN IMMEDIATE; ROLLBACK").is_ok(),
            Target::Postgres(url) => {
                let at_work = postgres::number(&url, AT_WORK);
                tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(at_work)) == 0
            }
        }
    }

    fn database(&self) -> Target {
        let config = std::fs::read_to_string(self.path().join("secretier.toml")).unwrap();
        let url = config.lines().find_map(|line| line.strip_prefix("url = ")).unwrap().trim_matches('"');
        match url.strip_prefix("sqlite:") {
            Some(file) => Target::Sqlite(PathBuf::from(file)),
            None => Target::Postgres(url.to_owned()),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.command_under(&[], arguments)
    }

    /// The command as it stands, or as the arguments of another one that runs it.
    fn command_under(&self, other: &[&str], arguments: &[&str]) -> Command {
        let program = match &self.program {
            Some(other) => other.as_str(),
            None => program(),
        };
        let words = [other, if other.is_empty() { &[] } else { &["sh"] }, &[program]].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        // Nothing that is set around the tests may change what they see.
        command.env_clear().envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.current_dir(self.path()).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command that reads `secretier.toml`.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.run_with(&[arguments, &["--config", "secretier.toml"]].concat(), "")
    }

    /// Runs a command as it stands, with this on its standard input.
    pub(crate) fn run_with(&self, arguments: &[&str], input: &str) -> Ended {
        let mut child = self.command(arguments).spawn().unwrap();
        // A command that does not read its input may be gone before it is written.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let (stdout, stderr) = (gather(child.stdout.take().unwrap()), gather(child.stderr.take().unwrap()));
        let mut running = Running { child, stdout, stderr };
        let code = running.wait();
        let Running { stdout, stderr, .. } = &running;
        Ended { code, stdout: stdout.whole(), stderr: stderr.whole() }
    }

    /// Starts a command that goes on until it is told to end.
    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        Self::begin(self.command(arguments))
    }

    /// The same, run by a script of the shell that ends in `exec "$@"`, with these as its standard
    /// input and output: what is not a pipe is not gathered.
    pub(crate) fn start_on(&self, shell: &[&str], arguments: &[&str], input: Stdio, output: Stdio) -> Running {
        let mut command = self.command_under(shell, arguments);
        command.stdin(input).stdout(output);
        Self::begin(command)
    }

    fn begin(mut command: Command) -> Running {
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().map_or_else(|| gather(std::io::empty()), gather);
        let stderr = gather(child.stderr.take().unwrap());
        Running { child, stdout, stderr }
    }

    /// Starts `serve` and waits until it serves; gives its address too.
    pub(crate) fn serve(&self) -> (Running, String) {
        self.serve_under(&[])
    }

    /// The same, run by a script of the shell (`sh -c SCRIPT`) that ends in `exec "$@"`.
    pub(crate) fn serve_under(&self, shell: &[&str]) -> (Running, String) {
        let mut running = Self::begin(self.command_under(shell, &["serve", "--config", "secretier.toml"]));
        let line = running.stderr_line("serving");
        let address = line.split("address=").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
        (running, format!("http://{address}"))
    }
}

/// A command under way. Dropped, it is killed.
pub(crate) struct Running {
    child: Child,
    stdout: Gathered,
    stderr: Gathered,
}

impl Running {
    /// Waits for a line on standard output.
    pub(crate) fn stdout_line(&mut self) -> String {
        let found = self.stdout.line("");
        found.unwrap_or_else(|| panic!("it said nothing; on standard error: {}", self.stderr.so_far()))
    }

    /// Waits for a line on standard error that contains this.
    pub(crate) fn stderr_line(&mut self, text: &str) -> String {
        let found = self.stderr.line(text);
        found.unwrap_or_else(|| panic!("it never said {text:?}, but {}", self.stderr.so_far()))
    }

    /// Waits until it says this on standard error, or ends without.
    pub(crate) fn until_said(&self, text: &str) {
        let _ = self.stderr.line(text);
    }

    /// Waits until it has said this on standard error so many times.
    pub(crate) fn until_said_times(&self, text: &str, times: usize) {
        assert!(self.stderr.times(text, times), "it did not say {text:?} {times} times, but {}", self.stderr.so_far());
    }

    pub(crate) fn stderr(&self) -> String {
        self.stderr.so_far()
    }

    /// All that it printed; to be asked when it has ended.
    pub(crate) fn stdout(&self) -> String {
        self.stdout.whole()
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end, and waits until it has; gives its exit code.
    pub(crate) fn terminate(&mut self) -> i32 {
        self.signal("TERM");
        self.wait()
    }

    /// Stops it where it stands, but not in the middle of writing to its database.
    pub(crate) fn stop(&self, place: &Place) {
        let began = Instant::now();
        loop {
            self.signal("STOP");
            until(|| self.is_stopped());
            if place.can_be_written_to() {
                return;
            }
            assert!(began.elapsed() < HANGS, "it writes all the while");
            self.signal("CONT");
        }
    }

    /// Lets it go on.
    pub(crate) fn go_on(&self) {
        self.signal("CONT");
    }

    /// Whether every thread of it stands still.
    fn is_stopped(&self) -> bool {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        threads.filter_map(Result::ok).all(|thread| {
            let status = std::fs::read_to_string(thread.path().join("status")).unwrap_or_default();
            status.lines().any(|line| line.starts_with("State:\tT"))
        })
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(output(Command::new("kill").args([&format!("-{signal}"), &pid])).status.success());
    }

    /// Waits until it has ended; gives its exit code.
    pub(crate) fn wait(&mut self) -> i32 {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                // What it said last may be in the pipe still.
                self.stderr.whole();
                return status.code().expect("it ended by itself");
            }
            assert!(began.elapsed() < HANGS, "it does not end: {}", self.stderr.so_far());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What came out of a pipe, line by line, and whether it has ended.
#[derive(Clone, Default)]
struct Gathered(Arc<(Mutex<(String, bool)>, Condvar)>);

fn gather(pipe: impl Read + Send + 'static) -> Gathered {
    let gathered = Gathered::default();
    let into = gathered.clone();
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            into.0.0.lock().unwrap().0.push_str(&String::from_utf8_lossy(&line));
            into.0.1.notify_all();
            line.clear();
        }
        into.0.0.lock().unwrap().1 = true;
        into.0.1.notify_all();
    });
    gathered
}

impl Gathered {
    fn so_far(&self) -> String {
        self.0.0.lock().unwrap().0.clone()
    }

    /// All of it, once it has ended.
    fn whole(&self) -> String {
        let (text, ended) = &*self.0;
        let (text, _) = ended.wait_timeout_while(text.lock().unwrap(), HANGS, |(_, ended)| !*ended).unwrap();
        text.0.clone()
    }

    /// Whether so many lines contain this, in the end.
    fn times(&self, wanted: &str, times: usize) -> bool {
        let has = |text: &str| text.lines().filter(|line| line.contains(wanted)).count() >= times;
        let (text, changed) = &*self.0;
        let waiting = |state: &mut (String, bool)| !has(&state.0) && !state.1;
        let (text, _) = changed.wait_timeout_while(text.lock().unwrap(), HANGS, waiting).unwrap();
        has(&text.0)
    }

    /// The first line that contains this.
    fn line(&self, wanted: &str) -> Option<String> {
        let find = |text: &str| {
            let mut lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            lines.find(|line| line.contains(wanted)).map(|line| line.trim_end().to_owned())
        };
        let (text, changed) = &*self.0;
        let waiting = |state: &mut (String, bool)| find(&state.0).is_none() && !state.1;
        let (text, _) = changed.wait_timeout_while(text.lock().unwrap(), HANGS, waiting).unwrap();
        find(&text.0)
    }
}

/// A stand-in for Infisical, and what to log in with.
pub(crate) struct Infisical {
    pub(crate) server: StandIn,
    pub(crate) credentials: Credentials,
}

impl Infisical {
    pub(crate) async fn start() -> Self {
        let world = World::empty();
        world.folder("prod", "/tenants");
        let credentials = world.identity(Identity::new(Rights::Full));
        Self { server: StandIn::on_loopback(world).await.unwrap(), credentials }
    }

    pub(crate) fn world(&self) -> &World {
        self.server.world()
    }

    /// Its section of the configuration; the secret stands in `INFISICAL_CLIENT_SECRET`.
    pub(crate) fn section(&self) -> String {
        format!(
            "[infisical]\nsite_url = \"{}\"\nproject_id = \"{}\"\nclient_id = \"{}\"\n\
             client_secret = {{ env = \"INFISICAL_CLIENT_SECRET\" }}\n",
            self.server.url(),
            self.world().project_id(),
            self.credentials.client_id,
        )
    }
}

/// A master key, as it is written into a file.
pub(crate) fn master_key() -> String {
    hex::encode(rand::random::<[u8; 32]>())
}

/// A client that speaks plain HTTP, beside the executable's own.
pub(crate) fn client() -> reqwest::Client {
    client_builder().pool_max_idle_per_host(0).build().unwrap()
}

/// The same, keeping its connections open.
pub(crate) fn keeping_client() -> reqwest::Client {
    client_builder().build().unwrap()
}

fn client_builder() -> reqwest::ClientBuilder {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().timeout(HANGS)
}

/// A secret's address.
pub(crate) fn secret_url(url: &str, tenant: &str, key: &str) -> String {
    let key = percent_encoding::utf8_percent_encode(key, percent_encoding::NON_ALPHANUMERIC);
    format!("{url}/v1/tenants/{tenant}/secrets/{key}")
}

/// A secret's status, `Cache-Status` and body.
pub(crate) async fn look_up(url: &str, token: &str, tenant: &str, key: &str) -> (u16, String, String) {
    let request = client().get(format!("{url}/v1/tenants/{tenant}/secrets/{key}")).bearer_auth(token);
    let answer = request.send().await.unwrap();
    let cache_status = answer.headers().get("cache-status").map_or("", |value| value.to_str().unwrap()).to_owned();
    (answer.status().as_u16(), cache_status, answer.text().await.unwrap())
}
