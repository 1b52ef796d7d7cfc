//! The Unix socket of the data plane, on both sides: a byte stream whose messages may carry descriptors.
//!
//! Only its readability is watched. The kernel reports a Unix socket as writable each time the other side has read from
//! it, and a thread that sleeps for an answer would wake for nothing in the middle of every call; so whether it can be
//! written is asked only when a write did not fit, through a second descriptor that is watched until it does.

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// Descriptors that arrived and were not taken yet, in their order.
pub type Descriptors = Arc<Mutex<VecDeque<OwnedFd>>>;

/// Descriptors that one message carries at most.
const DESCRIPTORS_MAX: usize = 16;

/// Takes a connected socket apart. Who takes no descriptors leaves those that come along to the kernel, which closes them: a
/// worker's socket is open to everybody. Errors: the socket cannot be watched.
pub fn split(stream: tokio::net::UnixStream, takes_descriptors: bool) -> io::Result<(Reader, Writer)> {
    let socket = Arc::new(watch(stream.into_std()?, Interest::READABLE)?);
    Ok((Reader { socket: socket.clone(), takes_descriptors, descriptors: Arc::default() }, Writer { socket, full: None }))
}

/// What keeps one descriptor for as long as it lives, which is what watching it asks for.
trait KeepsDescriptor: AsRawFd {}
impl KeepsDescriptor for UnixStream {}
impl KeepsDescriptor for OwnedFd {}

#[allow(unsafe_code, reason = "tokio cannot know that a type keeps its descriptor")]
fn watch<T: KeepsDescriptor>(socket: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: `T` owns its descriptor, names the same one each time it is asked and closes it when dropped, which `AsyncFd`
    // does after it has stopped watching; nothing takes the `T` out.
    Ok(unsafe { AsyncFd::register_with_interest(socket, interest) }?)
}

/// The reading half.
pub struct Reader {
    socket: Arc<AsyncFd<UnixStream>>,
    takes_descriptors: bool,
    descriptors: Descriptors,
}

impl Reader {
    /// Where received descriptors are put.
    pub fn descriptors(&self) -> Descriptors {
        self.descriptors.clone()
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.takes_descriptors {
            return self.socket.get_ref().read(buffer);
        }
        let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX]);
        let mut parts = [IoSliceMut::new(buffer)];
        let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        // Some were dropped on the way (a sandbox, no free numbers here): the answer then comes without, and its reader streams.
        let Ok(controls) = message.cmsgs() else { return Ok(message.bytes) };
        for control in controls {
            if let ControlMessageOwned::ScmRights(raw) = control {
                self.descriptors.lock().unwrap_or_else(|e| e.into_inner()).extend(raw.into_iter().map(own));
            }
        }
        Ok(message.bytes)
    }
}

#[allow(unsafe_code, reason = "a received descriptor is a number until it is owned")]
fn own(raw: RawFd) -> OwnedFd {
    // SAFETY: the kernel made this descriptor for us in `recvmsg` just now, and nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

impl AsyncRead for Reader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.socket.poll_read_ready(cx))?;
            let free = buffer.initialize_unfilled();
            if let Ok(read) = ready.try_io(|_| self.receive(free)) {
                buffer.advance(read?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

/// The writing half.
pub struct Writer {
    socket: Arc<AsyncFd<UnixStream>>,
    /// Watched for writability since a write did not fit.
    full: Option<AsyncFd<OwnedFd>>,
}

impl Writer {
    /// Writes the first bytes of `head`, with descriptors. Returns how many went out.
    pub async fn send_with_descriptors(&mut self, head: &[u8], descriptors: &[OwnedFd]) -> io::Result<usize> {
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        std::future::poll_fn(|cx| {
            self.poll_try(cx, |socket| {
                let rights = [ControlMessage::ScmRights(&raw)];
                Ok(sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(head)], &rights, MsgFlags::MSG_NOSIGNAL, None)?)
            })
        })
        .await
    }

    fn poll_try(&mut self, cx: &mut Context<'_>, mut write: impl FnMut(&UnixStream) -> io::Result<usize>) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = match &self.full {
                Some(full) => Some(ready!(full.poll_write_ready(cx))?),
                None => None,
            };
            match write(self.socket.get_ref()) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => match &mut ready {
                    Some(ready) => ready.clear_ready(),
                    None => {
                        let second = OwnedFd::from(self.socket.get_ref().try_clone()?);
                        self.full = Some(watch(second, Interest::WRITABLE)?);
                    }
                },
                other => {
                    self.full = None;
                    return Poll::Ready(other);
                }
            }
        }
    }
}

impl AsyncWrite for Writer {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_try(cx, |mut socket| socket.write(bytes))
    }
    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.poll_try(cx, |mut socket| socket.write_vectored(parts))
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.socket.get_ref().shutdown(std::net::Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn pair() -> ((Reader, Writer), (Reader, Writer)) {
        let (a, b) = tokio::net::UnixStream::pair().unwrap();
        (split(a, true).unwrap(), split(b, true).unwrap())
    }

    /// Far more than the socket holds goes through whole, both ways at once, and the watch for room is given back.
    #[tokio::test]
    async fn writes_wait_for_room() {
        let ((mut ar, mut aw), (mut br, mut bw)) = pair();
        let sent: Vec<u8> = (0..8 << 20).map(|i: u32| (i % 251) as u8).collect();
        let (mut at_b, mut at_a) = (vec![0; sent.len()], vec![0; sent.len()]);
        let (one, two, three, four) = tokio::join!(aw.write_all(&sent), bw.write_all(&sent), br.read_exact(&mut at_b), ar.read_exact(&mut at_a));
        one.and(two).unwrap();
        three.and(four).unwrap();
        assert!(at_a == sent && at_b == sent);
        aw.write_all(b"x").await.unwrap();
        assert!(aw.full.is_none());
    }

    /// A writer that waits for room is told when the other side is gone.
    #[tokio::test]
    async fn a_gone_reader_ends_a_waiting_writer() {
        let ((_ar, mut aw), (br, bw)) = pair();
        let writing = tokio::spawn(async move { aw.write_all(&vec![0; 8 << 20]).await });
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        drop((br, bw));
        assert_eq!(writing.await.unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    /// Descriptors that nobody asked for are closed, not kept.
    #[tokio::test]
    async fn unwanted_descriptors_are_closed() {
        let (a, b) = tokio::net::UnixStream::pair().unwrap();
        let ((_ar, mut aw), (mut br, _bw)) = (split(a, true).unwrap(), split(b, false).unwrap());
        let (watched, sent) = std::io::pipe().unwrap();
        aw.send_with_descriptors(b"x", &[OwnedFd::from(sent)]).await.unwrap();
        br.read_exact(&mut [0; 1]).await.unwrap();
        assert!(br.descriptors().lock().unwrap().is_empty());
        // The other end of the pipe is closed everywhere: its reader comes to the end at once.
        assert_eq!(Read::read(&mut &watched, &mut [0; 1]).unwrap(), 0);
    }

    /// Descriptors arrive with the bytes they were sent with, in order, also behind bytes that had to wait.
    #[tokio::test]
    async fn descriptors_arrive_in_order() {
        let ((_ar, mut aw), (mut br, _bw)) = pair();
        let sending = tokio::spawn(async move {
            for i in 0..100u8 {
                let file = OwnedFd::from(std::fs::File::open(if i % 2 == 0 { "/dev/null" } else { "/dev/zero" }).unwrap());
                assert_eq!(aw.send_with_descriptors(&[i], &[file]).await.unwrap(), 1);
                aw.write_all(&vec![i; 50_000]).await.unwrap();
            }
        });
        let queue = br.descriptors();
        for i in 0..100u8 {
            let mut got = vec![0; 50_001];
            br.read_exact(&mut got).await.unwrap();
            assert!(got.iter().all(|b| *b == i));
            let mut file = std::fs::File::from(queue.lock().unwrap().pop_front().unwrap());
            let read = io::Read::read(&mut file, &mut [0; 8]).unwrap();
            assert_eq!(read, if i % 2 == 0 { 0 } else { 8 });
        }
        sending.await.unwrap();
    }
}
