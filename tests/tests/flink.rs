//! An unmodified Flink from Maven over `hdfs://`. A download of 100 MB: under `--full`.

use forebay_client::CreateOptions;
use forebay_tests::Cluster;
use forebay_tests::cluster::p;
use forebay_tests::suite::{read_all, write};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

/// (S-28) Words are counted as a batch, lines copied as a stream with checkpoints, whose sink goes on with files that are not finished: what is there then is what
/// was read.
#[tokio::test(flavor = "multi_thread")]
async fn flink_reads_and_writes() {
    if std::env::var("FOREBAY_TEST_FLINK").is_err() {
        println!("SKIPPED flink_reads_and_writes: Flink is a download of 100 MB; ./dev test --full runs it");
        return;
    }
    let cluster = Cluster::start(2, &[]).await;
    let fs = cluster.client().await;
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../LICENSE")).unwrap();
    write(&fs, "/flink/words", text.as_bytes(), CreateOptions { recursive: true, ..Default::default() }).await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/flink/flink.sh");
    let mut command = Command::new("bash");
    command.arg(script).arg(cluster.hdfs()).arg("/flink").stdin(Stdio::null()).env_remove("HADOOP_CONF_DIR");
    let ran = tokio::task::spawn_blocking(move || command.output().expect("flink.sh")).await.unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let lines_below = async |folder: &str| {
        let mut lines: Vec<String> = Vec::new();
        for status in fs.list(&p(folder), true).await.unwrap().into_iter().filter(|s| !s.folder) {
            let path = String::from_utf8(status.path.to_vec()).unwrap();
            assert!(!path.contains("inprogress"), "{path} was not finished");
            lines.extend(String::from_utf8(read_all(&fs, &path).await).unwrap().lines().map(str::to_owned));
        }
        lines.sort();
        lines
    };
    let mut counts = BTreeMap::new();
    text.split_whitespace().for_each(|word| *counts.entry(word).or_insert(0) += 1);
    let mut wanted: Vec<String> = counts.iter().map(|(word, count)| format!("{word}\t{count}")).collect();
    wanted.sort();
    assert_eq!(lines_below("/flink/counts").await, wanted);
    let mut wanted: Vec<String> = text.lines().map(str::to_owned).collect();
    wanted.sort();
    assert_eq!(lines_below("/flink/lines").await, wanted);
    eprintln!("Flink: {} words counted, {} lines copied", counts.len(), wanted.len());
}
