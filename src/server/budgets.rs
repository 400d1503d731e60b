//! Limits what requests may hold at once, with one budget for each resource: places, bytes of
//! bodies that are being read, bytes of answers that are not taken. See the table in
//! `docs/SECURITY.md`.

use std::sync::Arc;

use super::respond::Problem;
use crate::{
    budget::{Gauge, Held, Holds, Most, Spent},
    metrics::Metrics,
};

/// A resource that a request holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Thing {
    /// A place among the requests with a valid token.
    Place,
    /// A place among the requests without a valid token, or whose token is not checked yet.
    StrangersPlace,
    /// Bytes of a body.
    Body,
    /// Bytes of an answer.
    Answer,
    /// A stream of events.
    Stream,
}

impl Thing {
    const ALL: [Self; 5] = [Self::Place, Self::StrangersPlace, Self::Body, Self::Answer, Self::Stream];

    /// The word in metrics.
    fn as_str(self) -> &'static str {
        match self {
            Self::Place => "in_flight",
            Self::StrangersPlace => "strangers",
            Self::Body => "bodies",
            Self::Answer => "answers",
            Self::Stream => "event_streams",
        }
    }

    fn of(self, holds: &Holds) -> &Arc<Gauge> {
        match self {
            Self::Place | Self::StrangersPlace => &holds.places,
            Self::Body => &holds.bodies,
            Self::Answer => &holds.answers,
            Self::Stream => &holds.streams,
        }
    }
}

/// The limit of each resource.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) places: Most,
    pub(super) strangers: Most,
    pub(super) bodies: Most,
    pub(super) answers: Most,
    pub(super) streams: Most,
}

impl Bounds {
    fn of(&self, thing: Thing) -> Most {
        match thing {
            Thing::Place => self.places,
            Thing::StrangersPlace => self.strangers,
            Thing::Body => self.bodies,
            Thing::Answer => self.answers,
            Thing::Stream => self.streams,
        }
    }
}

/// The amounts that all requests together hold.
#[derive(Debug, Default)]
pub(super) struct Budgets {
    all: Holds,
    strangers: Arc<Gauge>,
}

impl Budgets {
    fn all(&self, thing: Thing) -> &Arc<Gauge> {
        if thing == Thing::StrangersPlace { &self.strangers } else { thing.of(&self.all) }
    }

    /// The number of bytes or places that are held.
    pub(super) fn held(&self, thing: Thing) -> u64 {
        self.all(thing).held()
    }

    /// Takes this amount for the caller whose holdings are `by`.
    pub(super) fn take(&self, thing: Thing, by: &Holds, amount: u64, bounds: &Bounds) -> Result<Held, Spent> {
        Held::take(self.all(thing), thing.of(by), amount, bounds.of(thing))
    }

    pub(super) fn show(&self, metrics: &Metrics) {
        for thing in Thing::ALL {
            let name = match thing {
                Thing::Place | Thing::StrangersPlace | Thing::Stream => "secretier_held_requests",
                Thing::Body | Thing::Answer => "secretier_held_bytes",
            };
            metrics.gauge(name, &[("budget", thing.as_str())], self.held(thing) as f64);
        }
    }
}

/// The bytes of one body that is being read, and their limits.
#[derive(Debug)]
pub(super) struct Room<'a> {
    held: Held,
    bounds: Bounds,
    metrics: &'a Metrics,
}

impl<'a> Room<'a> {
    pub(super) fn new(budgets: &Budgets, by: &Holds, bounds: Bounds, metrics: &'a Metrics) -> Result<Self, Problem> {
        let held = budgets.take(Thing::Body, by, 0, &bounds).map_err(|spent| refused(Thing::Body, spent, metrics))?;
        Ok(Self { held, bounds, metrics })
    }

    /// Reserves this many more bytes.
    pub(super) fn grow(&mut self, more: usize) -> Result<(), Problem> {
        let grown = self.held.grow(more as u64, self.bounds.bodies);
        grown.map_err(|spent| refused(Thing::Body, spent, self.metrics))
    }
}

/// The answer to a caller who finds a budget spent.
pub(super) fn refused(thing: Thing, spent: Spent, metrics: &Metrics) -> Problem {
    metrics.count("secretier_limited_total", &[("limit", thing.as_str())]);
    match (thing, spent) {
        (Thing::Place, Spent::InAll) => {
            Problem::busy("as many requests as server.max_in_flight allows are in progress; try again")
        }
        (Thing::Place, Spent::ByOne) => Problem::holds_too_much(
            "this token has as many requests in progress as server.max_in_flight_per_token allows; take the answers, \
             and ask for fewer at once",
        ),
        (Thing::StrangersPlace, _) => Problem::busy(
            "as many requests are in progress as server.max_strangers and max_strangers_per_peer allow to those \
             whose token is not known yet; try again",
        ),
        (Thing::Body, Spent::InAll) => {
            Problem::busy("as many bytes of requests' bodies are being read as server.max_bodies allows; try again")
        }
        (Thing::Body, Spent::ByOne) => Problem::holds_too_much(
            "as many bytes of bodies are on their way with this token as server.max_bodies_per_token allows; send \
             fewer at once",
        ),
        (Thing::Answer, Spent::InAll) => Problem::busy(
            "as many bytes of answers as server.max_answers allows are not taken yet, or the answer is larger; try again",
        ),
        (Thing::Answer, Spent::ByOne) => Problem::holds_too_much(
            "as many bytes of answers are not taken yet with this token as server.max_answers_per_token allows; take \
             them, and ask for fewer at once",
        ),
        (Thing::Stream, Spent::InAll) => {
            Problem::busy("as many streams of events are open as server.max_event_streams allows; try again")
        }
        (Thing::Stream, Spent::ByOne) => Problem::holds_too_much(
            "as many streams of events are open with this token as server.max_event_streams_per_token allows; one \
             stream tells of all tenants that the token reaches",
        ),
    }
}
