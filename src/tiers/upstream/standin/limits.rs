//! The rate limit: a fixed window for each route and client address.

use std::{collections::HashMap, time::Duration};

use super::exchange::Allowance;

/// Requests that one client address may make in a window of 60 seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// To each route that lists or reads secrets.
    pub secrets: u32,
    /// To each route that lists folders, or describes the project.
    pub folders: u32,
    /// To each route that writes.
    pub writes: u32,
    /// To each route of logins and tokens.
    pub logins: u32,
}

impl Limits {
    /// The limits of the recorded server.
    #[must_use]
    pub fn recorded() -> Self {
        Self { secrets: 40, folders: 60, writes: 40, logins: 200 }
    }
}

/// The open windows.
#[derive(Default)]
pub(super) struct Limiter {
    windows: HashMap<(&'static str, String), Window>,
}

struct Window {
    /// By the running clock.
    opened: Duration,
    used: u32,
}

impl Limiter {
    /// Counts a request; `Err` if it is one too many.
    pub(super) fn count(
        &mut self,
        route: &'static str,
        client: &str,
        limit: u32,
        now: Duration,
    ) -> Result<Allowance, Allowance> {
        // A client can give any address in x-forwarded-for.
        if self.windows.len() >= MOST_WINDOWS {
            self.windows.retain(|_, window| now.saturating_sub(window.opened) < WINDOW);
            if self.windows.len() >= MOST_WINDOWS {
                self.windows.clear();
            }
        }
        let window = self.windows.entry((route, client.to_owned())).or_insert(Window { opened: now, used: 0 });
        if now.saturating_sub(window.opened) >= WINDOW {
            *window = Window { opened: now, used: 0 };
        }
        let left = WINDOW.saturating_sub(now.saturating_sub(window.opened));
        let reset = u64::try_from(left.as_millis().div_ceil(1000)).unwrap_or(0);
        if window.used >= limit {
            return Err(Allowance { limit, remaining: 0, reset });
        }
        window.used += 1;
        Ok(Allowance { limit, remaining: limit - window.used, reset })
    }
}

const WINDOW: Duration = Duration::from_secs(60);
const MOST_WINDOWS: usize = 4096;
