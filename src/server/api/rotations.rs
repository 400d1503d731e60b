//! Rotations: the values of a secret that are valid, and how its rotation goes on.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use utoipa::{OpenApi, ToSchema};

use crate::{
    access::Action,
    answer::wiped_json,
    clock::Timestamp,
    resolver::{ResolveError, Tier, ValidValue},
    rotation::{Due, LONGEST_GRACE, RotateError, Rotation, RotationFilter, SecretRotationState, Wanted},
    secret::{SecretName, SecretValue},
    server::{
        ask::{Ask, decode, decoded, json},
        operation::{Operation, Run},
        respond::{Answer, JSON, Problem, ProblemBody, respond},
    },
    units,
};

#[derive(OpenApi)]
#[openapi(paths(valid, rotate, one, list, promote, retry, abort, retire, roll_back))]
pub(super) struct Document;

pub(in crate::server) const VALID: Operation =
    Operation { action: "valid", parameters: &[], run: Run::Read(|ask, _| Box::pin(valid(ask))) };
pub(in crate::server) const ROTATE: Operation =
    Operation { action: "rotate", parameters: &[], run: Run::Write(|ask, body| Box::pin(rotate(ask, body))) };
pub(in crate::server) const ONE: Operation =
    Operation { action: "rotation", parameters: &[], run: Run::Read(|ask, _| Box::pin(one(ask))) };
pub(in crate::server) const LIST: Operation = Operation {
    action: "rotations",
    parameters: &["state", "due_before", "after"],
    run: Run::Read(|ask, _| Box::pin(list(ask))),
};
pub(in crate::server) const PROMOTE: Operation =
    Operation { action: "promote", parameters: &[], run: Run::Write(|ask, _| Box::pin(promote(ask))) };
pub(in crate::server) const RETRY: Operation =
    Operation { action: "retry_rotation", parameters: &[], run: Run::Write(|ask, _| Box::pin(retry(ask))) };
pub(in crate::server) const ABORT: Operation =
    Operation { action: "abort_rotation", parameters: &[], run: Run::Write(|ask, _| Box::pin(abort(ask))) };
pub(in crate::server) const RETIRE: Operation =
    Operation { action: "retire", parameters: &[], run: Run::Write(|ask, _| Box::pin(retire(ask))) };
pub(in crate::server) const ROLL_BACK: Operation =
    Operation { action: "roll_back_rotation", parameters: &[], run: Run::Write(|ask, _| Box::pin(roll_back(ask))) };

/// The most secrets that are listed as due.
const MOST_DUE: usize = 10_000;

/// The longest reason for a rotation, in bytes.
const LONGEST_REASON: usize = 500;

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/secrets/{key}/valid", operation_id = "get_valid_values",
    description = "Every value of a secret that is valid, the current one first: what a verifier of tokens or webhooks \
        needs. Beside the current value there is the previous one until its end, and one that is about to take over.",
    params(("Cache-Control" = Option<String>, Header, description = "`no-cache` goes past memory and revalidates the copy")),
    responses(
        (status = 200, body = ValidBody, description = "The values"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`"),
        (status = 404, body = ProblemBody, description = "`secret_not_found`, also for an unknown tenant"),
        (status = 503, body = ProblemBody, description = "`upstream_denied`, `secret_unavailable`; never some of the values alone")
    )
)]
async fn valid(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let (tenant, key) = decoded(ask.names)?;
    let name = SecretName::parse(&tenant, &key)?;
    ask.grant.allow(Action::Read, name.tenant(), name.key())?;
    let valid = ask.service.resolver.valid(name, ask.want()).await?;
    ask.saw_as("valid", name, &valid.current, ask.service.resolver.clock().moment());
    if valid.values.is_empty() {
        return Err(Problem::not_found().recorded());
    }
    let values = valid.values.iter().map(ValidEntry::from).collect();
    Ok(respond(StatusCode::OK, JSON, wiped_json(&ValidBody { tenant: name.tenant(), key: name.key(), values })))
}

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/secrets/{key}/rotate", operation_id = "rotate_secret",
    description = "Begins a rotation: a new value takes over, and the old one stays valid for a while.",
    request_body(content = Rotate, description = "At most six times `server.max_value` (1 MiB) and 1 KiB; `{}` for what the rule says"),
    responses(
        (status = 202, body = RotationBody, description = "It has begun; `GET .../rotation` tells how it goes on"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`, `invalid_body`"),
        (status = 404, body = ProblemBody, description = "`secret_not_found`, also for an unknown tenant"),
        (status = 409, body = ProblemBody, description = "`rotation_in_progress`, `rotation_rule_missing`, `same_value`"),
        (status = 413, body = ProblemBody, description = "The value is too large"),
        (status = 503, body = ProblemBody, description = "`upstream_denied`, `secret_unavailable`")
    )
)]
async fn rotate(ask: &Ask<'_>, body: Incoming) -> Result<Answer, Problem> {
    let (tenant, key) = ask.secret_for(Action::Rotate)?;
    let max_value = ask.service.limits().max_value;
    let wanted: Rotate = ask.read(body, max_value.saturating_mul(6).saturating_add(1024)).await?;
    if wanted.value.as_ref().is_some_and(|value| value.len() as u64 > max_value) {
        return Err(Problem::too_large());
    }
    if wanted.grace.is_some_and(|grace| grace > LONGEST_GRACE) {
        return Err(Problem::invalid_body("grace: at most a year"));
    }
    if wanted.reason.as_ref().is_some_and(|reason| reason.len() > LONGEST_REASON || reason.contains(char::is_control)) {
        return Err(Problem::invalid_body("reason: at most 500 bytes without control characters"));
    }
    let Rotate { value, grace, reason } = wanted;
    let wanted = Wanted { value, grace, reason };
    let rotating = ask.service.rotations.rotate(&tenant, &key, wanted, &ask.grant.name);
    let begun = ask.recorded("rotate", &tenant, &key, rotating, |_| Tier::Database).await?;
    Ok(respond(StatusCode::ACCEPTED, JSON, json(&RotationBody::from(&begun))))
}

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/secrets/{key}/rotation", operation_id = "get_rotation",
    description = "The rotation of a secret that runs, else the last one.",
    responses(
        (status = 200, body = RotationBody, description = "The rotation"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`"),
        (status = 404, body = ProblemBody, description = "`rotation_not_found`: it was never rotated, or longer ago than versions are kept")
    )
)]
async fn one(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let (tenant, key) = ask.secret_for(Action::Read)?;
    let last = ask.service.rotations.last(&tenant, &key).await?;
    ask.count("rotation", tenant.as_str(), key.as_str(), None);
    let rotation = last.ok_or_else(Problem::no_rotation)?;
    let due_at = ask.service.rotations.due_at(&tenant, &key).await?.map(Timestamp::to_rfc3339);
    Ok(respond(StatusCode::OK, JSON, json(&RotationBody { due_at, ..RotationBody::from(&rotation) })))
}

#[utoipa::path(
    get, path = "/v1/rotations", operation_id = "list_rotations",
    description = "The rotations of the secrets that the token reaches, in the order in which they began.",
    params(
        ("state" = Option<String>, Query, pattern = "^(running|completed|failed|aborted|rolled_back)$", description = "Those in this state"),
        ("due_before" = Option<String>, Query, format = DateTime, pattern = "^(19[7-9]|[2-9][0-9][0-9])[0-9]-.*Z$",
            description = "Adds `due`: the secrets that are to be rotated by themselves before then"),
        ("after" = Option<String>, Query, pattern = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", description = "Those behind this id: `next` of the page before")
    ),
    responses((status = 200, body = RotationList, description = "A page of them"))
)]
async fn list(ask: &Ask<'_>) -> Result<Answer, Problem> {
    ask.grant.allow_action(Action::Read)?;
    let wrong = || Problem::invalid_query("state takes running, completed, failed, aborted or rolled_back");
    let parse = |word: &str| decode(word).as_deref().and_then(SecretRotationState::of).ok_or_else(wrong);
    let state = ask.query.get("state").map(parse).transpose()?;
    let wrong = || Problem::invalid_query("after takes an id, as the page before has it in next");
    let parse = |id: &str| decode(id).and_then(|id| id.parse::<uuid::Uuid>().ok()).ok_or_else(wrong);
    let after = ask.query.get("after").map(parse).transpose()?;
    let wrong = || Problem::invalid_query("due_before takes a time in UTC, as in 2026-01-31T12:00:00Z");
    let parse = |time: &str| decode(time).and_then(|time| Timestamp::from_rfc3339(&time)).ok_or_else(wrong);
    let due_before = ask.query.get("due_before").map(parse).transpose()?;
    let filter = RotationFilter { state, after: after.map(|id| id.to_string()) };
    let (rotations, next) = ask.service.rotations.page(&filter).await?;
    ask.count("rotations", "", "", None);
    let reached =
        |rotation: &&Rotation| ask.grant.allow(Action::Read, rotation.tenant.as_str(), rotation.key.as_str()).is_ok();
    let rotations = rotations.iter().filter(reached).map(RotationBody::from).collect();
    let due = match due_before {
        None => None,
        Some(before) => Some(ask.service.rotations.due_before(before, MOST_DUE).await?),
    };
    let is_reached = |due: &&Due| ask.grant.allow(Action::Read, due.tenant.as_str(), due.key.as_str()).is_ok();
    let due = due.as_ref().map(|due| due.iter().filter(is_reached).map(DueEntry::from).collect());
    Ok(respond(StatusCode::OK, JSON, json(&RotationList { rotations, next, due })))
}

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/secrets/{key}/rotation/promote", operation_id = "promote_rotation",
    description = "Has the new value take over now, without waiting for instances that have not heard of it.",
    responses(
        (status = 202, body = RotationBody, description = "It goes on"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`"),
        (status = 409, body = ProblemBody, description = "`rotation_not_running`, `rotation_not_now`")
    )
)]
async fn promote(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let (tenant, key) = ask.secret_for(Action::Rotate)?;
    told(
        ask.recorded("promote", &tenant, &key, ask.service.rotations.promote(&tenant, &key), |_| Tier::Database)
            .await?,
    )
}

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/secrets/{key}/rotation/retry", operation_id = "retry_rotation",
    description = "Tries the step that has failed again, at once.",
    responses(
        (status = 202, body = RotationBody, description = "It goes on"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`"),
        (status = 409, body = ProblemBody, description = "`rotation_not_running`, `rotation_not_now`")
    )
)]
async fn retry(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let (tenant, key) = ask.secret_for(Action::Rotate)?;
    let retrying = ask.service.rotations.retry(&tenant, &key);
    told(ask.recorded("retry_rotation", &tenant, &key, retrying, |_| Tier::Database).await?)
}

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/secrets/{key}/rotation/abort", operation_id = "abort_rotation",
    description = "Stops a rotation whose new value has not taken over.",
    responses(
        (status = 202, body = RotationBody, description = "It has ended"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`"),
        (status = 409, body = ProblemBody, description = "`rotation_not_running`, `rotation_not_now`")
    )
)]
async fn abort(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let (tenant, key) = ask.secret_for(Action::Rotate)?;
    let aborting = ask.service.rotations.abort(&tenant, &key);
    told(ask.recorded("abort_rotation", &tenant, &key, aborting, |_| Tier::Database).await?)
}

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/secrets/{key}/rotation/retire", operation_id = "retire_previous_value",
    description = "Ends the time of the old value now. The rotation ends once every instance serves the new one.",
    responses(
        (status = 202, body = RotationBody, description = "It goes on"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`"),
        (status = 409, body = ProblemBody, description = "`rotation_not_running`, `rotation_not_now`"),
        (status = 503, body = ProblemBody, description = "`secret_unavailable`: a value of the rotation does not open")
    )
)]
async fn retire(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let (tenant, key) = ask.secret_for(Action::Rotate)?;
    told(ask.recorded("retire", &tenant, &key, ask.service.rotations.retire(&tenant, &key), |_| Tier::Database).await?)
}

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/secrets/{key}/rotation/rollback", operation_id = "roll_back_rotation",
    description = "Makes the old value the secret's again while it is valid, and ends the rotation.",
    responses(
        (status = 202, body = RotationBody, description = "It has ended"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`, `reference_not_allowed`"),
        (status = 404, body = ProblemBody, description = "`secret_not_found`, `tenant_unknown`"),
        (status = 409, body = ProblemBody, description = "`rotation_not_running`, `rotation_not_now`, `version_conflict`, `approval_required`, `upstream_read_only`"),
        (status = 413, body = ProblemBody, description = "What upstream would have to take is too large"),
        (status = 503, body = ProblemBody, description = "`upstream_denied`, `secret_unavailable`")
    )
)]
async fn roll_back(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let (tenant, key) = ask.secret_for(Action::Rotate)?;
    let writer = ask.writer(&tenant);
    let rolling_back = ask.service.rotations.roll_back(&tenant, &key, &writer);
    told(ask.recorded("roll_back_rotation", &tenant, &key, rolling_back, |(_, tier)| *tier).await?.0)
}

#[expect(clippy::unnecessary_wraps, clippy::needless_pass_by_value, reason = "the end of each handler above")]
fn told(rotation: Rotation) -> Result<Answer, Problem> {
    Ok(respond(StatusCode::ACCEPTED, JSON, json(&RotationBody::from(&rotation))))
}

#[derive(Serialize, ToSchema)]
struct ValidBody<'a> {
    tenant: &'a str,
    key: &'a str,
    /// The current value first, then those that are valid beside it.
    values: Vec<ValidEntry<'a>>,
}

#[derive(Serialize, ToSchema)]
struct ValidEntry<'a> {
    /// Null where the value has not taken over yet.
    version: Option<i64>,
    value: &'a str,
    /// `current`, `previous`, or `pending`: it is about to take over.
    stage: &'a str,
    /// RFC 3339, UTC: until when it is valid; null where no end is known.
    valid_until: Option<String>,
}

impl<'a> From<&'a ValidValue> for ValidEntry<'a> {
    fn from(valid: &'a ValidValue) -> Self {
        Self {
            version: valid.version.map(|version| version.number()),
            value: valid.value.expose(),
            stage: valid.stage.as_str(),
            valid_until: valid.valid_until.map(Timestamp::to_rfc3339),
        }
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Rotate {
    /// The new value; without it, it is made as the rule of `[[rotation]]` says.
    #[serde(default, deserialize_with = "some_value")]
    #[schema(value_type = Option<String>)]
    value: Option<SecretValue>,
    /// How long the old value stays valid, as in `"24h"`; without it, as the rule says, or a day.
    #[serde(default, with = "units::optional_duration")]
    #[schema(value_type = Option<String>, pattern = "^([0-9]{1,3}(s|m|h)|[0-9]{1,2}d)$")]
    grace: Option<Duration>,
    /// Why, for the record: at most 500 bytes.
    #[serde(default)]
    #[schema(pattern = "^[ -~]{0,500}$")]
    reason: Option<String>,
}

fn some_value<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<SecretValue>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(SecretValue::new))
}

#[derive(Serialize, ToSchema)]
struct RotationList<'a> {
    rotations: Vec<RotationBody<'a>>,
    /// The id to ask for the next page with; null on the last.
    next: Option<String>,
    /// The secrets that are due before `due_before`, at most ten thousand, the earliest first.
    #[serde(skip_serializing_if = "Option::is_none")]
    due: Option<Vec<DueEntry<'a>>>,
}

/// When a secret is to be rotated by itself.
#[derive(Serialize, ToSchema)]
struct DueEntry<'a> {
    tenant: &'a str,
    key: &'a str,
    /// RFC 3339, UTC.
    due_at: String,
}

impl<'a> From<&'a Due> for DueEntry<'a> {
    fn from(due: &'a Due) -> Self {
        Self { tenant: due.tenant.as_str(), key: due.key.as_str(), due_at: due.due_at.to_rfc3339() }
    }
}

/// A rotation, without its values.
#[derive(Serialize, ToSchema)]
struct RotationBody<'a> {
    id: &'a str,
    tenant: &'a str,
    key: &'a str,
    /// `value`: whoever checks the value asks here which are valid; `webhook`: a rotator makes it so;
    /// `assisted`: a person does.
    kind: &'a str,
    /// `running`, `completed`, `failed` (a person decides), `aborted` or `rolled_back`.
    state: &'a str,
    /// `create`, `set`, `test`, `promote`, `wait` or `revoke`: the step that has begun.
    step: &'a str,
    /// How often the step has failed.
    tries: u32,
    /// Whether a value may be valid at its provider that nobody serves, or that should be revoked.
    orphaned: bool,
    /// RFC 3339, UTC: when it goes on; null where a person must act first, or where it has ended.
    next_try_at: Option<String>,
    /// What it waits for.
    waits_for: Option<&'a str>,
    /// Why the step failed last.
    error: Option<RotationErrorBody<'a>>,
    /// The version of the value that is replaced.
    old_version: Option<i64>,
    /// The version of the new value, once it has taken over and its owner has told it.
    new_version: Option<i64>,
    /// RFC 3339, UTC: until when the old value is valid; null before the new one has taken over.
    valid_until: Option<String>,
    /// Who began it.
    started_by: &'a str,
    /// Why.
    reason: Option<&'a str>,
    /// RFC 3339, UTC.
    started_at: String,
    /// RFC 3339, UTC.
    ended_at: Option<String>,
    /// RFC 3339, UTC: when it is to be rotated by itself; only where one secret was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    due_at: Option<String>,
}

/// Why a step failed. It contains no value.
#[derive(Serialize, ToSchema)]
struct RotationErrorBody<'a> {
    /// A word, for programs.
    code: &'a str,
    /// A sentence, for people.
    detail: &'a str,
}

impl<'a> From<&'a Rotation> for RotationBody<'a> {
    fn from(rotation: &'a Rotation) -> Self {
        let detail = &rotation.detail;
        Self {
            id: &rotation.id,
            tenant: rotation.tenant.as_str(),
            key: rotation.key.as_str(),
            kind: rotation.kind.as_str(),
            state: rotation.state.as_str(),
            step: rotation.step.as_str(),
            tries: detail.tries,
            orphaned: detail.orphaned,
            next_try_at: rotation.next_try_at.map(Timestamp::to_rfc3339),
            waits_for: detail.waits_for.as_deref(),
            error: detail.fault.as_ref().map(|fault| RotationErrorBody { code: &fault.code, detail: &fault.text }),
            old_version: rotation.old_version.map(|version| version.number()),
            new_version: detail.new_version,
            valid_until: rotation.valid_until.map(Timestamp::to_rfc3339),
            started_by: &detail.by,
            reason: detail.reason.as_deref(),
            started_at: rotation.created_at.to_rfc3339(),
            ended_at: rotation.ended_at.map(Timestamp::to_rfc3339),
            due_at: None,
        }
    }
}

impl From<RotateError> for Problem {
    fn from(error: RotateError) -> Self {
        match error {
            RotateError::NoSecret => Self::not_found(),
            RotateError::InProgress(running) => Self::rotation_in_progress(running.valid_until.is_some()),
            RotateError::NoRule => Self::no_rotation_rule(),
            RotateError::SameValue => Self::same_value(),
            RotateError::NotRunning => Self::rotation_not_running(),
            RotateError::NotNow(why) => Self::rotation_not_now(why),
            RotateError::Moved => Self::rotation_not_now("somebody else goes on with this rotation; look at it again"),
            RotateError::NoRandomness(_) => Self::busy("the system's source of randomness failed"),
            RotateError::Unreadable => ResolveError::Unreadable.into(),
            RotateError::Read(error) => error.into(),
            RotateError::Write(error) => error.into(),
            RotateError::Store(error) => ResolveError::Database(Arc::new(error)).into(),
        }
    }
}
