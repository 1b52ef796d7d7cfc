//! (S-33) A reader as in training on the mount, over a real S3 server: 8 processes, shuffled, three epochs, plain `open`; beside the server's folder (local files) and
//! beside boto3. `FOREBAY_TEST_TRAINING` is the number of files, of 16 to 200 KiB.

use forebay_tests::cluster::{p, quoted};
use forebay_tests::fuse::{Mount, installed, is_here};
use forebay_tests::s3::S3;
use forebay_tests::{Cluster, pattern};
use forebay_ufs::{UfsUri, UnderStore};
use futures::StreamExt;
use std::path::Path;
use std::process::Command;

fn run(python: &Path, arguments: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/training.py");
    let output = Command::new(python).arg(script).args(arguments).output().expect("python");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Kilobytes of a process that are its own, not mapped blocks.
fn anonymous_kib(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn epochs_after_the_first_come_from_the_cache() {
    if !is_here("epochs_after_the_first_come_from_the_cache") {
        return;
    }
    let python = installed().join("bin/python");
    let count: u64 = std::env::var("FOREBAY_TEST_TRAINING").ok().and_then(|n| n.parse().ok()).unwrap_or(1_200);
    let mut cluster = Cluster::prepare(&[]);
    cluster.begin(0).await;
    // With what each file takes beyond its bytes, below the watermark.
    let quota = (count * 160 / 1024).max(64);
    let tiers = format!("[{{medium = \"SSD\", dirs = [{{path = {}, quota = \"{quota}MiB\"}}]}}]", quoted(cluster.dir.path().join("ssd").display()));
    cluster.add_worker(&[("worker.tiers", tiers.as_str())]);
    let s3 = S3::start(cluster.dir.path()).await;
    let store = UnderStore::open(&UfsUri::parse("s3://bucket").expect("uri"), &s3.options(None)).expect("store");
    let put = |i: u64| {
        let store = &store;
        async move {
            let mut bytes = pattern(i, 0, 16 * 1024 + (i.wrapping_mul(7_919) % (184 * 1024)) as usize);
            let sum = crc32fast::hash(&bytes);
            bytes.extend(sum.to_le_bytes());
            let mut writer = store.writer(format!("d{:05}/f{i:07}", i / 1000).as_bytes()).await.expect("writer");
            writer.write(bytes.into()).await.expect("write");
            writer.close().await.expect("close");
        }
    };
    futures::stream::iter(0..count).map(put).buffer_unordered(16).collect::<Vec<()>>().await;
    let fs = cluster.client().await;
    fs.mount(&p("/s3"), "s3://bucket", false, s3.options(None)).await.expect("mount");
    let mount = Mount::start(&cluster, "mnt", &["--path", "/s3"]);
    let (at, seed, count_text) = (mount.at.display().to_string(), rand::random::<u16>().to_string(), count.to_string());
    let first = run(&python, &["files", &at, &count_text, "1", &seed]);
    cluster.counters_arrived().await;
    let fetched = cluster.metric("Cluster.BytesReadUfs").await;
    let others = run(&python, &["files", &at, &count_text, "2", &seed]);
    cluster.counters_arrived().await;
    assert_eq!(cluster.metric("Cluster.BytesReadUfs").await, fetched, "nothing is fetched twice");
    let own = anonymous_kib(mount.id()) / 1024;
    let local = run(&python, &["files", &s3.folder.display().to_string(), &count_text, "2", &seed]);
    let direct = run(&python, &["s3", &s3.endpoint, &count_text, "1", &seed]);
    eprintln!(
        "{count} files, files/s: mount, epoch 1 {first}, 2 and 3 {others}; the server's folder {local}; boto3 {direct}; {own} MiB of the mount's process are its own"
    );
    assert!(own < 512, "{own} MiB");
    assert_eq!(mount.metric("forebay_fuse_lost_writes_total"), 0);
}
