//! A PgBouncer in front of a throw-away PostgreSQL: settings of its own, a port that the system
//! picked, loopback only. It ends with the test process, however that ends.

use std::{
    env, fs,
    net::{TcpListener, TcpStream},
    path::PathBuf,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{
    postgres::{Postgres, Server, give_to_servers},
    within::HANGS,
};

const MISSING: &str =
    "these tests run PgBouncer and found none: install it (Debian, Ubuntu: `apt-get install pgbouncer`)";

/// A running pooler.
pub(crate) struct Pgbouncer {
    server: Option<Server>,
    _folder: TempDir,
    port: u16,
}

impl Pgbouncer {
    /// In front of this server, with these settings, a line each.
    pub(crate) fn start(behind: &Postgres, settings: &str) -> Self {
        for _ in 0..5 {
            // Between our letting go of the port and the pooler's taking it, another may.
            let port = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr()).expect("a port").port();
            let folder = TempDir::with_prefix("secretier-pgbouncer-").expect("a temporary folder");
            let config = folder.path().join("pgbouncer.ini");
            let text = format!(
                "[databases]\n* = host=127.0.0.1 port={} user=postgres\n\
                 [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
                 auth_type = any\n{settings}\n",
                behind.port()
            );
            fs::write(&config, text).expect("a file");
            give_to_servers(folder.path());
            let server = Server::run(folder.path(), "TERM", &program(), &[config.display().to_string()]);
            let pooler = Self { server: Some(server), _folder: folder, port };
            if pooler.listens() {
                return pooler;
            }
        }
        panic!("PgBouncer does not start");
    }

    /// The URL of a database through it, from its name and options.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    fn listens(&self) -> bool {
        let deadline = Instant::now() + HANGS;
        while Instant::now() < deadline && self.server.as_ref().is_some_and(Server::runs) {
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }
}

impl Drop for Pgbouncer {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

fn program() -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    // It stands outside the PATH of an ordinary user.
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    folders.map(|folder| folder.join("pgbouncer")).find(|path| path.exists()).unwrap_or_else(|| panic!("{MISSING}"))
}
