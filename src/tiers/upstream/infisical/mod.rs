//! Infisical's HTTP API.

mod auth;
mod budget;
