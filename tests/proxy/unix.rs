//! The Unix socket: who may connect, and who needs no token there.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use secretier::phase::Phase;
use tokio::net::UnixStream;

use crate::{
    app::{Backend, Instance, Setup, TestApp, secret},
    connections::Wire,
};

/// An instance with a socket, and processes that need no token.
async fn start(server: &str, peers: &str) -> (TestApp, Instance, std::path::PathBuf) {
    let mut app = Setup::new(Backend::sqlite(), Phase::Database).with(peers).start().await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    let path = app.folder().join("secretier.sock");
    app.setup.server = format!("unix_socket = \"{}\"\n{server}", path.display());
    let instance = app.another().await;
    (app, instance, path)
}

fn me() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

fn peer(who: &str, tenants: &str) -> String {
    format!("[[access.unix_peers]]\nname = \"api\"\n{who}\ntenants = [\"{tenants}\"]\nactions = [\"read\"]\n")
}

async fn open(path: &std::path::Path, token: &str) -> Wire<UnixStream> {
    Wire { stream: UnixStream::connect(path).await.unwrap(), token: token.to_owned() }
}

/// A request without a token, under a name that is not ours.
async fn ask(wire: &mut Wire<UnixStream>, method: &str, target: &str) -> (u16, String) {
    wire.send(&format!("{method} {target} HTTP/1.1\r\nHost: whatever\r\n\r\n")).await;
    let (status, _, body) = wire.answer().await;
    (status, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_configured_needs_no_token_and_may_what_it_may() {
    let (uid, gid) = me();
    for who in [format!("uid = {uid}"), format!("gid = {gid}"), format!("uid = {uid}\ngid = {gid}")] {
        let (_app, _instance, path) = start("", &peer(&who, "ac*")).await;
        let mut wire = open(&path, "").await;
        let (status, body) = ask(&mut wire, "GET", &secret("acme", "K")).await;
        assert_eq!((status, body.contains("\"value\":\"v\"")), (200, true), "{who}: {body}");
        assert_eq!(ask(&mut wire, "GET", &secret("globex", "K")).await.0, 403, "{who}");
        assert_eq!(ask(&mut wire, "DELETE", &secret("acme", "K")).await.0, 403, "{who}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_not_configured_needs_a_token() {
    let (uid, gid) = me();
    for who in [format!("uid = {}", uid + 1), format!("uid = {uid}\ngid = {}", gid + 1)] {
        let (app, _instance, path) = start("", &peer(&who, "*")).await;
        let mut wire = open(&path, &app.token).await;
        let (status, body) = ask(&mut wire, "GET", &secret("acme", "K")).await;
        assert_eq!((status, body.contains("token_missing")), (401, true), "{body}");
        wire.ask("GET", &secret("acme", "K")).await;
        assert_eq!(wire.answer().await.0, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_counts_before_the_process_that_brings_it() {
    let (uid, _) = me();
    let (app, _instance, path) = start("", &peer(&format!("uid = {uid}"), "acme")).await;
    let mut wire = open(&path, &app.token).await;
    wire.ask("DELETE", &secret("acme", "NONE")).await;
    assert_eq!(wire.answer().await.0, 404, "it may write, which the process may not");
    wire.token = format!("st_{:016x}_{}", 1, "A".repeat(43));
    wire.ask("GET", &secret("acme", "K")).await;
    assert_eq!(wire.answer().await.0, 401, "a token that is none is none");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_stands_for_a_process_and_no_process_comes_by_tcp() {
    let (uid, _) = me();
    let (_app, instance, path) = start("", &peer(&format!("uid = {uid}"), "*")).await;
    let mut wire = open(&path, &format!("st_{:<16}_{}", format!("uid:{uid}"), "A".repeat(43))).await;
    wire.ask("GET", &secret("acme", "K")).await;
    assert_eq!(wire.answer().await.0, 401);
    let answer = crate::app::Answer::of(instance.request(reqwest::Method::GET, &secret("acme", "K"))).await;
    assert_eq!(answer.problem(), (401, "token_missing".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sockets_file_has_the_mode_and_owner_that_are_configured() {
    let (uid, gid) = me();
    let server = format!("unix_mode = \"0666\"\nunix_owner = \"{uid}:{gid}\"");
    let (_app, _instance, path) = start(&server, "").await;
    let file = std::fs::metadata(&path).unwrap();
    assert_eq!((file.permissions().mode() & 0o777, file.uid(), file.gid()), (0o666, uid, gid));
    UnixStream::connect(&path).await.unwrap();
}
