//! What the namespace says of a file as what the kernel wants to hear: numbers for names, times, block counts; and which bytes it speaks of.
//!
//! Users and groups have names in the namespace; here they are looked up in this machine's own databases. A name that is unknown here is
//! `nobody`; a number that has no name here is written as a number.

use forebay_proto::FileStatus;
use fuser::{FileAttr, FileType, INodeNo};
use nix::unistd::{Gid, Group, Uid, User};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Who has files of owners that are unknown here.
const NOBODY: u32 = 65_534;
/// What programs are told to read at a time.
const BLOCK_BYTES: u32 = 128 << 10;
/// Names kept; when there are more all are forgotten.
const NAMES_MAX: usize = 10_000;

#[derive(Default)]
pub struct Names {
    users: Mutex<HashMap<String, u32>>,
    groups: Mutex<HashMap<String, u32>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn looked_up(known: &Mutex<HashMap<String, u32>>, name: &str, look: impl FnOnce(&str) -> Option<u32>) -> u32 {
    let mut known = lock(known);
    if let Some(id) = known.get(name) {
        return *id;
    }
    let id = look(name).or_else(|| name.parse().ok()).unwrap_or(NOBODY);
    if known.len() >= NAMES_MAX {
        known.clear();
    }
    known.insert(name.to_owned(), id);
    id
}

impl Names {
    /// What has no owner is root's.
    pub fn uid(&self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        looked_up(&self.users, name, |name| User::from_name(name).ok().flatten().map(|u| u.uid.as_raw()))
    }

    pub fn gid(&self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        looked_up(&self.groups, name, |name| Group::from_name(name).ok().flatten().map(|g| g.gid.as_raw()))
    }

    /// The name that a number is written as.
    pub fn user(uid: u32) -> String {
        User::from_uid(Uid::from_raw(uid)).ok().flatten().map_or_else(|| uid.to_string(), |u| u.name)
    }

    pub fn group(gid: u32) -> String {
        Group::from_gid(Gid::from_raw(gid)).ok().flatten().map_or_else(|| gid.to_string(), |g| g.name)
    }
}

/// A time as the namespace has it: milliseconds since 1970, and nanoseconds beyond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time {
    pub ms: u64,
    pub ns: u32,
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Time {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Time { ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX), ns: since.subsec_nanos() % 1_000_000 }
    }
}

impl From<Time> for SystemTime {
    fn from(time: Time) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(time.ms) + Duration::from_nanos(time.ns.into())
    }
}

/// Which bytes: a file, and a content of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Version {
    pub file_id: u64,
    pub content: u64,
    pub length: u64,
}

impl Version {
    pub fn of(status: &FileStatus) -> Version {
        Version { file_id: status.file_id, content: status.content_version, length: status.length }
    }

    /// As it is handed to another process, and taken from one.
    pub fn save(self) -> forebay_proto::mount::Version {
        forebay_proto::mount::Version { file_id: self.file_id, content: self.content, length: self.length }
    }

    pub fn restore(saved: &forebay_proto::mount::Version) -> Version {
        Version { file_id: saved.file_id, content: saved.content, length: saved.length }
    }
}

/// The upper bits of a mode (`S_IFMT >> 12`) as fuser has them.
pub fn kind(status: &FileStatus) -> FileType {
    match status.kind {
        0o1 => FileType::NamedPipe,
        0o2 => FileType::CharDevice,
        0o6 => FileType::BlockDevice,
        0o12 => FileType::Symlink,
        0o14 => FileType::Socket,
        _ if status.folder => FileType::Directory,
        _ => FileType::RegularFile,
    }
}

/// The attributes of node `id`.
pub fn of(id: u64, status: &FileStatus, names: &Names) -> FileAttr {
    let modified = SystemTime::from(Time { ms: status.modified_ms, ns: status.modified_ns });
    let set = |ms, ns| if ms > 0 { SystemTime::from(Time { ms, ns }) } else { modified };
    let size = match kind(status) {
        FileType::Directory => 4096,
        FileType::Symlink => status.target.len() as u64,
        _ => status.length,
    };
    FileAttr {
        ino: INodeNo(id),
        size,
        blocks: status.length.div_ceil(512),
        atime: set(status.accessed_ms, status.accessed_ns),
        mtime: modified,
        ctime: set(status.changed_ms, 0),
        crtime: modified,
        kind: kind(status),
        perm: (status.mode & 0o7777) as u16,
        nlink: if status.folder { 2 } else { 1 + status.other_names },
        uid: names.uid(&status.owner),
        gid: names.gid(&status.group),
        rdev: status.device as u32,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_numbers_and_numbers_names() {
        let names = Names::default();
        assert_eq!((names.uid("root"), names.gid("root"), Names::user(0)), (0, 0, "root".to_owned()));
        assert_eq!((names.uid("4711"), names.uid("nobody-of-this-name"), Names::user(4_000_000_000)), (4711, NOBODY, "4000000000".to_owned()));
    }
}
