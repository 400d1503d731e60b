//! Whether a lookup takes longer where there are more secrets.

use std::cell::OnceCell;

use crate::{
    Pace,
    client::ask_all,
    fill::{Shape, fill},
    hits::Load,
    lower::FORGETFUL,
    stage::{Engine, Place},
    table::{Line, Table, Target},
    wrk::{Requests, Script},
};

const SIZES: [(&str, Shape<'static>); 3] = [
    ("1 thousand", Shape { prefix: "t", tenants: 10, keys: 100, value: 100 }),
    ("100 thousand", Shape { prefix: "t", tenants: 1000, keys: 100, value: 100 }),
    ("1 million", Shape { prefix: "t", tenants: 100_000, keys: 10, value: 100 }),
];

/// The databases of a million secrets, which take a while to fill.
#[derive(Default)]
pub(crate) struct Stock {
    sqlite: OnceCell<Place>,
    postgres: OnceCell<Place>,
}

impl Stock {
    pub(crate) fn million(&self, engine: Engine) -> &Place {
        let place = match engine {
            Engine::Sqlite => &self.sqlite,
            Engine::Postgres => &self.postgres,
        };
        place.get_or_init(|| {
            let place = Place::new(engine);
            fill(&place, SIZES[2].1);
            place
        })
    }
}

pub(crate) fn growth(pace: &Pace, stock: &Stock, table: &mut Table) {
    for engine in Engine::BOTH {
        let small: Vec<Place> = SIZES[..2]
            .iter()
            .map(|(_, shape)| {
                let place = Place::new(engine);
                fill(&place, *shape);
                place
            })
            .collect();
        let places = [&small[0], &small[1], stock.million(engine)];
        if engine == Engine::Sqlite {
            // A thousand keys each: what the processor's caches hold is no matter of how many there are.
            tier("memory", engine, places, 1000, pace, table);
        }
        tier("database", engine, places, 20_000, pace, table);
    }
}

fn tier(name: &str, engine: Engine, places: [&Place; 3], keys: usize, pace: &Pace, table: &mut Table) {
    let sides = [0, 1, 2].map(|size| {
        let (place, shape) = (places[size], SIZES[size].1);
        let paths = shape.spread(keys);
        let server = if name == "memory" { place.serve_from_memory(shape) } else { place.serve(FORGETFUL) };
        ask_all(&server.url, &place.token, &paths, 16);
        let script = Script::write(place.path(), name, &place.token, &Requests::AtRandom(&paths));
        (server, script, place)
    });
    let answered = || sides.each_ref().map(|(server, _, place)| place.answered(server));
    let before = answered();
    let mut loads = [Load::default(), Load::default(), Load::default()];
    for _ in 0..pace.rounds {
        for ((server, script, _), load) in sides.iter().zip(&mut loads) {
            load.round(server, script, 16, pace.seconds);
        }
    }
    let after = answered();
    for (size, ((what, shape), load)) in SIZES.iter().zip(&loads).enumerate() {
        let all: [f64; 3] = [0, 1, 2].map(|tier| after[size][tier] - before[size][tier]);
        let share = all[if name == "memory" { 0 } else { 1 }] / all.iter().sum::<f64>();
        assert!(share > 0.9, "only {share} of the answers came from this tier");
        let what = format!(
            "{}, {name} hit among {what} secrets, {} of them asked for",
            engine.name(),
            shape.count().min(keys)
        );
        let smallest = loads[0].per_second.clone();
        let line = Line::new("growth", format!("{what}: throughput"), "requests/s", load.per_second.clone());
        table.add(line.against("among 1 thousand", smallest).target(Target::AtLeast(1.0 / 1.2)));
        let line = Line::new("growth", format!("{what}: CPU a request"), "µs", load.cpu.clone());
        table.add(line.against("among 1 thousand", loads[0].cpu.clone()));
    }
}
