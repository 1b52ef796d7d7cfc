//! What real clients send, off the loopback device: for corpora that nobody made up. Needs root.

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Bytes kept of one connection.
const STREAM_MAX_BYTES: usize = 4 << 20;

type Streams = HashMap<(u16, u16), BTreeMap<u32, Vec<u8>>>;

/// A capture under way.
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Streams>,
}

impl Capture {
    /// Begins to keep what is sent to these TCP ports of this machine. `None`: it may not.
    pub fn start(ports: &[u16]) -> Option<Capture> {
        let device = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll).ok()?;
        setsockopt(&device, sockopt::RcvBuf, &(16 << 20)).ok()?;
        setsockopt(&device, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(0, 100_000)).ok()?;
        let (stop, ports) = (Arc::new(AtomicBool::new(false)), ports.to_vec());
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut streams, mut raw) = (Streams::new(), vec![0; 128 << 10]);
            while !stopped.load(Ordering::Relaxed) {
                let Ok(length) = recv(device.as_raw_fd(), &mut raw, MsgFlags::empty()) else { continue };
                if let Some((from, to, number, payload)) = segment(&raw[..length])
                    && ports.contains(&to)
                    && !payload.is_empty()
                {
                    // A packet is seen twice, going out and coming in.
                    streams.entry((from, to)).or_default().entry(number).or_insert_with(|| payload.to_vec());
                }
            }
            streams
        });
        Some(Capture { stop, thread })
    }

    /// What was sent on each connection, from its beginning as far as nothing is missing, with its port.
    pub fn end(self) -> Vec<(u16, Vec<u8>)> {
        self.stop.store(true, Ordering::Relaxed);
        let streams = self.thread.join().expect("capture");
        let joined = |segments: BTreeMap<u32, Vec<u8>>| {
            let mut out: Vec<u8> = Vec::new();
            let mut next = None;
            for (number, bytes) in segments {
                if next.is_some_and(|next| next != number) || out.len() > STREAM_MAX_BYTES {
                    break;
                }
                next = Some(number.wrapping_add(bytes.len() as u32));
                out.extend(bytes);
            }
            out
        };
        streams.into_iter().map(|((_, to), segments)| (to, joined(segments))).collect()
    }
}

/// Ports, sequence number and payload of a TCP segment over IPv4.
fn segment(frame: &[u8]) -> Option<(u16, u16, u32, &[u8])> {
    let ip = frame.get(14..)?;
    if frame[12..14] != [8, 0] || ip.first()? >> 4 != 4 || *ip.get(9)? != 6 {
        return None;
    }
    let total = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
    let ip = ip.get(..total).unwrap_or(ip);
    let tcp = ip.get(usize::from(ip[0] & 15) * 4..)?;
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let number = u32::from_be_bytes([*tcp.get(4)?, *tcp.get(5)?, *tcp.get(6)?, *tcp.get(7)?]);
    Some((port(0)?, port(2)?, number, tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?))
}
