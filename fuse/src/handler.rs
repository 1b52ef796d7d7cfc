//! `Handler`: takes requests from the kernel and answers them, each in a task of its own; what is here already is answered at once.

use crate::attributes;
use crate::device::Agreed;
use crate::locking::{Asked, Locked, is_flock};
use crate::locks::Owner;
use crate::mount::{self, Gate, Handle, How, Mount, New, READ_BYTES, READS, STATFS_BYTES, STATISTICS, STATISTICS_NODE};
use crate::nodes::{Node, ROOT, Use};
use forebay_common::{Error, ErrorKind, Result, counter};
use fuser::*;
use nix::libc;
use std::ffi::OsStr;
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};
use tokio::runtime::Handle as Runtime;

counter!(FAILED, "forebay_fuse_errors_total", "requests of the kernel that were answered with an error of the cluster's");

/// Requests that the kernel may have under way which nobody waits for, such as reading ahead.
const BACKGROUND_MAX: u16 = 128;
/// Between two looks of a request that waits whether it is to be worked on.
const AT_THE_GATE: Duration = Duration::from_millis(1);
const GENERATION: Generation = Generation(0);

pub struct Handler {
    pub mount: Arc<Mount>,
    pub runtime: Runtime,
    /// Why cached files are not read by the kernel itself; told once, by `init`.
    pub no_passthrough: Option<String>,
    /// What an earlier process agreed on with the kernel, and what holds then.
    pub granted: Option<u64>,
}

/// What the caller of a system call is told, and the log where it says more.
pub fn errno(e: &Error) -> Errno {
    if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists | ErrorKind::NotEmpty | ErrorKind::FileChanged) {
        FAILED.inc();
        tracing::debug!(error = %e, "a request of the kernel failed");
    }
    Errno::from_i32(e.kind().errno() as i32)
}

/// Of a lock: EAGAIN would say that somebody else has it.
fn no_lock(e: &Error) -> Errno {
    if e.kind() == ErrorKind::LimitExceeded { Errno::ENOLCK } else { errno(e) }
}

fn from_nix(e: nix::errno::Errno) -> Errno {
    Errno::from_i32(e as i32)
}

/// An answer that has one way to say that it went wrong.
macro_rules! answer {
    ($self:ident, $reply:ident, |$mount:ident| $work:expr, $ok:expr) => {{
        let $mount = $self.mount.clone();
        $self.spawn(async move {
            let done: Result<_> = $work.await;
            match done {
                #[allow(clippy::redundant_closure_call, reason = "each use says in its own words what is replied")]
                Ok(done) => ($ok)($reply, done, &$mount),
                Err(e) => $reply.error(errno(&e)),
            }
        });
    }};
}

/// Nobody takes the mount while a request is taken up. While that is about to be done the request waits, and once it was done it is the kernel's again.
macro_rules! taken {
    ($self:ident, $reply:ident) => {{
        loop {
            let gate = $self.mount.gate.read().unwrap_or_else(|e| e.into_inner());
            match *gate {
                Gate::Open => break gate,
                Gate::Shut => {}
                Gate::Moved => {
                    std::mem::forget($reply);
                    return;
                }
            }
            drop(gate);
            std::thread::sleep(AT_THE_GATE);
        }
    }};
}

impl Handler {
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let under_way = self.mount.under_way();
        self.runtime.spawn(async move {
            let _under_way = under_way;
            work.await;
        });
    }
}

fn new(req: &Request, parent: INodeNo, name: &OsStr, mode: u32) -> New {
    New { parent: parent.0, name: name.as_bytes().to_vec(), mode, uid: req.uid(), gid: req.gid() }
}

fn asked(req: &Request, node: INodeNo, handle: FileHandle, owner: LockOwner, (start, end): (u64, u64), typ: i32, process: u32) -> Asked {
    let owner = Owner { node: node.0, owner: owner.0, whole: is_flock(req) };
    Asked { owner, handle: handle.0, start, end, exclusive: typ == libc::F_WRLCK, process, thread: req.pid() }
}

fn entry(reply: ReplyEntry, node: Arc<Node>, mount: &Arc<Mount>) {
    reply.entry_with_ttls(&mount.entry_ttl(), &mount.attr_ttl(), &mount.attr_of(&node), GENERATION);
}

fn empty(reply: ReplyEmpty, (): (), _: &Arc<Mount>) {
    reply.ok();
}

fn statistics_attr(mount: &Mount) -> FileAttr {
    let status = forebay_proto::FileStatus { mode: 0o444, owner: "root".into(), group: "root".into(), ..Default::default() };
    attributes::of(STATISTICS_NODE, &status, &mount.names)
}

impl Filesystem for Handler {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_AUTO_INVAL_DATA,
            InitFlags::FUSE_ASYNC_DIO,
            // Else the kernel asks for `security.capability` before each write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        ];
        let mut agreed = Agreed { capabilities: config.capabilities().bits(), granted: 0, version: (config.kernel_abi().0, config.kernel_abi().1) };
        // Of a mount that was taken over what was agreed on stays.
        let held = self.granted;
        let mut add = |config: &mut KernelConfig, flag: InitFlags| {
            let done = held.is_none_or(|held| held & flag.bits() == flag.bits()) && config.add_capabilities(flag).is_ok();
            agreed.granted |= if done { flag.bits() } else { 0 };
            done
        };
        let locks = [InitFlags::FUSE_POSIX_LOCKS, InitFlags::FUSE_FLOCK_LOCKS];
        for flag in wanted.into_iter().chain(locks.into_iter().filter(|_| self.mount.config.shared_locks)) {
            if !add(config, flag) {
                tracing::info!(?flag, "this kernel's FUSE does not have a feature that is used where it is there");
            }
        }
        let _ = config.set_max_background(BACKGROUND_MAX);
        let _ = config.set_max_write(1 << 20);
        let refused = match &self.no_passthrough {
            Some(why) => Some(why.clone()),
            None if !add(config, InitFlags::FUSE_PASSTHROUGH) => Some("this kernel has no FUSE passthrough (Linux 6.9 has)".to_owned()),
            None if config.set_max_stack_depth(1).is_err() => Some("the kernel takes no stack depth".to_owned()),
            None => None,
        };
        match refused {
            None => self.mount.passthrough.store(true, Ordering::SeqCst),
            Some(why) => tracing::info!(why, "cached files are read through this process, not by the kernel itself"),
        }
        *self.mount.agreed.lock().unwrap_or_else(|e| e.into_inner()) = agreed;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _gate = taken!(self, reply);
        let name = name.as_bytes().to_vec();
        if parent.0 == ROOT && name == STATISTICS {
            return reply.entry(&self.mount.attr_ttl(), &statistics_attr(&self.mount), GENERATION);
        }
        answer!(self, reply, |mount| mount.lookup(parent.0, &name), entry);
    }

    fn forget(&self, _: &Request, ino: INodeNo, nlookup: u64) {
        self.mount.nodes.forget(ino.0, nlookup);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let _gate = taken!(self, reply);
        if ino.0 == STATISTICS_NODE {
            return reply.attr(&self.mount.attr_ttl(), &statistics_attr(&self.mount));
        }
        // What is being written is known here.
        if let Ok(node) = self.mount.nodes.get(ino.0)
            && matches!(node.in_use(), Use::Staged(staged) if staged.settled().is_none())
        {
            return reply.attr(&self.mount.attr_ttl(), &self.mount.attr_of(&node));
        }
        answer!(self, reply, |mount| mount.getattr(ino.0), |reply: ReplyAttr, attr, mount: &Arc<Mount>| reply.attr(&mount.attr_ttl(), &attr));
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _gate = taken!(self, reply);
        let wanted = mount::wanted(mode, uid, gid, mtime, atime);
        let privileged = req.uid() == 0;
        answer!(self, reply, |mount| mount.setattr(ino.0, size, wanted, privileged), |reply: ReplyAttr, attr, mount: &Arc<Mount>| reply
            .attr(&mount.attr_ttl(), &attr));
    }

    fn mknod(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, rdev: u32, reply: ReplyEntry) {
        let _gate = taken!(self, reply);
        let new = new(req, parent, name, mode);
        answer!(self, reply, |mount| mount.mknod(new, rdev.into()), entry);
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        let _gate = taken!(self, reply);
        let new = new(req, parent, name, mode);
        answer!(self, reply, |mount| mount.mkdir(new), entry);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _gate = taken!(self, reply);
        let name = name.as_bytes().to_vec();
        answer!(self, reply, |mount| mount.unlink(parent.0, &name), empty);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _gate = taken!(self, reply);
        let name = name.as_bytes().to_vec();
        answer!(self, reply, |mount| mount.rmdir(parent.0, &name), empty);
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let _gate = taken!(self, reply);
        match self.mount.readlink(ino.0) {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let _gate = taken!(self, reply);
        let (new, target) = (new(req, parent, name, 0o777), target.as_os_str().as_bytes().to_vec());
        answer!(self, reply, |mount| mount.symlink(new, &target), entry);
    }

    fn link(&self, _: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let _gate = taken!(self, reply);
        let name = newname.as_bytes().to_vec();
        let mount = self.mount.clone();
        self.spawn(async move {
            match mount.link(ino.0, newparent.0, &name).await {
                Ok(node) => entry(reply, node, &mount),
                Err(e) if e.kind() == ErrorKind::Unsupported => reply.error(Errno::EXDEV),
                Err(e) if e.kind() == ErrorKind::LimitExceeded => reply.error(Errno::EMLINK),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn rename(&self, _: &Request, parent: INodeNo, name: &OsStr, newparent: INodeNo, newname: &OsStr, flags: RenameFlags, reply: ReplyEmpty) {
        let _gate = taken!(self, reply);
        if flags.intersects(RenameFlags::RENAME_EXCHANGE | RenameFlags::RENAME_WHITEOUT) {
            return reply.error(Errno::EINVAL);
        }
        let (name, new_name) = (name.as_bytes().to_vec(), newname.as_bytes().to_vec());
        let overwrite = !flags.contains(RenameFlags::RENAME_NOREPLACE);
        let mount = self.mount.clone();
        self.spawn(async move {
            match mount.rename(parent.0, &name, newparent.0, &new_name, overwrite).await {
                Ok(()) => reply.ok(),
                // Between two under stores: programs copy then.
                Err(e) if e.kind() == ErrorKind::Unsupported => reply.error(Errno::EXDEV),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _gate = taken!(self, reply);
        let mount = self.mount.clone();
        let privileged = req.uid() == 0 || flags.0 & libc::O_TRUNC == 0;
        self.spawn(async move {
            // Made with the answer's own channel, before it is known which answer it is.
            let mut opened = mount.open(ino.0, flags.0).await;
            if !privileged
                && let Ok((handle, _)) = &opened
                && let Err(e) = mount.drop_privileges(ino.0).await
            {
                let _ = mount.release(*handle).await;
                opened = Err(e);
            }
            match opened {
                Ok((handle, How::Passthrough(backing))) => {
                    // SAFETY: the number is open as long as `backing` is, which closes it; so what is made of it here must not.
                    #[allow(unsafe_code, reason = "fuser names a backing file by its own type alone")]
                    let id = unsafe { reply.wrap_backing(backing.id()) };
                    reply.opened_passthrough(FileHandle(handle), FopenFlags::empty(), &id);
                    let _ = id.into_raw();
                }
                Ok((handle, How::Cached { keep })) => {
                    reply.opened(FileHandle(handle), if keep { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() });
                }
                Ok((handle, How::Direct)) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
                Err(e) if e.kind() == ErrorKind::FileChanged => reply.error(Errno::ESTALE),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn create(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, flags: i32, reply: ReplyCreate) {
        let _gate = taken!(self, reply);
        let new = new(req, parent, name, mode);
        let mount = self.mount.clone();
        self.spawn(async move {
            let made = mount.create(&new, flags).await;
            let (node, handle, how) = match made {
                Ok(made) => made,
                Err(e) if e.kind() == ErrorKind::FileChanged => return reply.error(Errno::ESTALE),
                Err(e) => return reply.error(errno(&e)),
            };
            let (ttl, attr, handle) = (mount.entry_ttl(), mount.attr_of(&node), FileHandle(handle));
            match how {
                How::Passthrough(backing) => {
                    // SAFETY: as in `open`.
                    #[allow(unsafe_code, reason = "fuser names a backing file by its own type alone")]
                    let id = unsafe { reply.wrap_backing(backing.id()) };
                    reply.created_passthrough(&ttl, &attr, GENERATION, handle, FopenFlags::empty(), &id);
                    let _ = id.into_raw();
                }
                How::Cached { keep: true } => reply.created(&ttl, &attr, GENERATION, handle, FopenFlags::FOPEN_KEEP_CACHE),
                How::Cached { keep: false } => reply.created(&ttl, &attr, GENERATION, handle, FopenFlags::empty()),
                How::Direct => reply.created(&ttl, &attr, GENERATION, handle, FopenFlags::FOPEN_DIRECT_IO),
            }
        });
    }

    fn read(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: u64, size: u32, _: OpenFlags, _: Option<LockOwner>, reply: ReplyData) {
        let _gate = taken!(self, reply);
        READS.inc();
        let handle = match self.mount.handle(fh.0) {
            Ok(handle) => handle,
            Err(_) => return reply.error(Errno::EBADF),
        };
        if let Some(bytes) = self.mount.read_now(&handle, offset, size as usize) {
            READ_BYTES.inc_by(bytes.len() as u64);
            return reply.data(&bytes);
        }
        let mount = self.mount.clone();
        self.spawn(async move {
            match mount.read(&handle, offset, size as usize).await {
                Ok(bytes) => {
                    READ_BYTES.inc_by(bytes.len() as u64);
                    reply.data(&bytes);
                }
                Err(e) => {
                    tracing::warn!(error = %e, "a read failed");
                    reply.error(errno(&e));
                }
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
        open: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _gate = taken!(self, reply);
        let (mount, data) = (self.mount.clone(), data.to_vec());
        let (written, appends) = (data.len() as u32, open.0 & libc::O_APPEND != 0);
        self.spawn(async move {
            let mut done = match mount.handle(fh.0) {
                Ok(handle) => mount.write(&handle, offset, &data, appends).await,
                Err(_) => return reply.error(Errno::EBADF),
            };
            if done.is_ok() && flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) {
                done = mount.drop_privileges(ino.0).await;
            }
            match done {
                Ok(()) => reply.written(written),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn flush(&self, _: &Request, ino: INodeNo, fh: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        let _gate = taken!(self, reply);
        let owner = Owner { node: ino.0, owner: owner.0, whole: false };
        if self.mount.locks.held(owner).is_some() {
            let mount = self.mount.clone();
            return self.spawn(async move {
                let done = mount.flush(fh.0).await;
                match mount.closed(owner).await.and(done) {
                    Ok(()) => reply.ok(),
                    Err(e) => reply.error(errno(&e)),
                }
            });
        }
        // Most files are read, and have nothing to be handed over.
        if self.mount.handle(fh.0).is_ok_and(|handle| !matches!(&*handle, Handle::Writes { .. })) {
            return reply.ok();
        }
        answer!(self, reply, |mount| mount.flush(fh.0), empty);
    }

    fn fsync(&self, _: &Request, _: INodeNo, fh: FileHandle, _: bool, reply: ReplyEmpty) {
        let _gate = taken!(self, reply);
        answer!(self, reply, |mount| mount.sync(fh.0), empty);
    }

    fn release(&self, _: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, _: Option<LockOwner>, _: bool, reply: ReplyEmpty) {
        let _gate = taken!(self, reply);
        if !self.mount.locks.held_by(fh.0).is_empty() {
            let mount = self.mount.clone();
            return self.spawn(async move {
                let done = mount.release(fh.0).await;
                mount.released(fh.0).await;
                match done {
                    Ok(()) => reply.ok(),
                    Err(e) => reply.error(errno(&e)),
                }
            });
        }
        if self.mount.release_now(fh.0) {
            return reply.ok();
        }
        answer!(self, reply, |mount| mount.release(fh.0), empty);
    }

    fn getlk(&self, req: &Request, ino: INodeNo, fh: FileHandle, owner: LockOwner, start: u64, end: u64, typ: i32, pid: u32, reply: ReplyLock) {
        let _gate = taken!(self, reply);
        let asked = asked(req, ino, fh, owner, (start, end), typ, pid);
        let mount = self.mount.clone();
        self.spawn(async move {
            match mount.test_lock(&asked).await {
                Ok(None) => reply.locked(start, end, libc::F_UNLCK, 0),
                Ok(Some(other)) => reply.locked(other.start, other.end, if other.exclusive { libc::F_WRLCK } else { libc::F_RDLCK }, other.process),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn setlk(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let _gate = taken!(self, reply);
        let asked = asked(req, ino, fh, owner, (start, end), typ, pid);
        let mount = self.mount.clone();
        if typ == libc::F_UNLCK {
            return self.spawn(async move {
                match mount.unlock(&asked).await {
                    Ok(()) => reply.ok(),
                    Err(e) => reply.error(no_lock(&e)),
                }
            });
        }
        let hands = mount.hands.load(Ordering::SeqCst);
        self.runtime.spawn(async move {
            match mount.lock(&asked, sleep, hands).await {
                Ok(Locked::Yes(_under_way)) => reply.ok(),
                Ok(Locked::InTheWay) => reply.error(Errno::EAGAIN),
                Ok(Locked::Interrupted) => reply.error(Errno::EINTR),
                Ok(Locked::Left) => std::mem::forget(reply),
                Err(e) => reply.error(no_lock(&e)),
            }
        });
    }

    fn fallocate(&self, req: &Request, ino: INodeNo, fh: FileHandle, offset: u64, length: u64, mode: i32, reply: ReplyEmpty) {
        let _gate = taken!(self, reply);
        let (mount, privileged) = (self.mount.clone(), req.uid() == 0);
        self.spawn(async move {
            match mount.allocate(fh.0, mode, offset, length).await {
                Ok(()) if privileged => reply.ok(),
                Ok(()) => match mount.drop_privileges(ino.0).await {
                    Ok(()) => reply.ok(),
                    Err(e) => reply.error(errno(&e)),
                },
                Err(e) => reply.error(from_nix(e)),
            }
        });
    }

    fn lseek(&self, _: &Request, _: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let _gate = taken!(self, reply);
        match self.mount.seek(fh.0, offset, whence) {
            Ok(offset) => reply.offset(offset),
            Err(e) => reply.error(from_nix(e)),
        }
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let _gate = taken!(self, reply);
        // The kernel copies by reading and writing.
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let _gate = taken!(self, reply);
        answer!(self, reply, |mount| mount.opendir(ino.0), |reply: ReplyOpen, handle, _: &Arc<Mount>| reply
            .opened(FileHandle(handle), FopenFlags::empty()));
    }

    fn readdir(&self, _: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let _gate = taken!(self, reply);
        let mount = self.mount.clone();
        self.spawn(async move {
            let mut full = false;
            for (place, name) in [(1, "."), (2, "..")] {
                full = full || (offset < place && reply.add(ino, place, FileType::Directory, name));
            }
            let done = match full {
                true => Ok(()),
                false => {
                    mount
                        .readdir(fh.0, offset.saturating_sub(2), |place, name, status| {
                            reply.add(INodeNo(status.file_id), place + 2, attributes::kind(status), OsStr::from_bytes(name))
                        })
                        .await
                }
            };
            match done {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(errno(&e)),
            }
        });
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let _gate = taken!(self, reply);
        let mount = self.mount.clone();
        self.spawn(async move {
            let Ok(own) = mount.nodes.get(ino.0) else { return reply.error(Errno::ENOENT) };
            let (ttl, own) = (mount.attr_ttl(), mount.attr_of(&own));
            let (mut full, mut added) = (false, false);
            for (place, name) in [(1, "."), (2, "..")] {
                full = full || (offset < place && reply.add(ino, place, name, &ttl, &own, GENERATION));
            }
            let done = match full {
                true => Ok(()),
                false => {
                    mount
                        .readdir(fh.0, offset.saturating_sub(2), |place, name, status| {
                            let node = mount.nodes.show(ino.0, name, status.clone());
                            let full = reply.add(INodeNo(node.id), place + 2, OsStr::from_bytes(name), &ttl, &mount.attr_of(&node), GENERATION);
                            if full {
                                // It was not handed out after all.
                                mount.nodes.forget(node.id, 1);
                            }
                            added |= !full;
                            full
                        })
                        .await
                }
            };
            match done {
                // What was added was handed out.
                Err(e) if !added => reply.error(errno(&e)),
                _ => reply.ok(),
            }
        });
    }

    fn releasedir(&self, _: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        let _gate = taken!(self, reply);
        answer!(self, reply, |mount| mount.release(fh.0), empty);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let _gate = taken!(self, reply);
        // Every change of a folder is journaled before it is answered.
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let _gate = taken!(self, reply);
        let blocks = STATFS_BYTES / 4_096;
        reply.statfs(blocks, blocks, blocks, u64::from(u32::MAX), u64::from(u32::MAX), 4_096, 255, 4_096);
    }

    fn setxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, value: &[u8], flags: i32, _: u32, reply: ReplyEmpty) {
        let _gate = taken!(self, reply);
        self.set_x_attr(ino.0, name, value, flags, reply);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let _gate = taken!(self, reply);
        self.get_x_attr(ino.0, name, size, reply);
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _gate = taken!(self, reply);
        self.list_x_attrs(ino.0, size, reply);
    }

    fn removexattr(&self, _: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _gate = taken!(self, reply);
        self.remove_x_attr(ino.0, name, reply);
    }

    fn ioctl(&self, _: &Request, _: INodeNo, _: FileHandle, _: IoctlFlags, _: u32, _: &[u8], _: u32, reply: ReplyIoctl) {
        let _gate = taken!(self, reply);
        reply.error(Errno::from_i32(libc::ENOTTY));
    }
}
