//! Envelope encryption: a value is sealed with its tenant's data key, a data key is
//! wrapped by a master key, and a master key comes from outside the database.

pub mod backup;
mod derived;
mod digest;
mod envelope;
mod locked;
mod master_keys;
pub mod passphrase;
mod scrub;

pub use derived::{DerivedKey, Purpose as KeyPurpose, Tag};
pub use digest::{Differences, Digester, Digests};
pub use envelope::{
    DataKey, HeadKey, OpenError, Owner, Place, SealError, StagedPlace, data_key_version, head_key_version,
    staged_key_version, text_key_version,
};
pub use locked::keys_not_locked;
pub(crate) use master_keys::decode as decode_key;
pub use master_keys::{KeyRing, MasterKey, MasterKeyId, WeakKey};
