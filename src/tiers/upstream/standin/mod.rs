//! A stand-in for Infisical.
