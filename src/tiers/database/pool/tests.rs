use std::sync::mpsc;

use super::*;

fn pool(folder: &tempfile::TempDir, size: usize) -> Pool {
    let (path, places) = (folder.path().join("test.db"), Arc::new(Semaphore::new(size)));
    std::fs::write(&path, "").unwrap();
    let manager = SqliteManager { path, timeout: Duration::from_secs(60), places, room: Work::room() };
    let connections = pool_of(manager, size).unwrap();
    let is_read_only = AtomicBool::new(false);
    Pool::Sqlite { connections, writer: Arc::default(), anchor: Box::default(), is_read_only }
}

fn manager(pool: &Pool) -> &SqliteManager {
    match pool {
        Pool::Sqlite { connections, .. } => connections.manager(),
        Pool::Postgres(_) => unreachable!(),
    }
}

/// Work that hangs until a message is sent.
fn hang(connection: &mut Connection) -> (mpsc::Sender<()>, BoxFuture<'static, QueryResult<()>>) {
    let (end, ended) = mpsc::channel();
    let Connection::Sqlite { connection, .. } = connection else { unreachable!() };
    (end, connection.at_once(move |_| ended.recv().map_err(|_| Error::NotFound)))
}

#[tokio::test]
async fn the_connection_that_came_back_last_is_used_first() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder, 2);
    let holdings = |connection: &Connection| match connection {
        Connection::Sqlite { connection, .. } => Arc::as_ptr(&connection.holdings),
        Connection::Postgres(_) => unreachable!(),
    };
    let (one, other) = (pool.connection().await.unwrap(), pool.connection().await.unwrap());
    let last = holdings(&other);
    drop(one);
    drop(other);
    for _ in 0..3 {
        assert_eq!(holdings(&pool.connection().await.unwrap()), last);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_at_once_that_hangs_holds_up_neither_who_asked_nor_others() {
    let folder = tempfile::tempdir().unwrap();
    let pool = Arc::new(pool(&folder, 5));
    for _ in 0..20 {
        let mut hanging = Vec::new();
        for _ in 0..4 {
            let mut connection = pool.connection().await.unwrap();
            let asks = tokio::spawn(async move {
                let (end, work) = hang(&mut connection);
                let outcome = tokio::time::timeout(Duration::from_millis(1), work).await;
                connection.discard();
                (end, outcome)
            });
            let (end, outcome) = asks.await.expect("timers and tasks go on");
            assert!(outcome.is_err());
            hanging.push(end);
        }
        assert_eq!(manager(&pool).room.available_permits(), 0, "a worker hangs");
        let others = Arc::clone(&pool);
        let asks = tokio::spawn(async move {
            let (end, work) = hang(&mut others.connection().await.unwrap());
            end.send(()).unwrap();
            work.await
        });
        asks.await.unwrap().expect("nor is the work of others held up");
        for end in hanging {
            end.send(()).unwrap();
        }
        let _free = manager(&pool).room.acquire().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_given_up_at_work_keeps_its_place_and_its_turn_until_that_ends() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder, 1);
    let mut connection = pool.writing_connection().await.unwrap();
    let (end, work) = hang(&mut connection);
    drop(work);
    connection.discard();
    assert_eq!(manager(&pool).places.available_permits(), 0);
    let Pool::Sqlite { writer, .. } = &pool else { unreachable!() };
    assert!(writer.try_lock().is_err(), "somebody writes still");
    assert!(tokio::time::timeout(Duration::from_millis(1), pool.connection()).await.is_err());
    end.send(()).unwrap();
    drop(pool.writing_connection().await.unwrap());
    drop(pool.connection().await.unwrap());
}
