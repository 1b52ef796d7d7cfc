//! `Locks`: this mount's session with the master, and which locks of files it holds for programs here.
//!
//! Used by `locking`. The session begins with the first lock, is renewed every third of its time, and ends with the mount. Invariants: what a program holds is in `held` until the master has it
//! given back, or is `owed` to it; a lock of which it is not sure that the master still has it (no answer for the session's time) lets nothing be handed over to the namespace before the master says so; of
//! a session that the master has ended everything is lost, and what was written under it stays here.

use forebay_client::FileSystem;
use forebay_common::{ErrorKind, Result, counter, gauge};
use forebay_proto::{FileLock, mount as wire};
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

gauge!(HELD, "forebay_fuse_locks", "owners that hold locks of a file through this mount");
counter!(LOST, "forebay_fuse_locks_lost_total", "locks that were given to others because the master did not hear of this mount for too long");
counter!(pub WAITS, "forebay_fuse_lock_waits_total", "locks that were waited for");

/// The last byte of a file, however long it gets.
pub const END: u64 = i64::MAX as u64;
/// Between two tries of a session that the master does not renew.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Who holds: an owner as the kernel numbers them, of either kind of locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    pub node: u64,
    pub owner: u64,
    /// flock(2).
    pub whole: bool,
}

#[derive(Clone, Copy)]
struct Held {
    file_id: u64,
    /// By which it was taken last.
    handle: u64,
}

#[derive(Clone, Copy)]
struct Session {
    id: u64,
    ttl: Duration,
    /// By this process's clock, counted from when the master was asked.
    sure_until: Instant,
}

#[derive(Default)]
struct Inner {
    session: Option<Session>,
    held: HashMap<Owner, Held>,
    /// What the master could not be told yet.
    owed: Vec<(u64, FileLock)>,
    /// A session has ended, and what was written under it is not marked yet.
    ending: bool,
}

/// Owners of which one at a time has the master asked, together.
const LINES: usize = 32;

#[derive(Default)]
pub struct Locks {
    inner: Mutex<Inner>,
    /// One begins it.
    beginning: tokio::sync::Mutex<()>,
    lines: [tokio::sync::Mutex<()>; LINES],
}

/// All that an owner has of a file.
fn all_of(owner: Owner, session_id: u64) -> FileLock {
    FileLock { session_id, owner: owner.owner, whole: owner.whole, start: 0, end: END, ..FileLock::default() }
}

/// Says where the locks are held, to people.
fn holder() -> String {
    let host = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    format!("{host}, process {}", std::process::id())
}

impl Locks {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The session's number, which begins with this.
    pub async fn session(&self, fs: &FileSystem) -> Result<u64> {
        let there = || self.lock().session.map(|session| session.id);
        if let Some(id) = there() {
            return Ok(id);
        }
        let _one = self.beginning.lock().await;
        if let Some(id) = there() {
            return Ok(id);
        }
        let id = rand::random::<u64>() | 1;
        let asked = Instant::now();
        let ttl = fs.hold_locks(id, &holder(), true).await?;
        self.lock().session = Some(Session { id, ttl, sure_until: asked + ttl });
        Ok(id)
    }

    /// An owner's turn: what it takes and what it gives back are told one after the other. The kernel numbers a new open file as one that was just closed, and tells the
    /// end of that one at its leisure: what the one takes must not go with the other.
    pub async fn turn(&self, owner: u64) -> tokio::sync::MutexGuard<'_, ()> {
        self.lines[owner as usize % LINES].lock().await
    }

    /// Which file an owner holds locks of.
    pub fn held(&self, owner: Owner) -> Option<u64> {
        self.lock().held.get(&owner).map(|held| held.file_id)
    }

    /// Owners that took locks by a handle.
    pub fn held_by(&self, handle: u64) -> Vec<Owner> {
        let inner = self.lock();
        if inner.held.is_empty() {
            return Vec::new();
        }
        inner.held.iter().filter(|(_, held)| held.handle == handle).map(|(owner, _)| *owner).collect()
    }

    /// Whether anybody here holds a lock of a file.
    pub fn is_locked(&self, file_id: u64) -> bool {
        let inner = self.lock();
        !inner.held.is_empty() && inner.held.values().any(|held| held.file_id == file_id)
    }

    /// It was taken, or may have been. `false`: the session under which it was is over.
    pub fn took(&self, session: u64, owner: Owner, file_id: u64, handle: u64) -> bool {
        let mut inner = self.lock();
        if inner.session.is_none_or(|now| now.id != session) {
            return false;
        }
        inner.held.insert(owner, Held { file_id, handle });
        // What an earlier owner of this number owes is this one's now, and given back with it.
        inner.owed.retain(|(file, lock)| *file != file_id || (lock.owner, lock.whole) != (owner.owner, owner.whole));
        HELD.set(inner.held.len() as i64);
        true
    }

    /// Has an owner give back what it has, here and at the master; by the end of a `handle` only what it took last by that one. It has its turn.
    pub async fn give_back(&self, fs: &FileSystem, owner: Owner, handle: Option<u64>) -> Result<()> {
        let (file_id, session) = {
            let mut inner = self.lock();
            if inner.held.get(&owner).is_some_and(|held| handle.is_some_and(|handle| handle != held.handle)) {
                return Ok(());
            }
            let held = inner.held.remove(&owner);
            HELD.set(inner.held.len() as i64);
            let (Some(held), Some(session)) = (held, inner.session) else { return Ok(()) };
            // Of the same file under another number: it is one lock to the master.
            let same = |(other, also): (&Owner, &Held)| (other.owner, other.whole, also.file_id) == (owner.owner, owner.whole, held.file_id);
            if inner.held.iter().any(same) {
                return Ok(());
            }
            (held.file_id, session.id)
        };
        let lock = all_of(owner, session);
        match fs.set_lock(file_id, &lock, true).await {
            Err(e) if e.kind() == ErrorKind::Expired => {}
            Err(e) => {
                tracing::warn!(error = %e, "a lock was not given back yet; it is tried on");
                self.lock().owed.push((file_id, lock));
                return Err(e);
            }
            Ok(_) => {}
        }
        Ok(())
    }

    /// Whether a file is locked by a session that may be over. Cheap where nothing is locked.
    pub fn is_unsure(&self, file_id: u64) -> bool {
        let inner = self.lock();
        inner.ending
            || (inner.session.is_some_and(|session| Instant::now() > session.sure_until) && inner.held.values().any(|held| held.file_id == file_id))
    }

    /// Has the master say that the session goes on; `false`: it is over, and so are its locks, until `marked` of what was written under them.
    pub async fn renew(&self, fs: &FileSystem) -> Result<bool> {
        let Some(session) = self.lock().session else { return Ok(true) };
        let asked = Instant::now();
        match fs.hold_locks(session.id, &holder(), false).await {
            Ok(ttl) => {
                if let Some(now) = self.lock().session.as_mut().filter(|now| now.id == session.id) {
                    (now.ttl, now.sure_until) = (ttl, asked + ttl);
                }
                Ok(true)
            }
            Err(e) if e.kind() == ErrorKind::Expired => {
                let mut inner = self.lock();
                inner.ending |= inner.session.is_some_and(|now| now.id == session.id);
                Ok(!inner.ending)
            }
            Err(e) => Err(e),
        }
    }

    /// Files of which something is locked.
    pub fn files(&self) -> HashSet<u64> {
        self.lock().held.values().map(|held| held.file_id).collect()
    }

    /// What was written under a session that is over is marked: the next lock begins a new one.
    pub fn marked(&self) {
        let mut inner = self.lock();
        if !inner.ending {
            return;
        }
        let lost = inner.held.len();
        *inner = Inner::default();
        HELD.set(0);
        LOST.inc_by(lost as u64);
        if lost > 0 {
            tracing::error!(
                lost,
                "the master did not hear of this mount for too long and has given its locks to others: what was written under them fails"
            );
        }
    }

    /// Gives back what the master could not be told of before, one after the other, each in its owner's turn.
    pub async fn settle(&self, fs: &FileSystem) {
        let owed = self.lock().owed.clone();
        for (file_id, lock) in owed {
            let _turn = self.turn(lock.owner).await;
            let still = |inner: &Inner| inner.owed.iter().position(|(file, other)| *file == file_id && *other == lock);
            if still(&self.lock()).is_none() || fs.set_lock(file_id, &lock, true).await.is_err_and(|e| e.kind() != ErrorKind::Expired) {
                continue;
            }
            let mut inner = self.lock();
            if let Some(at) = still(&inner) {
                inner.owed.remove(at);
            }
        }
    }

    /// How long until it is to be renewed.
    pub fn rest(&self) -> Duration {
        let Some(session) = self.lock().session else { return TRY_AGAIN };
        let left = session.sure_until.saturating_duration_since(Instant::now());
        left.saturating_sub(session.ttl * 2 / 3).max(TRY_AGAIN.min(session.ttl / 3))
    }

    /// How long an answer to `renew` is waited for: there is to be time for another try.
    pub fn patience(&self) -> Duration {
        self.lock().session.map_or(TRY_AGAIN, |session| (session.ttl / 3).max(TRY_AGAIN))
    }

    /// The mount is over.
    pub async fn end(&self, fs: &FileSystem) {
        let Some(session) = self.lock().session.take() else { return };
        if let Err(e) = fs.end_locks(session.id).await {
            tracing::warn!(error = %e, "the mount's locks stay until the master misses it");
        }
    }

    /// What another process needs to go on with them.
    pub fn save(&self) -> (u64, Vec<wire::Lock>) {
        let inner = self.lock();
        let session = inner.session.map_or(0, |session| session.id);
        let saved = |(owner, held): (&Owner, &Held)| wire::Lock {
            file_id: held.file_id,
            node: owner.node,
            handle: held.handle,
            lock: Some(all_of(*owner, session)),
            owed: false,
        };
        let owed = inner.owed.iter().map(|(file_id, lock)| wire::Lock { file_id: *file_id, node: 0, handle: 0, lock: Some(*lock), owed: true });
        (session, inner.held.iter().map(saved).chain(owed).collect())
    }

    /// Those of another process. The master has to say first that they are held on.
    pub fn taken_over(session: u64, locks: &[wire::Lock]) -> Locks {
        let restored = Locks::default();
        if session > 0 {
            let mut inner = restored.lock();
            inner.session = Some(Session { id: session, ttl: TRY_AGAIN, sure_until: Instant::now() });
            for lock in locks {
                let of = lock.lock.unwrap_or_default();
                if lock.owed {
                    inner.owed.push((lock.file_id, of));
                    continue;
                }
                let owner = Owner { node: lock.node, owner: of.owner, whole: of.whole };
                inner.held.insert(owner, Held { file_id: lock.file_id, handle: lock.handle });
            }
            HELD.set(inner.held.len() as i64);
        }
        restored
    }
}
