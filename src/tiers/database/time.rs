//! The database's own clock, read together with other rows.
//!
//! Times that instances compare with each other are taken from it ([`Clock::database_now`]): when a
//! folder was read, until when a lease lasts, when an instance announced itself. SQLite has only
//! the clock of the machine, which all its processes share.
//!
//! [`Clock::database_now`]: crate::clock::Clock::database_now

use std::time::Duration;

use diesel::{
    AppearsOnTable, Expression, QueryResult, SelectableExpression,
    expression::ValidGrouping,
    query_builder::{AstPass, QueryFragment, QueryId},
    sql_types::{BigInt, Nullable},
};

use super::Database;
use crate::clock::Timestamp;

/// The database's clock at the read of a row, in milliseconds since 1970; `NULL` where the database
/// has no clock of its own.
#[derive(Debug, Clone, Copy, QueryId, ValidGrouping)]
pub(super) struct DatabaseNow;

impl Expression for DatabaseNow {
    type SqlType = Nullable<BigInt>;
}

impl<Rows> SelectableExpression<Rows> for DatabaseNow {}

impl<Rows> AppearsOnTable<Rows> for DatabaseNow {}

impl QueryFragment<diesel::pg::Pg> for DatabaseNow {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, diesel::pg::Pg>) -> QueryResult<()> {
        // Not `now()`, which is the time when the transaction began.
        out.push_sql("(extract(epoch from clock_timestamp()) * 1000)::bigint");
        Ok(())
    }
}

impl QueryFragment<diesel::sqlite::Sqlite> for DatabaseNow {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, diesel::sqlite::Sqlite>) -> QueryResult<()> {
        out.push_sql("NULL");
        Ok(())
    }
}

impl Database {
    /// The time by the database's clock, as this process follows it.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.database_now()
    }

    /// Takes over the time that [`DatabaseNow`] returned for a query sent at this time of the
    /// running clock.
    pub(super) fn note_time(&self, told: Option<i64>, asked_at: Duration) {
        if let Some(told) = told {
            self.clock.follow_database(Timestamp::from_millis(told), asked_at);
        }
    }
}
