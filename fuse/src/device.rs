//! The kernel's side of a mount: its device, files that it reads by itself, and a session that goes on in another process.
//!
//! Called by `session` and `opening`. fuser begins every session with the kernel's INIT request, which comes once in a mount's life; a session that is gone on with is given
//! that request again, written by hand, over a socket that stands in for the device until it has answered (`resumed`). While a session changes hands the requests that were taken and not answered
//! are the kernel's again by FUSE_NOTIFY_RESEND (Linux 6.9).

use crate::handler::Handler;
use fuser::{BackingId, Config, Session, SessionACL};
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

mod ioctl {
    // linux/fuse.h: FUSE_DEV_IOC_BACKING_CLOSE
    nix::ioctl_write_ptr!(
        #[allow(unsafe_code, reason = "an ioctl")]
        backing_close,
        229,
        2,
        u32
    );
}

/// A file that the kernel reads by itself, by the number that it gave to it.
pub struct Backing {
    id: u32,
    device: Arc<OwnedFd>,
    /// Until then it is still another process's.
    ours: Arc<AtomicBool>,
}

impl Backing {
    /// Has the kernel take a descriptor.
    pub fn open(device: &Arc<OwnedFd>, descriptor: OwnedFd) -> Result<Backing> {
        Ok(Backing { id: BackingId::create_raw(device, descriptor)?, device: device.clone(), ours: Arc::new(AtomicBool::new(true)) })
    }

    /// One that another process had the kernel take, and that is this one's once `ours` is true.
    pub fn taken_over(device: &Arc<OwnedFd>, id: u32, ours: &Arc<AtomicBool>) -> Backing {
        Backing { id, device: device.clone(), ours: ours.clone() }
    }

    pub fn id(&self) -> u32 {
        self.id
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if !self.ours.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the pointer is to a number that lives as long as the call.
        #[allow(unsafe_code, reason = "an ioctl")]
        if let Err(e) = unsafe { ioctl::backing_close(self.device.as_raw_fd(), &raw const self.id) } {
            tracing::debug!(error = %e, "the kernel keeps a file that it read");
        }
    }
}

/// FUSE_HAS_RESEND: the kernel sends again what was taken from it and not answered (Linux 6.9).
const HAS_RESEND: u64 = 1 << 39;

impl Agreed {
    /// Whether a mount on this kernel can change hands.
    pub fn may_change_hands(&self) -> bool {
        self.capabilities & HAS_RESEND != 0
    }
}

/// What the kernel and the mount agreed on when it was made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreed {
    /// What the kernel offers, as in FUSE's INIT.
    pub capabilities: u64,
    /// What of it is in use.
    pub granted: u64,
    /// Of the kernel's FUSE.
    pub version: (u32, u32),
}

/// FUSE_INIT of linux/fuse.h as the kernel sent it, or would have.
fn init_request(agreed: &Agreed) -> Vec<u8> {
    const OPCODE: u32 = 26;
    const READ_AHEAD_BYTES: u32 = 128 << 10;
    let words: [u32; 16] = {
        let mut words = [0; 16];
        words[..5].copy_from_slice(&[
            agreed.version.0,
            agreed.version.1,
            READ_AHEAD_BYTES,
            agreed.capabilities as u32 | 1 << 30,
            (agreed.capabilities >> 32) as u32,
        ]);
        words
    };
    let mut out = Vec::with_capacity(104);
    out.extend(104u32.to_ne_bytes());
    out.extend(OPCODE.to_ne_bytes());
    out.extend(1u64.to_ne_bytes()); // its number
    out.extend([0; 24]); // node, user, group, process, extensions
    words.iter().for_each(|word| out.extend(word.to_ne_bytes()));
    out
}

/// Puts another file under the number of one that is open.
fn put_under(number: RawFd, file: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: both are open; whoever uses the number does so by system calls alone.
    #[allow(unsafe_code, reason = "dup3 of a number that fuser owns")]
    let done = unsafe { libc::dup3(file.as_raw_fd(), number, libc::O_CLOEXEC) };
    if done < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// A session on a device whose INIT was answered by somebody else. Nothing is read from the device before it is run.
pub fn resumed(handler: Handler, device: BorrowedFd<'_>, agreed: &Agreed, acl: SessionACL, config: Config) -> Result<Session<Handler>> {
    let (kernel, ours) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    nix::unistd::write(&kernel, &init_request(agreed))?;
    let session = Session::from_fd(handler, ours, acl, config)?;
    put_under(session.as_fd().as_raw_fd(), device)?;
    Ok(session)
}

/// This process's descriptors of the device, those that fuser made for its threads among them. By the device's number: what came from another container has another path here, or none.
fn devices() -> Result<Vec<RawFd>> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    /// Of /dev/fuse: the kernel's miscellaneous devices, and FUSE among them (linux/miscdevice.h).
    const FUSE: u64 = nix::libc::makedev(10, 229);
    let mut out = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        if std::fs::metadata(entry.path()).is_ok_and(|file| file.file_type().is_char_device() && file.rdev() == FUSE)
            && let Ok(number) = entry.file_name().to_string_lossy().parse()
        {
            out.push(number);
        }
    }
    Ok(out)
}

extern "C" fn nothing(_: libc::c_int) {}

/// A device whose threads are to read no more: duplicates of it that keep the kernel's requests alive, until they are dropped.
pub struct Stopped {
    kept: Vec<OwnedFd>,
    dead: OwnedFd,
}

impl Stopped {
    /// Takes the device away from all threads that read it, but for what `except` says; those that wait in a read are woken by `wake`.
    pub fn new(except: &[RawFd]) -> Result<Stopped> {
        let (dead, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        drop(other);
        let mut stopped = Stopped { kept: Vec::new(), dead };
        let numbers: Vec<RawFd> = devices()?.into_iter().filter(|number| !except.contains(number)).collect();
        for number in &numbers {
            let number = *number;
            // SAFETY: the number was read a moment ago, and nobody closes the session's devices while it runs.
            #[allow(unsafe_code, reason = "a number that fuser owns is borrowed for one call")]
            let kept = unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned()?;
            stopped.kept.push(kept);
        }
        for number in numbers {
            put_under(number, stopped.dead.as_fd())?;
        }
        Ok(stopped)
    }

    /// Wakes fuser's threads, so that they look at what there is to be read now: nothing any more.
    pub fn wake(&self) -> Result<()> {
        use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
        let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing.
        #[allow(unsafe_code, reason = "a signal's handler")]
        unsafe { sigaction(Signal::SIGUSR1, &action) }?;
        for task in std::fs::read_dir("/proc/self/task")? {
            let task = task?;
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            if name.starts_with("fuser-")
                && let Ok(id) = task.file_name().to_string_lossy().parse::<libc::pid_t>()
            {
                // SAFETY: a signal for one thread of this process, which has a handler.
                #[allow(unsafe_code, reason = "tgkill")]
                unsafe {
                    libc::syscall(libc::SYS_tgkill, libc::getpid(), id, libc::SIGUSR1)
                };
            }
        }
        Ok(())
    }

    /// One of them, for whoever goes on.
    pub fn device(&self) -> Option<BorrowedFd<'_>> {
        self.kept.first().map(AsFd::as_fd)
    }
}

/// What was taken from the kernel and not answered is to be taken again.
pub fn resend(device: BorrowedFd<'_>) -> Result<()> {
    const FUSE_NOTIFY_RESEND: u32 = 7;
    let mut message = Vec::with_capacity(16);
    message.extend(16u32.to_ne_bytes());
    message.extend(FUSE_NOTIFY_RESEND.to_ne_bytes());
    message.extend(0u64.to_ne_bytes());
    nix::unistd::write(device, &message)?;
    Ok(())
}

/// The kernel is to forget nodes that nobody uses, at most so many as fit a message (`fuse_notify_prune_out`, Linux 6.18). Errors: `EINVAL` from a kernel that does not know it.
pub fn prune(device: BorrowedFd<'_>, nodes: &[u64]) -> std::io::Result<()> {
    const FUSE_NOTIFY_PRUNE: u32 = 9;
    const HEAD_BYTES: usize = 32;
    let (Ok(count), Ok(length)) = (u32::try_from(nodes.len()), u32::try_from(HEAD_BYTES + 8 * nodes.len())) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let mut message = Vec::with_capacity(length as usize);
    for word in [length, FUSE_NOTIFY_PRUNE, 0, 0, count, 0, 0, 0] {
        message.extend(word.to_ne_bytes());
    }
    message.extend(nodes.iter().flat_map(|node| node.to_ne_bytes()));
    nix::unistd::write(device, &message)?;
    Ok(())
}
