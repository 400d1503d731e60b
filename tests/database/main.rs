//! The database tier: one suite, run on SQLite and on PostgreSQL.

#![expect(clippy::unwrap_used, reason = "what a test unwraps is what it promises")]

#[path = "../support/lines.rs"]
mod lines;
#[path = "../support/pgbouncer.rs"]
mod pgbouncer;
#[path = "../support/postgres.rs"]
mod postgres;
#[path = "../support/within.rs"]
mod within;

mod access_tokens;
mod backend;
mod batches;
mod contention;
mod costs;
mod instances;
mod leases;
mod logins;
mod opening;
mod outages;
mod ownership;
mod poolers;
mod rotations;
mod sealing;
mod seals;
mod secrets;
mod sessions;
mod shredding;
mod snapshots;
mod tables;
mod tenants;
mod tls;
mod tokens;
mod undone;
mod versions;
