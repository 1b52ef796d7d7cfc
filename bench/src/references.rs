//! The same things without us: what the machine can do, measured in the same run.

use crate::figure::Times;
use forebay_common::error::at;
use forebay_common::{Result, err};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Free memory that is touched before something is measured that takes new memory.
const WARMED_BYTES: u64 = 3 << 30;

/// Has the host of a virtual machine give it memory, as much as may be needed and not more than half of what is free, and
/// frees it again. Where a host takes back what is free for two seconds (free page reporting), the first touch of a page
/// runs at about 0.5 GiB/s and any later one at 10: that is the host's time, and what follows at once is measured without it.
pub fn warm_memory() {
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        kib.trim().trim_end_matches(" kB").parse::<u64>().ok()
    });
    let bytes = available.map_or(0, |kib| kib * 512).min(WARMED_BYTES);
    // Not from the allocator, which would keep it.
    let Ok(mut memory) = memmap2::MmapMut::map_anon(usize::try_from(bytes).unwrap_or(0).max(1)) else { return };
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
}

/// MiB/s of 1 MiB `pread`s over a whole file.
pub fn pread_sequential(file: &File, bytes: u64) -> Result<f64> {
    let mut buffer = vec![0u8; 1 << 20];
    let started = Instant::now();
    let mut at_byte = 0;
    while at_byte < bytes {
        let n = file.read_at(&mut buffer, at_byte).map_err(at("reference pread"))?;
        if n == 0 {
            return Err(err!(Internal, "the reference file ends early"));
        }
        std::hint::black_box(&buffer[..n]);
        at_byte += n as u64;
    }
    Ok(bytes as f64 / (1 << 20) as f64 / started.elapsed().as_secs_f64())
}

/// Times of 4 KiB `pread`s at random places.
pub fn pread_random(file: &File, offsets: &[u64]) -> Result<Times> {
    let mut buffer = [0u8; 4096];
    let mut times = Times::new();
    for offset in offsets {
        let started = Instant::now();
        file.read_exact_at(&mut buffer, *offset).map_err(at("reference pread"))?;
        times.add(started.elapsed());
        std::hint::black_box(&buffer);
    }
    Ok(times)
}

/// MiB/s and CPU seconds per GiB (both ends) of a raw TCP stream over loopback.
pub fn tcp_stream(bytes: u64) -> Result<(f64, f64)> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(at("reference socket"))?;
    let address = listener.local_addr().map_err(at("reference socket"))?;
    let sender = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut socket, _) = listener.accept()?;
        let buffer = vec![7u8; 1 << 20];
        let mut left = bytes;
        while left > 0 {
            let take = left.min(buffer.len() as u64) as usize;
            socket.write_all(&buffer[..take])?;
            left -= take as u64;
        }
        Ok(())
    });
    let mut socket = TcpStream::connect(address).map_err(at("reference socket"))?;
    let mut buffer = vec![0u8; 1 << 20];
    let cpu = own_cpu();
    let started = Instant::now();
    let mut got = 0;
    while got < bytes {
        let n = socket.read(&mut buffer).map_err(at("reference socket"))?;
        if n == 0 {
            break;
        }
        got += n as u64;
    }
    let took = started.elapsed().as_secs_f64();
    sender.join().map_err(|_| err!(Internal, "reference sender"))?.map_err(at("reference sender"))?;
    Ok((bytes as f64 / (1 << 20) as f64 / took, (own_cpu() - cpu) * (1u64 << 30) as f64 / bytes as f64))
}

/// User and system seconds of this process.
pub fn own_cpu() -> f64 {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF);
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    usage.map_or(0.0, |u| seconds(u.user_time()) + seconds(u.system_time()))
}

/// Times of asking for 4 KiB over loopback TCP and getting them.
pub fn tcp_round_trips(count: usize) -> Result<Times> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(at("reference socket"))?;
    let address = listener.local_addr().map_err(at("reference socket"))?;
    let server = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut socket, _) = listener.accept()?;
        socket.set_nodelay(true)?;
        let (mut ask, answer) = ([0u8; 64], [7u8; 4096]);
        while socket.read_exact(&mut ask).is_ok() {
            socket.write_all(&answer)?;
        }
        Ok(())
    });
    let mut socket = TcpStream::connect(address).map_err(at("reference socket"))?;
    socket.set_nodelay(true).map_err(at("reference socket"))?;
    let (ask, mut answer) = ([0u8; 64], [0u8; 4096]);
    let mut times = Times::new();
    for _ in 0..count {
        let started = Instant::now();
        socket.write_all(&ask).map_err(at("reference socket"))?;
        socket.read_exact(&mut answer).map_err(at("reference socket"))?;
        times.add(started.elapsed());
    }
    drop(socket);
    server.join().map_err(|_| err!(Internal, "reference server"))?.map_err(at("reference server"))?;
    Ok(times)
}

/// Times of asking over a Unix socket and being handed two descriptors.
pub fn descriptor_round_trips(count: usize) -> Result<Times> {
    let (mut ours, theirs) = UnixStream::pair().map_err(at("reference socket"))?;
    let server = std::thread::spawn(move || -> std::io::Result<()> {
        let (data, head) = (File::open("/proc/self/exe")?, File::open("/proc/self/exe")?);
        let mut ask = [0u8; 64];
        let mut socket = theirs;
        while socket.read_exact(&mut ask).is_ok() {
            let raw: [RawFd; 2] = [data.as_raw_fd(), head.as_raw_fd()];
            sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&[1; 32])], &[ControlMessage::ScmRights(&raw)], MsgFlags::empty(), None)?;
        }
        Ok(())
    });
    let mut times = Times::new();
    for _ in 0..count {
        let started = Instant::now();
        ours.write_all(&[0; 64]).map_err(at("reference socket"))?;
        let mut answer = [0u8; 32];
        let mut space = nix::cmsg_space!([RawFd; 2]);
        let received = {
            let mut parts = [IoSliceMut::new(&mut answer)];
            let message = recvmsg::<()>(ours.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
                .map_err(|e| forebay_common::Error::io("recvmsg", &e.into()))?;
            let control: Vec<_> = message.cmsgs().map_err(|e| forebay_common::Error::io("recvmsg", &e.into()))?.collect();
            control
        };
        times.add(started.elapsed());
        for control in received {
            if let ControlMessageOwned::ScmRights(raw) = control {
                for fd in raw {
                    nix::unistd::close(fd).map_err(|e| forebay_common::Error::io("close", &e.into()))?;
                }
            }
        }
    }
    drop(ours);
    server.join().map_err(|_| err!(Internal, "reference server"))?.map_err(at("reference server"))?;
    Ok(times)
}

/// Times of appending 200 bytes to a file and making them durable.
pub fn fdatasync(dir: &std::path::Path, count: usize) -> Result<Times> {
    let path = dir.join(format!(".forebay-bench-sync-{}", std::process::id()));
    let mut file = File::create(&path).map_err(at(path.display()))?;
    let mut times = Times::new();
    for _ in 0..count {
        let started = Instant::now();
        file.write_all(&[7; 200]).and_then(|()| file.sync_data()).map_err(at("fdatasync"))?;
        times.add(started.elapsed());
    }
    let _ = std::fs::remove_file(&path);
    Ok(times)
}

/// A rate of operations.
pub fn per_second(count: usize, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64().max(1e-9)
}
