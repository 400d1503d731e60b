//! Works on rotations of secrets that are due: see `rotation/steps.rs`.

use std::{sync::Arc, time::Duration};

use super::{Common, turns};
use crate::rotation::Worker;

/// How often an instance asks whether one is due.
const TURN_EVERY: Duration = Duration::from_secs(1);

pub(super) async fn until(common: &Common, stopped: impl Future<Output = ()>) {
    let Common { service, database, .. } = common;
    let mut worker = Worker::new(Arc::clone(&service.rotations));
    let (mut stopped, mut turns) = (std::pin::pin!(stopped), turns(TURN_EVERY));
    loop {
        tokio::select! {
            _ = turns.tick() => {}
            () = worker.due() => {}
            () = &mut stopped => break,
        }
        // What is begun is left as it is where the instance stops: whoever comes next goes on with it.
        tokio::select! {
            () = work(&mut worker, service, database) => {}
            () = &mut stopped => break,
        }
    }
    worker.end().await;
}

/// Works as long as something is due.
async fn work(worker: &mut Worker, service: &crate::server::Service, database: &crate::tiers::database::Database) {
    while database.is_up() && Box::pin(worker.turn(&service.audit)).await {}
}
