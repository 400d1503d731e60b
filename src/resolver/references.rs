//! Resolves references in copies when they are answered: a copy holds upstream's text, and its
//! value is resolved from the secrets as they are now.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::{ResolveError, Resolver};
use crate::{
    flaws::Unresolved,
    long_work::{Large, SHORT, weight_of},
    phase::Phase,
    policy::Policies,
    references::{self, Texts},
    secret::{SecretKey, SecretValue},
    tenant::Tenant,
    tiers::{
        database::{Held, Lookup, Source, StoreError, Stored},
        upstream::Upstream,
    },
};

impl Resolver {
    /// Gives a tenant's copies the values that their texts resolve to. A copy that refers to
    /// something unknown here becomes [`Held::Unknown`]: upstream is to be asked. Where only
    /// another folder is unknown, the copy keeps the value that it had when it was stored.
    ///
    /// `is_snapshot` says whether these rows are everything that upstream had, and `is_copy` which
    /// of them are asked for. A secret that the database owns, by `is_upstreams`, refers to
    /// nothing, and is not what upstream has under that name.
    pub(super) async fn resolve_rows(
        &self,
        tenant: &Tenant,
        mut rows: Large<Vec<(SecretKey, Held)>>,
        is_snapshot: bool,
        is_copy: impl Fn(&SecretKey) -> bool + Send + 'static,
        is_upstreams: IsUpstreams,
    ) -> Large<Vec<(SecretKey, Held)>> {
        if !rows.iter().any(|(key, held)| text_of(held).is_some() && is_copy(key)) {
            return rows;
        }
        let Some(upstream) = self.upstream.clone() else { return rows };
        let (tenant, is_long) = (tenant.clone(), weight_of(rows.iter(), |(_, held)| held.weight()) > SHORT);
        let resolve = move || {
            resolve(&*upstream, &tenant, &mut rows, is_snapshot, &is_copy, &*is_upstreams);
            rows
        };
        if is_long { self.database.work().run(resolve).await } else { resolve() }
    }

    /// The same for one secret from a lookup, with the rest of its folder.
    pub(super) async fn resolve_copy(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        found: Lookup,
        is_upstreams: IsUpstreams,
    ) -> Result<Lookup, StoreError> {
        if text_of(&found.copy).is_none() {
            return Ok(found);
        }
        // It may have been stored anew in between, so the folder is read whole.
        let listing = self.database.find_all(tenant).await?;
        let copy = self.only(tenant, key, listing.secrets, listing.is_snapshot, is_upstreams).await;
        Ok(Lookup { company: listing.company, copy })
    }

    async fn only(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        rows: Large<Vec<(SecretKey, Held)>>,
        is_snapshot: bool,
        is_upstreams: IsUpstreams,
    ) -> Held {
        let this = key.clone();
        let mut rows = self.resolve_rows(tenant, rows, is_snapshot, move |name| *name == this, is_upstreams).await;
        let place = rows.iter().position(|(name, _)| name == key);
        place.map_or(Held::Unknown, |place| rows.swap_remove(place).1)
    }

    /// Why a reference in a copy stays unresolved, where one does.
    pub(super) async fn unresolved(&self, tenant: &Tenant, key: &SecretKey) -> Option<Unresolved> {
        let upstream = self.upstream.as_ref()?;
        let listing = self.database.find_all(tenant).await.ok()?;
        let mut resolved = upstream.resolve(tenant, texts(&listing.secrets, listing.is_snapshot, &|_| true));
        resolved.remove(key.as_str())?.unresolved
    }

    /// The value of an older version, with its references resolved in the folder's values now.
    pub(super) async fn resolve_older(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        stored: Stored,
        is_upstreams: IsUpstreams,
    ) -> Result<Stored, ResolveError> {
        if stored.text.is_none() || stored.source != Source::Infisical {
            return Ok(stored);
        }
        let mut listing = self.database.find_all(tenant).await.map_err(Arc::new)?;
        let before = stored.value.clone();
        listing.secrets.retain(|(name, _)| name != key);
        listing.secrets.push((key.clone(), Held::Present(stored.clone())));
        match self.only(tenant, key, listing.secrets, listing.is_snapshot, is_upstreams).await {
            Held::Present(resolved) => Ok(resolved),
            // The value that it resolved to when it was read.
            _ => Ok(Stored { value: before, ..stored }),
        }
    }
}

/// Tells whether a key of a tenant is owned upstream.
pub(super) type IsUpstreams = Arc<dyn Fn(&SecretKey) -> bool + Send + Sync>;

/// The keys that are owned upstream by these policies; `own` is the tenant's own phase.
pub(super) fn is_upstreams(policies: &Arc<Policies>, tenant: &Tenant, own: Option<Phase>) -> IsUpstreams {
    let (policies, tenant) = (Arc::clone(policies), tenant.clone());
    Arc::new(move |key| policies.of(&tenant, key, own).phase.owned_upstream())
}

fn resolve(
    upstream: &dyn Upstream,
    tenant: &Tenant,
    rows: &mut [(SecretKey, Held)],
    is_snapshot: bool,
    is_copy: &dyn Fn(&SecretKey) -> bool,
    is_upstreams: &dyn Fn(&SecretKey) -> bool,
) {
    let stamp = stamp(rows);
    let mut values: Vec<(usize, Option<SecretValue>, u64)> = Vec::new();
    {
        let texts = texts(rows, is_snapshot, is_upstreams);
        let is_whole = is_snapshot && texts.values().all(Option::is_some);
        let mut resolved = upstream.resolve(tenant, texts);
        for (place, (key, held)) in rows.iter().enumerate() {
            let Some(stored) = text_of(held).filter(|_| is_copy(key)) else { continue };
            let resolved = resolved.remove(key.as_str());
            let others = resolved.as_ref().map_or(0, |resolved| resolved.others);
            let value = resolved.and_then(|resolved| resolved.value);
            values.push((place, value.or_else(|| is_whole.then(|| stored.value.clone())), others));
        }
    }
    for (place, value, others) in values {
        let held = &mut rows[place].1;
        match (value, &mut *held) {
            (Some(value), Held::Present(stored)) => stored.stands_for(value, &format!("{stamp} {others}")),
            _ => *held = Held::Unknown,
        }
    }
}

/// The row, if it is a copy from upstream whose text has references.
fn text_of(held: &Held) -> Option<&Stored> {
    match held {
        Held::Present(stored) if stored.text.is_some() && stored.source == Source::Infisical => Some(stored),
        Held::Present(_) | Held::Absent | Held::Unknown | Held::Unreadable(_) | Held::Unusable(_) => None,
    }
}

/// The texts in the tenant's folder that are known here. Unknown ones are included: such a key
/// is neither a text nor missing.
fn texts<'r>(rows: &'r [(SecretKey, Held)], is_snapshot: bool, is_upstreams: &dyn Fn(&SecretKey) -> bool) -> Texts<'r> {
    let mut texts = Texts::with_capacity(rows.len());
    for (key, held) in rows {
        let text = match held {
            _ if !is_upstreams(key) => None,
            Held::Present(Stored { source: Source::Infisical, text, value, .. }) => match text {
                Some(Ok(text)) => Some(text.expose()),
                Some(Err(_)) => None,
                None => Some(value.expose()),
            },
            Held::Present(_) | Held::Absent | Held::Unknown | Held::Unreadable(_) | Held::Unusable(_) => None,
        };
        texts.insert(key.as_str(), text);
    }
    if !is_snapshot {
        let named: Vec<&str> = texts.values().flatten().flat_map(|text| references::names(text)).collect();
        for name in named {
            texts.entry(name).or_insert(None);
        }
    }
    texts
}

/// A digest that tells one content of a folder from another, without its values.
fn stamp(secrets: &[(SecretKey, Held)]) -> String {
    let mut stamp = Sha256::new();
    for (key, held) in secrets {
        if let Held::Present(stored) = held {
            stamp.update(key.as_str().as_bytes());
            stamp.update([0]);
            stamp.update(stored.etag.as_bytes());
        }
    }
    hex::encode(stamp.finalize())
}
