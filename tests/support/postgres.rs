//! A throw-away PostgreSQL, with TLS: its own data folder, a port that the system
//! picked, loopback only. It ends with the test process, however that ends.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::within::{HANGS, eventually, output, within, within_blocking};

const MISSING: &str = "these tests run PostgreSQL and found none: install it (Debian, Ubuntu: `apt-get install postgresql`), \
                       or put its `pg_config` on the PATH";

// Holds the server as its child. Told to, or when the test process is gone, killed or
// not, and with it the pipe to its standard input, it ends the server, which may be
// frozen. With nobody left to do so, it clears up as well.
const WATCHDOG: &str = r#"
folder=$1; signal=$2; shift 2
exec 2>>"$folder/log"
"$@" >>"$folder/log" </dev/null &
echo $!
read -r told
for child in $(ps -o pid= --ppid $!) $!; do kill -$signal $child; kill -CONT $child; done
wait $!
[ "$told" ] || rm -rf "$folder"
"#;

/// A running server.
pub(crate) struct Postgres {
    server: Option<Server>,
    folder: TempDir,
    port: u16,
    databases: AtomicU32,
    /// More settings to start it with.
    settings: Vec<String>,
}

/// A server program under a watchdog.
pub(crate) struct Server {
    watchdog: Child,
    pid: u32,
}

impl Server {
    /// Runs a program that ends at this signal, as a user that servers may run as; it writes into
    /// `log` in that folder, which goes with it if the test process is killed.
    pub(crate) fn run(folder: &Path, signal: &str, program: &Path, arguments: &[String]) -> Self {
        let mut watchdog = Command::new("sh");
        watchdog.args(["-c", WATCHDOG, "watchdog"]).arg(folder).arg(signal);
        watchdog.args(as_user()).arg(program).args(arguments);
        let mut watchdog = watchdog.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sh runs");
        let stdout = watchdog.stdout.take().expect("a pipe");
        let pid = within_blocking("the watchdog tells the server's process id", move || {
            let mut pid = String::new();
            BufReader::new(stdout).read_line(&mut pid).map(|_| pid)
        });
        let pid = pid.expect("the server's process id");
        Self { watchdog, pid: pid.trim().parse().expect("a process id") }
    }

    pub(crate) fn runs(&self) -> bool {
        Path::new(&format!("/proc/{}", self.pid)).exists()
    }

    /// Ends the server, its connections and all.
    pub(crate) fn stop(mut self) {
        let mut pipe = self.watchdog.stdin.take().expect("a pipe");
        pipe.write_all(b"stop\n").expect("the watchdog listens");
        drop(pipe);
        within_blocking("the server ends", move || self.watchdog.wait()).expect("the watchdog ends");
    }
}

impl Postgres {
    /// The server that the tests of one binary share.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: OnceLock<Postgres> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    /// A server of one's own, to be stopped and started.
    pub(crate) fn start() -> Self {
        let folder = TempDir::with_prefix("secretier-postgres-").expect("a temporary folder");
        make_certificates(folder.path());
        give_to_servers(folder.path());
        let data = folder.path().join("data");
        let initdb = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"];
        run(server_command("initdb").args(initdb).arg("-D").arg(&data));
        let mut postgres = Self { server: None, folder, port: 0, databases: AtomicU32::new(0), settings: Vec::new() };
        for _ in 0..5 {
            // Between our letting go of the port and the server's taking it, another may.
            postgres.port = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr()).expect("a port").port();
            if postgres.launch() {
                return postgres;
            }
        }
        panic!("PostgreSQL does not start: {}", postgres.log());
    }

    /// A new database's URL, without TLS.
    pub(crate) async fn database(&self) -> String {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        execute(&self.url("postgres"), &format!("CREATE DATABASE {name}")).await;
        format!("{}?sslmode=disable", self.url(&name))
    }

    /// A database's URL, without options.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Lets a role in by its password only (SCRAM), from now on; all others need none.
    pub(crate) async fn ask_for_password(&self, role: &str) {
        let file = self.folder.path().join("data/pg_hba.conf");
        let others = fs::read_to_string(&file).expect("pg_hba.conf");
        fs::write(&file, format!("host all {role} all scram-sha-256\n{others}")).expect("pg_hba.conf");
        // The server goes by it as soon as it has seen the signal.
        execute(&self.url("postgres"), "SELECT pg_reload_conf()").await;
        let without = self.url("postgres").replace("postgres@", &format!("{role}@"));
        eventually(async || tokio_postgres::connect(&without, tokio_postgres::NoTls).await.is_err()).await;
    }

    /// The port it listens at.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The certificate that signed the server's own, which is for `localhost`.
    pub(crate) fn root_certificate(&self) -> PathBuf {
        self.folder.path().join("root.pem")
    }

    /// Restarts the server with a certificate that this command of openssl makes in its folder, as
    /// `server.pem` of `server.key`, and so many settings more.
    pub(crate) fn present(&mut self, openssl: &[&str], settings: &[&str]) {
        self.stop();
        for arguments in openssl {
            run(Command::new("openssl").args(arguments.split(' ')).current_dir(self.folder.path()));
        }
        give_to_servers(self.folder.path());
        self.settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        self.start_again();
    }

    /// The server's own certificate.
    pub(crate) fn certificate(&self) -> PathBuf {
        self.folder.path().join("server.pem")
    }

    /// Ends the server, its connections and all.
    pub(crate) fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }

    /// Kills the server, as a crash would.
    pub(crate) fn kill(&mut self) {
        self.signal("KILL");
        self.stop();
    }

    /// Starts the server again, at the same port and with the same data.
    pub(crate) fn start_again(&mut self) {
        assert!(self.launch(), "PostgreSQL does not start again: {}", self.log());
    }

    /// Ends the server and starts it again.
    pub(crate) fn restart(&mut self) {
        self.stop();
        self.start_again();
    }

    /// Stops the server and its children where they stand: connections stay, nobody answers.
    pub(crate) fn freeze(&self) {
        self.signal("STOP");
    }

    /// Lets a frozen server go on.
    pub(crate) fn thaw(&self) {
        self.signal("CONT");
    }

    fn signal(&self, signal: &str) {
        let server = self.server.as_ref().expect("a running server");
        let children = output(Command::new("ps").args(["-o", "pid=", "--ppid", &server.pid.to_string()]));
        let children = String::from_utf8(children.stdout).expect("numbers");
        let mut kill = Command::new("kill");
        kill.arg(format!("-{signal}")).arg(server.pid.to_string()).args(children.split_whitespace());
        // A child may have ended since it was listed.
        output(&mut kill);
    }

    fn launch(&mut self) -> bool {
        let data = self.folder.path().join("data");
        // A crash leaves it behind, and its process id may be someone else's by now.
        let _ = fs::remove_file(data.join("postmaster.pid"));
        let (port, file) = (self.port, |name: &str| self.folder.path().join(name).display().to_string());
        let settings = [
            format!("port={port}"),
            "listen_addresses=127.0.0.1".to_owned(),
            format!("unix_socket_directories={}", self.folder.path().display()),
            "fsync=off".to_owned(),
            "max_connections=500".to_owned(),
            "ssl=on".to_owned(),
            format!("ssl_cert_file={}", file("server.pem")),
            format!("ssl_key_file={}", file("server.key")),
        ];
        let mut arguments = vec!["-D".to_owned(), data.display().to_string()];
        let settings = settings.into_iter().chain(self.settings.clone());
        arguments.extend(settings.flat_map(|setting| ["-c".to_owned(), setting]));
        self.server = Some(Server::run(self.folder.path(), "QUIT", &program("postgres"), &arguments));
        let deadline = Instant::now() + HANGS;
        while Instant::now() < deadline && self.server.as_ref().is_some_and(Server::runs) {
            let state = fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
            if state.lines().nth(7).is_some_and(|line| line.trim() == "ready") {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.stop();
        false
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Runs statements at a database, one's own connection.
pub(crate) async fn execute(url: &str, sql: &str) {
    let done = async {
        let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.expect("a connection");
        let connection = tokio::spawn(connection);
        client.batch_execute(sql).await.expect(sql);
        drop(client);
        let _ = connection.await;
    };
    within(sql, done).await;
}

/// A session that keeps what it is told to lock until it is dropped.
pub(crate) async fn session(url: &str, sql: &str) -> tokio_postgres::Client {
    let client = connect(url).await;
    within(sql, client.batch_execute(sql)).await.expect(sql);
    client
}

/// The first column of the first row, a number.
pub(crate) async fn number(url: &str, sql: &str) -> i64 {
    let client = connect(url).await;
    within(sql, client.query_one(sql, &[])).await.expect(sql).get(0)
}

async fn connect(url: &str) -> tokio_postgres::Client {
    let connecting = tokio_postgres::connect(url, tokio_postgres::NoTls);
    let (client, connection) = within("PostgreSQL takes a connection", connecting).await.expect("a connection");
    tokio::spawn(connection);
    client
}

fn make_certificates(folder: &Path) {
    let openssl = |arguments: &str| {
        run(Command::new("openssl").args(arguments.split(' ')).current_dir(folder));
    };
    fs::write(folder.join("server.ext"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n").expect("a file");
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!("req -x509 {key} -keyout root.key -out root.pem -days 2 -subj /CN=secretier-test-root"));
    openssl(&format!("req {key} -keyout server.key -out server.csr -subj /CN=localhost"));
    openssl(
        "x509 -req -in server.csr -CA root.pem -CAkey root.key -CAcreateserial -out server.pem -days 2 -extfile server.ext",
    );
}

/// Gives a folder to the user that servers run as.
pub(crate) fn give_to_servers(folder: &Path) {
    if let Some(user) = unprivileged() {
        run(Command::new("chown").arg("-R").arg(user).arg(folder));
    }
}

/// PostgreSQL does not run as root: then it runs as the user that its package made.
fn unprivileged() -> Option<&'static str> {
    let id = output(Command::new("id").arg("-u"));
    (id.stdout.trim_ascii() == b"0").then_some("postgres")
}

fn as_user() -> Vec<&'static str> {
    match unprivileged() {
        Some(_) => vec!["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"],
        None => Vec::new(),
    }
}

fn server_command(name: &str) -> Command {
    let mut words = as_user().into_iter();
    match words.next() {
        Some(first) => {
            let mut command = Command::new(first);
            command.args(words).arg(program(name));
            command
        }
        None => Command::new(program(name)),
    }
}

fn program(name: &str) -> PathBuf {
    let mut folders = Vec::new();
    if let Ok(told) = Command::new("pg_config").arg("--bindir").output() {
        folders.push(PathBuf::from(String::from_utf8_lossy(&told.stdout).trim()));
    }
    let mut versions: Vec<_> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .collect();
    versions.sort();
    folders.extend(versions.into_iter().rev());
    folders.iter().map(|folder| folder.join(name)).find(|path| path.exists()).unwrap_or_else(|| panic!("{MISSING}"))
}

fn run(command: &mut Command) {
    let output = output(command);
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
