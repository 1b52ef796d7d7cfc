//! An unmodified Spark from PyPI over `hdfs://`. Large to download: under `--full`.

use forebay_tests::Cluster;
use std::path::Path;
use std::process::{Command, Stdio};

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
