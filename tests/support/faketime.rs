//! A wall clock that can be set, for programs that are started with it: by libfaketime. What std
//! reads is faked, and what goes on whatever is set is not.

use std::path::{Path, PathBuf};

// The variant for programs of many threads: in the other, they change the offset under each other's hands.
const LIBRARIES: [&str; 4] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketimeMT.so.1",
    "/usr/lib/faketime/libfaketimeMT.so.1",
];

/// A wall clock that can be set while programs run by it.
pub(crate) struct FakeClock {
    library: &'static str,
    file: PathBuf,
}

impl FakeClock {
    /// Keeps its time in this file, so much from the real one, as in `+3d`. Nothing, and a word,
    /// where the library is not installed.
    pub(crate) fn new(file: PathBuf, offset: &str) -> Option<Self> {
        let Some(library) = LIBRARIES.into_iter().find(|library| Path::new(library).exists()) else {
            #[expect(clippy::print_stderr, reason = "what is left out is said")]
            {
                eprintln!("SKIPPED: libfaketime is not there, and no wall clock is set; install Debian's 'faketime'");
            }
            return None;
        };
        let clock = Self { library, file };
        clock.set(offset);
        Some(clock)
    }

    /// Sets it to so much from the real one.
    pub(crate) fn set(&self, offset: &str) {
        // In one step: it is read at any time.
        let new = self.file.with_extension("new");
        std::fs::write(&new, offset).unwrap();
        std::fs::rename(new, &self.file).unwrap();
    }

    /// The variables that have a program go by it.
    pub(crate) fn variables(&self) -> [(&'static str, &str); 5] {
        [
            ("LD_PRELOAD", self.library),
            ("FAKETIME_TIMESTAMP_FILE", self.file.to_str().unwrap()),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            // Files keep their real times, by which SQLite and the sources of keys tell that they changed.
            ("NO_FAKE_STAT", "1"),
        ]
    }
}
