//! Faults that a test can set, and gates that force the order of events.

use std::{fmt, panic::Location, sync::Arc, time::Duration};

use tokio::sync::watch;

/// The kinds of requests that are counted, broken and held separately.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Route {
    /// Universal auth logins.
    Login,
    /// Lists of folders.
    Folders,
    /// Lists of secrets.
    List,
    /// Single secrets.
    Get,
    /// Changes of secrets, folders and imports.
    Write,
    /// Everything else.
    Other,
}

/// A way to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection closes without an answer. For a port that refuses
    /// connections, stop the server.
    Down,
    /// The request is accepted but never answered.
    Hang,
    /// The right answer, after a while.
    Slow(Duration),
    /// 429, independent of the limits.
    RateLimited {
        /// The value of `retry-after`, in whole seconds.
        retry_after: Duration,
    },
    /// This status, with an error body of the recorded form.
    Status(u16),
    /// 200 with a page of HTML.
    Garbage,
    /// The right answer's head, and half of its body; nothing at all of an answer without a body.
    CutOff,
    /// `PermissionDenied`, as for a folder that the identity may not read.
    Denied,
    /// 500 `jwt expired`; from a newer server 403 `TokenError`.
    TokenExpired,
    /// 403 as for a token that was revoked; from a newer server 401.
    TokenGone,
    /// As when the server's PostgreSQL is down.
    DatabaseDown,
    /// As when the server's Redis is down.
    CacheDown,
}

/// Requests counted by kind, including those that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Calls {
    /// [`Route::Login`].
    pub login: u64,
    /// [`Route::Folders`].
    pub folders: u64,
    /// [`Route::List`].
    pub list: u64,
    /// [`Route::Get`].
    pub get: u64,
    /// [`Route::Write`].
    pub write: u64,
    /// [`Route::Other`].
    pub other: u64,
}

impl Calls {
    /// Requests of every kind.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.login + self.folders + self.list + self.get + self.write + self.other
    }

    /// Requests of one kind.
    #[must_use]
    pub fn to(&self, route: Route) -> u64 {
        match route {
            Route::Login => self.login,
            Route::Folders => self.folders,
            Route::List => self.list,
            Route::Get => self.get,
            Route::Write => self.write,
            Route::Other => self.other,
        }
    }

    pub(super) fn count(&mut self, route: Route) {
        let counter = match route {
            Route::Login => &mut self.login,
            Route::Folders => &mut self.folders,
            Route::List => &mut self.list,
            Route::Get => &mut self.get,
            Route::Write => &mut self.write,
            Route::Other => &mut self.other,
        };
        *counter += 1;
    }

    pub(super) fn since(&self, mark: &Self) -> Self {
        Self {
            login: self.login - mark.login,
            folders: self.folders - mark.folders,
            list: self.list - mark.list,
            get: self.get - mark.get,
            write: self.write - mark.write,
            other: self.other - mark.other,
        }
    }
}

/// Far longer than any request of a test takes to arrive.
const HANGS: Duration = Duration::from_secs(120);

/// Waits until a count of the stand-in is high enough, or panics and reports the count.
#[track_caller]
pub(super) fn reached<T: fmt::Debug>(
    mut count: watch::Receiver<T>,
    wanted: String,
    is_enough: impl Fn(&T) -> bool,
) -> impl Future<Output = ()> {
    let at = Location::caller();
    async move {
        // The sender lives as long as the borrow of its owner, so only a timeout is possible.
        let reached = tokio::time::timeout(HANGS, count.wait_for(|count| is_enough(count))).await.is_ok();
        assert!(reached, "{at}: waited {HANGS:?} for {wanted}; so far: {:?}", *count.borrow());
    }
}

/// Holds requests until it is opened or dropped.
#[derive(Debug)]
pub struct Gate {
    arrived: Arc<watch::Sender<usize>>,
    open: watch::Sender<bool>,
}

impl Gate {
    /// Waits until this many requests have come to the gate since it was set up.
    ///
    /// # Panics
    /// If they do not come within two minutes: a test that waits without an end reports nothing.
    #[track_caller]
    pub fn arrived(&self, requests: usize) -> impl Future<Output = ()> {
        let wanted = format!("{requests} requests at this gate");
        reached(self.arrived.subscribe(), wanted, move |arrived| *arrived >= requests)
    }

    /// The number of requests that have come to the gate.
    #[must_use]
    pub fn arrivals(&self) -> usize {
        *self.arrived.borrow()
    }

    /// Lets all held requests continue, and later ones pass.
    pub fn open(self) {
        self.open.send_replace(true);
    }
}

/// The point at which a request is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// Before it is read.
    Arrival,
    /// After its answer is made, before it is sent.
    Answer,
}

/// The faults and gates that are set.
#[derive(Default)]
pub(super) struct Trouble {
    faults: Vec<SetFault>,
    gates: Vec<SetGate>,
}

struct SetFault {
    route: Option<Route>,
    /// Only lists of this folder.
    folder: Option<String>,
    fault: Fault,
    /// The number of requests that it still affects; `None` until it is cleared.
    left: Option<usize>,
}

struct SetGate {
    route: Option<Route>,
    /// Only lists of this folder.
    folder: Option<String>,
    hold: Hold,
    /// The number of requests that it still holds; `None` for all.
    left: Option<usize>,
    passage: Passage,
}

#[derive(Clone)]
pub(super) struct Passage {
    arrived: Arc<watch::Sender<usize>>,
    open: watch::Receiver<bool>,
}

impl Passage {
    pub(super) async fn wait(mut self) {
        self.arrived.send_modify(|arrived| *arrived += 1);
        // A dropped gate counts as open.
        let _ = self.open.wait_for(|open| *open).await;
    }
}

impl Trouble {
    pub(super) fn set(&mut self, route: Option<Route>, fault: Fault, left: Option<usize>) {
        self.faults.push(SetFault { route, folder: None, fault, left });
    }

    pub(super) fn set_at(&mut self, folder: &str, fault: Fault) {
        self.faults.push(SetFault { route: Some(Route::List), folder: Some(folder.to_owned()), fault, left: None });
    }

    pub(super) fn clear(&mut self) {
        self.faults.clear();
    }

    /// The fault for this request, which may be a list of one folder: the fault that was set last.
    pub(super) fn strike(&mut self, route: Route, folder: Option<&str>) -> Option<Fault> {
        self.faults.retain(|set| set.left != Some(0));
        let strikes = |set: &&mut SetFault| {
            set.route.is_none_or(|of| of == route) && set.folder.as_deref().is_none_or(|of| Some(of) == folder)
        };
        let set = self.faults.iter_mut().rev().find(strikes)?;
        if let Some(left) = &mut set.left {
            *left -= 1;
        }
        Some(set.fault)
    }

    pub(super) fn gate(&mut self, route: Option<Route>, hold: Hold, left: Option<usize>) -> Gate {
        self.set_gate(route, None, hold, left)
    }

    pub(super) fn gate_at(&mut self, folder: &str, hold: Hold) -> Gate {
        self.set_gate(Some(Route::List), Some(folder.to_owned()), hold, None)
    }

    fn set_gate(&mut self, route: Option<Route>, folder: Option<String>, hold: Hold, left: Option<usize>) -> Gate {
        let arrived = Arc::new(watch::Sender::new(0));
        let open = watch::Sender::new(false);
        let passage = Passage { arrived: Arc::clone(&arrived), open: open.subscribe() };
        self.gates.push(SetGate { route, folder, hold, left, passage });
        Gate { arrived, open }
    }

    pub(super) fn passages(&mut self, route: Route, folder: Option<&str>, hold: Hold) -> Vec<Passage> {
        self.gates.retain(|gate| gate.left != Some(0) && gate.passage.open.has_changed().is_ok());
        let mut passages = Vec::new();
        for gate in &mut self.gates {
            let is_meant =
                gate.route.is_none_or(|of| of == route) && gate.folder.as_deref().is_none_or(|of| Some(of) == folder);
            if gate.hold == hold && is_meant {
                gate.left = gate.left.map(|left| left - 1);
                passages.push(gate.passage.clone());
            }
        }
        passages
    }
}
