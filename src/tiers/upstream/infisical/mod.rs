//! Infisical's HTTP API.
