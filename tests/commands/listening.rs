//! `secretier serve`: the addresses that it listens on, and the connections that it has room for.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::Command,
    time::Instant,
};

use crate::{
    program::{HANGS, Place, Running, master_key},
    within::{output, until},
};

fn place(listen: &str, more: &str) -> Place {
    let place = Place::new(&format!("environment = \"prod\"\n[server]\nlisten = {listen}\n{more}"));
    place.write("master.key", &master_key());
    place
}

fn addresses(url: &str) -> Vec<SocketAddr> {
    url.trim_start_matches("http://").split(',').map(|address| address.parse().unwrap()).collect()
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(HANGS)).unwrap();
    stream
}

/// Asks over a connection that stays open.
fn is_healthy(stream: &mut TcpStream, host: &str) -> bool {
    let request = format!("GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let mut answer = [0; 1024];
    stream.write_all(request.as_bytes()).is_ok()
        && stream.read(&mut answer).is_ok_and(|length| answer[..length].starts_with(b"HTTP/1.1 200"))
}

#[test]
fn every_address_of_a_list_is_served_under_its_own_name() {
    let place = place("[\"127.0.0.1:0\", \"127.0.0.2:0\"]", "");
    let (mut serving, url) = place.serve();
    let addresses = addresses(&url);
    assert_eq!(addresses.len(), 2, "{url}");
    for address in &addresses {
        for host in ["127.0.0.1", "127.0.0.2", &address.to_string()] {
            assert!(is_healthy(&mut connect(*address), host), "{address} as {host}");
        }
        assert!(!is_healthy(&mut connect(*address), "127.0.0.3"), "no name of ours");
    }
    assert_eq!(serving.terminate(), 0);
    assert!(addresses.iter().all(|address| TcpStream::connect(address).is_err()));
}

#[test]
fn localhost_and_a_variable_name_addresses_too() {
    let mut place = place("\"localhost:0\"", "[access]\nhosts = [\"secrets.internal\"]\n");
    let (mut serving, url) = place.serve();
    let has_v6 = std::net::TcpListener::bind("[::1]:0").is_ok();
    assert_eq!(addresses(&url).len(), if has_v6 { 2 } else { 1 }, "{url}");
    for address in addresses(&url) {
        assert!(is_healthy(&mut connect(address), "localhost"), "{address}");
    }
    assert_eq!(serving.terminate(), 0);

    place.set("SECRETIER_SERVER__LISTEN", "[\"127.0.0.1:0\", \"127.0.0.1:0\"]");
    let (_serving, url) = place.serve();
    assert_eq!(addresses(&url).len(), 2, "{url}");
    if has_v6 {
        place.set("SECRETIER_SERVER__LISTEN", "[::1]:0");
        let (_serving, url) = place.serve();
        assert!(is_healthy(&mut connect(addresses(&url)[0]), "[::1]"));
    }
}

#[test]
fn an_address_that_cannot_be_listened_on_is_told_with_what_to_write() {
    for (listen, told) in [
        ("\"secrets.internal:7227\"", "names other than localhost are not looked up"),
        ("[\"127.0.0.1:1\", \"127.0.0.1\"]", "\"127.0.0.1\" is no address to listen on: it has no port"),
        ("[\"127.0.0.1:7\", \"0.0.0.0:7\"]", "0.0.0.0:7 is reached from other machines"),
        ("[\"127.0.0.1:7\", \"localhost:7\"]", "127.0.0.1:7 stands there twice"),
        ("[]", "server.listen"),
    ] {
        let fault = place(listen, "").run(&["config", "check"]).failed(2);
        assert!(fault.contains(told) && fault.contains("server.listen"), "{listen}: {fault}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let _holder = std::net::TcpListener::bind(taken).unwrap();
    let told = place(&format!("[\"127.0.0.1:0\", \"{taken}\"]"), "").run(&["serve"]).failed(1);
    assert!(told.contains(&format!("cannot listen on {taken}")), "{told}");
}

/// The number of files that it has open; `None` where the system does not let us look, who are not
/// root: the process cannot be looked into.
#[cfg(target_os = "linux")]
fn open_files(serving: &Running) -> Option<usize> {
    match std::fs::read_dir(format!("/proc/{}/fd", serving.id())) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => None,
        files => Some(files.unwrap().count()),
    }
}

#[cfg(target_os = "linux")]
fn limit_files(serving: &Running, limit: usize) {
    let (pid, limit) = (serving.id().to_string(), format!("--nofile={limit}:"));
    assert!(output(Command::new("prlimit").args(["--pid", &pid, &limit])).status.success());
}

#[cfg(target_os = "linux")]
#[test]
fn a_low_limit_of_open_files_is_raised_or_warned_of_and_idle_connections_make_room() {
    let place = place("\"127.0.0.1:0\"", "");
    let (serving, _) = place.serve_under(&["/bin/sh", "-c", "ulimit -Sn 100; exec \"$@\""]);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", serving.id())).unwrap();
    let limit: Vec<&str> =
        limits.lines().find(|line| line.starts_with("Max open files")).unwrap().split_whitespace().collect();
    assert_eq!(limit[3], limit[4], "the soft limit is as high as the hard one");
    drop(serving);

    let (serving, url) = place.serve_under(&["/bin/sh", "-c", "ulimit -n 100; exec \"$@\""]);
    let warned = serving.stderr();
    let warning = warned.lines().find(|line| line.contains("limit of open files")).unwrap_or_default();
    for part in ["WARN", "limit=100", "needed=4190", "connections=25", "server.max_connections = 4096"] {
        assert!(warning.contains(part), "{part:?} is missing in {warned}");
    }
    // Many more than there is room for: each is served, and those of before are closed for it.
    let mut held: Vec<TcpStream> = Vec::new();
    for _ in 0..60 {
        let mut stream = connect(addresses(&url)[0]);
        assert!(is_healthy(&mut stream, "localhost"));
        held.push(stream);
    }
    assert!(!is_healthy(&mut held[0], "localhost"), "the longest idle was closed");
}

#[cfg(target_os = "linux")]
#[test]
fn where_no_file_is_left_idle_connections_make_room() {
    let place = place("\"127.0.0.1:0\"", "");
    let (serving, url) = place.serve();
    let Some(before) = open_files(&serving) else { return };
    limit_files(&serving, before + 16);
    let mut held: Vec<TcpStream> = Vec::new();
    for _ in 0..40 {
        let mut stream = connect(addresses(&url)[0]);
        assert!(is_healthy(&mut stream, "localhost"));
        held.push(stream);
    }
    assert!(tries(&serving) > 0, "{}", serving.stderr());
    assert!(!is_healthy(&mut held[0], "localhost"), "the longest idle was closed");
}

#[cfg(target_os = "linux")]
#[test]
fn where_no_file_is_left_and_no_connection_is_idle_accepting_waits_and_goes_on() {
    let place = place("\"127.0.0.1:0\"", "");
    let (serving, url) = place.serve();
    // Fewer than it has open: whatever it closes, it can open nothing.
    limit_files(&serving, 3);
    let began = Instant::now();
    let mut waiting = connect(addresses(&url)[0]);
    until(|| tries(&serving) >= 3);
    let most = usize::try_from(began.elapsed().as_millis()).unwrap() / 25 + 2;
    assert!(tries(&serving) <= most, "it spins: {}", serving.stderr());
    limit_files(&serving, 256);
    assert!(is_healthy(&mut waiting, "localhost"));
}

#[cfg(target_os = "linux")]
fn tries(serving: &Running) -> usize {
    serving.stderr().lines().filter(|line| line.contains("no file is left for another connection")).count()
}
