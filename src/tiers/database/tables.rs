//! The tables' version: which migrations were applied, and which programs can use the tables.
//!
//! Instances of two neighbouring versions run beside each other, so a program meets tables of the
//! version after it. If a migration makes tables that only programs which know it can use, it says
//! so in the row `readable_from` of `settings`: the version of the oldest migration that must be
//! known. A program that knows only older migrations is refused; one that knows that migration, or
//! a later one, continues, and logs it.

use diesel::{
    migration::{Migration as _, MigrationSource},
    sql_types::{Bool, Text},
};

use super::error::StoreError;

/// If this is the newest migration that a version of this program knows, that version can use the
/// next version's tables. Every later migration has to say which programs can use its tables.
#[cfg(test)]
const SILENT_UP_TO: &str = "00000000000006";

/// The state of a database's tables, as the database reports it.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// The versions of the migrations that were applied.
    pub(super) applied: Vec<String>,
    /// The oldest migration that users of the tables must know; `None` where none says so.
    pub(super) readable_from: Option<String>,
}

/// The state of the tables for this program.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// They are as this program makes them.
    Current,
    /// They are of an older version, or missing.
    Behind,
    /// They are of a newer version, and this one can use them.
    Ahead,
}

impl Tables {
    /// # Errors
    /// [`StoreError::NewerTables`].
    pub(super) fn standing(&self, known: &[String]) -> Result<Standing, StoreError> {
        let newest = known.iter().max().cloned().unwrap_or_default();
        match self.applied.iter().max() {
            Some(found) if *found > newest => match &self.readable_from {
                Some(needed) if *needed > newest => Err(StoreError::NewerTables {
                    found: number(found),
                    known: number(&newest),
                    needed: number(needed),
                }),
                _ => Ok(Standing::Ahead),
            },
            _ if known.iter().all(|version| self.applied.contains(version)) => Ok(Standing::Current),
            _ => Ok(Standing::Behind),
        }
    }
}

/// A version as people write it.
fn number(version: &str) -> String {
    version.trim_start_matches('0').to_owned()
}

/// The versions of all migrations that this program has.
pub(super) fn known<DB: diesel::backend::Backend>(source: &impl MigrationSource<DB>) -> Vec<String> {
    let migrations = source.migrations().unwrap_or_default();
    migrations.iter().map(|migration| migration.name().version().to_string()).collect()
}

/// Whether something exists.
#[derive(diesel::QueryableByName)]
pub(super) struct There {
    #[diesel(sql_type = Bool)]
    pub(super) there: bool,
}

/// One text.
#[derive(diesel::QueryableByName)]
pub(super) struct Said {
    #[diesel(sql_type = Text)]
    pub(super) said: String,
}

pub(super) const APPLIED: &str = "SELECT version AS said FROM __diesel_schema_migrations";
pub(super) const READABLE_FROM: &str = "SELECT value AS said FROM settings WHERE name = 'readable_from'";

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(applied: &[&str], readable_from: Option<&str>) -> Result<Standing, String> {
        let tables = Tables {
            applied: applied.iter().map(ToString::to_string).collect(),
            readable_from: readable_from.map(str::to_owned),
        };
        tables.standing(&["01".to_owned(), "03".to_owned()]).map_err(|error| error.to_string())
    }

    #[test]
    fn newer_tables_are_used_by_whom_they_say_can_use_them_and_by_nobody_else() {
        assert_eq!(standing(&[], None), Ok(Standing::Behind));
        assert_eq!(standing(&["01"], None), Ok(Standing::Behind));
        assert_eq!(standing(&["01", "03"], None), Ok(Standing::Current));
        assert_eq!(standing(&["01", "03", "04"], None), Ok(Standing::Ahead));
        assert_eq!(standing(&["01", "03", "04"], Some("03")), Ok(Standing::Ahead));
        let refused = standing(&["01", "03", "05"], Some("04")).unwrap_err();
        assert!(["number 5", "number 4", "number 3"].iter().all(|number| refused.contains(number)), "{refused}");
        assert_eq!(standing(&["01", "03"], Some("03")), Ok(Standing::Current));
    }

    #[test]
    fn a_new_migration_says_which_programs_can_use_its_tables() {
        for database in ["sqlite", "postgres"] {
            let folder = format!("{}/migrations/{database}", env!("CARGO_MANIFEST_DIR"));
            for entry in std::fs::read_dir(folder).unwrap() {
                let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
                if name.to_string_lossy().split('_').next().is_some_and(|version| version > SILENT_UP_TO) {
                    let up = std::fs::read_to_string(path.join("up.sql")).unwrap();
                    assert!(up.contains("'readable_from'"), "{name:?} says nothing");
                }
            }
        }
    }
}
