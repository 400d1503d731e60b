//! Secrets: lists with recursion, imports and references, single reads, and writes.

use std::{cell::Cell, collections::HashMap};

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{
    exchange::{Call, Reply},
    expand::Expander,
    fields::Fields,
    routes::Asked,
    surrogates,
    tokens::{Action, Rights},
    world::{Dialect, Folder, Secret, State, Unreadable},
};

pub(super) const NOT_A_MEMBER: &str = "You are not allowed to access this resource";

pub(super) fn list(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let query = asked.call.query();
    let newer = asked.state.is_newer();
    let mut fields = Fields::of(&query);
    let project = fields.optional(asked.project_field());
    let slug = fields.optional("workspaceSlug");
    let environment = fields.optional("environment");
    let path = fields.path("secretPath");
    let recursive = fields.flag("recursive", false);
    let expand = fields.flag("expandSecretReferences", newer);
    let with_imports = fields.flag(if newer { "includeImports" } else { "include_imports" }, newer);
    let tags = fields.optional("tagSlugs");
    fields.check()?;

    let project = asked.project_by(project, slug)?;
    let (Some(project), Some(environment)) = (project, environment) else {
        return Err(Reply::error(400, "BadRequest", "Missing workspace id or environment"));
    };
    asked.enter_by_bot(&project)?;
    if !recursive {
        asked.allow(&project, Action::Read, &environment, &path)?;
    }
    let state = &*asked.state;
    if recursive && state.find_environment(&environment).is_none() {
        let message = format!("'{environment}' environment not found in project with ID {project}");
        return Err(Reply::error(500, "Internal Server Error", &message));
    }
    let Some(folder) = find_by_path(state, &environment, &path)? else {
        let empty =
            if recursive && !with_imports { json!({"secrets": []}) } else { json!({"secrets": [], "imports": []}) };
        return Ok(empty);
    };
    let rights = asked.identity.map_or(&Rights::NoAccess, |identity| &identity.rights);
    let mut folders = if recursive { state.below(folder, &path) } else { vec![(folder, path)] };
    folders.retain(|(_, path)| rights.allow(Action::Read, &environment, path));

    let reader = Reader { state, rights, expand };
    let mut secrets = Vec::new();
    for (folder, path) in &folders {
        let folder = &state.folders[folder];
        let values = reader.values_of(folder)?;
        for secret in folder.secrets.values().filter(|secret| has_tag(state, secret, tags.as_deref())) {
            let mut described = describe(state, folder, secret, &values[&secret.id]);
            described.insert("secretPath".to_owned(), json!(path));
            described.insert("tags".to_owned(), tags_of(state, secret));
            secrets.push((secret.id, described));
        }
    }
    secrets.sort_by_key(|(id, _)| *id);
    let secrets: Vec<_> = secrets.into_iter().map(|(_, secret)| secret).collect();
    if !with_imports {
        return Ok(json!({"secrets": secrets}));
    }
    let mut imports = Vec::new();
    for (folder, _) in &folders {
        imports.extend(reader.imports_of(&state.folders[folder])?);
    }
    Ok(json!({"secrets": secrets, "imports": imports}))
}

/// The folder of a list; `None` for a list of everything below a folder.
pub(super) fn listed_folder(call: &Call) -> Option<String> {
    let query = call.query();
    let mut fields = Fields::of(&query);
    let path = fields.path("secretPath");
    (!fields.flag("recursive", false)).then_some(path)
}

/// A single get expands no reference into its own folder, and answers an imported secret without
/// its value.
pub(super) fn get(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let query = asked.call.query();
    let newer = asked.state.is_newer();
    let mut fields = Fields::of(&query);
    let project = fields.optional(asked.project_field());
    let slug = fields.optional("workspaceSlug");
    let environment = fields.optional("environment");
    let path = fields.path("secretPath");
    let kind = fields.choice("type", &["shared", "personal"], "shared");
    let expand = fields.flag("expandSecretReferences", newer);
    let with_imports = fields.flag(if newer { "includeImports" } else { "include_imports" }, newer);
    fields.check()?;

    let Some(project) = asked.project_by(project, slug)? else {
        return Err(Reply::error(400, "BadRequest", "You must provide workspaceSlug or workspaceId"));
    };
    let Some(environment) = environment else { return Err(Reply::error(400, "BadRequest", "Missing environment")) };
    asked.enter_by_bot(&project)?;
    asked.allow(&project, Action::Read, &environment, &path)?;
    let state = &*asked.state;
    let folder = find_by_path(state, &environment, &path)?.ok_or_else(folder_not_found)?;
    let folder = &state.folders[&folder];
    let name = trim(asked.parameter);
    let rights = asked.identity.map_or(&Rights::NoAccess, |identity| &identity.rights);
    if kind == "shared"
        && let Some(secret) = folder.secrets.values().find(|secret| secret.name == name)
    {
        let mut value = secret.value.clone();
        if expand {
            let alone = HashMap::from([(name.to_owned(), value.clone())]);
            let reader = Reader { state, rights, expand };
            value = reader.expand(&alone, |expander| expander.expand(name).unwrap_or_default())?;
        }
        let mut described = describe(state, folder, secret, &value);
        described.insert("tags".to_owned(), tags_of(state, secret));
        if newer {
            described.insert("secretPath".to_owned(), json!(path));
        }
        return Ok(json!({"secret": described}));
    }
    if with_imports {
        for (imported, _) in imported_folders(state, folder, rights).into_iter().rev() {
            if let Some(secret) = imported.secrets.values().find(|secret| secret.name == name) {
                return Ok(json!({"secret": describe(state, imported, secret, "")}));
            }
        }
    }
    Err(secret_not_found())
}

pub(super) fn create(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let name = trim(asked.parameter).to_owned();
    let mut place = None;
    let mut written = None;
    let mut kind = "shared";
    asked.read_write(|fields, project_field| {
        place = Some(Place::read(fields, project_field));
        written = Some(Written::read(fields, true));
        kind = fields.choice("type", &["shared", "personal"], "shared");
    })?;
    let (Some(place), Some(mut written)) = (place, written) else { return Err(secret_not_found()) };
    written.name = name;

    let folder = asked.folder_for(&place, Action::Create)?;
    if kind == "personal" {
        return Err(Reply::error(400, "BadRequest", "Must be user to create personal secret"));
    }
    if written.name.contains('\0') {
        return Err(Reply::error(500, "Find one", "Something went wrong"));
    }
    let state = &mut *asked.state;
    if state.find_secret(folder, &written.name).is_some() {
        return Err(Reply::error(400, "BadRequest", "Secret already exist"));
    }
    let created = add(state, folder, &written, Uuid::new_v4())?;
    if written.name == "__proto__" {
        // The secret exists all the same.
        return Err(Reply::error(500, "Internal Server Error", "acc[groupId].push is not a function"));
    }
    Ok(json!({"secret": created}))
}

pub(super) fn update(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let mut place = None;
    let mut written = None;
    let mut new_name = None;
    asked.read_write(|fields, project_field| {
        place = Some(Place::read(fields, project_field));
        written = Some(Written::read(fields, false));
        new_name = fields.optional("newSecretName");
    })?;
    let (Some(place), Some(mut written)) = (place, written) else { return Err(secret_not_found()) };
    written.name = trim(asked.parameter).to_owned();
    let new_name = new_name.map(|name| trim(&surrogates::replace(&name)).to_owned());

    let folder = asked.folder_for(&place, Action::Edit)?;
    let state = &mut *asked.state;
    let id = state.find_secret(folder, &written.name).ok_or_else(secret_not_found)?;
    if let Some(new_name) = &new_name {
        if state.find_secret(folder, new_name).is_some_and(|other| other != id) {
            return Err(Reply::error(400, "BadRequest", "Secret with the new name already exist"));
        }
        if new_name.len() > LONGEST_NAME {
            return Err(cannot_create());
        }
        written.new_name = Some(new_name.clone());
    }
    Ok(json!({"secret": change(state, folder, id, &written)?}))
}

pub(super) fn delete(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let mut place = None;
    asked.read_write(|fields, project_field| place = Some(Place::read(fields, project_field)))?;
    let Some(place) = place else { return Err(secret_not_found()) };

    let folder = asked.folder_for(&place, Action::Delete)?;
    let name = trim(asked.parameter);
    let Some(id) = asked.state.find_secret(folder, name) else {
        if asked.state.dialect != Dialect::August2024 {
            return Err(secret_not_found());
        }
        let message = "Cannot read properties of undefined (reading 'encryptedValue')";
        return Err(Reply::error(500, "Internal Server Error", message));
    };
    Ok(json!({"secret": remove(asked.state, folder, id)?}))
}

/// Reads values, for a caller with these rights.
struct Reader<'a> {
    state: &'a State,
    rights: &'a Rights,
    /// Whether references are replaced.
    expand: bool,
}

/// A name that is given twice makes two secrets; if one exists already, or is too long, none is
/// made.
pub(super) fn create_batch(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let (place, batch) = asked.read_batch(true)?;
    let folder = asked.folder_for(&place, Action::Create)?;
    let state = &mut *asked.state;
    let known = known_names(state, folder, &batch);
    if !known.is_empty() {
        return Err(Reply::error(400, "BadRequest", &format!("Secret already exist: {}", known.join(","))));
    }
    if batch.iter().any(|written| written.name.len() > LONGEST_NAME) || !state.has_room() {
        return Err(cannot_create());
    }
    // The order in which two secrets of one name are listed is not left to chance.
    let mut ids: Vec<Uuid> = batch.iter().map(|_| Uuid::new_v4()).collect();
    ids.sort_unstable();
    let created =
        batch.iter().zip(ids).map(|(written, id)| add(state, folder, written, id)).collect::<Result<Vec<_>, _>>()?;
    Ok(json!({"secrets": created}))
}

pub(super) fn update_batch(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let (place, batch) = asked.read_batch(true)?;
    let folder = asked.folder_for(&place, Action::Edit)?;
    let ids = known_ids(asked.state, folder, &batch, "Secret does not exist")?;
    let mut changed = Vec::new();
    for (id, written) in ids.into_iter().zip(&batch) {
        changed.push(change(asked.state, folder, id, written)?);
    }
    Ok(json!({"secrets": changed}))
}

pub(super) fn delete_batch(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let (place, batch) = asked.read_batch(false)?;
    let folder = asked.folder_for(&place, Action::Delete)?;
    let mut ids = known_ids(asked.state, folder, &batch, "One or more secrets does not exist")?;
    ids.sort_unstable();
    ids.dedup();
    let mut removed = Vec::new();
    for id in ids {
        removed.push(remove(asked.state, folder, id)?);
    }
    Ok(json!({"secrets": removed}))
}

pub(super) fn not_allowed_to(action: &str) -> Reply {
    Reply::error(401, "PermissionDenied", &format!("You are not allowed to {action} on secrets"))
}

/// The folder, if it exists. A path with any character but those of names is an error.
pub(super) fn find_by_path(state: &State, environment: &str, path: &str) -> Result<Option<Uuid>, Reply> {
    if path.chars().any(|c| !c.is_ascii_alphanumeric() && !"-_/".contains(c)) {
        return Err(Reply::error(500, "Find by secret path", "Something went wrong"));
    }
    Ok(state.find_folder(environment, path))
}

/// The target of a write.
struct Place {
    project: String,
    environment: String,
    path: String,
}

impl Place {
    fn read(fields: &mut Fields<'_>, project_field: &str) -> Self {
        Self {
            project: fields.required(project_field),
            environment: fields.required("environment"),
            path: fields.path("secretPath"),
        }
    }
}

/// The content of a write.
struct Written {
    name: String,
    /// As it was sent, and as it is returned.
    value: Option<String>,
    comment: Option<String>,
    tags: Option<Vec<String>>,
    new_name: Option<String>,
}

impl Written {
    fn read(fields: &mut Fields<'_>, with_value: bool) -> Self {
        let value = if with_value { Some(fields.required("secretValue")) } else { fields.optional("secretValue") };
        let tags = fields.strings("tagIds");
        Self {
            name: String::new(),
            value: value.map(|value| trim_value(&value)),
            comment: fields.optional("secretComment").map(|comment| trim(&comment).to_owned()),
            tags: (!tags.is_empty()).then_some(tags),
            new_name: None,
        }
    }
}

impl Asked<'_> {
    fn project_by(&self, id: Option<String>, slug: Option<String>) -> Result<Option<String>, Reply> {
        match (id, slug) {
            (None, Some(slug)) if slug == self.state.project.slug => Ok(Some(self.state.project.id.clone())),
            (None, Some(_)) => Err(Reply::error(500, "Failed to find project by slug", "Something went wrong")),
            (id, _) => Ok(id),
        }
    }

    /// The recorded server looks for the project's bot before it looks at members.
    fn enter_by_bot(&self, project: &str) -> Result<(), Reply> {
        if project != self.state.project.id && !self.state.foreign_projects.contains(project) {
            return Err(Reply::error(400, "BadRequest", "Project not found during bot lookup."));
        }
        self.enter(project)
    }

    fn read_write(&self, read: impl FnOnce(&mut Fields<'_>, &str)) -> Result<(), Reply> {
        let mut fields = Fields::of_body(self.body)?;
        read(&mut fields, self.project_field());
        fields.check()
    }

    fn read_batch(&self, with_values: bool) -> Result<(Place, Vec<Written>), Reply> {
        let mut fields = Fields::of_body(self.body)?;
        let place = Place::read(&mut fields, self.project_field());
        let batch = fields.objects("secrets", |secret| {
            let name = secret.required("secretKey");
            let mut written = Written::read(secret, with_values);
            written.name = trim(&surrogates::replace(&name)).to_owned();
            written
        });
        fields.check()?;
        Ok((place, batch))
    }

    fn folder_for(&self, place: &Place, action: Action) -> Result<Uuid, Reply> {
        self.enter_by_bot(&place.project)?;
        self.allow(&place.project, action, &place.environment, &place.path)?;
        find_by_path(self.state, &place.environment, &place.path)?.ok_or_else(folder_not_found)
    }
}

fn known_names(state: &State, folder: Uuid, batch: &[Written]) -> Vec<String> {
    let names = batch.iter().map(|written| written.name.clone());
    names.filter(|name| state.find_secret(folder, name).is_some()).collect()
}

/// The server counts the secrets that it finds under all names of a batch; if that is not the
/// number of names, its error message lists the secrets that it has found.
fn known_ids(state: &State, folder: Uuid, batch: &[Written], complaint: &str) -> Result<Vec<Uuid>, Reply> {
    let secrets = state.folders[&folder].secrets.values();
    let found: Vec<_> = secrets.filter(|secret| batch.iter().any(|written| written.name == secret.name)).collect();
    if found.len() != batch.len() {
        let known: Vec<&str> = found.iter().map(|secret| secret.name.as_str()).collect();
        let complaint = if state.dialect == Dialect::August2024 { "Secret not exist" } else { complaint };
        return Err(Reply::error(400, "BadRequest", &format!("{complaint}: {}", known.join(","))));
    }
    let ids = batch.iter().map(|written| state.find_secret(folder, &written.name));
    ids.collect::<Option<_>>().ok_or_else(secret_not_found)
}

fn add(state: &mut State, folder: Uuid, written: &Written, id: Uuid) -> Result<Map<String, Value>, Reply> {
    if !state.has_room() {
        return Err(cannot_create());
    }
    let sent = written.value.as_deref().unwrap_or_default();
    let mut secret = Secret::new(id, &written.name, &surrogates::replace(sent), state.clock.now());
    secret.comment = surrogates::replace(written.comment.as_deref().unwrap_or_default());
    secret.tags = known_tags(state, written);
    let described = describe(state, &state.folders[&folder], &secret, sent);
    state.add_secret(folder, secret);
    Ok(described)
}

/// The answer contains the comment that was sent, not the stored one.
fn change(state: &mut State, folder: Uuid, id: Uuid, written: &Written) -> Result<Map<String, Value>, Reply> {
    if !state.has_room() {
        return Err(cannot_create());
    }
    let now = state.clock.now();
    let tags = written.tags.is_some().then(|| known_tags(state, written));
    state.change_secret(folder, id, |secret| {
        if let Some(value) = &written.value {
            secret.value = surrogates::replace(value);
        }
        if let Some(comment) = &written.comment {
            secret.comment = surrogates::replace(comment);
        }
        if let Some(name) = &written.new_name {
            secret.name.clone_from(name);
        }
        if let Some(tags) = tags {
            secret.tags = tags;
        }
        secret.version += 1;
        secret.updated = now;
    });
    let folder = &state.folders[&folder];
    let secret = folder.secrets.get(&id).ok_or_else(secret_not_found)?;
    let mut described = describe(state, folder, secret, written.value.as_deref().unwrap_or(&secret.value));
    described.insert("secretComment".to_owned(), json!(written.comment.as_deref().unwrap_or_default()));
    Ok(described)
}

fn remove(state: &mut State, folder: Uuid, id: Uuid) -> Result<Map<String, Value>, Reply> {
    let secret = state.remove_secret(folder, id).ok_or_else(secret_not_found)?;
    Ok(describe(state, &state.folders[&folder], &secret, &secret.value))
}

fn describe(state: &State, folder: &Folder, secret: &Secret, value: &str) -> Map<String, Value> {
    let described = json!({
        "id": secret.id,
        "_id": secret.id,
        "workspace": state.project.id,
        "environment": state.environments[folder.environment].slug,
        "version": secret.version,
        "type": "shared",
        "secretKey": secret.name,
        "secretValue": value,
        "secretComment": secret.comment,
        "secretReminderNote": null,
        "secretReminderRepeatDays": null,
        "skipMultilineEncoding": false,
        "metadata": null,
        "createdAt": secret.created.to_rfc3339(),
        "updatedAt": secret.updated.to_rfc3339(),
    });
    match hidden_where_it_is(secret, described) {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

impl Reader<'_> {
    /// The values of a folder's secrets by id. Where references are replaced, secrets of one
    /// name all get the value of the last.
    fn values_of(&self, folder: &Folder) -> Result<HashMap<Uuid, String>, Reply> {
        let secrets = folder.secrets.values();
        if !self.expand {
            return Ok(secrets.map(|secret| (secret.id, secret.value.clone())).collect());
        }
        let by_name: HashMap<String, String> =
            secrets.clone().map(|secret| (secret.name.clone(), secret.value.clone())).collect();
        self.expand(&by_name, |expander| {
            secrets.map(|secret| (secret.id, expander.expand(&secret.name).unwrap_or_default())).collect()
        })
    }

    /// Replaces references as this kind of server does, including those into other folders.
    fn expand<T>(
        &self,
        values: &HashMap<String, String>,
        work: impl FnOnce(&mut Expander<'_>) -> T,
    ) -> Result<T, Reply> {
        let (state, refused) = (self.state, Cell::new(false));
        let elsewhere = |environment: &str, path: &str, name: &str| {
            let value = value_at(state, environment, path, name)?;
            let followed = state.unreadable == Unreadable::Followed;
            if followed || self.rights.allow(Action::Read, environment, path) {
                return Some(value);
            }
            refused.set(true);
            None
        };
        let expanded = work(&mut Expander::new(values, &elsewhere, state.dialect == Dialect::October2024));
        if refused.get() && state.unreadable == Unreadable::Refused {
            return Err(Reply::error(403, "ForbiddenError", "Failed to expand one or more secret references"));
        }
        Ok(expanded)
    }

    fn imports_of(&self, folder: &Folder) -> Result<Vec<Value>, Reply> {
        let Self { state, rights, .. } = *self;
        let describe_import = |(imported, path): (&Folder, &str)| {
            let mut reached = Vec::new();
            reached_from(state, imported, rights, &mut reached);
            let mut secrets: Vec<Value> = Vec::new();
            for folder in reached {
                let values = self.values_of(folder)?;
                let describe_imported = |secret: &Secret| {
                    let described = json!({
                        "id": secret.id,
                        "_id": secret.id,
                        "workspace": "",
                        "environment": state.environments[imported.environment].slug,
                        "version": secret.version,
                        "type": "shared",
                        "secretKey": secret.name,
                        "secretValue": values[&secret.id],
                        "skipMultilineEncoding": false,
                        "metadata": null,
                    });
                    hidden_where_it_is(secret, described)
                };
                secrets.extend(folder.secrets.values().map(describe_imported));
            }
            Ok(json!({
                "secretPath": path,
                "environment": state.environments[imported.environment].slug,
                "folderId": imported.id,
                "secrets": secrets,
            }))
        };
        imported_folders(state, folder, rights).into_iter().map(describe_import).collect()
    }
}

fn value_at(state: &State, environment: &str, path: &str, name: &str) -> Option<String> {
    let folder = &state.folders[&state.find_folder(environment, path)?];
    folder.secrets.values().find(|secret| secret.name == name).map(|secret| secret.value.clone())
}

fn hidden_where_it_is(secret: &Secret, mut described: Value) -> Value {
    if secret.is_hidden {
        described["secretValue"] = json!("<hidden-by-infisical>");
        described["secretValueHidden"] = json!(true);
    }
    described
}

/// This folder and those that it imports, and so on: the server lists the secrets of all as those of the
/// first.
fn reached_from<'a>(state: &'a State, folder: &'a Folder, rights: &Rights, reached: &mut Vec<&'a Folder>) {
    if reached.iter().any(|known| known.id == folder.id) {
        return;
    }
    reached.push(folder);
    for (imported, _) in imported_folders(state, folder, rights) {
        reached_from(state, imported, rights, reached);
    }
}

/// The folders that this one imports and that the identity may read.
fn imported_folders<'a>(state: &'a State, folder: &'a Folder, rights: &Rights) -> Vec<(&'a Folder, &'a str)> {
    let readable = folder.imports.iter().filter_map(|import| {
        let environment = &state.environments[import.environment].slug;
        let folder = state.find_folder(environment, &import.path)?;
        let readable = rights.allow(Action::Read, environment, &import.path);
        readable.then_some((&state.folders[&folder], import.path.as_str()))
    });
    readable.collect()
}

fn has_tag(state: &State, secret: &Secret, slugs: Option<&str>) -> bool {
    slugs.is_none_or(|slugs| {
        let wanted = |tag: &&super::world::Tag| slugs.split(',').any(|slug| slug.trim() == tag.slug);
        state.tags.iter().filter(wanted).any(|tag| secret.tags.contains(&tag.id))
    })
}

fn tags_of(state: &State, secret: &Secret) -> Value {
    let tags = state.tags.iter().filter(|tag| secret.tags.contains(&tag.id));
    tags.map(|tag| json!({"id": tag.id, "slug": tag.slug, "color": tag.color, "name": tag.name})).collect()
}

fn known_tags(state: &State, written: &Written) -> Vec<Uuid> {
    let wanted = written.tags.as_deref().unwrap_or_default();
    state.tags.iter().map(|tag| tag.id).filter(|id| wanted.contains(&id.to_string())).collect()
}

fn folder_not_found() -> Reply {
    Reply::error(400, "Create secret", "Folder not found for the given environment slug & secret path")
}

fn secret_not_found() -> Reply {
    Reply::error(400, "BadRequest", "Secret not found")
}

fn cannot_create() -> Reply {
    Reply::error(500, "Create", "Something went wrong")
}

/// Keeps one newline at the end; other white space around the value is removed.
fn trim_value(value: &str) -> String {
    let mut trimmed = trim(value).to_owned();
    if value.ends_with('\n') {
        trimmed.push('\n');
    }
    trimmed
}

/// Trims as JavaScript does: the byte order mark too, but not U+0085.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| (c.is_whitespace() && c != '\u{85}') || c == '\u{feff}')
}

/// The length of the recorded server's column is not known; 101 fit, 600 did not.
const LONGEST_NAME: usize = 500;
