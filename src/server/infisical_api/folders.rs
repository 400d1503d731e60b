//! Folders: the tenants that a token reaches, one made, one that is empty deleted.

use std::collections::BTreeMap;

use http::StatusCode;
use hyper::body::Incoming;
use serde::Serialize;

use super::{InfisicalApi, fields::Fields, place::Place};
use crate::{
    access::Action,
    resolver::FolderError,
    server::{
        ask::{Ask, decode, json},
        operation::{Operation, Run},
        respond::{Answer, JSON, Problem, respond},
    },
    tenant::Tenant,
};

pub(in crate::server) const LIST: Operation =
    Operation { action: "folders", parameters: &[], run: Run::Read(|ask, body| Box::pin(list(ask, body))) };
pub(in crate::server) const CREATE: Operation =
    Operation { action: "create_folder", parameters: &[], run: Run::Write(|ask, body| Box::pin(create(ask, body))) };
pub(in crate::server) const DELETE: Operation =
    Operation { action: "delete_folder", parameters: &[], run: Run::Write(|ask, body| Box::pin(delete(ask, body))) };

/// The longest body.
const LONGEST: u64 = 64 << 10;

/// A folder's id: its tenant's text behind this, a slash in it as `~`. No tenant's name has a dot.
const ID: &str = "folder.";

/// When a folder was made, or its secrets were changed, is not told: it is the same for all.
const AT: &str = "2000-01-01T00:00:00.000Z";

async fn list(ask: &Ask<'_>, _: Incoming) -> Result<Answer, Problem> {
    let face = InfisicalApi::of(ask)?;
    let fields = Fields::of_query(ask)?;
    fields.check(&face)?;
    ask.grant.allow_action(Action::Read)?;
    let names: Vec<Named> = match face.place(fields.path())? {
        Place::Above if !fields.recursive => next_below(ask, &face, fields.path()).await?,
        Place::Above | Place::Tenants => {
            let is_wanted =
                |tenant: &Tenant| ask.grant.reaches(tenant.as_str()) && face.is_below(tenant, fields.path());
            let tenants = ask.service.resolver.every_tenant(is_wanted).await?;
            tenants.iter().map(|tenant| named(&face, tenant)).collect()
        }
        // Folders in a tenant's folder are not served.
        Place::Tenant(tenant) => {
            ask.grant.allow_tenant(Action::Read, tenant.as_str())?;
            Vec::new()
        }
    };
    ask.count("folders", "", "", None);
    let environment_id = face.environment_id();
    let folders = names.iter().map(|named| Told::of(named, &environment_id)).collect();
    Ok(respond(StatusCode::OK, JSON, json(&List { folders })))
}

/// The folders right below a path that lead to what the token reaches.
async fn next_below(ask: &Ask<'_>, face: &InfisicalApi, path: Option<&str>) -> Result<Vec<Named>, Problem> {
    let reaches = |tenant: &Tenant| ask.grant.reaches(tenant.as_str());
    let shared: Vec<Tenant> = match &face.project.folders {
        Some(placed) => placed.iter().map(|(folder, _)| folder).filter(|folder| reaches(folder)).cloned().collect(),
        None => {
            let is_wanted = |tenant: &Tenant| tenant.shared_folder().is_some() && reaches(tenant);
            ask.service.resolver.every_tenant(is_wanted).await?
        }
    };
    let paths = shared.iter().map(|folder| (Some(folder), face.path_of(folder)));
    let mut names = BTreeMap::new();
    for (folder, whole) in paths.chain([(None, face.project.tenants_path.clone())]) {
        let Some(name) = face.next_to(&whole, path).map(str::to_owned) else { continue };
        // One that is on the way to others is named by its name alone.
        let is_end = folder.filter(|folder| face.is_right_below(folder, path));
        let named = is_end.map_or_else(|| Named::on_the_way(&name), |folder| named(face, folder));
        names.entry(name).or_insert(named);
    }
    Ok(names.into_values().collect())
}

/// A folder as it is listed: its id, its name, and its path from the folder above.
struct Named {
    id: String,
    name: String,
    path: String,
}

impl Named {
    fn on_the_way(name: &str) -> Self {
        Self { id: format!("{ID}{name}"), name: name.to_owned(), path: format!("/{name}") }
    }
}

fn named(face: &InfisicalApi, tenant: &Tenant) -> Named {
    let whole = face.path_of(tenant);
    let name = whole.rsplit('/').next().unwrap_or_default();
    Named { id: format!("{ID}{}", tenant.as_str().replace('/', "~")), ..Named::on_the_way(name) }
}

async fn create(ask: &Ask<'_>, body: Incoming) -> Result<Answer, Problem> {
    let face = InfisicalApi::of(ask)?;
    ask.grant.allow_action(Action::Write)?;
    let fields = Fields::read(ask, body, LONGEST).await?;
    fields.check(&face)?;
    let name = fields.name.as_deref().ok_or_else(|| Problem::invalid_body("name is required"))?;
    let tenant = face.tenant_in(fields.path(), name)?;
    let about = |problem: Problem| problem.about(tenant.as_str(), "");
    ask.grant.allow_tenant(Action::Write, tenant.as_str()).map_err(|refused| about(refused.into()))?;
    let creating = ask.service.resolver.create_folder(&tenant);
    ask.recorded_of_tenant("create_folder", &tenant, creating).await.map_err(about)?;
    tracing::info!(%tenant, token = ask.grant.name, peer = %ask.account.who.peer, "a tenant's folder was made");
    Ok(told(&face, &tenant))
}

async fn delete(ask: &Ask<'_>, body: Incoming) -> Result<Answer, Problem> {
    let face = InfisicalApi::of(ask)?;
    ask.grant.allow_action(Action::Admin)?;
    let fields = Fields::read(ask, body, LONGEST).await?;
    fields.check(&face)?;
    let asked = decode(ask.names.key).ok_or_else(Problem::invalid_tenant)?;
    // A folder with another name is no tenant's, and may be there.
    let tenant = match asked.strip_prefix(ID) {
        Some(id) => {
            let tenant = id.replace('~', "/").parse().ok().filter(|tenant| face.is_right_below(tenant, fields.path()));
            tenant.ok_or_else(Problem::folder_not_served)?
        }
        None => face.tenant_in(fields.path(), &asked).map_err(|_| Problem::folder_not_served())?,
    };
    let about = |problem: Problem| problem.about(tenant.as_str(), "");
    ask.grant.allow_tenant(Action::Admin, tenant.as_str()).map_err(|refused| about(refused.into()))?;
    let deleting = ask.service.resolver.delete_empty_folder(&tenant);
    ask.recorded_of_tenant("delete_folder", &tenant, deleting).await.map_err(about)?;
    tracing::info!(%tenant, token = ask.grant.name, peer = %ask.account.who.peer, "a tenant's folder was deleted");
    Ok(told(&face, &tenant))
}

fn told(face: &InfisicalApi, tenant: &Tenant) -> Answer {
    #[derive(Serialize)]
    struct One<'a> {
        folder: Told<'a>,
    }
    let (named, environment_id) = (named(face, tenant), face.environment_id());
    let folder = Told::of(&named, &environment_id);
    respond(StatusCode::OK, JSON, json(&One { folder }))
}

impl From<FolderError> for Problem {
    fn from(error: FolderError) -> Self {
        match error {
            FolderError::Unknown => Self::no_folder(),
            FolderError::NotEmpty => Self::folder_not_empty("the folder has secrets in it; delete these first"),
            FolderError::Kept => Self::folder_not_empty(
                "the database keeps the history of this tenant's secrets; 'secretier tenant' has what destroys it",
            ),
            FolderError::Write(error) => error.into(),
        }
    }
}

#[derive(Serialize)]
struct List<'a> {
    folders: Vec<Told<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Told<'a> {
    id: &'a str,
    name: &'a str,
    version: i32,
    created_at: &'static str,
    updated_at: &'static str,
    env_id: &'a str,
    parent_id: Option<()>,
    is_reserved: bool,
    description: Option<()>,
    path: &'a str,
    relative_path: &'a str,
    last_secret_modified: &'static str,
}

impl<'a> Told<'a> {
    fn of(named: &'a Named, env_id: &'a str) -> Self {
        let Named { id, name, path } = named;
        Self {
            id,
            name,
            version: 1,
            created_at: AT,
            updated_at: AT,
            env_id,
            parent_id: None,
            is_reserved: false,
            description: None,
            path,
            relative_path: path,
            last_secret_modified: AT,
        }
    }
}
