//! Several secrets of one tenant, as they are made, changed and deleted by one request.
//!
//! Everything that can be checked is checked first: names, scope, sizes, and that what is to be changed or
//! deleted is there. Then they are done one after the other, each on record, and the first that fails ends it:
//! the same request, sent again, goes on there. So of several that are to be deleted, some may be gone.

use std::collections::HashSet;

use hyper::body::Incoming;

use super::{
    fields::Item,
    shape,
    write::{Done, Writing, new_name},
};
use crate::{
    secret::SecretKey,
    server::{
        ask::Ask,
        operation::{Operation, Run},
        respond::{Answer, Problem},
    },
};

pub(in crate::server) const CREATE: Operation =
    Operation { action: "put", parameters: &[], run: Run::Write(|ask, body| Box::pin(batch(ask, body, Does::Create))) };
pub(in crate::server) const UPDATE: Operation =
    Operation { action: "put", parameters: &[], run: Run::Write(|ask, body| Box::pin(batch(ask, body, Does::Update))) };
pub(in crate::server) const DELETE: Operation = Operation {
    action: "delete",
    parameters: &[],
    run: Run::Write(|ask, body| Box::pin(batch(ask, body, Does::Delete))),
};

/// The most secrets of one request.
const MOST: usize = 100;

#[derive(Clone, Copy)]
enum Does {
    Create,
    Update,
    Delete,
}

async fn batch(ask: &Ask<'_>, body: Incoming, does: Does) -> Result<Answer, Problem> {
    let (writing, fields) = Writing::read(ask, body, MOST as u64).await?;
    let items = fields.secrets.unwrap_or_default();
    if items.is_empty() || items.len() > MOST {
        return Err(Problem::invalid_body(format!("secrets is a list of 1 to {MOST} secrets")));
    }
    let mut names = names(&writing, &items, does)?;
    are_there(&writing, &mut names, does).await?;
    let mut done: Vec<Done> = Vec::with_capacity(items.len());
    for ((key, new_name), item) in names.iter().zip(&items) {
        done.push(match (does, &item.secret_value) {
            (Does::Create, Some(value)) => writing.create(key, value).await?,
            (Does::Create, None) => return Err(Problem::invalid_body("secretValue is required")),
            (Does::Update, value) => writing.update(key, new_name.as_ref(), value.as_ref()).await?,
            (Does::Delete, _) => writing.delete(key).await?,
        });
    }
    let name = |(key, new_name): &'_ (SecretKey, Option<SecretKey>)| new_name.clone().unwrap_or_else(|| key.clone());
    let names: Vec<SecretKey> = names.iter().map(name).collect();
    let shown: Vec<_> = names.iter().zip(&done).map(|(key, done)| writing.shown(key, done)).collect();
    Ok(shape::batch(&shown))
}

/// Makes sure that what is to be changed is there, and something of what is to be deleted. What is gone
/// already is left out.
async fn are_there(
    writing: &Writing<'_>,
    names: &mut Vec<(SecretKey, Option<SecretKey>)>,
    does: Does,
) -> Result<(), Problem> {
    let (mut there, mut gone) = (Vec::with_capacity(names.len()), None);
    for (key, new_name) in names.drain(..) {
        // One that was renamed by the same request before is there under its new name, which the renaming tells.
        let is_there = matches!(does, Does::Create) || new_name.is_some() || writing.is_there(&key).await?;
        match is_there {
            true => there.push((key, new_name)),
            false => gone = gone.or(Some(key)),
        }
    }
    *names = there;
    match (does, gone) {
        (Does::Update, Some(key)) => Err(writing.about(&key, Problem::not_found())),
        (Does::Delete, Some(key)) if names.is_empty() => Err(writing.about(&key, Problem::not_found())),
        _ => Ok(()),
    }
}

/// The names of the secrets, with the new names of those that are to be renamed.
fn names(writing: &Writing<'_>, items: &[Item], does: Does) -> Result<Vec<(SecretKey, Option<SecretKey>)>, Problem> {
    let mut named = HashSet::new();
    let mut name = |item: &Item| {
        let key: SecretKey = item.secret_key.parse().map_err(|_| Problem::invalid_key())?;
        if item.secret_path.as_deref().is_some_and(|path| !path.is_empty() && !writing.is_of(path)) {
            return Err(Problem::invalid_body("a batch is of one folder: send secrets of another by themselves"));
        }
        let new_name = match does {
            Does::Update => new_name(item.new_secret_name.as_deref(), &key)?,
            Does::Create | Does::Delete => None,
        };
        writing.may_do(&key, new_name.as_ref(), item.secret_value.as_ref())?;
        if matches!(does, Does::Create) && item.secret_value.is_none() {
            return Err(Problem::invalid_body("secretValue is required"));
        }
        // Two of one name would be two changes of one secret.
        match named.insert(key.clone()) {
            true => Ok((key, new_name)),
            false => Err(Problem::invalid_body("a secret stands in the batch twice")),
        }
    };
    items.iter().map(&mut name).collect()
}
