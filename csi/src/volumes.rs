//! Published volumes: written down, mounted, and kept mounted.
//!
//! A volume of files is a process, `forebay mount DIR --foreground` with a folder of the driver's, that a task watches: where it ends by itself it is begun anew, and takes
//! away the mount that the dead one left. The mounts of a driver that is replaced while it runs are taken over by the next one's processes, with what pods have open in them. What it mounts is bound on the pod's place; after a new beginning over what is there, never in its stead: a pod has the volume as
//! a mount of its own, and sees (with `mountPropagation: HostToContainer`) only what is mounted on that. A volume of sockets is a read-only bind mount.

use crate::Options;
use forebay_common::error::at;
use forebay_common::{Error, Result, counter, err, gauge, mountpoint};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

gauge!(PUBLISHED, "forebay_csi_volumes", "volumes that are published on this node");
counter!(RESTARTS, "forebay_csi_mounts_restarted_total", "mounts whose process ended by itself and was begun anew");

/// What a mount says when it is there, and then of one that was another process's before; and when another process has it.
const READY: &str = "READY ";
const TAKEN: &str = ": taken over; ";
const GIVEN: &str = "GIVEN";
/// How long kubelet waits for a mount.
const READY_WAIT: Duration = Duration::from_secs(30);
/// How long a mount may take to hand over what is being written, before it is killed.
const STOP_WAIT: Duration = Duration::from_secs(50);
/// Pauses between two starts of a process that ends at once grow up to this.
const AGAIN_MAX: Duration = Duration::from_secs(5);
const AGAIN_MIN: Duration = Duration::from_millis(100);

/// What a volume is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A folder of the namespace.
    Files { path: String, master: Option<String>, options: Vec<String>, read_only: bool },
    /// The workers' sockets.
    Sockets,
}

/// One volume at one place: a pod has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub id: String,
    pub target: PathBuf,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
enum State {
    Starting,
    Ready,
    /// It ended before it was there, and said this.
    Failed(String),
}

struct Running {
    volume: Volume,
    stop: CancellationToken,
    /// With `stop`: nobody is to go on with it.
    unpublished: Arc<AtomicBool>,
    state: watch::Receiver<State>,
    task: JoinHandle<()>,
}

/// A volume that needs no process.
fn done(volume: Volume) -> Running {
    let (_, state) = watch::channel(State::Ready);
    Running { volume, stop: CancellationToken::new(), unpublished: Arc::default(), state, task: tokio::spawn(async {}) }
}

pub struct Volumes {
    dir: PathBuf,
    mounts: PathBuf,
    /// Where the mounts' processes listen for others that take them over: those of the driver's next pod.
    control: PathBuf,
    mount: Vec<OsString>,
    socket_dir: PathBuf,
    running: Mutex<HashMap<PathBuf, Running>>,
}

/// Of a volume, by its place: a driver that is started again finds it.
fn name(target: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    target.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Binds what a volume's process has mounted on the pod's place, over what is there.
fn bind(own: &Path, target: &Path) -> Result<()> {
    let os = |e: nix::errno::Errno| Error::io(format!("binding {} on {}", own.display(), target.display()), &e.into());
    mount(Some(own), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(os)
}

/// Whatever is mounted there, and on top of each other, goes.
fn unmount_all(target: &Path) {
    while umount2(target, MntFlags::MNT_DETACH).is_ok() {}
}

impl Volumes {
    pub fn open(dir: PathBuf, options: &Options) -> Result<Volumes> {
        let (mounts, control) = (dir.with_file_name("mounts"), dir.with_file_name("control"));
        for dir in [&dir, &mounts, &control] {
            std::fs::create_dir_all(dir).map_err(at(dir.display()))?;
        }
        Ok(Volumes { dir, mounts, control, mount: options.mount.clone(), socket_dir: options.socket_dir.clone(), running: Mutex::default() })
    }

    fn record(&self, target: &Path) -> PathBuf {
        self.dir.join(format!("{}.json", name(target)))
    }

    /// Where a volume's process mounts.
    fn own_mount(&self, target: &Path) -> PathBuf {
        self.mounts.join(name(target))
    }

    fn write_down(&self, volume: &Volume) -> Result<()> {
        let path = self.record(&volume.target);
        let text = serde_json::to_vec(volume).map_err(|e| err!(Internal, "a volume's record: {e}"))?;
        let temporary = path.with_extension("new");
        std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, &path)).map_err(at(path.display()))
    }

    /// Mounts again what is written down: what an earlier process had published. Called before kubelet is answered. Pods have these volumes, and kubelet does not ask for
    /// them again: they are tried until they are there.
    pub async fn resume(&self) {
        let entries = std::fs::read_dir(&self.dir).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
        let mut running = self.running.lock().await;
        for entry in entries.into_iter().filter(|entry| entry.path().extension().is_some_and(|e| e == "json")) {
            match std::fs::read(entry.path()).ok().and_then(|raw| serde_json::from_slice::<Volume>(&raw).ok()) {
                // Its pod went away while nobody was here.
                Some(volume) if !volume.target.parent().is_some_and(Path::exists) => {
                    unmount_all(&self.own_mount(&volume.target));
                    let _ = std::fs::remove_file(entry.path());
                }
                Some(volume) => {
                    tracing::info!(volume = volume.id, target = %volume.target.display(), "a volume is mounted again");
                    let started = match volume.kind {
                        // A bind mount of the node's: it is still there.
                        Kind::Sockets => done(volume.clone()),
                        Kind::Files { .. } => self.start(volume.clone(), true),
                    };
                    running.insert(volume.target, started);
                }
                None => tracing::error!(record = %entry.path().display(), "a volume's record cannot be read"),
            }
        }
        PUBLISHED.set(i64::try_from(running.len()).unwrap_or(i64::MAX));
    }

    /// Has a volume at its place. Returns when it is mounted. Errors: what the mount says, the volume at this place is another one.
    pub async fn publish(&self, volume: Volume) -> Result<()> {
        mountpoint::make(&volume.target)?;
        let mut running = self.running.lock().await;
        if let Some(there) = running.get(&volume.target) {
            if there.volume != volume {
                return Err(err!(InvalidArgument, "{} has volume {} with other attributes", volume.target.display(), there.volume.id));
            }
        } else {
            self.write_down(&volume)?;
            let started = match &volume.kind {
                Kind::Sockets => {
                    self.bind_sockets(&volume.target)?;
                    done(volume.clone())
                }
                Kind::Files { .. } => self.start(volume.clone(), false),
            };
            running.insert(volume.target.clone(), started);
            PUBLISHED.set(i64::try_from(running.len()).unwrap_or(i64::MAX));
        }
        let mut state = match running.get(&volume.target) {
            Some(running) => running.state.clone(),
            None => return Err(err!(Internal, "a volume that was just started is gone")),
        };
        drop(running);
        let reached = tokio::time::timeout(READY_WAIT, state.wait_for(|state| *state != State::Starting)).await;
        match reached.map(|reached| reached.map(|state| state.clone())) {
            Ok(Ok(State::Failed(why))) => {
                // Kubelet asks again; until then nothing is tried.
                self.unpublish(&volume.target).await?;
                Err(err!(Unavailable, "{why}"))
            }
            Ok(_) => Ok(()),
            Err(_) => Err(err!(Timeout, "volume {} is not mounted within {} s", volume.id, READY_WAIT.as_secs())),
        }
    }

    fn bind_sockets(&self, target: &Path) -> Result<()> {
        let os = |e: nix::errno::Errno| Error::io(format!("binding {} on {}", self.socket_dir.display(), target.display()), &e.into());
        unmount_all(target);
        mount(Some(&self.socket_dir), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(os)?;
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(None::<&str>, target, None::<&str>, read_only, None::<&str>).map_err(os)
    }

    fn command(&self, volume: &Volume) -> Command {
        let [program, before @ ..] = self.mount.as_slice() else { return Command::new("forebay") };
        let mut command = Command::new(program);
        command.args(before).arg("mount").arg(self.own_mount(&volume.target)).args(["--foreground", "--mkdir", "--take-over"]);
        command.arg("-o").arg(format!("control_dir={}", self.control.display()));
        if let Kind::Files { path, master, options, read_only } = &volume.kind {
            command.arg("--path").arg(path);
            if let Some(master) = master {
                command.arg("--master").arg(master);
            }
            if *read_only {
                command.arg("--read-only");
            }
            for option in options {
                command.arg("-o").arg(option);
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// `until_there`: it is tried until it is mounted, however often it fails.
    fn start(&self, volume: Volume, until_there: bool) -> Running {
        let (sender, state) = watch::channel(State::Starting);
        let (stop, unpublished) = (CancellationToken::new(), Arc::<AtomicBool>::default());
        let command = self.command(&volume);
        let own = self.own_mount(&volume.target);
        let task = tokio::spawn(keep(volume.clone(), own, command, sender, until_there, stop.clone(), unpublished.clone()));
        Running { volume, stop, unpublished, state, task }
    }

    /// Takes a volume away. Nothing is there, or it is no volume of ours any more: that is fine.
    pub async fn unpublish(&self, target: &Path) -> Result<()> {
        let running = self.running.lock().await.remove(target);
        // Nobody is in it any more: first the pod's place, so that its process has nothing left to wait for.
        unmount_all(target);
        if let Some(running) = running {
            running.unpublished.store(true, Ordering::SeqCst);
            running.stop.cancel();
            let _ = running.task.await;
        }
        let own = self.own_mount(target);
        unmount_all(&own);
        let _ = std::fs::remove_dir(&own);
        match std::fs::remove_dir(target) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(target.display(), &e)),
            _ => {}
        }
        match std::fs::remove_file(self.record(target)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("a volume's record", &e)),
            _ => {}
        }
        PUBLISHED.set(i64::try_from(self.running.lock().await.len()).unwrap_or(i64::MAX));
        Ok(())
    }

    /// The driver ends: what is being written is handed over, and a keeper has the mounts where there is one (`forebay_fuse::keeper`). The records stay.
    pub async fn stop(&self) {
        let all: Vec<Running> = self.running.lock().await.drain().map(|(_, running)| running).collect();
        all.iter().for_each(|running| running.stop.cancel());
        for running in all {
            let _ = running.task.await;
        }
    }
}

/// What a mount's process said.
struct Said {
    /// It was another process's before.
    taken: bool,
    /// It is there, and bound on the pod's place.
    bound: bool,
    /// Its last line, as it comes.
    last: Arc<std::sync::Mutex<String>>,
    /// Another process has it.
    given: Arc<AtomicBool>,
}

/// Passes on what a mount's process says, until it is there or has ended.
async fn follow(child: &mut Child, volume: &Volume, own: &Path, state: &watch::Sender<State>) -> Said {
    let (mut bound, mut taken) = (false, false);
    let last = Arc::new(std::sync::Mutex::new(String::new()));
    if let Some(stderr) = child.stderr.take() {
        let (last, id) = (last.clone(), volume.id.clone());
        tokio::spawn(async move {
            let mut lines = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                eprintln!("{id}: {line}");
                *last.lock().unwrap_or_else(|e| e.into_inner()) = line;
            }
        });
    }
    let given = Arc::new(AtomicBool::new(false));
    if let Some(stdout) = child.stdout.take() {
        let mut lines = BufReader::new(stdout).lines();
        if let Ok(Some(line)) = lines.next_line().await
            && line.starts_with(READY)
        {
            // What is taken over is at the pod's place already.
            taken = line.contains(TAKEN);
            match if taken { Ok(()) } else { bind(own, &volume.target) } {
                Ok(()) => {
                    tracing::info!(volume = volume.id, target = %volume.target.display(), "a volume is mounted");
                    state.send_replace(State::Ready);
                    bound = true;
                }
                Err(e) => {
                    *last.lock().unwrap_or_else(|e| e.into_inner()) = e.to_string();
                    let _ = child.start_kill();
                }
            }
        }
        let given = given.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                given.fetch_or(line == GIVEN, Ordering::SeqCst);
            }
        });
    }
    Said { taken, bound, last, given }
}

/// Runs a volume's process until `stop`, as often as it takes.
async fn keep(
    volume: Volume,
    own: PathBuf,
    mut command: Command,
    state: watch::Sender<State>,
    until_there: bool,
    stop: CancellationToken,
    unpublished: Arc<AtomicBool>,
) {
    let mut pause = AGAIN_MIN;
    // Layers bound on the pod's place by this task; what a driver before it bound is below them.
    let mut layers = 0;
    loop {
        let began = tokio::time::Instant::now();
        if layers > 1 {
            // Dead by now. The lowest stays: it is what the pod has, and new ones are seen on it.
            layers -= usize::from(umount2(&volume.target, MntFlags::MNT_DETACH).is_ok());
        }
        let said = match command.spawn() {
            Ok(mut child) => {
                let run = async {
                    let said = follow(&mut child, &volume, &own, &state).await;
                    let ended = child.wait().await;
                    (said, ended)
                };
                let run = tokio::select! {
                    run = run => Some(run),
                    () = stop.cancelled() => None,
                };
                let Some((said, ended)) = run else {
                    return end(&mut child, if unpublished.load(Ordering::SeqCst) { Signal::SIGINT } else { Signal::SIGTERM }).await;
                };
                // What is taken over is bound there already, by this task or by a driver before it.
                layers += usize::from(said.bound && !said.taken);
                // Given the time to be read.
                tokio::time::sleep(Duration::from_millis(50)).await;
                if said.given.load(Ordering::SeqCst) {
                    tracing::info!(volume = volume.id, "the driver's next pod has the volume's mount");
                    return;
                }
                let last = said.last.lock().unwrap_or_else(|e| e.into_inner()).clone();
                if last.is_empty() { format!("the mount ended: {ended:?}") } else { last }
            }
            Err(e) => format!("the mount's process cannot be started: {e}"),
        };
        // What a pod has already, or had, is not given up.
        if *state.borrow() == State::Starting && !until_there {
            state.send_replace(State::Failed(said));
            return;
        }
        RESTARTS.inc();
        tracing::error!(volume = volume.id, said, "a volume's process ended by itself; it is begun anew");
        pause = if began.elapsed() > AGAIN_MAX { AGAIN_MIN } else { (pause * 2).min(AGAIN_MAX) };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Has a mount's process hand over what is being written and end: by SIGINT the mount goes, by SIGTERM a keeper may have it.
async fn end(child: &mut Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) {
        let _ = kill(Pid::from_raw(pid), signal);
        if tokio::time::timeout(STOP_WAIT, child.wait()).await.is_ok() {
            return;
        }
        tracing::error!("a mount's process does not end within {} s, and is killed", STOP_WAIT.as_secs());
    }
    let _ = child.kill().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(dir: &Path, script: &str) -> Options {
        // Stands where the mount's process would (its words are `mount DIR …`): what is tested is how it is kept. Binding needs root, as the driver does.
        Options {
            node: "n".into(),
            kubelet_dir: dir.join("kubelet"),
            socket_dir: dir.join("sockets"),
            web: ([127, 0, 0, 1], 0).into(),
            inline_files: false,
            mount: vec!["sh".into(), "-c".into(), script.into()],
        }
    }

    fn files(dir: &Path) -> Volume {
        let kind = Kind::Files { path: "/data".into(), master: None, options: vec![], read_only: true };
        Volume { id: "v".into(), target: dir.join("pods/p/mount"), kind }
    }

    #[tokio::test]
    async fn what_is_published_is_written_down_until_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Arc::new(Volumes::open(dir.path().join("volumes"), &options(dir.path(), "mkdir -p $1; echo READY x; exec sleep 60")).unwrap());
        let volume = files(dir.path());
        volumes.publish(volume.clone()).await.unwrap();
        volumes.publish(volume.clone()).await.unwrap();
        let record = volumes.record(&volume.target);
        assert_eq!(serde_json::from_slice::<Volume>(&std::fs::read(&record).unwrap()).unwrap(), volume);
        let other = Volume { kind: Kind::Sockets, ..volume.clone() };
        assert!(volumes.publish(other).await.is_err(), "another volume at the same place");
        volumes.stop().await;
        assert!(record.exists(), "the driver's end is not the volume's");
        volumes.unpublish(&volume.target).await.unwrap();
        assert!(!record.exists() && !volume.target.exists());
        volumes.unpublish(&volume.target).await.unwrap();
    }

    #[tokio::test]
    async fn what_the_mount_says_is_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let volumes =
            Arc::new(Volumes::open(dir.path().join("volumes"), &options(dir.path(), "echo 'forebay: no such folder' >&2; exit 1")).unwrap());
        let e = volumes.publish(files(dir.path())).await.unwrap_err();
        assert!(e.message().contains("no such folder"), "{e}");
        assert!(!volumes.record(&files(dir.path()).target).exists());
    }

    /// (S-36), with `volumes` of tests/tests/kube.rs.
    #[tokio::test]
    async fn a_process_that_ends_by_itself_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let count = dir.path().join("count");
        let script = format!("mkdir -p $1; echo x >>{}; echo READY x; sleep 0.2", count.display());
        let volumes = Arc::new(Volumes::open(dir.path().join("volumes"), &options(dir.path(), &script)).unwrap());
        volumes.publish(files(dir.path())).await.unwrap();
        let began = std::time::Instant::now();
        while std::fs::read_to_string(&count).unwrap().lines().count() < 3 {
            assert!(began.elapsed() < Duration::from_secs(20));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        volumes.unpublish(&files(dir.path()).target).await.unwrap();
        let after = std::fs::read_to_string(&count).unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(std::fs::read_to_string(&count).unwrap(), after);
    }
}
