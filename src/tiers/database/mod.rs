//! The database tier.
