//! What the process that serves has in its memory, and who may look: asked from outside,
//! by what Linux tells about it.

use std::{
    fs,
    io::{BufRead as _, BufReader, ErrorKind},
    os::unix::fs::FileExt as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use reqwest::Method;
use serde_json::json;

use crate::{
    program::{Place, Running, client, keeping_client, master_key},
    within::{HANGS, output, within_blocking},
};

/// Runs a command without a right that root has over other processes' memory, or over
/// limits. Who is not root lacks it anyway.
const WITHOUT: [&str; 3] =
    ["sh", "-c", "[ \"$(id -u)\" != 0 ] || exec setpriv --bounding-set=-sys_ptrace,-ipc_lock \"$@\"; exec \"$@\""];

fn place() -> Place {
    let place = Place::new("environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n");
    place.write("master.key", &master_key());
    place
}

fn token(place: &Place, name: &str) -> String {
    let create = ["token", "create", "--name", name, "--tenants", "acme*", "--actions", "read,write"];
    place.run(&create).ok().trim().to_owned()
}

/// Where a text stands in a process's writable memory; nothing where the system does not
/// let us look.
fn copies(process: &Running, text: &str) -> Option<Vec<String>> {
    let folder = format!("/proc/{}", process.id());
    let memory = match fs::File::open(format!("{folder}/mem")) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return None,
        opened => opened.unwrap(),
    };
    let maps = fs::read_to_string(format!("{folder}/maps")).unwrap();
    let mut found = Vec::new();
    for map in maps.lines().filter(|map| map.split(' ').nth(1).is_some_and(|rights| rights.starts_with("rw"))) {
        let (start, end) = map.split(' ').next().and_then(|range| range.split_once('-')).unwrap();
        let [start, end] = [start, end].map(|address| u64::from_str_radix(address, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        // A mapping may go while we look.
        if memory.read_exact_at(&mut bytes, start).is_ok() {
            found.extend(memchr::memmem::find_iter(&bytes, text).map(|at| format!("{at:#x} in {map}")));
        }
    }
    Some(found)
}

/// A line of `/proc/<process>/<file>`.
fn told(process: &Running, file: &str, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/{file}", process.id())).unwrap();
    text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{text}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_value_is_gone_from_memory_once_its_connection_is_closed() {
    let place = place();
    let (serving, url) = place.serve();
    let token = token(&place, "cli");
    if copies(&serving, "there is no such text").is_none() {
        #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
        {
            eprintln!("skipped: the system does not let this user read another process's memory");
        }
        return;
    }
    for (before, after) in [("", ""), ("\"\\\n", "\u{1f511}\t"), (&"long\n".repeat(20_000), "")] {
        // What is searched for is the part that is spelled in JSON as it is.
        let mark = hex::encode(rand::random::<[u8; 6]>());
        let value = format!("{before}{mark}{after}");
        let http = keeping_client();
        let to = |method: Method| http.request(method, format!("{url}/v1/tenants/acme/secrets/K")).bearer_auth(&token);
        assert_eq!(
            to(Method::PUT)
                .query(&[("create_tenant", "true")])
                .json(&json!({ "value": value }))
                .send()
                .await
                .unwrap()
                .status(),
            201
        );
        for form in ["text/plain", "application/json"] {
            let answer = to(Method::GET).header("accept", form).send().await.unwrap();
            assert!(answer.text().await.unwrap().contains(&mark));
        }
        assert!(!copies(&serving, &mark).unwrap().is_empty(), "as long as it is served, it is there to be found");
        assert_eq!(to(Method::DELETE).send().await.unwrap().status(), 204);
        drop(http);
        // The other side notices in its own time that the connection is closed.
        let began = Instant::now();
        let mut left = copies(&serving, &mark).unwrap();
        while !left.is_empty() && began.elapsed() < HANGS {
            tokio::time::sleep(Duration::from_millis(20)).await;
            left = copies(&serving, &mark).unwrap();
        }
        assert!(left.is_empty(), "{left:#?}");
    }
}

#[test]
fn no_core_is_dumped_and_no_other_process_of_the_user_reads_the_memory() {
    let place = place();
    let (serving, _) = place.serve_under(&WITHOUT);
    let limit = told(&serving, "limits", "Max core file size");
    assert_eq!(limit.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{limit}");
    let under = |words: &[&str]| {
        let mut command = Command::new(WITHOUT[0]);
        command.args(&WITHOUT[1..]).arg("sh").args(words).stdout(Stdio::piped()).stderr(Stdio::null());
        command
    };
    let readable = |id: u32| output(&mut under(&["readlink", &format!("/proc/{id}/fd/0")])).status.success();
    let mut other = under(&["sh", "-c", "echo here; exec sleep 60"]).spawn().unwrap();
    let said = BufReader::new(other.stdout.take().unwrap());
    within_blocking("it says that it is there", move || said.lines().next()).unwrap().unwrap();
    let readable = [readable(other.id()), readable(serving.id())];
    other.kill().unwrap();
    other.wait().unwrap();
    assert_eq!(readable, [true, false], "another process of the same user, and ours");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_locked_into_memory_and_where_they_cannot_be_it_is_told_once() {
    let place = place();
    let limited = format!("ulimit -l 0; {}", WITHOUT[2]);
    let limited = [WITHOUT[0], WITHOUT[1], &limited];
    for (before, locked) in [(&[][..], true), (&limited, false)] {
        let (mut serving, url) = place.serve_under(before);
        let token = token(&place, if locked { "first" } else { "second" });
        for tenant in ["acme", "acme-two"] {
            let request =
                client().put(format!("{url}/v1/tenants/{tenant}/secrets/K?create_tenant=true")).bearer_auth(&token);
            assert!(request.json(&json!({ "value": "v" })).send().await.unwrap().status().is_success());
        }
        let page = client().get(format!("{url}/metrics")).bearer_auth(&token).send().await.unwrap();
        let page = page.text().await.unwrap();
        assert_eq!(page.contains("secretier_keys_not_locked 0\n"), locked, "{page}");
        assert_eq!(told(&serving, "status", "VmLck").contains(" 0 kB"), !locked);
        serving.terminate();
        let log = serving.stderr();
        assert_eq!(log.matches("RLIMIT_MEMLOCK").count(), usize::from(!locked), "{log}");
    }
}
