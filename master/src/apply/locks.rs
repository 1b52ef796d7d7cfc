//! Locks of files between machines, as flock(2) and fcntl(2) have them. Advisory: nobody but whoever asks for one is held up by them.
//!
//! A session (one mount) holds them as long as it is renewed, under the owners that its kernel numbers. They are of the file's id, whatever its names are, and
//! stay where the file is deleted under its holder. Invariants: two locks of one file that touch the same byte are shared, of one owner, or of the two kinds that do
//! not see each other; of one owner and kind no two touch; a session has an index row for each file it holds locks of, and no other; a session that is over holds none.

use super::context::Context;
use crate::namespace::{READ, WRITE, check};
use crate::store::{Cf, Reader, id_key, locked_key};
use forebay_common::limits::{LOCK_SESSIONS_MAX, LOCKED_FILES_MAX, LOCKS_ENDED_AT_ONCE, LOCKS_PER_FILE_MAX};
use forebay_common::{InodeId, Result, err};
use forebay_proto::FileLock;
use forebay_proto::journal::{EndLocks, HoldLocks, SetLock};
use forebay_proto::store::{FileLocks, LockSession};

/// Times that a session may ask for.
const TTL_RANGE_MS: std::ops::RangeInclusive<u64> = 1_000..=3_600_000;
/// Of what a session says of itself.
const HOLDER_MAX_BYTES: usize = 256;

fn same_owner(a: &FileLock, b: &FileLock) -> bool {
    (a.session_id, a.owner, a.whole) == (b.session_id, b.owner, b.whole)
}

fn touch(a: &FileLock, b: &FileLock) -> bool {
    a.start <= b.end && b.start <= a.end
}

/// The first lock that `wanted` cannot be beside.
pub fn conflict<'a>(locks: &'a [FileLock], wanted: &FileLock) -> Option<&'a FileLock> {
    locks.iter().find(|l| l.whole == wanted.whole && !same_owner(l, wanted) && touch(l, wanted) && (l.exclusive || wanted.exclusive))
}

/// What its owner holds after `wanted` was taken, or given back: parts of older locks outside of it stay, and what belongs together is one.
fn replaced(locks: Vec<FileLock>, wanted: &FileLock, unlock: bool) -> Vec<FileLock> {
    let mut out = Vec::with_capacity(locks.len() + 2);
    let mut whole = *wanted;
    for lock in locks {
        let theirs = !same_owner(&lock, wanted);
        let beside = !touch(&lock, wanted);
        let joins = !unlock
            && !theirs
            && lock.exclusive == wanted.exclusive
            && lock.start <= wanted.end.saturating_add(1)
            && wanted.start <= lock.end.saturating_add(1);
        if joins {
            (whole.start, whole.end) = (whole.start.min(lock.start), whole.end.max(lock.end));
        } else if theirs || beside {
            out.push(lock);
        } else {
            if lock.start < wanted.start {
                out.push(FileLock { end: wanted.start - 1, ..lock });
            }
            if lock.end > wanted.end {
                out.push(FileLock { start: wanted.end + 1, ..lock });
            }
        }
    }
    if !unlock {
        out.push(whole);
    }
    out
}

fn session(c: &Context<'_, '_>, id: u64) -> Result<LockSession> {
    let found = c.txn.lock_session(id)?;
    let found = found.ok_or_else(|| err!(Expired, "the locks of this mount are over: it was silent for too long"))?;
    if !c.who.superuser && found.principal != c.who.user {
        return Err(err!(PermissionDenied, "these locks are of user {}", found.principal));
    }
    Ok(found)
}

pub fn hold(c: &mut Context<'_, '_>, op: &HoldLocks) -> Result<()> {
    if op.session_id == 0 || !TTL_RANGE_MS.contains(&op.ttl_ms) || op.holder.len() > HOLDER_MAX_BYTES {
        return Err(err!(
            InvalidArgument,
            "locks are held under a number, for a second to an hour at a time, by somebody of at most {HOLDER_MAX_BYTES} bytes"
        ));
    }
    let mut held = match session(c, op.session_id) {
        Ok(held) if held.ending => return Err(err!(Expired, "the locks of this mount are over: it was silent for too long")),
        Ok(held) => held,
        Err(e) if op.begin && e.kind() == forebay_common::ErrorKind::Expired => {
            if c.counters.lock_sessions >= LOCK_SESSIONS_MAX {
                return Err(err!(LimitExceeded, "{LOCK_SESSIONS_MAX} mounts hold locks, which is the limit").with_retryable(false));
            }
            c.counters.lock_sessions += 1;
            LockSession { id: op.session_id, principal: c.who.user.clone(), holder: op.holder.clone(), ..LockSession::default() }
        }
        Err(e) => return Err(e),
    };
    (held.ttl_ms, held.expires_at_ms) = (op.ttl_ms, c.now_ms().saturating_add(op.ttl_ms));
    c.txn.put(Cf::LockSession, &id_key(held.id), &held);
    Ok(())
}

fn put(c: &mut Context<'_, '_>, file: u64, locks: Vec<FileLock>) {
    match locks.is_empty() {
        true => c.txn.delete_id(Cf::Lock, file),
        false => c.txn.put(Cf::Lock, &id_key(file), &FileLocks { locks }),
    }
}

/// The answer names the lock that is in the way, if one is; nothing was changed then.
pub fn set(c: &mut Context<'_, '_>, op: &SetLock) -> Result<()> {
    let wanted = op.lock.unwrap_or_default();
    if wanted.start > wanted.end || wanted.end > i64::MAX as u64 {
        return Err(err!(InvalidArgument, "a lock of the bytes {} to {}", wanted.start, wanted.end));
    }
    let mut held = session(c, wanted.session_id)?;
    if held.ending {
        return Err(err!(Expired, "the locks of this mount are over: it was silent for too long"));
    }
    if op.file_id >= c.counters.next_inode_id {
        return Err(err!(NotFound, "there was never a file {}", op.file_id));
    }
    // Of a file that is gone only those know who have it open: they may lock it on.
    if !op.unlock
        && let Some((_, inode)) = c.txn.inode(InodeId(op.file_id))?
    {
        let path = c.txn.path_of(InodeId(op.file_id))?;
        check(&c.who, &inode, READ, &path).or_else(|_| check(&c.who, &inode, WRITE, &path))?;
    }
    let before = c.txn.locks(op.file_id)?.locks;
    if !op.unlock
        && let Some(other) = conflict(&before, &wanted)
    {
        c.reply.conflict = Some(*other);
        return Ok(());
    }
    let is_its = |lock: &FileLock| lock.session_id == wanted.session_id;
    let had = before.iter().any(is_its);
    let after = replaced(before, &wanted, op.unlock);
    if after.len() > LOCKS_PER_FILE_MAX {
        return Err(err!(LimitExceeded, "a file has at most {LOCKS_PER_FILE_MAX} locks").with_retryable(false));
    }
    let has = after.iter().any(is_its);
    if had != has {
        let key = locked_key(held.id, op.file_id);
        if has {
            if held.files >= LOCKED_FILES_MAX {
                return Err(err!(LimitExceeded, "a mount holds locks of at most {LOCKED_FILES_MAX} files").with_retryable(false));
            }
            held.files += 1;
            c.txn.put_raw(Cf::LockedFile, &key, Vec::new());
        } else {
            held.files = held.files.saturating_sub(1);
            c.txn.delete(Cf::LockedFile, &key);
        }
        c.txn.put(Cf::LockSession, &id_key(held.id), &held);
    }
    put(c, op.file_id, after);
    // An exclusive one that is shared now lets others in as well.
    c.reply.unlocked.push(op.file_id);
    Ok(())
}

/// Nothing happens to a session that is over already. One of many files ends by several commands; it is over with the first.
pub fn end(c: &mut Context<'_, '_>, op: &EndLocks) -> Result<()> {
    let mut held = match session(c, op.session_id) {
        Err(e) if e.kind() == forebay_common::ErrorKind::Expired => return Ok(()),
        other => other?,
    };
    if op.expired_only && !held.ending && held.expires_at_ms > c.now_ms() {
        return Ok(());
    }
    let files = c.txn.locked_by(held.id, LOCKS_ENDED_AT_ONCE)?;
    let all = files.len() < LOCKS_ENDED_AT_ONCE;
    for file in files {
        let mut locks = c.txn.locks(file)?.locks;
        locks.retain(|lock| lock.session_id != held.id);
        put(c, file, locks);
        c.txn.delete(Cf::LockedFile, &locked_key(held.id, file));
        c.reply.unlocked.push(file);
    }
    if all {
        c.txn.delete_id(Cf::LockSession, held.id);
        c.counters.lock_sessions = c.counters.lock_sessions.saturating_sub(1);
    } else {
        held.ending = true;
        c.txn.put(Cf::LockSession, &id_key(held.id), &held);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What bytes 0 to 15 are locked as, by owner and kind.
    type Bytes = [[Option<bool>; 16]; 4];

    fn owner(lock: &FileLock) -> usize {
        lock.owner as usize + if lock.whole { 2 } else { 0 }
    }

    fn seen(locks: &[FileLock]) -> Bytes {
        let mut out = Bytes::default();
        for lock in locks {
            for byte in lock.start..=lock.end.min(15) {
                let place = &mut out[owner(lock)][byte as usize];
                assert_eq!(*place, None, "two of one owner touch: {locks:?}");
                *place = Some(lock.exclusive);
            }
        }
        out
    }

    proptest! {
        /// Beside a model that knows each byte.
        #[test]
        fn locks_are_those_of_each_byte(steps in prop::collection::vec((0u64..2, any::<bool>(), 0u64..16, 0u64..16, 0u8..3), 1..60)) {
            let (mut locks, mut model) = (Vec::new(), Bytes::default());
            for (of, whole, a, b, what) in steps {
                let (start, end) = (a.min(b), a.max(b));
                let wanted = FileLock { session_id: 1, owner: of, whole, start, end, exclusive: what == 2, process: 0 };
                let others: Vec<usize> = (0..4).filter(|o| o / 2 == owner(&wanted) / 2 && *o != owner(&wanted)).collect();
                let range = start as usize..=end as usize;
                let in_the_way = what > 0 && others.iter().any(|o| model[*o][range.clone()].iter().any(|b| *b == Some(true) || (what == 2 && b.is_some())));
                prop_assert_eq!(what > 0 && conflict(&locks, &wanted).is_some(), in_the_way);
                if in_the_way {
                    continue;
                }
                locks = replaced(locks, &wanted, what == 0);
                model[owner(&wanted)][range].fill((what > 0).then_some(what == 2));
                prop_assert_eq!(seen(&locks), model);
                // What belongs together is one.
                for (i, a) in locks.iter().enumerate() {
                    for b in &locks[i + 1..] {
                        prop_assert!(!(same_owner(a, b) && a.exclusive == b.exclusive && (a.end + 1 == b.start || b.end + 1 == a.start)), "{:?}", locks);
                    }
                }
            }
        }
    }
}
