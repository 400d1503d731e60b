//! The processes: the program itself, hyper alone, PostgreSQL; and what they cost.

use std::{
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use tempfile::TempDir;

use crate::{client::Client, fill::Shape, postgres::Postgres, upstream::Upstream, wrk::private};

pub(crate) const ENV: &str = "prod";

/// What runs into it hangs.
const HANGS: Duration = Duration::from_secs(300);

/// Which database.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    Sqlite,
    Postgres,
}

impl Engine {
    pub(crate) const BOTH: [Self; 2] = [Self::Sqlite, Self::Postgres];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sqlite => "SQLite",
            Self::Postgres => "PostgreSQL",
        }
    }
}

/// A folder with a configuration, a master key and a database with a token.
pub(crate) struct Place {
    folder: TempDir,
    /// The URL of its database.
    pub(crate) database: String,
    pub(crate) master_key: String,
    /// May read.
    pub(crate) token: String,
    /// May look at metrics.
    pub(crate) admin: String,
}

impl Place {
    /// With an empty database, which owns all secrets.
    pub(crate) fn new(engine: Engine) -> Self {
        Self::with(engine, "database", "")
    }

    /// Whose secrets come from upstream, unless the phase is the database's.
    pub(crate) fn before(upstream: &Upstream, phase: &str) -> Self {
        let section = format!(
            "[infisical]\nsite_url = \"{}\"\nproject_id = \"{}\"\nclient_id = \"{}\"\n\
             client_secret = {{ file = \"client.secret\" }}\nrequests_per_minute = 100000000\n\
             migration_requests_per_minute = 100000000\npoll_interval = \"0s\"\ntimeout = \"30s\"\n",
            upstream.url, upstream.project, upstream.client_id
        );
        let secret = ("client.secret", upstream.client_secret.as_str());
        Self::build(Engine::Sqlite, phase, &section, &[secret])
    }

    fn with(engine: Engine, phase: &str, more: &str) -> Self {
        Self::build(engine, phase, more, &[])
    }

    fn build(engine: Engine, phase: &str, more: &str, files: &[(&str, &str)]) -> Self {
        let folder = TempDir::with_prefix("secretier-bench-").unwrap();
        let database = match engine {
            Engine::Sqlite => format!("sqlite:{}", folder.path().join("secretier.db").display()),
            Engine::Postgres => wait_for(Postgres::shared().database()),
        };
        let master_key = hex::encode(rand::random::<[u8; 32]>());
        private(folder.path(), "master.key", &master_key);
        for (name, text) in files {
            private(folder.path(), name, text);
        }
        // Limits are on, and never reached.
        let config = format!(
            "environment = \"{ENV}\"\nphase = \"{phase}\"\n[server]\nlisten = \"127.0.0.1:0\"\n\
             [access]\nrequests_per_second_per_token = 100000000\nrequests_per_second_per_peer = 100000000\n\
             [memory]\nttl = \"1h\"\n\
             [database]\nurl = \"{database}\"\ntimeout = \"30s\"\n[keys]\nsources = [\"file:master.key\"]\n\
             [log]\nlevel = \"info\"\n{more}"
        );
        private(folder.path(), "secretier.toml", &config);
        let mut place = Self { folder, database, master_key, token: String::new(), admin: String::new() };
        place.token = place.new_token("bench", "read");
        place.admin = place.new_token("watch", "admin");
        place
    }

    fn new_token(&self, name: &str, actions: &str) -> String {
        self.run(&["token", "create", "--name", name, "--tenants", "*", "--actions", actions]).trim().to_owned()
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The file of its database, where that is one.
    pub(crate) fn file(&self) -> Option<&str> {
        self.database.strip_prefix("sqlite:")
    }

    /// The program with these arguments, or another program that runs it.
    pub(crate) fn command(&self, under: &[&str], arguments: &[&str], settings: &[(&str, &str)]) -> Command {
        let words = [under, &[env!("CARGO_BIN_EXE_secretier")], arguments, &["--config", "secretier.toml"]].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).current_dir(self.path()).env_clear().env("PATH", std::env::var("PATH").unwrap());
        for (name, value) in settings {
            command.env(name, value);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// Runs a command to its end; gives what it printed.
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        let mut command = self.command(&[], arguments, &[]);
        let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts an instance with these variables, and waits until it serves.
    pub(crate) fn serve(&self, settings: &[(&str, &str)]) -> Server {
        self.serve_under(&[], settings)
    }

    /// The same, run by another program.
    pub(crate) fn serve_under(&self, under: &[&str], settings: &[(&str, &str)]) -> Server {
        let mut command = self.command(under, &["serve"], settings);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let said = lines(child.stderr.take().unwrap());
        let mut server = Server { child, url: String::new(), said, stdin: None };
        let line = server.until_said("serving");
        let address = line.split("address=").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        server.url = format!("http://{address}");
        server
    }

    /// One that has all secrets of this shape in memory, not only those that are asked for.
    pub(crate) fn serve_from_memory(&self, shape: Shape<'_>) -> Server {
        let tenants = shape.tenants.to_string();
        let settings = [("SECRETIER_MEMORY__CAPACITY", "4GiB"), ("SECRETIER_MEMORY__WARM_TENANTS", tenants.as_str())];
        let mut server = self.serve(&settings);
        let said = server.until_said("memory knows the secrets");
        assert!(said.contains(&format!("secrets={}", shape.count())), "{said}");
        server
    }

    /// How many lookups each tier has answered: memory, database, Infisical.
    pub(crate) fn answered(&self, server: &Server) -> [f64; 3] {
        let metrics = self.metrics(server);
        ["memory", "database", "infisical"].map(|tier| {
            let tier = format!("tier=\"{tier}\"");
            sum(&metrics, |line| line.starts_with("secretier_lookups_total{") && line.contains(&tier))
        })
    }

    /// How many lookups the audit counted, because too many records waited.
    pub(crate) fn summed(&self, server: &Server) -> f64 {
        sum(&self.metrics(server), |line| line.starts_with("secretier_audit_summed_total"))
    }

    fn metrics(&self, server: &Server) -> String {
        Client::connect(&server.url, &self.admin).get("/metrics").ok()
    }
}

/// The sum of these lines of the metrics.
fn sum(metrics: &str, counts: impl Fn(&str) -> bool) -> f64 {
    let numbers = metrics.lines().filter(|line| counts(line)).filter_map(|line| line.rsplit(' ').next());
    numbers.map(|number| number.parse::<f64>().unwrap()).sum()
}

/// A server in a process of its own. Dropped, it is killed.
pub(crate) struct Server {
    child: Child,
    pub(crate) url: String,
    said: mpsc::Receiver<String>,
    /// Where it ends with its standard input.
    stdin: Option<ChildStdin>,
}

impl Server {
    /// Hyper alone, with these arguments, run by another program where one is named.
    pub(crate) fn bare(under: &[&str], arguments: &[&str], settings: &[(&str, &str)]) -> Self {
        let own = std::env::current_exe().unwrap();
        let words = [under, &[own.to_str().unwrap(), "bare"], arguments].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).envs(settings.iter().copied());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, said) = (child.stdin.take(), lines(child.stdout.take().unwrap()));
        let mut server = Self { child, url: String::new(), said, stdin };
        server.url = server.until_said("http://");
        server
    }

    /// The same with a body of so many bytes.
    pub(crate) fn bare_of(body: usize) -> Self {
        Self::bare(&[], &["--body", &body.to_string()], &[])
    }

    /// Waits for a line that contains this.
    pub(crate) fn until_said(&mut self, text: &str) -> String {
        let mut before = String::new();
        loop {
            match self.said.recv_timeout(HANGS) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => before.push_str(&(line + "\n")),
                Err(_) => panic!("it never said {text:?}, but {before}"),
            }
        }
    }

    pub(crate) fn process(&self) -> Process {
        Process(self.child.id())
    }

    /// Ends it as an operator would, and waits.
    pub(crate) fn end(mut self) {
        match self.stdin.take() {
            Some(stdin) => drop(stdin),
            None => {
                let pid = rustix::process::Pid::from_child(&self.child);
                rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            }
        }
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the kernel tells of a process.
#[derive(Clone, Copy)]
pub(crate) struct Process(pub(crate) u32);

impl Process {
    /// Seconds of processor time so far, of user and system. It counts in hundredths.
    pub(crate) fn cpu(self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0)).unwrap();
        // The name, in parentheses, may hold anything: utime and stime are the 12th and 13th behind it.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: f64 = fields[11..13].iter().map(|field| field.parse::<f64>().unwrap()).sum();
        // USER_HZ, the same on every Linux that Rust runs on (proc(5), times(2)).
        ticks / 100.0
    }

    /// Whether it has ended and waits to be asked for.
    pub(crate) fn has_ended(self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0)).unwrap_or_default();
        !matches!(stat.rsplit(") ").next().and_then(|rest| rest.chars().next()), Some('R' | 'S' | 'D' | 'I' | 'T'))
    }

    /// Its resident memory, in bytes; nothing once it has ended.
    pub(crate) fn resident(self) -> Option<f64> {
        self.memory("VmRSS:")
    }

    /// What of that is its own; the rest is the program as it lies on disk, which the kernel
    /// maps in larger pieces than are used, and takes back when memory is short.
    pub(crate) fn anonymous(self) -> Option<f64> {
        self.memory("RssAnon:")
    }

    /// The most that was resident.
    pub(crate) fn peak(self) -> Option<f64> {
        self.memory("VmHWM:")
    }

    fn memory(self, name: &str) -> Option<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib * 1024.0)
    }
}

/// Runs a future to its end.
pub(crate) fn wait_for<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Where cargo keeps what it builds, and this program its results.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target"), Into::into)
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn lines(pipe: impl std::io::Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        // To the end, whether anybody listens or not: a full pipe would stop the process.
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    receiver
}
