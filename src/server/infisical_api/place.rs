//! Where the path of a folder leads.

use super::InfisicalApi;
use crate::{server::respond::Problem, tenant::Tenant};

/// A folder that is served, as far as its path tells. Every request goes through
/// [`InfisicalApi::place`]: a further kind of folder is one more variant here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// A folder on the way to the tenants' folders, with the name of the next one: `/`.
    Above(String),
    /// The folder that holds the tenants' folders.
    Tenants,
    /// A tenant's folder.
    Tenant(Tenant),
}

impl InfisicalApi {
    /// The folder at this path; without one, the root.
    pub(super) fn place(&self, path: Option<&str>) -> Result<Place, Problem> {
        let (path, tenants) = (parts(path.unwrap_or_default()), parts(&self.project.tenants_path));
        match path.strip_prefix(tenants.as_slice()) {
            Some([]) => Ok(Place::Tenants),
            Some([name]) => name.parse().map(Place::Tenant).map_err(|_| Problem::folder_not_served()),
            Some(_) => Err(Problem::folder_not_served()),
            None => match tenants.strip_prefix(path.as_slice()) {
                Some([next, ..]) => Ok(Place::Above((*next).to_owned())),
                Some([]) | None => Err(Problem::folder_not_served()),
            },
        }
    }

    /// The tenant at this path, where it must be one.
    pub(super) fn tenant(&self, path: Option<&str>) -> Result<Tenant, Problem> {
        match self.place(path)? {
            Place::Tenant(tenant) => Ok(tenant),
            Place::Above(_) | Place::Tenants => Err(Problem::folder_not_served()),
        }
    }

    /// The path of a tenant's folder.
    pub(super) fn path_of(&self, tenant: &Tenant) -> String {
        format!("{}/{tenant}", self.project.tenants_path.trim_end_matches('/'))
    }
}

/// The names in a path. A slash at its end, or one too many, changes nothing.
fn parts(path: &str) -> Vec<&str> {
    path.split('/').filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::{InfisicalApiConfig, Project};

    fn at(tenants_path: &str) -> InfisicalApi {
        let project = Project { tenants_path: tenants_path.to_owned(), ..Project::default() };
        let config = InfisicalApiConfig { enabled: true, ..InfisicalApiConfig::default() };
        InfisicalApi::build(&config, &project).unwrap()
    }

    #[test]
    fn a_path_leads_to_a_tenant_to_the_folder_above_or_nowhere() {
        let face = at("/tenants");
        let place = |path: &str| face.place(Some(path)).ok();
        let acme = Some(Place::Tenant("acme".parse().unwrap()));
        assert_eq!((place("/tenants/acme"), place("/tenants/acme/")), (acme.clone(), acme));
        assert_eq!((place("/tenants"), place("/tenants/")), (Some(Place::Tenants), Some(Place::Tenants)));
        let root = Some(Place::Above("tenants".to_owned()));
        assert_eq!((place("/"), place(""), face.place(None).ok()), (root.clone(), root.clone(), root));
        for other in ["/other", "/tenants/acme/below", "/tenants/Acme", "/tenants/..", "/tenantsacme"] {
            assert_eq!(place(other), None, "{other}");
        }
        assert_eq!(face.path_of(&"acme".parse().unwrap()), "/tenants/acme");
        let deep = at("/a/b");
        assert_eq!(deep.place(Some("/a")).ok(), Some(Place::Above("b".to_owned())));
        assert!(deep.place(Some("/a/b/acme")).is_ok() && deep.place(Some("/b")).is_err());
        assert!(at("/").tenant(Some("/acme")).is_ok());
    }
}
