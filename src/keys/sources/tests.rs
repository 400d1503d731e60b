use std::collections::HashMap;

use futures_util::future::BoxFuture;

use super::*;
use crate::{
    diagnosis::Area,
    references::{self, Texts},
    tenant::Tenant,
    tiers::upstream::{
        Before, BuildError, ChangedFolder, Everything, Fetched, Folders, Health, Overview, Reconfigured, Removal,
        Webhook,
    },
};

const HEX: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
const SECOND: &str = "ab86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
const VAULT: &str = "infisical:/hono-api/MASTER_ENCRYPTION_KEY";

type Told = Result<(Option<&'static str>, Option<&'static str>), UpstreamError>;

struct Vault(Told);

impl Upstream for Vault {
    fn tenants(&self, _: Lane) -> BoxFuture<'_, Result<Folders, UpstreamError>> {
        unreachable!("not asked")
    }
    fn snapshot<'a>(
        &'a self,
        _: &'a Tenant,
        _: Option<&'a str>,
        _: Lane,
    ) -> BoxFuture<'a, Result<Fetched, UpstreamError>> {
        unreachable!("not asked")
    }
    fn everything(&self, _: Lane) -> BoxFuture<'_, Result<Everything, UpstreamError>> {
        unreachable!("not asked")
    }
    fn changed_since(&self, _: Timestamp, _: Lane) -> BoxFuture<'_, Result<Option<Vec<ChangedFolder>>, UpstreamError>> {
        unreachable!("not asked")
    }
    fn resolve<'a>(&self, _: &Tenant, _: Texts<'a>) -> HashMap<&'a str, references::Resolved> {
        unreachable!("not asked")
    }
    fn overview<'a>(&'a self, _: Option<&'a str>, _: Lane) -> BoxFuture<'a, Result<Overview, UpstreamError>> {
        unreachable!("not asked")
    }

    fn check(&self, _: &SecretKey, _: Option<&SecretValue>) -> Result<(), Unstorable> {
        Ok(())
    }
    fn put<'a>(
        &'a self,
        _: &'a Tenant,
        _: &'a SecretKey,
        _: &'a SecretValue,
    ) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        unreachable!("not asked")
    }
    fn delete<'a>(&'a self, _: &'a Tenant, _: &'a SecretKey) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        unreachable!("not asked")
    }
    fn create_folder<'a>(&'a self, _: &'a Tenant) -> BoxFuture<'a, Result<(), UpstreamError>> {
        unreachable!("not asked")
    }
    fn remove_folder<'a>(&'a self, _: &'a Tenant, _: Removal, _: Lane) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        unreachable!("not asked")
    }
    fn read<'a>(
        &'a self,
        folder: &'a str,
        names: &'a [&'a str],
        _: Lane,
    ) -> BoxFuture<'a, Result<Vec<Option<SecretValue>>, UpstreamError>> {
        assert_eq!((folder, names), ("/hono-api", &["MASTER_ENCRYPTION_KEY", "MASTER_ENCRYPTION_KEY_PREVIOUS"][..]));
        let held = |(now, before): (Option<&str>, Option<&str>)| {
            [now, before].map(|text| text.map(|text| SecretValue::new(text.to_owned()))).to_vec()
        };
        Box::pin(std::future::ready(self.0.clone().map(held)))
    }
    fn write<'a>(
        &'a self,
        _: &'a str,
        _: &'a SecretKey,
        _: &'a SecretValue,
    ) -> BoxFuture<'a, Result<(), UpstreamError>> {
        unreachable!("not asked")
    }
    fn share_budget(&self, _: bool) {}
    fn resume_budget(&self, _: Before) {}
    fn reconfigure(&self, _: crate::tiers::upstream::Config<'_>) -> Result<Reconfigured<'_>, BuildError> {
        unreachable!("not asked")
    }
    fn reads_references(&self) -> bool {
        unreachable!("not asked")
    }
    fn webhook(&self) -> Option<Arc<dyn Webhook>> {
        None
    }

    fn examine<'a>(&'a self, _: crate::tiers::upstream::Config<'a>, _: &'a Area) -> BoxFuture<'a, ()> {
        unreachable!("not asked")
    }

    fn health(&self) -> Health {
        unreachable!("not asked")
    }
}

fn private_file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, text).unwrap();
    file
}

fn sources(sources: &[&str], told: Option<Told>) -> Sources {
    let config = Config { sources: sources.iter().map(|text| source(text)).collect(), ..Config::default() };
    Sources::build(config, "prod", told.map(|told| Arc::new(Vault(told)) as Arc<dyn Upstream>))
}

async fn gather(sources: &Sources) -> Result<Gathered, KeyError> {
    sources.gather(Lane::Interactive).await
}

fn source(text: &str) -> KeySource {
    text.parse().unwrap()
}

fn id(text: &str) -> MasterKeyId {
    MasterKey::parse(text).unwrap().id()
}

fn ids(gathered: &Gathered) -> Vec<MasterKeyId> {
    gathered.keys.iter().map(|(key, _)| key.id()).collect()
}

#[test]
fn a_source_is_written_as_it_is_read_and_an_unknown_kind_lists_the_known() {
    for text in
        ["infisical:/hono-api/MASTER_ENCRYPTION_KEY", "infisical:/KEY", "file:/etc/key", "env:KEY", "passphrase"]
    {
        assert_eq!(source(text).to_string(), text);
    }
    for text in ["passphrase:x", "", "file", "file:", "env:A=B", "infisical:KEY", "infisical:/folder/", HEX] {
        let error = text.parse::<KeySource>().unwrap_err().to_string();
        assert!(error.contains("infisical:/FOLDER/NAME") && error.contains("env:NAME"), "{error}");
        assert!(!error.contains(HEX));
    }
    assert!(serde_json::from_str::<KeySource>("\"vault:x\"").is_err());
}

#[tokio::test]
async fn every_source_that_answers_adds_its_keys_in_order() {
    let file = private_file(&format!("# newest first\n\n{SECOND}\n{HEX}\n"));
    let path = format!("file:{}", file.path().display());
    let sources =
        sources(&[VAULT, &path, "file:/nowhere/at/all", "env:SECRETIER_TEST_UNSET"], Some(Ok((Some(HEX), None))));
    let gathered = gather(&sources).await.unwrap();
    assert_eq!(ids(&gathered), [id(HEX), id(SECOND), id(HEX)]);
    assert_eq!(gathered.reports[1].outcome, SourceOutcome::Gave(vec![id(SECOND), id(HEX)]));
    assert!(gathered.reports[2..].iter().all(|report| matches!(report.outcome, SourceOutcome::Empty(_))));
}

#[tokio::test]
async fn infisical_gives_the_keys_of_before_as_well_each_with_its_place() {
    let sources = sources(&[VAULT], Some(Ok((Some(HEX), Some(SECOND)))));
    let gathered = gather(&sources).await.unwrap();
    let places: Vec<String> = gathered.keys.iter().map(|(_, place)| place.to_string()).collect();
    assert_eq!(ids(&gathered), [id(HEX), id(SECOND)]);
    assert_eq!(places, [VAULT.to_owned(), format!("{VAULT}_PREVIOUS")]);
    assert!(gathered.answered(&source(&places[1])));
}

#[tokio::test]
async fn an_upstream_that_does_not_tell_is_not_taken_for_one_that_holds_none() {
    for error in [UpstreamError::Denied, UpstreamError::TimedOut] {
        let gathered = gather(&sources(&[VAULT], Some(Err(error)))).await.unwrap();
        assert!(gathered.keys.is_empty());
        assert!(matches!(gathered.reports[0].outcome, SourceOutcome::Unreachable(_)));
    }
    for told in [Some(Ok((None, None))), None] {
        let gathered = gather(&sources(&[VAULT], told)).await.unwrap();
        assert!(matches!(gathered.reports[0].outcome, SourceOutcome::Empty(_)));
    }
}

#[tokio::test]
async fn a_wrong_key_stops_the_start_and_names_its_source() {
    let file = private_file(&HEX[..40]);
    let path = format!("file:{}", file.path().display());
    let error = gather(&sources(&[&path], None)).await.unwrap_err().to_string();
    assert!(error.contains(&path) && !error.contains(&HEX[..8]), "{error}");
    for told in [(Some("short"), None), (Some(HEX), Some("short")), (Some(HEX), Some("# nothing"))] {
        assert!(gather(&sources(&[VAULT], Some(Ok(told)))).await.is_err(), "{told:?}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_file_that_others_can_read_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let file = private_file(HEX);
    let sources = sources(&[&format!("file:{}", file.path().display())], None);
    for mode in [0o640, 0o604, 0o620] {
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        let Err(KeyError::File(error)) = gather(&sources).await else { panic!("it was read at {mode:o}") };
        assert!(error.to_string().contains(&format!("chmod 600 {}", file.path().display())), "{error}");
    }
    std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o400)).unwrap();
    assert!(gather(&sources).await.is_ok());
}

#[tokio::test]
async fn a_new_key_stands_in_front_of_those_of_before_which_stay() {
    let file = private_file(&format!("# ours\n{HEX}\n"));
    let path = source(&format!("file:{}", file.path().display()));
    let sources = sources(&[&path.to_string()], None);
    let new = MasterKey::parse(SECOND).unwrap();
    sources.introduce(&path, &new).await.unwrap();
    assert_eq!(std::fs::read_to_string(file.path()).unwrap(), format!("# ours\n{SECOND}\n{HEX}\n"));
    assert_eq!(ids(&gather(&sources).await.unwrap()), [id(SECOND), id(HEX)]);
    let third = MasterKey::generate().unwrap();
    let ring = KeyRing::new(vec![third.clone(), new]);
    assert_eq!(sources.add(&path, &ring).await.unwrap(), [third.id()]);
    assert_eq!(ids(&gather(&sources).await.unwrap()), [id(SECOND), id(HEX), third.id()]);
    let refused = sources.introduce(&source("env:KEY_OF_NOBODY"), &third).await;
    assert!(matches!(refused, Err(IntroduceError::ReadOnly(_))));
}
