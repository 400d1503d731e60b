//! Open files: the process's limit, and what the configuration may need of it.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{
    config::Config,
    tiers::upstream::{self, Settings},
};

/// Files that are open besides connections: listeners, logs, files that are read for a moment.
const OTHERS: usize = 64;

/// Of a database connection: SQLite's file, its write-ahead log, and the memory that it shares.
const OF_DATABASE_CONNECTION: usize = 3;

/// Raises the limit of open files as far as the system allows: the usual one (1024) is for programs
/// that cannot use more.
pub fn raise_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, "the limit of open files (ulimit -n) cannot be raised");
    }
}

/// The connections that may be open at once: `server.max_connections`, or fewer where the limit of
/// open files leaves room for fewer, which is logged.
pub(super) fn connections(config: &Config) -> usize {
    let wanted = config.server.max_connections;
    let Some(limit) = getrlimit(Resource::Nofile).current else { return wanted };
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let others = others(config);
    let fitting = fitting(limit, others);
    if fitting < wanted {
        tracing::warn!(
            limit,
            needed = needed(config),
            connections = fitting,
            "the limit of open files (ulimit -n, LimitNOFILE=) is low for server.max_connections = {wanted}, \
             database.pool_size and the upstream's max_connections: fewer connections are kept, and idle ones are closed \
             for new ones; raise the limit, or lower server.max_connections"
        );
    }
    wanted.min(fitting)
}

/// The files that the configuration may need to have open at once.
#[must_use]
pub fn needed(config: &Config) -> usize {
    config.server.max_connections.saturating_add(others(config))
}

fn others(config: &Config) -> usize {
    let upstream = config.upstream().map(upstream::Config::settings);
    let upstream = upstream.map_or(0, |settings: &dyn Settings| usize::from(settings.max_connections().get()));
    OTHERS + upstream + config.database.pool_size.saturating_mul(OF_DATABASE_CONNECTION)
}

/// The connections that fit below the limit beside the other files; a quarter of it at least.
fn fitting(limit: usize, others: usize) -> usize {
    limit.saturating_sub(others).max(limit / 4).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_room_for_the_other_files_and_have_some_anyway() {
        assert_eq!(fitting(1024, 110), 914);
        assert_eq!(fitting(100, 110), 25);
        assert_eq!(fitting(2, 110), 1);
    }
}
