//! The stream of changes.

use reqwest::{Method, Response};
use secretier::{access::Action, phase::Phase};
use serde_json::{Value, json};

use crate::{
    app::{Answer, Backend, Instance, Setup, TestApp, eventually, on_both, secret},
    postgres::Postgres,
    within::within,
};

/// A stream that is open.
pub(crate) struct Stream {
    response: Response,
    text: String,
}

/// What a stream has told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Told {
    Changed {
        id: String,
        data: Value,
    },
    Reset {
        id: String,
    },
    /// An event of nothing but its place.
    Place {
        id: String,
    },
    Comment,
}

impl Told {
    fn id(&self) -> &str {
        match self {
            Self::Changed { id, .. } | Self::Reset { id } | Self::Place { id } => id,
            Self::Comment => panic!("a comment has no place"),
        }
    }

    fn data(&self) -> &Value {
        match self {
            Self::Changed { data, .. } => data,
            other => panic!("no change: {other:?}"),
        }
    }
}

impl Stream {
    pub(crate) async fn open_at(instance: &Instance, token: &str, query: &str, behind: Option<&str>) -> Self {
        let mut request = instance.request(Method::GET, &format!("/v1/events{query}")).bearer_auth(token);
        if let Some(behind) = behind {
            request = request.header("Last-Event-ID", behind);
        }
        let response = within("a stream that opens", request.send()).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        assert_eq!(response.headers()["cache-control"], "no-store");
        Self { response, text: String::new() }
    }

    /// A stream that has said that it is caught up, and where it is.
    async fn open(app: &TestApp) -> (Self, String) {
        let mut stream = Self::open_at(app.instance(), &app.token, "", None).await;
        let place = stream.next().await;
        assert!(matches!(place, Told::Place { .. }), "{place:?}");
        assert_eq!(stream.next().await, Told::Comment);
        (stream, place.id().to_owned())
    }

    /// The next thing that it tells; `None` where it ends.
    pub(crate) async fn next_or_end(&mut self) -> Option<Told> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let (event, rest) = (read(event), rest.to_owned());
                self.text = rest;
                return Some(event);
            }
            let piece = within("a piece of the stream", self.response.chunk()).await.ok().flatten()?;
            self.text.push_str(std::str::from_utf8(&piece).unwrap());
        }
    }

    async fn next(&mut self) -> Told {
        self.next_or_end().await.expect("the stream goes on")
    }

    /// The next thing that is no comment.
    async fn event(&mut self) -> Told {
        loop {
            match self.next().await {
                Told::Comment => {}
                told => return told,
            }
        }
    }

    /// What it tells up to the next comment.
    async fn until_comment(&mut self) -> Vec<Told> {
        let mut all = Vec::new();
        loop {
            match self.next().await {
                Told::Comment => return all,
                told => all.push(told),
            }
        }
    }
}

fn read(event: &str) -> Told {
    if event == ":" {
        return Told::Comment;
    }
    let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let id = field("id").unwrap().to_owned();
    match field("event") {
        None => Told::Place { id },
        Some("reset") => Told::Reset { id },
        Some("changed") => Told::Changed { id, data: serde_json::from_str(field("data").unwrap()).unwrap() },
        Some(other) => panic!("{other}"),
    }
}

/// The keys of these changes, in their order.
fn keys(told: &[Told]) -> Vec<&str> {
    told.iter()
        .filter(|told| !matches!(told, Told::Place { .. }))
        .map(|told| told.data()["key"].as_str().unwrap())
        .collect()
}

async fn serving(backend: Backend, phase: Phase) -> TestApp {
    let app = Setup::new(backend, phase).start().await;
    if phase == Phase::Database {
        app.put("acme", "A", "first value").await;
    }
    told(&app).await;
    app
}

/// Waits until every change up to now was told.
async fn told(app: &TestApp) {
    let last = app.instance().service.resolver.database().changes().await.unwrap();
    eventually(async || {
        let mut stream = Stream::open_at(app.instance(), &app.token, "", None).await;
        let place = stream.until_comment().await;
        place[0].id().split('.').nth(1).unwrap().parse::<i64>().unwrap() >= last
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_told_with_version_and_etag_and_without_the_value() {
    on_both(async |backend| {
        let app = serving(backend, Phase::Database).await;
        let (mut stream, _) = Stream::open(&app).await;
        app.put("acme", "A", "second value").await;
        let changed = stream.event().await;
        let now = app.get("acme", "A").await;
        let expected = json!({ "tenant": "acme", "key": "A", "version": now.version(), "etag": now.etag() });
        assert_eq!(changed.data(), &expected);
        assert!(!format!("{changed:?}").contains("value"));

        app.delete("acme", "A").await;
        let expected = json!({ "tenant": "acme", "key": "A", "version": null, "etag": null });
        assert_eq!(stream.event().await.data(), &expected);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_change_is_told_the_instance_that_tells_it_serves_the_new_value() {
    let app = serving(Backend::Postgres(Postgres::shared().database().await), Phase::Database).await;
    let beside = app.another().await;
    let mut streams = Vec::new();
    for instance in [app.instance(), &beside] {
        let mut stream = Stream::open_at(instance, &app.token, "", None).await;
        stream.until_comment().await;
        streams.push((instance, stream));
    }
    for round in 0..20 {
        let (writer, value) = (if round % 2 == 0 { app.instance() } else { &beside }, format!("v{round}"));
        let request = writer.request(Method::PUT, &secret("acme", "A")).bearer_auth(&app.token);
        let written = Answer::of(request.json(&json!({ "value": value }))).await;
        for (instance, stream) in &mut streams {
            assert_eq!(stream.event().await.data()["etag"], written.etag(), "round {round}");
            assert_eq!(app.get_from(instance, "acme", "A").await.value(), value, "round {round}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_tells_what_its_token_reads_and_what_was_asked_for_and_nothing_else() {
    let app = serving(Backend::sqlite(), Phase::Database).await;
    for tenant in ["acme", "globex", "initech"] {
        app.put(tenant, "A", "1").await;
    }
    let narrow = app.new_token("narrow", &["acme", "globex"], &[Action::Read]).await;
    told(&app).await;
    let mut by_token = Stream::open_at(app.instance(), &narrow, "", None).await;
    let mut by_query = Stream::open_at(app.instance(), &app.token, "?tenants=globex,initech", None).await;
    by_token.until_comment().await;
    by_query.until_comment().await;
    for tenant in ["acme", "globex", "initech"] {
        app.put(tenant, "A", "2").await;
        app.followed().await;
    }
    app.put("globex", "LAST", "3").await;
    let tenants = async |stream: &mut Stream| {
        let mut tenants = Vec::new();
        loop {
            let data = stream.event().await.data().clone();
            if data["key"] == "LAST" {
                return tenants;
            }
            tenants.push(data["tenant"].as_str().unwrap().to_owned());
        }
    };
    assert_eq!(tenants(&mut by_token).await, ["acme", "globex"]);
    assert_eq!(tenants(&mut by_query).await, ["globex", "initech"]);

    let asked = async |token: &str, query: &str| {
        let request = app.instance().request(Method::GET, &format!("/v1/events{query}")).bearer_auth(token);
        Answer::of(request).await.problem()
    };
    let writer = app.new_token("writer", &["*"], &[Action::Write]).await;
    assert_eq!(asked(&writer, "").await, (403, "out_of_scope".to_owned()));
    assert_eq!(asked(&narrow, "?tenants=acme,initech").await, (403, "out_of_scope".to_owned()));
    assert_eq!(asked(&narrow, "?tenants=acme,").await, (400, "invalid_tenant".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_behind_the_event_that_was_heard_last_also_elsewhere_and_after_a_restart() {
    on_both(async |backend| {
        let is_shared = matches!(backend, Backend::Postgres(_));
        let mut app = serving(backend, Phase::Database).await;
        let (mut stream, place) = Stream::open(&app).await;
        app.put("acme", "A", "2").await;
        let heard = stream.event().await.id().to_owned();
        drop(stream);
        for (key, value) in [("B", "1"), ("C", "1"), ("B", "2")] {
            app.put("acme", key, value).await;
        }
        told(&app).await;
        let resumed = async |instance: &Instance, behind: &str| {
            let mut stream = Stream::open_at(instance, &app.token, "", Some(behind)).await;
            stream.until_comment().await
        };
        // Each once, before the comment that says that there are no more.
        assert_eq!(keys(&resumed(app.instance(), &heard).await), ["C", "B"]);
        assert_eq!(keys(&resumed(app.instance(), &place).await), ["A", "C", "B"]);
        // Before the first change of all.
        assert_eq!(keys(&resumed(app.instance(), "0.0.0").await), ["A", "C", "B"]);
        if is_shared {
            let beside = app.another().await;
            assert_eq!(keys(&resumed(&beside, &heard).await), ["C", "B"]);
        }
        let here = resumed(app.instance(), &heard).await.last().unwrap().id().to_owned();
        assert_eq!(keys(&resumed(app.instance(), &here).await), [""; 0]);
        app.restart().await;
        app.put("acme", "D", "1").await;
        told(&app).await;
        let mut stream = Stream::open_at(app.instance(), &app.token, "", Some(&heard)).await;
        assert_eq!(keys(&stream.until_comment().await), ["C", "B", "D"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_comes_where_it_cannot_be_told_what_was_missed() {
    on_both(async |backend| {
        let app = serving(backend.clone(), Phase::Database).await;
        let (_, place) = Stream::open(&app).await;
        app.put("acme", "A", "2").await;
        told(&app).await;
        let first = async |behind: &str| {
            let mut stream = Stream::open_at(app.instance(), &app.token, "", Some(behind)).await;
            stream.event().await
        };
        let (mark, rest) = place.split_once('.').unwrap();
        let other = format!("{}.{rest}", mark.parse::<u64>().unwrap() ^ 1);
        for unknown in ["", "nonsense", "1.2", "-1.2.0", "1.99999.0", "9.1.0.0", &other] {
            assert!(matches!(first(unknown).await, Told::Reset { .. }), "{unknown}");
        }
        assert_eq!(first(&place).await.data()["key"], "A");
        // Trimmed.
        backend.sql("DELETE FROM changes").await;
        assert!(matches!(first(&place).await, Told::Reset { .. }));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_changes_hands_and_one_that_is_shredded_are_a_reset() {
    on_both(async |backend| {
        let app = serving(backend, Phase::Hybrid).await;
        app.holds("acme", &[("A", "1")]);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        app.stored(1).await;
        told(&app).await;
        let (mut stream, _) = Stream::open(&app).await;
        app.set_phase("acme", Some(Phase::Database)).await;
        assert!(matches!(stream.event().await, Told::Reset { .. }));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_phase_infisical_what_a_read_finds_changed_is_told_and_what_it_finds_the_same_is_not() {
    on_both(async |backend| {
        let app = serving(backend, Phase::Infisical).await;
        app.holds("acme", &[("A", "1"), ("B", "1")]);
        let (mut stream, place) = Stream::open(&app).await;
        assert_eq!(app.get("acme", "A").await.value(), "1");
        // Nothing is known of the time before.
        let first = stream.event().await;
        assert!(matches!(first, Told::Reset { .. }), "{first:?}");

        app.holds("acme", &[("A", "2")]);
        assert_eq!(app.get_fresh("acme", "A").await.value(), "2");
        let changed = stream.event().await;
        let now = app.get("acme", "A").await;
        let expected = json!({ "tenant": "acme", "key": "A", "version": now.version(), "etag": now.etag() });
        assert_eq!(changed.data(), &expected);
        // Its place is known to this instance alone.
        let mut resumed = Stream::open_at(app.instance(), &app.token, "", Some(changed.id())).await;
        assert!(matches!(resumed.event().await, Told::Reset { .. }));
        // Nothing has changed in the feed since this place, and yet something was told.
        let mut resumed = Stream::open_at(app.instance(), &app.token, "", Some(&place)).await;
        assert!(matches!(resumed.event().await, Told::Reset { .. }));

        app.world().delete(crate::app::ENV, "/tenants/acme", "B");
        assert_eq!(app.get_fresh("acme", "B").await.status, 404);
        let gone = json!({ "tenant": "acme", "key": "B", "version": null, "etag": null });
        assert_eq!(stream.event().await.data(), &gone);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_its_token_and_with_the_instance() {
    on_both(async |backend| {
        let mut app = serving(backend, Phase::Database).await;
        let leaked = app.new_token("leaked", &["*"], &[Action::Read]).await;
        let mut stream = Stream::open_at(app.instance(), &leaked, "", None).await;
        let (mut other, _) = Stream::open(&app).await;
        stream.until_comment().await;
        assert_eq!(app.instance().service.resolver.database().revoke_token("leaked").await.unwrap(), 1);
        while stream.next_or_end().await.is_some() {}
        app.put("acme", "A", "2").await;
        assert_eq!(other.event().await.data()["key"], "A", "others go on");
        app.stop().await;
        while other.next_or_end().await.is_some() {}
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_have_a_bound_of_their_own_and_take_no_place_from_requests() {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Database);
    setup.server = "max_in_flight_per_token = 1\nmax_event_streams = 3\nmax_event_streams_per_token = 2\n".to_owned();
    let app = setup.start().await;
    app.put("acme", "A", "1").await;
    let open = async |token: &str| Stream::open_at(app.instance(), token, "", None).await;
    let asked = async |token: &str| {
        let request = app.instance().request(Method::GET, "/v1/events").bearer_auth(token);
        Answer::of(request).await
    };
    let (first, _second) = (open(&app.token).await, open(&app.token).await);
    assert_eq!(app.get("acme", "A").await.value(), "1");
    let refused = asked(&app.token).await;
    assert_eq!(refused.status, 429);
    assert!(!refused.header("retry-after").is_empty());
    let other = app.new_token("other", &["*"], &[Action::Read]).await;
    let _third = open(&other).await;
    assert_eq!(asked(&other).await.status, 503);
    // A place is free again when its client is gone.
    drop(first);
    eventually(async || asked(&other).await.status == 200).await;
}
