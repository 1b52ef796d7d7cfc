//! The chart on a real cluster: three nodes with kubelet and containerd, our image, an S3 server beside it, pods that read.
//!
//! Under `--full` (`FOREBAY_TEST_KUBE=1`): it needs the programs of Kubernetes, and minutes. The stages share one cluster, each begins from what the one before left.

use forebay_tests::kube::Cluster;
use forebay_tests::{forebay, kube, s3};
use serde_json::Value;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

const NAMESPACE: &str = "cache";
/// Of the workers at first.
const TIER: &str = "MEM, dirs: [{type: emptyDir, quota: 128Mi}]";
/// Of the hub, where the S3 server listens.
const HUB: &str = "10.98.0.1";
const LICENSE: &str = include_str!("../../LICENSE");

/// The chart's installation under test.
struct Installed {
    cluster: Cluster,
    s3: Child,
    rpc: String,
}

impl Drop for Installed {
    fn drop(&mut self) {
        let _ = self.s3.kill();
        let _ = self.s3.wait();
    }
}

fn values(tag: &str, tier: &str, more: &str) -> String {
    format!(
        "image: {{repository: localhost/forebay, tag: \"{tag}\"}}
mounts:
  - {{path: /, uri: \"s3://bucket/root\", options: {{endpoint: \"http://{HUB}:9000\", region: us-east-1, shared: \"true\"}}, secretOptions: {{access_key_id: {{name: keys, key: id}}, secret_access_key: {{name: keys, key: secret}}}}}}
master:
  persistence: {{size: 1Gi, storageClass: by-hand}}
  resources: {{requests: {{cpu: 50m, memory: 128Mi}}, limits: {{memory: 1Gi}}}}
  service: {{type: NodePort}}
  nodeSelector: {{kubernetes.io/hostname: node-3}}
worker:
  resources: {{requests: {{cpu: 50m}}}}
  memory: {{overhead: 512Mi}}
  tiers: [{{medium: {tier}}}]
  drain: {{seconds: 20}}
csi: {{enabled: true, storageClasses: [{{name: forebay, path: /volumes}}], resources: {{requests: {{cpu: 50m, memory: 64Mi}}, limits: {{memory: 1Gi}}}}}}
fuse: {{enabled: true, resources: {{requests: {{cpu: 50m, memory: 64Mi}}, limits: {{memory: 512Mi}}}}}}
{more}
"
    )
}

impl Installed {
    fn start() -> Installed {
        let cluster = Cluster::start(0, 3);
        cluster.load_image(&forebay(), "1");
        cluster.load_image(&forebay(), "2");
        let busybox = cluster.dir().join("busybox.tar");
        let archive = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/archive.py");
        let installed = Command::new("sh").arg("-c").arg("command -v busybox >/dev/null || { apt-get -qq update && apt-get -qq install -y busybox-static; } >/dev/null 2>&1; command -v busybox").output().expect("sh");
        let program = String::from_utf8_lossy(&installed.stdout).trim().to_owned();
        let made = Command::new("python3")
            .arg(archive)
            .arg(&busybox)
            .args(["localhost/busybox:1", &format!("{program}=/bin/busybox"), "--", "/bin/busybox"])
            .status()
            .expect("archive.py");
        assert!(made.success());
        cluster.load_archive(&busybox);
        for folder in ["data/bucket", "iam"] {
            std::fs::create_dir_all(cluster.dir().join("s3").join(folder)).expect("a folder");
        }
        let s3 = cluster
            .command(script("versitygw.sh", &[]))
            .env("ROOT_ACCESS_KEY", s3::KEYS.0)
            .env("ROOT_SECRET_KEY", s3::KEYS.1)
            .args(["--port", &format!("{HUB}:9000"), "-q", "--keep-alive", "--iam-dir"])
            .arg(cluster.dir().join("s3/iam"))
            .arg("posix")
            .arg(cluster.dir().join("s3/data"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("versitygw");
        cluster.kubectl(&["label", "node", "node-1", "node-2", "forebay=true"]);
        cluster.kubectl(&["create", "namespace", NAMESPACE]);
        cluster.kubectl(&[
            "-n",
            NAMESPACE,
            "create",
            "secret",
            "generic",
            "keys",
            &format!("--from-literal=id={}", s3::KEYS.0),
            &format!("--from-literal=secret={}", s3::KEYS.1),
        ]);
        // What a provisioner would do.
        let made = cluster.on_node(3).args(["sh", "-c", "mkdir -p /mnt/journal && chown 1000:1000 /mnt/journal"]).status().expect("sh");
        assert!(made.success());
        cluster.apply(
            "{apiVersion: v1, kind: PersistentVolume, metadata: {name: journal}, spec: {capacity: {storage: 1Gi}, accessModes: [ReadWriteOnce], storageClassName: by-hand, \
             persistentVolumeReclaimPolicy: Retain, hostPath: {path: /mnt/journal}}}",
        );
        let mut all = Installed { cluster, s3, rpc: String::new() };
        all.helm("install", "1", TIER, "");
        all.ready();
        all.rpc = all.node_port();
        all
    }

    fn helm(&self, verb: &str, tag: &str, tier: &str, more: &str) {
        let file = self.cluster.dir().join("values.yaml");
        std::fs::write(&file, values(tag, tier, more)).expect("values");
        let chart = kube::chart();
        self.cluster.run("helm", &[verb, "forebay", chart.to_str().expect("text"), "-n", NAMESPACE, "-f", file.to_str().expect("text")]);
    }

    fn node_port(&self) -> String {
        let port = self.cluster.kubectl(&["-n", NAMESPACE, "get", "svc", "forebay", "-o", "jsonpath={.spec.ports[?(@.name==\"rpc\")].nodePort}"]);
        format!("10.98.0.13:{port}")
    }

    /// Waits until all that the chart made is ready.
    fn ready(&self) {
        self.cluster.eventually("all pods of the chart are ready", Duration::from_secs(180), || {
            for (kind, wanted, is) in [
                ("statefulset/forebay-master", "replicas", "readyReplicas"),
                ("daemonset/forebay-worker", "desiredNumberScheduled", "numberReady"),
                ("daemonset/forebay-fuse", "desiredNumberScheduled", "numberReady"),
                ("daemonset/forebay-csi", "desiredNumberScheduled", "numberReady"),
                ("daemonset/forebay-keeper", "desiredNumberScheduled", "numberReady"),
            ] {
                let status = self.json(&["get", kind]);
                let (wanted, is) = (status["status"][wanted].as_u64().unwrap_or(0), status["status"][is].as_u64().unwrap_or(0));
                let updated = status["status"]["updatedNumberScheduled"].as_u64().unwrap_or(is);
                let observed = status["status"]["observedGeneration"] == status["metadata"]["generation"];
                if wanted == 0 || is != wanted || updated != wanted || !observed {
                    return Err(format!("{kind}: {is} of {wanted}, {updated} updated"));
                }
            }
            Ok(())
        });
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["-n", NAMESPACE, "-o", "json"];
        all.extend(arguments);
        serde_json::from_str(&self.cluster.kubectl(&all)).expect("JSON")
    }

    /// Our commands from outside of the cluster, by the Service.
    fn forebay(&self, arguments: &[&str]) -> Command {
        let mut command = self.cluster.command(forebay());
        command.args(arguments).env("FOREBAY_MASTER", &self.rpc).env("FOREBAY_CLIENT__USER", "forebay").env("FOREBAY_CLIENT__SHORT_CIRCUIT", "false");
        command
    }

    fn try_forebay(&self, arguments: &[&str]) -> Result<String, String> {
        let output = self.forebay(arguments).output().expect("forebay");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    fn report(&self) -> Value {
        let text = self.try_forebay(&["--json", "fsadmin", "report", "capacity"]).unwrap_or_else(|e| panic!("report capacity: {e}"));
        serde_json::from_str(&text).expect("JSON")
    }

    fn counter(&self, name: &str) -> u64 {
        let text = self.try_forebay(&["--json", "fsadmin", "report", "metrics"]).expect("metrics");
        serde_json::from_str::<Value>(&text).expect("JSON")[name].as_u64().unwrap_or(0)
    }

    /// Runs our image once in a pod on a node, as a client of the Service; returns its log.
    fn in_pod(&self, name: &str, node: &str, arguments: &[&str], sockets: &str) -> String {
        let (mounts, volumes) = match sockets {
            "" => (String::new(), String::new()),
            volume => {
                (", volumeMounts: [{name: s, mountPath: /run/forebay, readOnly: true}]".to_owned(), format!(", volumes: [{{name: s, {volume}}}]"))
            }
        };
        let arguments = serde_json::to_string(arguments).expect("JSON");
        self.cluster.apply(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {NAMESPACE}}}, spec: {{nodeName: {node}, restartPolicy: Never, securityContext: {{runAsUser: 2000, runAsNonRoot: true}}, \
             containers: [{{name: c, image: \"localhost/forebay:1\", args: {arguments}, env: [{{name: FOREBAY_MASTER, value: \"forebay:19998\"}}, {{name: FOREBAY_CLIENT__USER, value: somebody}}, \
             {{name: FOREBAY_CLIENT__SOCKET_DIR, value: /run/forebay}}]{mounts}}}]{volumes}}}}}"
        ));
        self.cluster.eventually(&format!("pod {name} ends"), Duration::from_secs(60), || {
            let phase = self.cluster.kubectl(&["-n", NAMESPACE, "get", "pod", name, "-o", "jsonpath={.status.phase}"]);
            if matches!(phase.as_str(), "Succeeded" | "Failed") { Ok(()) } else { Err(phase) }
        });
        let log = self.cluster.kubectl(&["-n", NAMESPACE, "logs", name]);
        let phase = self.cluster.kubectl(&["-n", NAMESPACE, "get", "pod", name, "-o", "jsonpath={.status.phase}"]);
        assert_eq!(phase, "Succeeded", "{log}");
        self.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", name, "--now"]);
        log
    }

    fn pod_of(&self, component: &str, node: &str) -> String {
        let pods = self.json(&[
            "get",
            "pods",
            "-l",
            &format!("app.kubernetes.io/component={component}"),
            "--field-selector",
            &format!("spec.nodeName={node}"),
        ]);
        pods["items"][0]["metadata"]["name"].as_str().expect("a pod").to_owned()
    }
}

/// What `helm install` made is there and well.
fn installed(all: &Installed) {
    let file = all.cluster.dir().join("LICENSE");
    std::fs::write(&file, LICENSE).expect("a file");
    all.try_forebay(&["fs", "put", file.to_str().expect("text"), "/LICENSE"]).unwrap_or_else(|e| panic!("put: {e}"));
    all.try_forebay(&["fs", "free", "/LICENSE"]).expect("free");
    let report = all.report();
    let workers = report["workers"].as_array().or(report.as_array()).unwrap_or_else(|| panic!("{report}")).len();
    assert_eq!(workers, 2, "{report}");
    all.cluster.run("helm", &["test", "forebay", "-n", NAMESPACE, "--timeout", "90s"]);
    let doctor = all.cluster.kubectl(&["-n", NAMESPACE, "logs", "forebay-doctor"]);
    println!("{doctor}");
    assert!(!doctor.contains("FAIL"), "{doctor}");
    let line = |check: &str| doctor.lines().find(|l| l.contains(check)).unwrap_or_else(|| panic!("doctor says nothing of {check}: {doctor}"));
    assert!(line("short circuit").contains("read through a passed descriptor"), "{doctor}");
    assert!(line("locality").contains("pods on 3 nodes"), "{doctor}");
    // Opened for clients through the volume's read-only mount, without a capability.
    assert!(!doctor.contains("no read-only mount"), "{doctor}");
    println!("{}", all.try_forebay(&["fsadmin", "report", "capacity"]).expect("report"));
}

/// The LICENSE file's words are counted in a pod on its block's node, which is returned: by the socket, and over the network.
fn words(all: &Installed) -> String {
    let words = |text: &str| text.split_whitespace().count();
    all.try_forebay(&["fs", "load", "/LICENSE"]).expect("load");
    let at: Value = serde_json::from_str(&all.try_forebay(&["--json", "fs", "stat", "/LICENSE"]).expect("stat")).expect("JSON");
    let holder = at["blocks"][0]["locations"]
        .as_array()
        .and_then(|l| l.iter().find(|l| l["cached_bytes"].as_u64() == Some(LICENSE.len() as u64)))
        .unwrap_or_else(|| panic!("{at}"));
    let host = holder["host"].as_str().expect("a host").split(':').next().expect("an address").to_owned();
    let pods = all.json(&["get", "pods", "-l", "app.kubernetes.io/component=worker"]);
    let pod = pods["items"]
        .as_array()
        .expect("pods")
        .iter()
        .find(|p| p["status"]["podIP"] == host.as_str())
        .unwrap_or_else(|| panic!("no worker has {host}"));
    let node = pod["spec"]["nodeName"].as_str().expect("a node");
    for (sockets, name) in [("hostPath: {path: /run/forebay}", "by-socket"), ("", "by-network")] {
        let names = ["Cluster.BytesReadDomain", "Cluster.BytesReadRemote"];
        let before = names.map(|n| all.counter(n));
        let text = all.in_pod(name, node, &["fs", "cat", "/LICENSE"], sockets);
        assert_eq!(words(&text), words(LICENSE));
        let read = all.cluster.eventually("what the client read is counted", Duration::from_secs(20), || {
            let read: Vec<u64> = names.iter().zip(before).map(|(n, before)| all.counter(n) - before).collect();
            if read.iter().sum::<u64>() >= LICENSE.len() as u64 { Ok(read) } else { Err(format!("{read:?}")) }
        });
        println!("{name}: {} words; bytes by socket and by network: {read:?}", words(&text));
        assert_eq!(read, if name == "by-socket" { [LICENSE.len() as u64, 0] } else { [0, LICENSE.len() as u64] }, "{name}");
    }
    node.to_owned()
}

/// A pod reads through the FUSE mount of its node, whose daemon is killed: it reads on, without being started again.
fn mount_is_killed(all: &Installed) {
    reader(all, "by-host-path", "hostPath: {path: /var/lib/forebay/mnt}", "/data/fs/LICENSE");
    // Its process alone, and then all of them: the container is started again.
    let mounts = |all: &Installed, supervisor: bool| {
        let all_of_them = pids(all, 1, "forebay mount /var/lib/forebay/mnt");
        let supervisors = pids(all, 1, "forebay mount /var/lib/forebay/mnt.*--supervise");
        if supervisor { all_of_them } else { all_of_them.into_iter().filter(|pid| !supervisors.contains(pid)).collect() }
    };
    for _ in 0..3 {
        kill_and_read_on(all, "by-host-path", "/data/fs/LICENSE", &mounts(all, false));
    }
    kill_and_read_on(all, "by-host-path", "/data/fs/LICENSE", &mounts(all, true));
    all.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", "by-host-path", "--now"]);
}

/// Processes of ours on a node whose words begin so.
fn pids(all: &Installed, node: usize, words: &str) -> Vec<String> {
    let script = format!(
        "for p in /proc/[0-9]*; do [ \"$(readlink $p/exe)\" = /usr/local/bin/forebay ] && tr '\\0' ' ' <$p/cmdline | grep -q '{words}' && echo ${{p#/proc/}}; done; true"
    );
    let output = all.cluster.on_node(node).args(["sh", "-c", &script]).output().expect("sh");
    String::from_utf8_lossy(&output.stdout).split_whitespace().map(str::to_owned).collect()
}

/// Kills these, and waits until a pod that prints the sum of `file` all the time prints it again.
fn kill_and_read_on(all: &Installed, pod: &str, file: &str, pids: &[String]) {
    assert!(!pids.is_empty(), "what is to be killed is found");
    // With the first process of a container the others end by themselves.
    let _ = Command::new("kill").arg("-KILL").args(pids).stderr(Stdio::null()).status().expect("kill");
    let took = reads_after(all, pod, file, SystemTime::now());
    println!("{pod}: reads again {:.1} s after the kill", took.as_secs_f64());
    let restarts = all.json(&["get", "pod", pod])["status"]["containerStatuses"][0]["restartCount"].as_u64();
    assert_eq!(restarts, Some(0), "the reading pod was not started again");
}

/// How long after a moment a pod's log has the sum of `file` again, by the log's own times.
fn reads_after(all: &Installed, pod: &str, file: &str, moment: SystemTime) -> Duration {
    let moment = moment.duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_secs_f64();
    let date = |arguments: &[&str]| {
        String::from_utf8_lossy(&Command::new("date").arg("-u").args(arguments).output().expect("date").stdout).trim().to_owned()
    };
    let (since, from) = (date(&["-d", &format!("@{}", moment.floor()), "+%FT%TZ"]), date(&["-d", &format!("@{moment:.9}"), "+%FT%T.%NZ"]));
    all.cluster.eventually("the pod reads again", Duration::from_secs(120), || {
        let text = all.cluster.try_run("kubectl", &["-n", NAMESPACE, "logs", pod, "--timestamps", &format!("--since-time={since}")]).1;
        let time = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
        // What was printed since, and after what was refused last. Twice: the first one may have been under way.
        let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("20") && time(l) > from).collect();
        let after = lines.iter().rposition(|l| !l.ends_with(file)).map_or(0, |at| at + 1);
        let [_, second, ..] = lines[after..] else { return Err(text) };
        let at: f64 = date(&["-d", &time(second), "+%s.%N"]).parse().expect("a time");
        Ok(Duration::from_secs_f64((at - moment).max(0.0)))
    })
}

/// A pod that prints the sum of a file all the time.
fn reader(all: &Installed, name: &str, volume: &str, file: &str) {
    all.cluster.apply(&format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {NAMESPACE}}}, spec: {{nodeName: node-1, terminationGracePeriodSeconds: 1, containers: [{{name: c, image: \"localhost/busybox:1\", \
         args: [sh, -c, \"while true; do /bin/busybox md5sum {file}; /bin/busybox sleep 0.2; done\"], volumeMounts: [{{name: m, mountPath: /data, mountPropagation: HostToContainer}}]}}], \
         volumes: [{{name: m, {volume}}}]}}}}"
    ));
    all.cluster.eventually(&format!("{name} reads"), Duration::from_secs(90), || {
        let text = all.cluster.try_run("kubectl", &["-n", NAMESPACE, "logs", name, "--since=60s"]).1;
        if text.lines().filter(|l| l.ends_with(file)).count() > 2 { Ok(()) } else { Err(text) }
    });
}

/// Volumes of the CSI driver: a claim on a folder of the namespace, whose process is killed, whose driver's pod is replaced; the sockets as an inline volume.
fn volumes(all: &Installed, holder: &str) {
    all.cluster.apply(&format!(
        "{{apiVersion: v1, kind: PersistentVolume, metadata: {{name: lake}}, spec: {{capacity: {{storage: 1Pi}}, accessModes: [ReadOnlyMany], storageClassName: \"\", claimRef: {{name: lake, namespace: {NAMESPACE}}}, \
         csi: {{driver: csi.forebay.io, volumeHandle: lake, readOnly: true, volumeAttributes: {{path: /}}}}}}}}
---
{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: lake, namespace: {NAMESPACE}}}, spec: {{accessModes: [ReadOnlyMany], storageClassName: \"\", volumeName: lake, resources: {{requests: {{storage: 1Pi}}}}}}}}"
    ));
    reader(all, "by-claim", "persistentVolumeClaim: {claimName: lake}", "/data/LICENSE");
    let mounts = |all: &Installed| pids(all, 1, "forebay mount /var/lib/kubelet/plugins/");
    kill_and_read_on(all, "by-claim", "/data/LICENSE", &mounts(all));
    let driver = all.pod_of("csi", "node-1");
    let replaced = SystemTime::now();
    all.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", &driver, "--now"]);
    println!(
        "by-claim: reads again {:.1} s after its driver's pod was deleted",
        reads_after(all, "by-claim", "/data/LICENSE", replaced).as_secs_f64()
    );
    all.ready();
    all.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", "by-claim", "--now"]);
    assert!(mounts(all).is_empty(), "no process is left of a volume that is not used");
    // The same words, and the sockets without a hostPath.
    let before = all.counter("Cluster.BytesReadDomain");
    let text = all.in_pod(
        "by-inline-volume",
        holder,
        &["fs", "cat", "/LICENSE"],
        "csi: {driver: csi.forebay.io, readOnly: true, volumeAttributes: {sockets: \"true\"}}",
    );
    assert_eq!(text.split_whitespace().count(), LICENSE.split_whitespace().count());
    all.cluster.eventually("bytes by the socket are counted", Duration::from_secs(20), || {
        if all.counter("Cluster.BytesReadDomain") > before { Ok(()) } else { Err("none".to_owned()) }
    });
}

/// The pods of the CSI driver and of the mount are replaced, and then deleted, under pods that read, and have a file open all the time: none of their calls fails.
fn drivers_are_replaced(all: &Installed) {
    let places = [
        ("held-by-path", "hostPath: {path: /var/lib/forebay/mnt}", "/data/fs/LICENSE"),
        ("held-by-claim", "persistentVolumeClaim: {claimName: lake}", "/data/LICENSE"),
    ];
    for (name, volume, file) in places {
        all.cluster.apply(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {NAMESPACE}}}, spec: {{nodeName: node-1, terminationGracePeriodSeconds: 1, containers: [{{name: c, image: \"localhost/busybox:1\", \
             args: [sh, -c, \"exec 3<{file}; while true; do /bin/busybox md5sum {file}; /bin/busybox dd bs=1 count=1 <&3 >/dev/null 2>/dev/null || echo lost; /bin/busybox sleep 0.1; done\"], \
             volumeMounts: [{{name: m, mountPath: /data, mountPropagation: HostToContainer}}]}}], volumes: [{{name: m, {volume}}}]}}}}"
        ));
    }
    let log = |name: &str| {
        let text = all.cluster.try_run("kubectl", &["-n", NAMESPACE, "logs", name]).1;
        text.lines().filter(|l| !l.starts_with("exit status")).map(|l| format!("{l}\n")).collect::<String>()
    };
    let reads = |name: &str, file: &str| log(name).lines().filter(|l| l.ends_with(file)).count();
    let more_reads = |than: usize| {
        all.cluster.eventually("both read", Duration::from_secs(90), || {
            let counts: Vec<usize> = places.iter().map(|(name, _, file)| reads(name, file)).collect();
            if counts.iter().all(|count| *count > than) { Ok(counts[0].max(counts[1])) } else { Err(format!("{counts:?}")) }
        })
    };
    let before = more_reads(5);
    all.cluster.kubectl(&["-n", NAMESPACE, "rollout", "restart", "daemonset/forebay-csi", "daemonset/forebay-fuse"]);
    all.ready();
    // Until the pods before are gone.
    for daemons in ["daemonset/forebay-csi", "daemonset/forebay-fuse"] {
        all.cluster.kubectl(&["-n", NAMESPACE, "rollout", "status", daemons, "--timeout=120s"]);
    }
    let after = more_reads(before + 20);
    let failed = || {
        places.map(|(name, _, file)| log(name).lines().filter(|l| !l.ends_with(file)).map(|l| format!("{name}: {l}")).collect::<Vec<_>>()).concat()
    };
    assert!(failed().is_empty(), "{:?}", failed());
    println!("the driver's and the mount's pods were replaced during {} reads: none failed, and what was open stayed", after - before);
    // Nobody is there to take the mounts over until the keeper has given them on.
    for round in 1..=2 {
        let began = Instant::now();
        let before = more_reads(0);
        for component in ["csi", "fuse"] {
            let pod = all.pod_of(component, "node-1");
            all.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", &pod]);
        }
        all.ready();
        let ready = began.elapsed();
        let after = more_reads(before + 20);
        assert!(failed().is_empty(), "{:?}", failed());
        println!(
            "deleted, {round}: both pods are there again after {:.1} s; {} reads meanwhile and after it, none failed; the longest pauses: {}",
            ready.as_secs_f64(),
            after - before,
            places.map(|(name, _, _)| format!("{name} {:.1} s", longest_pause(all, name, began.elapsed()).as_secs_f64())).join(", ")
        );
    }
    for (name, _, _) in places {
        all.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", name, "--now"]);
    }
}

/// The longest time between two lines of a pod's log, by its own times, within the last `since`.
fn longest_pause(all: &Installed, pod: &str, since: Duration) -> Duration {
    let text = all.cluster.try_run("kubectl", &["-n", NAMESPACE, "logs", pod, "--timestamps", &format!("--since={}s", since.as_secs() + 1)]).1;
    let times: Vec<f64> = text
        .lines()
        .filter(|l| l.starts_with("20"))
        .filter_map(|l| {
            let date = Command::new("date").args(["-u", "-d", l.split(' ').next()?, "+%s.%N"]).output().ok()?;
            String::from_utf8_lossy(&date.stdout).trim().parse().ok()
        })
        .collect();
    Duration::from_secs_f64(times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max))
}

/// A claim of the driver's storage class gets a folder of its own, which a pod of an ordinary user writes, and which goes with the claim.
fn claims(all: &Installed) {
    let began = std::time::Instant::now();
    all.cluster.apply(&format!(
        "{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: own, namespace: {NAMESPACE}}}, spec: {{accessModes: [ReadWriteMany], storageClassName: forebay, resources: {{requests: {{storage: 5Gi}}}}}}}}
---
{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: raw, namespace: {NAMESPACE}}}, spec: {{accessModes: [ReadWriteOnce], volumeMode: Block, storageClassName: forebay, resources: {{requests: {{storage: 5Gi}}}}}}}}"
    ));
    all.cluster.apply(&format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: writer, namespace: {NAMESPACE}}}, spec: {{nodeName: node-1, terminationGracePeriodSeconds: 1, securityContext: {{runAsUser: 1234, runAsNonRoot: true}}, containers: [{{name: c, image: \"localhost/busybox:1\", \
         args: [sh, -c, \"echo written > /data/f && /bin/busybox sleep 1000\"], volumeMounts: [{{name: m, mountPath: /data}}]}}], volumes: [{{name: m, persistentVolumeClaim: {{claimName: own}}}}]}}}}"
    ));
    let claim = |what: &str| all.cluster.kubectl(&["-n", NAMESPACE, "get", "pvc", "own", "-o", &format!("jsonpath={what}")]);
    let seen = |path: &str| all.try_forebay(&["fs", "cat", path]);
    let volume = all.cluster.eventually("the claim is bound", Duration::from_secs(60), || {
        let volume = claim("{.spec.volumeName}");
        if volume.starts_with("pvc-") && claim("{.status.phase}") == "Bound" { Ok(volume) } else { Err(claim("{.status.phase}")) }
    });
    println!("a claim was bound after {:.1} s", began.elapsed().as_secs_f64());
    let folder = format!("/volumes/{NAMESPACE}-own-{volume}");
    all.cluster.eventually("what the pod wrote is in the folder", Duration::from_secs(60), || match seen(&format!("{folder}/f")) {
        Ok(text) if text == "written\n" => Ok(()),
        other => Err(format!("{other:?} {}", all.cluster.kubectl(&["-n", NAMESPACE, "describe", "pod", "writer"]))),
    });
    // What cannot be is said where people look.
    all.cluster.eventually("a claim of a block device is told why not", Duration::from_secs(30), || {
        let text = all.cluster.kubectl(&["-n", NAMESPACE, "describe", "pvc", "raw"]);
        if text.contains("not a block device") { Ok(()) } else { Err(text) }
    });
    all.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", "writer", "--now"]);
    all.cluster.kubectl(&["-n", NAMESPACE, "delete", "pvc", "own", "raw"]);
    all.cluster.eventually("the volume goes, and its folder", Duration::from_secs(60), || {
        let (there, text) = all.cluster.try_run("kubectl", &["get", "pv", &volume]);
        match all.try_forebay(&["fs", "stat", &folder]) {
            Err(e) if !there && e.contains("does not exist") => Ok(()),
            other => Err(format!("{text} {other:?}")),
        }
    });
}

/// Pods with this machine's Java and Python: an image of links, and what they lead to as hostPath volumes.
struct Programs {
    /// Of Spark's virtual environment.
    spark: String,
    /// Of Hadoop's client.
    hadoop: String,
    mounts: String,
    volumes: String,
}

fn script(path: &str, arguments: &[&str]) -> String {
    let done =
        Command::new("bash").arg(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("peers").join(path)).args(arguments).output().expect(path);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

/// Loads the image `localhost/programs:1`.
fn programs(all: &Installed) -> Programs {
    let (spark, hadoop) = (script("spark/spark.sh", &["3.5.5", "prepare"]), script("hdfs/hdfs.sh", &["prepare"]));
    let root = all.cluster.dir().join("root");
    for dir in ["usr", "etc", "opt", "root"] {
        std::fs::create_dir_all(root.join(dir)).expect("a folder");
    }
    for link in ["bin", "sbin", "lib", "lib64"] {
        std::os::unix::fs::symlink(format!("usr/{link}"), root.join(link)).expect("a link");
    }
    for file in ["etc/passwd", "etc/group", "etc/nsswitch.conf"] {
        std::fs::copy(format!("/{file}"), root.join(file)).expect("a file");
    }
    for name in ["pod_entry.sh", "pod_words.py"] {
        std::fs::copy(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/spark").join(name), root.join("opt").join(name))
            .expect("a script");
    }
    // Where the environment's Python really is.
    let python = std::fs::canonicalize(format!("{spark}/bin/python")).expect("a Python");
    let python = python.ancestors().nth(2).expect("a prefix").to_string_lossy().into_owned();
    let mut folders = vec![
        ("usr", "/usr"),
        ("java", "/etc/java-17-openjdk"),
        ("alternatives", "/etc/alternatives"),
        ("spark", spark.as_str()),
        ("hadoop", hadoop.as_str()),
        ("sockets", "/run/forebay"),
    ];
    if !python.starts_with("/usr") {
        folders.push(("python", &python));
    }
    let mounts: Vec<String> = folders.iter().map(|(name, path)| format!("{{name: {name}, mountPath: {path}, readOnly: true}}")).collect();
    let volumes: Vec<String> = folders.iter().map(|(name, path)| format!("{{name: {name}, hostPath: {{path: {path}}}}}")).collect();
    let mounts = format!("[{}, {{name: tmp, mountPath: /tmp}}]", mounts.join(", "));
    let volumes = format!("[{}, {{name: tmp, emptyDir: {{}}}}]", volumes.join(", "));
    let template = format!(
        "apiVersion: v1\nkind: Pod\nspec: {{nodeSelector: {{forebay: \"true\"}}, topologySpreadConstraints: [{{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, \
         labelSelector: {{matchLabels: {{spark-role: executor}}}}}}], containers: [{{name: executor, env: [{{name: SPARK_HOME, value: {spark}}}], volumeMounts: {mounts}}}], volumes: {volumes}}}\n"
    );
    std::fs::write(root.join("opt/executor.yaml"), template).expect("a template");
    let archive = all.cluster.dir().join("programs.tar");
    let mut made = Command::new("python3");
    made.arg(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/archive.py")).arg(&archive).arg("localhost/programs:1");
    for entry in std::fs::read_dir(&root).expect("the root").flatten() {
        let name = entry.file_name().into_string().expect("text");
        made.arg(format!("{}=/{name}", entry.path().display()));
    }
    assert!(made.args(["--", "/opt/pod_entry.sh"]).status().expect("archive.py").success());
    all.cluster.load_archive(&archive);
    Programs { spark, hadoop, mounts, volumes }
}

/// Runs a shell command once in a pod with these programs; returns its log.
fn in_programs(all: &Installed, programs: &Programs, name: &str, node: &str, env: &str, command: &str) -> String {
    let command = serde_json::to_string(command).expect("JSON");
    let (mounts, volumes) = (&programs.mounts, &programs.volumes);
    all.cluster.apply(&format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {NAMESPACE}}}, spec: {{serviceAccountName: spark, restartPolicy: Never, nodeName: {node}, containers: [{{name: c, image: \"localhost/programs:1\", \
         command: [sh, -c, {command}], env: [{{name: HADOOP_USER_NAME, value: somebody}}, {{name: NAME, value: {name}}}, {{name: IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}{env}], \
         volumeMounts: {mounts}}}], volumes: {volumes}}}}}"
    ));
    let ended = |phase: &str| matches!(phase, "Succeeded" | "Failed");
    all.cluster.eventually(&format!("pod {name} ends"), Duration::from_secs(300), || {
        let phase = all.cluster.kubectl(&["-n", NAMESPACE, "get", "pod", name, "-o", "jsonpath={.status.phase}"]);
        if ended(&phase) { Ok(()) } else { Err(all.cluster.try_run("kubectl", &["-n", NAMESPACE, "logs", name, "--tail=20"]).1) }
    });
    let log = all.cluster.kubectl(&["-n", NAMESPACE, "logs", name]);
    all.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", name, "--now"]);
    log
}

/// Hadoop's Java client in a pod on the block's node: by its own statistics all bytes come by descriptor, and without the socket none.
fn java(all: &Installed, programs: &Programs, holder: &str) {
    let home = &programs.hadoop;
    let opens: Vec<String> =
        ["java.lang", "java.util", "java.nio", "sun.nio.ch"].iter().map(|p| format!("--add-opens java.base/{p}=ALL-UNNAMED")).collect();
    for (name, options, short) in [
        ("java-by-socket", "-Ddfs.client.read.shortcircuit=true -Ddfs.domain.socket.path=/run/forebay/hadoop__PORT", LICENSE.len()),
        ("java-by-network", "", 0),
    ] {
        let command = format!(
            "printf 'api\\tstatistics\\t/LICENSE\\n' >/tmp/commands; exec java -Xmx256m -XX:TieredStopAtLevel=1 {} -Djava.library.path={home}/native -cp '{home}/classes:{home}/lib/*' forebay.Commands \
             -Dfs.defaultFS=hdfs://forebay:8020 {options} /tmp/commands",
            opens.join(" ")
        );
        let log = in_programs(all, programs, name, holder, "", &command);
        let expected = format!("{0} read={0} short={short}", LICENSE.len());
        println!("{name}: {}", log.lines().find(|l| l.contains("read=")).unwrap_or_default());
        assert!(log.contains(&expected), "{expected}: {log}");
    }
}

/// Spark in pods, an unmodified one from PyPI: a driver and two executors beside workers. At which levels its tasks ran, by its own event log.
fn words_in_spark(all: &Installed, programs: &Programs, name: &str, expected: usize) -> Value {
    let conf = [
        "spark.master=k8s://https://kubernetes.default.svc".to_owned(),
        format!("spark.kubernetes.namespace={NAMESPACE}"),
        "spark.kubernetes.container.image=localhost/programs:1".into(),
        "spark.kubernetes.executor.podTemplateFile=/opt/executor.yaml".into(),
        "spark.kubernetes.executor.request.cores=50m".into(),
        "spark.kubernetes.driver.pod.name=$NAME".into(),
        "spark.driver.host=$IP".into(),
        "spark.driver.memory=512m".into(),
        "spark.executor.memory=512m".into(),
        "spark.executor.instances=2".into(),
        "spark.eventLog.enabled=true".into(),
        "spark.eventLog.dir=file:///tmp/events".into(),
        "spark.ui.enabled=false".into(),
        "spark.locality.wait=10s".into(),
    ];
    let conf: Vec<String> = conf.iter().map(|c| format!("--conf {c}")).collect();
    let home = &programs.spark;
    let command = format!("mkdir -p /tmp/events; exec {home}/bin/spark-submit {} /opt/pod_words.py 'hdfs://forebay:8020/words-*'", conf.join(" "));
    let log = in_programs(all, programs, name, "node-3", &format!(", {{name: PYSPARK_PYTHON, value: {home}/bin/python}}"), &command);
    assert!(log.contains(&format!("words: {expected}\n")), "{expected} words: {log}");
    let line = log.lines().find_map(|l| l.strip_prefix("levels: ")).unwrap_or_else(|| panic!("{log}"));
    println!("{name}: {line}");
    serde_json::from_str(line).expect("JSON")
}

/// Tasks run beside their blocks, by pods' addresses; with locality switched off they run anywhere.
fn spark(all: &Installed, programs: &Programs) {
    let text = LICENSE.repeat(40);
    let file = all.cluster.dir().join("words");
    std::fs::write(&file, &text).expect("a file");
    for i in 0..8 {
        all.try_forebay(&["fs", "put", file.to_str().expect("text"), &format!("/words-{i}")]).expect("put");
    }
    let expected = 8 * text.split_whitespace().count();
    let near = words_in_spark(all, programs, "spark-near", expected);
    let levels = near.as_object().expect("levels");
    assert!(!levels.is_empty() && !levels.contains_key("ANY"), "some task ran elsewhere: {near}");
    all.helm("upgrade", "1", TIER, "locality: {policy: none}");
    all.ready();
    let far = words_in_spark(all, programs, "spark-far", expected);
    assert!(
        far.as_object().is_some_and(|levels| levels.keys().all(|level| level == "ANY")),
        "without addresses of executors no task has a place: {far}"
    );
    all.helm("upgrade", "1", TIER, "");
    all.ready();
}

/// A node is drained: its worker hands over what is only there, and comes back.
fn node_is_drained(all: &Installed) {
    let source = all.cluster.dir().join("values.yaml");
    let content = std::fs::read_to_string(&source).expect("read");
    for i in 0..10 {
        all.try_forebay(&["fs", "put", "--write-type", "cache_only", source.to_str().expect("text"), &format!("/drained-{i}")]).expect("put");
    }
    // A drain leaves a DaemonSet's pods; the node's shutdown after it ends them.
    all.cluster.kubectl(&["drain", "node-2", "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s"]);
    let worker = all.pod_of("worker", "node-2");
    all.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", &worker, "--grace-period=60"]);
    for i in 0..10 {
        let text = all.try_forebay(&["fs", "cat", &format!("/drained-{i}")]).unwrap_or_else(|e| panic!("a file of the cache alone is lost: {e}"));
        assert_eq!(text, content);
    }
    all.cluster.kubectl(&["uncordon", "node-2"]);
    all.ready();
    println!("a worker left its node: 10 files of the cache alone are all there");
}

/// Writers write while the master's pod is deleted: it answers again, they go on, and what was acknowledged is there.
fn master_is_deleted(all: &Installed) {
    let (mut acknowledged, mut longest) = (Vec::new(), Duration::ZERO);
    let end = Instant::now() + Duration::from_secs(40);
    let (mut i, mut deleted) = (0, false);
    let source = all.cluster.dir().join("values.yaml");
    while Instant::now() < end {
        let (path, began) = (format!("/kept-{i}"), Instant::now());
        match all.try_forebay(&["fs", "put", source.to_str().expect("text"), &path]) {
            Ok(_) => acknowledged.push(path),
            Err(e) => panic!("a client that waits does not wait: {e}"),
        }
        longest = longest.max(began.elapsed());
        i += 1;
        if !deleted && i == 5 {
            all.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", "forebay-master-0", "--wait=false"]);
            deleted = true;
        }
    }
    let listed = all.try_forebay(&["fs", "ls", "/"]).expect("ls");
    let lost: Vec<&String> = acknowledged.iter().filter(|path| !listed.contains(&path[1..])).collect();
    assert!(lost.is_empty(), "acknowledged, and not there: {lost:?}");
    println!(
        "the master's pod was deleted: {} files acknowledged, all there; the longest put took {:.1} s",
        acknowledged.len(),
        longest.as_secs_f64()
    );
}

/// Files of the cache alone are on the workers; all of these are replaced, one after the other.
fn workers_are_upgraded(all: &Installed) {
    let source = all.cluster.dir().join("values.yaml");
    for i in 0..20 {
        all.try_forebay(&["fs", "put", "--write-type", "cache_only", source.to_str().expect("text"), &format!("/only-{i}")]).expect("put");
    }
    let content = std::fs::read_to_string(&source).expect("read");
    all.helm("upgrade", "2", "MEM, dirs: [{type: emptyDir, quota: 96Mi}]", "");
    all.ready();
    for i in 0..20 {
        let text = all
            .try_forebay(&["fs", "cat", &format!("/only-{i}")])
            .unwrap_or_else(|e| panic!("a file of the cache alone is lost in the upgrade: {e}"));
        assert_eq!(text, content);
    }
    println!("workers replaced one by one: 20 files of the cache alone are all there");
}

/// Removed and installed again on the kept claim: the namespace is the same.
fn installed_again(all: &Installed) {
    all.cluster.run("helm", &["uninstall", "forebay", "-n", NAMESPACE, "--wait"]);
    all.helm("install", "1", TIER, "");
    all.ready();
    let listed = all.cluster.eventually("the files are there again", Duration::from_secs(60), || {
        let mut again = all.forebay(&["fs", "ls", "/"]);
        again.env("FOREBAY_MASTER", all.node_port());
        let output = again.output().expect("forebay");
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    });
    assert!(listed.contains("LICENSE") && listed.contains("kept-0"), "{listed}");
}

/// Workers of a StatefulSet, their MEM tier on huge pages, become fewer, several at a time, and more again: files of the cache alone are all there, and read all the time.
fn workers_are_scaled(all: &Installed) {
    all.cluster.run("helm", &["uninstall", "forebay", "-n", NAMESPACE, "--wait"]);
    all.cluster.kubectl(&["label", "node", "node-3", "forebay=true"]);
    let file = all.cluster.dir().join("values.yaml");
    let text = values("1", TIER, "")
        .replace("worker:\n", "worker:\n  kind: StatefulSet\n  replicas: 3\n  hugePages: true\n")
        .replace("seconds: 20", "seconds: 60");
    assert!(text.contains("StatefulSet") && text.contains("seconds: 60"), "{text}");
    std::fs::write(&file, text.replace("csi: {enabled: true", "csi: {enabled: false").replace("fuse: {enabled: true", "fuse: {enabled: false"))
        .expect("values");
    all.cluster.run("helm", &["install", "forebay", kube::chart().to_str().expect("text"), "-n", NAMESPACE, "-f", file.to_str().expect("text")]);
    let rpc = all.node_port();
    let run = |arguments: &[&str]| {
        let output = all.forebay(arguments).env("FOREBAY_MASTER", &rpc).output().expect("forebay");
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    };
    let workers = |count: usize| {
        all.cluster.eventually(&format!("there are {count} workers"), Duration::from_secs(150), || {
            let status = all.json(&["get", "statefulset/forebay-worker"]);
            let ready = status["status"]["readyReplicas"].as_u64().unwrap_or(0) as usize;
            let is = status["status"]["replicas"].as_u64().unwrap_or(0) as usize;
            let report: Value = serde_json::from_str(&run(&["--json", "fsadmin", "report"])?).expect("JSON");
            let live = report["live_workers"].as_u64().unwrap_or_else(|| panic!("{report}")) as usize;
            // Those that were drained may be known for a while.
            if ready == count && is == count && live >= count { Ok(()) } else { Err(format!("{ready} of {is} ready, {live} live")) }
        })
    };
    workers(3);
    // Of all nodes: they share the machine's processes.
    let processes = pids(all, 1, "bin/forebay worker");
    assert_eq!(processes.len(), 3, "{processes:?}");
    for process in processes {
        let mounts = std::fs::read_to_string(format!("/proc/{process}/mounts")).expect("a process");
        assert!(mounts.lines().any(|line| line.contains(" /tiers/0-0 tmpfs ") && line.contains("huge=")), "{mounts}");
    }
    let content = std::fs::read_to_string(&file).expect("read");
    for i in 0..30 {
        run(&["fs", "put", "--write-type", "cache_only", file.to_str().expect("text"), &format!("/scaled-{i}")]).expect("put");
    }
    let over = std::sync::atomic::AtomicBool::new(false);
    let (reads, longest) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut reads, mut longest) = (0, Duration::ZERO);
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                let began = Instant::now();
                let text = run(&["fs", "cat", &format!("/scaled-{}", reads % 30)]).unwrap_or_else(|e| panic!("read {reads}: {e}"));
                assert_eq!(text, content);
                longest = longest.max(began.elapsed());
                reads += 1;
            }
            (reads, longest)
        });
        for count in [1, 3, 2] {
            all.cluster.kubectl(&["-n", NAMESPACE, "scale", "statefulset/forebay-worker", &format!("--replicas={count}")]);
            workers(count);
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.join().expect("no failed read")
    });
    for i in 0..30 {
        let text = run(&["fs", "cat", &format!("/scaled-{i}")]).unwrap_or_else(|e| panic!("a file of the cache alone is lost: {e}"));
        assert_eq!(text, content);
    }
    println!(
        "workers scaled 3, 1, 3, 2: 30 files of the cache alone are all there; {reads} reads meanwhile, none failed, the longest took {:.1} s",
        longest.as_secs_f64()
    );
}

#[test]
fn the_chart_on_real_nodes() {
    if std::env::var_os("FOREBAY_TEST_KUBE").is_none() {
        println!("SKIPPED the_chart_on_real_nodes: three real nodes take minutes (FOREBAY_TEST_KUBE=1, or --full)");
        return;
    }
    let all = Installed::start();
    installed(&all);
    let holder = words(&all);
    mount_is_killed(&all);
    volumes(&all, &holder);
    claims(&all);
    drivers_are_replaced(&all);
    all.cluster.apply(&format!(
        "{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: spark, namespace: {NAMESPACE}}}}}
---
{{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {{name: spark, namespace: {NAMESPACE}}}, roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: edit}}, subjects: [{{kind: ServiceAccount, name: spark, namespace: {NAMESPACE}}}]}}"
    ));
    let programs = programs(&all);
    java(&all, &programs, &holder);
    spark(&all, &programs);
    node_is_drained(&all);
    master_is_deleted(&all);
    workers_are_upgraded(&all);
    installed_again(&all);
    workers_are_scaled(&all);
}
