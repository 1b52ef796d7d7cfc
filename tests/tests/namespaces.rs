//! The experiment of the field: three workers in three network and mount namespaces. Local means the worker's socket, not a
//! host name and not a shared file system.

use forebay_tests::cluster::quoted;
use forebay_tests::forebay;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

const WORKERS: usize = 3;

fn sh(script: &str) -> std::process::Output {
    Command::new("sh").args(["-ec", script]).output().expect("sh")
}

/// Namespaces, a bridge, and the processes in them; all removed when dropped.
struct Net {
    tag: String,
    subnet: u8,
    children: Vec<Child>,
    dir: tempfile::TempDir,
}

impl Drop for Net {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        for i in 0..WORKERS {
            sh(&format!("ip netns del {}{i} || true", self.tag));
        }
        sh(&format!("ip link del {}b || true", self.tag));
    }
}

impl Net {
    /// `None`, with the reason, where namespaces are not possible.
    fn new() -> Result<Net, String> {
        // Tests of one process run at the same time.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = std::process::id().wrapping_mul(4).wrapping_add(COUNT.fetch_add(1, Ordering::Relaxed));
        let net =
            Net { tag: format!("fb{}", id % 10_000), subnet: (id % 200) as u8 + 20, children: Vec::new(), dir: tempfile::tempdir().expect("folder") };
        let (tag, subnet) = (&net.tag, net.subnet);
        let mut script = format!("ip link add {tag}b type bridge\nip addr add 10.77.{subnet}.1/24 dev {tag}b\nip link set {tag}b up\n");
        for i in 0..WORKERS {
            script += &format!(
                "ip netns add {tag}{i}\nip link add {tag}v{i} type veth peer name eth0 netns {tag}{i}\nip link set {tag}v{i} master {tag}b up\n\
                 ip -n {tag}{i} addr add 10.77.{subnet}.{}/24 dev eth0\nip -n {tag}{i} link set eth0 up\nip -n {tag}{i} link set lo up\n",
                i + 2
            );
        }
        let made = sh(&script);
        if made.status.success() { Ok(net) } else { Err(String::from_utf8_lossy(&made.stderr).into_owned()) }
    }

    fn spawn(&mut self, mut command: Command) -> (u32, String) {
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log")).expect("log");
        let mut child = command.stdout(Stdio::piped()).stderr(log).stdin(Stdio::null()).spawn().expect("spawn");
        let mut reader = BufReader::new(child.stdout.take().expect("stdout"));
        let mut hello = String::new();
        reader.read_line(&mut hello).expect("first line");
        assert!(!hello.is_empty(), "{command:?} ended: {}", std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default());
        std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        let id = child.id();
        self.children.push(child);
        (id, hello)
    }

    fn config(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).expect("config");
        path.to_string_lossy().into_owned()
    }
}

struct Side<'a> {
    net: &'a Net,
    master: String,
    process: u32,
}

impl Side<'_> {
    /// Runs a shell command where a worker runs: in its network and mount namespaces.
    fn run(&self, script: &str, short_circuit: bool) -> String {
        let output = Command::new("nsenter")
            .args(["-t", &self.process.to_string(), "-m", "-n", "sh", "-ec", script])
            .env("FB", forebay())
            .env("FOREBAY_MASTER", &self.master)
            .env("FOREBAY_CONFIG", "/nonexistent")
            .env("FOREBAY_CLIENT__SHORT_CIRCUIT", short_circuit.to_string())
            .env("FOREBAY_CLIENT__SOCKET_DIR", "/run/forebay")
            .output()
            .expect("nsenter");
        assert!(
            output.status.success(),
            "{script}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            std::fs::read_to_string(self.net.dir.path().join("log")).unwrap_or_default()
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

fn json(address: &str, arguments: &[&str]) -> Value {
    let output =
        Command::new(forebay()).args(["--master", address, "--json"]).args(arguments).env("FOREBAY_CONFIG", "/nonexistent").output().expect("run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn bytes_read(address: &str) -> (u64, u64) {
    let metrics = json(address, &["fsadmin", "report", "metrics"]);
    (metrics["Cluster.BytesReadDomain"].as_u64().expect("counter"), metrics["Cluster.BytesReadRemote"].as_u64().expect("counter"))
}

/// A master outside, and a worker on each of the sides; the master's address, and the workers' processes.
fn cluster(net: &mut Net) -> (String, Vec<u32>) {
    let subnet = net.subnet;
    let insecure = "[security]\nallow_insecure_bind = true\n";
    let config = net.config(
        "master.toml",
        &format!(
            "[master]\nbind = \"10.77.{subnet}.1\"\nrpc_port = 0\nweb_port = 0\nhadoop_port = 0\ndata_dir = {}\n{insecure}",
            quoted(net.dir.path().join("master").display())
        ),
    );
    let mut command = Command::new(forebay());
    command.args(["--config", &config, "master"]);
    let (_, hello) = net.spawn(command);
    let address = hello.split([' ', ',']).nth(4).expect("address").to_owned();
    let mut processes = Vec::new();
    for i in 0..WORKERS {
        let dir = net.dir.path().join(format!("w{i}"));
        std::fs::create_dir_all(&dir).expect("folder");
        let config = net.config(
            &format!("w{i}.toml"),
            &format!(
                "[worker]\nbind = \"10.77.{subnet}.{}\"\ndata_port = 0\nweb_port = 0\nhadoop_port = 0\nhadoop_ipc_port = 0\nmem_quota = \"64MiB\"\nheartbeat_interval_ms = 200\nsocket_dir = \"/run/forebay\"\n\
                 data_dir = {d}\nmem_dir = {m}\n[client]\nmaster = \"{address}\"\n{insecure}",
                i + 2,
                d = quoted(dir.display()),
                m = quoted(dir.join("mem").display())
            ),
        );
        // Its own /run/forebay, and mounts that nobody else sees.
        let script = format!("mount -t tmpfs tmpfs /run && mkdir -p /run/forebay && exec {} --config {config} worker", forebay().display());
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}{i}", net.tag), "unshare", "-m", "--propagation", "private", "sh", "-ec", &script]);
        processes.push(net.spawn(command).0);
    }
    (address, processes)
}

/// (S-9) A client beside the block's worker moves every byte through the Unix socket, any other over the network, and both
/// are counted to the byte.
#[test]
fn word_count_beside_the_block_and_away_from_it() {
    let mut net = match Net::new() {
        Ok(net) => net,
        Err(why) => return eprintln!("SKIPPED: network namespaces are not possible here: {why}"),
    };
    let subnet = net.subnet;
    let (address, processes) = cluster(&mut net);
    let side = |i: usize| Side { net: &net, master: address.clone(), process: processes[i] };

    let licence = Path::new(env!("CARGO_MANIFEST_DIR")).join("../LICENSE");
    let text = std::fs::read_to_string(&licence).expect("LICENSE");
    let (words, size) = (text.split_whitespace().count().to_string(), text.len() as u64);
    side(1).run(&format!("$FB fs put {} /LICENSE", licence.display()), true);
    let stat = json(&address, &["fs", "stat", "/LICENSE"]);
    let host = stat["blocks"][0]["locations"][0]["host"].as_str().expect("a location").to_owned();
    assert!(host.starts_with(&format!("10.77.{subnet}.3:")), "the block is on the worker of the side that put it: {host}");

    let count = "$FB fs cat /LICENSE | wc -w";
    let before = bytes_read(&address);
    assert_eq!(side(1).run(count, true), words);
    let local = bytes_read(&address);
    assert_eq!((local.0 - before.0, local.1 - before.1), (size, 0), "beside it: all through the socket");
    assert_eq!(side(1).run(count, false), words);
    let remote = bytes_read(&address);
    assert_eq!((remote.0 - local.0, remote.1 - local.1), (0, size), "short circuit off: all through the network");
    assert_eq!(side(2).run(count, true), words);
    let away = bytes_read(&address);
    assert_eq!((away.0 - remote.0, away.1 - remote.1), (0, size), "on another machine: all through the network");
}

/// What each of two sides does in the folder that they share: argument 1 is which one it is.
const SHARING: &str = r#"
import hashlib, os, random, sys, time
side, top = sys.argv[1], sys.argv[2]
os.chdir(top)
random.seed(side)
def whole(n):
    body = (side + str(n)).encode() * random.randrange(1, 3000)
    return hashlib.sha256(body).digest() + body
won, seen = [], 0
open('here' + side, 'w').close()
while not all(os.path.exists('here' + s) for s in '01'): time.sleep(0.01)
for n in range(150):
    # One of the two makes it.
    for kind, make in (('f', lambda name: os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))), ('d', os.mkdir)):
        try:
            make('race-%s%d' % (kind, n)); won.append('%s%d' % (kind, n))
        except FileExistsError: pass
    # Replaced as a whole: nobody sees half of one.
    tmp = 'tmp%s' % side
    with open(tmp, 'wb') as f: f.write(whole(n))
    os.rename(tmp, 'shared%d' % (n % 5))
    for m in range(5):
        for attempt in range(20):
            try:
                with open('shared%d' % m, 'rb') as f: got = f.read()
                assert hashlib.sha256(got[32:]).digest() == got[:32], 'half of a file: %d bytes' % len(got)
                seen += 1
                break
            except FileNotFoundError: break
            except OSError as e:
                # What was open was replaced by the other side (ESTALE): looked at again.
                if e.errno != 116: raise
    # Its own.
    with open('own%s-%d' % (side, n), 'wb') as f: f.write(whole(n))
    if n % 3 == 0: os.unlink('own%s-%d' % (side, n))
    elif n % 3 == 1: os.link('own%s-%d' % (side, n), 'linked%s-%d' % (side, n))
print(','.join(won), seen)
"#;

/// (S-33) Two mounts on two machines share a folder: names are won once, files are seen whole, and in the end both see the same.
#[test]
fn two_mounts_on_two_machines() {
    if !forebay_tests::fuse::is_here("two_mounts_on_two_machines") {
        return;
    }
    let mut net = match Net::new() {
        Ok(net) => net,
        Err(why) => return eprintln!("SKIPPED: network namespaces are not possible here: {why}"),
    };
    let (address, processes) = cluster(&mut net);
    let script = net.config("sharing.py", SHARING);
    let mut mounts = Vec::new();
    for (i, worker) in processes.iter().take(2).enumerate() {
        let at = net.dir.path().join(format!("mnt{i}"));
        std::fs::create_dir(&at).expect("folder");
        let mut command = Command::new("nsenter");
        command.args(["-t", &worker.to_string(), "-m", "-n"]).arg(forebay()).args(["mount", "--foreground", "--master", &address]).arg(&at);
        command.env("FOREBAY_CONFIG", "/nonexistent").env("FOREBAY_CLIENT__SOCKET_DIR", "/run/forebay");
        net.spawn(command);
        mounts.push(at);
    }
    let side = |i: usize| Side { net: &net, master: address.clone(), process: processes[i] };
    side(0).run(&format!("mkdir {}/d", mounts[0].display()), true);
    let run = |i: usize| side(i).run(&format!("python3 {script} {i} {}/d", mounts[i].display()), true);
    let (one, two) = std::thread::scope(|scope| {
        let two = scope.spawn(|| run(1));
        (run(0), two.join().expect("the other side"))
    });
    let parsed = |text: &str| {
        let (won, seen) = text.rsplit_once(' ').expect("two words");
        (won.split(',').map(str::to_owned).collect::<Vec<_>>(), seen.parse::<u64>().expect("a number"))
    };
    let ((mut won, seen_one), (others, seen_two)) = (parsed(&one), parsed(&two));
    eprintln!("won by one {}, by the other {}; {} whole files seen", won.len(), others.len(), seen_one + seen_two);
    won.extend(others);
    let all = won.len();
    won.sort();
    won.dedup();
    assert_eq!((all, won.len()), (300, 300), "each name is won once");
    // Attributes are trusted for a second.
    std::thread::sleep(std::time::Duration::from_millis(1_200));
    let look = |i: usize| {
        side(i).run(
            &format!("cd {}/d && find . -type f -printf '%p %n ' -exec sha256sum {{}} \\; | sort && find . -type d | sort", mounts[i].display()),
            true,
        )
    };
    let seen = look(0);
    assert_eq!(seen, look(1));
    assert!(seen.lines().count() > 300 && seen.contains(" 2 "), "{seen}");
}
