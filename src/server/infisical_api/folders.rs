//! Folders: the tenants that a token reaches, one made, one that is empty deleted.

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

/// A folder's id: its name behind this. No tenant's name has a dot.
const ID: &str = "folder.";

/// When a folder was made, or its secrets were changed, is not told: it is the same for all.
const AT: &str = "2000-01-01T00:00:00.000Z";

async fn list(ask: &Ask<'_>, _: Incoming) -> Result<Answer, Problem> {
    let face = InfisicalApi::of(ask)?;
    let fields = Fields::of_query(ask)?;
    fields.check(&face)?;
    ask.grant.allow_action(Action::Read)?;
    let names: Vec<(String, String)> = match face.place(fields.path())? {
        Place::Above if !fields.recursive => next_below(ask, &face, fields.path()).await?,
        Place::Above | Place::Tenants => {
            let is_wanted =
                |tenant: &Tenant| ask.grant.reaches(tenant.as_str()) && face.is_below(tenant, fields.path());
            let tenants = ask.service.resolver.every_tenant(is_wanted).await?;
            let named = |tenant: Tenant| {
                let name = tenant.as_str().trim_start_matches('/').to_owned();
                let path = format!("/{name}");
                (name, path)
            };
            tenants.into_iter().map(named).collect()
        }
        // Folders in a tenant's folder are not served.
        Place::Tenant(tenant) => {
            ask.grant.allow_tenant(Action::Read, tenant.as_str())?;
            Vec::new()
        }
    };
    ask.count("folders", "", "", None);
    let environment_id = face.environment_id();
    let folders = names.iter().map(|(name, path)| Told::of(name, path, &environment_id)).collect();
    Ok(respond(StatusCode::OK, JSON, json(&List { folders })))
}

/// The folders right below a path that lead to what the token reaches.
async fn next_below(ask: &Ask<'_>, face: &InfisicalApi, path: Option<&str>) -> Result<Vec<(String, String)>, Problem> {
    let reaches = |tenant: &Tenant| ask.grant.reaches(tenant.as_str());
    let shared: Vec<String> = match &face.project.folders {
        Some(placed) => placed.iter().filter(|(folder, _)| reaches(folder)).map(|(_, path)| path.clone()).collect(),
        None => {
            let is_wanted = |tenant: &Tenant| tenant.shared_folder().is_some() && reaches(tenant);
            let shared = ask.service.resolver.every_tenant(is_wanted).await?;
            shared.iter().map(|folder| face.path_of(folder)).collect()
        }
    };
    let paths = shared.iter().chain([&face.project.tenants_path]);
    let mut names: Vec<&str> = paths.filter_map(|folder| face.next_to(folder, path)).collect();
    names.sort_unstable();
    names.dedup();
    Ok(names.into_iter().map(|name| (name.to_owned(), format!("/{name}"))).collect())
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
    let name = asked.strip_prefix(ID).unwrap_or(&asked);
    // A folder with another name is no tenant's, and may be there.
    let tenant = face.tenant_in(fields.path(), name).map_err(|_| Problem::folder_not_served())?;
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
    let name = tenant.as_str().trim_start_matches('/');
    let (path, environment_id) = (format!("/{name}"), face.environment_id());
    let folder = Told::of(name, &path, &environment_id);
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
    id: String,
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
    fn of(name: &'a str, path: &'a str, env_id: &'a str) -> Self {
        Self {
            id: format!("{ID}{name}"),
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
