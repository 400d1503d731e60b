//! `serve` under a service manager: what it tells, and the sockets that it is handed.

use std::{
    io::ErrorKind,
    net::{TcpListener, TcpStream},
    os::{
        fd::OwnedFd,
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    path::Path,
    process::Stdio,
};

use crate::{
    program::{HANGS, Place, Running, master_key},
    within::within_blocking,
};

const SERVER: &str = "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n";

fn place(config: &str) -> Place {
    let place = Place::new(config);
    place.write("master.key", &master_key());
    place
}

/// The socket that a service manager listens on.
struct Manager(UnixDatagram);

impl Manager {
    fn of(place: &mut Place) -> Self {
        let path = place.path().join("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(HANGS)).unwrap();
        place.set("NOTIFY_SOCKET", path.to_str().unwrap());
        Self(socket)
    }

    /// The next message, line by line.
    fn told(&self) -> Vec<String> {
        let mut message = [0; 4096];
        let length = self.0.recv(&mut message).expect("it tells something");
        String::from_utf8(message[..length].to_vec()).unwrap().lines().map(str::to_owned).collect()
    }

    fn was_told_nothing(&self) -> bool {
        self.0.set_nonblocking(true).unwrap();
        let received = self.0.recv(&mut [0; 4096]);
        self.0.set_nonblocking(false).unwrap();
        received.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }
}

/// Asks for its health over a connection; gives the first line of the answer.
fn health_over(mut stream: impl std::io::Read + std::io::Write + Send + 'static) -> String {
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    within_blocking("the instance answers", move || {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.lines().next().unwrap_or_default().to_owned()
    })
}

const FINE: &str = "HTTP/1.1 200 OK";

#[test]
fn it_is_ready_once_it_can_be_asked_and_tells_of_a_reload_and_of_its_end() {
    let mut place = place(SERVER);
    let manager = Manager::of(&mut place);
    let mut serving = place.start(&["serve", "--config", "secretier.toml"]);
    let told = manager.told();
    assert_eq!(told[0], "READY=1");
    let address = told[1].strip_prefix("STATUS=serving on ").unwrap().to_owned();
    assert_eq!(health_over(TcpStream::connect(&address).unwrap()), FINE);

    serving.signal("HUP");
    let told = manager.told();
    assert_eq!(told[0], "RELOADING=1");
    let at: u128 = told[1].strip_prefix("MONOTONIC_USEC=").unwrap().parse().unwrap();
    assert!(at > 0);
    assert_eq!(manager.told()[0], "READY=1");

    serving.signal("TERM");
    assert_eq!(manager.told()[0], "STOPPING=1");
    assert_eq!(serving.wait(), 0);
    assert!(manager.was_told_nothing());
}

#[test]
fn it_is_not_ready_while_it_waits_for_its_database_or_where_it_cannot_start() {
    let mut place = place(SERVER);
    let manager = Manager::of(&mut place);
    // A PostgreSQL that takes the connection, and then says nothing.
    let database = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("postgres://u@{}/d?sslmode=disable", database.local_addr().unwrap());
    place.set("SECRETIER_DATABASE__URL", &url);
    let mut serving = place.start(&["serve", "--config", "secretier.toml"]);
    let (connection, database) = within_blocking("it connects to its database", move || {
        let (connection, _) = database.accept().unwrap();
        (connection, database)
    });
    assert!(manager.was_told_nothing());
    drop((connection, database));
    assert_eq!(serving.wait(), 1);
    assert!(manager.was_told_nothing());
}

#[test]
fn it_tells_that_it_lives_where_the_unit_asks_for_it() {
    let mut place = place(SERVER);
    let manager = Manager::of(&mut place);
    place.set("WATCHDOG_USEC", "100000");
    let mut serving = place.start(&["serve", "--config", "secretier.toml"]);
    assert_eq!(manager.told()[0], "READY=1");
    for _ in 0..3 {
        assert_eq!(manager.told(), ["WATCHDOG=1"]);
    }
    assert_eq!(serving.terminate(), 0);
}

#[test]
fn a_service_manager_that_is_gone_keeps_nobody_from_an_answer() {
    let mut place = place(SERVER);
    place.set("NOTIFY_SOCKET", "/nowhere/notify.sock");
    let (mut serving, url) = place.serve();
    assert_eq!(health_over(TcpStream::connect(url.trim_start_matches("http://")).unwrap()), FINE);
    serving.until_said("cannot be told");
    assert_eq!(serving.terminate(), 0);
}

/// Starts `serve` with these sockets as 3 and, if there is another one, 4: what systemd does.
fn hand_over(place: &Place, first: impl Into<OwnedFd>, second: Option<OwnedFd>) -> Running {
    let (count, fds) = match second {
        Some(_) => (2, "3<&0 4<&1 >/dev/null"),
        None => (1, "3<&0"),
    };
    let script = format!("export LISTEN_PID=$$ LISTEN_FDS={count} LISTEN_FDNAMES=a:b; exec \"$@\" {fds} </dev/null");
    let output = second.map_or_else(Stdio::piped, Stdio::from);
    let serve = ["serve", "--config", "secretier.toml"];
    place.start_on(&["sh", "-c", &script], &serve, Stdio::from(first.into()), output)
}

#[test]
fn a_socket_that_is_handed_over_loses_no_connection_over_a_restart() {
    let mut place = place(SERVER);
    let manager = Manager::of(&mut place);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // It waits in the socket before anything runs.
    let early = TcpStream::connect(address).unwrap();
    let mut serving = hand_over(&place, listener.try_clone().unwrap(), None);
    assert_eq!(manager.told()[1], format!("STATUS=serving on {address}"));
    assert_eq!(health_over(early), FINE);
    assert_eq!(serving.terminate(), 0);

    let between = TcpStream::connect(address).unwrap();
    let mut serving = hand_over(&place, listener, None);
    assert_eq!(health_over(between), FINE);
    assert_eq!(serving.terminate(), 0);
}

#[test]
fn both_sockets_can_be_handed_over_and_the_file_of_one_stays() {
    let place = place(&format!("{SERVER}unix_socket = \"handed.sock\"\n"));
    let path = place.path().join("handed.sock");
    let (unix, tcp) = (UnixListener::bind(&path).unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let address = tcp.local_addr().unwrap();
    let mut serving = hand_over(&place, unix.try_clone().unwrap(), Some(tcp.into()));
    assert_eq!(health_over(UnixStream::connect(&path).unwrap()), FINE);
    assert_eq!(health_over(TcpStream::connect(address).unwrap()), FINE);
    assert_eq!(serving.terminate(), 0);
    UnixStream::connect(&path).expect("the service manager listens on");
    drop(unix);
}

#[test]
fn a_socket_that_the_configuration_does_not_tell_of_is_refused() {
    let refused = |place: &Place, socket: OwnedFd| {
        let mut serving = hand_over(place, socket, None);
        assert_eq!(serving.wait(), 2, "a wrong configuration");
        serving.stderr()
    };
    // On all addresses other machines come by, which the configuration would want TLS for.
    let told = refused(&place(SERVER), TcpListener::bind("0.0.0.0:0").unwrap().into());
    assert!(told.contains("socket 3 (a) listens on 0.0.0.0:") && told.contains("server.listen"), "{told}");

    let place = place(SERVER);
    let told = refused(&place, UnixListener::bind(place.path().join("other.sock")).unwrap().into());
    assert!(told.contains("other.sock") && told.contains("server.unix_socket is not set"), "{told}");
    // A connection, as a socket unit with Accept=yes hands over.
    let told = refused(&place, UnixStream::pair().unwrap().0.into());
    assert!(told.contains("Accept=no"), "{told}");
    let told = refused(&place, std::fs::File::open(Path::new("/dev/null")).unwrap().into());
    assert!(told.contains("socket 3 (a)"), "{told}");
}

#[test]
fn sockets_of_another_process_are_let_be() {
    let mut place = place(SERVER);
    // As they are inherited from a shell that a service manager has started.
    place.set("LISTEN_FDS", "1");
    place.set("LISTEN_PID", "1");
    let (mut serving, url) = place.serve();
    assert_eq!(health_over(TcpStream::connect(url.trim_start_matches("http://")).unwrap()), FINE);
    assert_eq!(serving.terminate(), 0);
}
