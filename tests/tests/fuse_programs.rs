//! (S-33, S-34, S-37, S-38) Programs as they are, on the mount and on a local folder, with the same results; and programs that look for faults (fio, stress-ng). With
//! what `tests/peers/programs.sh` installs.

use forebay_tests::fuse::{Mount, installed, is_here, sh};
use forebay_tests::{Cluster, pattern};
use std::fs;
use std::path::Path;
use std::process::Command;

/// A folder of files of many sizes.
fn sources(at: &Path) {
    for i in 0..60u64 {
        fs::create_dir_all(at.join(format!("d{}", i % 7))).unwrap();
        fs::write(at.join(format!("d{}/f{i}", i % 7)), pattern(i, 0, (i * i * 37) as usize)).unwrap();
    }
}

const DATABASE: &str = r#"
import sqlite3
c = sqlite3.connect('t.db'); c.execute('pragma journal_mode=wal'); c.execute('create table t(a integer primary key, b text)')
for i in range(20):
    with c: c.executemany('insert into t(b) values (?)', [(str(j) * 50,) for j in range(100)])
with c: c.execute('delete from t where a % 3 = 0')
c.execute('vacuum'); c.close()
c = sqlite3.connect('t.db'); assert c.execute('pragma integrity_check').fetchone() == ('ok',); print(c.execute('select count(*) from t').fetchone()[0])
"#;

/// A data set in parts, read by the library that wrote it and by another one, mapped and not.
const TABLES: &str = r#"
import pyarrow as pa, pyarrow.parquet as pq, pyarrow.dataset as ds, duckdb, sys
rows = 200_000
t = pa.table({'k': [i % 10 for i in range(rows)], 'v': list(range(rows)), 's': [str(i) * 3 for i in range(rows)]})
ds.write_dataset(t, 'set', format='parquet', partitioning=ds.partitioning(pa.schema([('k', pa.int64())]), flavor='hive'))
pq.write_table(t, 'one.parquet', row_group_size=20_000)
sums = [
    sum(ds.dataset('set', partitioning='hive').to_table(columns=['v']).column('v').to_pylist()),
    sum(pq.read_table('one.parquet', columns=['v'], memory_map=True).column('v').to_pylist()),
    duckdb.sql("select sum(v) from 'one.parquet'").fetchone()[0],
    duckdb.sql("select sum(v) from read_parquet('set/**/*.parquet')").fetchone()[0],
]
assert set(sums) == {rows * (rows - 1) // 2}, sums
c = duckdb.connect('file.duckdb'); c.execute("create table t as select * from 'one.parquet'"); c.execute('checkpoint'); c.close()
c = duckdb.connect('file.duckdb', read_only=True); assert c.execute('select count(*), sum(v) from t').fetchone() == (rows, sums[0])
print('same')
"#;

fn python(program: &Path, dir: &Path, script: &str) -> String {
    let output = Command::new(program).args(["-c", script]).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Archives, copies, version control, databases, packages, compilers.
#[tokio::test(flavor = "multi_thread")]
async fn real_programs() {
    if !is_here("real_programs") {
        return;
    }
    let home = installed();
    let cluster = Cluster::start(1, &[]).await;
    cluster.mount_folder("/m", &[]).await;
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    let local = cluster.dir.path().join("local");
    sources(&local);
    let here = local.display();
    sh(&mount.at, &format!("cp -a {here} copy && diff -r {here} copy"));
    sh(
        &mount.at,
        &format!(
            "tar -C {here} -cf all.tar . && mkdir untarred && tar -C untarred -xf all.tar && diff -r {here} untarred && tar -df all.tar -C untarred"
        ),
    );
    sh(&mount.at, "cp -a copy again && mv again renamed && diff -r copy renamed && rm -rf renamed");
    // Both ways, with links and attributes; then a second look, by sums, finds nothing left to do.
    sh(&local, "ln d1/f1 d2/linked && ln -s ../d1/f1 d3/symbolic && python3 -c \"import os; os.setxattr('d1/f8', 'user.colour', b'red')\" || true");
    sh(
        &mount.at,
        &format!(
            "rsync -aHX -c {here}/ synced/ && test -z \"$(rsync -aHXcni --delete {here}/ synced/)\" && diff -r {here} synced && test synced/d1/f1 -ef synced/d2/linked
             echo changed >> synced/d4/f4 && rm synced/d5/f5 && rsync -aHXc --delete synced/ {here}-back/ && test -z \"$(rsync -aHXcni --delete synced/ {here}-back/)\" && diff -r synced {here}-back"
        ),
    );
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let from = if repository.join(".git").exists() {
        format!("git clone -q --no-local {} cloned", repository.display())
    } else {
        "git init -q cloned".to_owned()
    };
    sh(&mount.at, &from);
    sh(
        &mount.at.join("cloned"),
        "git config user.email a@b && git config user.name n && echo new > added && git add added && git commit -qm added && git fsck --full && git status --porcelain | wc -l | grep -qx 0",
    );
    assert_eq!(python(&home.join("bin/python"), &mount.at, DATABASE), "1334");
    assert_eq!(python(&home.join("bin/python"), &mount.at, TABLES), "same");
    let pip = format!("{}/bin/pip", home.display());
    sh(
        &mount.at,
        &format!(
            "{pip} install -q --no-compile --target site idna==3.10 && {pip} install -q --no-compile --target {here}-site idna==3.10 && diff -r site {here}-site
             cd site && {}/bin/python -B -c 'import idna; print(idna.encode(\"bücher.example\").decode())' | grep -qx xn--bcher-kva.example",
            home.display()
        ),
    );
    sh(&mount.at, "printf '#include <stdio.h>\\nint main(){puts(\"built\");}' > a.c && cc a.c -o a && ./a | grep -qx built");
    sh(
        &mount.at,
        "mkdir -p ws/one/src ws/two/src && cd ws
         printf '[workspace]\\nresolver = \"3\"\\nmembers = [\"one\", \"two\"]\\n' > Cargo.toml
         printf '[package]\\nname = \"one\"\\nversion = \"0.1.0\"\\nedition = \"2024\"\\n' > one/Cargo.toml && echo 'pub fn n() -> u32 { 7 }' > one/src/lib.rs
         printf '[package]\\nname = \"two\"\\nversion = \"0.1.0\"\\nedition = \"2024\"\\n[dependencies]\\none = { path = \"../one\" }\\n' > two/Cargo.toml
         echo 'fn main() { println!(\"{}\", one::n()) }' > two/src/main.rs
         export CARGO_TARGET_DIR=target; cargo build -q --offline && target/debug/two | grep -qx 7
         sleep 0.01; echo 'pub fn n() -> u32 { 8 }' > one/src/lib.rs && cargo build -q --offline && target/debug/two | grep -qx 8",
    );
    assert_eq!(mount.metric("forebay_fuse_lost_writes_total"), 0);
}

/// fio writes and compares: in order, at random, both, by mapping, past the page cache. `FOREBAY_TEST_FIO` is the size of each file in MiB.
#[tokio::test(flavor = "multi_thread")]
async fn fio_finds_no_wrong_byte() {
    if !is_here("fio_finds_no_wrong_byte") {
        return;
    }
    installed();
    let megabytes: u32 = std::env::var("FOREBAY_TEST_FIO").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let cluster = Cluster::start(1, &[]).await;
    cluster.mount_folder("/m", &[("block_size", "4MiB"), ("page_size", "1MiB")]).await;
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    let jobs = [
        ("in-order", "--rw=write --bs=128k --end_fsync=1"),
        ("at-random", "--rw=randwrite --bs=4k --fsync=1024"),
        ("mixed", "--rw=randrw --rwmixread=60 --bs=16k"),
        ("mapped", "--ioengine=mmap --rw=randwrite --bs=4k"),
        ("direct", "--direct=1 --rw=randwrite --bs=64k"),
        ("two-readers", "--rw=readwrite --bs=32k --numjobs=2"),
    ];
    for (name, how) in jobs {
        let text = sh(
            &mount.at,
            &format!(
                "fio --name={name} --directory=. --size={megabytes}m {how} --verify=crc32c --do_verify=1 --verify_fatal=1 --output-format=terse"
            ),
        );
        assert!(!text.is_empty());
        // Once more, from another opening of the file.
        sh(
            &mount.at,
            &format!(
                "fio --name={name} --directory=. --size={megabytes}m {how} --verify=crc32c --verify_only --verify_fatal=1 --output-format=terse"
            ),
        );
    }
    assert_eq!(mount.metric("forebay_fuse_lost_writes_total"), 0);
}

/// stress-ng's stressors of file systems, each for a second. `FOREBAY_TEST_STRESS` is for how many, and then all of that class are run but those for which the kernel
/// or FUSE has nothing (binderfs, fiemap, verity).
#[tokio::test(flavor = "multi_thread")]
async fn stressors_find_nothing() {
    if !is_here("stressors_find_nothing") {
        return;
    }
    installed();
    let cluster = Cluster::start(1, &[]).await;
    cluster.mount_folder("/m", &[]).await;
    let mount = Mount::start(&cluster, "mnt", &["--path", "/m"]);
    let which = match std::env::var("FOREBAY_TEST_STRESS") {
        Ok(seconds) => format!("--class filesystem --sequential 1 --exclude binderfs,fiemap,verity --timeout {seconds}"),
        Err(_) => "--access 1 --chmod 1 --chown 1 --copy-file 1 --dentry 1 --dir 1 --fallocate 1 --flock 1 --fpunch 1 --hdd 1 --hdd-bytes 16m --iomix 1 --iomix-bytes 16m --lockf 1 --open 1 --rename 1 --sync-file 1 --touch 1 --utime 1 --xattr 1 --timeout 6".to_owned(),
    };
    let text = sh(&mount.at, &format!("mkdir s && stress-ng {which} --temp-path $PWD/s --verify 2>&1"));
    assert!(text.contains("successful run completed"), "{text}");
    assert_eq!(mount.metric("forebay_fuse_lost_writes_total"), 0);
}
