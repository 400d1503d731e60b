//! The tiers a lookup moves through, nearest first.

pub mod breaker;
pub mod database;
pub mod memory;
pub mod upstream;
