//! Mounting, serving, and taking the mount away again.

use crate::handler::Handler;
use crate::mount::Mount;
use forebay_client::FileSystem;
use forebay_common::config::{ClientConfig, FuseConfig};
use forebay_common::{AbsPath, Error, Result, err};
use fuser::{Config, MountOption, Session, SessionACL};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Grants kept at most, whatever the process's limits are.
const GRANTS_MAX: usize = 32_768;
/// How long a mount with `hard` waits for its master.
const HARD_MS: u64 = 365 * 24 * 3_600 * 1_000;
/// The first Linux whose FUSE reads files by itself.
const PASSTHROUGH_SINCE: (u32, u32) = (6, 9);
/// How long the last requests may take when the mount is over.
const LAST_REQUESTS: Duration = Duration::from_secs(60);
/// CAP_SYS_ADMIN, a bit of `CapEff` in /proc/self/status (capabilities(7)).
const CAP_SYS_ADMIN: u32 = 21;

/// What is mounted where.
pub struct Options {
    /// A folder of this machine.
    pub mountpoint: PathBuf,
    /// A folder of the namespace.
    pub path: AbsPath,
    /// Nothing is changed through it.
    pub read_only: bool,
}

fn may_pass_descriptors() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    effective.is_some_and(|bits| bits >> CAP_SYS_ADMIN & 1 == 1)
}

/// Whether this machine and this process can mount, and whether cached files would be read by the kernel itself: `Err` says what is missing.
pub fn able() -> std::result::Result<std::result::Result<(), String>, String> {
    if !Path::new("/dev/fuse").exists() {
        return Err("there is no /dev/fuse here: load the kernel module (modprobe fuse), or give the container the device".into());
    }
    let release = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    Ok(if version < PASSTHROUGH_SINCE {
        Err(format!("Linux {release} has no FUSE passthrough ({}.{} has)", PASSTHROUGH_SINCE.0, PASSTHROUGH_SINCE.1))
    } else if !may_pass_descriptors() {
        Err("this user lacks CAP_SYS_ADMIN: a mount of its own reads every file through its process".into())
    } else {
        Ok(())
    })
}

/// Takes a dead mount away that an earlier process left, and says whether one can be made. Errors: what has to be done first.
fn prepare(mountpoint: &Path) -> Result<()> {
    // Attributes may still be in the kernel's cache; this is always asked.
    let dead = nix::sys::statvfs::statvfs(mountpoint).err() == Some(nix::errno::Errno::ENOTCONN);
    match std::fs::metadata(mountpoint) {
        _ if dead => {
            tracing::info!(at = %mountpoint.display(), "a mount whose process is gone is taken away first");
            nix::mount::umount2(mountpoint, nix::mount::MntFlags::MNT_DETACH)
                .map_err(|e| Error::io(format!("taking away the dead mount on {}", mountpoint.display()), &e.into()))?;
            prepare(mountpoint)
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(err!(NotFound, "there is no folder {}: make it first (mkdir -p {0})", mountpoint.display()))
        }
        Err(e) => Err(Error::io(mountpoint.display(), &e)),
        Ok(metadata) if !metadata.is_dir() => Err(err!(NotADirectory, "{} is not a folder", mountpoint.display())),
        Ok(_) if !Path::new("/dev/fuse").exists() => {
            Err(err!(Unsupported, "there is no /dev/fuse here: load the kernel module (modprobe fuse), or give the container the device"))
        }
        Ok(_) => Ok(()),
    }
}

/// Has the kernel read further ahead than the 128 KiB that it begins with.
fn read_ahead(mountpoint: &Path, kib: u64) {
    let set = || -> std::io::Result<()> {
        let device = nix::sys::stat::stat(mountpoint)?.st_dev;
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        std::fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), kib.to_string())
    };
    if kib > 0
        && let Err(e) = set()
    {
        tracing::info!(error = %e, "the kernel's read-ahead stays as it is: large files that are not read by passthrough are read in smaller pieces");
    }
}

/// Grants that this process can keep: two descriptors each, out of half of those it may have.
fn grants() -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 0 };
    let limit = if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft };
    usize::try_from(limit / 4).unwrap_or(GRANTS_MAX).min(GRANTS_MAX)
}

/// Mounts, calls `ready`, and serves until the mount is taken away (`umount`) or the process is told to stop (SIGTERM, SIGINT): then what was
/// written is handed over, and the mount goes.
///
/// Needs a runtime of several threads. Errors: the master, the mount point, the kernel; each with what to do.
pub async fn run(client: &ClientConfig, fuse: &FuseConfig, options: Options, ready: impl FnOnce(&str)) -> Result<()> {
    prepare(&options.mountpoint)?;
    let mut client = client.clone();
    if fuse.hard {
        client.call_timeout_ms = HARD_MS;
    }
    client.grants_max = client.grants_max.max(grants());
    let fs = FileSystem::connect(&client).await?;
    let status = fs.get_status(&options.path).await?;
    if !status.folder {
        return Err(err!(NotADirectory, "{} is a file: a folder can be mounted", options.path));
    }
    let no_passthrough = if !fuse.passthrough {
        Some("fuse.passthrough is off".to_owned())
    } else if !may_pass_descriptors() {
        Some("this process lacks CAP_SYS_ADMIN".to_owned())
    } else {
        None
    };
    let mount = Arc::new(Mount::new(fs.clone(), options.path.clone(), &status, fuse.clone(), options.read_only));
    let handler = Handler { mount: mount.clone(), runtime: tokio::runtime::Handle::current(), no_passthrough };
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(format!("{}{}", client.master, options.path)),
        MountOption::Subtype("forebay".into()),
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoAtime,
    ];
    if options.read_only {
        config.mount_options.push(MountOption::RO);
    }
    config.acl = if fuse.allow_other && nix::unistd::geteuid().is_root() { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(fuse.threads);
    config.clone_fd = true;
    let mountpoint = options.mountpoint.clone();
    let at = mountpoint.display().to_string();
    let made = tokio::task::spawn_blocking(move || Session::new(handler, &mountpoint, &config)).await;
    let mut session = made.map_err(|e| err!(Internal, "mounting: {e}"))?.map_err(|e| Error::io(format!("mounting on {at}"), &e))?;
    let mut unmounter = session.unmount_callable();
    let _ = mount.notifier.set(session.notifier());
    let (ended, mut end) = tokio::sync::oneshot::channel();
    let serve = std::thread::Builder::new().name("fuse".into()).spawn(move || drop(ended.send(session.run())));
    serve.map_err(|e| Error::io("a thread for the mount", &e))?;
    let (point, kib) = (options.mountpoint.clone(), fuse.read_ahead_kb);
    let _ = tokio::task::spawn_blocking(move || read_ahead(&point, kib)).await;
    let stop = |kind| signal(kind).map_err(|e| Error::io("signals", &e));
    let (mut terminated, mut interrupted) = (stop(SignalKind::terminate())?, stop(SignalKind::interrupt())?);
    let passes = mount.passthrough.load(std::sync::atomic::Ordering::SeqCst);
    tracing::info!(at, path = %options.path, passthrough = passes, "mounted");
    ready(if passes { "cached files of one block are read by the kernel itself" } else { "files are read through this process" });
    let done = tokio::select! {
        done = &mut end => done,
        _ = async { tokio::select! { _ = terminated.recv() => {}, _ = interrupted.recv() => {} } } => {
            mount.hand_over_all().await;
            let point = options.mountpoint.clone();
            let gone = tokio::task::spawn_blocking(move || match unmounter.unmount() {
                Err(e) if e.raw_os_error() == Some(nix::libc::EBUSY) => {
                    tracing::warn!("the mount is in use: it is taken out of the tree, and ends for those who have something open");
                    nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH).map_err(std::io::Error::from)
                }
                other => other,
            });
            match gone.await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => tracing::warn!(error = %e, at, "the mount could not be taken away: umount it"),
                Err(e) => tracing::warn!(error = %e, "unmounting"),
            }
            Ok(Ok(()))
        }
    };
    // The last releases come after the mount is gone; a connection that was cut leaves what is here.
    mount.settle(LAST_REQUESTS).await;
    mount.hand_over_all().await;
    if let Err(e) = fs.flush().await {
        tracing::debug!(error = %e, "the last counters were not told");
    }
    tracing::info!(at, "the mount is over");
    match done {
        Ok(Err(e)) => Err(Error::io(format!("the mount on {at}"), &e)),
        _ => Ok(()),
    }
}
