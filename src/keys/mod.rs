//! Where master keys come from: files, environment variables, Infisical, a passphrase. The ring that a running process
//! has of them is read from these sources, and read again when they may have changed.

mod live;
mod sources;

pub use live::{Loaded, MasterKeys};
pub use sources::{
    Config, Gathered, IntroduceError, KeyError, KeySource, SourceOutcome, SourceReport, Sources, UnknownSource,
};
