//! An unmodified Spark from PyPI over `hdfs://`. Large to download: under `--full`.

use forebay_tests::cluster::p;
use forebay_tests::s3::S3;
use forebay_tests::{Cluster, eventually, rng};
use rand::Rng;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Versions that are run; the newest 3.x carries Hadoop 3.3, 4.x Hadoop 3.4.
const VERSIONS: &[&str] = &["3.5.5", "4.0.1"];

/// (S-28) Word count, Parquet, ORC, JSON and CSV written, appended, overwritten, partitioned, read back; and where Spark would run what reads.
#[tokio::test(flavor = "multi_thread")]
async fn spark_writes_and_reads() {
    if std::env::var("FOREBAY_TEST_SPARK").is_err() {
        println!("SKIPPED spark_writes_and_reads: Spark is a download of 300 MB a version; ./dev test --full runs it");
        return;
    }
    for version in VERSIONS {
        let mut cluster = Cluster::start(0, &[]).await;
        cluster.add_worker(&[("worker.hadoop_host", "\"worker-a\""), ("worker.mem_quota", "\"1GiB\"")]);
        let dir = cluster.dir.path().join("spark");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("../LICENSE"), dir.join("words")).unwrap();
        let mut command = Command::new("bash");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/spark/spark.sh")).arg(version).arg(cluster.hdfs()).arg(&dir);
        let ran = command.current_dir(&dir).stdin(Stdio::null()).output().expect("spark.sh");
        let said = String::from_utf8_lossy(&ran.stdout).into_owned();
        assert!(ran.status.success() && said.contains("\ndone"), "{said}\n{}", String::from_utf8_lossy(&ran.stderr));
        assert!(said.contains("preferred: hdfs_cache_worker-a") || said.contains("preferred: worker-a"), "{said}");
        eprintln!("Spark {version}: {}", said.lines().filter(|l| !l.contains("Stage")).collect::<Vec<_>>().join("; "));
    }
}

/// (S-29) The master is killed with -9 while jobs commit by rename, over an S3 mount: each leaves all of its rows, or no `_SUCCESS`; and the bucket gets to
/// hold what the namespace does.
#[tokio::test(flavor = "multi_thread")]
async fn the_master_is_killed_while_spark_commits() {
    const JOBS: usize = 6;
    if std::env::var("FOREBAY_TEST_SPARK").is_err() {
        println!("SKIPPED the_master_is_killed_while_spark_commits: Spark is a download of 300 MB a version; ./dev test --full runs it");
        return;
    }
    let mut random = rng("the_master_is_killed_while_spark_commits");
    let mut cluster = Cluster::start(0, &[]).await;
    cluster.add_worker(&[("worker.mem_quota", "\"1GiB\"")]);
    let s3 = S3::start(cluster.dir.path()).await;
    let mut mount = s3.options(None);
    mount.insert("write_type".into(), "async".into());
    cluster.client().await.mount(&p("/s3"), "s3://bucket", false, mount).await.unwrap();
    let dir = cluster.dir.path().to_owned();
    // The address must stay: clients have it.
    cluster.keep_hadoop_port();
    let uri = cluster.hdfs();
    let spark = |name: &str, value: String| {
        let mut command = Command::new("bash");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/spark/spark.sh")).arg(VERSIONS[0]).arg(&uri).arg(&dir);
        // As a NameNode without a second one is retried: calls that were sent are sent again, and answered once.
        command.arg("spark.hadoop.dfs.client.retry.policy.enabled=true");
        command.current_dir(&dir).env(name, value).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().expect("spark.sh")
    };
    let outputs: Vec<String> = (0..JOBS).map(|i| format!("/s3/out{i}")).collect();
    let mut jobs = spark("COMMIT", outputs.join(","));
    let fs = cluster.client().await;
    let mut kills = 0;
    for output in &outputs {
        let begun = async || fs.exists(&p(&format!("{output}/_temporary"))).await.unwrap_or(false) || fs.exists(&p(output)).await.unwrap_or(false);
        eventually("the next job writes", 180, begun).await;
        tokio::time::sleep(Duration::from_millis(random.random_range(0..2_000))).await;
        cluster.restart_master();
        kills += 1;
    }
    let said = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        std::io::Read::read_to_string(jobs.stdout.as_mut().expect("stdout"), &mut text).expect("output");
        jobs.wait().expect("wait");
        text
    });
    let said = said.await.unwrap();
    let ends: Vec<&str> = said.lines().filter(|l| l.starts_with("committed") || l.starts_with("failed")).collect();
    assert_eq!(ends.len(), JOBS, "{said}");
    let checked = tokio::task::spawn_blocking({
        let check = spark("CHECK", outputs.join(","));
        move || String::from_utf8_lossy(&check.wait_with_output().expect("spark").stdout).into_owned()
    });
    let checked = checked.await.unwrap();
    for (output, end) in outputs.iter().zip(&ends) {
        let line = checked.lines().find(|l| l.starts_with(&format!("{output} "))).unwrap_or_else(|| panic!("{output}: {checked}"));
        let whole = line == format!("{output} True 200000");
        assert!(if *end == "committed" { whole } else { whole || line.ends_with("False 0") }, "{end}: {line}");
    }
    // The bucket follows: the same files, and no attempt left behind.
    let shown = fs.list(&p("/s3"), true).await.unwrap().into_iter().filter(|s| !s.folder).count();
    let objects = || {
        let (mut count, mut folders) = (0, vec![s3.folder.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.path().is_dir() { folders.push(entry.path()) } else { count += 1 }
            }
        }
        count
    };
    eventually("the bucket is as the namespace", 120, async || objects() == shown).await;
    eprintln!("{kills} kills of the master under {JOBS} jobs: {}", ends.join(", "));
}
