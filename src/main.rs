//! The `secretier` command.
fn main() {}
