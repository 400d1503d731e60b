//! Where the path of a folder leads.

use super::InfisicalApi;
use crate::{server::respond::Problem, tenant::Tenant};

/// A folder that is served, as far as its path tells. Every request goes through
/// [`InfisicalApi::place`]: a further kind of folder is one more variant here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// A folder on the way to others, as `/` is.
    Above,
    /// The folder that holds the tenants' folders.
    Tenants,
    /// A tenant's folder, or a shared folder.
    Tenant(Tenant),
}

impl InfisicalApi {
    /// The folder at this path; without one, the root.
    pub(super) fn place(&self, path: Option<&str>) -> Result<Place, Problem> {
        let (path, tenants) = (parts(path.unwrap_or_default()), parts(&self.project.tenants_path));
        if let Some(folder) = self.shared_at(&path) {
            return Ok(Place::Tenant(folder));
        }
        match path.strip_prefix(tenants.as_slice()) {
            Some([]) => Ok(Place::Tenants),
            Some([name]) => Tenant::company(name).map(Place::Tenant).map_err(|_| Problem::folder_not_served()),
            Some(_) => Err(Problem::folder_not_served()),
            None => match self.ends().any(|end| end.starts_with(&path)) {
                true => Ok(Place::Above),
                false => Err(Problem::folder_not_served()),
            },
        }
    }

    /// The tenant at this path, where it must be one.
    pub(super) fn tenant(&self, path: Option<&str>) -> Result<Tenant, Problem> {
        match self.place(path)? {
            Place::Tenant(tenant) => Ok(tenant),
            Place::Above | Place::Tenants => Err(Problem::folder_not_served()),
        }
    }

    /// The tenant of this name right below this path.
    pub(super) fn tenant_in(&self, path: Option<&str>, name: &str) -> Result<Tenant, Problem> {
        match self.place(path)? {
            Place::Tenants => Tenant::company(name).map_err(|_| Problem::invalid_tenant()),
            Place::Above if !name.contains('/') => {
                self.tenant(Some(&format!("{}/{name}", path.unwrap_or_default().trim_end_matches('/'))))
            }
            Place::Above | Place::Tenant(_) => Err(Problem::folder_not_served()),
        }
    }

    /// The path of a tenant's folder.
    pub(super) fn path_of(&self, tenant: &Tenant) -> String {
        if tenant.shared_folder().is_none() {
            return format!("{}/{tenant}", self.project.tenants_path.trim_end_matches('/'));
        }
        let placed = self.project.folders.iter().flatten().find(|(folder, _)| folder == tenant);
        placed.map_or_else(|| tenant.as_str().to_owned(), |(_, path)| path.clone())
    }

    /// Whether a tenant's folder is below this path; the root is above all.
    pub(super) fn is_below(&self, tenant: &Tenant, path: Option<&str>) -> bool {
        let (folder, above) = (self.path_of(tenant), parts(path.unwrap_or_default()));
        parts(&folder).starts_with(&above)
    }

    /// Whether a tenant's folder is in the folder at this path.
    pub(super) fn is_right_below(&self, tenant: &Tenant, path: Option<&str>) -> bool {
        let (folder, above) = (self.path_of(tenant), parts(path.unwrap_or_default()));
        parts(&folder).split_last().is_some_and(|(_, before)| before == above.as_slice())
    }

    /// The name below this path by which a folder is reached.
    pub(super) fn next_to<'f>(&self, folder: &'f str, path: Option<&str>) -> Option<&'f str> {
        let (folder, above) = (parts(folder), parts(path.unwrap_or_default()));
        if folder.starts_with(&above) { folder.get(above.len()).copied() } else { None }
    }

    /// The paths that folders on the way lead to.
    fn ends(&self) -> impl Iterator<Item = Vec<&str>> {
        let shared = self.project.folders.iter().flatten().map(|(_, path)| path.as_str());
        shared.chain([self.project.tenants_path.as_str()]).map(parts)
    }

    /// The shared folder at this path. Without an upstream it is in the root, under its own name.
    fn shared_at(&self, path: &[&str]) -> Option<Tenant> {
        match (&self.project.folders, path) {
            (Some(placed), _) => {
                placed.iter().find(|(_, place)| parts(place) == path).map(|(folder, _)| folder.clone())
            }
            (None, [name]) if parts(&self.project.tenants_path).first() != Some(name) => {
                format!("/{name}").parse().ok()
            }
            (None, _) => None,
        }
    }
}

/// A path as one way of writing it, however many slashes it had.
pub(super) fn plain(path: Option<&str>) -> String {
    format!("/{}", parts(path.unwrap_or_default()).join("/"))
}

/// The names in a path. A slash at its end, or one too many, changes nothing.
fn parts(path: &str) -> Vec<&str> {
    path.split('/').filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::{InfisicalApiConfig, Project};

    fn at(tenants_path: &str, folders: Option<&[(&str, &str)]>) -> InfisicalApi {
        let placed = |(name, path): &(&str, &str)| (name.parse().unwrap(), (*path).to_owned());
        let folders = folders.map(|folders| folders.iter().map(placed).collect());
        let project = Project { tenants_path: tenants_path.to_owned(), folders, ..Project::default() };
        let config = InfisicalApiConfig { enabled: true, ..InfisicalApiConfig::default() };
        InfisicalApi::build(&config, &project).unwrap()
    }

    fn tenant(name: &str) -> Option<Place> {
        Some(Place::Tenant(name.parse().unwrap()))
    }

    #[test]
    fn a_path_leads_to_a_tenant_to_the_folder_above_or_nowhere() {
        let face = at("/tenants", Some(&[]));
        let place = |path: &str| face.place(Some(path)).ok();
        assert_eq!((place("/tenants/acme"), place("/tenants/acme/")), (tenant("acme"), tenant("acme")));
        assert_eq!((place("/tenants"), place("/tenants/")), (Some(Place::Tenants), Some(Place::Tenants)));
        let root = Some(Place::Above);
        assert_eq!((place("/"), place(""), face.place(None).ok()), (root.clone(), root.clone(), root));
        for other in ["/other", "/tenants/acme/below", "/tenants/Acme", "/tenants/..", "/tenantsacme"] {
            assert_eq!(place(other), None, "{other}");
        }
        assert_eq!(face.path_of(&"acme".parse().unwrap()), "/tenants/acme");
        let deep = at("/a/b", Some(&[]));
        assert_eq!(deep.place(Some("/a")).ok(), Some(Place::Above));
        assert!(deep.place(Some("/a/b/acme")).is_ok() && deep.place(Some("/b")).is_err());
        assert!(at("/", Some(&[])).tenant(Some("/acme")).is_ok());
    }

    #[test]
    fn a_path_leads_to_a_shared_folder_where_the_configuration_says() {
        let face = at("/tenants", Some(&[("/hono-api", "/hono-api"), ("/jobs", "/apps/jobs")]));
        let place = |path: &str| face.place(Some(path)).ok();
        assert_eq!((place("/hono-api"), place("hono-api/")), (tenant("/hono-api"), tenant("/hono-api")));
        assert_eq!((place("/apps/jobs"), place("/apps"), place("/jobs")), (tenant("/jobs"), Some(Place::Above), None));
        assert_eq!(place("/tenants/hono-api"), tenant("hono-api"));
        assert_eq!((place("/hono-api/below"), place("/tenants//hono-api")), (None, tenant("hono-api")));
        assert_eq!(face.path_of(&"/jobs".parse().unwrap()), "/apps/jobs");
        assert_eq!(face.tenant_in(Some("/"), "hono-api").ok(), "/hono-api".parse().ok());
        assert_eq!(face.tenant_in(Some("/tenants"), "hono-api").ok(), "hono-api".parse().ok());
        for (path, name) in [("/tenants", "/hono-api"), ("/", "/hono-api"), ("/", "other"), ("/hono-api", "x")] {
            assert!(face.tenant_in(Some(path), name).is_err(), "{path} {name}");
        }
        let is_below = |name: &str, path: &str| face.is_below(&name.parse().unwrap(), Some(path));
        assert!(is_below("/jobs", "/apps") && is_below("/jobs", "/") && is_below("acme", "/tenants"));
        assert!(!is_below("/jobs", "/tenants") && !is_below("acme", "/apps"));
        assert_eq!(face.next_to("/apps/jobs", Some("/")), Some("apps"));
    }

    #[test]
    fn without_an_upstream_a_shared_folder_is_in_the_root() {
        let face = at("/tenants", None);
        assert_eq!(face.place(Some("/hono-api")).ok(), tenant("/hono-api"));
        assert_eq!(face.place(Some("/tenants")).ok(), Some(Place::Tenants));
        assert!(face.place(Some("/a/b")).is_err());
    }
}
