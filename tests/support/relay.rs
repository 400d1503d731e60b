//! A relay in front of a server, which can hold one of its answers back.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::sync::{Arc, Mutex};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
    task::JoinSet,
};

use crate::within::within;

/// Passes on what is said on either side.
pub(crate) struct Relay {
    port: u16,
    next: Arc<Mutex<Option<Arc<Hold>>>>,
    cut: Arc<watch::Sender<bool>>,
}

struct Hold {
    /// What the answer contains.
    mark: Vec<u8>,
    arrived: Notify,
    released: Notify,
}

/// An answer that is held back from when it arrives until this is released.
pub(crate) struct Held(Arc<Hold>);

impl Relay {
    /// Listens on loopback, and passes on to this port.
    pub(crate) async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cut = Arc::new(watch::Sender::new(false));
        let port_here = listener.local_addr().unwrap().port();
        let relay = Self { port: port_here, next: Arc::default(), cut: Arc::clone(&cut) };
        let next = Arc::clone(&relay.next);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (next, mut is_cut) = (Arc::clone(&next), cut.subscribe());
                tokio::spawn(async move {
                    tokio::select! {
                        () = pass_on(client, port, next) => {}
                        // Also at once, for whoever comes meanwhile.
                        _ = is_cut.wait_for(|is_cut| *is_cut) => {}
                    }
                });
            }
        });
        relay
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Ends every connection, and each new one at once, until this is mended. When it returns,
    /// nothing is passed on any more.
    pub(crate) async fn cut(&self) {
        self.cut.send_replace(true);
        within("the relayed connections end", self.cut.closed()).await;
    }

    pub(crate) fn mend(&self) {
        self.cut.send_replace(false);
    }

    /// Holds back the next answer that contains this, and what comes behind it on the same
    /// connection; other connections go on.
    pub(crate) fn hold(&self, mark: &str) -> Held {
        let hold = Arc::new(Hold { mark: mark.as_bytes().to_vec(), arrived: Notify::new(), released: Notify::new() });
        *self.next.lock().unwrap() = Some(Arc::clone(&hold));
        Held(hold)
    }
}

impl Held {
    /// Waits until the server has given the answer.
    pub(crate) async fn arrived(&self) {
        let mark = String::from_utf8_lossy(&self.0.mark);
        within(&format!("an answer that contains {mark:?}"), self.0.arrived.notified()).await;
    }

    pub(crate) fn release(self) {
        self.0.released.notify_one();
    }
}

async fn pass_on(client: TcpStream, port: u16, next: Arc<Mutex<Option<Arc<Hold>>>>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mut asking = JoinSet::new();
    asking.spawn(async move {
        let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
    });
    let mut bytes = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from_server.read(&mut bytes).await {
        let said = &bytes[..count];
        let hold = next.lock().unwrap().take_if(|hold| said.windows(hold.mark.len()).any(|part| part == hold.mark));
        if let Some(hold) = hold {
            hold.arrived.notify_one();
            hold.released.notified().await;
        }
        if to_client.write_all(said).await.is_err() {
            break;
        }
    }
}
