//! Moving tenants between owners while they are served: from Infisical's folders, or from
//! the tables that an application keeps today, to the database, and back.

pub mod origin;
