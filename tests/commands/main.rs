//! The commands, as people run them: the real executable, with its arguments, variables,
//! files, output and exit code.

#![expect(clippy::unwrap_used, reason = "what a test unwraps is what it promises")]

#[path = "../support/faketime.rs"]
mod faketime;
#[path = "../support/postgres.rs"]
mod postgres;
#[path = "../support/quick.rs"]
mod quick;
#[path = "../support/relay.rs"]
mod relay;
#[path = "../support/within.rs"]
mod within;

#[cfg(target_os = "linux")]
mod attack;
mod audit;
#[cfg(target_os = "linux")]
mod clocks;
mod configuration;
mod dev;
mod directory;
mod doctor;
#[cfg(target_os = "linux")]
mod faults;
mod following;
mod health;
mod import;
mod keys;
mod leaks;
mod listening;
mod logrotate;
#[cfg(target_os = "linux")]
mod memory;
mod migrate;
mod offline;
#[cfg(target_os = "linux")]
mod packaging;
mod program;
mod reload;
mod seals;
mod secrets;
mod service_manager;
mod serving;
mod shown;
mod tenants;
mod tokens;
mod undo;
mod upgrade;
