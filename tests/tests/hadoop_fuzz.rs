//! Both frame parsers of the Hadoop front, under what real clients sent, mutated: in this process, as fast as it goes.

use forebay_hdfs::hadoop::hdfs as wire;
use forebay_hdfs::ipc::{self, Incoming, Preamble};
use forebay_hdfs::transfer::{self, Checksum, Op, Packet};
use forebay_tests::capture::Capture;
use forebay_tests::hadoop::commands;
use forebay_tests::{Cluster, pattern, rng};
use prost::Message;
use rand::Rng;
use rand::rngs::StdRng;
use std::time::{Duration, Instant};

/// Bytes of a frame that the parser is allowed.
const FRAME_MAX_BYTES: usize = 4 << 20;

/// Bytes that are wrong in some places: flipped, cut, lengthened, joined with another recording, numbers at their ends.
fn mutate(random: &mut StdRng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut raw = corpus[random.random_range(0..corpus.len())].clone();
    for _ in 0..random.random_range(1..6) {
        if raw.is_empty() {
            break;
        }
        let at = random.random_range(0..raw.len());
        match random.random_range(0..7) {
            0 => raw[at] = random.random(),
            1 => raw[at] ^= 1 << random.random_range(0..8),
            2 => drop(raw.drain(at..(at + random.random_range(1..64)).min(raw.len()))),
            3 => drop(raw.splice(at..at, (0..random.random_range(1..64)).map(|_| random.random::<u8>()).collect::<Vec<_>>())),
            4 => raw.truncate(at),
            5 => {
                let number = [0u32, 1, 0x7f, 0x80, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff][random.random_range(0..8)].to_be_bytes();
                let end = (at + 4).min(raw.len());
                raw[at..end].copy_from_slice(&number[..end - at]);
            }
            _ => {
                let other = &corpus[random.random_range(0..corpus.len())];
                raw.truncate(at);
                raw.extend_from_slice(&other[random.random_range(0..other.len())..]);
            }
        }
    }
    raw
}

/// What the master does with a connection's bytes before it knows who that is. Returns how many frames were understood.
async fn calls(mut raw: &[u8]) -> usize {
    let Some(first) = raw.first_chunk::<{ Preamble::BYTES }>() else { return 0 };
    if Preamble::parse(first).is_err() {
        return 0;
    }
    raw = &raw[Preamble::BYTES..];
    let mut understood = 0;
    while let Ok(Some(frame)) = ipc::read_frame(&mut raw, FRAME_MAX_BYTES).await {
        let Ok(incoming) = Incoming::parse(frame) else { break };
        understood += 1;
        if let Incoming::Call(call) = incoming {
            // As its handler would.
            let _ = call.decode::<wire::GetFileInfoRequestProto>();
            let _ = call.decode::<wire::CreateRequestProto>();
            let _ = call.decode::<wire::AddBlockRequestProto>();
            let _ = call.decode::<wire::GetBlockLocationsRequestProto>();
        }
    }
    understood
}

/// What a worker does with a connection's bytes.
async fn requests(mut raw: &[u8]) -> usize {
    let mut understood = 0;
    while let Ok(Some((op, message))) = transfer::read_request(&mut raw).await {
        understood += 1;
        match op {
            Op::WriteBlock => {
                let Ok(request) = wire::OpWriteBlockProto::decode(message) else { break };
                let Ok(checksum) = Checksum::of(&request.requested_checksum) else { break };
                while let Ok(packet) = Packet::read(&mut raw).await {
                    understood += 1;
                    let chunk = checksum.chunk_bytes as u64;
                    let _ = checksum.verify(&packet.data, &packet.sums, (chunk - packet.offset % chunk) as usize);
                    if packet.last {
                        break;
                    }
                }
            }
            Op::ReadBlock => {
                let _ = wire::OpReadBlockProto::decode(message.clone());
                let _ = transfer::read_delimited::<wire::ClientReadStatusProto>(&mut raw).await;
            }
            _ => {
                let _ = wire::OpBlockChecksumProto::decode(message.clone());
                let _ = wire::OpRequestShortCircuitAccessProto::decode(message);
            }
        }
    }
    understood
}

/// (S-30) Recordings of the Java client, mutated for so many seconds each: no panic, nothing allocated that did not come.
#[tokio::test(flavor = "multi_thread")]
async fn mutated_recordings_of_real_clients() {
    let seconds = std::env::var("FOREBAY_TEST_FUZZ_SECONDS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let mut random = rng("mutated_recordings_of_real_clients");
    let cluster = Cluster::start(1, &[]).await;
    let report = cluster.client().await.report().await.unwrap();
    let worker = report.workers[0].address.clone().unwrap().hadoop_port as u16;
    let master = cluster.hadoop_address().rsplit(':').next().and_then(|p| p.parse().ok()).unwrap();
    let Some(capture) = Capture::start(&[master, worker]) else {
        println!("SKIPPED mutated_recordings_of_real_clients: what a client sends can only be recorded by root");
        return;
    };
    let local = cluster.dir.path().join("local");
    std::fs::write(&local, pattern(1, 0, 700_000)).unwrap();
    let put = local.to_string_lossy().into_owned();
    let rows = [
        &["-put", &put, "/f"][..],
        &["api", "write", "/w", "200000", "1048576", "flush"],
        &["-cat", "/w"],
        &["-checksum", "/f"],
        &["-ls", "-R", "/"],
        &["-appendToFile", &put, "/w"],
        &["-setfacl", "-m", "user:ann:rwx", "/w"],
        &["-mv", "/w", "/v"],
        &["-rm", "-r", "-skipTrash", "/v"],
    ];
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|word| (*word).to_owned()).collect()).collect();
    for done in commands(&cluster.hdfs(), &["-Ddfs.replication=1"], cluster.dir.path(), &rows) {
        assert_eq!(done.exit, 0, "{}", done.err);
    }
    let recorded = capture.end();
    let of = |port: u16| recorded.iter().filter(|(p, raw)| *p == port && !raw.is_empty()).map(|(_, raw)| raw.clone()).collect::<Vec<_>>();
    let (to_master, to_worker) = (of(master), of(worker));
    let mut understood = (0, 0);
    for raw in &to_master {
        understood.0 += calls(raw).await;
    }
    for raw in &to_worker {
        understood.1 += requests(raw).await;
    }
    assert!(understood.0 > 30 && understood.1 > 10, "the recordings are understood: {understood:?}");
    let mut tries = (0u64, 0u64);
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < deadline {
        let _ = calls(&mutate(&mut random, &to_master)).await;
        tries.0 += 1;
    }
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < deadline {
        let _ = requests(&mutate(&mut random, &to_worker)).await;
        tries.1 += 1;
    }
    // A length alone costs nothing: what comes is what is kept.
    let mut lying: &[u8] = &[0x00, 0x3f, 0xff, 0xff, 1, 2, 3];
    assert!(ipc::read_frame(&mut lying, FRAME_MAX_BYTES).await.is_err());
    eprintln!("{} connections recorded, {understood:?} frames in them; {tries:?} mutations in {seconds} s each", recorded.len());
    assert!(tries.0 > 100 && tries.1 > 20);
}
