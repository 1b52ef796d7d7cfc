//! (S-34) Third parties' tests of file systems on the mount: pjdfstest, fsx. With the tools of `tests/peers/posix.sh`.

use forebay_tests::Cluster;
use forebay_tests::fuse::{Mount, is_here};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn peers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers")
}

fn tool(name: &str) -> PathBuf {
    let built = Command::new("bash").arg(peers().join("posix.sh")).output().expect("posix.sh");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    Path::new(String::from_utf8(built.stdout).expect("path").trim()).join(name)
}

fn shown(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// One pass of pjdfstest over the tests that match `patterns`; returns how many passed.
fn pjdfstest(cluster: &Cluster, mount: &Mount, remount: bool, patterns: &[&str]) -> usize {
    let dir = mount.path(if remount { "erofs" } else { "all" });
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let config = std::fs::read_to_string(peers().join("pjdfstest.toml")).unwrap();
    let config = config.replace("SECONDARY", &cluster.dir.path().display().to_string()).replace("REMOUNT", if remount { "true" } else { "false" });
    let file = cluster.dir.path().join("pjdfstest.toml");
    std::fs::write(&file, config).unwrap();
    let output = Command::new(tool("pjdfstest")).arg("-c").arg(&file).arg("-p").arg(&dir).arg("--").args(patterns).output().unwrap();
    let text = shown(&output);
    let summary = text.lines().find(|line| line.starts_with("Summary: ")).unwrap_or_else(|| panic!("no summary:\n{text}"));
    eprintln!("pjdfstest {patterns:?}: {summary}");
    let count = |what: &str| {
        let before = summary.split(what).next().and_then(|before| before.split([' ', ',']).rfind(|word| !word.is_empty()));
        before.and_then(|n| n.parse::<usize>().ok()).unwrap_or_else(|| panic!("{what} in {summary}"))
    };
    let failed: Vec<&str> = text.lines().filter(|line| line.trim_end().ends_with("FAILED")).collect();
    assert!(output.status.success() && count(" failed") == 0, "{failed:#?}\n{text}");
    count(" passed")
}

/// All tests of pjdfstest but those that `peers/pjdfstest.toml` names with their reasons.
#[tokio::test(flavor = "multi_thread")]
async fn pjdfstest_passes() {
    if !is_here("pjdfstest_passes") {
        return;
    }
    let cluster = Cluster::start(1, &[]).await;
    cluster.mount_folder("/m", &[]).await;
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    assert!(pjdfstest(&cluster, &mount, false, &[]) > 375);
    // Where FUSE's own tools are installed mount(8) asks their helper to remount, which takes what is mounted for a program.
    match Path::new("/sbin/mount.fuse").exists() {
        true => println!("SKIPPED pjdfstest_passes, the part that remounts: /sbin/mount.fuse is here, and `mount -o remount` without -i ends there"),
        false => assert!(pjdfstest(&cluster, &mount, true, &["erofs"]) > 8),
    }
    assert_eq!(mount.metric("forebay_fuse_lost_writes_total"), 0);
}

/// fsx: random reads, writes, mappings and cuts of one file beside a model. `FOREBAY_TEST_FSX` asks for more operations of each seed.
#[tokio::test(flavor = "multi_thread")]
async fn fsx_finds_nothing() {
    if !is_here("fsx_finds_nothing") {
        return;
    }
    let operations = std::env::var("FOREBAY_TEST_FSX").unwrap_or_else(|_| "6000".to_owned());
    let seeds: u64 = if operations.len() > 4 { 10 } else { 2 };
    let first = std::env::var("FOREBAY_TEST_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or_else(rand::random::<u32>);
    let cluster = Cluster::start(1, &[]).await;
    let folder = cluster.mount_folder("/m", &[("block_size", "64KiB"), ("page_size", "64KiB")]).await;
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    let config = peers().join("fsx.toml");
    for seed in (0..seeds).map(|i| u64::from(first) + i) {
        let file = mount.path(&format!("f{seed}"));
        let output = Command::new(tool("fsx")).arg("-f").arg(&config).args(["-S", &seed.to_string(), "-N", &operations]).arg(&file).output().unwrap();
        let text = shown(&output);
        let last: String = text.lines().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
        assert!(output.status.success(), "replay with FOREBAY_TEST_SEED={seed} FOREBAY_TEST_FSX={operations}:\n{last}");
        let here = std::fs::read(&file).unwrap_or_default();
        assert!(here == std::fs::read(folder.join(format!("f{seed}"))).unwrap_or_default(), "seed {seed}: what is closed is in the store");
    }
    eprintln!("fsx: {seeds} seeds from {first}, {operations} operations each");
}
