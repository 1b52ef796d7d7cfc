//! The chart without a cluster: what it renders for 20 sets of values (beside golden files), what it refuses, and that the configuration it writes is one.
//!
//! `tests/helm/values/NAME.yaml` are the sets; `tests/helm/golden/default.yaml` is all that the default renders, the other golden files are how a set differs from it.
//! `FOREBAY_TEST_BLESS=1` writes them anew.

use forebay_tests::kube;
use similar::TextDiff;
use std::process::Command;

#[test]
fn what_it_renders_is_what_is_on_file() {
    let bless = std::env::var_os("FOREBAY_TEST_BLESS").is_some();
    let default = kube::render(&kube::chart_tests("values").join("default.yaml"), &[]).unwrap();
    for (name, values) in kube::value_sets() {
        // A cluster with Prometheus' operator has a kind more.
        let more: &[&str] = if name == "metrics" { &["--api-versions", "monitoring.coreos.com/v1/PodMonitor"] } else { &[] };
        let rendered = kube::render(&values, more).unwrap_or_else(|e| panic!("{name}: {e}"));
        let golden = kube::chart_tests("golden").join(if name == "default" { "default.yaml".to_owned() } else { format!("{name}.diff") });
        let text = match name.as_str() {
            "default" => rendered,
            _ => TextDiff::from_lines(&default, &rendered).unified_diff().context_radius(2).header("default", &name).to_string(),
        };
        if bless {
            std::fs::create_dir_all(kube::chart_tests("golden")).unwrap();
            std::fs::write(&golden, &text).unwrap();
        }
        let on_file = std::fs::read_to_string(&golden).unwrap_or_default();
        let difference = TextDiff::from_lines(&on_file, &text).unified_diff().context_radius(3).to_string();
        assert!(
            on_file == text,
            "{name}: not as on file (FOREBAY_TEST_BLESS=1 cargo test --release -p forebay-tests --test helm takes it over):\n{difference}"
        );
    }
}

#[test]
fn helm_has_nothing_to_say_against_it() {
    for (name, values) in kube::value_sets() {
        let chart = kube::chart();
        let output = kube::helm(&["lint", "--strict", chart.to_str().unwrap(), "--values", values.to_str().unwrap()]);
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

/// Each error names the value.
#[test]
fn wrong_values_are_refused_by_name() {
    let wrong = [
        ("master: {replicas: 3}", "replicas"),
        ("master: {replica: 1}", "replica"),
        ("master: {ports: {rpc: 0}}", "rpc"),
        ("master: {ports: {rpc: 70000}}", "rpc"),
        ("master: {persistence: {size: lots}}", "size"),
        ("master: {persistence: {accessModes: []}}", "accessModes"),
        ("master: {service: {type: Ingress}}", "type"),
        ("worker: {kind: Deployment}", "kind"),
        ("worker: {tiers: []}", "tiers"),
        ("worker: {tiers: [{medium: NVME, dirs: [{type: emptyDir, quota: 1Gi}]}]}", "medium"),
        ("worker: {tiers: [{medium: MEM, dirs: [{type: emptyDir}]}]}", "quota"),
        ("worker: {tiers: [{medium: MEM, dirs: [{type: emptyDir, quota: 1 gigabyte}]}]}", "quota"),
        ("worker: {tiers: [{medium: SSD, dirs: [{type: hostPath, quota: 1Gi}]}]}", "path"),
        (
            "worker: {tiers: [{medium: SSD, dirs: [{type: emptyDir, quota: 1Gi}]}, {medium: MEM, dirs: [{type: emptyDir, quota: 1Gi}]}]}",
            "in the order MEM, SSD, HDD",
        ),
        ("worker: {tiers: [{medium: SSD, dirs: [{type: persistentVolumeClaim, quota: 1Gi}]}]}", "needs worker.kind StatefulSet"),
        ("worker: {kind: StatefulSet, tiers: [{medium: SSD, dirs: [{type: hostPath, path: /x, quota: 1Gi}]}]}", "needs worker.kind DaemonSet"),
        ("worker: {memory: {limit: 1Gi}}", "worker.memory.limit"),
        ("worker: {resources: {limits: {memory: 1Gi}}}", "worker.memory.limit"),
        ("worker: {drain: {seconds: 0}}", "seconds"),
        ("worker: {autoscaling: {enabled: true}}", "worker.autoscaling"),
        ("worker: {kind: StatefulSet, autoscaling: {enabled: true, minReplicas: 5, maxReplicas: 4}}", "minReplicas"),
        ("worker: {autoscaling: {workingSetPercent: 0}}", "workingSetPercent"),
        ("keeper: {seconds: 0}", "seconds"),
        ("properties: {rpc_port: 1}", "rpc_port"),
        ("mounts: [{path: s3, uri: s3://b}]", "path"),
        ("mounts: [{path: /s3}]", "uri"),
        ("mounts: [{path: /s3, uri: bucket}]", "uri"),
        ("mounts: [{path: /s3, uri: s3://b, secretOptions: {access_key_id: {name: s}}}]", "key"),
        ("mounts: [{path: /s3, uri: s3://b, options: {secret_access_key: x}}]", "secretOptions"),
        ("serviceAccount: {create: false}", "serviceAccount.name"),
        ("locality: {policy: yarn}", "policy"),
        ("locality: {policy: pods}", "locality.podSelector"),
        ("shortCircuit: {hostPath: run/forebay}", "hostPath"),
        ("image: {digest: latest}", "digest"),
        ("fuse: {enabled: true, hostPath: /run/forebay/mnt}", "fuse.hostPath"),
        ("fuse: {mountOptions: []}", "mountOptions"),
        ("csi: {enabled: true, storageClasses: [{path: /a}]}", "name"),
        ("csi: {enabled: true, storageClasses: [{name: a, path: volumes}]}", "path"),
        ("csi: {enabled: true, storageClasses: [{name: a, reclaimPolicy: Recycle}]}", "reclaimPolicy"),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (values, named) in wrong {
        let file = dir.path().join("values.yaml");
        std::fs::write(&file, values).unwrap();
        let refused = kube::render(&file, &[]).err().unwrap_or_else(|| panic!("{values} is taken"));
        assert!(refused.contains(named), "{values}: the error does not name {named}: {refused}");
    }
}

/// The configuration that a set renders for each role is taken by the binary.
#[test]
fn the_configuration_is_one() {
    let dir = tempfile::tempdir().unwrap();
    for (name, values) in kube::value_sets() {
        let text = kube::render(&values, &["--show-only", "templates/configmaps.yaml"]).unwrap();
        let mut checked = 0;
        for part in text.split("  forebay.toml: |\n").skip(1) {
            let config: String =
                part.lines().take_while(|line| line.is_empty() || line.starts_with("    ")).map(|line| format!("{}\n", line.trim_start())).collect();
            let file = dir.path().join("forebay.toml");
            std::fs::write(&file, &config).unwrap();
            let output = Command::new(forebay_tests::forebay()).arg("--config").arg(&file).args(["config", "check"]).output().unwrap();
            assert!(output.status.success(), "{name}: {}\n{config}", String::from_utf8_lossy(&output.stderr));
            checked += 1;
        }
        assert_eq!(checked, if ["fuse", "csi", "storage-classes"].contains(&name.as_str()) { 3 } else { 2 }, "{name}");
    }
}

/// helm/forebay/README.md is made from values.yaml by helm-docs.
#[test]
fn the_table_of_values_is_that_of_the_values() {
    let dir = tempfile::tempdir().unwrap();
    let chart = kube::chart();
    let copied = Command::new("cp").arg("-r").arg(&chart).arg(dir.path()).status().unwrap();
    assert!(copied.success());
    let made =
        Command::new(kube::programs().join("helm-docs")).arg("--chart-search-root").arg(dir.path()).arg("--log-level").arg("error").output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let fresh = std::fs::read_to_string(dir.path().join("forebay/README.md")).unwrap();
    if std::env::var_os("FOREBAY_TEST_BLESS").is_some() {
        std::fs::write(chart.join("README.md"), &fresh).unwrap();
    }
    let on_file = std::fs::read_to_string(chart.join("README.md")).unwrap_or_default();
    assert!(fresh == on_file, "helm/forebay/README.md is not what values.yaml says: FOREBAY_TEST_BLESS=1 takes it over");
}
