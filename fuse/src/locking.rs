//! flock(2) and fcntl(2) between machines. The fourth part of `Mount`.
//!
//! The way: a file that is only made here gets its lasting id (handed over) → the master takes the lock, or names who is in the way → what is open of the file becomes what the namespace
//! has now, with what was changed here laid over it, for a program opens before it locks → the program works → what it wrote is handed over, over the content that it is based on and no
//! other (`CreateOptions::only_content`; a newer one, by the holder of another range, is taken first, and what was written here laid over it) → the lock is given back: so whoever gets it next finds that. A file that the kernel reads by
//! itself stays as it was opened. A caller that waits is asked of the master every few seconds, and looked at meanwhile: fuser does not tell that one was interrupted, so its signals are
//! read from /proc. One that cannot be seen there (of another namespace of processes) is not interrupted: EINTR for somebody without a signal reaches programs as error 512.

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
use std::time::Duration;

/// How long one question waits at the master.
const ASK: Duration = Duration::from_secs(3);
/// Between two looks at the caller.
const LOOK: Duration = Duration::from_millis(100);
/// Between two tries to give back what could not be given back.
const SETTLE: Duration = Duration::from_secs(1);
/// How often, and after what time, what was written is handed over again before the lock of a file that is closed is given back all the same.
const CLOSE_TRIES: u32 = 5;
const CLOSE_AGAIN: Duration = Duration::from_secs(1);
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

/// What a thread that waits has been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Called {
    No,
    /// Its process was, and the kernel has picked a thread: this one, where the signal is still there at the next look.
    Perhaps,
    Yes,
}

/// Whether a thread has a signal to look after that it does not hold back, or is gone.
fn called(thread: u32) -> Called {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{thread}/status")) else { return Called::Yes };
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim).unwrap_or_default();
    let mask = |name: &str| u64::from_str_radix(field(name), 16).unwrap_or(0);
    let blocked = mask("SigBlk:");
    if mask("SigPnd:") & !blocked != 0 {
        return Called::Yes;
    }
    match mask("ShdPnd:") & !blocked != 0 {
        true if field("Threads:") == "1" => Called::Yes,
        // The kernel prefers the first thread of a process.
        true if field("Tgid:") == field("Pid:") => Called::Perhaps,
        _ => Called::No,
    }
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
        self.fs.test_lock(file_id, &Self::lock_of(asked, session), Duration::ZERO).await
    }

    /// Takes a lock; waits for it where asked. `hands`: through how many the mount had gone when the request was taken up.
    pub async fn lock(&self, asked: &Asked, waits: bool, hands: u64) -> Result<Locked> {
        let mut ended = 0;
        loop {
            let Some(under_way) = self.enter(hands).await else { return Ok(Locked::Left) };
            let node = self.nodes.get(asked.owner.node)?;
            let file_id = self.lasting_id(&node).await?;
            let session = self.locks.session(&self.fs).await?;
            let lock = Self::lock_of(asked, session);
            let turn = self.locks.turn(asked.owner.owner).await;
            let had = self.locks.held(asked.owner).is_some();
            match self.fs.set_lock(file_id, &lock, false).await {
                Ok(None) if self.locks.took(session, asked.owner, file_id, asked.handle) => {
                    match self.refresh(&node).await {
                        Ok(()) => return Ok(Locked::Yes(under_way)),
                        Err(e) => {
                            // What it had before goes on; of a range this one alone is given back.
                            if !asked.owner.whole {
                                let _ = self.fs.set_lock(file_id, &lock, true).await;
                            } else if !had {
                                let _ = self.locks.give_back(&self.fs, asked.owner, None).await;
                                self.note_unlocked(file_id);
                            }
                            return Err(e);
                        }
                    }
                }
                Ok(Some(_)) if !waits => return Ok(Locked::InTheWay),
                Ok(Some(_)) => ended = 0,
                // Taken under a session that is over by now, or there is none any more by the master's own word.
                Ok(None) => ended += 1,
                Err(e) if e.kind() == ErrorKind::Expired && ended < TRIES => {
                    ended += 1;
                    self.renew_locks().await?;
                    continue;
                }
                Err(e) => {
                    // It may have been taken: the close of the file gives it back.
                    if e.is_retryable() || e.kind() == ErrorKind::Timeout {
                        self.locks.took(session, asked.owner, file_id, asked.handle);
                    }
                    return Err(e);
                }
            }
            if ended > 0 {
                if ended > TRIES {
                    return Err(err!(Unavailable, "the master ends the locks of this mount again and again"));
                }
                continue;
            }
            // A shared lock of the whole file is let go for an exclusive one, as flock(2) does: two that want that would wait for each other.
            if asked.owner.whole && had {
                self.hand_over_file(file_id).await?;
                self.locks.give_back(&self.fs, asked.owner, None).await?;
            }
            WAITS.inc();
            // Nothing is held up meanwhile: the mount may change hands.
            drop((turn, under_way));
            if let Some(left) = self.wait_for(file_id, &lock, asked, hands).await? {
                return Ok(left);
            }
        }
    }

    /// Waits until a lock may be there to be taken; or says why no more is waited.
    async fn wait_for(&self, file_id: u64, lock: &FileLock, asked: &Asked, hands: u64) -> Result<Option<Locked>> {
        let free = self.fs.test_lock(file_id, lock, ASK);
        tokio::pin!(free);
        let mut before = Called::No;
        loop {
            tokio::select! {
                // What the master cannot say now it is asked again, when it is.
                found = &mut free => return found.map(|_| None),
                () = tokio::time::sleep(LOOK) => {}
            }
            if self.hands.load(Ordering::SeqCst) != hands {
                return Ok(Some(Locked::Left));
            }
            let now = if asked.thread == 0 { Called::No } else { called(asked.thread) };
            if now == Called::Yes || (now, before) == (Called::Perhaps, Called::Perhaps) {
                return Ok(Some(Locked::Interrupted));
            }
            before = now;
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

    /// Gives a lock, or a part of one, back; what was written under it is there by then. Errors: it is not, and the lock is held on.
    pub async fn unlock(&self, asked: &Asked) -> Result<()> {
        let Some(file_id) = self.locks.held(asked.owner) else { return Ok(()) };
        self.hand_over_file(file_id).await?;
        let _turn = self.locks.turn(asked.owner.owner).await;
        if asked.start == 0 && asked.end >= END {
            self.locks.give_back(&self.fs, asked.owner, None).await?;
            self.note_unlocked(file_id);
            return Ok(());
        }
        let session = self.locks.session(&self.fs).await?;
        match self.fs.set_lock(file_id, &Self::lock_of(asked, session), true).await {
            Err(e) if e.kind() == ErrorKind::Expired => self.renew_locks().await,
            other => other.map(drop),
        }
    }

    /// What was written here of a file, under whatever number.
    async fn hand_over_file(&self, file_id: u64) -> Result<()> {
        for node in self.nodes.written_of(file_id) {
            let opened = node.opened.lock().await;
            if let Some(staged) = &opened.staged {
                self.hand_over(&node, staged).await?;
            }
        }
        Ok(())
    }

    /// The same for the last time: what cannot be handed over by then is lost.
    async fn hand_over_closed(&self, file_id: u64) -> Result<()> {
        for _ in 1..CLOSE_TRIES {
            match self.hand_over_file(file_id).await {
                Err(e) if e.is_retryable() => tokio::time::sleep(CLOSE_AGAIN).await,
                _ => break,
            }
        }
        let handed = self.hand_over_file(file_id).await;
        if handed.is_err() {
            self.lose(file_id);
        }
        handed
    }

    /// Nothing of a file is locked here any more: it is handed over like others again.
    fn note_unlocked(&self, file_id: u64) {
        if !self.locks.is_locked(file_id) {
            self.nodes
                .written_of(file_id)
                .iter()
                .filter_map(|node| node.staged())
                .filter(|staged| !staged.is_dirty())
                .for_each(|staged| staged.set_locked(false));
        }
    }

    /// `close`: a process's locks of a file go with the first descriptor of it that it closes. What was written and cannot be handed over is lost by that.
    pub async fn closed(&self, owner: Owner) -> Result<()> {
        let Some(file_id) = self.locks.held(owner) else { return Ok(()) };
        let handed = self.hand_over_closed(file_id).await;
        let _turn = self.locks.turn(owner.owner).await;
        // What could not be given back is tried on.
        let _ = self.locks.give_back(&self.fs, owner, None).await;
        self.note_unlocked(file_id);
        handed
    }

    /// The last close of a handle: whatever was locked by it.
    pub async fn released(&self, handle: u64) {
        for owner in self.locks.held_by(handle) {
            let Some(file_id) = self.locks.held(owner) else { continue };
            if let Err(e) = self.hand_over_closed(file_id).await {
                tracing::error!(error = %e, "what was written under a lock could not be handed over before it is given back: it is lost");
            }
            let _turn = self.locks.turn(owner.owner).await;
            let _ = self.locks.give_back(&self.fs, owner, Some(handle)).await;
            self.note_unlocked(file_id);
        }
    }

    /// What is open of a file becomes what the namespace has, but for what was changed here.
    async fn refresh(&self, node: &Arc<Node>) -> Result<()> {
        if node.is_gone() {
            return Ok(());
        }
        let mut opened = node.opened.lock().await;
        let known = match &opened.staged {
            Some(staged) => {
                staged.set_locked(true);
                staged.base()
            }
            None if opened.readers > 0 => Some(opened.version),
            None => return Ok(()),
        };
        let status = match self.status_of(node).await {
            // Deleted by somebody else: it is what it was.
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        // Another file is under its name by now: this one is as it was.
        if known == Some(Version::of(&status)) || status.file_id != node.status().file_id {
            return Ok(());
        }
        let fresh = self.fresh(node).await?;
        match &opened.staged {
            Some(staged) => staged.rebase(&fresh).await?,
            // Who reads it through this process reads on, in what it is now.
            None => {
                fresh.set_locked(true);
                opened.staged = Some(Arc::new(fresh));
            }
        }
        opened.cached = None;
        node.note_use(&opened);
        let staged = opened.staged.clone();
        drop(opened);
        if let Some(staged) = staged {
            self.forget_content(node.id, &staged);
        }
        Ok(())
    }

    /// What the namespace has of a file now. The node is told of it.
    pub async fn fresh(&self, node: &Node) -> Result<Staged> {
        let reader = self.reader_of(node).await?;
        if reader.status().file_id != node.status().file_id {
            return Err(err!(FileChanged, "another file has the name of the one that is open here"));
        }
        let fresh = Staged::load(&self.config.staging_dir, &reader, u64::MAX).await?;
        node.set_status(reader.status().clone());
        Ok(fresh)
    }

    /// Takes a newer content, by the holder of another lock of the file, under what was written here. Errors: there is none, or no lock is held that would let it.
    pub async fn take_newer(&self, node: &Node, staged: &Staged) -> Result<()> {
        if !self.locks.is_locked(node.status().file_id) {
            return Err(err!(
                FileChanged,
                "this file was changed by somebody else, and the lock under which it was written here is not held any more"
            ));
        }
        staged.rebase(&self.fresh(node).await?).await
    }

    /// Whether something may be handed over: what was written under a lock only while that is held. Errors: `Expired` when it is not any more.
    pub async fn check_locks(&self, node: &Node, staged: &Staged) -> Result<()> {
        let file_id = node.status().file_id;
        if self.locks.is_unsure(file_id) {
            self.renew_locks().await?;
        }
        if self.locks.is_locked(file_id) {
            staged.set_locked(true);
        }
        match staged.is_lost() {
            true => {
                Err(err!(Expired, "the lock under which this was written was given to others: the master had not heard of this mount for too long"))
            }
            false => Ok(()),
        }
    }

    /// What was written of a file and not handed over is not any more.
    fn lose(&self, file_id: u64) {
        self.nodes.written_of(file_id).iter().filter_map(|node| node.staged()).filter(|staged| staged.is_dirty()).for_each(|staged| staged.lose());
    }

    /// Asks the master whether the session goes on, and draws the consequences.
    async fn renew_locks(&self) -> Result<()> {
        if !self.locks.renew(&self.fs).await? {
            self.locks.files().into_iter().for_each(|file_id| self.lose(file_id));
            self.locks.marked();
        }
        Ok(())
    }

    /// Renews the session for as long as the mount lives.
    pub async fn keep_locks(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.locks.rest()).await;
            match tokio::time::timeout(self.locks.patience(), self.renew_locks()).await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => tracing::warn!(error = %e, "the locks of this mount were not renewed; it is tried again"),
                Err(_) => tracing::warn!("the master has not answered whether the locks of this mount are held on; it is asked again"),
            }
        }
    }

    /// Tells the master what it could not be told, for as long as the mount lives.
    pub async fn settle_locks(self: Arc<Self>) {
        loop {
            tokio::time::sleep(SETTLE).await;
            self.locks.settle(&self.fs).await;
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
        assert_eq!(called(thread), Called::No);
        let mut held = SigSet::empty();
        held.add(Signal::SIGUSR2);
        held.thread_block().unwrap();
        nix::sys::signal::raise(Signal::SIGUSR2).unwrap();
        assert_eq!(called(thread), Called::No, "it holds that one back");
        assert_eq!(held.wait().unwrap(), Signal::SIGUSR2);
        assert_eq!(called(u32::MAX - 1), Called::Yes, "nobody is there");
    }
}
