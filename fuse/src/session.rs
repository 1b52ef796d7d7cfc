//! Mounting, serving, and taking the mount away again.

use crate::device::{self, Agreed, Stopped};
use crate::handler::Handler;
use crate::handover::{self, Receiver};
use crate::mount::{Gate, Mount, STATISTICS};
use crate::staged;
use crate::trim;
use forebay_client::FileSystem;
use forebay_common::config::{ClientConfig, FuseConfig};
use forebay_common::{AbsPath, Error, ErrorKind, LocalBoxed, Result, err};
use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use std::ffi::OsStr;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// Grants kept at most, whatever the process's limits are.
const GRANTS_MAX: usize = 32_768;
/// How long a mount with `hard` waits for its master.
const HARD_MS: u64 = 365 * 24 * 3_600 * 1_000;
/// The first Linux whose FUSE reads files by itself.
const PASSTHROUGH_SINCE: (u32, u32) = (6, 9);
/// How long the last requests may take when the mount is over.
const LAST_REQUESTS: Duration = Duration::from_secs(60);
/// How long requests and threads may take to end before a mount changes hands.
const SETTLING_MAX: Duration = Duration::from_secs(10);
/// Between two looks whether the session is over, and whether its threads have heard.
const SETTLED: Duration = Duration::from_millis(50);
const WOKEN: Duration = Duration::from_millis(5);
/// CAP_SYS_ADMIN, a bit of `CapEff` in /proc/self/status (capabilities(7)).
const CAP_SYS_ADMIN: u32 = 21;

/// What a mount's process has to tell.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// It serves the mount.
    Ready {
        /// Who reads cached files.
        how: &'static str,
        /// It was another process's before.
        taken_over: bool,
    },
    /// Another process serves it now; this one ends.
    Given,
    /// A keeper has it for the next process; this one ends.
    Kept,
}

/// What is mounted where.
pub struct Options {
    /// A folder of this machine.
    pub mountpoint: PathBuf,
    /// A folder of the namespace.
    pub path: AbsPath,
    /// Nothing is changed through it.
    pub read_only: bool,
    /// A mount that is there already is taken over from its process, with what is open in it.
    pub take_over: bool,
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
        Ok(_) if mountpoint.join(OsStr::from_bytes(STATISTICS)).exists() => Err(err!(
            Busy,
            "a Forebay mount is on {} already: umount it first, or take it over from its process (--take-over, with the same control_dir)",
            mountpoint.display()
        )
        .with_retryable(false)),
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

/// Mounts, or takes a live mount over where that is asked for, `tell`s what comes, and serves until the mount is taken away (`umount`), another process takes it over, or the process
/// is told to stop (SIGTERM, SIGINT): then what was written is handed over, and the mount goes.
///
/// Needs a runtime of several threads. Errors: the master, the mount point, the kernel; each with what to do.
pub fn run<'a>(client: &'a ClientConfig, fuse: &'a FuseConfig, options: Options, tell: &'a dyn Fn(Event)) -> LocalBoxed<'a, Result<()>> {
    Box::pin(run_here(client, fuse, options, tell))
}

async fn run_here(client: &ClientConfig, fuse: &FuseConfig, options: Options, tell: &dyn Fn(Event)) -> Result<()> {
    let control = handover::control(fuse, &options.mountpoint);
    if !options.take_over {
        prepare(&options.mountpoint)?;
    }
    let mut client = client.clone();
    if fuse.hard {
        client.call_timeout_ms = HARD_MS;
    }
    client.grants_max = client.grants_max.max(grants());
    let fs = FileSystem::connect(&client).await?;
    // Before anything is asked of a process that serves the mount: one without a master could not go on with it.
    let status = fs.get_status(&options.path).await?;
    if !status.folder {
        return Err(err!(NotADirectory, "{} is a file: a folder can be mounted", options.path));
    }
    let taken = match options.take_over {
        true => {
            let control = control.clone();
            tokio::task::spawn_blocking(move || handover::ask(&control)).await.map_err(|e| err!(Internal, "taking over: {e}"))??
        }
        false => None,
    };
    if options.take_over && taken.is_none() {
        prepare(&options.mountpoint)?;
    }
    if let Some(taken) = &taken {
        let (path, read_only) = (AbsPath::parse(&taken.state.path)?, taken.state.read_only);
        if (&path, read_only) != (&options.path, options.read_only) {
            let is = if read_only { "read-only" } else { "for writing" };
            return Err(err!(InvalidArgument, "{path} is mounted there, {is}: take it over as that (--path {path}), or umount it first"));
        }
    }
    let no_passthrough = if !fuse.passthrough {
        Some("fuse.passthrough is off".to_owned())
    } else if !may_pass_descriptors() {
        Some("this process lacks CAP_SYS_ADMIN".to_owned())
    } else {
        None
    };
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
    let at = options.mountpoint.display().to_string();
    let was_live = taken.is_some();
    // Until the mount is this process's a signal ends it at once, and whoever has the mount keeps it; from then on in order.
    let signals = || -> Result<_> {
        let on = |kind| signal(kind).map_err(|e| Error::io("signals", &e));
        Ok((on(SignalKind::terminate())?, on(SignalKind::interrupt())?))
    };
    let (mount, mut serving, (mut terminated, mut interrupted)) = match taken {
        Some(mut taken) => {
            let device = Arc::new(taken.device.try_clone().map_err(|e| Error::io("the mount's device", &e))?);
            let mount = Arc::new(taken.restore(fs.clone(), fuse.clone(), &device).await?);
            let _ = mount.device.set(device);
            // Until its process has said so the mount is its own: nothing was read from the kernel before.
            let agreed = taken.agreed();
            let signals = signals()?;
            tokio::task::spawn_blocking(move || taken.done()).await.map_err(|e| err!(Internal, "taking over: {e}"))??;
            let serving = Serving::go_on(&mount, no_passthrough.clone(), agreed, &config)?;
            (mount, serving, signals)
        }
        None => {
            let mount = Arc::new(Mount::new(fs.clone(), options.path.clone(), &status, fuse.clone(), options.read_only));
            let signals = signals()?;
            let serving = Serving::begin(&mount, no_passthrough.clone(), &options.mountpoint, &config).await?;
            let (point, kib) = (options.mountpoint.clone(), fuse.read_ahead_kb);
            let _ = tokio::task::spawn_blocking(move || read_ahead(&point, kib)).await;
            (mount, serving, signals)
        }
    };
    let locks = [tokio::spawn(mount.clone().keep_locks()), tokio::spawn(mount.clone().settle_locks())];
    // Without it the mount is as good, but cannot be taken over.
    let listener = handover::listen(&control)
        .and_then(|listener| tokio::net::UnixListener::from_std(listener).map_err(|e| Error::io("the socket for --take-over", &e)));
    let listener = listener.inspect_err(|e| tracing::warn!(error = %e, "this mount cannot be taken over")).ok();
    let passes = mount.passthrough.load(Ordering::SeqCst);
    tracing::info!(at, path = %options.path, passthrough = passes, taken_over = was_live, "mounted");
    let how = if passes { "cached files of one block are read by the kernel itself" } else { "files are read through this process" };
    tell(Event::Ready { how, taken_over: was_live });
    let done = loop {
        tokio::select! {
            done = serving.ended() => break done,
            interrupt = async { tokio::select! { _ = terminated.recv() => false, _ = interrupted.recv() => true } } => {
                // Only where the next process would ask for it.
                if !interrupt && options.take_over {
                    match kept(&mount, &mut serving, &options.mountpoint, &control).await {
                        Ok(true) => leave(&fs, &at, tell, Event::Kept).await,
                        Ok(false) => {}
                        Err(e) => {
                            tracing::warn!(error = %e, at, "the keeper does not have the mount: it is taken away");
                            go_on(&mount, &mut serving, &no_passthrough, &config)?;
                        }
                    }
                }
                mount.hand_over_all().await;
                let _ = std::fs::remove_file(&control);
                serving.unmount(&options.mountpoint).await;
                break Ok(());
            }
            stream = accepted(listener.as_ref()) => match asked(stream, &mount, &mut serving).await {
                // It ends, and the other one mounts anew.
                Err(e) if e.kind() == ErrorKind::Unsupported => {
                    tracing::warn!(error = %e, at, "the mount ends for the process that wants to take it over");
                    mount.hand_over_all().await;
                    serving.unmount(&options.mountpoint).await;
                    let _ = std::fs::remove_file(&control);
                    tell(Event::Given);
                    break Ok(());
                }
                Ok(()) => leave(&fs, &at, tell, Event::Given).await,
                Err(e) => {
                    tracing::warn!(error = %e, at, "the mount was not taken over: it goes on here");
                    go_on(&mount, &mut serving, &no_passthrough, &config)?;
                }
            },
        }
    };
    // The last releases come after the mount is gone; a connection that was cut leaves what is here.
    mount.settle(LAST_REQUESTS).await;
    staged::LOST.inc_by(mount.hand_over_all().await as u64);
    locks.iter().for_each(tokio::task::JoinHandle::abort);
    mount.locks.end(&fs).await;
    if let Err(e) = fs.flush().await {
        tracing::debug!(error = %e, "the last counters were not told");
    }
    tracing::info!(at, "the mount is over");
    done.map_err(|e| Error::io(format!("the mount on {at}"), &e))
}

/// The next process that wants to take the mount over; never, where nobody can ask.
async fn accepted(listener: Option<&tokio::net::UnixListener>) -> std::os::unix::net::UnixStream {
    loop {
        let Some(listener) = listener else { return std::future::pending().await };
        match listener.accept().await.and_then(|(stream, _)| stream.into_std()) {
            Ok(stream) => return stream,
            Err(e) => {
                tracing::warn!(error = %e, "the socket for --take-over");
                tokio::time::sleep(SETTLED).await;
            }
        }
    }
}

/// Ends this process, whose mount another one has.
async fn leave(fs: &FileSystem, at: &str, tell: &dyn Fn(Event), how: Event) -> ! {
    if let Err(e) = fs.flush().await {
        tracing::debug!(error = %e, "the last counters were not told");
    }
    tracing::info!(at, ?how, "another process has the mount");
    tell(how);
    // Nothing is dropped: the kernel's files, and the mount itself, are the other one's.
    std::process::exit(0);
}

/// Whether a keeper has the mount now, for the process that comes next; there may be none. Errors: as `change_hands`.
async fn kept(mount: &Arc<Mount>, serving: &mut Serving, mountpoint: &Path, control: &Path) -> Result<bool> {
    // Whatever becomes of the offer.
    mount.hand_over_all().await;
    let (fuse, point, control) = (mount.config.clone(), mountpoint.to_owned(), control.to_owned());
    let offered = tokio::task::spawn_blocking(move || handover::offer(&fuse, &control, &point)).await;
    match offered.map_err(|e| err!(Internal, "offering: {e}"))?? {
        Some(keeper) => change_hands(keeper, mount, serving).await.map(|()| true),
        None => Ok(false),
    }
}

/// Goes on with a mount that was not given away after all.
fn go_on(mount: &Arc<Mount>, serving: &mut Serving, no_passthrough: &Option<String>, config: &Config) -> Result<()> {
    if serving.is_over() {
        let agreed = *mount.agreed.lock().unwrap_or_else(|e| e.into_inner());
        *serving = Serving::go_on(mount, no_passthrough.clone(), agreed, config)?;
    } else {
        *mount.gate.write().unwrap_or_else(|e| e.into_inner()) = Gate::Open;
    }
    Ok(())
}

/// Gives the mount to whoever asks. Errors: as `change_hands`.
async fn asked(mut stream: std::os::unix::net::UnixStream, mount: &Arc<Mount>, serving: &mut Serving) -> Result<()> {
    let stream = tokio::task::spawn_blocking(move || handover::greeted(&mut stream).map(|()| stream)).await;
    let stream = stream.map_err(|e| err!(Internal, "greeting: {e}"))??;
    change_hands(Receiver { stream, counted: false }, mount, serving).await
}

/// Gives the mount away. Errors: it was not taken over; the session may have been stopped for that.
async fn change_hands(to: Receiver, mount: &Arc<Mount>, serving: &mut Serving) -> Result<()> {
    let device = mount.device.get().cloned().ok_or_else(|| err!(Internal, "a mount without a device"))?;
    if !mount.agreed.lock().unwrap_or_else(|e| e.into_inner()).may_change_hands() {
        return Err(err!(Unsupported, "this kernel does not send requests again (Linux 6.9 does), so a live mount cannot change hands"));
    }
    let gate = |state| *mount.gate.write().unwrap_or_else(|e| e.into_inner()) = state;
    gate(Gate::Shut);
    mount.settle(SETTLING_MAX).await;
    if !mount.is_at_rest() {
        return Err(err!(Timeout, "requests are still being worked on"));
    }
    let failures = mount.hand_over_all().await;
    if failures > 0 {
        return Err(err!(Unavailable, "{failures} files that are being written could not be handed over to the namespace first"));
    }
    let handles = mount.save_handles().await?;
    let stopped = Stopped::new(&[device.as_raw_fd()]).map_err(|e| Error::io("taking the device from its threads", &e))?;
    mount.hands.fetch_add(1, Ordering::SeqCst);
    gate(Gate::Moved);
    serving.stopped(&stopped).await?;
    let (mount, agreed) = (mount.clone(), *mount.agreed.lock().unwrap_or_else(|e| e.into_inner()));
    let given = tokio::task::spawn_blocking(move || {
        let device = stopped.device().ok_or_else(|| err!(Internal, "the session had no device"))?;
        let given = handover::give(to, &mount, handles, &agreed, device);
        if given.is_err()
            && let Err(e) = device::resend(device)
        {
            tracing::error!(error = %e, "requests that were under way fail");
        }
        // Until here these have kept the kernel's requests that were not answered.
        drop(stopped);
        given
    });
    given.await.map_err(|e| err!(Internal, "giving: {e}"))?
}

/// fuser's threads, and what ends with them. Never dropped: its end would take the mount away.
struct Serving {
    session: ManuallyDrop<BackgroundSession>,
    /// fuser has mounted it, and knows how to take it away.
    own: bool,
}

impl Serving {
    async fn begin(mount: &Arc<Mount>, no_passthrough: Option<String>, mountpoint: &Path, config: &Config) -> Result<Serving> {
        let handler = Handler { mount: mount.clone(), runtime: tokio::runtime::Handle::current(), no_passthrough, granted: None };
        let (point, config, at) = (mountpoint.to_owned(), config.clone(), mountpoint.display().to_string());
        let made = tokio::task::spawn_blocking(move || Session::new(handler, &point, &config)).await;
        let session = made.map_err(|e| err!(Internal, "mounting: {e}"))?.map_err(|e| Error::io(format!("mounting on {at}"), &e))?;
        let device = session.as_fd().try_clone_to_owned().map_err(|e| Error::io("the mount's device", &e))?;
        let _ = mount.device.set(Arc::new(device));
        Serving::run(mount, session, true)
    }

    /// On a device that others have served: what they took and did not answer comes again.
    fn go_on(mount: &Arc<Mount>, no_passthrough: Option<String>, agreed: Agreed, config: &Config) -> Result<Serving> {
        let device = mount.device.get().ok_or_else(|| err!(Internal, "a mount without a device"))?;
        let granted = Some(agreed.granted);
        let handler = Handler { mount: mount.clone(), runtime: tokio::runtime::Handle::current(), no_passthrough, granted };
        let session = device::resumed(handler, device.as_fd(), &agreed, config.acl, config.clone());
        let session = session.map_err(|e| Error::io("going on with a session", &e))?;
        *mount.gate.write().unwrap_or_else(|e| e.into_inner()) = Gate::Open;
        Serving::run(mount, session, false)
    }

    fn run(mount: &Arc<Mount>, session: Session<Handler>, own: bool) -> Result<Serving> {
        *mount.notifier.write().unwrap_or_else(|e| e.into_inner()) = Some(session.notifier());
        let session = session.spawn().map_err(|e| Error::io("threads for the mount", &e))?;
        trim::start(mount)?;
        Ok(Serving { session: ManuallyDrop::new(session), own })
    }

    fn is_over(&self) -> bool {
        self.session.guard.is_finished()
    }

    /// Returns when the mount is gone.
    async fn ended(&self) -> std::io::Result<()> {
        while !self.is_over() {
            tokio::time::sleep(SETTLED).await;
        }
        Ok(())
    }

    /// Waits for the threads of a session whose device was taken away.
    async fn stopped(&self, device: &Stopped) -> Result<()> {
        let deadline = Instant::now() + SETTLING_MAX;
        while !self.is_over() {
            if Instant::now() > deadline {
                return Err(err!(Internal, "the session's threads do not end"));
            }
            device.wake().map_err(|e| Error::io("waking the session's threads", &e))?;
            tokio::time::sleep(WOKEN).await;
        }
        Ok(())
    }

    async fn unmount(&mut self, mountpoint: &Path) {
        let (point, own) = (mountpoint.to_owned(), self.own);
        // SAFETY of what follows is fuser's: it is taken once, and the caller uses it no more.
        #[allow(unsafe_code, reason = "taken out of what is never dropped, once")]
        let session = if own { Some(unsafe { ManuallyDrop::take(&mut self.session) }) } else { None };
        let gone = tokio::task::spawn_blocking(move || {
            let done = match session {
                Some(session) => session.umount_and_join(),
                None => match nix::mount::umount2(&point, nix::mount::MntFlags::empty()) {
                    // A user's own mount: by the program that may.
                    Err(nix::errno::Errno::EPERM) => match std::process::Command::new("fusermount3").arg("-u").arg(&point).status() {
                        Ok(done) if done.success() => Ok(()),
                        Ok(_) => Err(nix::errno::Errno::EPERM.into()),
                        Err(e) => Err(e),
                    },
                    other => other.map_err(std::io::Error::from),
                },
            };
            match done {
                Err(e) if e.raw_os_error() == Some(nix::libc::EBUSY) => {
                    tracing::warn!("the mount is in use: it is taken out of the tree, and ends for those who have something open");
                    nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH).map_err(std::io::Error::from)
                }
                other => other,
            }
        });
        match gone.await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::warn!(error = %e, at = %mountpoint.display(), "the mount could not be taken away: umount it"),
            Err(e) => tracing::warn!(error = %e, "unmounting"),
        }
    }
}
