//! The one project that an instance serves.

use hyper::body::Incoming;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::InfisicalApi;
use crate::server::{
    ask::{Ask, decode, json},
    operation::{Operation, Run},
    respond::{Answer, JSON, Problem, respond},
};

pub(in crate::server) const BY_ID: Operation =
    Operation { action: "project", parameters: &[], run: Run::Read(|ask, body| Box::pin(by_id(ask, body))) };
pub(in crate::server) const BY_SLUG: Operation =
    Operation { action: "project", parameters: &[], run: Run::Read(|ask, body| Box::pin(by_slug(ask, body))) };

async fn by_id(ask: &Ask<'_>, _: Incoming) -> Result<Answer, Problem> {
    let face = InfisicalApi::of(ask)?;
    let asked = decode(ask.names.key).ok_or_else(Problem::other_project)?;
    if face.project.id.as_ref().is_some_and(|ours| *ours != *asked) {
        return Err(Problem::other_project());
    }
    Ok(told(ask, &face, None))
}

async fn by_slug(ask: &Ask<'_>, _: Incoming) -> Result<Answer, Problem> {
    let face = InfisicalApi::of(ask)?;
    let asked = decode(ask.names.key).ok_or_else(Problem::other_project)?;
    if face.slug.as_ref().is_some_and(|ours| *ours != *asked) {
        return Err(Problem::other_project());
    }
    Ok(told(ask, &face, Some(&asked)))
}

impl InfisicalApi {
    /// The project's id. An instance without one has no project upstream, and takes every id.
    pub(super) fn project_id(&self) -> &str {
        self.project.id.as_deref().unwrap_or("00000000-0000-4000-8000-000000000000")
    }

    /// The environment's id: the same for ever.
    pub(super) fn environment_id(&self) -> String {
        let hash = Sha256::new_with_prefix(b"secretier environment v1").chain_update(&self.project.environment);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.finalize()[..16]);
        uuid::Builder::from_random_bytes(bytes).into_uuid().to_string()
    }
}

fn told(ask: &Ask<'_>, face: &InfisicalApi, asked: Option<&str>) -> Answer {
    ask.count("project", "", "", None);
    let (id, environment) = (face.project_id(), face.project.environment.as_str());
    let environment_id = face.environment_id();
    let one = || Told {
        id,
        same_id: id,
        name: "secretier",
        slug: face.slug.as_deref().or(asked).unwrap_or("secretier"),
        r#type: "secret-manager",
        environments: [Environment { id: environment_id.clone(), name: environment, slug: environment }],
    };
    // Some routes tell it bare, some under one of two names, as it is from version to version.
    respond(http::StatusCode::OK, JSON, json(&Project { bare: one(), workspace: one(), project: one() }))
}

#[derive(Serialize)]
struct Project<'a> {
    #[serde(flatten)]
    bare: Told<'a>,
    workspace: Told<'a>,
    project: Told<'a>,
}

#[derive(Serialize)]
struct Told<'a> {
    id: &'a str,
    #[serde(rename = "_id")]
    same_id: &'a str,
    name: &'static str,
    slug: &'a str,
    r#type: &'static str,
    environments: [Environment<'a>; 1],
}

#[derive(Serialize)]
struct Environment<'a> {
    id: String,
    name: &'a str,
    slug: &'a str,
}
