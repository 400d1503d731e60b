//! Rows as they are written, whole: what a noun makes, and the pool inserts for either database.

use diesel::{Insertable, Queryable};

use super::schema::{
    audit_records, changes, companies, company_data_keys, company_secrets, migration_tenants, tenant_uses,
};

/// The largest number of rows in one statement. SQLite takes 32,766 parameters in a statement,
/// PostgreSQL 65,535, and a row to be inserted has eleven.
pub(super) const ROWS: usize = 500;

/// Snapshots are stored in the background, after the answer, so storing one may take this many
/// timeouts.
pub(super) const BACKGROUND_TIMEOUTS: u32 = 10;

/// A record of the audit. With its empty columns named, every row uses the same statement, which
/// SQLite then keeps.
#[derive(Insertable, Queryable)]
#[diesel(table_name = audit_records, treat_none_as_default_value = false)]
pub(super) struct AuditRecordRow {
    pub(super) chain: String,
    pub(super) seq: i64,
    pub(super) first_at: i64,
    pub(super) at: i64,
    pub(super) count: i64,
    pub(super) actor_id: Option<String>,
    pub(super) actor_name: Option<String>,
    pub(super) action: String,
    pub(super) tenant: Option<String>,
    pub(super) secret_key: Option<String>,
    pub(super) outcome: String,
    pub(super) tier: Option<String>,
    pub(super) detail: String,
    pub(super) hash: Vec<u8>,
    pub(super) signed_with: Option<String>,
    pub(super) signature: Option<Vec<u8>>,
}

/// A row to be inserted.
#[derive(Insertable)]
#[diesel(table_name = changes, treat_none_as_default_value = false)]
pub(super) struct NewChange {
    pub(super) number: i64,
    pub(super) what: &'static str,
    pub(super) subdomain: Option<String>,
    pub(super) secret_key: Option<String>,
    pub(super) made_by: String,
    pub(super) mark: Option<i64>,
}

/// A row that is inserted where it is missing.
#[derive(Insertable)]
#[diesel(table_name = companies)]
pub(super) struct NewCompany {
    pub(super) id: String,
    pub(super) subdomain: String,
    pub(super) generation: i64,
    pub(super) created_at: i64,
    pub(super) updated_at: i64,
}

impl NewCompany {
    pub(super) fn subdomain(&self) -> &str {
        &self.subdomain
    }
}

/// The changes that locking makes to an existing row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    /// Added to its generation.
    pub(super) generations: i64,
    /// The time to note as the last touch, if it is to be noted.
    pub(super) touched_at: Option<i64>,
    /// Whether validators no longer confirm the copy.
    pub(super) is_unconfirmed: bool,
}

impl Mark {
    /// Whether it changes nothing.
    pub(super) fn is_none(self) -> bool {
        self.generations == 0 && self.touched_at.is_none() && !self.is_unconfirmed
    }
}

/// The state of the copy of a tenant's folder, as the tenant's row has it.
pub(super) struct CopyState {
    pub(super) id: String,
    pub(super) at: i64,
    pub(super) etag: Option<String>,
    pub(super) whole: bool,
}

/// A row to be inserted.
#[derive(Insertable)]
#[diesel(table_name = company_data_keys)]
pub(super) struct NewDataKey {
    pub(super) id: String,
    pub(super) company_id: String,
    pub(super) version: i64,
    pub(super) wrapped_key: String,
    pub(super) master_key_id: String,
    pub(super) sealings: i64,
    pub(super) created_at: i64,
}

/// A row to be kept, with every column of the table.
#[derive(Insertable)]
#[diesel(table_name = migration_tenants, treat_none_as_default_value = false)]
pub(super) struct StateRow {
    pub(super) subdomain: String,
    pub(super) run_id: String,
    pub(super) step: &'static str,
    pub(super) secrets: i64,
    pub(super) digest: Option<String>,
    pub(super) reason: Option<String>,
    pub(super) error: Option<String>,
    pub(super) phase_before: Option<&'static str>,
    pub(super) verified_at: Option<i64>,
    pub(super) switched_at: Option<i64>,
    pub(super) updated_at: i64,
    pub(super) shadow_compared: i64,
    pub(super) shadow_different: i64,
    pub(super) shadow_different_at: Option<i64>,
}

/// A row to be inserted.
#[derive(Insertable)]
#[diesel(table_name = company_secrets, treat_none_as_default_value = false)]
pub(super) struct NewSecret {
    pub(super) id: String,
    pub(super) company_id: String,
    pub(super) secret_key: String,
    pub(super) secret_value_encrypted: Option<String>,
    pub(super) version: i64,
    pub(super) previous_version_id: Option<String>,
    pub(super) source: &'static str,
    pub(super) written_by: Option<String>,
    pub(super) created_at: i64,
    pub(super) updated_at: i64,
    pub(super) secret_text_encrypted: Option<String>,
    pub(super) unusable: Option<&'static str>,
    pub(super) counted: Option<bool>,
}

/// A secret's row, sealed.
#[derive(Queryable, Clone)]
pub(super) struct SecretRow {
    pub(super) id: String,
    pub(super) key: String,
    pub(super) sealed: Option<String>,
    pub(super) version: i64,
    pub(super) previous: Option<String>,
    pub(super) source: String,
    pub(super) written_by: Option<String>,
    pub(super) updated_at: i64,
    pub(super) superseded_at: Option<i64>,
    pub(super) text: Option<String>,
    pub(super) unusable: Option<String>,
    /// Whether its tenant's head counts it.
    pub(super) counted: Option<bool>,
}

impl SecretRow {
    /// About how many bytes it has.
    pub(super) fn bytes(&self) -> usize {
        [&self.sealed, &self.text].into_iter().flatten().map(String::len).sum()
    }
}

/// A row to be written.
#[derive(Insertable)]
#[diesel(table_name = tenant_uses)]
pub(super) struct Use {
    pub(super) subdomain: String,
    pub(super) used_at: i64,
}
