//! The system's figures of this process, under the names that all of Prometheus' clients use.

use std::fs;

use rustix::{
    process::{Resource, getrlimit},
    time::{ClockId, clock_gettime},
};

use super::Metrics;

/// Sets the gauges. What the system does not tell is left out: without Linux's `/proc`, memory and
/// open files.
pub(super) fn show(metrics: &Metrics) {
    let used = clock_gettime(ClockId::ProcessCPUTime).tv_sec;
    metrics.counter("process_cpu_seconds_total", &[]).absolute(u64::try_from(used).unwrap_or(0));
    if let Some(most) = getrlimit(Resource::Nofile).current {
        metrics.gauge("process_max_fds", &[], most as f64);
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // One of them is the folder that is being read.
        metrics.gauge("process_open_fds", &[], open.count().saturating_sub(1) as f64);
    }
    if let Some(bytes) = resident() {
        metrics.gauge("process_resident_memory_bytes", &[], bytes as f64);
    }
}

fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(kib.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_system_tells_memory_and_files() {
        let metrics = Metrics::new();
        let page = || {
            show(&metrics);
            metrics.render()
        };
        let value = |page: &str, name: &str| -> f64 {
            page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap().parse().unwrap()
        };
        let before = page();
        assert!(value(&before, "process_resident_memory_bytes") > 100_000.0);
        assert!(value(&before, "process_max_fds") >= value(&before, "process_open_fds"));
        assert!(value(&before, "process_start_time_seconds") > 1.7e9);
        // Other tests of this process open and close files meanwhile, but not this many.
        let files: Vec<_> = (0..200).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        assert!(value(&page(), "process_open_fds") >= value(&before, "process_open_fds") + 100.0);
        drop(files);
    }
}
