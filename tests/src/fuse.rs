//! A FUSE mount of a cluster: a process of the real binary, unmounted when its handle is dropped.

use crate::Cluster;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A mount.
pub struct Mount {
    child: Child,
    /// Where it is.
    pub at: PathBuf,
}

/// Whether there is FUSE here; says that a test is skipped where there is not.
pub fn is_here(test: &str) -> bool {
    let here = Path::new("/dev/fuse").exists();
    if !here {
        println!("SKIPPED {test}: there is no /dev/fuse here");
    }
    here
}

/// The folder of the Python environment that `peers/programs.sh` makes; the other programs that it installs are in the path then.
pub fn installed() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/programs.sh");
    let output = Command::new("bash").arg(script).output().expect("programs.sh");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8(output.stdout).expect("path").trim())
}

/// Names in a folder, in order.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).expect("a folder").map(|e| e.expect("a name").file_name().into_string().expect("a name")).collect();
    names.sort();
    names
}

/// The number of the error that a call ended with; 0: none.
pub fn errno(done: std::io::Result<impl Sized>) -> i32 {
    done.err().and_then(|e| e.raw_os_error()).unwrap_or(0)
}

/// A shell command that must succeed, run in a folder.
pub fn sh(dir: &Path, command: &str) -> String {
    let output = Command::new("bash").args(["-euo", "pipefail", "-c", command]).current_dir(dir).output().expect("bash");
    assert!(output.status.success(), "{command}\n{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Mount {
    /// Mounts the namespace of a cluster on a folder of its own. `options`: further words of the command line.
    pub fn start(cluster: &Cluster, name: &str, options: &[&str]) -> Mount {
        let at = cluster.dir.path().join(name);
        // Not looked at: a mount that is there may wait for its process.
        let _ = std::fs::create_dir(&at);
        let log = cluster.dir.path().join(format!("{name}.log"));
        let file = std::fs::File::options().create(true).append(true).open(&log).expect("log");
        let socket_dir = cluster.client_config().socket_dir;
        let mut child = Command::new(crate::forebay())
            .args(["mount", "--foreground", "--master", &cluster.address])
            .args(options)
            .arg(&at)
            .env("FOREBAY_CLIENT__SOCKET_DIR", socket_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()
            .expect("spawn");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("stdout")).read_line(&mut line).expect("first line");
        assert!(line.starts_with("READY "), "{line}\n{}", std::fs::read_to_string(&log).unwrap_or_default());
        Mount { child, at }
    }

    /// A path below it.
    pub fn path(&self, path: &str) -> PathBuf {
        self.at.join(path.trim_start_matches('/'))
    }

    /// One of the process's own metrics, from the virtual file.
    pub fn metric(&self, name: &str) -> u64 {
        let text = std::fs::read_to_string(self.at.join(".forebay-stats")).expect("statistics");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse::<f64>().ok()).map_or(0, |value| value as u64)
    }

    /// `kill -9`; the dead mount stays.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Waits for the end of a process whose mount another one has taken over; the mount stays.
    pub fn given_away(mut self) {
        let ended = self.child.wait().expect("wait");
        assert!(ended.success(), "{ended}");
        std::mem::forget(self);
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// SIGTERM.
    pub fn terminate(&mut self) {
        let id = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).expect("SIGTERM");
    }

    /// SIGTERM; true when it ended well.
    pub fn stop(&mut self) -> bool {
        self.terminate();
        self.child.wait().expect("wait").success()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.at, nix::mount::MntFlags::MNT_DETACH);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
