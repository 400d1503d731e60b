//! promtool, which checks pages of metrics, rules and their tests. No server of Prometheus is needed.

use std::{
    env,
    io::{ErrorKind, Write as _},
    path::PathBuf,
    process::{Command, Stdio},
    thread,
};

/// Its path; nothing, and a word, where it is not installed.
pub(crate) fn promtool() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join("promtool")).find(|path| path.exists());
    if found.is_none() {
        #[expect(clippy::print_stderr, reason = "what is left out is said")]
        {
            eprintln!("SKIPPED: promtool is not there, and nothing asks it; install Debian's 'prometheus'");
        }
    }
    found
}

/// What it says about this input, and whether it is content. It ends by itself when it has read it.
pub(crate) fn says(promtool: &PathBuf, arguments: &[&str], input: &str) -> (bool, String) {
    let mut child = Command::new(promtool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut pipe, input) = (child.stdin.take().unwrap(), input.to_owned());
    // It may say much before it has read all.
    let feeding = thread::spawn(move || match pipe.write_all(input.as_bytes()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
        written => written.unwrap(),
    });
    let output = child.wait_with_output().unwrap();
    feeding.join().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}
