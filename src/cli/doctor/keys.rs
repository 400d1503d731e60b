//! The master keys: whether the sources give them, whether they are all, and whether there is a
//! backup of them.

use crate::{
    app::Base,
    clock::Clock,
    config::Config,
    diagnosis::Area,
    keys::{Loaded, SourceOutcome, SourceReport},
    log,
    tiers::database::Readiness,
};

/// Examines the master keys. Which of them are needed is in the database.
pub(super) async fn examine(config: &Config, clock: &Clock, readiness: Readiness, area: &Area) {
    area.begins("sources");
    if readiness != Readiness::Ready {
        return match readiness {
            Readiness::ToBeMade => area.ok("sources", "they are looked at once the database has its tables"),
            _ => area.warning("sources", "they cannot be looked at without the database", "look again when it answers"),
        };
    }
    let base = match Box::pin(Base::examine(config, clock)).await {
        Ok(base) => base,
        Err(error) => {
            return area.failure(
                "sources",
                log::chain(&error),
                "check keys.sources; docs/KEYS.md says what each source is to hold",
            );
        }
    };
    tell(&base.loaded, area);
    let missing = base.missing();
    for lacking in missing {
        let last = lacking.known.as_ref().map_or_else(
            || "nobody knows where it was".to_owned(),
            |known| format!("it was last seen in {}", known.source),
        );
        area.failure(
            "keys",
            format!(
                "the master key {} is missing, which {} tenants' secrets need; {last}",
                lacking.wraps.id, lacking.wraps.tenants
            ),
            "put it back into one of keys.sources, behind the key that wraps",
        );
    }
    if let Err(error) = base.needs_key() {
        area.failure(
            "keys",
            log::chain(&error),
            "put a master key into one of keys.sources: 'openssl rand -hex 32' makes one",
        );
    } else if missing.is_empty() {
        area.ok("keys", "all master keys that the stored secrets need are there");
    }
    let faults = base.backup_faults();
    for fault in &faults {
        area.warning("backup", fault, "without the master keys the stored secrets are lost");
    }
    match (config.keys.backup_file.is_some(), faults.is_empty()) {
        (true, true) => area.ok("backup", "the backup holds all master keys"),
        (false, _) => area.warning(
            "backup",
            "no backup of the master keys is configured",
            "set keys.backup_file and run 'secretier keys backup', unless the keys are kept elsewhere too",
        ),
        (true, false) => {}
    }
}

fn tell(loaded: &Loaded, area: &Area) {
    for SourceReport { source, outcome } in &loaded.reports {
        match outcome {
            SourceOutcome::Gave(ids) => area.ok("sources", format!("{source} gives {} keys", ids.len())),
            SourceOutcome::Empty(reason) => area.ok("sources", format!("{source} gives none: {reason}")),
            SourceOutcome::Unreachable(reason) => area.warning(
                "sources",
                format!("{source} does not answer: {reason}"),
                "an instance that starts now needs another source, or the backup",
            ),
        }
    }
    match &loaded.backup {
        Some(Ok(_)) => area.warning("backup", "the keys were read from the backup", "look why no source gave them"),
        Some(Err(error)) => area.failure("backup", log::chain(error), "make it anew: 'secretier keys backup'"),
        None => {}
    }
}
