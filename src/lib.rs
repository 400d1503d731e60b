//! `secretier` serves a multi-tenant backend its tenants' secrets: from memory, else
//! from an encrypted database, else from Infisical.

pub mod access;
pub mod answer;
pub mod app;
pub mod cli;
pub mod clock;
pub mod config;
pub mod etag;
pub mod flights;
pub mod log;
pub mod metrics;
pub mod phase;
pub mod policy;
pub mod resolver;
pub mod sealing;
pub mod secret;
pub mod server;
pub mod setting;
pub mod tenant;
pub mod tiers;
pub mod tls;
pub mod units;
