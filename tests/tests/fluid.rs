//! (S-43) A runtime of Fluid: master, worker, mount and what Fluid has done in their pods, with nothing but the file and the variables that Fluid gives them.
//!
//! Fluid itself is not run: `runtime.json` is written as its engine does (pkg/ddc/cache/engine/cm.go), and the manifests are checked against its definitions by hand.

use forebay_tests::forebay;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// The pods of a runtime, as processes.
struct Runtime {
    dir: tempfile::TempDir,
    children: Vec<Child>,
    master: String,
}

impl Drop for Runtime {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGTERM);
            let _ = child.wait();
        }
        // A worker leaves the read-only view of its tiers for the next one.
        let _ = Command::new("umount").arg("--lazy").arg(self.path("level-0-index-0-emptydir/forebay.ro")).output();
    }
}

impl Runtime {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// As Fluid writes it whenever its dataset or its runtime changes.
    fn write(&self, mounts: &Value) {
        let at = |name: &str| self.path(name).display().to_string();
        let runtime = json!({
            "mounts": mounts, "accessModes": ["ReadWriteMany"], "targetPath": at("mnt"),
            "master": {"enabled": true, "name": "d-master", "replicas": 1, "service": {"name": "svc-d-master"}, "options": {
                "master.data_dir": at("master"), "master.rpc_port": "0", "master.web_port": "0", "master.hadoop": "false"}},
            "worker": {"enabled": true, "name": "d-worker", "replicas": 1, "service": {"name": "svc-d-worker"}, "options": {
                "worker.data_dir": at("worker"), "worker.socket_dir": at("sockets"), "worker.data_port": "0", "worker.web_port": "0", "worker.hadoop": "false",
                "worker.mem_mount": "never"},
                "tieredStoreLevels": [{"mountPaths": [at("level-0-index-0-emptydir")], "mediumType": "MEM", "quotas": ["256Mi"], "high": "0.9", "low": "0.8"}]},
            "client": {"enabled": true, "name": "d-client", "options": {"client.socket_dir": at("sockets"), "fuse.staging_dir": at("staging"), "fuse.control_dir": at("control")}, "service": {"name": ""}},
        });
        std::fs::write(self.path("runtime.json"), runtime.to_string()).expect("write");
    }

    fn command(&self, part: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(forebay());
        command.env("FLUID_RUNTIME_CONFIG_PATH", self.path("runtime.json")).env("FLUID_RUNTIME_COMPONENT_TYPE", part).args(arguments);
        // Its name in the cluster is none here.
        if !self.master.is_empty() {
            command.env("FOREBAY_MASTER", &self.master);
        }
        command
    }

    fn spawn(&mut self, part: &str, arguments: &[&str]) -> String {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).expect("log");
        let mut child = self.command(part, arguments).stdout(Stdio::piped()).stderr(log).spawn().expect("spawn");
        let mut said = String::new();
        let mut reader = BufReader::new(child.stdout.take().expect("stdout"));
        reader.read_line(&mut said).expect("its first line");
        self.children.push(child);
        assert!(!said.is_empty(), "{part} ended: {}", std::fs::read_to_string(self.path("log")).unwrap_or_default());
        std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        said
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command("master", arguments).output().expect("run")
    }

    /// What Fluid reads: all of standard output.
    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {}", String::from_utf8_lossy(&output.stdout)))
    }
}

fn store(runtime: &Runtime, name: &str) -> String {
    let dir = runtime.path("stores").join(name);
    std::fs::create_dir_all(&dir).expect("a folder");
    std::fs::write(dir.join("file"), forebay_tests::pattern(7, 0, 1 << 20)).expect("write");
    format!("file://{}", dir.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_is_run_by_what_fluid_says() {
    let mut runtime = Runtime {
        dir: tempfile::Builder::new().prefix("forebay-test-fluid-").tempdir().expect("a folder"),
        children: Vec::new(),
        master: String::new(),
    };
    for folder in ["staging", "mnt"] {
        std::fs::create_dir(runtime.path(folder)).expect("a folder");
    }
    let (a, b, c) = (store(&runtime, "a"), store(&runtime, "b"), store(&runtime, "c"));
    let first = json!([{"mountPoint": a, "name": "a", "path": "/a"}, {"mountPoint": "pvc://claim", "name": "claim"}]);
    runtime.write(&first);
    let said = runtime.spawn("master", &["master"]);
    runtime.master = said.split_whitespace().nth(4).expect("an address").trim_end_matches(',').to_owned();
    runtime.spawn("worker", &["worker"]);
    let shown = runtime.command("worker", &["--json", "config", "show"]).output().expect("run");
    let shown: Vec<Value> = serde_json::from_slice(&shown.stdout).expect("JSON");
    let of = |key: &str| shown.iter().find(|value| value["key"] == key).unwrap_or_else(|| panic!("{key}")).clone();
    assert_eq!(of("worker.watermark_high_percent")["value"], 90);
    for key in ["worker.watermark_high_percent", "worker.data_dir"] {
        assert_eq!(of(key)["source"], "Fluid's runtime.json", "{key}");
    }
    assert_eq!(of("client.master")["source"], "environment FOREBAY_MASTER");

    // mountUFS: what the dataset says is mounted, whatever was before, as often as Fluid likes.
    for _ in 0..2 {
        assert_eq!(runtime.json(&["fluid", "mount"]), json!({"mounted": ["/a"]}));
    }
    let both = json!([{"mountPoint": a, "name": "a"}, {"mountPoint": format!("{b}/"), "name": "b", "path": "/deep/b", "readOnly": true}]);
    runtime.write(&both);
    assert_eq!(runtime.json(&["fluid", "mount"]), json!({"mounted": ["/a", "/deep/b"]}));
    assert!(!runtime.run(&["fs", "rm", "/deep/b/file"]).status.success(), "read-only");
    // Another store under the same name, and another option.
    runtime.write(&json!([{"mountPoint": b, "name": "a", "options": {"sync_interval_ms": "0"}}]));
    assert_eq!(runtime.json(&["fluid", "mount"]), json!({"mounted": ["/a"]}));
    runtime.write(&json!([{"mountPoint": b, "name": "a"}]));
    runtime.json(&["fluid", "mount"]);
    let mounts = runtime.json(&["--json", "fs", "mount"]);
    let mounted = mounts.as_array().expect("mounts").iter().find(|mount| mount["path"] == "/a").expect("/a");
    assert_eq!((mounted["uri"].as_str().map(|uri| uri.trim_end_matches('/')), &mounted["options"]), (Some(b.as_str()), &json!({"shared": "true"})));
    assert!(mounts.as_array().expect("mounts").iter().all(|mount| mount["path"] != "/deep/b"), "{mounts}");

    // One mount below another, told in any order, with names as people write them; then another store above.
    let nested = |above: &str| json!([{"mountPoint": c, "path": "/a/deep/"}, {"mountPoint": format!("{above}/"), "name": "a"}]);
    for above in [&a, &b, &b] {
        runtime.write(&nested(above));
        assert_eq!(runtime.json(&["fluid", "mount"]), json!({"mounted": ["/a", "/a/deep/"]}));
    }
    runtime.write(&json!([{"mountPoint": b, "name": "a"}, {"mountPoint": a, "path": "/"}]));
    let root = runtime.run(&["fluid", "mount"]);
    assert!(String::from_utf8_lossy(&root.stderr).contains("another path"), "{root:?}");
    runtime.write(&json!([{"mountPoint": b, "name": "a"}]));
    assert_eq!(runtime.json(&["fluid", "mount"]), json!({"mounted": ["/a"]}));

    // DataLoad, and what is cached then.
    let loaded = runtime
        .command("", &["fluid", "load"])
        .env("FLUID_DATALOAD_DATA_PATH", "/a")
        .env("FLUID_DATALOAD_PATH_REPLICAS", "1")
        .env("FLUID_DATALOAD_METADATA", "true")
        .output()
        .expect("run");
    assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    let summary = runtime.json(&["fluid", "summary"]);
    assert!(summary["cached"].as_str().is_some_and(|cached| cached.starts_with("1.0MiB") || cached.starts_with("1.1MiB")), "{summary}");
    assert!(summary["cacheCapacity"].as_str().is_some_and(|capacity| capacity.ends_with("MiB")), "{summary}");
    let none = runtime.run(&["fluid", "load"]);
    assert!(String::from_utf8_lossy(&none.stderr).contains("spec.target"), "{none:?}");

    let nowhere = Command::new(forebay())
        .args(["--master", "127.0.0.1:9", "fluid", "load"])
        .env("FLUID_DATALOAD_DATA_PATH", "/a")
        .env("FOREBAY_CLIENT__CALL_TIMEOUT_MS", "1000")
        .output()
        .expect("run");
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("name the master in the class"), "{nowhere:?}");

    // The client's pod, where there is FUSE.
    if forebay_tests::fuse::is_here("a_runtime_is_run_by_what_fluid_says, the client") {
        let target = runtime.path("mnt").display().to_string();
        let before = runtime.command("client", &["fluid", "check"]).output().expect("run");
        assert!(!before.status.success());
        runtime.spawn("client", &["mount", &target, "--foreground", "--supervise"]);
        let check = runtime.command("client", &["fluid", "check"]).output().expect("run");
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
        assert_eq!(std::fs::read(Path::new(&target).join("a/file")).expect("read"), forebay_tests::pattern(7, 0, 1 << 20));
        // A dataset that gets another store is seen by who has it mounted.
        runtime.write(&both);
        runtime.json(&["fluid", "mount"]);
        forebay_tests::eventually("the new store is seen", 10, async || Path::new(&target).join("deep/b/file").exists()).await;
    }
}

/// Outside of Fluid the commands say what they are for.
#[test]
fn elsewhere_the_commands_say_where_they_belong() {
    for command in ["mount", "check"] {
        let output = Command::new(forebay()).args(["fluid", command]).output().expect("run");
        assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("CacheRuntime"), "{output:?}");
    }
}
