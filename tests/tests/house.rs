//! The house: which crate may depend on which, and that what the documents promise is tested.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// Who may depend on whom; tests and bench may depend on all.
const ARROWS: &[(&str, &[&str])] = &[
    ("forebay-common", &[]),
    ("forebay-proto", &["forebay-common"]),
    ("forebay-hdfs", &["forebay-common"]),
    ("forebay-ufs", &["forebay-common", "forebay-proto", "forebay-hdfs"]),
    ("forebay-master", &["forebay-common", "forebay-proto", "forebay-ufs", "forebay-hdfs"]),
    ("forebay-worker", &["forebay-common", "forebay-proto", "forebay-ufs", "forebay-hdfs"]),
    ("forebay-client", &["forebay-common", "forebay-proto"]),
    ("forebay-webhdfs", &["forebay-common", "forebay-proto", "forebay-client", "forebay-hdfs"]),
    ("forebay-fuse", &["forebay-common", "forebay-proto", "forebay-client"]),
    ("forebay-csi", &["forebay-common", "forebay-proto", "forebay-client"]),
    (
        "forebay",
        &[
            "forebay-common",
            "forebay-proto",
            "forebay-client",
            "forebay-fuse",
            "forebay-csi",
            "forebay-webhdfs",
            "forebay-master",
            "forebay-worker",
            "forebay-bench",
        ],
    ),
];

#[test]
fn no_arrow_is_broken() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    // Not by the crate cargo_metadata: what it wants of serde_json would have everything built a second time for the tests.
    let output = Command::new(env!("CARGO")).args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"]).arg(root).output();
    let metadata: Value = serde_json::from_slice(&output.expect("cargo metadata").stdout).expect("JSON");
    let name_of = |value: &Value| value["name"].as_str().expect("a name").to_owned();
    let packages = metadata["packages"].as_array().expect("packages");
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let ours: BTreeSet<String> = packages.iter().map(name_of).collect();
    let mut checked = 0;
    for package in packages {
        let name = name_of(package);
        let Some(allowed) = allowed.get(name.as_str()) else { continue };
        checked += 1;
        // Those for building and for tests have a kind.
        for dependency in package["dependencies"].as_array().expect("dependencies").iter().filter(|d| d["kind"].is_null()).map(name_of) {
            assert!(!ours.contains(&dependency) || allowed.contains(&dependency.as_str()), "{name} must not depend on {dependency}");
        }
    }
    assert_eq!(checked, ARROWS.len(), "every crate of the table exists");
}

/// Every promise of docs/SEMANTICS.md is numbered (`S-12`), and each number stands in a test.
#[test]
fn every_promise_has_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("docs/SEMANTICS.md")).expect("SEMANTICS.md");
    let promised: BTreeSet<&str> = text.lines().filter_map(|l| l.strip_prefix("- **S-")).filter_map(|l| l.split_once("**")).map(|(n, _)| n).collect();
    assert!(promised.len() >= 10, "promises are numbered");
    let mut sources = String::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("folder").flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() && !name.starts_with('.') && name != "target" {
                folders.push(path);
            } else if name.ends_with(".rs") {
                sources.push_str(&std::fs::read_to_string(path).expect("source"));
            }
        }
    }
    for number in promised {
        assert!(sources.contains(&format!("(S-{number})")), "no test bears (S-{number})");
    }
}
