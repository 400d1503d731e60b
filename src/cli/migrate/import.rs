//! `secretier migrate import`.

use std::{collections::HashSet, process::ExitCode, sync::Arc};

use clap::Args;

use super::{
    AdminAction, ConfigFile, Failure, Tenants, open_base, plan,
    run::{How, run},
    transfer,
};
use crate::{
    app::Base,
    clock::Clock,
    keys::KeySource,
    migration::tables::legacy::{LegacyFormat, LegacyKey},
    migration::{
        plan::Cost,
        run::Options,
        tables::{Layout, Tables, TablesConfig},
        transfer::Takes,
    },
    phase::Phase,
    sealing::Digester,
    tenant::Tenant,
    tiers::{
        database::{DatabaseUrl, RunKind},
        upstream::Lane,
    },
};

#[derive(Debug, Args)]
pub(super) struct Import {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    tenants: Tenants,
    #[command(flatten)]
    how: How,
    /// The application's database, postgres://user@host/database; one with a password belongs into a
    /// variable, see --from-env
    #[arg(long, value_name = "URL", required_unless_present = "from_env")]
    from: Option<String>,
    /// A variable that holds the URL
    #[arg(long, value_name = "NAME", conflicts_with = "from")]
    from_env: Option<String>,
    /// What the tables look like: company_secrets (company_id, secret_key, secret_value_encrypted, and
    /// companies with id and subdomain) or tenant_secrets (tenant_id, key, value_encrypted)
    #[arg(long, value_name = "LAYOUT")]
    table: Layout,
    /// A variable that holds the application's key: 64 hex digits, or base64 of 32 bytes
    #[arg(long, value_name = "NAME")]
    key_env: String,
    /// How the values are sealed: auto, gcm-tag-first, gcm-tag-last or cbc
    #[arg(long, value_name = "FORMAT", default_value_t)]
    format: LegacyFormat,
    /// Give tenants to the database that are in a phase that asks upstream, which has no folder for them
    #[arg(long)]
    cutover: bool,
    /// Replace values that the database has and that differ; they become older versions
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    names: Names,
}

/// What things are called there, where it is not as the layout says.
#[derive(Debug, Args)]
#[command(next_help_heading = "Names in the application's database")]
struct Names {
    /// The schema of the tables [default: public]
    #[arg(long, value_name = "NAME")]
    schema: Option<String>,
    /// The table that holds the secrets
    #[arg(long, value_name = "NAME")]
    table_name: Option<String>,
    /// Its column that tells whose a secret is: a subdomain, or an id in the table of tenants
    #[arg(long, value_name = "NAME")]
    tenant_column: Option<String>,
    /// Its column with the secrets' names
    #[arg(long, value_name = "NAME")]
    key_column: Option<String>,
    /// Its column with the sealed values
    #[arg(long, value_name = "NAME")]
    value_column: Option<String>,
    /// Its column that tells when a secret was last changed; of several of one name the last is taken
    #[arg(long, value_name = "NAME")]
    updated_column: Option<String>,
    /// The table that tells tenants' subdomains by their ids
    #[arg(long, value_name = "NAME")]
    tenants_table: Option<String>,
    /// Its column with the ids
    #[arg(long, value_name = "NAME")]
    tenants_id_column: Option<String>,
    /// Its column with the subdomains
    #[arg(long, value_name = "NAME")]
    tenants_name_column: Option<String>,
}

impl Import {
    pub(super) fn action(&self) -> Option<AdminAction> {
        let action = || self.tenants.on(AdminAction::new(&self.config, "migrate.import"));
        (!self.how.dry_run).then(|| action().with("cutover", self.cutover).with("overwrite", self.overwrite))
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let selection = self
            .tenants
            .selection()?
            .ok_or_else(|| Failure::usage("say which tenants: --tenants acme,beta-*, --tenants-file FILE, or --all"))?;
        let config = self.config.read()?.config;
        let clock = Clock::system();
        let key = LegacyKey::read(&KeySource::Env(self.key_env.clone()))
            .map_err(|error| Failure::usage(error.to_string()))?;
        let url = self.url()?;
        let tables = TablesConfig {
            schema: self.names.schema.clone(),
            table_name: self.names.table_name.clone(),
            tenant_column: self.names.tenant_column.clone(),
            key_column: self.names.key_column.clone(),
            value_column: self.names.value_column.clone(),
            updated_column: self.names.updated_column.clone(),
            tenants_table: self.names.tenants_table.clone(),
            tenants_id_column: self.names.tenants_id_column.clone(),
            tenants_name_column: self.names.tenants_name_column.clone(),
            max_value: config.server.max_value,
            ..TablesConfig::new(DatabaseUrl::from(url.as_str()), self.table)
        };
        let tables =
            Tables::new(&tables, key, self.format, clock.clone()).map_err(|error| Failure::usage(error.to_string()))?;
        let base = open_base(&config, &clock).await?;
        let takes =
            Takes::Rows { overwrite: self.overwrite, folders: folders(&base).await?, upstream: base.upstream.clone() };
        let transfer = transfer(&config, &clock, &base, Arc::new(tables), takes)?;
        let options = Options {
            origin: Some(self.origin(&transfer.digester, &url)),
            ..self.how.options(self.cutover.then_some(Phase::Database))
        };
        if self.format != LegacyFormat::GcmTagFirst && self.format != LegacyFormat::GcmTagLast {
            eprintln!(
                "note: the format iv:ciphertext (CBC) proves neither key nor value; look at some of what it gave before \
                 you rely on it"
            );
        }
        if self.how.dry_run {
            let cost = |_, _| Cost::none();
            return plan::show(&transfer, &selection, &options, &cost, self.how.json).await;
        }
        run(&config, transfer, RunKind::Import, &selection, options, &self.how).await
    }

    /// What tells these tables from others: their values and the key that opens them may be
    /// others too.
    fn origin(&self, digester: &Digester, url: &str) -> String {
        let (layout, format, names) = (self.table.to_string(), self.format.to_string(), format!("{:?}", self.names));
        digester.of_origin(&[url, &layout, &format, &names, &self.key_env]).to_string()
    }

    fn url(&self) -> Result<String, Failure> {
        match (&self.from, &self.from_env) {
            (Some(url), _) => {
                let has_password = reqwest::Url::parse(url).is_ok_and(|url| url.password().is_some());
                if has_password {
                    eprintln!("warning: others on this machine can read the password in --from; use --from-env");
                }
                Ok(url.clone())
            }
            (None, Some(name)) => match std::env::var(name) {
                Ok(url) => Ok(url.trim().to_owned()),
                Err(_) => Err(Failure::usage(format!("the environment variable {name} is not set"))),
            },
            (None, None) => Err(Failure::usage("name the application's database with --from or --from-env")),
        }
    }
}

/// The tenants that upstream has folders for, where there is an upstream.
async fn folders(base: &Base) -> Result<HashSet<Tenant>, Failure> {
    let Some(upstream) = &base.upstream else { return Ok(HashSet::new()) };
    let folders = upstream.tenants(Lane::Interactive).await;
    let folders = folders.map_err(|error| {
        Failure::failed("which tenants have a folder upstream, and are migrated from there, is not known", error)
    })?;
    Ok(folders.tenants.into_iter().collect())
}
