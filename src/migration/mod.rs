//! Moves tenants between owners while they are served: from Infisical's folders, or from
//! the tables that an application keeps today, to the database, and back.
//!
//! `transfer` compares a tenant between the two. `plan`, `run`, `verify`, `rollback` and
//! `cleanup` are the operations, one file each. `origin` is the source that tenants are taken
//! over from: `folders` or `tables`.

pub mod archive;
pub mod cleanup;
pub mod folders;
pub mod manifest;
pub mod origin;
pub mod plan;
mod push;
pub mod rollback;
pub mod run;
pub mod selection;
pub mod tables;
pub mod transfer;
pub mod verify;
