//! `secretier audit search|verify`: in the configured database, whether or not the proxy runs.

use std::{
    path::PathBuf,
    process::ExitCode,
    str::FromStr,
    time::{Duration, SystemTime},
};

use clap::{Args, Subcommand, builder::PossibleValuesParser};
use serde_json::json;

use super::{AdminAction, ConfigFile, Failure, open_database, print_table};
use crate::{
    access::audit::{self, Kind, Outcome, RowFinding, Rows, Walked},
    clock::{Clock, Timestamp},
    tiers::database::{AuditFilter, AuditPlace, AuditRow, Sealed},
};

#[derive(Debug, Args)]
pub(super) struct Audit {
    #[command(subcommand)]
    action: AuditAction,
}

#[derive(Debug, Subcommand)]
enum AuditAction {
    /// Find out who asked for what
    Search(Search),
    /// Find records that were changed, removed or moved, and rows of tokens and tenants
    ///
    /// Prints each chain's end, which the next verification can be given with --end: then even
    /// a database that was set back to an earlier state is noticed. Exit 1 if anything does not fit.
    Verify(Verify),
    /// Have a chain signed again whose end does not fit, as it is, once you know why
    ///
    /// What was changed in it is found all the same until it is too old to be kept. Running
    /// instances sign the chain again when they have been started anew.
    Accept(Accept),
}

#[derive(Debug, Args)]
struct Search {
    #[command(flatten)]
    config: ConfigFile,
    /// Of this tenant
    #[arg(long)]
    tenant: Option<String>,
    /// Of this secret
    #[arg(long)]
    key: Option<String>,
    /// By this token, by name or id, or by uid:N
    #[arg(long)]
    actor: Option<String>,
    /// From then on: 2026-01-31T12:00:00Z, or so long ago, as in 2h
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<Timestamp>,
    /// Before then
    #[arg(long, value_name = "TIME", value_parser = time)]
    until: Option<Timestamp>,
    /// With this outcome
    #[arg(long, value_parser = PossibleValuesParser::new(Outcome::ALL.map(Outcome::as_str)))]
    outcome: Option<String>,
    /// How many to show at most, the newest
    #[arg(long, value_name = "NUMBER", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    limit: u32,
    /// Print the records as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Verify {
    #[command(flatten)]
    config: ConfigFile,
    /// A file of lines (audit.sink = ["file"]), with those that were rotated away from it, in place of
    /// the database
    #[arg(long, value_name = "FILE", conflicts_with = "end")]
    file: Option<PathBuf>,
    /// An end that an earlier verification printed: it must still be part of the chain
    #[arg(long, value_name = "CHAIN:SEQ:HASH", value_delimiter = ',')]
    end: Vec<End>,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Accept {
    #[command(flatten)]
    config: ConfigFile,
    /// The chain
    #[arg(value_parser = PossibleValuesParser::new(Kind::ALL.map(Kind::as_str)))]
    chain: String,
}

/// Where a chain ended.
#[derive(Debug, Clone)]
struct End(String, i64, [u8; 32]);

impl FromStr for End {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = || {
            let mut parts = text.splitn(3, ':');
            let (chain, seq, hex) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?);
            let mut hash = [0; 32];
            hex::decode_to_slice(hex, &mut hash).ok()?;
            Some(Self(chain.to_owned(), seq, hash))
        };
        parsed().ok_or("not what a verification prints, as in write:42:1f0c...")
    }
}

fn time(text: &str) -> Result<Timestamp, String> {
    if let Some(time) = Timestamp::from_rfc3339(text) {
        return Ok(time);
    }
    let ago: Duration = humantime::parse_duration(text)
        .map_err(|_| "write a time as in 2026-01-31T12:00:00Z, or how long ago, as in 2h".to_owned())?;
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let millis = since_epoch.saturating_sub(ago).as_millis();
    Ok(Timestamp::from_millis(i64::try_from(millis).unwrap_or(i64::MAX)))
}

impl Audit {
    pub(super) fn action(&self) -> Option<AdminAction> {
        match &self.action {
            AuditAction::Search(_) | AuditAction::Verify(_) => None,
            AuditAction::Accept(accept) => {
                Some(AdminAction::new(&accept.config, "audit.accept").with("chain", &accept.chain))
            }
        }
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self.action {
            AuditAction::Search(search) => search.run().await,
            AuditAction::Verify(verify) => Box::pin(verify.run()).await,
            AuditAction::Accept(accept) => accept.run().await,
        }
    }
}

impl Search {
    async fn run(self) -> Result<ExitCode, Failure> {
        let config = self.config.read()?.config;
        if !config.audit.sink.contains(&audit::SinkName::Database) {
            return Err(Failure::usage(
                "the audit is not in the database (audit.sink): search its lines of JSON, with jq say",
            ));
        }
        let database = Box::pin(open_database(&config)).await?;
        let mut filter = AuditFilter {
            no_folders: false,
            tenant: self.tenant,
            key: self.key,
            actor: self.actor,
            outcome: self.outcome,
            since: self.since,
            until: self.until,
            after: None,
        };
        let mut rows: Vec<AuditRow> = Vec::new();
        while rows.len() < self.limit as usize {
            let wanted = (self.limit as usize - rows.len()).min(1000);
            let page = database.search_audit(&filter, wanted as i64).await;
            let page = page.map_err(|error| Failure::failed("the audit could not be searched", error))?;
            let is_last = page.len() < wanted;
            filter.after = page.last().map(|row| AuditPlace { at: row.at, chain: row.chain.clone(), seq: row.seq });
            rows.extend(page);
            if is_last {
                break;
            }
        }
        if self.json {
            println!("{}", json!(rows.iter().map(audit::to_json).collect::<Vec<_>>()));
            return Ok(ExitCode::SUCCESS);
        }
        let cells = rows.iter().map(|row| {
            let detail: serde_json::Value = serde_json::from_str(&row.detail).unwrap_or_default();
            let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
            vec![
                Timestamp::from_millis(row.at).to_rfc3339(),
                row.count.to_string(),
                text(&row.actor_name.clone().or_else(|| row.actor_id.clone())),
                row.action.clone(),
                text(&row.tenant),
                text(&row.key),
                detail["code"].as_str().map_or_else(|| row.outcome.clone(), |code| format!("{} ({code})", row.outcome)),
                text(&row.tier),
                detail["peer"].as_str().unwrap_or("-").to_owned(),
            ]
        });
        print_table(
            &["TIME", "COUNT", "ACTOR", "ACTION", "TENANT", "KEY", "OUTCOME", "TIER", "PEER"],
            &cells.collect::<Vec<_>>(),
        );
        Ok(ExitCode::SUCCESS)
    }
}

impl Verify {
    async fn run(self) -> Result<ExitCode, Failure> {
        let config = self.config.read()?.config;
        if self.file.is_none() && !config.audit.sink.contains(&audit::SinkName::Database) {
            return Err(Failure::usage("the audit is not in the database (audit.sink): name its file with --file"));
        }
        let base = Box::pin(crate::app::Base::open(&config, &Clock::system())).await?;
        let (walked, rows) = match self.file {
            Some(file) => {
                let keys = base.database.keys().ring();
                let verifying = tokio::task::spawn_blocking(move || audit::verify_lines(&file, &keys));
                let verified = verifying.await.map_err(|error| Failure::failed("the verification", error))?;
                (verified.map_err(|error| Failure::failed("the audit could not be read", error))?, None)
            }
            None => {
                let ends: Vec<_> = self.end.into_iter().map(|End(chain, seq, hash)| (chain, seq, hash)).collect();
                let verified = Box::pin(audit::verify_everything(&base.database, &ends)).await;
                let (walked, rows) =
                    verified.map_err(|error| Failure::failed("the audit and its rows could not be read", error))?;
                (walked, Some(rows))
            }
        };
        let is_sound = walked.iter().all(|chain| chain.findings.is_empty())
            && rows.as_ref().is_none_or(|rows| rows.findings.is_empty());
        if self.json {
            let chains: Vec<_> = walked.iter().map(as_json).collect();
            let rows = rows.as_ref().map(rows_as_json);
            println!("{}", json!({ "sound": is_sound, "chains": chains, "rows": rows }));
        } else {
            let table = walked.iter().map(|chain| {
                let state = if chain.findings.is_empty() { "sound" } else { "NOT SOUND" };
                vec![chain.chain.clone(), chain.records.to_string(), state.to_owned(), end(chain)]
            });
            print_table(&["CHAIN", "RECORDS", "STATE", "END"], &table.collect::<Vec<_>>());
            walked.iter().flat_map(|chain| &chain.findings).for_each(|finding| println!("{finding}"));
            rows.iter().for_each(print_rows);
        }
        Ok(if is_sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Accept {
    async fn run(self) -> Result<ExitCode, Failure> {
        let config = self.config.read()?.config;
        let base = Box::pin(crate::app::Base::open(&config, &Clock::system())).await?;
        base.needs_key()?;
        let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(|kind| kind.as_str() == self.chain).collect();
        let accepted = audit::accept(&base.database, &kinds).await;
        accepted.map_err(|error| Failure::failed("the chain could not be signed", error))?;
        eprintln!("signed as it is; start running instances anew, so that they sign it again");
        Ok(ExitCode::SUCCESS)
    }
}

fn end(chain: &Walked) -> String {
    format!("{}:{}:{}", chain.chain, chain.end.0, hex::encode(chain.end.1))
}

fn print_rows(rows: &Rows) {
    let Rows { sealed, tokens, tokens_unsealed, tenants, tenants_unsealed, findings } = rows;
    println!();
    let state = |unsound: bool| if unsound { "NOT SOUND" } else { "sound" }.to_owned();
    let is_of_token = |finding: &RowFinding| matches!(finding, RowFinding::Token(..) | RowFinding::NotRevoked(..));
    let (of_tokens, others): (Vec<_>, Vec<_>) = findings.iter().partition(|finding| is_of_token(finding));
    let table = [("tokens", tokens, tokens_unsealed, of_tokens), ("tenants", tenants, tenants_unsealed, others)];
    let row = |(rows, sealed, unsealed, findings): &(&str, &usize, &usize, Vec<&RowFinding>)| {
        vec![(*rows).to_owned(), sealed.to_string(), unsealed.to_string(), state(!findings.is_empty())]
    };
    print_table(&["ROWS", "SEALED", "NOT SEALED", "STATE"], &table.iter().map(row).collect::<Vec<_>>());
    findings.iter().for_each(|finding| println!("{finding}"));
    match sealed {
        Some(Sealed::Since(_)) | None => {}
        Some(Sealed::Partly) => eprintln!("what is not sealed may have been changed: 'secretier keys seal' seals it"),
        Some(Sealed::Unchecked) => eprintln!("without a master key no row can be verified; see [keys]"),
    }
}

fn rows_as_json(rows: &Rows) -> serde_json::Value {
    let since = match rows.sealed {
        Some(Sealed::Since(at)) => Some(at.to_rfc3339()),
        _ => None,
    };
    json!({
        "sealed_since": since,
        "tokens": { "sealed": rows.tokens, "not_sealed": rows.tokens_unsealed },
        "tenants": { "sealed": rows.tenants, "not_sealed": rows.tenants_unsealed },
        "findings": rows.findings.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

fn as_json(chain: &Walked) -> serde_json::Value {
    let findings = chain.findings.iter().map(|finding| json!({ "seq": finding.seq, "finding": finding.to_string() }));
    json!({
        "chain": chain.chain, "records": chain.records, "end": end(chain),
        "findings": findings.collect::<Vec<_>>(),
    })
}
