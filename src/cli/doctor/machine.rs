//! The limits of this machine, beside what the configuration may need. They are those of this
//! command: a service manager may set others for the service.

use std::{path::Path, time::Duration};

use rustix::process::{Resource, getrlimit};

use crate::{
    app::needed_open_files,
    config::{Config, most_memory},
    diagnosis::Area,
};

/// The memory that the keys of 10,000 tenants take at most, page by page.
const LOCKED: u64 = 32 << 20;

/// How long the system may take to say whether its clock is synchronised.
const CLOCK_PATIENCE: Duration = Duration::from_secs(3);

pub(super) async fn examine(config: &Config, area: &Area) {
    area.begins("open files");
    open_files(config, area);
    area.begins("locked memory");
    locked_memory(area);
    area.begins("memory");
    memory(config, area);
    area.begins("clock");
    clock(area).await;
}

fn open_files(config: &Config, area: &Area) {
    let needed = needed_open_files(config) as u64;
    // The soft limit is raised to this one at the start.
    match getrlimit(Resource::Nofile).maximum {
        Some(limit) if limit < needed => area.warning(
            "open files",
            format!("{limit} files may be open, and the connections of this configuration may need {needed}"),
            "raise the limit (ulimit -n, LimitNOFILE= of systemd), or lower server.max_connections",
        ),
        limit => {
            let limit = limit.map_or_else(|| "any number of".to_owned(), |limit| limit.to_string());
            area.ok("open files", format!("{limit} files may be open; {needed} may be needed"));
        }
    }
}

fn locked_memory(area: &Area) {
    match getrlimit(Resource::Memlock).current {
        Some(limit) if limit < LOCKED => area.warning(
            "locked memory",
            format!("{} may be locked, and the keys of many tenants take up to {}", bytes(limit), bytes(LOCKED)),
            "raise the limit (ulimit -l, LimitMEMLOCK= of systemd), or encrypt the swap: keys that are not locked may get there",
        ),
        limit => {
            let limit = limit.map_or_else(|| "any memory".to_owned(), bytes);
            area.ok("locked memory", format!("{limit} may be locked"));
        }
    }
}

fn memory(config: &Config, area: &Area) {
    let most = most_memory(&config.server, &config.memory, &config.audit);
    let (limit, of) = match cgroup_limit() {
        Some(limit) => (Some(limit), "the limit of this control group"),
        None => (total(), "the memory of this machine"),
    };
    match limit {
        Some(limit) if limit < most => area.warning(
            "memory",
            format!("an instance may come to {}, and {of} is {}", bytes(most), bytes(limit)),
            "raise the limit, or lower the budgets: the formula is in docs/SECURITY.md, \"How much memory that is\"",
        ),
        Some(limit) => area.ok("memory", format!("an instance may come to {}; {of} is {}", bytes(most), bytes(limit))),
        None => {
            area.ok("memory", format!("an instance may come to {}; what there is cannot be told here", bytes(most)))
        }
    }
}

/// The smallest limit of the control groups that this process is in.
fn cgroup_limit() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let root = Path::new("/sys/fs/cgroup");
    let limits = groups.lines().flat_map(|line| {
        let path = line.strip_prefix("0::").map(|path| (path, "memory.max", root.to_owned()));
        let before = || {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            controllers
                .split(',')
                .any(|one| one == "memory")
                .then(|| (path, "memory.limit_in_bytes", root.join("memory")))
        };
        let Some((path, file, root)) = path.or_else(before) else { return Vec::new() };
        let own = root.join(path.trim_start_matches('/'));
        let up = own.ancestors().take_while(|folder| folder.starts_with(&root));
        // Within a container the group's path is the host's, and its files are at the root.
        up.filter_map(|folder| std::fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok()).collect()
    });
    // Version 1 writes a number beyond all memory for no limit.
    limits.min().filter(|limit| *limit < 1 << 60)
}

fn total() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// Whether the machine's clock is synchronised, by whom systemd knows of.
async fn clock(area: &Area) {
    let asked = tokio::process::Command::new("timedatectl")
        .args(["show", "--property=NTPSynchronized", "--value"])
        .kill_on_drop(true)
        .stdin(std::process::Stdio::null())
        .output();
    let answer = match tokio::time::timeout(CLOCK_PATIENCE, asked).await {
        Ok(Ok(output)) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => String::new(),
    };
    match answer.as_str() {
        "yes" => area.ok("clock", "the system synchronises its clock"),
        "no" => area.warning(
            "clock",
            "the system's clock is not synchronised",
            "turn on systemd-timesyncd or chrony: ages, tokens and webhooks go by the clock",
        ),
        _ => area.ok(
            "clock",
            "whether the clock is synchronised cannot be told here; it is compared with the servers' below",
        ),
    }
}

fn bytes(number: u64) -> String {
    bytesize::ByteSize(number).to_string()
}
