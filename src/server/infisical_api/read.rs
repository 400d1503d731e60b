//! Secrets as they are read: a folder, all folders of tenants, one secret.
//!
//! Both kinds of flags that clients send, to follow references and to add imported secrets, change nothing:
//! a folder is answered as it is served everywhere, with its references followed and its imports merged.

use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use http::{HeaderValue, StatusCode, header};
use hyper::body::Incoming;

use super::{
    InfisicalApi,
    fields::Fields,
    place::{Place, plain},
    shape::{self, Folder, ListBody, Shown},
};
use crate::{
    access::Action,
    answer::Answer as Secret,
    long_work::{Pace, SHORT},
    resolver::{Listing, LongAnswer, ResolveError},
    secret::{SecretKey, SecretName, Version},
    server::{
        api::lists::{joined, room_ahead, unavailable_of},
        ask::{Ask, decode},
        operation::{Operation, Run},
        outgoing::UNCOUNTED,
        respond::{Answer, CACHE_STATUS, JSON, Problem, cache_status_header, respond, ttl},
    },
    tenant::Tenant,
};

pub(in crate::server) const LIST: Operation =
    Operation { action: "list", parameters: &[], run: Run::Read(|ask, body| Box::pin(list(ask, body))) };
pub(in crate::server) const GET: Operation =
    Operation { action: "read", parameters: &[], run: Run::Read(|ask, body| Box::pin(get(ask, body))) };
pub(in crate::server) const BY_ID: Operation =
    Operation { action: "read", parameters: &[], run: Run::Read(|ask, body| Box::pin(by_id(ask, body))) };

/// Folders that are read at once for one list.
const AT_ONCE: usize = 8;

/// Bytes by which the room for a list of many folders grows.
const STEP: u64 = 1 << 20;

// A body on GET is what some clients send beside the query: it says the same, and is not read.
async fn list(ask: &Ask<'_>, _: Incoming) -> Result<Answer, Problem> {
    let face = InfisicalApi::of(ask)?;
    let fields = Fields::of_query(ask)?;
    fields.check(&face)?;
    match face.place(fields.path())? {
        Place::Tenant(tenant) => one(ask, &face, &tenant).await.map_err(|problem| problem.about(tenant.as_str(), "")),
        Place::Tenants if fields.recursive => all(ask, &face, fields.path()).await,
        Place::Above if fields.recursive => {
            has_no_secrets(ask, fields.path()).await?;
            all(ask, &face, fields.path()).await
        }
        Place::Tenants | Place::Above => bare(ask, fields.path()).await,
    }
}

/// Makes sure that a folder above the tenants' has no secrets, for they are not served.
async fn has_no_secrets(ask: &Ask<'_>, path: Option<&str>) -> Result<(), Problem> {
    ask.grant.allow_action(Action::Read)?;
    match ask.service.resolver.is_bare(&plain(path)).await? {
        true => Ok(()),
        false => Err(Problem::folder_not_served()),
    }
}

/// A folder above the tenants' holds no secrets of its own. Where it does upstream, they are not served, and
/// an empty list would say that there are none.
async fn bare(ask: &Ask<'_>, path: Option<&str>) -> Result<Answer, Problem> {
    has_no_secrets(ask, path).await?;
    ask.count("list", "", "", None);
    let body = ListBody::new();
    Ok(shape::tagged(ask.headers, &body.tag(), || {
        let empty = crate::infisical::Listed::<()> { secrets: Vec::new(), imports: Vec::new() };
        respond(StatusCode::OK, JSON, crate::server::ask::json(&empty))
    }))
}

/// One tenant's folder.
async fn one(ask: &Ask<'_>, face: &InfisicalApi, tenant: &Tenant) -> Result<Answer, Problem> {
    ask.grant.allow_tenant(Action::Read, tenant.as_str())?;
    let turn = ask.service.resolver.long_answer(&ask.grant.id);
    let room = room_ahead(ask, tenant, &turn).await?;
    let listing = read(ask, tenant, &turn).await?.ok_or_else(Problem::no_folder)?;
    let Listing { secrets, age, cache_status, .. } = listing;
    let tier = Some(cache_status.answered_by.as_str());
    ask.count("list", tenant.as_str(), "", tier);
    let secrets = secrets.map(|secrets| secrets.into_values().map(|secret| (0, secret)).collect::<Vec<_>>());
    let (secrets, _) = secrets.parted(|(_, secret)| ask.grant.reaches_key(secret.key.as_str()));
    let folders: Arc<[Folder]> = Arc::new([face.folder(tenant)]);
    let (mut body, mut pace) = (ListBody::new(), Pace::default());
    for (folder, secret) in secrets.iter() {
        ask.count("read", tenant.as_str(), secret.key.as_str(), tier);
        body.count(ask, &folders[*folder], secret);
        pace.did(0).await;
    }
    let whole = joined(ask, body.length(), ListBody::parts(folders, secrets), room)?;
    let mut answer = shape::tagged(ask.headers, &body.tag(), || whole);
    let headers = answer.headers_mut();
    headers.insert(header::AGE, HeaderValue::from(age.as_secs()));
    headers.insert(CACHE_STATUS, cache_status_header(&cache_status, 0));
    Ok(answer)
}

/// What a tenant's folder holds; `None` where it is proved that there is none. A list that lacked a secret
/// would say that there is none, so one that cannot be used fails the list.
async fn read(ask: &Ask<'_>, tenant: &Tenant, turn: &LongAnswer<'_>) -> Result<Option<Listing>, Problem> {
    let listing = ask.service.resolver.resolve_all(tenant, ask.want(), turn).await?;
    let Some(listing) = listing else { return Ok(None) };
    match unavailable_of(ask, &listing.flaws).first() {
        Some(first) => Err(Problem::some_unavailable(first.key, first.reason)),
        None => Ok(Some(listing)),
    }
}

/// The folders below a path that the token reaches: all, or an error. It is bounded like every answer, and
/// each token makes one at a time.
async fn all(ask: &Ask<'_>, face: &InfisicalApi, path: Option<&str>) -> Result<Answer, Problem> {
    ask.grant.allow_action(Action::Read)?;
    let resolver = &ask.service.resolver;
    let is_wanted = |tenant: &Tenant| ask.grant.reaches(tenant.as_str()) && face.is_below(tenant, path);
    let tenants = resolver.every_tenant(is_wanted).await?;
    let turn = resolver.long_answer(&ask.grant.id);
    tokio::time::timeout(resolver.deadline(), turn.take()).await.map_err(|_| ResolveError::TimedOut)?;
    // A budget lets who holds nothing else take more than a share, for what cannot be had otherwise. This can.
    let most = ask.service.limits().bounds.answers.by_one;
    let read_one = |tenant: Tenant| async move {
        // The token's turn is taken: each folder has one of its own, and what is held of it is counted here.
        let token = format!("{} {tenant}", ask.grant.id);
        let turn = ask.service.resolver.long_answer(&token);
        let listing = read(ask, &tenant, &turn).await.map_err(|problem| problem.about(tenant.as_str(), ""))?;
        Ok::<_, Problem>((tenant, listing))
    };
    let mut listings = stream::iter(tenants).map(read_one).buffered(AT_ONCE);
    let (mut folders, mut secrets, mut weight) = (Vec::new(), Vec::<(usize, Secret)>::new(), 0_u64);
    let (mut body, mut pace) = (ListBody::new(), Pace::default());
    let (mut room, mut counted) = (None, UNCOUNTED as u64);
    while let Some((tenant, listing)) = listings.try_next().await? {
        // It was deleted meanwhile.
        let Some(mut listing) = listing else { continue };
        let tier = Some(listing.cache_status.answered_by.as_str());
        ask.count("list", tenant.as_str(), "", tier);
        let folder = face.folder(&tenant);
        for (_, secret) in listing.secrets.take() {
            if !ask.grant.reaches_key(secret.key.as_str()) {
                continue;
            }
            ask.count("read", tenant.as_str(), secret.key.as_str(), tier);
            body.count(ask, &folder, &secret);
            weight += secret.weight();
            // Counted as it grows: what there is no room for is not made.
            let length = weight.max(body.length());
            if length > most {
                return Err(Problem::list_too_large());
            }
            if length > counted {
                counted = length + STEP;
                room = Some(ask.service.hold_answer(room, ask.grant.holds(), counted)?);
            }
            secrets.push((folders.len(), secret));
            pace.did(0).await;
        }
        folders.push(folder);
    }
    let weight = usize::try_from(weight).unwrap_or(usize::MAX);
    if weight <= SHORT {
        drop(turn);
    }
    let secrets = resolver.database().work().large(secrets, weight);
    let whole = joined(ask, body.length(), ListBody::parts(folders.into(), secrets), room)?;
    Ok(shape::tagged(ask.headers, &body.tag(), || whole))
}

async fn get(ask: &Ask<'_>, _: Incoming) -> Result<Answer, Problem> {
    let face = InfisicalApi::of(ask)?;
    let fields = Fields::of_query(ask)?;
    fields.check(&face)?;
    let key = key_of(ask)?;
    let tenant = face.tenant(fields.path())?;
    told(ask, &face, &tenant, &key, fields.version).await
}

async fn by_id(ask: &Ask<'_>, _: Incoming) -> Result<Answer, Problem> {
    let face = InfisicalApi::of(ask)?;
    Fields::of_query(ask)?.check(&face)?;
    let id = decode(ask.names.key).ok_or_else(Problem::not_found)?;
    let (tenant, key) = match shape::named_by(&id) {
        Some(named) => named,
        // Infisical may have a secret under it: it is not proved absent.
        None if uuid::Uuid::try_parse(&id).is_ok() => return Err(Problem::foreign_id()),
        // An id that is none leads to no secret, here or elsewhere.
        None => return Err(Problem::not_found()),
    };
    told(ask, &face, &tenant, &key, None).await
}

async fn told(
    ask: &Ask<'_>,
    face: &InfisicalApi,
    tenant: &Tenant,
    key: &SecretKey,
    version: Option<i64>,
) -> Result<Answer, Problem> {
    let telling = async {
        ask.grant.allow(Action::Read, tenant.as_str(), key.as_str())?;
        let (resolver, name) = (&ask.service.resolver, SecretName::of(tenant, key));
        let mut resolved = resolver.resolve(name, ask.want()).await?;
        let is_other = |wanted: Version| resolved.answer().is_some_and(|answer| answer.version != wanted);
        if let Some(wanted) = version.and_then(Version::new).filter(|wanted| is_other(*wanted)) {
            resolved = resolver.resolve_version(name, wanted, ask.want()).await?;
        }
        let now = resolver.clock().moment();
        ask.saw(name, &resolved, now);
        let Some(found) = resolved.answer() else {
            // It is accounted for.
            return Err(Problem::not_found().recorded());
        };
        let folder = face.folder(tenant);
        let tag = shape::tag_of(ask, &folder, found);
        let mut answer = shape::tagged(ask.headers, &tag, || Shown::of(&folder, found).answer());
        let headers = answer.headers_mut();
        headers.insert(header::AGE, HeaderValue::from(now.since(resolved.entry.confirmed_at).as_secs()));
        headers.insert(CACHE_STATUS, cache_status_header(&resolved.cache_status, ttl(&resolved.entry, now)));
        Ok(answer)
    };
    telling.await.map_err(|problem: Problem| problem.about(tenant.as_str(), key.as_str()))
}

/// The name of a secret in the path.
pub(super) fn key_of(ask: &Ask<'_>) -> Result<SecretKey, Problem> {
    decode(ask.names.key).and_then(|key| key.parse().ok()).ok_or_else(Problem::invalid_key)
}
