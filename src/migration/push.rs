//! Writes the values that the database took as owner of a tenant to upstream, so that afterwards
//! the same is served as before, references included.
//!
//! Values that upstream cannot hold, and values there that nobody here wrote, are found before
//! anything is written. When all is written, the folder is read back and compared both ways.

use std::collections::BTreeMap;

use super::{
    folders::{ChangeError, change, patiently as call_patiently},
    rollback::RollbackError,
};
use crate::{
    references,
    sealing::OpenError,
    secret::{SecretKey, SecretValue},
    tenant::Tenant,
    tiers::{
        database::{Database, Held, JobLock, Source, Stored},
        upstream::{Fetched, Lane, Snapshot, Upstream, UpstreamError},
    },
};

/// Everything that a push needs.
pub(super) struct Push<'a> {
    pub(super) database: &'a Database,
    pub(super) upstream: &'a dyn Upstream,
    pub(super) lock: &'a JobLock,
    pub(super) tenant: &'a Tenant,
    /// Whether upstream will own a key.
    pub(super) goes_back: &'a (dyn Fn(&SecretKey) -> bool + Sync),
}

/// The text that upstream is to have under each key.
type Texts = BTreeMap<SecretKey, SecretValue>;

impl Push<'_> {
    /// Writes these keys as they are served, or deletes them, and also writes the keys that depend
    /// on them by a reference and would otherwise get another value.
    ///
    /// # Errors
    /// [`RollbackError`]; nothing was written where it names the obstacles.
    pub(super) async fn push(&self, keys: &[SecretKey], has_folder: bool) -> Result<(), RollbackError> {
        let served = self.served().await?;
        let there = self.read().await?;
        let is_empty = there.secrets.is_empty() && there.oddities.is_empty();
        if !has_folder && !is_empty {
            // Somebody has made a folder since the list was read, and its content is unknown here.
            return Err(RollbackError::Ahead(there.secrets.into_iter().map(|secret| secret.key).collect()));
        }
        let wanted = self.wanted(&served, keys)?;
        self.refuse_where_ahead(&served, &wanted, &there, keys)?;
        let writes: Vec<(&SecretKey, &SecretValue)> = wanted
            .iter()
            .filter(|(key, text)| written_there(&there, key).is_none_or(|there| !there.same_as(text)))
            .collect();
        let checked = writes.iter().filter_map(|(key, text)| {
            let refused = self.upstream.check(key, Some(text)).err()?;
            Some(format!("{:?}: {refused}", key.as_str()))
        });
        let unpushable: Vec<String> = checked.collect();
        if !unpushable.is_empty() {
            return Err(RollbackError::Unpushable(unpushable));
        }
        if !has_folder {
            // Creates it for a tenant without secrets to write, too.
            let made = change(self.database, self.lock, || self.upstream.create_folder(self.tenant)).await;
            made.map_err(|error| failed("the tenant's folder".to_owned(), error))?;
        }
        for (key, text) in writes {
            let put = change(self.database, self.lock, || self.upstream.put(self.tenant, key, text)).await;
            put.map_err(|error| failed(format!("{:?}", key.as_str()), error))?;
        }
        for key in there.secrets.iter().map(|secret| &secret.key).filter(|key| (self.goes_back)(key)) {
            if !wanted.contains_key(key) {
                let deleted = change(self.database, self.lock, || self.upstream.delete(self.tenant, key)).await;
                deleted.map_err(|error| failed(format!("{:?}", key.as_str()), error))?;
            }
        }
        self.compare(&served, &self.read().await?)
    }

    /// The tenant's keys that go back, as they are served.
    async fn served(&self) -> Result<BTreeMap<SecretKey, Stored>, RollbackError> {
        let mut served = BTreeMap::new();
        for (key, held) in self.database.find_all(self.tenant).await?.secrets {
            match held {
                _ if !(self.goes_back)(&key) => {}
                // Stored before the configuration named it: upstream has it as our master key, if at all.
                _ if self.upstream.withholds(self.tenant, &key) => {}
                // Its master key is missing, so the text that it was taken over as cannot be read.
                Held::Present(Stored {
                    text: Some(Err(OpenError::UnknownMasterKey(_) | OpenError::NoMasterKey)),
                    ..
                }) => {
                    return Err(RollbackError::Unreadable(key.as_str().to_owned()));
                }
                Held::Present(stored) => drop(served.insert(key, stored)),
                Held::Unreadable(_) => return Err(RollbackError::Unreadable(key.as_str().to_owned())),
                Held::Absent | Held::Unknown | Held::Unusable(_) => {}
            }
        }
        Ok(served)
    }

    async fn read(&self) -> Result<Snapshot, RollbackError> {
        let read = call_patiently(|| self.upstream.snapshot(self.tenant, None, Lane::Interactive)).await;
        match read.map_err(RollbackError::Upstream)? {
            Fetched::Changed(snapshot) => Ok(snapshot),
            Fetched::Unchanged => {
                Err(RollbackError::Upstream(UpstreamError::Malformed("it says unchanged, and nothing was known")))
            }
        }
    }

    /// Refuses the push where somebody has changed upstream since the switch: the change must not
    /// be overwritten, nor silently served from then on. A text that is to be written anyway is no
    /// such change: an earlier push that was killed has written it, perhaps as the value of a
    /// reference that resolves to another value by now.
    fn refuse_where_ahead(
        &self,
        served: &BTreeMap<SecretKey, Stored>,
        wanted: &Texts,
        there: &Snapshot,
        keys: &[SecretKey],
    ) -> Result<(), RollbackError> {
        let is_meant = |key: &SecretKey| keys.contains(key) || !(self.goes_back)(key);
        let is_as_taken = |key: &SecretKey, text: &SecretValue, value: &SecretValue| {
            served.get(key).is_some_and(|stored| match &stored.text {
                Some(Ok(taken)) => taken.same_as(text),
                // It does not open, which proves nothing about upstream: the values are compared.
                Some(Err(_)) => stored.value.same_as(value),
                None => stored.value.same_as(text),
            })
        };
        let is_written = |key: &SecretKey, text: &SecretValue| wanted.get(key).is_some_and(|own| own.same_as(text));
        let changed = there.secrets.iter().filter(|secret| {
            let (key, text) = (&secret.key, secret.written());
            !is_as_taken(key, text, &secret.value) && !is_written(key, text)
        });
        let mut ahead: Vec<SecretKey> = changed.map(|secret| secret.key.clone()).filter(|key| !is_meant(key)).collect();
        let flawed = there.flaws().unusable.into_keys().filter(|key| !is_meant(key));
        ahead.extend(flawed);
        // A key that is missing there is written: a killed push may have made half of a folder.
        ahead.sort_unstable();
        ahead.dedup();
        if ahead.is_empty() { Ok(()) } else { Err(RollbackError::Ahead(ahead)) }
    }

    /// The text that each served key is to have upstream: the one that it was taken over as, if it
    /// still resolves to the served value, else the value itself.
    fn wanted(&self, served: &BTreeMap<SecretKey, Stored>, keys: &[SecretKey]) -> Result<Texts, RollbackError> {
        let mut texts: Texts = BTreeMap::new();
        let mut unpushable = Vec::new();
        for (key, stored) in served {
            let text = match &stored.text {
                Some(Ok(text)) if stored.source == Source::Infisical => text,
                Some(_) | None => &stored.value,
            };
            // Upstream would read it as a reference, and nobody here meant it as one.
            let is_taken_as_it_is = matches!(stored.text, Some(Ok(_))) || !keys.contains(key);
            let refers = self.upstream.reads_references() && references::refers(text.expose());
            if refers && !is_taken_as_it_is {
                unpushable.push(format!(
                    "{:?}: it was written as a text with ${{...}} in it, and upstream would read that as a reference",
                    key.as_str()
                ));
            }
            texts.insert(key.clone(), text.clone());
        }
        // A value replaces its text only where the text resolves to another value by now; keys that
        // refer to it are checked again, because they may be right then.
        while unpushable.is_empty() {
            let others = self.others(served, &texts);
            let is_root = |key: &&SecretKey| {
                let mut names = references::names(texts[*key].expose());
                !names.any(|name| others.iter().any(|other| other.as_str() == name))
            };
            let roots: Vec<SecretKey> = others.iter().filter(is_root).cloned().collect();
            let replaced = if roots.is_empty() { others } else { roots };
            if replaced.is_empty() {
                break;
            }
            for key in replaced {
                let value = served[&key].value.clone();
                if references::refers(value.expose()) {
                    unpushable.push(format!(
                        "{:?}: its reference would be another value than the one that is served, which has ${{...}} in it",
                        key.as_str()
                    ));
                }
                texts.insert(key, value);
            }
        }
        if unpushable.is_empty() { Ok(texts) } else { Err(RollbackError::Unpushable(unpushable)) }
    }

    /// The keys whose texts resolve to other values than the served ones.
    fn others(&self, served: &BTreeMap<SecretKey, Stored>, texts: &Texts) -> Vec<SecretKey> {
        let named = texts.iter().map(|(key, text)| (key.as_str(), Some(text.expose()))).collect();
        let resolved = self.upstream.resolve(self.tenant, named);
        let is_other = |(key, stored): &(&SecretKey, &Stored)| {
            let value = resolved.get(key.as_str()).and_then(|resolved| resolved.value.as_ref());
            value.is_some_and(|value| !value.same_as(&stored.value))
        };
        served.iter().filter(is_other).map(|(key, _)| key.clone()).collect()
    }

    /// Compares upstream's content now with the served values, both ways.
    fn compare(&self, served: &BTreeMap<SecretKey, Stored>, there: &Snapshot) -> Result<(), RollbackError> {
        let value =
            |key: &SecretKey| there.secrets.iter().find(|secret| secret.key == *key).map(|secret| &secret.value);
        let differs =
            |(key, stored): &(&SecretKey, &Stored)| value(key).is_none_or(|there| !there.same_as(&stored.value));
        let mut different: Vec<SecretKey> = served.iter().filter(differs).map(|(key, _)| key.clone()).collect();
        let more = there.secrets.iter().map(|secret| &secret.key).filter(|key| (self.goes_back)(key));
        different.extend(more.filter(|key| !served.contains_key(*key)).cloned());
        if different.is_empty() { Ok(()) } else { Err(RollbackError::ReadBack(different)) }
    }
}

fn failed(what: String, error: ChangeError) -> RollbackError {
    match error {
        ChangeError::Upstream(source) => RollbackError::Push { what, source },
        ChangeError::Store(error) => error.into(),
    }
}

fn written_there<'s>(there: &'s Snapshot, key: &SecretKey) -> Option<&'s SecretValue> {
    there.secrets.iter().find(|secret| secret.key == *key).map(|secret| secret.written())
}
