//! The keeper: has a mount while the process that served it is gone and the next one is not there yet (`forebay keeper`).
//!
//! On Kubernetes the pod of a driver that is deleted ends before its successor begins. A mount's process that is told to end by SIGTERM offers its mount to the keeper of its control folder,
//! which takes the kernel's device and the rest of the hand-over as it is, without reading any of it, and gives it to whoever asks for the mount next. Programs wait meanwhile: their
//! requests are the kernel's. See `handover` for the protocol.
//!
//! Invariants: the process before is told that the mount is taken only when all of it is here and a successor would find it; what is kept is let go only when a successor has
//! said that it goes on, when somebody has unmounted it, or when nobody came for `Options::wait` or the keeper is told to end: then the mount is taken away, and programs get ENOTCONN instead of waiting for ever.
//! No socket and no mount is taken away that is another process's by then.
//! Nothing written is in danger by that: it was handed over to the namespace before.

use crate::handover::{
    GO, STATE_MAX_BYTES, TAKEN, UNDER_WAY_WAIT, broken, check_peer, greet, greeted, inode, keeper, listen, receive_descriptors, send_descriptors,
    timed,
};
use forebay_common::error::at;
use forebay_common::{Error, Result, counter, err, gauge};
use forebay_proto::mount as wire;
use prost::Message;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

gauge!(KEPT, "forebay_keeper_mounts", "mounts that are kept for their next process");
counter!(GIVEN, "forebay_keeper_given_total", "kept mounts that a next process has taken");
counter!(GIVEN_UP, "forebay_keeper_given_up_total", "kept mounts that were taken away, since nobody came for them");

/// Mounts kept at a time.
const KEPT_MAX: i64 = 4_096;
/// Bytes of an offer.
const OFFER_MAX_BYTES: usize = 16 << 10;
/// Between two looks whether a kept mount is still there.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Descriptors of one mount: its device, and files that are being written.
const DESCRIPTORS_MAX: u64 = 65_536;

/// How it keeps.
#[derive(Clone, Debug)]
pub struct Options {
    /// Control folders of mounts (`fuse.control_dir`).
    pub dirs: Vec<PathBuf>,
    /// How long a mount is kept.
    pub wait: Duration,
}

/// A mount, as its process gave it.
struct Kept {
    mountpoint: PathBuf,
    /// The device number of what is mounted there, as /proc/self/mountinfo has it.
    mounted: Option<String>,
    /// Its state, in a file without a name: it may be large.
    state: File,
    length: u64,
    descriptors: Vec<OwnedFd>,
}

fn number(stream: &mut UnixStream) -> Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).map_err(broken)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// What is offered: its length as a varint, and then that.
fn offer(stream: &mut UnixStream) -> Result<wire::Offer> {
    let mut length = Vec::new();
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).map_err(broken)?;
        length.push(byte[0]);
        if byte[0] < 0x80 || length.len() > 3 {
            break;
        }
    }
    let corrupt = |e: prost::DecodeError| err!(Corrupt, "an offer of a mount does not decode: {e}");
    let length = prost::decode_length_delimiter(&length[..]).map_err(corrupt)?;
    if length > OFFER_MAX_BYTES {
        return Err(err!(InvalidArgument, "an offer of {length} bytes"));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).map_err(broken)?;
    wire::Offer::decode(&bytes[..]).map_err(corrupt)
}

/// Takes what is offered on a connection, all but the last word, and where a successor will ask for it.
fn take(stream: &mut UnixStream, dir: &Path) -> Result<(Kept, PathBuf)> {
    timed(stream)?;
    check_peer(stream)?;
    let offer = offer(stream)?;
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let (mountpoint, control) = (path(&offer.mountpoint), path(&offer.control));
    // Where else a name leads is nobody's business here.
    let name = control.file_name().ok_or_else(|| err!(InvalidArgument, "an offer of a mount without a socket"))?;
    let control = dir.join(name);
    if KEPT.get() >= KEPT_MAX {
        return Err(err!(LimitExceeded, "{KEPT_MAX} mounts are kept already"));
    }
    greet(stream)?;
    stream.set_read_timeout(Some(UNDER_WAY_WAIT)).map_err(broken)?;
    let count = number(stream)?;
    timed(stream)?;
    let length = number(stream)?;
    if !(1..=DESCRIPTORS_MAX).contains(&count) || length > STATE_MAX_BYTES {
        return Err(err!(InvalidArgument, "a hand-over of {count} descriptors and {length} bytes"));
    }
    let mut state = tempfile::tempfile_in(dir).map_err(at(dir.display()))?;
    let copied = std::io::copy(&mut stream.take(length), &mut state).map_err(|e| match e.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            Error::io(format!("{} has no room for {length} bytes of a mount's state", dir.display()), &e)
        }
        _ => broken(e),
    })?;
    if copied != length {
        return Err(err!(Unavailable, "the mount's process ended in the middle of a hand-over"));
    }
    let descriptors = receive_descriptors(stream, usize::try_from(count).unwrap_or(usize::MAX))?;
    let mounted = mounted_on(&mountpoint);
    Ok((Kept { mountpoint, mounted, state, length, descriptors }, control))
}

/// The last word to a process that gave its mount. Errors: it keeps it.
fn taken(stream: &mut UnixStream) -> Result<()> {
    stream.write_all(&[TAKEN]).map_err(broken)?;
    let mut said = [0];
    stream.read_exact(&mut said).map_err(broken)?;
    if said[0] == GO { Ok(()) } else { Err(err!(Internal, "the mount's process keeps it")) }
}

/// The device number of what is mounted on top at a place, without looking at it: who serves that may be nobody.
fn mounted_on(mountpoint: &Path) -> Option<String> {
    let escaped: String = mountpoint
        .to_str()?
        .chars()
        .flat_map(|c| if " \t\n\\".contains(c) { format!("\\{:03o}", c as u32).chars().collect() } else { vec![c] })
        .collect();
    let all = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    // proc(5): id, parent, major:minor, root, mount point
    all.lines()
        .rev()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|words| words.get(4) == Some(&escaped.as_str()))
        .map(|words| words[2].to_owned())
}

impl Kept {
    /// Whether the kernel has let the device go: somebody has unmounted it.
    fn is_over(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let Some(device) = self.descriptors.first() else { return true };
        let mut device = [PollFd::new(device.as_fd(), PollFlags::empty())];
        poll(&mut device, PollTimeout::ZERO).is_ok() && device[0].revents().is_some_and(|is| is.contains(PollFlags::POLLERR))
    }

    /// Gives it to a successor, who has it once this returns; `within`: how long that may take to have all open again. Errors: it has not.
    fn give(&mut self, mut stream: UnixStream, within: Duration) -> Result<()> {
        greeted(&mut stream)?;
        self.state.rewind().map_err(at("a kept mount's state"))?;
        stream.write_all(&self.length.to_ne_bytes()).map_err(broken)?;
        std::io::copy(&mut self.state, &mut stream).map_err(broken)?;
        send_descriptors(&stream, &self.descriptors.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
        stream.set_read_timeout(Some(within)).map_err(broken)?;
        let mut said = [0];
        stream.read_exact(&mut said).map_err(broken)?;
        if said[0] != TAKEN {
            return Err(err!(Internal, "the other process did not take over"));
        }
        stream.write_all(&[GO]).map_err(broken)
    }

    /// Out of the tree; whoever has something open gets ENOTCONN with the device's end.
    fn take_away(self) {
        GIVEN_UP.inc();
        if self.mounted.is_none() || mounted_on(&self.mountpoint) != self.mounted {
            tracing::warn!(at = %self.mountpoint.display(), "the mount is not seen here, or another one is there by now: it ends where it is");
            return;
        }
        if let Err(e) = nix::mount::umount2(&self.mountpoint, nix::mount::MntFlags::MNT_DETACH) {
            tracing::warn!(at = %self.mountpoint.display(), error = %e, "a mount that nobody came for cannot be taken away: it ends where it is");
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| err!(Internal, "keeping a mount: {e}"))?
}

/// The account of one that is kept.
struct Counted;

impl Counted {
    fn new() -> Counted {
        KEPT.inc();
        Counted
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        KEPT.dec();
    }
}

async fn stopped_by(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Keeps one, from the offer until it is somebody else's or nobody's.
async fn keep(mut stream: UnixStream, dir: PathBuf, wait: Duration, mut stop: watch::Receiver<bool>) -> Result<()> {
    let (stream, (mut kept, control)) = blocking(move || take(&mut stream, &dir).map(|kept| (stream, kept))).await?;
    let _counted = Counted::new();
    // In the place of the process that gives: who comes from here on waits for this one.
    let listener = UnixListener::from_std(listen(&control)?).map_err(at(control.display()))?;
    let own = inode(&control);
    let mut giver = stream;
    blocking(move || taken(&mut giver)).await?;
    let shown = kept.mountpoint.display().to_string();
    tracing::info!(at = shown, "a mount is kept for its next process");
    let deadline = tokio::time::Instant::now() + wait;
    let remove = || {
        if inode(&control) == own {
            let _ = std::fs::remove_file(&control);
        }
    };
    loop {
        let asked = tokio::select! {
            () = tokio::time::sleep(LOOK_AGAIN) => {
                if kept.is_over() {
                    tracing::info!(at = shown, "the mount is over");
                    remove();
                    return Ok(());
                }
                continue;
            }
            asked = listener.accept() => asked.and_then(|(stream, _)| stream.into_std()).map_err(|e| Error::io("the socket of a kept mount", &e)),
            () = tokio::time::sleep_until(deadline) => break,
            () = stopped_by(&mut stop) => break,
        };
        let given;
        (given, kept) = match asked {
            Ok(stream) => {
                let within = deadline.saturating_duration_since(tokio::time::Instant::now()).max(UNDER_WAY_WAIT);
                blocking(move || Ok((kept.give(stream, within), kept))).await?
            }
            Err(e) => (Err(e), kept),
        };
        match given {
            Ok(()) => {
                tracing::info!(at = shown, "its next process has the mount");
                GIVEN.inc();
                return Ok(());
            }
            Err(e) => tracing::warn!(at = shown, error = %e, "the mount was not taken over: it is kept"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tracing::warn!(at = shown, "nobody came for the mount: it is taken away");
    remove();
    blocking(move || {
        kept.take_away();
        Ok(())
    })
    .await
}

/// Keeps what is offered until `stop`; what is kept then is taken away. Errors: a folder or socket.
pub async fn run(options: Options, stop: impl Future<Output = ()>) -> Result<()> {
    // Each kept mount has a device, and each file that is being written there is another one.
    let (_, most) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).map_err(|e| Error::io("limits", &e.into()))?;
    if let Err(e) = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most, most) {
        tracing::warn!(error = %e, "the limit of open files stays as it is");
    }
    let mut listeners = Vec::new();
    for dir in &options.dirs {
        let listener = UnixListener::from_std(listen(&keeper(dir))?).map_err(at(dir.display()))?;
        listeners.push((dir.clone(), listener, inode(&keeper(dir))));
    }
    let (stopping, stopped) = watch::channel(false);
    let mut folders = JoinSet::new();
    for (dir, listener, own) in listeners {
        let (stopped, wait) = (stopped.clone(), options.wait);
        folders.spawn(async move {
            let mut mounts = JoinSet::new();
            let mut stop = stopped.clone();
            loop {
                tokio::select! {
                    offered = listener.accept() => match offered.and_then(|(stream, _)| stream.into_std()) {
                        Ok(stream) => {
                            mounts.spawn(keep(stream, dir.clone(), wait, stopped.clone()));
                        }
                        Err(e) => {
                            tracing::warn!(error = %e, "the keeper's socket");
                            tokio::time::sleep(Duration::from_millis(100)).await;
                        }
                    },
                    Some(ended) = mounts.join_next() => {
                        if let Ok(Err(e)) = ended {
                            tracing::warn!(error = %e, "a mount that was offered is not kept");
                        }
                    }
                    () = stopped_by(&mut stop) => break,
                }
            }
            // From here on nobody is taken in.
            if inode(&keeper(&dir)) == own {
                let _ = std::fs::remove_file(keeper(&dir));
            }
            drop(listener);
            while mounts.join_next().await.is_some() {}
        });
    }
    stop.await;
    stopping.send_replace(true);
    while folders.join_next().await.is_some() {}
    Ok(())
}
