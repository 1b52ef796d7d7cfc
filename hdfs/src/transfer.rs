//! Frames of DataTransferProtocol, version 28.
//!
//! A request is a version, an operation and a delimited message; its answer a delimited message. Block bytes travel in packets:
//! a length (of itself, checksums and data), the length of the header, the header, a CRC per chunk, the data; the last one of a
//! block is empty. Source: `org.apache.hadoop.hdfs.protocol.datatransfer` 3.4.1 (`Op`, `Receiver`, `PacketHeader`, `PacketReceiver`).

use crate::hadoop::hdfs::{ChecksumTypeProto, PacketHeaderProto};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use forebay_common::{Error, Result, checksum, err};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The version of the frames.
pub const VERSION: u16 = 28;
/// Bytes of one packet, as `PacketReceiver.MAX_PACKET_SIZE`.
pub const PACKET_MAX_BYTES: usize = 16 << 20;
/// Bytes of a request's message: block tokens and pipelines of a few nodes.
pub const MESSAGE_MAX_BYTES: usize = 1 << 20;
/// The sequence number of a packet that only says that somebody is there.
pub const HEARTBEAT_SEQNO: i64 = -1;

/// Operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Takes a block in.
    WriteBlock = 80,
    /// Sends a block.
    ReadBlock = 81,
    /// The checksum of a whole block.
    BlockChecksum = 85,
    /// Copies a replica to other nodes.
    TransferBlock = 86,
    /// Descriptors of a block, over a Unix socket.
    RequestShortCircuitFds = 87,
    /// A slot of shared memory is no longer used.
    ReleaseShortCircuitFds = 88,
    /// A segment of shared memory, over a Unix socket.
    RequestShortCircuitShm = 89,
}

impl Op {
    fn of(raw: u8) -> Option<Op> {
        use Op::*;
        [WriteBlock, ReadBlock, BlockChecksum, TransferBlock, RequestShortCircuitFds, ReleaseShortCircuitFds, RequestShortCircuitShm]
            .into_iter()
            .find(|op| *op as u8 == raw)
    }
}

fn broken(e: std::io::Error) -> Error {
    Error::io("reading from the peer", &e)
}

/// The next request; `None` when the peer has ended. Errors: another version, an operation that is not known.
pub async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<(Op, Bytes)>> {
    let version = match stream.read_u16().await {
        Ok(version) => version,
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(broken(e)),
    };
    if version != VERSION {
        return Err(err!(Unsupported, "DataTransferProtocol version {version}: this server speaks {VERSION}"));
    }
    let raw = stream.read_u8().await.map_err(broken)?;
    let op = Op::of(raw).ok_or_else(|| err!(Unsupported, "operation {raw} of DataTransferProtocol is not offered"))?;
    Ok(Some((op, read_delimited_bytes(stream).await?)))
}

/// A request, for whoever sends one on.
pub fn request(op: Op, message: &impl Message) -> Bytes {
    let mut out = BytesMut::with_capacity(8 + message.encoded_len());
    out.put_u16(VERSION);
    out.put_u8(op as u8);
    out.put_slice(&message.encode_length_delimited_to_vec());
    out.freeze()
}

async fn read_delimited_bytes(stream: &mut (impl AsyncRead + Unpin)) -> Result<Bytes> {
    let mut length: u64 = 0;
    for shift in (0..35).step_by(7) {
        let byte = stream.read_u8().await.map_err(broken)?;
        length |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            if length as usize > MESSAGE_MAX_BYTES {
                return Err(err!(LimitExceeded, "a message of {length} bytes, {MESSAGE_MAX_BYTES} are allowed").with_retryable(false));
            }
            let mut raw = BytesMut::zeroed(length as usize);
            stream.read_exact(&mut raw).await.map_err(broken)?;
            return Ok(raw.freeze());
        }
    }
    Err(err!(InvalidArgument, "the length of a message does not end"))
}

/// A delimited message. Errors: one that is too long, or no such message.
pub async fn read_delimited<M: Message + Default>(stream: &mut (impl AsyncRead + Unpin)) -> Result<M> {
    M::decode(read_delimited_bytes(stream).await?).map_err(|e| err!(InvalidArgument, "{e}"))
}

/// How the bytes of a packet are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// CRC32C, CRC32 or none.
    pub kind: ChecksumTypeProto,
    /// Bytes of a chunk, at least 1.
    pub chunk_bytes: usize,
}

/// Bytes of a chunk that a peer may ask for.
const CHUNK_RANGE_BYTES: std::ops::RangeInclusive<usize> = 1..=16 << 20;

impl Checksum {
    /// Errors: a chunk size that makes no sense, a type that is not known.
    pub fn of(proto: &crate::hadoop::hdfs::ChecksumProto) -> Result<Checksum> {
        let chunk_bytes = proto.bytes_per_checksum as usize;
        let kind = ChecksumTypeProto::try_from(proto.r#type).map_err(|_| err!(Unsupported, "checksum type {} is not known", proto.r#type))?;
        if !CHUNK_RANGE_BYTES.contains(&chunk_bytes) {
            return Err(err!(InvalidArgument, "{chunk_bytes} bytes per checksum are not possible"));
        }
        Ok(Checksum { kind, chunk_bytes })
    }

    /// As a message says it.
    pub fn to_proto(self) -> crate::hadoop::hdfs::ChecksumProto {
        crate::hadoop::hdfs::ChecksumProto { r#type: self.kind as i32, bytes_per_checksum: u32::try_from(self.chunk_bytes).unwrap_or(u32::MAX) }
    }

    /// Bytes of the sums of `length` bytes.
    pub fn sums_len(self, length: usize) -> usize {
        if self.kind == ChecksumTypeProto::ChecksumNull { 0 } else { length.div_ceil(self.chunk_bytes) * 4 }
    }

    fn sum(self, bytes: &[u8]) -> u32 {
        if self.kind == ChecksumTypeProto::ChecksumCrc32c { checksum::crc32c(bytes) } else { crc32fast::hash(bytes) }
    }

    /// Appends the sums of some bytes, which begin at a chunk.
    pub fn put_sums(self, bytes: &[u8], out: &mut BytesMut) {
        if self.kind != ChecksumTypeProto::ChecksumNull {
            bytes.chunks(self.chunk_bytes).for_each(|chunk| out.put_u32(self.sum(chunk)));
        }
    }

    /// Compares bytes with their sums. `first_bytes`: of the first chunk, where they begin within one. Errors: `Corrupt`.
    pub fn verify(self, mut bytes: &[u8], mut sums: &[u8], first_bytes: usize) -> Result<()> {
        if self.kind == ChecksumTypeProto::ChecksumNull {
            return Ok(());
        }
        let mut take = first_bytes;
        while !bytes.is_empty() {
            let (chunk, rest) = bytes.split_at(take.min(bytes.len()));
            if sums.len() < 4 {
                return Err(err!(Corrupt, "{} bytes came without a checksum", bytes.len()));
            }
            if self.sum(chunk) != sums.get_u32() {
                return Err(err!(Corrupt, "bytes came with a wrong checksum"));
            }
            (bytes, take) = (rest, self.chunk_bytes);
        }
        Ok(())
    }
}

/// One packet of a block.
#[derive(Clone, Debug, Default)]
pub struct Packet {
    /// Where its data belong in the block.
    pub offset: u64,
    /// Its number.
    pub seqno: i64,
    /// Nothing follows.
    pub last: bool,
    /// To be on disk before it is acknowledged.
    pub sync: bool,
    /// A sum per chunk.
    pub sums: Bytes,
    /// The data.
    pub data: Bytes,
}

impl Packet {
    /// The next packet. Errors: lengths that do not fit.
    pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Packet> {
        let payload = stream.read_u32().await.map_err(broken)? as usize;
        let header_bytes = stream.read_u16().await.map_err(broken)? as usize;
        if payload < 4 || payload + header_bytes > PACKET_MAX_BYTES {
            return Err(err!(InvalidArgument, "a packet of {payload} and a header of {header_bytes} bytes"));
        }
        let mut raw = BytesMut::with_capacity(header_bytes + payload - 4);
        let mut limited = stream.take((header_bytes + payload - 4) as u64);
        while raw.len() < header_bytes + payload - 4 {
            if limited.read_buf(&mut raw).await.map_err(broken)? == 0 {
                return Err(err!(Unavailable, "the peer ended within a packet"));
            }
        }
        let mut raw = raw.freeze();
        let header = PacketHeaderProto::decode(raw.split_to(header_bytes)).map_err(|e| err!(InvalidArgument, "packet header: {e}"))?;
        let data_bytes = usize::try_from(header.data_len).ok().filter(|n| *n <= raw.len());
        let data_bytes = data_bytes.ok_or_else(|| err!(InvalidArgument, "a packet of {payload} bytes says that {} are data", header.data_len))?;
        let offset = u64::try_from(header.offset_in_block).map_err(|_| err!(InvalidArgument, "packet at {}", header.offset_in_block))?;
        let sums = raw.split_to(raw.len() - data_bytes);
        Ok(Packet { offset, seqno: header.seqno, last: header.last_packet_in_block, sync: header.sync_block(), sums, data: raw })
    }

    /// Everything of the packet before its data.
    pub fn head(offset: u64, seqno: i64, last: bool, sync: bool, sums_len: usize, data_len: usize) -> BytesMut {
        let header = PacketHeaderProto {
            offset_in_block: offset as i64,
            seqno,
            last_packet_in_block: last,
            data_len: data_len as i32,
            sync_block: sync.then_some(true),
        };
        let mut out = BytesMut::with_capacity(6 + header.encoded_len() + sums_len);
        out.put_u32((4 + sums_len + data_len) as u32);
        out.put_u16(header.encoded_len() as u16);
        out.put_slice(&header.encode_to_vec());
        out
    }

    /// The packet as it goes over the wire, but for its data, which follow.
    pub fn encode_head(&self) -> Bytes {
        let mut out = Packet::head(self.offset, self.seqno, self.last, self.sync, self.sums.len(), self.data.len());
        out.put_slice(&self.sums);
        out.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hadoop::hdfs::ClientReadStatusProto;

    #[tokio::test]
    async fn a_packet_comes_as_it_was_sent() {
        let checksum = Checksum { kind: ChecksumTypeProto::ChecksumCrc32c, chunk_bytes: 4 };
        let data = Bytes::from_static(b"0123456789");
        let mut sums = BytesMut::new();
        checksum.put_sums(&data, &mut sums);
        let sent = Packet { offset: 8, seqno: 3, last: false, sync: true, sums: sums.freeze(), data };
        let raw = [sent.encode_head(), sent.data.clone()].concat();
        let came = Packet::read(&mut &raw[..]).await.unwrap();
        assert_eq!((came.offset, came.seqno, came.last, came.sync, &came.data), (8, 3, false, true, &sent.data));
        checksum.verify(&came.data, &came.sums, 4).unwrap();
        assert!(checksum.verify(b"0123456780", &came.sums, 4).is_err());
        assert!(checksum.verify(b"01234567890123", &came.sums, 4).is_err());
        for cut in 0..raw.len() {
            assert!(Packet::read(&mut &raw[..cut]).await.is_err());
        }
    }

    #[tokio::test]
    async fn lengths_are_looked_at_before_anything_is_allocated() {
        assert!(read_request(&mut &[0, 28, 81, 0xff, 0xff, 0xff, 0x7f][..]).await.is_err());
        assert!(read_request(&mut &[0, 28, 81, 0xff, 0xff, 0xff, 0xff, 0xff][..]).await.is_err());
        assert!(read_request(&mut &[0, 27, 81][..]).await.is_err() && read_request(&mut &[0, 28, 12][..]).await.is_err());
        assert!(read_request(&mut &[][..]).await.unwrap().is_none());
        assert!(Packet::read(&mut &[0xff; 64][..]).await.is_err());
        let raw = request(Op::ReadBlock, &ClientReadStatusProto { status: 6 });
        let (op, body) = read_request(&mut &raw[..]).await.unwrap().unwrap();
        assert_eq!((op, ClientReadStatusProto::decode(body).unwrap().status), (Op::ReadBlock, 6));
    }
}
