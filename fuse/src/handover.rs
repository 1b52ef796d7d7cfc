//! A live mount changes hands: its process gives the device, what the kernel knows by number, and what is open to another process, and ends (`forebay mount --take-over`).
//!
//! The old process listens on the socket `control`. The way: it takes up no more requests (they wait), finishes those under way, hands over what was written, stops its threads, and sends
//! `mount.State` with its descriptors → the new one connects to the master before it asks, builds the same, opens for itself what is read, reads nothing from the kernel, and says that it has all
//! → the old one has the kernel send again what was not answered, gives its word to go on, and ends. Invariant: until that word is given the old process has all that it needs to go on, and does
//! so where the other one is silent or gone; the new one does nothing to the mount without it. `keeper` is at the other end where no successor is there yet: it takes the same as it is, and gives it on.

use crate::device::{Agreed, Backing};
use crate::locks::Locks;
use crate::mount::{Handle, Mount};
use crate::nodes::{Nodes, Saved};
use crate::staged::Staged;
use forebay_client::FileSystem;
use forebay_common::config::FuseConfig;
use forebay_common::{AbsPath, Error, Result, err};
use forebay_proto::mount as wire;
use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use prost::Message;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Descriptors of one message; the kernel takes 253.
const DESCRIPTORS: usize = 128;
/// How long either side waits for the other.
const WAIT: Duration = Duration::from_secs(30);
/// And where the other one has to finish what is under way, or to open again what was open.
pub const UNDER_WAY_WAIT: Duration = Duration::from_secs(120);
/// How long a keeper may take to say that it is there.
const KEEPER_WAIT: Duration = Duration::from_secs(5);
/// Bytes of a state at most: some ten million nodes.
pub const STATE_MAX_BYTES: u64 = 4 << 30;
const HELLO: u8 = 1;
pub const TAKEN: u8 = 2;
pub const GO: u8 = 3;
/// Where the processes of root's mounts listen, if nothing else is said.
const RUN_DIR: &str = "/run/forebay-mount";

fn control_dir(fuse: &FuseConfig) -> &Path {
    match fuse.control_dir.as_os_str().is_empty() {
        true if nix::unistd::geteuid().is_root() => Path::new(RUN_DIR),
        true => &fuse.staging_dir,
        false => &fuse.control_dir,
    }
}

/// Where a keeper listens.
pub fn keeper(control_dir: &Path) -> PathBuf {
    control_dir.join("keeper")
}

/// Where the process of a mount listens.
pub fn control(fuse: &FuseConfig, mountpoint: &Path) -> PathBuf {
    // However it is written; FNV-1a, which is the same in every version, since a path may be longer than a socket's.
    let mountpoint: PathBuf = mountpoint.components().collect();
    let name =
        mountpoint.to_string_lossy().bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    control_dir(fuse).join(format!(".forebay-mount-{name:016x}"))
}

/// Listens, in the place of whoever did before.
pub fn listen(path: &Path) -> Result<UnixListener> {
    let failed = |e: std::io::Error| Error::io(format!("the socket {} for --take-over", path.display()), &e);
    if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
        std::fs::create_dir_all(dir).map_err(failed)?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
    }
    // Under another name first: at each moment somebody can be reached here.
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let _ = std::fs::remove_file(&new);
    let listener = UnixListener::bind(&new).map_err(failed)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    std::fs::rename(&new, path).map_err(failed)?;
    Ok(listener)
}

/// Which socket is at a place.
pub fn inode(path: &Path) -> Option<u64> {
    std::fs::symlink_metadata(path).ok().map(|metadata| metadata.ino())
}

pub fn broken(e: std::io::Error) -> Error {
    Error::io("the process at the other end of a hand-over", &e)
}

pub fn send_descriptors(stream: &UnixStream, all: &[BorrowedFd<'_>]) -> Result<()> {
    for some in all.chunks(DESCRIPTORS) {
        let numbers: Vec<_> = some.iter().map(AsRawFd::as_raw_fd).collect();
        let message = [ControlMessage::ScmRights(&numbers)];
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&[0])], &message, MsgFlags::empty(), None).map_err(|e| broken(e.into()))?;
    }
    Ok(())
}

pub fn receive_descriptors(stream: &UnixStream, count: usize) -> Result<Vec<OwnedFd>> {
    let mut out = Vec::with_capacity(count);
    while out.len() < count {
        let mut byte = [0];
        let mut buffer = cmsg_space!([std::os::fd::RawFd; DESCRIPTORS]);
        let mut slices = [IoSliceMut::new(&mut byte)];
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut buffer), MsgFlags::MSG_CMSG_CLOEXEC).map_err(|e| broken(e.into()))?;
        let before = out.len();
        for part in message.cmsgs().map_err(|e| broken(e.into()))? {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                // SAFETY: the kernel has just made these for this process.
                #[allow(unsafe_code, reason = "descriptors that came with a message")]
                out.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
        if out.len() == before {
            return Err(err!(Unavailable, "the other process ended in the middle of a hand-over"));
        }
    }
    Ok(out)
}

pub fn timed(stream: &UnixStream) -> Result<()> {
    stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(WAIT)))
        .and_then(|()| stream.set_write_timeout(Some(WAIT)))
        .map_err(broken)
}

/// Errors: at the other end is somebody else than this process's user.
pub fn check_peer(stream: &UnixStream) -> Result<()> {
    use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
    let peer = getsockopt(stream, PeerCredentials).map_err(|e| broken(e.into()))?;
    if peer.uid() != nix::unistd::geteuid().as_raw() {
        return Err(err!(PermissionDenied, "user {} is at the other end of a hand-over", peer.uid()));
    }
    Ok(())
}

/// Who is to have a mount.
pub struct Receiver {
    pub stream: UnixStream,
    /// It is told how many descriptors there are; one that reads the state finds that there.
    pub counted: bool,
}

/// Offers a mount to the keeper of its control folder, and waits until that wants it; `None`: there is none.
pub fn offer(fuse: &FuseConfig, control: &Path, mountpoint: &Path) -> Result<Option<Receiver>> {
    let mut stream = match UnixStream::connect(keeper(control_dir(fuse))) {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) => return Ok(None),
        Err(e) => return Err(broken(e)),
    };
    let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec().into();
    let offer = wire::Offer { mountpoint: bytes(mountpoint), control: bytes(control) };
    timed(&stream)?;
    check_peer(&stream)?;
    stream.set_read_timeout(Some(KEEPER_WAIT)).map_err(broken)?;
    stream.write_all(&offer.encode_length_delimited_to_vec()).map_err(broken)?;
    hello(&mut stream)?;
    timed(&stream)?;
    Ok(Some(Receiver { stream, counted: true }))
}

/// Says at the other end that a mount is wanted.
pub fn greet(stream: &mut UnixStream) -> Result<()> {
    stream.write_all(&[HELLO]).map_err(broken)
}

/// Whether the other end is who runs this mount, and wants it.
pub fn greeted(stream: &mut UnixStream) -> Result<()> {
    timed(stream)?;
    check_peer(stream)?;
    hello(stream)
}

fn hello(stream: &mut UnixStream) -> Result<()> {
    let mut said = [0];
    stream.read_exact(&mut said).map_err(broken)?;
    if said[0] != HELLO {
        return Err(err!(InvalidArgument, "a process of another version wants to take over"));
    }
    Ok(())
}

/// Sends all that a mount is, and once the other process has it all, its word to go on. The mount is at rest. Errors: it was not taken over, and that word was not said.
pub fn give(to: Receiver, mount: &Mount, handles: Vec<wire::Handle>, agreed: &Agreed, device: BorrowedFd<'_>) -> Result<()> {
    let (nodes, files) = mount.nodes.save()?;
    let (lock_session, locks) = mount.locks.save();
    let state = wire::State {
        path: mount.nodes.path(crate::nodes::ROOT)?.as_bytes().to_vec().into(),
        read_only: mount.read_only,
        capabilities: agreed.capabilities,
        granted: agreed.granted,
        major: agreed.version.0,
        minor: agreed.version.1,
        next_handle: mount.next_handle(),
        nodes,
        handles,
        hiding: mount.hiding.lock().unwrap_or_else(|e| e.into_inner()).iter().map(|path| path.as_bytes().to_vec().into()).collect(),
        lock_session,
        locks,
    };
    let bytes = state.encode_to_vec();
    let mut descriptors = vec![device];
    let files: Vec<Arc<Staged>> = files;
    descriptors.extend(files.iter().map(|staged| staged.descriptor()));
    let Receiver { mut stream, counted } = to;
    if counted {
        stream.write_all(&(descriptors.len() as u64).to_ne_bytes()).map_err(broken)?;
    }
    stream.write_all(&(bytes.len() as u64).to_ne_bytes()).and_then(|()| stream.write_all(&bytes)).map_err(broken)?;
    send_descriptors(&stream, &descriptors)?;
    let mut said = [0];
    stream.read_exact(&mut said).map_err(broken)?;
    if said[0] != TAKEN {
        return Err(err!(Internal, "the other process did not take over"));
    }
    // Before this process's descriptors are closed.
    crate::device::resend(device).map_err(|e| Error::io("having the kernel send requests again", &e))?;
    stream.write_all(&[GO]).map_err(broken)
}

/// What was taken over, and still has to be said to the process that gave it.
pub struct Taken {
    pub state: wire::State,
    pub device: OwnedFd,
    files: Vec<OwnedFd>,
    stream: UnixStream,
    ours: Arc<AtomicBool>,
}

/// Whether a process that gave nothing ends: on a kernel on which nothing can be given (see `Agreed::may_change_hands`) it takes its mount away, and then its socket.
/// Or another one has the mount by now, and is to be asked: a keeper.
fn ends(path: &Path, asked: Option<u64>) -> bool {
    let deadline = std::time::Instant::now() + WAIT;
    while inode(path) == asked && asked.is_some() && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    inode(path) != asked || asked.is_none()
}

/// Asks the process of a mount for it; `None`: nobody is there, or not any more.
pub fn ask(path: &Path) -> Result<Option<Taken>> {
    let asked = inode(path);
    let mut stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) => return Ok(None),
        Err(e) => return Err(broken(e)),
    };
    check_peer(&stream)?;
    timed(&stream)?;
    // It finishes what is under way first.
    stream.set_read_timeout(Some(UNDER_WAY_WAIT)).map_err(broken)?;
    greet(&mut stream)?;
    let mut length = [0; 8];
    if let Err(e) = stream.read_exact(&mut length) {
        drop(stream);
        return if ends(path, asked) { self::ask(path) } else { Err(err!(Unavailable, "the mount's process keeps it: its log says why ({e})")) };
    }
    let length = u64::from_ne_bytes(length);
    if length > STATE_MAX_BYTES {
        return Err(err!(Corrupt, "a hand-over of {length} bytes"));
    }
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes).map_err(broken)?;
    let state = wire::State::decode(&bytes[..]).map_err(|e| err!(Corrupt, "a hand-over does not decode: {e}"))?;
    let files = state.nodes.iter().filter(|node| node.staged.is_some()).count();
    let mut all = receive_descriptors(&stream, files + 1)?;
    let device = all.remove(0);
    Ok(Some(Taken { state, device, files: all, stream, ours: Arc::default() }))
}

impl Taken {
    pub fn agreed(&self) -> Agreed {
        Agreed { capabilities: self.state.capabilities, granted: self.state.granted, version: (self.state.major, self.state.minor) }
    }

    /// The mount as it was. What cannot be opened any more as it was read answers ESTALE from now on.
    pub async fn restore(&mut self, fs: FileSystem, config: FuseConfig, device: &Arc<OwnedFd>) -> Result<Mount> {
        let mut files = std::mem::take(&mut self.files).into_iter().map(File::from);
        let mut saved = Vec::with_capacity(self.state.nodes.len());
        for node in std::mem::take(&mut self.state.nodes) {
            let backing = (node.backing > 0).then(|| Arc::new(Backing::taken_over(device, node.backing, &self.ours)));
            let staged = match &node.staged {
                Some(staged) => {
                    let file = files.next().ok_or_else(|| err!(Corrupt, "a hand-over lacks a file that is being written"))?;
                    Some(Arc::new(Staged::taken_over(file, staged)))
                }
                None => None,
            };
            saved.push(Saved { node, backing, staged });
        }
        let top = AbsPath::parse(&self.state.path)?;
        let mount =
            Mount::taken_over(fs, Nodes::restore(top, saved)?, Locks::taken_over(self.state.lock_session, &self.state.locks), config, &self.state);
        for path in &self.state.hiding {
            mount.hiding.lock().unwrap_or_else(|e| e.into_inner()).insert(AbsPath::parse(path)?);
        }
        for handle in std::mem::take(&mut self.state.handles) {
            let restored = mount.restore_handle(&handle).await?;
            if matches!(restored, Handle::Lost { reads: true, .. }) {
                tracing::warn!(node = handle.node, "what was open is not there any more as it was read: it answers ESTALE");
            }
            mount.put_handle(handle.number, restored);
        }
        Ok(mount)
    }

    /// From now on it is this process's. Errors: it is not, and the other one has it.
    pub fn done(mut self) -> Result<()> {
        let mut said = [0];
        self.stream.set_read_timeout(Some(WAIT)).and_then(|()| self.stream.write_all(&[TAKEN])).map_err(broken)?;
        self.stream.read_exact(&mut said).map_err(broken)?;
        if said[0] != GO {
            return Err(err!(Internal, "the other process kept the mount"));
        }
        self.ours.store(true, Ordering::SeqCst);
        Ok(())
    }
}
