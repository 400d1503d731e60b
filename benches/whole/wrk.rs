//! Load by `wrk`: one thread of it, over as many connections as are told.

use std::{
    fmt::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What is asked for.
pub(crate) enum Requests<'a> {
    /// One path, again and again.
    Of(&'a str),
    /// These, one after the other, and again from the beginning.
    InTurn(&'a [String]),
    /// Any of these.
    AtRandom(&'a [String]),
    /// This, posted to a path.
    Post(&'a str, &'a str),
}

/// A script of `wrk`'s. It holds the token, which must stand in no argument: its owner alone
/// can read it.
pub(crate) struct Script(PathBuf);

/// What `wrk` saw.
pub(crate) struct Seen {
    pub(crate) requests: f64,
    pub(crate) per_second: f64,
    /// In microseconds.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Script {
    pub(crate) fn write(folder: &Path, name: &str, token: &str, requests: &Requests<'_>) -> Self {
        let mut text = String::new();
        if !token.is_empty() {
            writeln!(text, "wrk.headers[\"Authorization\"] = \"Bearer {token}\"").unwrap();
        }
        match requests {
            Requests::Of(path) => writeln!(text, "wrk.path = \"{path}\"").unwrap(),
            Requests::Post(path, body) => {
                writeln!(text, "wrk.method = \"POST\"\nwrk.path = \"{path}\"\nwrk.body = '{body}'").unwrap();
                writeln!(text, "wrk.headers[\"Content-Type\"] = \"application/json\"").unwrap();
            }
            Requests::InTurn(paths) | Requests::AtRandom(paths) => {
                let list = private(folder, &format!("{name}.paths"), &paths.join("\n"));
                let next = match requests {
                    Requests::AtRandom(_) => "math.random(#made)",
                    _ => "at % #made + 1",
                };
                // Made before the clock runs, so that choosing is all that is left to do.
                writeln!(
                    text,
                    r#"local made, at = {{}}, 0
function init(args)
  for path in io.lines("{}") do made[#made + 1] = wrk.format("GET", path) end
end
function request()
  at = {next}
  return made[at]
end"#,
                    list.display()
                )
                .unwrap();
            }
        }
        text.push_str(
            r#"
function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format("\nseen %d %d %d %.1f %.1f\n", summary.requests, summary.duration, failed,
    latency:percentile(50), latency:percentile(99)))
end
"#,
        );
        Self(private(folder, &format!("{name}.lua"), &text))
    }

    /// Runs it; every answer must be good.
    pub(crate) fn run(&self, url: &str, connections: usize, seconds: u64) -> Seen {
        let mut wrk = Command::new("wrk");
        wrk.args(["--threads", "1", "--timeout", "30s", "--latency", "--connections", &connections.to_string()]);
        wrk.args(["--duration", &format!("{seconds}s"), "--script"]).arg(&self.0).arg(url);
        let output = wrk.stdin(Stdio::null()).output().expect("wrk is installed: scripts/bench does that");
        let text = String::from_utf8(output.stdout).unwrap();
        let seen = text.lines().find_map(|line| line.strip_prefix("seen "));
        let seen = seen.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)));
        let numbers: Vec<f64> = seen.split(' ').map(|number| number.parse().unwrap()).collect();
        let [requests, micros, failed, p50, p99] = numbers[..] else { panic!("{text}") };
        assert!(failed == 0.0 && requests > 0.0, "{failed} of {requests} requests failed: {text}");
        Seen { requests, per_second: requests / (micros / 1e6), p50, p99 }
    }
}

/// Writes a file that its owner alone can read, from the beginning on.
pub(crate) fn private(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&path).unwrap();
    file.set_permissions(std::fs::Permissions::from_mode(0o600)).unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    path
}
