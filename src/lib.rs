//! `secretier` serves a multi-tenant backend its tenants' secrets: from memory, else
//! from an encrypted database, else from Infisical.
//!
//! A tour, in the order in which a request passes the parts:
//!
//! - [`server`] accepts the connection, finds the route, and at the end turns the outcome into a
//!   response.
//! - [`access`] knows the valid tokens and what each may do.
//! - [`resolver`] is the path: memory, database, upstream, write-back. [`policy`] says who owns a
//!   secret and how old its copies may grow, [`flights`] lets callers share one piece of work.
//! - [`tiers`] are the places that a secret can be in: [`tiers::memory`], [`tiers::database`],
//!   [`tiers::upstream`].
//! - [`sealing`] encrypts the values in the database. [`keys`] reads the master keys and [`key_rotation`] replaces them.
//! - [`offline`] keeps the offline copy, for a start without the database.
//! - [`migration`] moves tenants from one owner to another.
//!
//! [`tenant`], [`secret`] and [`phase`] are the types that all of them share; [`answer`] is a
//! secret prepared for sending. [`app`] builds an instance from its [`config`]; [`cli`] is the
//! command line.

pub mod server;

pub mod access;
pub mod attachment;
pub mod budget;

pub mod flights;
pub mod outgoing;
pub mod policy;
pub mod resolver;
pub mod rotation;

pub mod tiers;

pub mod etag;
pub mod key_rotation;
pub mod keys;
pub mod migration;
pub mod offline;
pub mod private_file;
pub mod sealing;

pub mod answer;
pub mod clock;
pub mod diagnosis;
pub mod flaws;
pub mod infisical;
pub mod phase;
pub mod references;
pub mod secret;
pub mod snapshot;
pub mod tenant;
pub mod withheld;

pub mod app;
mod certificate;
pub mod cli;
pub mod config;
pub mod jobs;
pub mod legible;
pub mod log;
pub mod long_work;
pub mod metrics;
mod object;
pub mod pieces;
pub mod setting;
pub mod tls;
pub mod units;
pub mod wiped;

#[cfg(test)]
mod layers;
