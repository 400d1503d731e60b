//! The proxy whole: real HTTP in front, a real database, the stand-in for Infisical behind.

#![expect(clippy::unwrap_used, reason = "what a test unwraps is what it promises")]

#[path = "../support/described.rs"]
mod described;
#[path = "../support/lines.rs"]
mod lines;
#[path = "../support/postgres.rs"]
mod postgres;
#[path = "../support/promtool.rs"]
mod promtool;
#[path = "../support/proxy.rs"]
mod proxy;
#[path = "../support/quick.rs"]
mod quick;
#[path = "../support/relay.rs"]
mod relay;
#[path = "../support/within.rs"]
mod within;

mod absence;
mod ages;
mod alerts;
mod app;
mod attacks;
mod audit;
mod budget;
mod causes;
mod clocks;
mod connections;
mod denial;
mod description;
mod detached;
mod events;
mod exactness;
mod followers;
mod following;
mod forms;
mod infisical_api;
mod instances;
mod isolation;
mod listing;
mod long_lists;
mod lookups;
mod metrics;
mod model;
mod names;
mod never_older;
mod offline;
mod outages;
mod ownership;
mod phases;
mod polls;
mod races;
mod references;
mod reload;
mod rotation;
mod rotators;
mod scopes;
mod sdk_requests;
mod shadow;
mod shared_folders;
mod shredding;
mod spending;
mod switches;
mod tls;
mod tokens;
mod tunnels;
mod unix;
mod unusable;
mod upstreams;
mod versions;
mod webhooks;
mod writes;
