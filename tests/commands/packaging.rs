//! The files in `config/` that run the program elsewhere: units of systemd, manifests of Kubernetes,
//! the recipe of an image. The tools that know their formats judge them where these are installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::Value;

use crate::{attack::Settings, within::output};

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(shipped(name)).unwrap()
}

/// Whether a tool is there; says so where it is not.
fn has(tool: &str, from: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(tool).is_file());
    #[expect(clippy::print_stderr, reason = "what is left out is said")]
    if !found {
        eprintln!("SKIPPED: {tool} is not there, and does not judge the shipped files; install {from}");
    }
    found
}

#[track_caller]
fn judged(command: &mut Command) -> String {
    let done = output(command);
    let told = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{command:?}: {told}");
    told
}

/// From SIGTERM to the end, at most: `server.shutdown_grace`, then what `src/app.rs` writes (twice 5 s) and
/// `src/main.rs` waits for (1 s).
fn longest_end(settings: &Settings) -> Duration {
    settings.server.shutdown_grace + Duration::from_secs(11)
}

/// The value of a line of a unit.
fn directive<'a>(unit: &'a str, name: &str) -> &'a str {
    let mut lines = unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    lines.next().unwrap_or_else(|| panic!("the unit has no {name}="))
}

#[test]
fn the_unit_allows_the_memory_and_the_time_that_the_defaults_can_take() {
    let (unit, defaults) = (read("secretier.service"), Settings::default());
    let megabytes: u64 = directive(&unit, "MemoryMax").strip_suffix('M').unwrap().parse().unwrap();
    let most = defaults.most();
    assert!(most <= megabytes << 20, "the unit allows {megabytes} MiB, and the defaults come to {most}");
    let seconds: u64 = directive(&unit, "TimeoutStopSec").strip_suffix('s').unwrap().parse().unwrap();
    assert!(longest_end(&defaults) <= Duration::from_secs(seconds));
}

#[test]
fn the_unit_lets_run_what_it_runs() {
    let unit = read("secretier.service");
    let allowed: Vec<&str> = directive(&unit, "ExecPaths").split(' ').collect();
    for name in ["ExecStart", "ExecReload"] {
        let program = directive(&unit, name).split(' ').next().unwrap();
        assert!(allowed.contains(&program), "{name}= runs {program}, and NoExecPaths= forbids it");
    }
}

#[test]
fn the_socket_unit_opens_what_the_program_listens_on_by_default() {
    let unit = read("secretier.socket");
    assert_eq!(directive(&unit, "ListenStream"), Settings::default().server.listen.to_string());
    assert!(!unit.contains("\nAccept="), "each connection would get a process of its own");
}

#[test]
fn systemd_finds_no_fault_in_the_units_and_little_that_they_leave_open() {
    if !has("systemd-analyze", "systemd") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // It looks whether the program is there.
    let unit = read("secretier.service").replace("/usr/local/bin/secretier", env!("CARGO_BIN_EXE_secretier"));
    let (service, socket) = (folder.path().join("secretier.service"), folder.path().join("secretier.socket"));
    fs::write(&service, unit).unwrap();
    fs::write(&socket, read("secretier.socket")).unwrap();
    let told = judged(Command::new("systemd-analyze").args(["verify", "--man=no"]).args([&service, &socket]));
    assert_eq!(told, "", "it warns of nothing");
    // The score goes from 0 to 10; the threshold is ten times that.
    let bound = ["security", "--offline=true", "--threshold=15", "--no-pager"];
    let told = judged(Command::new("systemd-analyze").args(bound).arg(&service));
    assert!(told.contains("Overall exposure level"), "{told}");
}

/// The objects of a manifest.
fn objects(name: &str) -> Vec<Value> {
    let objects: Vec<Value> = serde_saphyr::from_multiple(&read(name)).unwrap();
    assert!(objects.len() > 2, "{name} is read whole");
    objects
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    objects.iter().find(|object| object["kind"] == kind).unwrap_or_else(|| panic!("there is no {kind}"))
}

/// The container of the program, wherever the pod has it.
fn container(pod: &Value) -> &Value {
    let containers = ["initContainers", "containers"].into_iter().filter_map(|list| pod[list].as_array()).flatten();
    containers.clone().find(|container| container["name"] == "secretier").unwrap()
}

const MANIFESTS: [&str; 2] = ["kubernetes.yaml", "kubernetes-deployment.yaml"];

fn settings(objects: &[Value]) -> (Settings, String) {
    let text = of_kind(objects, "ConfigMap")["data"]["secretier.toml"].as_str().unwrap();
    (toml::from_str(text).unwrap(), text.to_owned())
}

#[test]
fn the_manifests_allow_the_memory_and_the_time_that_their_settings_can_take() {
    for name in MANIFESTS {
        let objects = objects(name);
        let (settings, _) = settings(&objects);
        assert!(settings.server.max_answers < Settings::default().server.max_answers, "{name}: they are read");
        let pod = &of_kind(&objects, "Deployment")["spec"]["template"]["spec"];
        let limit = container(pod)["resources"]["limits"]["memory"].as_str().unwrap();
        let limit = limit.strip_suffix("Mi").unwrap().parse::<u64>().unwrap() << 20;
        // A probe that runs the program does so within the same limit.
        let most = settings.most() + 10_000_000;
        assert!(most <= limit, "{name} allows {limit}, and its settings come to {most}");
        let before_stop = container(pod)["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap_or_default();
        let allowed = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
        assert!(longest_end(&settings) + Duration::from_secs(before_stop) <= Duration::from_secs(allowed), "{name}");
    }
}

#[test]
fn the_manifests_give_the_program_nothing_that_it_does_not_need() {
    for name in MANIFESTS {
        let objects = objects(name);
        let pod = &of_kind(&objects, "Deployment")["spec"]["template"]["spec"];
        let container = container(pod);
        assert_eq!(of_kind(&objects, "ServiceAccount")["automountServiceAccountToken"], false, "{name}");
        assert_eq!(pod["automountServiceAccountToken"], false, "{name}");
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{name}");
        assert_eq!(container["image"], concat!("secretier:", env!("CARGO_PKG_VERSION")), "{name}");
        let own = &container["securityContext"];
        assert_eq!(own["allowPrivilegeEscalation"], false, "{name}");
        assert_eq!(own["readOnlyRootFilesystem"], true, "{name}");
        assert_eq!(own["capabilities"]["drop"], serde_json::json!(["ALL"]), "{name}");
        for volume in pod["volumes"].as_array().unwrap() {
            if !volume["secret"].is_null() {
                // YAML 1.2 knows octal numbers by another prefix, Kubernetes reads these: 0440 either way.
                let mode = volume["secret"]["defaultMode"].as_f64().unwrap();
                assert!([f64::from(0o440), 440.0].contains(&mode), "{name}: {volume}");
            }
        }
    }
}

#[test]
fn the_probes_ask_what_this_program_answers() {
    let sidecar = objects("kubernetes.yaml");
    let sidecar = container(&of_kind(&sidecar, "Deployment")["spec"]["template"]["spec"]);
    let words =
        |probe: &str| -> Vec<String> { serde_json::from_value(sidecar[probe]["exec"]["command"].clone()).unwrap() };
    let config = ["--config", "/etc/secretier/secretier.toml"];
    let program = "/usr/local/bin/secretier";
    assert_eq!(words("startupProbe"), [&[program, "health"][..], &config].concat());
    assert_eq!(words("livenessProbe"), [&[program, "health", "--live"][..], &config].concat());

    let objects = objects("kubernetes-deployment.yaml");
    let (settings, text) = settings(&objects);
    let container = container(&of_kind(&objects, "Deployment")["spec"]["template"]["spec"]);
    assert_eq!(container["ports"][0]["containerPort"], settings.server.listen.first().port());
    for (probe, path) in [("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")] {
        let asked = &container[probe]["httpGet"];
        assert_eq!(
            (&asked["path"], &asked["scheme"], &asked["port"]),
            (&path.into(), &"HTTPS".into(), &"https".into())
        );
        // The kubelet would name the pod's address, which no configuration knows.
        let host = &asked["httpHeaders"][0];
        assert_eq!((&host["name"], &host["value"]), (&"Host".into(), &"localhost".into()));
    }
    let config: toml::Table = toml::from_str(&text).unwrap();
    let hosts = config["access"]["hosts"].as_array().unwrap();
    assert!(hosts.iter().any(|host| host.as_str() == Some("localhost")), "the probes' name");
}

#[test]
fn the_configurations_in_the_manifests_are_good() {
    for name in MANIFESTS {
        let (_, text) = settings(&objects(name));
        let mut place = crate::program::Place::new(&text.replace("/run/secretier-secrets/", ""));
        place.write("client-secret", "s3cr3t");
        place.set("SECRETIER_DATABASE__URL", "postgres://secretier@db.internal/secretier?sslmode=verify-full");
        assert!(place.run(&["config", "check"]).ok().contains("is good"), "{name}");
    }
}

#[test]
fn several_instances_are_spread_and_are_not_all_taken_away_at_once() {
    let objects = objects("kubernetes-deployment.yaml");
    let deployment = of_kind(&objects, "Deployment");
    assert!(deployment["spec"]["replicas"].as_u64().unwrap() > 1);
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    let spread = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"].as_array().unwrap();
    assert_eq!(spread.len(), 2);
    let selectors = spread.iter().map(|constraint| &constraint["labelSelector"]["matchLabels"]);
    let budget = &of_kind(&objects, "PodDisruptionBudget")["spec"];
    assert_eq!(budget["maxUnavailable"], 1);
    let policy = &of_kind(&objects, "NetworkPolicy")["spec"];
    assert_eq!(policy["policyTypes"], serde_json::json!(["Ingress", "Egress"]));
    let service = &of_kind(&objects, "Service")["spec"]["selector"];
    let others = [service, &budget["selector"]["matchLabels"], &policy["podSelector"]["matchLabels"]];
    for selector in selectors.chain(others) {
        assert_eq!(selector, labels, "it is about these instances");
    }
}

#[test]
fn kubernetes_own_schemas_allow_the_manifests() {
    if !has("kubernetes-validate", "it by pip") {
        return;
    }
    for name in MANIFESTS {
        judged(Command::new("kubernetes-validate").arg("--strict").arg(shipped(name)));
    }
}

#[test]
fn the_image_is_one_program_that_is_nobody() {
    let recipe = read("Containerfile");
    let (_, image) = recipe.split_once("\nFROM scratch\n").unwrap();
    for line in
        ["USER 10001:10001", "STOPSIGNAL SIGTERM", "ENTRYPOINT [\"/usr/local/bin/secretier\"]", "CMD [\"serve\"]"]
    {
        assert!(image.lines().any(|found| found == line), "{line}");
    }
    let health = image.lines().find(|line| line.starts_with("HEALTHCHECK ")).unwrap();
    assert!(health.ends_with("CMD [\"/usr/local/bin/secretier\", \"health\"]"), "there is no shell: {health}");
    assert!(!image.contains("\nRUN "), "there is nothing to run in it");
    assert!(image.contains(concat!("ARG VERSION=", env!("CARGO_PKG_VERSION"), "\n")));
    assert!(recipe.contains(concat!("ARG RUST=", env!("CARGO_PKG_RUST_VERSION"), "\n")));
    if has("hadolint", "it") {
        judged(Command::new("hadolint").arg(shipped("Containerfile")));
    }
}
