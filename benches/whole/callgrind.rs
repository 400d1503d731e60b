//! What a request costs in instructions and allocations, which is the same on a busy machine
//! as on an idle one: the process runs in valgrind, which counts.

use std::{fs, path::Path, sync::mpsc};

use crate::{client::Client, stage::Server};

/// Of one request.
#[derive(Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) instructions: f64,
    pub(crate) allocations: f64,
}

/// For both sides: with one worker, nobody is woken whose turn does not come; and little is
/// done by the clock, nor at a random time after the start.
pub(crate) const SETTINGS: &[(&str, &str)] = &[
    ("TOKIO_WORKER_THREADS", "1"),
    ("SECRETIER_DATABASE__POLL_INTERVAL", "1m"),
    ("SECRETIER_MEMORY__WARM_TENANTS", "0"),
];

/// Requests before the count begins, for what is done once.
const WARM: usize = 200;

/// Requests that are counted.
const COUNTED: usize = 10_000;

/// Functions that hand out memory: the C library's, and jemalloc's under its own names. One that
/// calls another would count twice; in neither does one.
const ALLOCATING: [&str; 11] = [
    "malloc",
    "calloc",
    "realloc",
    "posix_memalign",
    "aligned_alloc",
    "memalign",
    "_rjem_malloc",
    "_rjem_calloc",
    "_rjem_mallocx",
    "_rjem_realloc",
    "_rjem_rallocx",
];

/// Counts twice, from the start to the end of a process that has answered some requests and of
/// one that has answered so many more; the difference is theirs alone. Both live equally long,
/// so that what is done by the clock is no part of it. `start` runs the server by the command
/// that it is given, `path` is asked for with the token.
pub(crate) fn per_request(
    folder: &Path,
    name: &str,
    start: impl Fn(&[&str]) -> Server + Sync,
    token: &str,
    path: &str,
) -> Cost {
    let count = |name: &str, requests: usize, asked: Box<dyn FnOnce()>| {
        let [out, log] =
            ["out", "log"].map(|kind| folder.join(format!("callgrind-{name}.{kind}")).display().to_string());
        let (out_file, log_file) = (format!("--callgrind-out-file={out}"), format!("--log-file={log}"));
        let counting = ["--tool=callgrind", "--separate-threads=yes", "--compress-strings=no"];
        let valgrind = [&["valgrind"], &counting[..], &[&log_file, &out_file]].concat();
        let server = start(&valgrind);
        let mut client = Client::connect(&server.url, token);
        for _ in 0..requests {
            client.get(path).ok();
        }
        asked();
        drop(client);
        server.end();
        Total::read(folder, &format!("callgrind-{name}.out-"))
    };
    let (few, many) = std::thread::scope(|scope| {
        // Dropped where the other thread ends, however that is.
        let (asking, asked) = mpsc::channel::<()>();
        let done = Box::new(move || drop(asking));
        let many = scope.spawn(move || count(&format!("{name}-many"), WARM + COUNTED, done));
        let wait = Box::new(move || {
            let _ = asked.recv();
        });
        let few = count(&format!("{name}-few"), WARM, wait);
        (few, many.join().unwrap())
    });
    let of_one = |few: u64, many: u64| (many as f64 - few as f64) / COUNTED as f64;
    Cost {
        instructions: of_one(few.instructions, many.instructions),
        allocations: of_one(few.allocations, many.allocations),
    }
}

#[derive(Default)]
struct Total {
    instructions: u64,
    allocations: u64,
}

impl Total {
    /// Adds up the threads that serve connections, and removes what callgrind left of all.
    /// Others do what a request in memory has no part in: the start, the database, the clock.
    fn read(folder: &Path, prefix: &str) -> Self {
        // Whatever of it the compiler has put into something else, something is left.
        const SERVES: &str = "hyper::proto::h1::";
        let mut total = Self::default();
        for file in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if !file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)) {
                continue;
            }
            let text = fs::read_to_string(&file).unwrap();
            if text.contains(SERVES) {
                total.add(&text);
            }
            fs::remove_file(file).unwrap();
        }
        assert!(total.instructions > 0 && total.allocations > 0, "callgrind has seen no thread that serves");
        total
    }

    /// Reads callgrind's format: `cfn=` names the function that the next `calls=` are of.
    fn add(&mut self, text: &str) {
        let mut allocates = false;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("cfn=") {
                // A function that calls itself is told apart by how deep it is in.
                allocates = ALLOCATING.contains(&name.split('\'').next().unwrap_or_default());
            } else if let Some(calls) = line.strip_prefix("calls=") {
                let calls: u64 = calls.split(' ').next().and_then(|calls| calls.parse().ok()).unwrap();
                self.allocations += if allocates { calls } else { 0 };
            } else if let Some(sum) = line.strip_prefix("totals:") {
                self.instructions += sum.trim().parse::<u64>().unwrap();
            }
        }
    }
}
