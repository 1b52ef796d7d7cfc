//! One behaviour suite, run through each way in: short circuit, network, and the commands.

use forebay_client::{CreateOptions, FileSystem};
use forebay_common::ErrorKind;
use forebay_tests::cluster::p;
use forebay_tests::suite::{bytes_come_back, names, read_all, unfinished, write};
use forebay_tests::{Cluster, pattern};

#[tokio::test(flavor = "multi_thread")]
async fn through_short_circuit_and_network() {
    let cluster = Cluster::start(1, &[("client.call_timeout_ms", "3000")]).await;
    for (way, dir) in [(cluster.client().await, "/local"), (cluster.network_client().await, "/network")] {
        bytes_come_back(&way, dir).await;
        names(&way, dir).await;
        let quick = forebay_common::config::ClientConfig { call_timeout_ms: 300, ..cluster.client_config() };
        unfinished(&FileSystem::connect(&quick).await.unwrap(), dir).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn through_the_commands() {
    let cluster = Cluster::start(1, &[]).await;
    let local = cluster.dir.path().join("in");
    std::fs::create_dir_all(local.join("sub")).unwrap();
    let bytes = pattern(9, 0, 300_000);
    std::fs::write(local.join("sub/file"), &bytes).unwrap();
    std::fs::write(local.join("empty"), "").unwrap();
    cluster.ok(&["fs", "put", &local.to_string_lossy(), "/d"]);
    let out = cluster.dir.path().join("out");
    cluster.ok(&["fs", "get", "/d", &out.to_string_lossy()]);
    assert!(std::fs::read(out.join("sub/file")).unwrap() == bytes && std::fs::read(out.join("empty")).unwrap().is_empty());
    assert_eq!(cluster.run(&["fs", "cat", "/d/sub/file", "--offset", "7", "--length", "11"]).stdout, bytes[7..18]);
    assert_eq!(cluster.run(&["fs", "head", "-c", "5", "/d/sub/file"]).stdout, bytes[..5]);
    assert_eq!(cluster.run(&["fs", "tail", "-c", "5", "/d/sub/file"]).stdout, bytes[bytes.len() - 5..]);
    cluster.ok(&["fs", "cp", "/d", "/copy"]);
    cluster.ok(&["fs", "load", "/copy"]);
    cluster.ok(&["fs", "mv", "/copy/sub/file", "/copy/moved"]);
    assert_eq!(cluster.json(&["fs", "count", "/copy"]), serde_json::json!({ "folders": 2, "files": 2, "bytes": 300_000 }));
    let stat = cluster.json(&["fs", "stat", "/copy/moved"]);
    for key in [
        "path",
        "file_id",
        "length",
        "block_size_bytes",
        "folder",
        "completed",
        "persisted",
        "pinned",
        "ttl_ms",
        "owner",
        "group",
        "mode",
        "ufs_path",
        "cached_percent",
        "mem_percent",
        "blocks",
    ] {
        assert!(!stat[key].is_null(), "{key} in {stat}");
    }
    assert_eq!((&stat["length"], &stat["cached_percent"]), (&300_000.into(), &100.into()));
    let block = &stat["blocks"][0];
    assert!(["id", "offset", "length"].iter().all(|k| block[k].is_u64()) && block["locations"][0]["cached_bytes"] == 300_000, "{block}");
    let capacity = cluster.json(&["fsadmin", "report", "capacity"]);
    assert!(capacity["tiers"]["MEM"]["total_bytes"].is_u64() && capacity["workers"][0]["last_heartbeat_ms"].is_u64(), "{capacity}");
    cluster.ok(&["fs", "touch", "/t1"]);
    cluster.ok(&["fs", "touch", "/t2"]);
    for (arguments, code) in [
        (&["fs", "test", "-d", "/d"][..], 0),
        (&["fs", "test", "-f", "/d"], 1),
        (&["fs", "test", "-e", "/none"], 1),
        (&["fs", "test", "-z", "/d/empty"], 0),
        (&["fs", "stat", "/none"], 1),
        (&["fs", "nonsense"], 2),
        (&["fs", "cat", "relative"], 2),
        (&["fs", "test", "/d"], 2),
        (&["fs", "test", "-e", "relative"], 2),
        (&["fs", "chmod", "999", "/d"], 2),
        (&["fs", "rm", "/t1", "/none", "/t2"], 1),
        (&["mount", "/none/of/this"], 1),
        (&["mount", "/mnt", "-o", "nonsense=1"], 2),
    ] {
        assert_eq!(cluster.run(arguments).status.code(), Some(code), "{arguments:?}");
    }
    assert_eq!(cluster.run(&["fs", "test", "-e", "/t2"]).status.code(), Some(1), "rm goes on after one that failed");
    assert_eq!(cluster.json(&["fs", "mkdir", "/j"]), serde_json::json!({ "ok": true }));
    let failed: serde_json::Value = serde_json::from_slice(&cluster.run(&["fs", "ls", "/none", "--json"]).stdout).unwrap();
    assert_eq!(failed["error"]["kind"], "NotFound");
    cluster.ok(&["fs", "rm", "-R", "/j"]);
    cluster.ok(&["fs", "touch", "/t"]);
    cluster.ok(&["fs", "touch", "/t"]);
    cluster.ok(&["fs", "rm", "-R", "/d", "/copy", "/t"]);
    assert_eq!(cluster.json(&["fs", "ls", "/"]), serde_json::json!([]));
    assert!(cluster.ok(&["fsadmin", "doctor"]).contains("passed descriptor"));
    assert!(cluster.ok(&["config", "show"]).contains("master.rpc_port"));
    for kind in ["summary", "capacity", "metrics", "ufs"] {
        cluster.ok(&["fsadmin", "report", kind]);
    }
}

/// (S-4) Permissions are checked in the namespace and hold on the data path by the token.
#[tokio::test(flavor = "multi_thread")]
async fn permissions() {
    let cluster = Cluster::start(1, &[]).await;
    let root = cluster.client().await;
    let as_user = |user: &str| forebay_common::config::ClientConfig { user: user.into(), ..cluster.client_config() };
    let nobody = FileSystem::connect(&as_user("nobody")).await.unwrap();
    assert_eq!(nobody.mkdir(&p("/mine"), false, false).await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    write(&root, "/secret", b"s", CreateOptions { mode: 0o600, ..Default::default() }).await;
    assert_eq!(nobody.open(&p("/secret")).await.map(drop).unwrap_err().kind(), ErrorKind::PermissionDenied);
    let mode = |mode| forebay_proto::SetAttributesRequest { mode: Some(mode), ..Default::default() };
    assert_eq!(nobody.set_attributes(&p("/secret"), mode(0o777)).await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    root.set_attributes(&p("/secret"), mode(0o604)).await.unwrap();
    assert_eq!(read_all(&nobody, "/secret").await, b"s");
    assert_eq!(nobody.delete(&p("/secret"), false).await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(nobody.mount(&p("/m"), "file:///tmp", false, Default::default()).await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert!(FileSystem::connect(&as_user("")).await.is_ok());
    // What may not be read is never left out without a word.
    root.mkdir(&p("/open/closed"), true, false).await.unwrap();
    root.set_attributes(&p("/open/closed"), mode(0o700)).await.unwrap();
    assert_eq!(nobody.list(&p("/open"), true).await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(nobody.list_each(&p("/open"), true, |_| Ok(())).await.unwrap(), [p("/open/closed")]);
    assert_eq!(root.list(&p("/open"), true).await.unwrap().len(), 1);
    let refused = nobody.touch(&p("/open/new"), &CreateOptions::default()).await.unwrap_err();
    assert!(refused.message().contains("on /open,"), "{refused}");
}

/// (S-5) A written-through file is in the under store, whole, when its writer is told so; deletions and renames follow
/// there before they are acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn under_store_follows() {
    let cluster = Cluster::start(1, &[]).await;
    let fs = cluster.client().await;
    let folder = cluster.mount_folder("/m", &[("sync_interval_ms", "0")]).await;
    write(&fs, "/m/a/f", b"hello", CreateOptions { recursive: true, ..Default::default() }).await;
    assert_eq!(std::fs::read(folder.join("a/f")).unwrap(), b"hello");
    fs.rename(&p("/m/a"), &p("/m/b"), false).await.unwrap();
    assert!(!folder.join("a").exists() && folder.join("b/f").exists());
    fs.rename(&p("/m/b/f"), &p("/m/b/g"), false).await.unwrap();
    assert_eq!(read_all(&fs, "/m/b/g").await, b"hello");
    fs.delete(&p("/m/b"), true).await.unwrap();
    assert!(!folder.join("b").exists() && !fs.exists(&p("/m/b/g")).await.unwrap());
    // What appears, changes and vanishes there shows here.
    std::fs::write(folder.join("new"), "1").unwrap();
    assert_eq!(read_all(&fs, "/m/new").await, b"1");
    std::fs::write(folder.join("new"), "22").unwrap();
    assert_eq!(read_all(&fs, "/m/new").await, b"22");
    assert_eq!(fs.list(&p("/m"), false).await.unwrap().len(), 1);
    std::fs::remove_file(folder.join("new")).unwrap();
    assert!(!fs.exists(&p("/m/new")).await.unwrap());
    assert!(fs.list(&p("/m"), false).await.unwrap().is_empty());
    // A file of the cache alone over a stored one: what it hides goes with it.
    write(&fs, "/m/f", b"stored", CreateOptions::default()).await;
    write(&fs, "/m/f", b"cached", CreateOptions { overwrite: true, write_type: "cache_only".into(), ..Default::default() }).await;
    assert_eq!((read_all(&fs, "/m/f").await, std::fs::read(folder.join("f")).unwrap()), (b"cached".to_vec(), b"stored".to_vec()));
    fs.delete(&p("/m/f"), false).await.unwrap();
    assert!(!folder.join("f").exists() && !fs.exists(&p("/m/f")).await.unwrap());
    // A folder that was the cache's alone follows in the store once something below it is there.
    write(&fs, "/m/c/d/cached", b"1", CreateOptions { recursive: true, write_type: "cache_only".into(), ..Default::default() }).await;
    assert!(!folder.join("c").exists());
    write(&fs, "/m/c/d/stored", b"2", CreateOptions::default()).await;
    fs.rename(&p("/m/c"), &p("/m/e"), false).await.unwrap();
    assert!(!folder.join("c").exists() && folder.join("e/d/stored").exists());
    assert_eq!(fs.list(&p("/m"), true).await.unwrap().len(), 4);
    let mounts = cluster.ok(&["fs", "mount"]);
    assert!(mounts.contains("/m") && mounts.contains("file://"), "{mounts}");
    cluster.ok(&["fs", "unmount", "/m"]);
    assert!(!fs.exists(&p("/m")).await.unwrap() && folder.exists());
}

/// Mounts of the configuration file, their secrets by environment and by file; at the next start their options count again.
#[tokio::test(flavor = "multi_thread")]
async fn mounts_of_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let s3 = forebay_tests::s3::S3::start(dir.path()).await;
    std::fs::write(s3.folder.join("f"), "hello").unwrap();
    let (secret, wrong) = (dir.path().join("secret"), dir.path().join("wrong"));
    std::fs::write(&secret, format!("{}\n", forebay_tests::s3::KEYS.1)).unwrap();
    std::fs::write(&wrong, "nonsense\n").unwrap();
    let mount = |secret: &std::path::Path, page_size: &str, read_only: bool| {
        format!(
            "[[mount]]\npath = \"/s3\"\nuri = \"s3://bucket\"\nread_only = {read_only}\n[mount.options]\nendpoint = {:?}\nregion = \"us-east-1\"\n\
             access_key_id = {{ env = \"FOREBAY_TEST_KEY\" }}\nsecret_access_key = {{ file = {:?} }}\npage_size = {page_size:?}\n",
            s3.endpoint,
            secret.display().to_string(),
        )
    };
    let mut cluster = Cluster::prepare(&[]);
    cluster.master_environment.push(("FOREBAY_TEST_KEY".into(), forebay_tests::s3::KEYS.0.into()));
    cluster.master_extra = mount(&secret, "1MiB", true);
    cluster.begin(1).await;
    let fs = cluster.client().await;
    assert_eq!(read_all(&fs, "/s3/f").await, b"hello");
    let refused = fs.create(&p("/s3/g"), &CreateOptions::default()).await.map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly);
    let mounts = || cluster.json(&["fs", "mount"]).to_string();
    assert!(mounts().contains("1MiB") && !mounts().contains(forebay_tests::s3::KEYS.1), "{}", mounts());
    cluster.master_extra = mount(&secret, "256KiB", false);
    cluster.restart_master();
    let mounts = || cluster.json(&["fs", "mount"]).to_string();
    assert!(mounts().contains("256KiB"), "{}", mounts());
    write(&fs, "/s3/g", b"now", CreateOptions::default()).await;
    assert_eq!(std::fs::read(s3.folder.join("g")).unwrap(), b"now");
    // Options that do not work are not taken, and said without the secret; everything else starts.
    cluster.master_extra = mount(&wrong, "128KiB", false);
    cluster.restart_master();
    let mounts = || cluster.json(&["fs", "mount"]).to_string();
    assert!(mounts().contains("256KiB") && !mounts().contains("128KiB"), "{}", mounts());
    let said = std::fs::read_to_string(cluster.dir.path().join("master.log")).unwrap();
    assert!(said.contains("keeps the options it had") && said.contains("s3://bucket") && !said.contains("nonsense"), "{said}");
}
