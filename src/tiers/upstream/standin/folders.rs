//! Folders, imports, tags and the project itself.

use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    exchange::Reply,
    fields::Fields,
    routes::Asked,
    secrets::{NOT_A_MEMBER, find_by_path, not_allowed_to},
    tokens::{Action, Rights},
    world::{Folder, State, Tag},
};
use crate::clock::Timestamp;

/// Rights to read are not checked: every member sees all folders.
pub(super) fn list(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let query = asked.call.query();
    let mut fields = Fields::of(&query);
    let project = fields.required(asked.project_field());
    let environment = fields.required("environment");
    let path = fields.path("path");
    let tells = asked.state.tells_changes;
    let recursive = (asked.state.is_newer() || tells) && fields.flag("recursive", false);
    let since = fields.optional("lastSecretModified").filter(|_| tells);
    let since = since.and_then(|since| Timestamp::from_rfc3339(&since));
    fields.check()?;

    asked.enter(&project)?;
    if asked.state.find_environment(&environment).is_none() {
        return Err(Reply::error(400, "get folders", "Environment not found"));
    }
    let state = &*asked.state;
    let Some(folder) = find_by_path(state, &environment, &path)? else { return Ok(json!({"folders": []})) };
    let is_meant = |id: &Uuid| since.is_none_or(|since| state.folders[id].secrets_changed >= Some(since));
    let folders: Vec<Value> = if recursive {
        let below = state.below(folder, "").into_iter().skip(1).filter(|(id, _)| is_meant(id));
        below.map(|(id, path)| with(describe(state, &state.folders[&id]), "relativePath", &path)).collect()
    } else {
        let children = state.folders[&folder].children.iter().filter(|child| is_meant(child));
        children.map(|child| describe(state, &state.folders[child])).collect()
    };
    Ok(json!({"folders": folders}))
}

pub(super) fn get(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    asked.enter(&asked.state.project.id.clone())?;
    let folder = asked.parameter.parse().ok().and_then(|id: Uuid| asked.state.folders.get(&id));
    folder.map(|folder| answer(asked.state, folder)).ok_or_else(|| Reply::error(400, "Get folder", "Folder not found"))
}

/// Answers with an existing folder as it is, or creates it and the folders above it.
pub(super) fn create(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let mut fields = Fields::of_body(asked.body)?;
    let project = fields.required(asked.project_field());
    let environment = fields.required("environment");
    let name = fields.required("name");
    let path = fields.path("path");
    fields.check()?;

    asked.allow(&project, Action::Create, &environment, &path)?;
    let state = &mut *asked.state;
    let at = state
        .find_environment(&environment)
        .ok_or_else(|| Reply::error(400, "Create folder", "Environment not found"))?;
    find_by_path(state, &environment, &format!("{path}/{name}"))?;
    if !state.has_room() || path.split('/').count() > DEEPEST || path.len().max(name.len()) > LONGEST_PATH {
        return Err(Reply::error(500, "Create", "Something went wrong"));
    }
    let parent = state.folder_or_new(at, &path);
    let folder = if name.is_empty() {
        parent
    } else {
        match state.child(parent, &name) {
            Some(known) => known,
            None => state.new_folder(&name, at, Some(parent)),
        }
    };
    Ok(answer(state, &state.folders[&folder]))
}

pub(super) fn rename(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let mut fields = Fields::of_body(asked.body)?;
    let name = fields.required("name");
    let folder = asked.folder_to_change(fields, Action::Edit, "Update folder")?;
    asked.state.rename_folder(folder, name.chars().take(LONGEST_PATH).collect());
    Ok(answer(asked.state, &asked.state.folders[&folder]))
}

/// A newer server deletes a folder with content only if it is told to.
pub(super) fn delete(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let fields = Fields::of_body(asked.body)?;
    let forced = !asked.state.is_newer() || asked.body["forceDelete"] == json!(true);
    let folder = asked.folder_to_change(fields, Action::Delete, "Delete folder")?;
    let Folder { children, secrets, imports, .. } = &asked.state.folders[&folder];
    let empty = children.is_empty() && secrets.is_empty() && imports.is_empty();
    if !(empty || forced) {
        // The refusal is documented, but its wording is not.
        return Err(Reply::error(400, "BadRequest", "Folder is not empty"));
    }
    let deleted = answer(asked.state, &asked.state.folders[&folder]);
    asked.state.remove_folder(folder);
    Ok(deleted)
}

pub(super) fn create_import(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let mut fields = Fields::of_body(asked.body)?;
    let project = fields.required("workspaceId");
    let environment = fields.required("environment");
    let path = fields.path("path");
    let from = fields.object("import", |import| (import.required("environment"), import.path("path")));
    fields.check()?;
    let (from_environment, from_path) = from.unwrap_or_default();

    asked.allow(&project, Action::Create, &environment, &path)?;
    let state = &mut *asked.state;
    let failed = |what: &str| Reply::error(400, "Create import", what);
    let folder = find_by_path(state, &environment, &path)?.ok_or_else(|| failed("Folder not found"))?;
    let from = state.find_environment(&from_environment).ok_or_else(|| failed("Environment not found"))?;
    if !state.has_room() || state.folders[&folder].imports.len() >= MOST_IMPORTS || from_path.len() > LONGEST_PATH {
        return Err(Reply::error(500, "Create", "Something went wrong"));
    }
    let now = state.clock.now();
    state.add_import(folder, from, &from_path, now);

    let imports = &state.folders[&folder].imports;
    let Some(import) = imports.last() else { return Err(failed("Folder not found")) };
    let environment = &state.environments[from];
    Ok(json!({
        "message": "Successfully created secret import",
        "secretImport": {
            "id": import.id,
            "version": 1,
            "importPath": import.path,
            "position": imports.len(),
            "createdAt": import.created.to_rfc3339(),
            "updatedAt": import.created.to_rfc3339(),
            "folderId": folder,
            "isReplication": false,
            "isReplicationSuccess": null,
            "replicationStatus": null,
            "lastReplicated": null,
            "isReserved": false,
            "importEnv": {"name": environment.name, "slug": environment.slug, "id": environment.id},
        },
    }))
}

pub(super) fn create_tag(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let mut fields = Fields::of_body(asked.body)?;
    let slug = fields.required("slug");
    let color = fields.required("color");
    let name = fields.optional("name").unwrap_or_else(|| slug.clone());
    fields.check()?;

    asked.allow(asked.parameter, Action::Create, "", "/")?;
    let state = &mut *asked.state;
    if state.tags.len() >= MOST_TAGS || [&slug, &color, &name].iter().any(|text| text.len() > LONGEST_PATH) {
        return Err(Reply::error(500, "Create", "Something went wrong"));
    }
    let tag = Tag { id: Uuid::new_v4(), slug, name, color };
    let now = state.clock.now().to_rfc3339();
    let described = json!({"workspaceTag": {
        "id": tag.id,
        "slug": tag.slug,
        "color": tag.color,
        "createdAt": now,
        "updatedAt": now,
        "createdBy": asked.identity.map(|identity| identity.id),
        "projectId": state.project.id,
        "createdByActorType": "identity",
    }});
    state.tags.push(tag);
    Ok(described)
}

pub(super) fn project(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    asked.enter(asked.parameter)?;
    Ok(json!({"workspace": describe_project(asked.state)}))
}

pub(super) fn project_by_slug(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    if asked.parameter != asked.state.project.slug {
        return Err(Reply::error(400, "BadRequest", "Failed to find project"));
    }
    asked.enter(&asked.state.project.id.clone())?;
    Ok(describe_project(asked.state))
}

impl Asked<'_> {
    /// The field in which a request names its project.
    pub(super) fn project_field(&self) -> &'static str {
        if self.state.is_newer() { "projectId" } else { "workspaceId" }
    }

    /// Whether the identity is a member of this project.
    pub(super) fn enter(&self, project: &str) -> Result<(), Reply> {
        let member = self.identity.is_some_and(|identity| identity.rights != Rights::NotMember);
        if member && project == self.state.project.id {
            return Ok(());
        }
        Err(Reply::error(403, "Identity not in project", NOT_A_MEMBER))
    }

    /// Whether the identity may do this.
    pub(super) fn allow(&self, project: &str, action: Action, environment: &str, path: &str) -> Result<(), Reply> {
        self.enter(project)?;
        if self.identity.is_some_and(|identity| identity.rights.allow(action, environment, path)) {
            return Ok(());
        }
        Err(not_allowed_to(match action {
            Action::Read => "read",
            Action::Create => "create",
            Action::Edit => "edit",
            Action::Delete => "delete",
        }))
    }

    /// The folder that the path's parameter names by its id, or by its name in a folder.
    fn folder_to_change(&self, mut fields: Fields<'_>, action: Action, doing: &str) -> Result<Uuid, Reply> {
        let project = fields.required(self.project_field());
        let environment = fields.required("environment");
        let path = fields.path("path");
        fields.check()?;
        self.allow(&project, action, &environment, &path)?;
        let above = find_by_path(self.state, &environment, &path)?.ok_or_else(|| missing(doing))?;
        let by_id = || {
            let id = self.parameter.parse().ok()?;
            (self.state.folders.get(&id)?.parent == Some(above)).then_some(id)
        };
        self.state.child(above, self.parameter).or_else(by_id).ok_or_else(|| missing(doing))
    }
}

fn missing(doing: &str) -> Reply {
    Reply::error(400, doing, "Folder not found")
}

fn answer(state: &State, folder: &Folder) -> Value {
    json!({"folder": describe(state, folder)})
}

fn describe(state: &State, folder: &Folder) -> Value {
    let described = json!({
        "id": folder.id,
        "name": folder.name,
        "version": folder.version,
        "createdAt": folder.created.to_rfc3339(),
        "updatedAt": folder.updated.to_rfc3339(),
        "envId": state.environments[folder.environment].id,
        "parentId": folder.parent,
        "isReserved": false,
    });
    match folder.secrets_changed.filter(|_| state.tells_changes) {
        Some(at) => with(described, "lastSecretModified", &at.to_rfc3339()),
        None => described,
    }
}

fn with(mut object: Value, name: &str, value: &str) -> Value {
    object[name] = json!(value);
    object
}

fn describe_project(state: &State) -> Value {
    let environments: Vec<Value> = state
        .environments
        .iter()
        .map(|environment| json!({"name": environment.name, "slug": environment.slug, "id": environment.id}))
        .collect();
    let now = state.clock.now().to_rfc3339();
    json!({
        "id": state.project.id,
        "_id": state.project.id,
        "name": state.project.name,
        "slug": state.project.slug,
        "autoCapitalization": true,
        "orgId": Uuid::nil(),
        "createdAt": now,
        "updatedAt": now,
        "version": 3,
        "upgradeStatus": null,
        "pitVersionLimit": 10,
        "kmsCertificateKeyId": null,
        "auditLogsRetentionDays": null,
        "environments": environments,
    })
}

const DEEPEST: usize = 64;
const LONGEST_PATH: usize = 4096;
const MOST_IMPORTS: usize = 100;
const MOST_TAGS: usize = 1000;
