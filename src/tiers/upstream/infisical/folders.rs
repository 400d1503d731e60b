//! Folders that are made and deleted.

use http::Method;
use tokio::time::Instant;

use super::{
    Call, Cause, Infisical, Lane, Meaning, Removal, UpstreamError,
    client::{Request, rejection},
    folders_path, wire,
};
use crate::tenant::Tenant;

impl Infisical {
    pub(super) async fn make_folder(&self, tenant: &Tenant, deadline: Instant) -> Result<(), UpstreamError> {
        let (path, name) = self.above(tenant)?;
        let route = |newer| {
            let folder = wire::NewFolder {
                project: self.project(newer),
                environment: &self.environment,
                name: &name,
                path: &path,
            };
            Ok(Request {
                call: Call::Write,
                method: Method::POST,
                path: folders_path(newer).to_owned(),
                query: Vec::new(),
                body: Some(wire::body(&folder, 0)?),
                known: None,
            })
        };
        let reply = self.call(&self.newer_folders, route, Lane::Interactive, deadline).await?;
        let there = reply.meaning == Meaning::Done || reply.problem.is_already_there();
        if there { Ok(()) } else { Err(rejection(&reply)) }
    }

    pub(super) async fn delete_folder(
        &self,
        tenant: &Tenant,
        what: Removal,
        lane: Lane,
        deadline: Instant,
    ) -> Result<bool, UpstreamError> {
        // They would be deleted too, and nobody here has read their content.
        let folder = self.folder(tenant)?;
        match self.list_folders(&folder, None, lane, deadline).await {
            Ok(folders) if !folders.is_empty() => {
                let hint = "there are folders in the tenant's folder; move them elsewhere first";
                return Err(UpstreamError::Rejected { status: 409, cause: Cause::Rejected, hint });
            }
            // A newer server rejects the list of a missing folder; the removal shows that it is
            // missing.
            Ok(_) | Err(UpstreamError::Rejected { status: 400 | 404, .. }) => {}
            Err(error) => return Err(error),
        }
        self.may_go(&folder, what, lane, deadline).await?;
        let (path, name) = self.above(tenant)?;
        check_folder_name(&name)?;
        let route = |newer| {
            let removal = wire::FolderRemoval {
                project: self.project(newer),
                environment: &self.environment,
                path: &path,
                force_delete: what == Removal::Whole,
            };
            Ok(Request {
                call: Call::Write,
                method: Method::DELETE,
                path: format!("{}/{name}", folders_path(newer)),
                query: Vec::new(),
                body: Some(wire::body(&removal, 0)?),
                known: None,
            })
        };
        let reply = self.call(&self.newer_folders, route, lane, deadline).await?;
        match reply.meaning {
            Meaning::Done => {
                tracing::info!(folder, "deleted a folder upstream");
                Ok(true)
            }
            _ if reply.problem.is_no_such_folder() => Ok(false),
            _ => Err(rejection(&reply)),
        }
    }
}

/// A folder is deleted by its name or its id, and the server decides which of the two a UUID is: it
/// might be the id of another folder.
fn check_folder_name(name: &str) -> Result<(), UpstreamError> {
    if name.len() == 36 && uuid::Uuid::try_parse(name).is_ok() {
        let hint = "Infisical may take this tenant's name for the id of a folder; delete the folder there";
        return Err(UpstreamError::Rejected { status: 400, cause: Cause::Rejected, hint });
    }
    Ok(())
}
