//! flock(2) and fcntl(2) between machines. The fourth part of `Mount`.
//!
//! The way: a file that is only made here gets its lasting id (handed over) → the master takes the lock, or names who is in the way → what is open of the file, and was not
//! changed here, becomes what the namespace has now, for a program opens before it locks → the program works → what it wrote is handed over → the lock is given back: so
//! whoever gets it next finds that. A file that the kernel reads by itself stays as it was opened. A caller that waits is asked of the master every few seconds, and looked at meanwhile: fuser does
//! not tell that one was interrupted, so its signals are read from /proc, and one that cannot be seen there (of another namespace of processes) is sent back with EINTR once in a while.

use crate::attributes::Version;
use crate::locks::{END, Owner, WAITS};
use crate::mount::{Gate, Mount};
use crate::nodes::Node;
use crate::staged::Staged;
use forebay_common::{ErrorKind, Result, err};
use forebay_proto::FileLock;
use fuser::Request;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long one question waits at the master.
const ASK: Duration = Duration::from_secs(3);
/// Between two looks at the caller.
const LOOK: Duration = Duration::from_millis(100);
/// How long a caller waits of whom nothing can be seen.
const UNSEEN_WAITS: Duration = Duration::from_secs(10);
/// A master that has just ended a session is asked again under a new one.
const TRIES: u32 = 3;

/// What a program asks for.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    pub owner: Owner,
    pub handle: u64,
    pub start: u64,
    pub end: u64,
    pub exclusive: bool,
    pub process: u32,
    /// Who is held up, by the number of its thread; 0: it is not seen from here.
    pub thread: u32,
}

/// How it went.
pub enum Locked {
    /// And the request is still being worked on.
    Yes(Arc<()>),
    InTheWay,
    /// The caller has a signal to look after.
    Interrupted,
    /// The mount changes hands: the kernel asks again.
    Left,
}

/// Whether a request for a lock is flock(2)'s. fuser does not say (0.18.0 keeps `lk_flags` to itself).
pub fn is_flock(request: &Request) -> bool {
    // linux/fuse.h: fuse_in_header, then fuse_lk_in.
    const HEADER_BYTES: usize = 40;
    const FLAGS_AT: usize = HEADER_BYTES + 40;
    const FUSE_LK_FLOCK: u32 = 1;
    let at = std::ptr::from_ref(request).cast::<u8>();
    // SAFETY: fuser, whose version is fixed, hands out the header in the buffer that it read the whole request to; the kernel's own length says what is there.
    #[allow(unsafe_code, reason = "what lies behind the header")]
    unsafe {
        let length = at.cast::<u32>().read_unaligned() as usize;
        length >= FLAGS_AT + 4 && at.add(FLAGS_AT).cast::<u32>().read_unaligned() & FUSE_LK_FLOCK != 0
    }
}

/// Whether a thread has a signal to look after, or is gone: its own or its process's, and not held back.
fn is_called(thread: u32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{thread}/status")) else { return true };
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
    };
    (mask("SigPnd:") | mask("ShdPnd:")) & !mask("SigBlk:") != 0
}

impl Mount {
    /// The id by which others know a file.
    async fn lasting_id(&self, node: &Node) -> Result<u64> {
        let opened = node.opened.lock().await;
        if let Some(staged) = opened.staged.as_ref().filter(|staged| staged.is_new()) {
            self.hand_over(node, staged).await?;
        }
        Ok(node.status().file_id)
    }

    fn lock_of(asked: &Asked, session_id: u64) -> FileLock {
        let Asked { owner, start, end, exclusive, process, .. } = *asked;
        FileLock { session_id, owner: owner.owner, whole: owner.whole, start, end: end.min(END), exclusive, process }
    }

    /// Who is in the way of a lock.
    pub async fn test_lock(&self, asked: &Asked) -> Result<Option<FileLock>> {
        let file_id = self.lasting_id(&*self.nodes.get(asked.owner.node)?).await?;
        let session = self.locks.session(&self.fs).await?;
        let found = self.fs.test_lock(file_id, &Self::lock_of(asked, session), Duration::ZERO).await?;
        // A process of another machine has no number here.
        Ok(found.map(|lock| FileLock { process: if lock.session_id == session { lock.process } else { 0 }, ..lock }))
    }

    /// Takes a lock; waits for it where asked. `hands`: through how many the mount had gone when the request was taken up.
    pub async fn lock(&self, asked: &Asked, waits: bool, hands: u64) -> Result<Locked> {
        let began = (Instant::now(), hands);
        let mut ended = 0;
        loop {
            let Some(under_way) = self.enter(hands).await else { return Ok(Locked::Left) };
            let node = self.nodes.get(asked.owner.node)?;
            let file_id = self.lasting_id(&node).await?;
            let session = self.locks.session(&self.fs).await?;
            let lock = Self::lock_of(asked, session);
            let turn = self.locks.turn(asked.owner).await;
            match self.fs.set_lock(file_id, &lock, false).await {
                Ok(None) => {
                    self.locks.took(asked.owner, file_id, asked.handle);
                    if let Err(e) = self.refresh(&node).await {
                        let _ = self.locks.give_back(&self.fs, asked.owner, None).await;
                        return Err(e);
                    }
                    return Ok(Locked::Yes(under_way));
                }
                Ok(Some(_)) if !waits => return Ok(Locked::InTheWay),
                Ok(Some(_)) => {}
                Err(e) if e.kind() == ErrorKind::Expired && ended < TRIES => {
                    ended += 1;
                    self.lose(self.locks.over(session)).await;
                    continue;
                }
                Err(e) => return Err(e),
            }
            WAITS.inc();
            // Nothing is held up meanwhile: the mount may change hands.
            drop((turn, under_way));
            if let Some(left) = self.wait_for(file_id, &lock, asked, began).await? {
                return Ok(left);
            }
        }
    }

    /// Waits until a lock may be there to be taken; or says why no more is waited.
    async fn wait_for(&self, file_id: u64, lock: &FileLock, asked: &Asked, began: (Instant, u64)) -> Result<Option<Locked>> {
        let free = self.fs.test_lock(file_id, lock, ASK);
        tokio::pin!(free);
        loop {
            tokio::select! {
                // What the master cannot say now it is asked again, when it is.
                found = &mut free => return found.map(|_| None),
                () = tokio::time::sleep(LOOK) => {}
            }
            if self.hands.load(Ordering::SeqCst) != began.1 {
                return Ok(Some(Locked::Left));
            }
            let called = match asked.thread {
                0 => began.0.elapsed() > UNSEEN_WAITS,
                thread => is_called(thread),
            };
            if called {
                return Ok(Some(Locked::Interrupted));
            }
        }
    }

    /// A request goes on after it waited; `None`: the mount has changed hands since.
    async fn enter(&self, hands: u64) -> Option<Arc<()>> {
        loop {
            {
                let gate = self.gate.read().unwrap_or_else(|e| e.into_inner());
                if self.hands.load(Ordering::SeqCst) != hands || *gate == Gate::Moved {
                    return None;
                }
                if *gate == Gate::Open {
                    return Some(self.under_way());
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Gives a lock, or a part of one, back; what was written under it is there by then.
    pub async fn unlock(&self, asked: &Asked) -> Result<()> {
        let Some(file_id) = self.locks.held(asked.owner) else { return Ok(()) };
        let handed = self.hand_over_locked(asked.owner.node).await;
        let _turn = self.locks.turn(asked.owner).await;
        let whole = asked.start == 0 && asked.end >= END;
        let given = if whole {
            self.locks.give_back(&self.fs, asked.owner, None).await
        } else {
            let session = self.locks.session(&self.fs).await?;
            match self.fs.set_lock(file_id, &Self::lock_of(asked, session), true).await {
                Err(e) if e.kind() == ErrorKind::Expired => {
                    self.lose(self.locks.over(session)).await;
                    Ok(())
                }
                other => other.map(drop),
            }
        };
        handed.and(given)
    }

    async fn hand_over_locked(&self, node: u64) -> Result<()> {
        let Ok(node) = self.nodes.get(node) else { return Ok(()) };
        let opened = node.opened.lock().await;
        match &opened.staged {
            Some(staged) => self.hand_over(&node, staged).await,
            None => Ok(()),
        }
    }

    /// `close`: a process's locks of a file go with the first descriptor of it that it closes. Called after what was written was handed over.
    pub async fn closed(&self, owner: Owner) {
        let _turn = self.locks.turn(owner).await;
        // What could not be given back is tried on.
        let _ = self.locks.give_back(&self.fs, owner, None).await;
    }

    /// The last close of a handle: whatever was locked by it.
    pub async fn released(&self, handle: u64) {
        for owner in self.locks.held_by(handle) {
            let _turn = self.locks.turn(owner).await;
            let _ = self.locks.give_back(&self.fs, owner, Some(handle)).await;
        }
    }

    /// What is open of a file and was not changed here becomes what the namespace has.
    async fn refresh(&self, node: &Arc<Node>) -> Result<()> {
        if node.is_gone() {
            return Ok(());
        }
        let mut opened = node.opened.lock().await;
        let known = match &opened.staged {
            Some(staged) if staged.is_dirty() => return Ok(()),
            Some(staged) => staged.version(),
            None if opened.readers > 0 => Some(opened.version),
            None => return Ok(()),
        };
        let status = self.status_of(node).await?;
        // Another file is under its name by now: this one is as it was.
        if known == Some(Version::of(&status)) || status.file_id != node.status().file_id {
            return Ok(());
        }
        let reader = self.reader_of(node).await?;
        let fresh = Staged::load(&self.config.staging_dir, &reader, u64::MAX).await?;
        match &opened.staged {
            Some(staged) => staged.become_like(&fresh).await?,
            // Who reads it through this process reads on, in what it is now.
            None => opened.staged = Some(Arc::new(fresh)),
        }
        opened.cached = None;
        node.set_status(reader.status().clone());
        node.note_use(&opened);
        drop(opened);
        self.forget_content(node.id);
        Ok(())
    }

    /// Whether something may be handed over: what was written under a lock only while that is held. Errors: `Expired` when it is not any more.
    pub async fn check_locks(&self, node: &Node, staged: &Staged) -> Result<()> {
        if self.locks.is_unsure(node.id) {
            self.lose(self.locks.renew(&self.fs).await?).await;
        }
        match staged.is_lost() {
            true => {
                Err(err!(Expired, "the lock under which this was written was given to others: the master had not heard of this mount for too long"))
            }
            false => Ok(()),
        }
    }

    /// What is open for writing of files whose locks are lost is not handed over any more.
    async fn lose(&self, nodes: Vec<u64>) {
        for node in nodes {
            if let Ok(node) = self.nodes.get(node)
                && let crate::nodes::Use::Staged(staged) = node.in_use()
            {
                staged.lose();
            }
        }
    }

    /// Renews the session for as long as the mount lives.
    pub async fn keep_locks(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.locks.rest()).await;
            match self.locks.renew(&self.fs).await {
                Ok(lost) => self.lose(lost).await,
                Err(e) => tracing::warn!(error = %e, "the locks of this mount were not renewed; it is tried again"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_called_by_what_it_does_not_hold_back() {
        use nix::sys::signal::{SigSet, Signal};
        let thread = u32::try_from(nix::unistd::gettid().as_raw()).unwrap();
        assert!(!is_called(thread));
        let mut held = SigSet::empty();
        held.add(Signal::SIGUSR2);
        held.thread_block().unwrap();
        nix::sys::signal::raise(Signal::SIGUSR2).unwrap();
        assert!(!is_called(thread), "it holds that one back");
        assert_eq!(held.wait().unwrap(), Signal::SIGUSR2);
        assert!(is_called(u32::MAX - 1), "nobody is there");
    }
}
