//! Every metric: its name, kind, unit, labels and help. A metric that is not in this table is
//! not shown with a help text, and the tests refuse it.
//!
//! Names follow Prometheus' conventions: they end with the base unit, and with `_total` for a
//! counter (<https://prometheus.io/docs/practices/naming/>).

/// The unit of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A number of things.
    None,
    /// Seconds, or a time in seconds since 1970.
    Seconds,
    /// Bytes.
    Bytes,
}

impl Unit {
    /// The end of the names of metrics in this unit.
    #[must_use]
    pub fn as_str(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Seconds => Some("seconds"),
            Self::Bytes => Some("bytes"),
        }
    }
}

/// The kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// It only grows, from 0 at the start.
    Counter,
    /// It grows and shrinks.
    Gauge,
    /// It counts values up to each of these bounds.
    Histogram(&'static [f64]),
    /// Always 1: its labels say something about the instance.
    Info,
}

/// A label, and its values where all are known. A counter with one such label begins with each of
/// them at 0, so that its first increase is seen.
#[derive(Debug, Clone, Copy)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// Its values; empty where they are not listed here.
    pub values: &'static [&'static str],
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Described {
    /// The name, as the page shows it.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// Its unit.
    pub unit: Unit,
    /// Its labels.
    pub labels: &'static [Label],
    /// Its meaning, in one sentence.
    pub help: &'static str,
}

const fn open(name: &'static str) -> Label {
    Label { name, values: &[] }
}

const fn of(name: &'static str, values: &'static [&'static str]) -> Label {
    Label { name, values }
}

const fn counter(name: &'static str, labels: &'static [Label], help: &'static str) -> Described {
    Described { name, kind: Kind::Counter, unit: Unit::None, labels, help }
}

const fn gauge(name: &'static str, labels: &'static [Label], help: &'static str) -> Described {
    Described { name, kind: Kind::Gauge, unit: Unit::None, labels, help }
}

const fn times(name: &'static str, labels: &'static [Label], bounds: &'static [f64], help: &'static str) -> Described {
    Described { name, kind: Kind::Histogram(bounds), unit: Unit::Seconds, labels, help }
}

const fn info(name: &'static str, labels: &'static [Label], help: &'static str) -> Described {
    Described { name, kind: Kind::Info, unit: Unit::None, labels, help }
}

impl Described {
    const fn seconds(self) -> Self {
        Self { unit: Unit::Seconds, ..self }
    }

    const fn bytes(self) -> Self {
        Self { unit: Unit::Bytes, ..self }
    }
}

/// Of answers, and of calls over a network.
const CALLS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0];

/// Of calls of the database: there are many kinds of them.
const DATABASE_CALLS: &[f64] = &[0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5];

/// Of ages, from a second to a week.
const AGES: &[f64] = &[1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0, 604800.0];

/// Of turns that are waited for.
const WAITS: &[f64] = &[0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

const TIERS: &[&str] = &["memory", "database", "infisical"];

const CAUSES: &[&str] = &[
    "dns",
    "refused",
    "connection",
    "timeout",
    "proxy_unreachable",
    "proxy_login_refused",
    "proxy_refused",
    "proxy_timeout",
    "tls_certificate_unknown",
    "tls_certificate_expired",
    "tls_certificate_name",
    "tls",
    "not_infisical",
    "redirected",
    "no_route",
    "failed",
    "login_refused",
    "identity_locked",
    "address_not_allowed",
    "project",
    "environment",
    "tenants_path",
    "rejected",
    "directory",
];

const STATES: &[&str] = &["unknown", "up", "down", "login_refused", "rate_limited", "rejected"];

const LIMITS: &[&str] = &[
    "token",
    "peer",
    "failures",
    "in_flight",
    "strangers",
    "bodies",
    "answers",
    "event_streams",
    "webhooks",
    "logins",
];

const SIGNALS: &[&str] = &[
    "denied_burst",
    "expired_token",
    "many_tenants",
    "enumeration",
    "malformed_flood",
    "rapid_resets",
    "unread_answers",
];

const SHADOWS: &[&str] = &["equal", "different", "ahead", "superseded", "denied", "missing", "failed", "dropped"];

/// Every metric.
pub const TABLE: &[Described] = &[
    // The instance.
    info(
        "secretier_build_info",
        &[open("version"), open("os"), open("arch")],
        "The version of the program, and the machine that it was built for.",
    ),
    gauge("process_start_time_seconds", &[], "When the process was started, in seconds since 1970.").seconds(),
    counter("process_cpu_seconds_total", &[], "The time of processors that the process has used, in whole seconds.")
        .seconds(),
    gauge("process_resident_memory_bytes", &[], "Bytes of the machine's memory that the process has.").bytes(),
    gauge("process_open_fds", &[], "Open file descriptors of the process."),
    gauge("process_max_fds", &[], "The most file descriptors that the process may open."),
    // The answers that callers get.
    counter(
        "secretier_lookups_total",
        &[of("tier", TIERS), of("outcome", &["found", "absent"])],
        "Lookups of secrets that were answered, by the tier that answered.",
    ),
    times("secretier_served_age_seconds", &[of("tier", TIERS)], AGES, "How old the values were that were served."),
    counter(
        "secretier_stale_answers_total",
        &[of("tier", &["memory", "database"])],
        "Copies that were served past their refresh age.",
    ),
    counter(
        "secretier_coalesced_waits_total",
        &[of("for", &["load", "snapshot", "instance"])],
        "Lookups that shared the load of another, loads that shared a snapshot, and folders taken from another instance.",
    ),
    counter("secretier_errors_total", &[open("code")], "Answers that were errors, by their code."),
    times(
        "secretier_request_duration_seconds",
        &[of("status", &["2xx", "3xx", "4xx", "5xx"])],
        CALLS,
        "From a request to its answer, of the requests that were not answered from memory at once.",
    ),
    counter("secretier_limited_total", &[of("limit", LIMITS)], "Requests that a limit held back."),
    counter(
        "secretier_detached_requests_total",
        &[],
        "Requests that were refused because the database was not heard of for database.max_detached.",
    ),
    // Upstream.
    counter(
        "secretier_upstream_calls_total",
        &[open("call"), open("outcome")],
        "Calls to Infisical, by what came of them.",
    ),
    times("secretier_upstream_call_seconds", &[open("call")], CALLS, "How long calls to Infisical took."),
    counter(
        "secretier_upstream_failures_total",
        &[of("cause", CAUSES)],
        "Calls to upstream that failed, by their cause.",
    ),
    gauge("secretier_upstream_up", &[], "Whether upstream answered the last call: 1, else 0."),
    gauge(
        "secretier_upstream_state",
        &[of("state", STATES)],
        "The state that upstream is in: 1 for that one, 0 for the others.",
    ),
    gauge(
        "secretier_upstream_cause",
        &[of("cause", CAUSES)],
        "The reason why upstream is not up: 1 for that one, 0 for the others.",
    ),
    gauge("secretier_upstream_budget_left", &[], "Calls to Infisical that may be made at once."),
    counter(
        "secretier_references_unresolved_total",
        &[open("reason")],
        "Secrets from Infisical with a reference that could not be followed.",
    ),
    counter(
        "secretier_refresh_queue_reads_total",
        &[of("outcome", &["read", "nothing_held", "left", "full"])],
        "Folders that were said to have changed, by what came of it.",
    ),
    gauge(
        "secretier_refresh_queue_waiting",
        &[],
        "Folders that wait to be read because they are said to have changed.",
    ),
    counter(
        "secretier_change_polls_total",
        &[of("outcome", &["told", "read", "compared", "no_budget", "failed"])],
        "Looks for changes at Infisical.",
    ),
    counter("secretier_changes_found_total", &[], "Tenants that a look found changed, or without a folder."),
    counter(
        "secretier_shadow_reads_total",
        &[of("outcome", SHADOWS)],
        "Lookups that were compared with Infisical after a migration.",
    ),
    // The database.
    counter(
        "secretier_database_calls_total",
        &[open("call"), open("outcome")],
        "Operations of the database, by what came of them.",
    ),
    times(
        "secretier_database_call_seconds",
        &[open("call")],
        DATABASE_CALLS,
        "How long operations of the database took.",
    ),
    gauge("secretier_database_up", &[], "Whether the database answers: 1, else 0."),
    gauge("secretier_database_writable", &[], "Whether the database takes writes: 1, else 0."),
    gauge("secretier_database_news_age_seconds", &[], "How long ago the state of the database was last fully known.")
        .seconds(),
    gauge(
        "secretier_max_detached_seconds",
        &[],
        "How old news from the database may be before the instance answers nothing (database.max_detached).",
    )
    .seconds(),
    gauge(
        "secretier_change_followed",
        &[],
        "The number of the last change in the database that this instance has brought into force.",
    ),
    gauge("secretier_tokens_refused", &[], "Tokens whose rows in the database were changed, and which are refused."),
    gauge("secretier_tokens_unsealed", &[], "Tokens without a seal."),
    counter(
        "secretier_tenants_read_total",
        &[of("seal", &["sound", "none", "stale", "unknown", "set_back"])],
        "Tenants whose secrets were read as a whole, by what their seal says.",
    ),
    gauge(
        "secretier_clock_ahead_of_database_seconds",
        &[],
        "How far the clock of this machine is ahead of the clock of PostgreSQL.",
    )
    .seconds(),
    counter(
        "secretier_wall_clock_steps_total",
        &[],
        "How often the clock of this machine was set while the program ran.",
    ),
    // Memory.
    gauge("secretier_memory_entries", &[], "Secrets and known absences in memory."),
    gauge("secretier_memory_bytes", &[], "Bytes of secrets and names in memory.").bytes(),
    gauge("secretier_memory_capacity_bytes", &[], "The most bytes of secrets and names in memory (memory.capacity).")
        .bytes(),
    gauge("secretier_flights", &[of("kind", &["load", "snapshot"])], "Loads and snapshots that are being made."),
    gauge("secretier_keys_not_locked", &[], "Keys that the system did not lock into memory."),
    gauge("secretier_offline", &[], "Whether only what memory.offline_file held is answered: 1, else 0."),
    counter(
        "secretier_offline_file_writes_total",
        &[of("outcome", &["ok", "failed"])],
        "How often memory.offline_file was written.",
    ),
    gauge("secretier_offline_file_age_seconds", &[], "How long ago memory.offline_file was last written.").seconds(),
    gauge("secretier_offline_file_bytes", &[], "The length of memory.offline_file.").bytes(),
    // Connections, and what requests hold.
    gauge("secretier_connections", &[], "Open connections."),
    counter("secretier_connections_closed_for_others_total", &[], "Idle connections that were closed to make room."),
    gauge("secretier_peers", &[], "Peers that are remembered."),
    gauge("secretier_requests_in_flight", &[], "Requests with a good token that are in progress."),
    gauge(
        "secretier_held_requests",
        &[of("budget", &["in_flight", "strangers", "event_streams"])],
        "Places that requests in progress hold, of the budget of server.max_in_flight or max_strangers, and open streams of events.",
    ),
    gauge(
        "secretier_held_bytes",
        &[of("budget", &["bodies", "answers"])],
        "Bytes of bodies that are being read, and of answers that are not taken yet.",
    )
    .bytes(),
    times(
        "secretier_long_answer_wait_seconds",
        &[],
        WAITS,
        "How long lists and batches of more than 64 KiB waited for the turn of their token.",
    ),
    // The audit, the log, and what looks like an attack.
    gauge("secretier_audit_up", &[], "Whether records of the audit are written: 1, else 0."),
    gauge("secretier_audit_waiting", &[of("kind", &["record", "sum"])], "Records, and sums, that wait to be written."),
    counter(
        "secretier_audit_records_total",
        &[of("kind", &["lookup", "write", "denial", "admin"])],
        "Records of the audit that were written.",
    ),
    counter(
        "secretier_audit_failures_total",
        &[of("sink", &["database", "file", "stdout"])],
        "Attempts to write to the audit that failed.",
    ),
    counter("secretier_audit_summed_total", &[], "Records that were counted because the queue of the audit was full."),
    counter("secretier_audit_strangers_bytes_total", &[], "Bytes of audit.strangers_per_day that were used.").bytes(),
    gauge("secretier_audit_strangers_waiting", &[], "Sums of refusals that wait for room in the audit."),
    counter("secretier_signals_total", &[of("signal", SIGNALS)], "What looked like an attack."),
    counter(
        "secretier_log_lines_left_out_total",
        &[of("by", &["secretier", "library"])],
        "Lines of the log that were left out because they came again and again.",
    ),
    counter(
        "secretier_outgoing_calls_total",
        &[of("outcome", &["answered", "not_allowed", "no_budget", "left_alone", "timed_out", "failed"])],
        "Calls to servers that the configuration names beside upstream and the database: rotators.",
    ),
    counter(
        "secretier_secret_rotations_total",
        &[of("state", &["started", "promoted", "completed", "failed", "orphaned", "aborted", "rolled_back"])],
        "Rotations of secrets that came to this state here.",
    ),
    counter(
        "secretier_config_reloads_total",
        &[of("outcome", &["applied", "unchanged", "refused"])],
        "How often the configuration was read again.",
    ),
    gauge(
        "secretier_config_reloaded_timestamp_seconds",
        &[],
        "When a good configuration was last read again, in seconds since 1970.",
    )
    .seconds(),
];

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    #[test]
    fn names_tell_kind_and_unit() {
        for Described { name, kind, unit, labels, help } in TABLE {
            let bare = name.strip_suffix("_total").unwrap_or(name);
            assert_eq!(bare != *name, matches!(kind, Kind::Counter), "{name}");
            assert_eq!(name.ends_with("_info"), matches!(kind, Kind::Info), "{name}");
            let of_name = [Unit::Seconds, Unit::Bytes].into_iter().find(|unit| bare.ends_with(unit.as_str().unwrap()));
            assert_eq!(of_name.unwrap_or(Unit::None), *unit, "{name}");
            assert!(name.starts_with("secretier_") || name.starts_with("process_"), "{name}");
            // A digit first would look like a value.
            assert!(help.starts_with(|first: char| first.is_ascii_uppercase()), "{name}: {help}");
            assert!(help.ends_with('.') && !help.contains(['"', '\\', '\n']), "{name}: {help}");
            assert!(labels.iter().all(|label| !matches!(label.name, "le" | "quantile")), "{name}");
        }
    }

    #[test]
    fn no_two_metrics_share_a_family() {
        // In OpenMetrics a counter's family has no `_total`, and an info's no `_info`.
        let family = |name: &'static str| name.trim_end_matches("_total").trim_end_matches("_info");
        let families: BTreeSet<_> = TABLE.iter().map(|described| family(described.name)).collect();
        assert_eq!(families.len(), TABLE.len());
    }

    #[test]
    fn bounds_of_histograms_rise() {
        for described in TABLE {
            if let Kind::Histogram(bounds) = described.kind {
                assert!(bounds.is_sorted_by(|one, next| one < next) && bounds[0] > 0.0, "{}", described.name);
            }
        }
    }

    fn names_in(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                names_in(&path, found);
            } else if !path.ends_with("metrics/table.rs") {
                let text = fs::read_to_string(&path).unwrap();
                let names = text
                    .split("\"secretier_")
                    .skip(1)
                    .map(|rest| rest.split(|c: char| !c.is_ascii_lowercase() && c != '_').next().unwrap_or_default());
                found.extend(names.filter(|name| !name.ends_with('_')).map(|name| format!("secretier_{name}")));
            }
        }
    }

    #[test]
    fn the_program_names_no_metric_that_the_table_lacks_and_all_that_it_has() {
        let mut named = BTreeSet::new();
        names_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut named);
        let listed: BTreeSet<_> = TABLE.iter().map(|one| one.name.to_owned()).collect();
        let of_ours = |name: &&String| name.starts_with("secretier_");
        assert_eq!(named.difference(&listed).collect::<Vec<_>>(), Vec::<&String>::new(), "not in the table");
        let unused: Vec<_> = listed.difference(&named).filter(of_ours).collect();
        assert_eq!(unused, Vec::<&String>::new(), "named nowhere");
    }

    #[test]
    fn the_documentation_has_a_row_for_every_metric_and_for_no_other() {
        let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/API.md")).unwrap();
        let told: BTreeSet<_> = page
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split(" | ").next())
            .flat_map(|names| names.split('`'))
            .filter(|name| name.starts_with("secretier_") || name.starts_with("process_"))
            .map(str::to_owned)
            .collect();
        let labels = |labels: &[Label]| labels.iter().map(|label| label.name).collect::<Vec<_>>().join(",");
        let shown = |one: &Described| match labels(one.labels) {
            none if none.is_empty() => one.name.to_owned(),
            labels => format!("{}{{{labels}}}", one.name),
        };
        let listed: BTreeSet<_> = TABLE.iter().map(shown).collect();
        assert_eq!(listed.difference(&told).collect::<Vec<_>>(), Vec::<&String>::new(), "not in docs/API.md");
        assert_eq!(told.difference(&listed).collect::<Vec<_>>(), Vec::<&String>::new(), "not in the table");
    }
}
