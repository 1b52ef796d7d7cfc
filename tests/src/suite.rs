//! One behaviour suite for every way in and every under store: what it asks of each is the same.

use crate::cluster::p;
use crate::{eventually, pattern};
use forebay_client::{CreateOptions, FileSystem};
use forebay_common::ErrorKind;
use forebay_ufs::UnderStore;

/// Writes a file in pieces.
pub async fn write(fs: &FileSystem, path: &str, bytes: &[u8], options: CreateOptions) {
    let mut file = fs.create(&p(path), &options).await.expect("create");
    for piece in bytes.chunks(300_000) {
        file.write(piece).await.expect("write");
    }
    let status = file.close().await.expect("close");
    assert_eq!(status.length, bytes.len() as u64);
    assert!(status.completed);
}

/// A file's bytes.
pub async fn read_all(fs: &FileSystem, path: &str) -> Vec<u8> {
    let file = fs.open(&p(path)).await.expect("open");
    let mut out = Vec::new();
    let mut pieces = file.pieces(0..u64::MAX);
    while let Some(piece) = pieces.next().await.expect("read") {
        out.extend_from_slice(&piece);
    }
    out
}

/// (S-1) What was written is read back, by every kind of read, whatever the sizes of blocks, pages and pieces.
pub async fn bytes_come_back(fs: &FileSystem, dir: &str) {
    for (i, (length, block)) in
        [(0, 0), (1, 0), (65_536, 65_536), (65_537, 65_536), (3_000_000, 1 << 20), (5_000_001, 200_000)].into_iter().enumerate()
    {
        for write_type in ["through", "async", "cache_only", "ufs_only"] {
            let path = format!("{dir}/f{i}-{write_type}");
            let bytes = pattern(i as u64, 0, length);
            write(fs, &path, &bytes, CreateOptions { block_size_bytes: block, write_type: write_type.into(), recursive: true, ..Default::default() })
                .await;
            assert!(read_all(fs, &path).await == bytes, "{path} comes back whole");
            let file = fs.open(&p(&path)).await.expect("open");
            for (offset, want) in [(0usize, 10usize), (length / 2, 70_000), (length.saturating_sub(5), 10), (length, 10), (65_530.min(length), 12)] {
                let mut out = vec![0; want];
                let got = file.read_at(offset as u64, &mut out).await.expect("read_at");
                let end = length.min(offset + want);
                assert_eq!(got, end - offset.min(end), "{path} at {offset}");
                assert!(out[..got] == bytes[offset.min(end)..end], "{path} at {offset}");
                assert!(file.slice(offset as u64, want).await.expect("slice")[..] == bytes[offset.min(end)..end]);
            }
        }
    }
}

/// (S-2) Names: what exists, what does not, and what is refused, each with the right kind of error.
pub async fn names(fs: &FileSystem, dir: &str) {
    let at = |name: &str| p(&format!("{dir}/{name}"));
    fs.mkdir(&at("a/b/c"), true, false).await.expect("mkdir -p");
    assert_eq!(fs.mkdir(&at("a"), false, false).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs.mkdir(&at("x/y"), false, false).await.unwrap_err().kind(), ErrorKind::NotFound);
    fs.touch(&at("a/f"), &CreateOptions::default()).await.expect("touch");
    assert_eq!(fs.touch(&at("a/f"), &CreateOptions::default()).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs.get_status(&at("a/f/g")).await.unwrap_err().kind(), ErrorKind::NotADirectory);
    assert_eq!(fs.open(&at("a")).await.map(drop).unwrap_err().kind(), ErrorKind::IsADirectory);
    assert_eq!(fs.open(&at("none")).await.map(drop).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(fs.delete(&at("a"), false).await.unwrap_err().kind(), ErrorKind::NotEmpty);
    fs.rename(&at("a/f"), &at("a/b/g"), false).await.expect("rename");
    assert!(!fs.exists(&at("a/f")).await.unwrap() && fs.exists(&at("a/b/g")).await.unwrap());
    assert_eq!(fs.rename(&at("a"), &at("a/b/in"), false).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    fs.rename(&at("a"), &at("moved"), false).await.expect("rename a folder");
    let names: Vec<String> = fs.list(&at("moved"), true).await.unwrap().iter().map(|e| String::from_utf8_lossy(&e.path).replace(dir, "")).collect();
    assert_eq!(names, ["/moved/b", "/moved/b/c", "/moved/b/g"]);
    write(fs, &format!("{dir}/moved/b/g2"), b"two", CreateOptions::default()).await;
    assert_eq!(fs.rename(&at("moved/b/g2"), &at("moved/b/g"), false).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    fs.rename(&at("moved/b/g2"), &at("moved/b/g"), true).await.expect("rename over");
    assert_eq!(read_all(fs, &format!("{dir}/moved/b/g")).await, b"two");
    write(fs, &format!("{dir}/moved/b/g"), b"three!", CreateOptions { overwrite: true, ..Default::default() }).await;
    assert_eq!(read_all(fs, &format!("{dir}/moved/b/g")).await, b"three!");
    fs.delete(&at("moved"), true).await.expect("rm -R");
    assert!(!fs.exists(&at("moved/b/g")).await.unwrap());
}

/// (S-3) A file that is being written has no bytes for others, and an abandoned one leaves nothing.
pub async fn unfinished(fs: &FileSystem, dir: &str) {
    let path = p(&format!("{dir}/unfinished"));
    let mut file = fs.create(&path, &CreateOptions::default()).await.expect("create");
    file.write(&[1; 100_000]).await.expect("write");
    assert_eq!(fs.delete(&path, false).await.unwrap_err().kind(), ErrorKind::Busy);
    file.abort().await;
    assert!(!fs.exists(&path).await.unwrap());
}

/// Puts an object without the cache knowing.
pub async fn put_behind(store: &UnderStore, key: &str, bytes: impl Into<bytes::Bytes>) {
    let mut writer = store.writer(key.as_bytes()).await.expect("writer");
    let bytes = bytes.into();
    if !bytes.is_empty() {
        writer.write(bytes).await.expect("write");
    }
    writer.close().await.expect("close");
}

/// An object's bytes, as the store has them.
pub async fn get_behind(store: &UnderStore, key: &str) -> forebay_common::Result<bytes::Bytes> {
    let entry = store.stat(key.as_bytes()).await?;
    if entry.length == 0 {
        return Ok(bytes::Bytes::new());
    }
    store.read(key.as_bytes(), 0, entry.length as usize, &entry.fingerprint).await
}

async fn there(store: &UnderStore, key: &str) -> bool {
    match store.stat(key.as_bytes()).await {
        Ok(_) => true,
        Err(e) if e.kind() == ErrorKind::NotFound => false,
        Err(e) => panic!("{e}"),
    }
}

/// (S-5) A written-through file is in the under store, whole, when its writer is told so; deletions and renames follow there before
/// they are acknowledged; what appears, changes and vanishes there shows here. `dir` is a mount of `store` with sync interval 0.
pub async fn follows(fs: &FileSystem, dir: &str, store: &UnderStore) {
    let at = |name: &str| p(&format!("{dir}/{name}"));
    let path = |name: &str| format!("{dir}/{name}");
    write(fs, &path("a/f"), b"hello", CreateOptions { recursive: true, ..Default::default() }).await;
    assert_eq!(get_behind(store, "a/f").await.unwrap(), "hello");
    fs.rename(&at("a"), &at("b"), false).await.unwrap();
    assert!(!there(store, "a/f").await && there(store, "b/f").await);
    fs.rename(&at("b/f"), &at("b/g"), false).await.unwrap();
    assert_eq!(read_all(fs, &path("b/g")).await, b"hello");
    fs.delete(&at("b"), true).await.unwrap();
    assert!(!there(store, "b/g").await && !fs.exists(&at("b/g")).await.unwrap());
    put_behind(store, "new", "1").await;
    assert_eq!(read_all(fs, &path("new")).await, b"1");
    put_behind(store, "new", "22").await;
    assert_eq!(read_all(fs, &path("new")).await, b"22");
    // Of the same length: on HDFS a modification time apart.
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    put_behind(store, "new", "33").await;
    assert_eq!(read_all(fs, &path("new")).await, b"33");
    put_behind(store, "deep/er/new", "4").await;
    assert_eq!(read_all(fs, &path("deep/er/new")).await, b"4");
    assert_eq!(fs.list(&p(dir), true).await.unwrap().iter().filter(|e| !e.folder).count(), 2);
    store.delete(b"deep", true).await.unwrap();
    store.delete(b"new", false).await.unwrap();
    assert!(!fs.exists(&at("new")).await.unwrap() && !fs.exists(&at("deep/er/new")).await.unwrap());
    // A folder becomes a file and the other way round.
    put_behind(store, "turn/f", "folder").await;
    assert_eq!(read_all(fs, &path("turn/f")).await, b"folder");
    store.delete(b"turn", true).await.unwrap();
    put_behind(store, "turn", "file").await;
    assert_eq!(read_all(fs, &path("turn")).await, b"file");
    store.delete(b"turn", false).await.unwrap();
    assert!(fs.list(&p(dir), false).await.unwrap().iter().all(|e| e.folder));
    // A file of the cache alone over a stored one: what it hides goes with it.
    write(fs, &path("f"), b"stored", CreateOptions::default()).await;
    write(fs, &path("f"), b"cached", CreateOptions { overwrite: true, write_type: "cache_only".into(), ..Default::default() }).await;
    assert_eq!((read_all(fs, &path("f")).await, &get_behind(store, "f").await.unwrap()[..]), (b"cached".to_vec(), &b"stored"[..]));
    fs.delete(&at("f"), false).await.unwrap();
    assert!(!there(store, "f").await && !fs.exists(&at("f")).await.unwrap());
    // Acknowledged from the cache, in the store soon after; moved on its way, it gets to where it is by then.
    write(fs, &path("later/f"), b"later", CreateOptions { recursive: true, write_type: "async".into(), ..Default::default() }).await;
    fs.rename(&at("later/f"), &at("later/g"), false).await.unwrap();
    eventually("persisted", 30, async || fs.get_status(&at("later/g")).await.unwrap().persisted).await;
    assert_eq!(get_behind(store, "later/g").await.unwrap(), "later");
    assert!(!there(store, "later/f").await);
    assert_eq!(read_all(fs, &path("later/g")).await, b"later");
    fs.delete(&at("later"), true).await.unwrap();
    assert!(!there(store, "later/g").await);
}
