//! The stand-in for Infisical in a process of its own, so that its time and memory are not
//! taken for ours. It does not limit its callers.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use clap::Args;
use secretier::tiers::upstream::standin::{Identity, Rights, StandIn, World};
use serde_json::{Value, json};

use crate::{
    fill::{Shape, key_name, value},
    stage::ENV,
};

/// Serve the stand-in for Infisical, until standard input ends.
#[derive(Args)]
pub(crate) struct StandInServer {
    #[arg(long, default_value = "t")]
    prefix: String,
    #[arg(long)]
    tenants: usize,
    #[arg(long)]
    keys: usize,
    #[arg(long)]
    value: usize,
}

impl StandInServer {
    /// Says on standard output where, and how to log in; then, for each line on standard
    /// input, how many calls there were since the line before.
    pub(crate) fn run(self) {
        let Self { prefix, tenants, keys, value: bytes } = self;
        let world = World::empty();
        world.folder(ENV, "/tenants");
        for tenant in 0..tenants {
            for key in 0..keys {
                let value = value(bytes, tenant * keys + key);
                world.put(ENV, &format!("/tenants/{prefix}{tenant}"), &key_name(key), &value);
            }
        }
        let credentials = world.identity(Identity::new(Rights::Full));
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let server = runtime.block_on(StandIn::on_loopback(world.clone())).unwrap();
        let told = json!({
            "url": server.url(),
            "project": world.project_id(),
            "client_id": credentials.client_id,
            "client_secret": credentials.client_secret,
            "token": world.token(&credentials),
        });
        say(&told);
        for line in std::io::stdin().lines() {
            line.unwrap();
            let calls = world.calls_since_mark();
            world.mark();
            say(&json!({ "login": calls.login, "folders": calls.folders, "list": calls.list, "total": calls.total() }));
        }
    }
}

fn say(value: &Value) {
    println!("{value}");
    std::io::stdout().flush().unwrap();
}

/// That process, as seen from here. Dropped, it ends.
pub(crate) struct Upstream {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    pub(crate) url: String,
    pub(crate) project: String,
    pub(crate) client_id: String,
    pub(crate) client_secret: String,
    /// A token that is good, as a login gives it.
    pub(crate) token: String,
}

impl Upstream {
    pub(crate) fn start(shape: Shape<'_>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["stand-in", "--prefix", shape.prefix]);
        for (name, number) in [("--tenants", shape.tenants), ("--keys", shape.keys), ("--value", shape.value)] {
            command.args([name, &number.to_string()]);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, mut stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let told = line(&mut stdout);
        let text = |name: &str| told[name].as_str().unwrap().to_owned();
        Self {
            url: text("url"),
            project: text("project"),
            client_id: text("client_id"),
            client_secret: text("client_secret"),
            token: text("token"),
            child,
            stdin,
            stdout,
        }
    }

    /// Calls since this was last asked, by kind.
    pub(crate) fn calls(&mut self) -> Value {
        self.stdin.write_all(b"calls\n").unwrap();
        line(&mut self.stdout)
    }

    /// Where a tenant's folder is read, as the product reads it.
    pub(crate) fn folder(&self, tenant: &str) -> String {
        format!(
            "/api/v3/secrets/raw?workspaceId={}&environment={ENV}&secretPath=%2Ftenants%2F{tenant}&include_imports=true\
             &expandSecretReferences=true&recursive=false",
            self.project
        )
    }
}

fn line(stdout: &mut BufReader<ChildStdout>) -> Value {
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
