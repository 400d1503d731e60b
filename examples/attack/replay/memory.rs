//! How much memory a process has, and had at most.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

const BETWEEN: Duration = Duration::from_millis(5);

/// Which memory counts, by its name in `/proc/PID/status`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// All that is resident.
    Resident,
    /// Of that, what is not the program's file: of a debug build, that grows by what is run for the first time.
    Own,
}

impl Kind {
    /// In bytes; nothing of a process that has ended.
    pub(crate) fn of(self, process: u32) -> u64 {
        let name = match self {
            Self::Resident => "VmRSS:",
            Self::Own => "RssAnon:",
        };
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    }
}

/// Looks again and again until it is told to end.
pub(crate) struct Watch {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Watch {
    pub(crate) fn begin(kind: Kind, process: u32) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&is_over);
        let thread = thread::spawn(move || {
            let mut most = 0;
            while !until.load(Ordering::Relaxed) {
                most = most.max(kind.of(process));
                thread::sleep(BETWEEN);
            }
            most
        });
        Self { is_over, thread }
    }

    /// The most that was seen.
    pub(crate) fn end(self) -> u64 {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
