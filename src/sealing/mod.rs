//! Envelope encryption: a value is sealed with its tenant's data key, a data key is
//! wrapped by a master key, and a master key comes from outside the database.

mod envelope;
mod master_keys;

pub use envelope::{DataKey, OpenError, Owner, Place, SealError, data_key_version};
pub use master_keys::{
    KeyError, KeyRing, KeySource, MasterKey, MasterKeyId, SourceOutcome, SourceReport, UnknownSource, WeakKey, load,
};
