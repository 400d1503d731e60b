//! A stand-in to call, of each existing kind.

use super::*;
use crate::tiers::upstream::standin::{Credentials, Dialect, Identity, Rights, StandIn, World};

/// The stand-in with an identity that may do everything, and a client of it.
pub(super) struct There {
    pub(super) server: StandIn,
    pub(super) world: World,
    pub(super) credentials: Credentials,
    pub(super) clock: Clock,
    pub(super) metrics: Arc<Metrics>,
    pub(super) upstream: Infisical,
}

impl There {
    pub(super) async fn start(newer: bool) -> Self {
        Self::speaking(if newer { Dialect::Newer } else { Dialect::August2024 }).await
    }

    pub(super) async fn speaking(dialect: Dialect) -> Self {
        let world = World::empty();
        world.speak(dialect);
        let credentials = world.identity(Identity::new(Rights::Full));
        let server = StandIn::on_loopback(world.clone()).await.unwrap();
        let (clock, metrics) = (Clock::system(), Metrics::new());
        let upstream = build(settings(&server, &credentials), &clock, &metrics);
        Self { server, world, credentials, clock, metrics, upstream }
    }

    pub(super) fn another(&self, change: impl FnOnce(&mut Config)) -> Infisical {
        let mut config = settings(&self.server, &self.credentials);
        change(&mut config);
        build(config, &self.clock, &self.metrics)
    }

    /// Tenants with two secrets each.
    pub(super) fn fill(&self, tenants: &[&str]) {
        for tenant in tenants {
            self.world.put("prod", &format!("/tenants/{tenant}"), "NAME", tenant);
            self.world.put("prod", &format!("/tenants/{tenant}"), "PORT", "5432");
        }
    }

    pub(super) async fn everything(&self) -> Result<Everything, UpstreamError> {
        self.upstream.everything(Lane::Migration).await
    }

    pub(super) async fn snapshot(&self, tenant: &str) -> Result<Snapshot, UpstreamError> {
        match self.upstream.snapshot(&tenant.parse().unwrap(), None, Lane::Migration).await? {
            Fetched::Changed(snapshot) => Ok(snapshot),
            Fetched::Unchanged => panic!("nothing was known"),
        }
    }

    pub(super) async fn remove(&self, tenant: &str) -> Result<bool, UpstreamError> {
        self.upstream.remove_folder(&tenant.parse().unwrap(), Removal::Whole, Lane::Migration).await
    }
}

pub(super) async fn on_old_and_new(test: impl AsyncFn(There)) {
    for dialect in [Dialect::August2024, Dialect::October2024, Dialect::Newer] {
        test(There::speaking(dialect).await).await;
    }
}

fn settings(server: &StandIn, credentials: &Credentials) -> Config {
    Config {
        project_id: server.world().project_id(),
        client_id: credentials.client_id.clone(),
        client_secret: SecretSetting::Inline(SecretValue::new(credentials.client_secret.clone())),
        ..config(&server.url())
    }
}
