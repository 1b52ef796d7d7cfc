//! The house: which crate may depend on which, and that what the documents promise is tested.

use cargo_metadata::{DependencyKind, MetadataCommand};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

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
    let metadata = MetadataCommand::new().manifest_path(root).no_deps().exec().expect("cargo metadata");
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let ours: BTreeSet<String> = metadata.packages.iter().map(|p| p.name.to_string()).collect();
    let mut checked = 0;
    for package in &metadata.packages {
        let Some(allowed) = allowed.get(package.name.as_str()) else { continue };
        checked += 1;
        for dependency in package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal && ours.contains(&d.name)) {
            assert!(allowed.contains(&dependency.name.as_str()), "{} must not depend on {}", package.name, dependency.name);
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
