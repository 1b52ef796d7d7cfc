//! A master and workers as processes of the real binary. FOREBAY_TEST_KEEP=1 leaves their folders, with their logs.

use crate::forebay;
use forebay_client::FileSystem;
use forebay_common::AbsPath;
use forebay_common::config::ClientConfig;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// Settings written into each role's configuration file, `section.key = value` as TOML.
pub type Settings = Vec<(&'static str, String)>;

/// A running role.
pub struct Process {
    child: Child,
    /// The first line it printed.
    pub hello: String,
}

impl Process {
    /// Starts and waits for the first line. A process that ends first is shown with its log.
    fn start(mut command: Command, log: &Path) -> Process {
        let log_file = std::fs::File::options().create(true).append(true).open(log).expect("log");
        let mut child = command.stdout(Stdio::piped()).stderr(log_file).stdin(Stdio::null()).spawn().expect("spawn");
        let mut reader = BufReader::new(child.stdout.take().expect("stdout"));
        let mut hello = String::new();
        reader.read_line(&mut hello).expect("first line");
        if hello.is_empty() {
            let _ = child.wait();
            panic!("{command:?} ended at once:\n{}", std::fs::read_to_string(log).unwrap_or_default());
        }
        std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        Process { child, hello }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A worker, running or not; its folders outlive its process.
pub struct Worker {
    dir: PathBuf,
    settings: Settings,
    /// The process, when it runs.
    pub process: Option<Process>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.process = None;
        while nix::mount::umount2(&self.dir.join("mem"), nix::mount::MntFlags::MNT_DETACH).is_ok() {}
        // Tiers, and their read-only views beside them: in its own folder, or in the cluster's.
        for folder in [Some(self.dir.as_path()), self.dir.parent()].into_iter().flatten() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let view = entry.path();
                if view.extension().is_some_and(|e| e == "ro") {
                    for path in [&view, &view.with_extension("")] {
                        while nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH).is_ok() {}
                    }
                }
            }
        }
    }
}

/// A cluster in a temporary folder.
pub struct Cluster {
    /// `host:port` of the master.
    pub address: String,
    /// The master, when it runs.
    pub master: Option<Process>,
    /// The workers.
    pub workers: Vec<Worker>,
    settings: Settings,
    hadoop_port: u16,
    /// More of the master's configuration file, as it stands.
    pub master_extra: String,
    /// More of the master's environment.
    pub master_environment: Vec<(String, String)>,
    /// Everything it keeps. Dropped last: the workers' mounts are in it.
    pub dir: tempfile::TempDir,
}

fn toml(settings: &[(&'static str, String)]) -> String {
    let mut sections: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (key, value) in settings {
        let (section, name) = key.split_once('.').expect("section.key");
        sections.entry(section).or_default().push(format!("{name} = {value}"));
    }
    sections.iter().map(|(s, lines)| format!("[{s}]\n{}\n", lines.join("\n"))).collect()
}

/// A string as TOML.
pub fn quoted(text: impl std::fmt::Display) -> String {
    format!("{:?}", text.to_string())
}

impl Cluster {
    /// A master and `workers` workers, ready. `settings` go on top of the harness's own.
    pub async fn start(workers: usize, settings: &[(&'static str, &str)]) -> Cluster {
        let mut cluster = Cluster::prepare(settings);
        cluster.begin(workers).await;
        cluster
    }

    /// One that is not started yet.
    pub fn prepare(settings: &[(&'static str, &str)]) -> Cluster {
        let dir = tempfile::Builder::new()
            .prefix("forebay-test-")
            .disable_cleanup(std::env::var_os("FOREBAY_TEST_KEEP").is_some())
            .tempdir()
            .expect("folder");
        let settings: Settings = settings.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
        let (master_extra, master_environment) = (String::new(), Vec::new());
        Cluster { dir, address: "127.0.0.1:0".into(), master: None, workers: Vec::new(), settings, hadoop_port: 0, master_extra, master_environment }
    }

    /// Starts a prepared one and waits until it is ready.
    pub async fn begin(&mut self, workers: usize) {
        self.start_master();
        for _ in 0..workers {
            self.add_worker(&[]);
        }
        let fs = self.client().await;
        crate::eventually("all workers registered", 30, async || fs.report().await.is_ok_and(|r| r.workers.len() == workers)).await;
    }

    /// Starts the master, on the port it had before if it ran before.
    pub fn start_master(&mut self) {
        let process = Process::start(self.master_command(), &self.dir.path().join("master.log"));
        let address = process.hello.split([' ', ',']).nth(4).expect("address").to_owned();
        self.address = address;
        self.master = Some(process);
    }

    fn master_command(&self) -> Command {
        let port = self.address.rsplit(':').next().expect("port").to_owned();
        let mut settings: Settings = vec![
            ("master.data_dir", quoted(self.dir.path().join("master").display())),
            ("master.rpc_port", port),
            ("master.web_port", "0".into()),
            ("master.hadoop_port", self.hadoop_port.to_string()),
        ];
        settings.extend(self.settings.iter().filter(|(k, _)| !k.starts_with("worker.")).cloned());
        let config = self.dir.path().join("master.toml");
        std::fs::write(&config, toml(&settings) + &self.master_extra).expect("config");
        let mut command = Command::new(forebay());
        command.args(["--config", &config.to_string_lossy(), "--log", "info,openraft=error", "master"]);
        command.envs(self.master_environment.iter().cloned());
        command
    }

    /// What the master said first.
    pub fn master_hello(&self) -> &str {
        &self.master.as_ref().expect("running").hello
    }

    /// Its process id.
    pub fn master_id(&self) -> u32 {
        self.master.as_ref().expect("running").id()
    }

    /// Waits until the master has ended by itself.
    pub async fn master_died(&mut self) {
        let mut process = self.master.take().expect("running");
        crate::eventually("the master ends by itself", 60, async || process.child.try_wait().expect("wait").is_some()).await;
    }

    /// Hadoop's clients find the master where it is now after a start as well.
    pub fn keep_hadoop_port(&mut self) {
        self.hadoop_port = self.hadoop_address().rsplit(':').next().and_then(|port| port.parse().ok()).expect("port");
    }

    /// `kill -9` of the master, and a start on the same folder and port.
    pub fn restart_master(&mut self) {
        self.master.take().expect("running").kill();
        self.start_master();
    }

    /// One more worker.
    pub fn add_worker(&mut self, settings: &[(&'static str, &str)]) -> &mut Worker {
        let dir = self.dir.path().join(format!("worker-{}", self.workers.len()));
        std::fs::create_dir_all(&dir).expect("folder");
        let mut all: Settings = vec![
            ("worker.data_dir", quoted(dir.display())),
            ("worker.mem_dir", quoted(dir.join("mem").display())),
            ("worker.mem_quota", "\"256MiB\"".into()),
            ("worker.socket_dir", quoted(self.socket_dir().display())),
            ("worker.data_port", "0".into()),
            ("worker.web_port", "0".into()),
            ("worker.hadoop_port", "0".into()),
            ("worker.hadoop_ipc_port", "0".into()),
            ("worker.heartbeat_interval_ms", "200".into()),
            ("client.master", quoted(&self.address)),
        ];
        all.extend(self.settings.iter().filter(|(k, _)| k.starts_with("worker.")).cloned());
        all.extend(settings.iter().map(|(k, v)| (*k, (*v).to_owned())));
        let mut unique: Settings = Vec::new();
        for (key, value) in all {
            unique.retain(|(k, _)| *k != key);
            unique.push((key, value));
        }
        self.workers.push(Worker { dir, settings: unique, process: None });
        self.start_worker(self.workers.len() - 1);
        self.workers.last_mut().expect("just pushed")
    }

    /// Starts a worker on its folders.
    pub fn start_worker(&mut self, i: usize) {
        let worker = &mut self.workers[i];
        let config = worker.dir.join("worker.toml");
        std::fs::write(&config, toml(&worker.settings)).expect("config");
        let mut command = Command::new(forebay());
        command.args(["--config", &config.to_string_lossy(), "--log", "info", "worker"]);
        worker.process = Some(Process::start(command, &worker.dir.join("worker.log")));
    }

    /// Sets something in a worker's configuration, for its next start.
    pub fn set_worker(&mut self, i: usize, key: &'static str, value: &str) {
        let settings = &mut self.workers[i].settings;
        settings.retain(|(k, _)| *k != key);
        settings.push((key, value.to_owned()));
    }

    /// What a worker's web port answers, whether its master knows it or not.
    pub async fn worker_page(&self, i: usize, path: &str) -> String {
        let hello = &self.workers[i].process.as_ref().expect("running").hello;
        page(hello.split("http://").nth(1).and_then(|rest| rest.split('/').next()).expect("web address"), path).await
    }

    /// `kill -9`.
    pub fn kill_worker(&mut self, i: usize) {
        self.workers[i].process.take().expect("running").kill();
    }

    /// `host:port` of the master's web server.
    pub fn web_address(&self) -> String {
        let hello = &self.master.as_ref().expect("running").hello;
        hello.split("http://").nth(1).and_then(|rest| rest.split('/').next()).expect("web address").trim().to_owned()
    }

    /// Which worker has an id, as `stat` shows it.
    pub fn worker_of(&self, id: &str) -> usize {
        let of = |worker: &Worker| std::fs::read_to_string(worker.dir.join("worker-id")).is_ok_and(|text| text.trim() == id);
        self.workers.iter().position(of).expect("a worker of this cluster")
    }

    /// The disks of a killed worker are lost, its memory too; it will not come back.
    pub fn forget_disks(&mut self, i: usize) {
        let dir = self.workers[i].dir.clone();
        for path in [dir.join("mem.ro"), dir.join("mem")] {
            while nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH).is_ok() {}
        }
        std::fs::remove_dir_all(&dir).expect("its folder");
    }

    /// Where the workers' sockets are.
    pub fn socket_dir(&self) -> PathBuf {
        self.dir.path().join("sockets")
    }

    /// A client's configuration.
    pub fn client_config(&self) -> ClientConfig {
        ClientConfig { master: self.address.clone(), socket_dir: self.socket_dir(), ..ClientConfig::default() }
    }

    /// A client.
    pub async fn client(&self) -> FileSystem {
        FileSystem::connect(&self.client_config()).await.expect("client")
    }

    /// A client that does not use short circuit.
    pub async fn network_client(&self) -> FileSystem {
        FileSystem::connect(&ClientConfig { short_circuit: false, ..self.client_config() }).await.expect("client")
    }

    /// Runs a command of the binary against this cluster.
    pub fn run(&self, arguments: &[&str]) -> Output {
        Command::new(forebay())
            .args(["--master", &self.address])
            .args(arguments)
            .env("FOREBAY_CLIENT__SOCKET_DIR", self.socket_dir())
            .env("FOREBAY_CONFIG", "/nonexistent")
            .output()
            .expect("run")
    }

    /// Runs a command that must succeed, and returns what it printed.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Its JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {text}"))
    }

    /// One of the cluster's metrics.
    pub async fn metric(&self, name: &str) -> u64 {
        let report = self.client().await.report().await.expect("report");
        report.metrics.iter().find(|m| m.name == name).map_or(0, |m| m.value)
    }

    /// A metric of the master's process.
    pub async fn master_metric(&self, name: &str) -> u64 {
        let address = self.web_address();
        let (host, port) = address.rsplit_once(':').expect("host:port");
        metric_at((host, port.parse().expect("port")), name).await
    }

    /// A metric of the first worker.
    pub async fn worker_metric(&self, name: &str) -> u64 {
        self.worker_metrics(name).await[0]
    }

    /// A metric of each live worker, as its web port shows it.
    pub async fn worker_metrics(&self, name: &str) -> Vec<u64> {
        let report = self.client().await.report().await.expect("report");
        let addresses = report.workers.iter().filter(|w| !w.lost).map(|w| w.address.clone().expect("address"));
        futures::future::join_all(addresses.map(|address| async move { metric_at((&address.host, address.web_port as u16), name).await })).await
    }

    /// Waits until what the workers have counted by now is known to the master: of two heartbeats that come in from now on,
    /// the second began after this call.
    pub async fn counters_arrived(&self) {
        let fs = self.client().await;
        for _ in 0..2 {
            let heard = async || -> Vec<u64> { fs.report().await.expect("report").workers.iter().map(|w| w.last_heartbeat_ms).collect() };
            let before = heard().await;
            crate::eventually("heartbeats of all workers", 30, async || heard().await.iter().zip(&before).all(|(now, then)| now > then)).await;
        }
    }

    /// A mount of a folder of this test on a path.
    pub async fn mount_folder(&self, path: &str, options: &[(&str, &str)]) -> PathBuf {
        let folder = self.dir.path().join(format!("under{}", path.replace('/', "-")));
        std::fs::create_dir_all(&folder).expect("folder");
        let options = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let uri = format!("file://{}", folder.display());
        self.client().await.mount(&p(path), &uri, false, options).await.expect("mount");
        folder
    }
}

/// What a web port answers, its head included.
async fn page(address: impl tokio::net::ToSocketAddrs, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.expect("web port");
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: forebay\r\nconnection: close\r\n\r\n").as_bytes()).await.expect("request");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("answer");
    text
}

async fn metric_at(address: (&str, u16), name: &str) -> u64 {
    let text = page(address, "/metrics").await;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.trim().parse::<f64>().ok()).map_or(0, |value| value as u64)
}

/// A path of the namespace.
pub fn p(raw: &str) -> AbsPath {
    raw.parse().expect("path")
}
