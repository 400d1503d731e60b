//! The configured names, and the SQL that is made of them.
//!
//! The names come from a command line. In the SQL they stand in quotes, and quotes in
//! them are doubled, since only a quote can end such a name. Before that, they are looked up in
//! the catalogue as values.

use super::legacy;
use super::{Layout, TablesConfig, TablesError};

/// Begins every read. All of its settings hold until the transaction ends, and nothing is left
/// in the session: behind a pooler the application goes on with that session, and would
/// find itself unable to write. Each read is one statement, which sees one state of the
/// database; a stricter isolation level, where that is the default, would only refuse some reads.
pub(super) const BEGIN: &str = "BEGIN TRANSACTION ISOLATION LEVEL READ COMMITTED READ ONLY; \
     SET LOCAL statement_timeout TO '30s'; \
     SET LOCAL idle_in_transaction_session_timeout TO '60s'; \
     SET LOCAL row_security TO off";

/// The columns of two tables in one schema, and whether each holds dates.
pub(super) const COLUMNS: &str = "SELECT c.relname::text, a.attname::text, t.typcategory = 'D' \
     FROM pg_catalog.pg_attribute a \
     JOIN pg_catalog.pg_type t ON t.oid = a.atttypid \
     JOIN pg_catalog.pg_class c ON c.oid = a.attrelid \
     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
     WHERE n.nspname::text = $1 AND c.relname::text = ANY($2) \
     AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND a.attnum > 0 AND NOT a.attisdropped";

/// The most characters of a name that are read: one more than the bytes of the longest accepted
/// name, so that a name that is cut off is never taken for a whole one.
const NAME_LEN: usize = 256;

/// The names of schema, tables and columns, from the configuration or the layout.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) schema: String,
    pub(super) table: String,
    pub(super) tenant_column: String,
    key_column: String,
    value_column: String,
    /// Set where the configuration names one; else the usual one is used if it is there.
    updated_column: Option<String>,
    pub(super) tenants: Option<TenantsNames>,
}

/// The table that has the tenants' names, by their ids.
#[derive(Debug)]
pub(super) struct TenantsNames {
    pub(super) table: String,
    id_column: String,
    name_column: String,
}

/// The statements that read the tables.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Statements {
    /// Each tenant's id and name, both of which may be missing.
    pub(super) tenants: String,
    /// Of the tenants named in `$1`: name, id, key, sealed value, seconds since 1970.
    pub(super) secrets: String,
}

/// A column that exists.
pub(super) struct Column {
    pub(super) table: String,
    pub(super) name: String,
    pub(super) holds_dates: bool,
}

impl Names {
    pub(super) fn of(config: &TablesConfig) -> Result<Self, TablesError> {
        let (table, tenant_column, key_column, value_column, tenants_table) = match config.layout {
            Layout::CompanySecrets => {
                ("company_secrets", "company_id", "secret_key", "secret_value_encrypted", Some("companies"))
            }
            Layout::TenantSecrets => ("tenant_secrets", "tenant_id", "key", "value_encrypted", None),
        };
        let tenants_table = config.tenants_table.as_deref().or(tenants_table);
        let named = |given: &Option<String>, usual, option| name(given.as_deref().unwrap_or(usual), option);
        for (given, option) in
            [(&config.tenants_id_column, "--tenants-id-column"), (&config.tenants_name_column, "--tenants-name-column")]
        {
            if tenants_table.is_none() && given.is_some() {
                return Err(TablesError::NoTenantsTable(option));
            }
        }
        Ok(Self {
            schema: named(&config.schema, "public", "--schema")?,
            table: named(&config.table_name, table, "--table-name")?,
            tenant_column: named(&config.tenant_column, tenant_column, "--tenant-column")?,
            key_column: named(&config.key_column, key_column, "--key-column")?,
            value_column: named(&config.value_column, value_column, "--value-column")?,
            updated_column: match &config.updated_column {
                None => None,
                Some(column) => Some(name(column, "--updated-column")?),
            },
            tenants: match tenants_table {
                None => None,
                Some(table) => Some(TenantsNames {
                    table: name(table, "--tenants-table")?,
                    id_column: named(&config.tenants_id_column, "id", "--tenants-id-column")?,
                    name_column: named(&config.tenants_name_column, "subdomain", "--tenants-name-column")?,
                }),
            },
        })
    }

    /// The statements for tables with these columns; else an error that says which names are
    /// missing and which options name others.
    pub(super) fn statements(&self, columns: &[Column]) -> Result<Statements, String> {
        self.look_up(columns)?;
        let secrets = self.qualified(&self.table);
        let column = |name: &str| format!("s.{}", quoted(name));
        let id = text(&column(&self.tenant_column));
        let (name, tables) = match &self.tenants {
            None => (id.clone(), format!("{secrets} s")),
            Some(TenantsNames { table, id_column, name_column }) => {
                let tenants = format!(
                    "SELECT DISTINCT {} AS id, {} AS name FROM {}",
                    text(&quoted(id_column)),
                    text(&quoted(name_column)),
                    self.qualified(table)
                );
                ("t.name".to_owned(), format!("{secrets} s LEFT JOIN ({tenants}) t ON t.id = {id}"))
            }
        };
        let key = text(&column(&self.key_column));
        let value = text(&column(&self.value_column));
        // As a number of this type every date can be expressed, including infinite ones.
        let updated = match self.dates(columns) {
            true => format!("extract(epoch FROM {})::float8", column(self.updated())),
            false => "NULL::float8".to_owned(),
        };
        let longest = legacy::MAX_LEN;
        Ok(Statements {
            tenants: format!("SELECT DISTINCT left({id}, {NAME_LEN}), left({name}, {NAME_LEN}) FROM {tables}"),
            secrets: format!(
                "SELECT {name}, {id}, left({key}, {NAME_LEN}), \
                 CASE WHEN octet_length({value}) <= {longest} THEN {value} END, {updated} \
                 FROM {tables} WHERE {name} = ANY($1)"
            ),
        })
    }

    /// A table's name in SQL, in quotes and with its schema.
    pub(super) fn qualified(&self, table: &str) -> String {
        format!("{}.{}", quoted(&self.schema), quoted(table))
    }

    fn look_up(&self, columns: &[Column]) -> Result<(), String> {
        let mut missing = Vec::new();
        let mut look = |table: &str, option: &str, names: &[(&str, &str)]| {
            let place = self.qualified(table);
            if !columns.iter().any(|column| column.table == table) {
                missing.push(format!("there is no table {place} ({option} and --schema name another)"));
                return;
            }
            for (name, option) in names {
                if !columns.iter().any(|column| column.table == table && column.name == *name) {
                    missing.push(format!("{place} has no column {} ({option} names another)", quoted(name)));
                }
            }
        };
        let mut names = vec![
            (self.tenant_column.as_str(), "--tenant-column"),
            (self.key_column.as_str(), "--key-column"),
            (self.value_column.as_str(), "--value-column"),
        ];
        names.extend(self.updated_column.as_deref().map(|column| (column, "--updated-column")));
        look(&self.table, "--table-name", &names);
        if let Some(TenantsNames { table, id_column, name_column }) = &self.tenants {
            let names = [(id_column.as_str(), "--tenants-id-column"), (name_column.as_str(), "--tenants-name-column")];
            look(table, "--tenants-table", &names);
        }
        if let Some(updated) = &self.updated_column
            && missing.is_empty()
            && !self.dates(columns)
        {
            missing.push(format!("the column {} holds no dates (--updated-column names another)", quoted(updated)));
        }
        if missing.is_empty() { Ok(()) } else { Err(missing.join("; ")) }
    }

    /// Whether the table has the time of a secret's last change.
    fn dates(&self, columns: &[Column]) -> bool {
        let is_it = |column: &Column| column.table == self.table && column.name == self.updated();
        columns.iter().any(|column| is_it(column) && column.holds_dates)
    }

    fn updated(&self) -> &str {
        self.updated_column.as_deref().unwrap_or("updated_at")
    }
}

fn name(given: &str, option: &'static str) -> Result<String, TablesError> {
    if given.is_empty() || given.contains('\0') { Err(TablesError::Name(option)) } else { Ok(given.to_owned()) }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A column of any type, as text that is compared byte by byte: ids may be numbers in
/// one table and text in the other, and a column may have a collation by which `a` equals `A`.
fn text(column: &str) -> String {
    format!("{column}::text COLLATE \"C\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(layout: Layout) -> TablesConfig {
        TablesConfig::new("postgres://db/app".into(), layout)
    }

    fn columns(names: &[(&str, &str)]) -> Vec<Column> {
        let column = |&(table, name): &(&str, &str)| Column {
            table: table.to_owned(),
            name: name.to_owned(),
            holds_dates: name.ends_with("_at"),
        };
        names.iter().map(column).collect()
    }

    #[test]
    fn a_name_stands_in_quotes_whatever_is_in_it() {
        assert_eq!(quoted("Group"), "\"Group\"");
        assert_eq!(quoted("x\"; DROP TABLE y; --"), "\"x\"\"; DROP TABLE y; --\"");
    }

    #[test]
    fn a_name_with_a_nul_or_without_a_letter_is_refused_by_its_option() {
        for wrong in ["", "a\0b"] {
            let wrong = || Some(wrong.to_owned());
            for (config, option) in [
                (TablesConfig { schema: wrong(), ..config(Layout::CompanySecrets) }, "--schema"),
                (TablesConfig { table_name: wrong(), ..config(Layout::CompanySecrets) }, "--table-name"),
                (TablesConfig { tenant_column: wrong(), ..config(Layout::CompanySecrets) }, "--tenant-column"),
                (TablesConfig { key_column: wrong(), ..config(Layout::CompanySecrets) }, "--key-column"),
                (TablesConfig { value_column: wrong(), ..config(Layout::CompanySecrets) }, "--value-column"),
                (TablesConfig { updated_column: wrong(), ..config(Layout::CompanySecrets) }, "--updated-column"),
                (TablesConfig { tenants_table: wrong(), ..config(Layout::TenantSecrets) }, "--tenants-table"),
                (TablesConfig { tenants_id_column: wrong(), ..config(Layout::CompanySecrets) }, "--tenants-id-column"),
                (TablesConfig { tenants_name_column: wrong(), ..config(Layout::CompanySecrets) }, {
                    "--tenants-name-column"
                }),
            ] {
                let refused = Names::of(&config).expect_err(option);
                assert!(matches!(refused, TablesError::Name(named) if named == option), "{refused}");
            }
        }
    }

    #[test]
    fn a_column_of_no_table_is_refused() {
        let id = TablesConfig { tenants_id_column: Some("id".to_owned()), ..config(Layout::TenantSecrets) };
        let refused = Names::of(&id).expect_err("there is no such table");
        assert!(matches!(refused, TablesError::NoTenantsTable("--tenants-id-column")), "{refused}");
        let both = TablesConfig { tenants_table: Some("tenants".to_owned()), ..id };
        assert!(Names::of(&both).is_ok());
    }

    #[test]
    fn all_that_is_missing_is_told_with_the_options_that_name_something_else() {
        let names = Names::of(&config(Layout::CompanySecrets)).unwrap();
        let told = names.statements(&[]).expect_err("nothing is there");
        assert_eq!(
            told,
            "there is no table \"public\".\"company_secrets\" (--table-name and --schema name another); \
             there is no table \"public\".\"companies\" (--tenants-table and --schema name another)"
        );
        let some = [("company_secrets", "company_id"), ("company_secrets", "secret_key"), ("companies", "id")];
        let told = names.statements(&columns(&some)).expect_err("some are missing");
        assert_eq!(
            told,
            "\"public\".\"company_secrets\" has no column \"secret_value_encrypted\" (--value-column names another); \
             \"public\".\"companies\" has no column \"subdomain\" (--tenants-name-column names another)"
        );
    }

    #[test]
    fn when_a_secret_was_changed_is_asked_where_it_is_told() {
        let mut there = columns(&[
            ("tenant_secrets", "tenant_id"),
            ("tenant_secrets", "key"),
            ("tenant_secrets", "value_encrypted"),
            ("tenant_secrets", "changed"),
        ]);
        let asks = |updated: Option<&str>, columns: &[Column]| {
            let config = TablesConfig { updated_column: updated.map(str::to_owned), ..config(Layout::TenantSecrets) };
            let statements = Names::of(&config).unwrap().statements(columns);
            statements.map(|statements| statements.secrets.contains("extract(epoch"))
        };
        assert_eq!(asks(None, &there), Ok(false));
        let refused = asks(Some("changed"), &there).expect_err("it holds no dates");
        assert!(refused.contains("\"changed\" holds no dates (--updated-column"), "{refused}");
        let refused = asks(Some("updated_at"), &there).expect_err("it is not there");
        assert!(refused.contains("no column \"updated_at\" (--updated-column"), "{refused}");
        there.extend(columns(&[("tenant_secrets", "updated_at")]));
        assert_eq!(asks(None, &there), Ok(true));
    }
}
