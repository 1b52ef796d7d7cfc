//! Helm and a real Kubernetes cluster (`tests/peers/kube`), for the suites that need them.
//!
//! `programs` says where helm is (built once); `Cluster` is one that was started for a test and is stopped with it. Clusters share fixed addresses within
//! network namespaces of their own names, so two may run beside each other only as processes of different tests that take turns: `start` waits for its turn.

use nix::fcntl::{Flock, FlockArg};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/kube/kube.sh")
}

/// The chart.
pub fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/forebay")
}

/// The folder with helm and helm-docs; builds them where they are missing.
pub fn programs() -> PathBuf {
    let done = Command::new("bash").arg(script()).arg("helm").output().expect("kube.sh");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    PathBuf::from(String::from_utf8_lossy(&done.stdout).trim())
}

/// Why the suites on a cluster cannot run; `None`: they can.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root (network namespaces)".into());
    }
    let built = Command::new("bash").arg(script()).arg("built").output().expect("kube.sh");
    let wanted = std::env::var_os("FOREBAY_TEST_KUBE").is_some();
    (!built.status.success() && !wanted)
        .then(|| "the programs of Kubernetes are not built (tests/peers/kube/kube.sh prepare, a quarter of an hour, or --full)".into())
}

/// A running cluster.
pub struct Cluster {
    dir: tempfile::TempDir,
    _turn: Flock<std::fs::File>,
}

/// Runs helm with homes of its own.
pub fn helm(arguments: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("a folder");
    let homes = ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"];
    Command::new(programs().join("helm")).args(arguments).envs(homes.map(|home| (home, dir.path()))).output().expect("helm")
}

/// What the chart renders under these values, with whatever else helm is told. Errors: what helm says.
pub fn render(values: &Path, more: &[&str]) -> Result<String, String> {
    let chart = chart();
    let mut arguments =
        vec!["template", "forebay", chart.to_str().expect("readable"), "--namespace", "cache", "--values", values.to_str().expect("readable")];
    arguments.extend(more);
    let output = helm(&arguments);
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    // The one thing that is drawn at random.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().map(|line| if line.starts_with("  secret: ") { "  secret: RFJBV04=" } else { line }).collect::<Vec<_>>().join("\n") + "\n")
}

/// A folder of the chart's tests.
pub fn chart_tests(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("helm").join(name)
}

/// Sets of values, each with its name.
pub fn value_sets() -> Vec<(String, PathBuf)> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(chart_tests("values")).expect("readable").map(|entry| entry.expect("readable").path()).collect();
    all.sort();
    assert!(all.len() >= 20, "{} sets of values", all.len());
    all.into_iter().map(|path| (path.file_stem().expect("readable").to_string_lossy().into_owned(), path)).collect()
}

/// What a command said, and how it ended.
fn said(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

impl Cluster {
    /// Starts one of some simulated and some real nodes.
    pub fn start(simulated: usize, real: usize) -> Cluster {
        let lock = std::fs::File::create(std::env::temp_dir().join("forebay-test-kube.lock")).expect("a lock");
        let turn = Flock::lock(lock, FlockArg::LockExclusive).expect("a turn");
        let dir = tempfile::Builder::new().prefix("forebay-test-kube-").tempdir().expect("a folder");
        let cluster = Cluster { dir, _turn: turn };
        let up = Command::new("bash")
            .arg(script())
            .arg("up")
            .arg(cluster.dir.path())
            .args([simulated.to_string(), real.to_string()])
            .output()
            .expect("kube.sh");
        assert!(up.status.success(), "the cluster does not start: {}", said(&up));
        cluster
    }

    /// Where its state is: `exec`, `log`, `admin.kubeconfig`.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A command in the cluster's network, with kubectl and helm in its path.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(self.dir.path().join("exec"));
        command.arg(program);
        command
    }

    /// Runs one, and returns what it printed. Panics when it fails.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().expect(program);
        assert!(output.status.success(), "{program} {}: {}", arguments.join(" "), said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs one that may fail, and returns whether it did not, with all that it said.
    pub fn try_run(&self, program: &str, arguments: &[&str]) -> (bool, String) {
        let output = self.command(program).args(arguments).output().expect(program);
        (output.status.success(), said(&output))
    }

    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.run("kubectl", arguments)
    }

    /// Has the cluster hold what a manifest says.
    pub fn apply(&self, manifest: &str) {
        use std::io::Write;
        let mut child = self
            .command("kubectl")
            .args(["apply", "-f", "-"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("kubectl");
        child.stdin.take().expect("a pipe").write_all(manifest.as_bytes()).expect("kubectl reads");
        let output = child.wait_with_output().expect("kubectl");
        assert!(output.status.success(), "kubectl apply: {}\n{manifest}", said(&output));
    }

    /// Waits until `look` has an answer. Panics after `limit`, with what `look` said last.
    pub fn eventually<T>(&self, what: &str, limit: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
        let end = Instant::now() + limit;
        loop {
            match look() {
                Ok(answer) => return answer,
                Err(why) if Instant::now() > end => {
                    let pods = self.try_run("kubectl", &["get", "pods", "-A", "-o", "wide"]).1;
                    let events = self.try_run("kubectl", &["get", "events", "-A", "--sort-by=.lastTimestamp"]).1;
                    let tail: Vec<&str> = events.lines().rev().take(25).collect();
                    panic!("{what} within {} s: {why}\n{pods}\n{}", limit.as_secs(), tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    /// Loads our image, as `localhost/forebay:TAG`, into the real nodes.
    pub fn load_image(&self, binary: &Path, tag: &str) {
        let archive = self.dir.path().join(format!("image-{tag}.tar"));
        let make = Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/image.sh");
        let made = Command::new("bash").arg(make).arg(binary).arg(&archive).arg(format!("localhost/forebay:{tag}")).output().expect("image.sh");
        assert!(made.status.success(), "{}", said(&made));
        self.load_archive(&archive);
    }

    /// Loads a docker archive into the real nodes.
    pub fn load_archive(&self, archive: &Path) {
        let loaded = Command::new("bash").arg(script()).arg("image").arg(self.dir.path()).arg(archive).output().expect("kube.sh");
        assert!(loaded.status.success(), "{}", said(&loaded));
    }

    /// Makes the API server reachable on loopback of this machine, until the cluster is gone; returns a kubeconfig for it.
    pub fn forward(&self) -> PathBuf {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let namespace = std::fs::read_to_string(self.dir.path().join("name")).expect("a name");
        let namespace = std::fs::File::open(format!("/run/netns/{}-hub", namespace.trim())).expect("its network");
        // The listener is of this network; what the thread connects to is of the cluster's.
        std::thread::spawn(move || {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("setns");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                listener.set_nonblocking(true).expect("nonblocking");
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                while let Ok((mut near, _)) = listener.accept().await {
                    tokio::spawn(async move {
                        if let Ok(mut far) = tokio::net::TcpStream::connect("10.98.0.1:6443").await {
                            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                        }
                    });
                }
            });
        });
        let config = std::fs::read_to_string(self.dir.path().join("admin.kubeconfig")).expect("a kubeconfig");
        let forwarded = self.dir.path().join("forwarded.kubeconfig");
        std::fs::write(&forwarded, config.replace("https://10.98.0.1:6443", &format!("https://127.0.0.1:{port}"))).expect("write");
        forwarded
    }

    /// A command in the namespaces of a real node, from 1.
    pub fn on_node(&self, node: usize) -> Command {
        let pid = std::fs::read_to_string(self.dir.path().join(format!("n{node}/pid"))).expect("a real node");
        let mut command = Command::new("nsenter");
        command.args(["-t", pid.trim(), "-m", "-n", "-u"]);
        command
    }
}

/// The cluster's programs stand still as long as this is there: what is measured beside them has the machine for itself.
pub struct Paused(Vec<i32>);

impl Cluster {
    /// See `Paused`.
    pub fn pause(&self) -> Paused {
        let pids = std::fs::read_to_string(self.dir.path().join("pids")).expect("its programs");
        let pids: Vec<i32> = pids.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
        signal_all(&pids, nix::sys::signal::Signal::SIGSTOP);
        Paused(pids)
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        signal_all(&self.0, nix::sys::signal::Signal::SIGCONT);
    }
}

/// Each has a session of its own.
fn signal_all(pids: &[i32], signal: nix::sys::signal::Signal) {
    for pid in pids {
        let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(*pid), signal);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("FOREBAY_TEST_KEEP").is_some() {
            eprintln!("the cluster is kept: {0}/exec kubectl get pods -A; {1} down {0}", self.dir.path().display(), script().display());
            self.dir.disable_cleanup(true);
            return;
        }
        let _ = Command::new("bash").arg(script()).arg("down").arg(self.dir.path()).status();
    }
}
