//! What is attacked: one instance of the program on SQLite, with a stand-in for Infisical that signs notices.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use diesel::{Connection as _, RunQueryDsl as _, SqliteConnection, dsl::sql, sql_types::BigInt};
use hmac::{Hmac, KeyInit as _, Mac as _};
use secretier::tiers::upstream::standin::{Identity, Rights, StandIn, World};
use serde_json::json;
use sha2::Sha256;
use tempfile::TempDir;

use super::{Form, caller::Caller};

/// What runs into it hangs.
pub(crate) const HANGS: Duration = Duration::from_secs(60);

/// What Infisical signs its notices with.
const WEBHOOK_SECRET: &str = "of-the-attacked-alone";

/// A build of the program.
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    /// The words of another command that runs it.
    pub(crate) under: Vec<String>,
}

/// The instance, and those who may ask it for something.
pub(crate) struct Stage {
    pub(crate) address: String,
    /// Reads and writes the tenant `good`.
    pub(crate) good: String,
    /// Reads the tenant `large`, and nothing else.
    pub(crate) small: String,
    /// Reads and writes the tenant `other`.
    pub(crate) writer: String,
    child: Child,
    infisical: StandIn,
    folder: TempDir,
}

impl Stage {
    /// Starts it and waits until it serves.
    pub(crate) async fn set(program: &Program, form: Form) -> Self {
        let folder = TempDir::with_prefix("secretier-attack-").unwrap();
        let world = World::empty();
        world.folder("prod", "/tenants");
        let identity = world.identity(Identity::new(Rights::Full));
        let infisical = StandIn::on_loopback(world).await.unwrap();
        private(folder.path(), "master.key", &hex::encode(rand::random::<[u8; 32]>()));
        private(
            folder.path(),
            "secretier.toml",
            &format!(
                r#"
                environment = "prod"
                phase = "database"
                [server]
                listen = "127.0.0.1:0"
                infisical_api.enabled = true
                [database]
                url = "sqlite:secretier.db"
                timeout = "{timeout}"
                [infisical]
                site_url = "{site}"
                project_id = "{project}"
                client_id = "{id}"
                client_secret = "{secret}"
                webhook_secret = "{WEBHOOK_SECRET}"
                timeout = "{lookup}"
                read_timeout = "{read}"
                [keys]
                sources = ["file:master.key"]
                [audit]
                window = "1s"
                "#,
                // How fast the disk is, and an unoptimised build, the short form does not judge.
                timeout = form.choose("1s", "30s"),
                lookup = form.choose("2s", "50s"),
                read = form.choose("15s", "50s"),
                site = infisical.url(),
                project = infisical.world().project_id(),
                id = identity.client_id,
                secret = identity.client_secret,
            ),
        );
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let words = [program.under.as_slice(), &[program.path.to_str().unwrap().to_owned()]].concat();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["serve", "--config", "secretier.toml"]).current_dir(folder.path());
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        let child = child.unwrap_or_else(|error| panic!("{words:?}: {error}"));
        let none = String::new;
        let mut stage = Self { address: none(), good: none(), small: none(), writer: none(), child, infisical, folder };
        stage.address = stage.until_serving().await;
        let token = |name: &str, tenants: &str, actions: &str| {
            let mut command = Command::new(&program.path);
            command.args(["token", "create", "--name", name, "--tenants", tenants, "--actions", actions]);
            let output =
                command.args(["--config", "secretier.toml"]).current_dir(stage.folder.path()).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        [stage.good, stage.small, stage.writer] = [
            token("good", "good", "read,write"),
            token("small", "large", "read"),
            token("writer", "other,large", "read,write"),
        ];
        let mut caller = Caller::new(&stage.address, &stage.good);
        for key in ["K", "W"] {
            let written =
                caller.put(&format!("/v1/tenants/good/secrets/{key}?create_tenant=true"), "of the good caller");
            assert!(written.is_ok(), "{written:?}");
        }
        stage
    }

    async fn until_serving(&mut self) -> String {
        let began = Instant::now();
        loop {
            let log = self.log();
            let line = log.lines().find(|line| line.contains("serving") && line.contains("address="));
            if let Some(address) = line.and_then(|line| line.split("address=").nth(1)?.split(' ').next()) {
                return address.to_owned();
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && began.elapsed() < HANGS, "it does not start: {log}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Gives the tenant `large` a list of 16 MiB, and has it listed once. In the short form it is one of
    /// 2 MiB: a build that is not optimised takes longer to open 16 than a list may take.
    pub(crate) fn fill_large(&self, form: Form) {
        let mut caller = Caller::new(&self.address, &self.writer);
        let (secrets, length) = form.choose((256, 64 << 10), (16, 128 << 10));
        let value = "v".repeat(length);
        for number in 0..secrets {
            let path = format!("/v1/tenants/large/secrets/LARGE_{number}?create_tenant=true");
            let written = caller.put(&path, &value);
            assert!(written.is_ok(), "{written:?}");
        }
        let listed = Caller::new(&self.address, &self.small).get(LARGE_LIST);
        assert!(listed.is_ok(), "{listed:?}");
    }

    /// A notice that Infisical would sign now: its header and its body.
    pub(crate) fn notice(&self, number: usize) -> (String, String) {
        let at = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
        let project = json!({
            "workspaceId": self.infisical.world().project_id(),
            "environment": "prod",
            "secretPath": format!("/tenants/noticed-{number}"),
        });
        let body = json!({ "event": "secrets.modified", "project": project, "timestamp": at }).to_string();
        let mut mac = <Hmac<Sha256>>::new_from_slice(WEBHOOK_SECRET.as_bytes()).unwrap();
        mac.update(body.as_bytes());
        (format!("t={at};{}", hex::encode(mac.finalize().into_bytes())), body)
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Whether nobody has ended it.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// What the database takes on the disk, in bytes: its file and what belongs to it.
    pub(crate) fn disk(&self) -> u64 {
        let files = fs::read_dir(self.folder.path()).unwrap().map(Result::unwrap);
        let of_database = files.filter(|file| file.file_name().to_string_lossy().starts_with("secretier.db"));
        of_database.map(|file| file.metadata().map_or(0, |metadata| metadata.len())).sum()
    }

    /// The audit's rows, but for the good caller's, and how many requests they account for.
    pub(crate) fn audit(&self) -> Audit {
        let file = self.folder.path().join("secretier.db");
        let mut connection = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
        let mut number = |query: &str| {
            let found = diesel::select(sql::<BigInt>(query)).get_result::<i64>(&mut connection);
            u64::try_from(found.unwrap()).unwrap()
        };
        Audit {
            rows: number("(SELECT count(*) FROM audit_records WHERE actor_name IS NOT 'good')"),
            requests: number("(SELECT coalesce(sum(count), 0) FROM audit_records WHERE actor_name IS NOT 'good')"),
        }
    }
}

#[derive(Clone, Copy, Default)]
pub(crate) struct Audit {
    pub(crate) rows: u64,
    pub(crate) requests: u64,
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The large tenant's list, with its values.
pub(crate) const LARGE_LIST: &str = "/v1/tenants/large/secrets?values=true";

fn private(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}
