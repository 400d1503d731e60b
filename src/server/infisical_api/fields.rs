//! What a request brings: fields of its query, and of its body, in the spellings that Infisical's clients
//! use. A field that is not known changes nothing, and one that is null is not there.

use std::{borrow::Cow, collections::HashSet};

use hyper::body::Incoming;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Deserializer};

use super::InfisicalApi;
use crate::{
    secret::SecretValue,
    server::{ask::Ask, respond::Problem},
};

/// The fields that mean something here.
#[derive(Default)]
pub(super) struct Fields {
    /// All that were given: clients send the same under two names.
    workspace_ids: Vec<String>,
    workspace_slugs: Vec<String>,
    environments: Vec<String>,
    secret_path: Option<String>,
    pub(super) recursive: bool,
    pub(super) secret_value: Option<SecretValue>,
    pub(super) new_secret_name: Option<String>,
    /// The name of a folder.
    pub(super) name: Option<String>,
    /// An older version of a secret, in the query alone.
    pub(super) version: Option<i64>,
    /// The secrets of a batch.
    pub(super) secrets: Option<Vec<Item>>,
}

/// The fields of a body, by every name that they have. Some clients send two of the names.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Body {
    workspace_id: Option<String>,
    project_id: Option<String>,
    workspace_slug: Option<String>,
    project_slug: Option<String>,
    environment: Option<String>,
    secret_path: Option<String>,
    path: Option<String>,
    directory: Option<String>,
    #[serde(deserialize_with = "flag")]
    recursive: bool,
    #[serde(deserialize_with = "value")]
    secret_value: Option<SecretValue>,
    new_secret_name: Option<String>,
    name: Option<String>,
    secrets: Option<Vec<Item>>,
}

/// A secret of a batch.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Item {
    pub(super) secret_key: String,
    #[serde(default, deserialize_with = "value")]
    pub(super) secret_value: Option<SecretValue>,
    #[serde(default)]
    pub(super) new_secret_name: Option<String>,
    /// Another folder than the batch's.
    #[serde(default)]
    pub(super) secret_path: Option<String>,
}

fn value<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SecretValue>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(SecretValue::new))
}

/// A flag in a body, where it may be a word as well.
fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Flag {
        Is(bool),
        Word(String),
    }
    Ok(match Option::<Flag>::deserialize(deserializer)? {
        Some(Flag::Is(is)) => is,
        Some(Flag::Word(word)) => is_true(&word),
        None => false,
    })
}

fn is_true(word: &str) -> bool {
    word.eq_ignore_ascii_case("true") || word == "1"
}

impl Fields {
    /// The fields of the query. Of two of one name the first counts.
    pub(super) fn of_query(ask: &Ask<'_>) -> Result<Self, Problem> {
        let mut fields = Self::default();
        let mut seen = HashSet::new();
        for (name, value) in ask.query.each() {
            let (name, value) = (decoded(name)?, decoded(value)?);
            if !value.is_empty() && !seen.insert(name.clone()) {
                continue;
            }
            match &*name {
                "workspaceId" | "projectId" => fields.workspace_ids.push(value),
                "workspaceSlug" | "projectSlug" => fields.workspace_slugs.push(value),
                "environment" => fields.environments.push(value),
                "secretPath" | "path" | "directory" if fields.secret_path.as_deref().is_none_or(str::is_empty) => {
                    fields.secret_path = Some(value);
                }
                "recursive" => fields.recursive = is_true(&value),
                "version" if !value.is_empty() => {
                    let wrong = || Problem::invalid_query("version takes a number from 1 on, as in ?version=3");
                    fields.version = Some(value.parse().ok().filter(|version| *version > 0).ok_or_else(wrong)?);
                }
                _ => {}
            }
        }
        Ok(fields)
    }

    /// The fields of the body, and of the query where the body lacks them.
    pub(super) async fn read(ask: &Ask<'_>, body: Incoming, limit: u64) -> Result<Self, Problem> {
        let query = Self::of_query(ask)?;
        let body: Body = ask.read_if_any(body, limit).await?;
        let first = |texts: [Option<String>; 4]| texts.into_iter().flatten().find(|text| !text.is_empty());
        let all = |of_query: Vec<String>, of_body: [Option<String>; 2]| {
            of_query.into_iter().chain(of_body.into_iter().flatten()).collect()
        };
        Ok(Self {
            workspace_ids: all(query.workspace_ids, [body.workspace_id, body.project_id]),
            workspace_slugs: all(query.workspace_slugs, [body.workspace_slug, body.project_slug]),
            environments: all(query.environments, [body.environment, None]),
            secret_path: first([body.secret_path, body.path, body.directory, query.secret_path]),
            recursive: body.recursive || query.recursive,
            secret_value: body.secret_value,
            new_secret_name: body.new_secret_name,
            name: body.name,
            version: query.version,
            secrets: body.secrets,
        })
    }

    /// Checks that the request is about the project and the environment that are served here. A field that
    /// is empty is not there.
    pub(super) fn check(&self, face: &InfisicalApi) -> Result<(), Problem> {
        let other = |named: &[String], ours: Option<&String>| {
            ours.is_some_and(|ours| named.iter().any(|named| !named.is_empty() && named != ours))
        };
        if other(&self.workspace_ids, face.project.id.as_ref()) || other(&self.workspace_slugs, face.slug.as_ref()) {
            return Err(Problem::other_project());
        }
        match other(&self.environments, Some(&face.project.environment)) {
            true => Err(Problem::other_environment()),
            false => Ok(()),
        }
    }

    /// The path of the folder.
    pub(super) fn path(&self) -> Option<&str> {
        self.secret_path.as_deref()
    }
}

/// A text of the query, which forms may write with `+` for a blank.
fn decoded(text: &str) -> Result<String, Problem> {
    let text = if text.contains('+') { Cow::Owned(text.replace('+', " ")) } else { Cow::Borrowed(text) };
    let decoded = percent_decode_str(&text).decode_utf8();
    decoded.map(Cow::into_owned).map_err(|_| Problem::invalid_query("the query is not percent-encoded UTF-8"))
}
