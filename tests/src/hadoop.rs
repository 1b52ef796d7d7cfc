//! Hadoop's clients: the stock shell and API by `tests/peers/hdfs/hdfs.sh commands`, and a raw client of our own that can misbehave.

use crate::Cluster;
use forebay_hdfs::client::IpcClient;
use forebay_hdfs::hadoop::hdfs as wire;
use forebay_hdfs::transfer::{self, Checksum, Op, Packet};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// What one command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Its exit code.
    pub exit: i32,
    /// What it printed.
    pub out: String,
    /// What it printed to standard error.
    pub err: String,
}

/// Runs commands of Hadoop's shell (or of `Commands.java`) in one process; each is its words.
pub fn commands(uri: &str, options: &[&str], dir: &Path, commands: &[Vec<String>]) -> Vec<Done> {
    let file = dir.join(format!("commands-{}", rand::random::<u32>()));
    let lines: String = commands.iter().map(|words| words.join("\t") + "\n").collect();
    std::fs::write(&file, lines).expect("commands");
    let mut script = Command::new("bash");
    script.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/hdfs/hdfs.sh")).arg("commands").stdin(Stdio::null());
    script.arg(format!("-Dfs.defaultFS={uri}")).args(options).arg(&file).env_remove("HADOOP_CONF_DIR");
    let output = script.output().expect("hdfs.sh");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut done = Vec::new();
    for part in text.split("### ").skip(1) {
        let (head, rest) = part.split_once('\n').expect("a line for each command");
        let exit = head.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("an exit code");
        let (out, err) = rest.split_once("\n--- err\n").expect("both outputs");
        done.push(Done { exit, out: out.trim().to_owned(), err: err.trim().to_owned() });
    }
    assert_eq!(done.len(), commands.len(), "{}\n{text}", String::from_utf8_lossy(&output.stderr));
    done
}

/// One command.
pub fn command(uri: &str, options: &[&str], dir: &Path, words: &[&str]) -> Done {
    commands(uri, options, dir, &[words.iter().map(|w| (*w).to_owned()).collect()]).remove(0)
}

/// Times, addresses and the width of columns are left out.
pub fn plain(text: &str, uri: &str, out: &Path) -> String {
    let text = text.replace(uri, "URI").replace(&*out.to_string_lossy(), "OUT");
    let mut words: Vec<String> = Vec::new();
    for line in text.lines() {
        let of_line = line.split_whitespace().map(|word| {
            let time = word.len() >= 5 && word.chars().all(|c| c.is_ascii_digit() || c == '-' || c == ':') && word.contains([':', '-']);
            if time { "TIME" } else { word }
        });
        words.push(of_line.collect::<Vec<_>>().join(" "));
    }
    words.join("\n")
}

impl Cluster {
    /// Where Hadoop's clients call the master.
    pub fn hdfs(&self) -> String {
        format!("hdfs://{}", self.hadoop_address())
    }

    /// The same without the scheme.
    pub fn hadoop_address(&self) -> String {
        let hello = self.master_hello();
        hello.split([' ', ',']).find_map(|word| word.strip_prefix("hdfs://")).expect("the master says it").to_owned()
    }
}

/// A client that speaks Hadoop's protocols itself, as one user.
pub struct Raw {
    /// Calls.
    pub rpc: IpcClient,
    /// The name under which it holds leases.
    pub name: String,
    /// Of the files it makes.
    pub block_size: u64,
}

pub use wire::op_write_block_proto::BlockConstructionStage as Stage;

/// A block being written, as far as it got.
pub struct RawBlock {
    /// Where it is.
    pub located: wire::LocatedBlockProto,
    stream: BufReader<TcpStream>,
    seqno: i64,
    /// Bytes that were acknowledged.
    pub acknowledged: u64,
}

const CHECKSUM: Checksum = Checksum { kind: wire::ChecksumTypeProto::ChecksumCrc32c, chunk_bytes: 512 };

impl Raw {
    /// Connects.
    pub async fn connect(address: &str, user: &str) -> Raw {
        let rpc = IpcClient::connect(address, user, Duration::from_secs(30)).await.expect("connect");
        Raw { rpc, name: format!("DFSClient_raw_{:x}", rand::random::<u64>()), block_size: 1 << 20 }
    }

    /// Begins a file.
    pub async fn create(&mut self, path: &str) -> forebay_common::Result<wire::HdfsFileStatusProto> {
        self.create_replicated(path, 1).await
    }

    /// Begins a file that is to be on so many workers.
    pub async fn create_replicated(&mut self, path: &str, replication: u32) -> forebay_common::Result<wire::HdfsFileStatusProto> {
        let request = wire::CreateRequestProto {
            src: path.to_owned(),
            masked: wire::FsPermissionProto { perm: 0o644 },
            client_name: self.name.clone(),
            create_flag: 3,
            create_parent: true,
            replication,
            block_size: self.block_size,
            ..wire::CreateRequestProto::default()
        };
        let answer: wire::CreateResponseProto = self.rpc.call("create", &request).await?;
        Ok(answer.fs.expect("a status"))
    }

    /// The next block.
    pub async fn add_block(&mut self, path: &str, previous: Option<wire::ExtendedBlockProto>) -> forebay_common::Result<wire::LocatedBlockProto> {
        let request =
            wire::AddBlockRequestProto { src: path.to_owned(), client_name: self.name.clone(), previous, ..wire::AddBlockRequestProto::default() };
        Ok(self.rpc.call::<wire::AddBlockResponseProto>("addBlock", &request).await?.block)
    }

    /// Goes on with a file at its end: its last block, where that is gone on with, and its length.
    pub async fn append(&mut self, path: &str, new_block: bool) -> forebay_common::Result<(Option<wire::LocatedBlockProto>, u64)> {
        let flag = 4 | if new_block { 0x20 } else { 0 };
        let request = wire::AppendRequestProto { src: path.to_owned(), client_name: self.name.clone(), flag: Some(flag) };
        let answer: wire::AppendResponseProto = self.rpc.call("append", &request).await?;
        Ok((answer.block, answer.stat.expect("a status").length))
    }

    /// A new stamp and token to go on with a block.
    pub async fn update_block(&mut self, block: &wire::ExtendedBlockProto) -> forebay_common::Result<wire::LocatedBlockProto> {
        let request = wire::UpdateBlockForPipelineRequestProto { block: block.clone(), client_name: self.name.clone() };
        Ok(self.rpc.call::<wire::UpdateBlockForPipelineResponseProto>("updateBlockForPipeline", &request).await?.block)
    }

    /// Tells which workers go on with a block.
    pub async fn update_pipeline(&mut self, old: &wire::ExtendedBlockProto, located: &wire::LocatedBlockProto) -> forebay_common::Result<()> {
        let request = wire::UpdatePipelineRequestProto {
            client_name: self.name.clone(),
            old_block: old.clone(),
            new_block: located.b.clone(),
            new_nodes: located.locs.iter().map(|node| node.id.clone()).collect(),
            storage_i_ds: Vec::new(),
        };
        self.rpc.call::<wire::UpdatePipelineResponseProto>("updatePipeline", &request).await.map(drop)
    }

    /// Goes on with a block of which `length` bytes were acknowledged.
    pub async fn go_on(&mut self, located: &wire::LocatedBlockProto, stage: Stage, length: u64) -> forebay_common::Result<RawBlock> {
        let again = wire::LocatedBlockProto { locs: located.locs.clone(), ..self.update_block(&located.b).await? };
        let request = wire::OpWriteBlockProto {
            stage: stage as i32,
            min_bytes_rcvd: length,
            latest_generation_stamp: again.b.generation_stamp,
            ..write_request(&again)
        };
        let (stream, answer) = ask(&again, Op::WriteBlock, &request).await;
        if answer.status() != wire::Status::Success {
            return Err(forebay_common::err!(Unavailable, "{}", answer.message()));
        }
        self.update_pipeline(&located.b, &again).await?;
        Ok(RawBlock { located: again, stream, seqno: 0, acknowledged: length })
    }

    /// Cuts a file.
    pub async fn truncate(&mut self, path: &str, length: u64) -> forebay_common::Result<bool> {
        let request = wire::TruncateRequestProto { src: path.to_owned(), new_length: length, client_name: self.name.clone() };
        Ok(self.rpc.call::<wire::TruncateResponseProto>("truncate", &request).await?.result)
    }

    /// Joins files to one.
    pub async fn concat(&mut self, target: &str, sources: &[String]) -> forebay_common::Result<()> {
        let request = wire::ConcatRequestProto { trg: target.to_owned(), srcs: sources.to_vec() };
        self.rpc.call::<wire::ConcatResponseProto>("concat", &request).await.map(drop)
    }

    /// Says that bytes of the last block were flushed.
    pub async fn fsync(&mut self, path: &str) -> forebay_common::Result<()> {
        let request = wire::FsyncRequestProto { src: path.to_owned(), client: self.name.clone(), last_block_length: None, file_id: None };
        self.rpc.call::<wire::FsyncResponseProto>("fsync", &request).await.map(drop)
    }

    /// Takes the lease of a file away: whether it is completed by now.
    pub async fn recover_lease(&mut self, path: &str) -> forebay_common::Result<bool> {
        let request = wire::RecoverLeaseRequestProto { src: path.to_owned(), client_name: self.name.clone() };
        Ok(self.rpc.call::<wire::RecoverLeaseResponseProto>("recoverLease", &request).await?.result)
    }

    /// Whether the file is completed.
    pub async fn complete(&mut self, path: &str, last: Option<wire::ExtendedBlockProto>) -> forebay_common::Result<bool> {
        let request = wire::CompleteRequestProto { src: path.to_owned(), client_name: self.name.clone(), last, file_id: None };
        Ok(self.rpc.call::<wire::CompleteResponseProto>("complete", &request).await?.result)
    }

    /// What there is under a name.
    pub async fn status(&mut self, path: &str) -> Option<wire::HdfsFileStatusProto> {
        let request = wire::GetFileInfoRequestProto { src: path.to_owned() };
        self.rpc.call::<wire::GetFileInfoResponseProto>("getFileInfo", &request).await.expect("status").fs
    }
}

impl RawBlock {
    /// Opens a block for writing. Errors: what the worker answered instead.
    pub async fn open(located: wire::LocatedBlockProto) -> Result<RawBlock, wire::BlockOpResponseProto> {
        let (stream, answer) = ask(&located, Op::WriteBlock, &write_request(&located)).await;
        if answer.status() != wire::Status::Success {
            return Err(answer);
        }
        Ok(RawBlock { located, stream, seqno: 0, acknowledged: 0 })
    }

    async fn packet(&mut self, data: &[u8], last: bool) -> std::io::Result<wire::Status> {
        let mut sums = bytes::BytesMut::new();
        let fill = (512 - self.acknowledged % 512) as usize % 512;
        let (first, rest) = data.split_at(fill.min(data.len()));
        CHECKSUM.put_sums(first, &mut sums);
        CHECKSUM.put_sums(rest, &mut sums);
        // The chunk that is not full yet is filled first, with a sum of what is new of it.
        let packet = Packet {
            offset: self.acknowledged,
            seqno: self.seqno,
            last,
            sync: false,
            sums: sums.freeze(),
            data: bytes::Bytes::copy_from_slice(data),
        };
        self.seqno += 1;
        self.stream.get_mut().write_all(&packet.encode_head()).await?;
        self.stream.get_mut().write_all(&packet.data).await?;
        let ack = transfer::read_delimited::<wire::PipelineAckProto>(&mut self.stream).await.map_err(std::io::Error::other)?;
        let bad = ack.reply.iter().find(|status| **status != wire::Status::Success as i32);
        let status = wire::Status::try_from(*bad.unwrap_or(&ack.reply[0])).expect("a status");
        if status == wire::Status::Success {
            self.acknowledged += data.len() as u64;
        }
        Ok(status)
    }

    /// Sends bytes and waits until they are acknowledged.
    pub async fn write(&mut self, data: &[u8]) -> std::io::Result<wire::Status> {
        self.packet(data, false).await
    }

    /// Sends the last packet; what the workers say to it.
    pub async fn end_with(mut self) -> std::io::Result<wire::Status> {
        self.packet(&[], true).await
    }

    /// Ends the block; what it is then.
    pub async fn end(mut self) -> std::io::Result<wire::ExtendedBlockProto> {
        assert_eq!(self.packet(&[], true).await?, wire::Status::Success);
        Ok(wire::ExtendedBlockProto { num_bytes: Some(self.acknowledged), ..self.located.b })
    }
}

/// The request to write a block, by a token, through all its locations.
pub fn write_request(located: &wire::LocatedBlockProto) -> wire::OpWriteBlockProto {
    wire::OpWriteBlockProto {
        header: header(located),
        targets: located.locs.iter().skip(1).cloned().collect(),
        stage: Stage::PipelineSetupCreate as i32,
        pipeline_size: u32::try_from(located.locs.len()).unwrap_or(1),
        latest_generation_stamp: located.b.generation_stamp,
        requested_checksum: CHECKSUM.to_proto(),
        ..wire::OpWriteBlockProto::default()
    }
}

/// The request to read a range of a block, by a token.
pub fn read_request(located: &wire::LocatedBlockProto, offset: u64, length: u64) -> wire::OpReadBlockProto {
    wire::OpReadBlockProto { header: header(located), offset, len: length, ..wire::OpReadBlockProto::default() }
}

fn header(located: &wire::LocatedBlockProto) -> wire::ClientOperationHeaderProto {
    let base_header = wire::BaseHeaderProto { block: located.b.clone(), token: Some(located.block_token.clone()), trace_info: None };
    wire::ClientOperationHeaderProto { base_header, client_name: "raw".to_owned() }
}

/// The data port of a block's first location.
pub fn data_address(located: &wire::LocatedBlockProto) -> String {
    let id = &located.locs[0].id;
    format!("{}:{}", id.ip_addr, id.xfer_port)
}

/// Sends a request to a block's first location; its answer, and the connection.
pub async fn ask(located: &wire::LocatedBlockProto, op: Op, request: &impl prost::Message) -> (BufReader<TcpStream>, wire::BlockOpResponseProto) {
    let stream = TcpStream::connect(data_address(located)).await.expect("worker");
    stream.set_nodelay(true).expect("TCP_NODELAY");
    let mut stream = BufReader::new(stream);
    stream.get_mut().write_all(&transfer::request(op, request)).await.expect("request");
    let answer = transfer::read_delimited(&mut stream).await.expect("an answer");
    (stream, answer)
}
