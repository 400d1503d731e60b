//! What an operation costs: round trips, which a machine's speed does not change.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use secretier::tiers::database::{Database, Precondition};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::{
    backend::{Backend, key, tenant, value, writer},
    postgres::Postgres,
    within::within_a_tests_time,
};

/// The message by which the server ends each answer: ReadyForQuery, in a transaction or not.
const READY: &[u8] = b"Z\0\0\0\x05";

/// Passes on what is said on either side, and counts the answers.
async fn counting(to: u16) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, answers) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&answers);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(pass_on(client, to, Arc::clone(&counted)));
        }
    });
    (port, answers)
}

async fn pass_on(client: TcpStream, to: u16, answers: Arc<AtomicUsize>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", to)).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let asking = tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
    let (mut bytes, mut said) = (vec![0; 64 << 10], Vec::new());
    while let Ok(count @ 1..) = from_server.read(&mut bytes).await {
        said.extend_from_slice(&bytes[..count]);
        answers.fetch_add(said.windows(READY.len()).filter(|part| *part == READY).count(), Ordering::SeqCst);
        // The end of it may be the beginning of one.
        said.drain(..said.len().saturating_sub(READY.len() - 1));
        if to_client.write_all(&bytes[..count]).await.is_err() {
            break;
        }
    }
    asking.abort();
}

async fn counted(database: &Database, answers: &AtomicUsize, name: &str) -> usize {
    let before = answers.load(Ordering::SeqCst);
    let (of, name, text) = (tenant("acme"), key(name), value("v"));
    database.put(&of, &name, &text, &Precondition::None, &writer(), None).await.unwrap();
    answers.load(Ordering::SeqCst) - before
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_costs_one_round_trip_for_each_of_its_statements() {
    let server = Postgres::shared();
    let test = async {
        let mut backend = Backend::postgres(server).await;
        let (port, answers) = counting(server.port()).await;
        let url = backend.url().replace(&format!(":{}/", server.port()), &format!(":{port}/"));
        assert_ne!(url, backend.url());
        (backend.config.url, backend.config.pool_size) = (url.as_str().into(), 1);
        let database = backend.open().await;
        // Until every statement is prepared.
        for _ in 0..2 {
            for name in ["A", "B"] {
                counted(&database, &answers, name).await;
            }
        }
        // To begin and to commit; the tenant, locked and read; the version before; the data keys,
        // and how much they have sealed; the head; the version before, superseded; the new one;
        // what is too many; the counter, the change, and who hears of it.
        assert_eq!(counted(&database, &answers, "A").await, 13);
        // Without a version before, nothing is superseded or too many.
        assert_eq!(counted(&database, &answers, "NEW").await, 11);
    };
    within_a_tests_time("the round trips are counted", test).await;
}
