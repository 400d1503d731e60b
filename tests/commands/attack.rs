//! What strangers and small tokens can make an instance spend: the attacks of `scripts/attack` in
//! their short form, judged by memory, disk and counts. How long anything takes is no part of it.

#[path = "../../examples/attack/replay/mod.rs"]
mod replay;

use replay::{Attack, Form, Program};
use secretier::{access::audit, config, server, tiers::memory};
use serde::Deserialize;

use crate::within::within_a_tests_time;

/// Tries it against this build.
async fn costs_no_more_than_it_may(attack: Attack) {
    replay::allow_connections();
    let program = Program { path: env!("CARGO_BIN_EXE_secretier").into(), under: Vec::new() };
    let replay = replay::replay(attack, Form::Short, &program, None);
    let observed = within_a_tests_time("the attack ends", replay).await;
    assert!(observed.beyond.is_empty(), "{attack:?}, {}: {:#?}", observed.told, observed.beyond);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_requests_without_a_token_takes_little_memory_and_gives_it_back() {
    costs_no_more_than_it_may(Attack::Storm).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_that_all_differ_are_few_rows_and_all_counted() {
    costs_no_more_than_it_may(Attack::Malformed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn denied_requests_with_large_headers_fill_no_disk_and_are_all_counted() {
    costs_no_more_than_it_may(Attack::Denied).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_that_are_all_wrong_fill_no_disk_and_are_all_counted() {
    costs_no_more_than_it_may(Attack::Logins).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_half_sent_take_bounded_memory() {
    costs_no_more_than_it_may(Attack::SlowBodies).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_lists_that_nobody_reads_take_bounded_memory() {
    costs_no_more_than_it_may(Attack::Unread).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_lists_all_the_time_keep_nobody_from_an_answer() {
    costs_no_more_than_it_may(Attack::Lists).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_true_notice_is_taken_while_forged_ones_do_not_end() {
    costs_no_more_than_it_may(Attack::Notices).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_reset_at_once_take_little() {
    costs_no_more_than_it_may(Attack::Resets).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_and_uploads_that_do_not_end_take_bounded_memory() {
    costs_no_more_than_it_may(Attack::Unfinished).await;
}

/// What the formula in `docs/SECURITY.md` is about.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(crate) struct Settings {
    pub(crate) server: server::Config,
    memory: memory::Config,
    audit: audit::Config,
}

impl Settings {
    /// How many bytes an instance can come to.
    pub(crate) fn most(&self) -> u64 {
        config::most_memory(&self.server, &self.memory, &self.audit)
    }
}
