//! Whether anybody still has an unlinked file open or mapped: `fcntl(F_SETLEASE, F_WRLCK)` on a descriptor of our own is
//! granted by the kernel only when no other open file description of the file exists (fcntl(2), "Leases"). 3 µs a probe.
//!
//! Whoever opens the file in that instant (a virus scanner by fanotify, somebody through /proc) breaks the lease, and the kernel tells us by SIGIO, which
//! would end the process: it is ignored. The lease is let go anyway.

use super::block_file::BlockFile;
use nix::libc;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Weak};

/// Our one descriptor of a file that is unlinked.
pub struct Probe(Option<File>);

enum Answer {
    Free,
    Held,
    Unsupported,
}

impl Probe {
    pub fn open(path: &Path) -> Probe {
        Probe(File::open(path).ok())
    }

    /// SIGIO, which the kernel sends when a lease is broken, is ignored from now on.
    #[allow(unsafe_code, reason = "what a signal does is changed for the whole process")]
    fn ignore_breaks() {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            use nix::sys::signal::{SigHandler, Signal, signal};
            // SAFETY: no handler is installed; nothing in this process waits for SIGIO.
            if let Err(e) = unsafe { signal(Signal::SIGIO, SigHandler::SigIgn) } {
                tracing::error!(error = %e, "SIGIO is not ignored: whoever opens a block that was evicted ends this process");
            }
        });
    }

    #[allow(unsafe_code, reason = "nix has no wrapper of F_SETLEASE")]
    fn ask(&self) -> Answer {
        let Some(file) = &self.0 else { return Answer::Free };
        Self::ignore_breaks();
        // SAFETY: F_SETLEASE takes an int and touches no memory of ours; the descriptor is open for the whole call.
        let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
        if taken == 0 {
            // SAFETY: as above.
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
            return Answer::Free;
        }
        match nix::errno::Errno::last() {
            nix::errno::Errno::EAGAIN => Answer::Held,
            _ => Answer::Unsupported,
        }
    }
}

/// An unlinked block whose bytes count until nobody holds it.
pub struct Zombie {
    probes: [Probe; 2],
    /// Bytes it occupied when it was unlinked.
    pub bytes: u64,
    ours: Weak<BlockFile>,
}

impl Zombie {
    pub fn new(probes: [Probe; 2], bytes: u64, ours: Weak<BlockFile>) -> Self {
        Zombie { probes, bytes, ours }
    }

    /// Whether these are the files of this very block.
    pub fn is_of(&self, file: &Arc<BlockFile>) -> bool {
        std::ptr::eq(self.ours.as_ptr(), Arc::as_ptr(file))
    }

    /// Whether both files are free. Where the file system knows no leases, when this process let go (grants, then, are
    /// not seen: such a tier is reported by `doctor`).
    pub fn is_free(&self) -> bool {
        self.ours.strong_count() == 0 && self.probes.iter().all(|p| !matches!(p.ask(), Answer::Held))
    }
}

/// Whether leases work on the file system of `dir`.
pub fn supported(dir: &Path) -> bool {
    let path = dir.join(".lease-probe");
    let works = File::create(&path).is_ok() && {
        let probe = Probe::open(&path);
        let held = File::open(&path);
        let sees = matches!(probe.ask(), Answer::Held);
        drop(held);
        sees && matches!(probe.ask(), Answer::Free)
    };
    let _ = std::fs::remove_file(&path);
    works
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever opens a file while it is asked for must not end this process: the kernel sends SIGIO then.
    #[test]
    fn a_broken_lease_ends_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        File::create(&path).unwrap();
        let probe = Probe::open(&path);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    // Opened without waiting, as a scanner does, so that it meets the lease while it is held.
                    let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_NONBLOCK;
                    drop(nix::fcntl::open(&path, flags, nix::sys::stat::Mode::empty()));
                }
            });
            let (mut free, mut held) = (0, 0);
            for _ in 0..50_000 {
                match probe.ask() {
                    Answer::Free => free += 1,
                    Answer::Held => held += 1,
                    Answer::Unsupported => {}
                }
            }
            stop.store(true, std::sync::atomic::Ordering::SeqCst);
            assert!(free + held > 0);
        });
    }
}
