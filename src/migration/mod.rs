//! Moving tenants between owners while they are served: from Infisical's folders, or from
//! the tables that an application keeps today, to the database, and back.

mod digest;
pub mod origin;
pub mod tables;

pub use digest::{Differences, Digester, Digests};
