//! What is made to fail, one after the other: at PostgreSQL, at Infisical, both, an instance
//! that is killed, or stopped or cut off from PostgreSQL for a while; clocks that are set, by
//! themselves and while something else fails; and tokens that are revoked in between.

use std::time::{Duration, Instant};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use secretier::tiers::upstream::standin::Fault;
use tokio::sync::watch;

use crate::{
    model::Model,
    postgres::{self, Postgres},
    report::Report,
    stage::{INSTANCES, Stage},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AtPostgres {
    Nothing,
    Frozen,
    Killed,
    Restarted,
    ConnectionsEnded,
    /// As on a full disk.
    TakesNoWrites,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AtInfisical {
    Nothing,
    PortClosed,
    Fails(Fault),
}

const AT_POSTGRES: [AtPostgres; 5] = [
    AtPostgres::Frozen,
    AtPostgres::Killed,
    AtPostgres::Restarted,
    AtPostgres::ConnectionsEnded,
    AtPostgres::TakesNoWrites,
];

const REFUSE_WRITES: &str = "SET search_path TO secretier; \
    CREATE FUNCTION is_full() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'the disk is full'; END $$ LANGUAGE plpgsql; \
    CREATE TRIGGER is_full BEFORE INSERT OR UPDATE ON companies EXECUTE FUNCTION is_full()";
const TAKE_WRITES: &str = "SET search_path TO secretier; DROP TRIGGER is_full ON companies; DROP FUNCTION is_full";

const AT_INFISICAL: [AtInfisical; 8] = [
    AtInfisical::PortClosed,
    AtInfisical::Fails(Fault::Down),
    AtInfisical::Fails(Fault::Hang),
    AtInfisical::Fails(Fault::Slow(Duration::from_millis(500))),
    AtInfisical::Fails(Fault::RateLimited { retry_after: Duration::from_secs(2) }),
    AtInfisical::Fails(Fault::Status(500)),
    AtInfisical::Fails(Fault::Garbage),
    AtInfisical::Fails(Fault::CutOff),
];

/// Seconds by which a clock is set, either way, and the furthest that one goes.
const STEPS: [(i64, &str); 3] =
    [(1, "clock set by a second"), (60 * 60, "clock set by an hour"), (3 * 24 * 60 * 60, "clock set by three days")];
const FURTHEST: i64 = 4 * 24 * 60 * 60;

/// Makes things fail until `stopped`.
pub(crate) async fn strike(
    seed: u64,
    stage: &mut Stage,
    model: &Model,
    report: &Report,
    mut stopped: watch::Receiver<bool>,
    calm: bool,
) {
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0_u64.. {
        if wait(&mut stopped, random.random_range(2.0..6.0)).await {
            return;
        }
        if round.is_multiple_of(4) {
            revoke(stage, model, report, round, &mut stopped).await;
            continue;
        }
        if calm {
            continue;
        }
        let draw = random.random_range(0..13);
        if draw < 2 {
            let number = random.random_range(0..INSTANCES);
            report.fault("instance killed");
            // What it had, it has no more; and until it serves nobody asks it in earnest.
            model.started(number);
            stage.kill_instance(number).await;
            model.started(number);
            continue;
        }
        if draw < 5 {
            set_a_clock(&mut random, stage, model, report).await;
            continue;
        }
        if draw < 7 {
            let number = random.random_range(0..INSTANCES);
            // It hears of nothing meanwhile, and goes on with what it had.
            model.database_fails();
            let is_over = if draw == 5 {
                report.fault("instance stopped");
                stage.signal(number, "STOP");
                let is_over = wait(&mut stopped, random.random_range(1.0..8.0)).await;
                stage.signal(number, "CONT");
                is_over
            } else {
                report.fault("instance cut off from PostgreSQL");
                stage.cut_off(number).await;
                let is_over = wait_beside_clocks(&mut random, stage, model, report, &mut stopped).await;
                stage.mend(number);
                is_over
            };
            model.database_is_back();
            if is_over {
                return;
            }
            continue;
        }
        let at_postgres =
            if draw < 11 { AT_POSTGRES[random.random_range(0..AT_POSTGRES.len())] } else { AtPostgres::Nothing };
        let at_infisical =
            if draw >= 9 { AT_INFISICAL[random.random_range(0..AT_INFISICAL.len())] } else { AtInfisical::Nothing };
        at_infisical.begins(stage, report).await;
        at_postgres.begins(stage, model, report).await;
        let is_over = wait_beside_clocks(&mut random, stage, model, report, &mut stopped).await;
        at_postgres.ends(stage, model).await;
        at_infisical.ends(stage).await;
        if is_over {
            return;
        }
    }
}

/// Waits; tells whether it is to end.
async fn wait(stopped: &mut watch::Receiver<bool>, seconds: f64) -> bool {
    tokio::time::timeout(Duration::from_secs_f64(seconds), stopped.wait_for(|stopped| *stopped)).await.is_ok()
}

/// Waits for as long as something fails, and may set a clock meanwhile; tells whether it is to end.
async fn wait_beside_clocks(
    random: &mut StdRng,
    stage: &mut Stage,
    model: &Model,
    report: &Report,
    stopped: &mut watch::Receiver<bool>,
) -> bool {
    let seconds = random.random_range(1.0..8.0);
    if !random.random_bool(0.3) {
        return wait(stopped, seconds).await;
    }
    let is_over = wait(stopped, seconds / 2.0).await;
    set_a_clock(random, stage, model, report).await;
    is_over || wait(stopped, seconds / 2.0).await
}

/// Sets the wall clock of an instance, and asks it with a token that ends: whether that is let in
/// is told by the clock, at once.
async fn set_a_clock(random: &mut StdRng, stage: &mut Stage, model: &Model, report: &Report) {
    let (number, (by, what)) = (random.random_range(0..INSTANCES), STEPS[random.random_range(0..STEPS.len())]);
    let ahead = stage.ahead(number);
    let is_ahead = random.random_bool(0.5);
    if !stage.has_clocks() {
        return;
    }
    let wanted = if is_ahead { by } else { -by };
    let by = if (ahead + wanted).abs() > FURTHEST { -wanted } else { wanted };
    report.fault(what);
    let began = Instant::now();
    if by > 0 {
        model.clock_goes_ahead(number);
    }
    stage.set_clock(number, ahead + by);
    if by > 0 {
        model.clock_went_ahead(number);
    }
    let Some((token, has_ended)) = stage.ending(number) else { return };
    let asked = stage.scene.client.get(format!("{}/v1/whoami", stage.scene.urls[number])).bearer_auth(token);
    let Ok(answer) = asked.send().await else { return };
    let status = answer.status().as_u16();
    // Without the database it may know too little by its clock to let anybody in.
    let is_detached = status == 503 && !model.is_calm_since(began);
    if !is_detached && status != if has_ended { 401 } else { 200 } {
        report.wrong(&format!(
            "instance {number}, whose clock was just set from {ahead} s ahead to {} s, answered {status} to a token that {}",
            stage.ahead(number),
            if has_ended { "has ended by it" } else { "is good" }
        ));
    }
}

impl AtPostgres {
    async fn begins(self, stage: &mut Stage, model: &Model, report: &Report) {
        if self == Self::Nothing {
            return;
        }
        report.fault(match self {
            Self::Nothing | Self::Frozen => "PostgreSQL frozen",
            Self::Killed => "PostgreSQL killed",
            Self::Restarted => "PostgreSQL restarted",
            Self::ConnectionsEnded => "PostgreSQL's connections ended",
            Self::TakesNoWrites => "PostgreSQL takes no writes",
        });
        model.database_fails();
        match self {
            Self::Nothing => {}
            Self::Frozen => stage.with_postgres(|postgres| postgres.freeze()).await,
            Self::Killed => stage.with_postgres(Postgres::kill).await,
            Self::Restarted => stage.with_postgres(Postgres::restart).await,
            Self::ConnectionsEnded => {
                let url = stage.postgres.as_ref().unwrap().url("postgres");
                let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                              WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'";
                postgres::execute(&url, others).await;
            }
            Self::TakesNoWrites => postgres::execute(&stage.database, REFUSE_WRITES).await,
        }
    }

    async fn ends(self, stage: &mut Stage, model: &Model) {
        match self {
            Self::Nothing => return,
            Self::Frozen => stage.with_postgres(|postgres| postgres.thaw()).await,
            Self::Killed => stage.with_postgres(Postgres::start_again).await,
            Self::TakesNoWrites => postgres::execute(&stage.database, TAKE_WRITES).await,
            Self::Restarted | Self::ConnectionsEnded => {}
        }
        model.database_is_back();
    }
}

impl AtInfisical {
    async fn begins(self, stage: &mut Stage, report: &Report) {
        match self {
            Self::Nothing => return,
            Self::PortClosed => stage.infisical.stop().await,
            Self::Fails(fault) => stage.scene.world.fault(fault),
        }
        report.fault(match self {
            Self::Nothing | Self::PortClosed => "Infisical's port closed",
            Self::Fails(Fault::Down) => "Infisical cuts connections",
            Self::Fails(Fault::Hang) => "Infisical hangs",
            Self::Fails(Fault::Slow(_)) => "Infisical slow",
            Self::Fails(Fault::RateLimited { .. }) => "Infisical answers 429",
            Self::Fails(Fault::CutOff) => "Infisical answers by half",
            Self::Fails(Fault::Garbage) => "Infisical answers HTML",
            Self::Fails(_) => "Infisical answers 500",
        });
    }

    async fn ends(self, stage: &mut Stage) {
        match self {
            Self::Nothing => {}
            Self::PortClosed => stage.infisical.restart().await.unwrap(),
            Self::Fails(_) => stage.scene.world.clear_faults(),
        }
    }
}

/// Makes a token, uses it at every instance, revokes it: a second later none takes it.
async fn revoke(stage: &Stage, model: &Model, report: &Report, round: u64, stopped: &mut watch::Receiver<bool>) {
    let name = format!("soak-{round}");
    let began = Instant::now();
    let made = stage.command(&["token", "create", "--name", &name, "--tenants", "*", "--actions", "read"]);
    if !made.status.success() {
        return;
    }
    let token = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    for url in &stage.scene.urls {
        let asked = stage.scene.client.get(format!("{url}/v1/whoami")).bearer_auth(&token).send().await;
        if asked.is_ok_and(|answer| answer.status() != 200) && model.is_calm_since(began) {
            report.wrong(&format!("{url} does not know the token {name}, which was just made"));
        }
    }
    if !stage.command(&["token", "revoke", &name]).status.success() {
        return;
    }
    report.fault("token revoked");
    if wait(stopped, 1.5).await {
        return;
    }
    for url in &stage.scene.urls {
        let asked = stage.scene.client.get(format!("{url}/v1/whoami")).bearer_auth(&token).send().await;
        if asked.is_ok_and(|answer| answer.status() != 401) && model.is_calm_since(began) {
            report.wrong(&format!("{url} takes the token {name} 1.5 s after it was revoked"));
        }
    }
}
