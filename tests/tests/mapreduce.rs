//! Hadoop's own MapReduce jobs over `hdfs://`: TeraSort, DistCp to and from a real HDFS. A download of 120 MB: under `--full`.

use forebay_client::CreateOptions;
use forebay_tests::hadoop::command;
use forebay_tests::hdfs::Hdfs;
use forebay_tests::suite::{read_all, write};
use forebay_tests::{Cluster, pattern};
use std::path::Path;
use std::process::{Command, Stdio};

fn job(arguments: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/mapreduce/mapreduce.sh");
    let ran = Command::new("bash").arg(script).args(arguments).stdin(Stdio::null()).env_remove("HADOOP_CONF_DIR").output().expect("mapreduce.sh");
    assert!(ran.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

/// How many rows of 100 bytes are sorted; `None`: not now.
fn rows(test: &str) -> Option<u64> {
    let rows = std::env::var("FOREBAY_TEST_TERASORT_ROWS").ok().and_then(|n| n.parse().ok());
    if rows.is_none() {
        println!("SKIPPED {test}: MapReduce is a download of 120 MB; ./dev test --full runs it");
    }
    rows
}

/// (S-28) Rows are generated, sorted and validated by Hadoop's examples, in the cache alone; the sum of their checksums is the same before and after.
#[tokio::test(flavor = "multi_thread")]
async fn terasort() {
    let Some(rows) = rows("terasort") else { return };
    let mut cluster = Cluster::start(0, &[]).await;
    let quota = format!("\"{}MiB\"", ((rows * 100 * 3) >> 20) + 512);
    cluster.add_worker(&[("worker.mem_quota", &quota)]);
    cluster.ok(&["fs", "mkdir", "/tera"]);
    cluster.ok(&["fsadmin", "pathConf", "set", "/tera", "write_type=cache_only"]);
    let said = job(&["terasort", &cluster.hdfs(), "/tera", &rows.to_string()]);
    assert!(said.starts_with("checksum"), "the rows are in order: {said}");
    let count = cluster.json(&["fs", "count", "/tera/out"]);
    // Beside the rows there is the list of its partitions.
    assert!((rows * 100..rows * 100 + 4096).contains(&count["bytes"].as_u64().unwrap()), "{count}");
    eprintln!("TeraSort of {rows} rows: {}", said.trim());
}

/// (S-28) DistCp from a real HDFS, and back, compares checksums by itself, and finds nothing to do the second time.
#[tokio::test(flavor = "multi_thread")]
async fn distcp() {
    if rows("distcp").is_none() {
        return;
    }
    let cluster = Cluster::start(1, &[]).await;
    let hdfs = Hdfs::start(cluster.dir.path()).await;
    let fs = cluster.client().await;
    let bytes = pattern(1, 0, 5_000_000);
    write(&fs, "/from/a", &bytes, CreateOptions { recursive: true, ..Default::default() }).await;
    write(&fs, "/from/sub/b", b"small", CreateOptions { recursive: true, ..Default::default() }).await;
    let (ours, theirs) = (cluster.hdfs(), hdfs.uri.clone());
    job(&["distcp", &format!("{ours}/from"), &format!("{theirs}/there")]);
    job(&["distcp", &format!("{theirs}/there"), &format!("{ours}/back")]);
    assert!(read_all(&fs, "/back/a").await == bytes && read_all(&fs, "/back/sub/b").await == b"small");
    let sum = |uri: &str, path: &str| {
        let done = command(uri, &[], cluster.dir.path(), &["-checksum", path]);
        done.out.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(sum(&ours, "/from/a"), sum(&theirs, "/there/a"));
    let again = job(&["distcp", &format!("{ours}/from"), &format!("{theirs}/there"), "-update"]);
    assert!(!again.contains("Bytes Copied"), "nothing to do: {again}");
}
