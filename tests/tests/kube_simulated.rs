//! Locality on simulated nodes: a real API server with pods that come and go, a real master that follows it, real workers that say they are on its nodes.
//!
//! Simulated pods have loopback addresses, so a test calls from them. `FOREBAY_TEST_NODES` and `FOREBAY_TEST_PODS` say how many there are.

use forebay_hdfs::client::IpcClient;
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_tests::cluster::quoted;
use forebay_tests::{Cluster, kube};
use rand::Rng;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

const APPS: usize = 4;
const BLOCKS: u64 = 64;
const WORKERS: usize = 4;

fn number(name: &str, otherwise: usize) -> usize {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise)
}

fn pod(name: &str, app: usize, role: &str, node: usize) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{spark-app-selector: spark-{app}, spark-role: {role}}}}}\nspec: {{nodeName: fake-{node}, containers: [{{name: c, image: none}}]}}\n"
    )
}

/// The addresses of the API server's running executors, by application and node.
fn executors(cluster: &kube::Cluster) -> BTreeMap<(String, String), BTreeSet<String>> {
    let pods: Value = serde_json::from_str(&cluster.kubectl(&["get", "pods", "-o", "json"])).expect("JSON");
    let mut out: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
    for pod in pods["items"].as_array().expect("items") {
        let text = |at: &Value| at.as_str().unwrap_or_default().to_owned();
        let labels = &pod["metadata"]["labels"];
        if text(&labels["spark-role"]) == "executor" && !text(&pod["status"]["podIP"]).is_empty() && pod["metadata"]["deletionTimestamp"].is_null() {
            out.entry((text(&labels["spark-app-selector"]), text(&pod["spec"]["nodeName"]))).or_default().insert(text(&pod["status"]["podIP"]));
        }
    }
    out
}

/// Hadoop RPC from a pod's address.
async fn call_from(ip: &str, master: SocketAddr) -> IpcClient {
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::new(ip.parse().expect("an address"), 0)).expect("loopback");
    let stream = socket.connect(master).await.expect("connect");
    IpcClient::over(stream, "root", Duration::from_secs(30)).await.expect("greet")
}

async fn locations(client: &mut IpcClient, path: &str) -> Vec<wire::LocatedBlockProto> {
    let request = wire::GetBlockLocationsRequestProto { src: path.to_owned(), offset: 0, length: u64::MAX >> 1 };
    let answer: wire::GetBlockLocationsResponseProto = client.call("getBlockLocations", &request).await.expect("locations");
    answer.locations.expect("a file").blocks
}

/// Names of hosts that the blocks of a file are told by, and which block has which.
async fn hosts(client: &mut IpcClient, path: &str) -> (BTreeSet<String>, usize) {
    let blocks = locations(client, path).await;
    let most = blocks.iter().map(|b| b.locs.len()).max().unwrap_or(0);
    (blocks.iter().flat_map(|b| b.locs.iter().map(|l| l.id.host_name.clone())).collect(), most)
}

/// Pods that the master sees.
async fn seen(fs: &forebay_client::FileSystem) -> u64 {
    fs.report().await.expect("a report").kubernetes.expect("a cluster is looked at").pods
}

/// p50 and p99.
fn percentiles(mut all: Vec<Duration>) -> (u128, u128) {
    all.sort();
    (all[all.len() / 2].as_micros(), all[all.len() * 99 / 100].as_micros())
}

/// 16 callers ask where a file's only block is, each for itself.
async fn ask(ip: &str, master: SocketAddr, path: &str, each: usize) -> Vec<Duration> {
    let callers = (0..16).map(|_| async {
        let mut client = call_from(ip, master).await;
        let mut took = Vec::with_capacity(each);
        for _ in 0..each {
            let began = Instant::now();
            locations(&mut client, path).await;
            took.push(began.elapsed());
        }
        took
    });
    futures::future::join_all(callers).await.concat()
}

/// Kinds of operators that are not there.
const OPERATORS: [&str; 5] = ["SparkApplication", "CacheRuntimeClass", "Dataset", "CacheRuntime", "DataLoad"];

/// The API server takes what the chart renders under every set of values, and the examples; kinds of operators that are not there it does not know.
fn manifests_are_taken(kubernetes: &kube::Cluster) {
    for namespace in ["cache", "trino", "flink"] {
        kubernetes.kubectl(&["create", "namespace", namespace]);
    }
    let dir = kubernetes.dir().join("rendered.yaml");
    let file = dir.to_str().expect("text");
    let taken = |name: &str, text: &str| {
        std::fs::write(&dir, text).expect("write");
        let (done, said) = kubernetes.try_run("kubectl", &["apply", "--server-side", "--dry-run=server", "-f", file]);
        let unknown: usize = OPERATORS.iter().map(|kind| said.matches(&format!("no matches for kind \"{kind}\"")).count()).sum();
        assert!(done || (unknown > 0 && said.matches("no matches").count() == unknown), "{name}: {said}");
        assert!(!said.contains("unknown field"), "{name}: {said}");
    };
    let sets = kube::value_sets();
    for (name, values) in &sets {
        taken(name, &kube::render(values, &[]).expect("rendered"));
    }
    for example in std::fs::read_dir(kube::chart().join("../examples")).expect("examples") {
        let path = example.expect("an entry").path();
        taken(&path.display().to_string(), &std::fs::read_to_string(&path).expect("read"));
    }
    // The pods that Fluid would make of its class: helm reads YAML for us.
    let pods = kubernetes.dir().join("pods");
    std::fs::create_dir_all(pods.join("templates")).expect("a folder");
    std::fs::copy(kube::chart().join("../examples/fluid-runtime-class.yaml"), pods.join("class.yaml")).expect("copy");
    std::fs::write(pods.join("Chart.yaml"), "{apiVersion: v2, name: pods, version: 0.0.1}").expect("write");
    let template = "{{ range $part, $is := (.Files.Get \"class.yaml\" | fromYaml).topology }}
---
{{ dict \"apiVersion\" \"v1\" \"kind\" \"Pod\" \"metadata\" (dict \"name\" $part \"namespace\" \"cache\") \"spec\" $is.template.spec | toJson }}{{ end }}";
    std::fs::write(pods.join("templates/pods.yaml"), template).expect("write");
    let made = kube::helm(&["template", "pods", pods.to_str().expect("text")]);
    let made = String::from_utf8(made.stdout).expect("text");
    assert_eq!(made.matches("\"kind\":\"Pod\"").count(), 3, "{made}");
    taken("the pods of Fluid's class", &made);
    println!("the API server takes what is rendered under {} sets of values, and the examples", sets.len());
}

/// (S-35) Executors are told as the API server has them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn executors_are_found_whatever_comes_and_goes() {
    if let Some(why) = kube::missing() {
        println!("SKIPPED executors_are_found_whatever_comes_and_goes: {why}");
        return;
    }
    let (nodes, pods) = (number("FOREBAY_TEST_NODES", 12), number("FOREBAY_TEST_PODS", 96));
    let mut rng = forebay_tests::rng("executors_are_found_whatever_comes_and_goes");
    let kubernetes = kube::Cluster::start(nodes, 0);
    manifests_are_taken(&kubernetes);
    let kubeconfig = kubernetes.forward();
    let mut manifest = String::new();
    for app in 0..APPS {
        manifest += &pod(&format!("driver-{app}"), app, "driver", app % nodes + 1);
    }
    for i in 0..pods {
        manifest += &pod(&format!("exec-{i}"), i % APPS, "executor", rng.random_range(1..=nodes));
    }
    kubernetes.apply(&manifest);

    let mut cluster =
        Cluster::prepare(&[("kubernetes.locality", "\"spark\""), ("master.block_size", "\"64KiB\""), ("master.page_size", "\"64KiB\"")]);
    cluster.master_environment.push(("KUBECONFIG".into(), kubeconfig.to_string_lossy().into_owned()));
    cluster.start_master();
    for i in 1..=WORKERS {
        let node = quoted(format!("fake-{i}"));
        cluster.add_worker(&[("worker.node_name", node.as_str())]);
    }
    let fs = cluster.client().await;
    forebay_tests::eventually("workers registered", 30, async || fs.report().await.is_ok_and(|r| r.workers.len() == WORKERS)).await;
    // One file on each worker, of many blocks: which executors a block is told by goes round.
    let folder = cluster.mount_folder("/data", &[]).await;
    let bytes = forebay_tests::pattern(1, 0, (BLOCKS << 16) as usize);
    for i in 1..=WORKERS {
        std::fs::write(folder.join(format!("f{i}")), &bytes).expect("write");
    }
    std::fs::write(folder.join("one"), &bytes[..4096]).expect("write");

    let master: SocketAddr = cluster.hadoop_address().parse().expect("an address");
    for round in 0..number("FOREBAY_TEST_ROUNDS", 3) {
        // What the API server says, and as many pods in the view.
        let truth = kubernetes.eventually("the master sees every pod", Duration::from_secs(90), || {
            let truth = executors(&kubernetes);
            let running = truth.values().map(BTreeSet::len).sum::<usize>();
            if running == pods { Ok(truth) } else { Err(format!("{running} of {pods} executors run")) }
        });
        let expected = (pods + APPS) as u64;
        forebay_tests::eventually("the view has all pods", 60, async || seen(&fs).await == expected).await;
        let mut checked = 0;
        for app in 0..APPS {
            let driver = kubernetes.kubectl(&["get", "pod", &format!("driver-{app}"), "-o", "jsonpath={.status.podIP}"]);
            let mut client = call_from(&driver, master).await;
            for i in 1..=WORKERS {
                // Cold blocks are fetched where the application's executors are; whichever workers are named, their nodes' executors are.
                let (told, most) = hosts(&mut client, &format!("/data/f{i}")).await;
                assert!(most <= 5, "at most three pods of a block, and two workers by their own names: {most}");
                let app_name = format!("spark-{app}");
                let on_workers: BTreeSet<String> =
                    (1..=WORKERS).filter_map(|n| truth.get(&(app_name.clone(), format!("fake-{n}")))).flatten().cloned().collect();
                if on_workers.is_empty() {
                    continue;
                }
                assert!(
                    told.is_subset(&on_workers),
                    "round {round}: {app_name} is told {told:?}, and its executors beside workers are {on_workers:?}"
                );
                checked += told.len();
            }
        }
        assert!(checked > 0, "some application has executors beside a worker");
        // Somebody who is no pod is told the workers' own names.
        let mut stranger = call_from("127.0.0.1", master).await;
        let (told, _) = hosts(&mut stranger, "/data/f1").await;
        assert!(told.iter().all(|host| host == "127.0.0.1"), "{told:?}");
        // A third of the pods is replaced, some on other nodes; their addresses are given out again.
        let gone: Vec<String> = (0..pods).filter(|i| i % 3 == round % 3).map(|i| format!("exec-{i}")).collect();
        for some in gone.chunks(200) {
            let mut arguments = vec!["delete", "pod", "--wait=true", "--now"];
            arguments.extend(some.iter().map(String::as_str));
            kubernetes.kubectl(&arguments);
        }
        let mut manifest = String::new();
        for name in &gone {
            let i: usize = name[5..].parse().expect("a number");
            write!(manifest, "{}", pod(name, (i + round + 1) % APPS, "executor", rng.random_range(1..=nodes))).expect("text");
        }
        kubernetes.apply(&manifest);
    }
    // Every executor beside a worker that has a file whole is told for some of its blocks.
    kubernetes.eventually("executors run", Duration::from_secs(90), || {
        let running = executors(&kubernetes).values().map(BTreeSet::len).sum::<usize>();
        if running == pods { Ok(()) } else { Err(format!("{running} of {pods}")) }
    });
    forebay_tests::eventually("the view has all pods", 60, async || seen(&fs).await == (pods + APPS) as u64).await;
    let truth = executors(&kubernetes);
    cluster.ok(&["fs", "load", "/data"]);
    for app in 0..APPS {
        let driver = kubernetes.kubectl(&["get", "pod", &format!("driver-{app}"), "-o", "jsonpath={.status.podIP}"]);
        let mut client = call_from(&driver, master).await;
        let report = fs.report().await.expect("a report");
        for i in 1..=WORKERS {
            for block in locations(&mut client, &format!("/data/f{i}")).await {
                for at in &block.locs {
                    let id = at.id.datanode_uuid.strip_prefix("forebay-").expect("a worker's id");
                    let worker =
                        report.workers.iter().filter_map(|w| w.address.as_ref()).find(|w| format!("{:016x}", w.worker_id) == id).expect("a worker");
                    let there = truth.get(&(format!("spark-{app}"), worker.node.clone()));
                    let good = there.map_or(at.id.host_name == worker.host, |there| there.contains(&at.id.host_name));
                    assert!(good, "worker on {} is told as {}, and {there:?} are there", worker.node, at.id.host_name);
                }
            }
        }
    }
    let driver = kubernetes.kubectl(&["get", "pod", "driver-0", "-o", "jsonpath={.status.podIP}"]);
    // In turns, so that both have the same machine.
    let (each, turns) = (number("FOREBAY_TEST_ASKS", 20), 20);
    let paused = kubernetes.pause();
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..turns {
        with.extend(ask(&driver, master, "/data/one", each).await);
        without.extend(ask("127.0.0.1", master, "/data/one", each).await);
    }
    drop(paused);
    let asked = with.len();
    let (with, without) = (percentiles(with), percentiles(without));
    println!(
        "where a block is, 16 callers, {nodes} nodes, {pods} executors, {asked} answers each: {} µs p50 and {} µs p99 for a Spark driver, {} and {} for a stranger",
        with.0, with.1, without.0, without.1
    );
}
