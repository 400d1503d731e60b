use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::PathBuf,
};

use tempfile::TempDir;

use super::{
    super::{OddityKind, Settings as _, Snapshot},
    *,
};
use crate::flaws::Unusable;

struct There {
    folder: TempDir,
    upstream: Directory,
}

impl There {
    fn new(writable: bool) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("secrets");
        fs::create_dir(&path).unwrap();
        let config = Config { path, writable, timeout: Duration::from_secs(30), poll_interval: Duration::ZERO };
        Self { upstream: Directory::new(&config), folder }
    }

    fn path(&self, below: &str) -> PathBuf {
        self.folder.path().join("secrets").join(below)
    }

    /// Writes a file, and the folders above it.
    fn file(&self, below: &str, content: impl AsRef<[u8]>) {
        let path = self.path(below);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
    }

    async fn read(&self, known: Option<&str>) -> Result<Fetched, UpstreamError> {
        self.upstream.snapshot(&"acme".parse().unwrap(), known, Lane::Interactive).await
    }

    async fn snapshot(&self) -> Snapshot {
        match self.read(None).await.unwrap() {
            Fetched::Changed(snapshot) => snapshot,
            Fetched::Unchanged => panic!("nothing was known"),
        }
    }

    async fn values(&self) -> Vec<(String, String)> {
        let secrets = self.snapshot().await.secrets;
        secrets.iter().map(|secret| (secret.key.to_string(), secret.value.expose().to_owned())).collect()
    }

    /// The snapshot once it has a validator: the folder has been unchanged for long enough.
    async fn settled(&self) -> Snapshot {
        loop {
            let snapshot = self.snapshot().await;
            if snapshot.etag.is_some() {
                return snapshot;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn oddities(snapshot: &Snapshot) -> Vec<(&str, OddityKind)> {
    snapshot.oddities.iter().map(|oddity| (oddity.name.as_str(), oddity.kind)).collect()
}

#[tokio::test]
async fn a_file_is_a_secret_to_the_byte_and_what_begins_with_a_dot_is_none() {
    let there = There::new(false);
    for (name, value) in [("acme/EMPTY", ""), ("acme/LINE", "one\r\ntwo\n"), ("acme/${REF}", "${OTHER} é\u{0}")] {
        there.file(name, value);
    }
    there.file("acme/.hidden", "no");
    there.file("acme/below/NESTED", "no");
    there.file("globex/K", "another's");
    assert_eq!(there.values().await, pairs(&[("${REF}", "${OTHER} é\u{0}"), ("EMPTY", ""), ("LINE", "one\r\ntwo\n")]));
    // A folder that cannot be looked at is not absent: its own read tells what is wrong.
    symlink("loop", there.path("loop")).unwrap();
    symlink("nowhere", there.path("dangling")).unwrap();
    there.file("file", "no folder");
    let folders = there.upstream.tenants(Lane::Interactive).await.unwrap();
    assert_eq!(folders.tenants, ["acme".parse().unwrap(), "globex".parse().unwrap(), "loop".parse().unwrap()]);
    let broken = there.upstream.snapshot(&"loop".parse().unwrap(), None, Lane::Interactive).await;
    assert!(matches!(broken, Err(UpstreamError::Unreachable { .. })), "{broken:?}");
    assert_eq!(there.upstream.health().state, UpstreamState::Up, "the others are served as ever");
}

#[tokio::test]
async fn what_cannot_be_used_is_left_out_by_its_name() {
    let there = There::new(false);
    there.file("acme/GOOD", "v");
    there.file("acme/LATIN1", b"caf\xe9");
    there.file("acme/LARGE", vec![b'x'; (1 << 20) + 1]);
    there.file("acme/LARGEST", vec![b'x'; 1 << 20]);
    there.file("acme/bell\u{7}", "v");
    there.file("globex/K", "another's");
    symlink(there.path("globex/K"), there.path("acme/THEIRS")).unwrap();
    symlink("nowhere", there.path("acme/NOWHERE")).unwrap();
    symlink("GOOD", there.path("acme/ALIAS")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, there.path("acme/PIPE"), rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let snapshot = there.snapshot().await;
    let names: Vec<&str> = snapshot.secrets.iter().map(|secret| secret.key.as_str()).collect();
    assert_eq!(names, ["ALIAS", "GOOD", "LARGEST"]);
    let unusable = OddityKind::Unusable;
    assert_eq!(
        oddities(&snapshot),
        [
            ("LARGE", unusable(Unusable::NotText)),
            ("LATIN1", unusable(Unusable::NotText)),
            ("NOWHERE", unusable(Unusable::Hidden)),
            ("PIPE", unusable(Unusable::Hidden)),
            ("THEIRS", unusable(Unusable::Hidden)),
            ("bell\u{7}", OddityKind::InvalidName),
        ]
    );
}

#[tokio::test]
async fn an_unchanged_folder_is_not_read_again_and_a_changed_one_is() {
    let there = There::new(true);
    there.file("acme/K", "one");
    there.file("acme/L", "l");
    assert!(there.snapshot().await.etag.is_none(), "what has just changed may change again within one tick");
    let etag = there.settled().await.etag;
    assert!(matches!(there.read(etag.as_deref()).await, Ok(Fetched::Unchanged)));
    // The same size, and the earlier time.
    let before = fs::metadata(there.path("acme/K")).unwrap().modified().unwrap();
    there.file("acme/K", "two");
    fs::File::options().write(true).open(there.path("acme/K")).unwrap().set_modified(before).unwrap();
    match there.read(etag.as_deref()).await.unwrap() {
        Fetched::Changed(snapshot) => assert_eq!(snapshot.secrets[0].value.expose(), "two"),
        Fetched::Unchanged => panic!("it has changed"),
    }
    let etag = there.settled().await.etag;
    fs::remove_file(there.path("acme/L")).unwrap();
    assert!(matches!(there.read(etag.as_deref()).await, Ok(Fetched::Changed(_))));
}

/// The layout that Kubernetes mounts: links to a folder that is replaced as a whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_secret_is_read_whole_from_before_or_from_after_a_swap() {
    let there = There::new(true);
    let version = |number: u32| {
        for key in ["A", "B"] {
            there.file(&format!("acme/..{number}/{key}"), number.to_string());
        }
        symlink(format!("..{number}"), there.path("acme/..data_tmp")).unwrap();
        fs::rename(there.path("acme/..data_tmp"), there.path("acme/..data")).unwrap();
        if let Some(before) = number.checked_sub(1) {
            let _ = fs::remove_dir_all(there.path(&format!("acme/..{before}")));
        }
    };
    version(0);
    for key in ["A", "B"] {
        symlink(format!("..data/{key}"), there.path(&format!("acme/{key}"))).unwrap();
    }
    for number in 1..20 {
        // Probably during the read.
        let (values, ()) = tokio::join!(there.values(), async {
            tokio::task::yield_now().await;
            version(number);
        });
        let values: Vec<u32> = values.iter().map(|(_, value)| value.parse().unwrap()).collect();
        assert_eq!(values.len(), 2);
        assert_eq!(values[0], values[1], "of one version");
    }
    assert_eq!(there.values().await, pairs(&[("A", "19"), ("B", "19")]));
    let (acme, key, value) = ("acme".parse().unwrap(), "A".parse().unwrap(), SecretValue::new("x".to_owned()));
    let written = there.upstream.put(&acme, &key, &value).await;
    assert!(matches!(written, Err(UpstreamError::Unstorable(Unstorable::ReadOnly(_)))), "Kubernetes writes it");
}

#[tokio::test]
async fn a_link_that_leads_out_of_the_directory_is_followed_by_nobody() {
    let (there, elsewhere) = (There::new(false), TempDir::new().unwrap());
    fs::write(elsewhere.path().join("K"), "elsewhere").unwrap();
    symlink(elsewhere.path(), there.path("acme")).unwrap();
    assert!(matches!(there.read(None).await, Err(UpstreamError::Rejected { status: 403, .. })));
    fs::remove_file(there.path("acme")).unwrap();
    fs::create_dir(there.path("acme")).unwrap();
    symlink(elsewhere.path(), there.path("acme/..data")).unwrap();
    assert!(matches!(there.read(None).await, Err(UpstreamError::Rejected { status: 403, .. })));
    assert_eq!(there.upstream.health().state, UpstreamState::Up, "one tenant's folder is not the tier");
}

#[tokio::test]
async fn a_directory_that_is_missing_or_not_mounted_proves_nobody_absent() {
    let there = There::new(false);
    assert!(matches!(there.upstream.tenants(Lane::Interactive).await, Err(UpstreamError::Rejected { .. })));
    assert_eq!(there.upstream.health().state, UpstreamState::Down);
    there.file("acme/K", "v");
    assert!(there.upstream.tenants(Lane::Interactive).await.is_ok());
    assert_eq!(there.upstream.health().state, UpstreamState::Up);
    let nobody = there.upstream.snapshot(&"nobody".parse().unwrap(), None, Lane::Interactive).await.unwrap();
    assert!(matches!(nobody, Fetched::Changed(snapshot) if snapshot.secrets.is_empty()));
    fs::remove_dir_all(there.path("")).unwrap();
    assert!(matches!(there.read(None).await, Err(UpstreamError::Unreachable { .. })));
    assert!(matches!(there.upstream.tenants(Lane::Interactive).await, Err(UpstreamError::Unreachable { .. })));
}

#[tokio::test]
async fn writes_are_atomic_private_and_only_where_they_are_wanted() {
    let acme: Tenant = "acme".parse().unwrap();
    let (key, value) = ("K".parse().unwrap(), SecretValue::new("v".to_owned()));
    let there = There::new(true);
    assert!(there.upstream.put(&acme, &key, &value).await.unwrap(), "it was not there");
    assert!(!there.upstream.put(&acme, &key, &value).await.unwrap());
    assert_eq!(there.values().await, pairs(&[("K", "v")]));
    let mode = |path: &str| fs::metadata(there.path(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("acme"), mode("acme/K")), (0o700, 0o600));
    let names = fs::read_dir(there.path("acme")).unwrap().count();
    assert_eq!(names, 1, "nothing unfinished is left");
    for name in ["a/b", ".env", ".", ".."] {
        let written = there.upstream.put(&acme, &name.parse().unwrap(), &value).await;
        assert!(matches!(written, Err(UpstreamError::Unstorable(Unstorable::Name(_)))), "{name}");
    }
    let large = SecretValue::new("x".repeat((1 << 20) + 1));
    assert!(matches!(there.upstream.check(&key, Some(&large)), Err(Unstorable::Size)), "it could not be read");
    assert!(matches!(there.upstream.put(&acme, &key, &large).await, Err(UpstreamError::Unstorable(Unstorable::Size))));
    assert!(there.upstream.delete(&acme, &key).await.unwrap());
    assert!(!there.upstream.delete(&acme, &key).await.unwrap());
    there.file("acme/L", "l");
    there.file("acme/.mine", "not a secret");
    assert!(matches!(
        there.upstream.remove_folder(&acme, Removal::Whole, Lane::Migration).await,
        Err(UpstreamError::Rejected { status: 409, .. })
    ));
    fs::remove_file(there.path("acme/.mine")).unwrap();
    symlink("acme", there.path("alias")).unwrap();
    let alias = there.upstream.remove_folder(&"alias".parse().unwrap(), Removal::Whole, Lane::Migration).await;
    assert!(matches!(alias, Err(UpstreamError::Rejected { status: 409, .. })), "what it leads to is another's");
    fs::remove_file(there.path("alias")).unwrap();
    assert!(there.upstream.remove_folder(&acme, Removal::Whole, Lane::Migration).await.unwrap());
    assert!(!there.upstream.remove_folder(&acme, Removal::Whole, Lane::Migration).await.unwrap());
    assert_eq!(fs::read_dir(there.path("")).unwrap().count(), 0, "nothing is left of it");

    let there = There::new(false);
    there.file("acme/K", "v");
    for refused in [
        there.upstream.put(&acme, &key, &value).await.map(drop),
        there.upstream.delete(&acme, &key).await.map(drop),
        there.upstream.create_folder(&"new".parse().unwrap()).await,
        there.upstream.remove_folder(&acme, Removal::Whole, Lane::Migration).await.map(drop),
    ] {
        assert!(matches!(refused, Err(UpstreamError::Unstorable(Unstorable::ReadOnly(_)))), "{refused:?}");
    }
    assert_eq!(there.values().await, pairs(&[("K", "v")]));
}

#[tokio::test]
async fn what_changed_is_told_by_its_time_whatever_way_it_was_changed() {
    let there = There::new(false);
    there.file("acme/K", "v");
    there.file("globex/K", "v");
    let changed = async |since: Timestamp| {
        let told = there.upstream.changed_since(since, Lane::Refresh).await.unwrap().unwrap();
        told.into_iter().map(|folder| folder.tenant.to_string()).collect::<Vec<_>>()
    };
    let now = || Timestamp::from_millis(crate::clock::Clock::system().now().as_millis());
    assert_eq!(changed(Timestamp::from_millis(0)).await, ["acme", "globex"]);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let since = now();
    assert_eq!(changed(since).await, [""; 0]);
    tokio::time::sleep(Duration::from_millis(20)).await;
    // Moved in, with an old time.
    there.file("elsewhere", "w");
    let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    fs::File::options().write(true).open(there.path("elsewhere")).unwrap().set_modified(old).unwrap();
    fs::rename(there.path("elsewhere"), there.path("acme/K")).unwrap();
    assert_eq!(changed(since).await, ["acme"]);
    fs::remove_file(there.path("globex/K")).unwrap();
    assert_eq!(changed(since).await, ["acme", "globex"]);
    // Another folder put in its place, which nobody has touched for long.
    there.file("initech/..1/K", "1");
    there.file("initech/..2/K", "2");
    symlink("..2", there.path("initech/..data")).unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let since = now();
    tokio::time::sleep(Duration::from_millis(20)).await;
    symlink("..1", there.path("initech/..new")).unwrap();
    fs::rename(there.path("initech/..new"), there.path("initech/..data")).unwrap();
    assert_eq!(changed(since).await, ["initech"]);
}

/// As after a disk that hung for a while.
#[tokio::test]
async fn a_write_that_its_caller_gave_up_has_no_effect_after_that() {
    let there = There::new(true);
    let (acme, key): (Tenant, SecretKey) = ("acme".parse().unwrap(), "K".parse().unwrap());
    let [old, new] = ["old", "new"].map(|value| SecretValue::new(value.to_owned()));
    there.file("acme/K", "now");
    let past = std::time::Instant::now();
    for late in [
        there.upstream.root.put(&acme, &key, &old, past).map(drop),
        there.upstream.root.delete(&acme, &key, past).map(drop),
        there.upstream.root.remove(&acme, Removal::Whole, past).map(drop),
    ] {
        assert!(matches!(late, Err(UpstreamError::TimedOut)), "{late:?}");
    }
    assert_eq!(there.values().await, pairs(&[("K", "now")]));
    assert_eq!(fs::read_dir(there.path("acme")).unwrap().count(), 1, "nothing unfinished is left");

    // One that is at work keeps the tenant's turn, and no other's.
    let turn = there.upstream.turns_of(&acme).lock_owned().await;
    there.upstream.timeout.store(50, Ordering::Relaxed);
    assert!(matches!(there.upstream.put(&acme, &key, &new).await, Err(UpstreamError::TimedOut)));
    assert_eq!(there.upstream.health().state, UpstreamState::Down);
    there.upstream.timeout.store(30_000, Ordering::Relaxed);
    assert!(there.upstream.put(&"globex".parse().unwrap(), &key, &new).await.unwrap());
    drop(turn);
    assert!(!there.upstream.put(&acme, &key, &new).await.unwrap());
    assert_eq!(there.values().await, pairs(&[("K", "new")]));
}

#[tokio::test]
async fn all_folders_are_read_as_one() {
    let there = There::new(false);
    there.file("acme/K", "a");
    there.file("globex/K", "g");
    fs::create_dir(there.path("empty")).unwrap();
    let everything = there.upstream.everything(Lane::Migration).await.unwrap();
    let mut tenants: Vec<_> = everything.tenants.keys().map(ToString::to_string).collect();
    tenants.sort_unstable();
    assert_eq!(tenants, ["acme", "globex"]);
    assert!(!everything.has_imports);
}

#[test]
fn settings_that_cannot_be_are_refused_by_name() {
    let config = Config {
        path: "secrets".into(),
        writable: false,
        timeout: Duration::ZERO,
        poll_interval: Duration::from_millis(1),
    };
    let faults = config.faults();
    for (fault, key) in faults.iter().zip(["directory.path", "directory.timeout", "directory.poll_interval"]) {
        assert!(fault.starts_with(key), "{fault}");
    }
    assert_eq!(faults.len(), 3);
}
