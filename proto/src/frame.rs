//! The frame of the data plane: `u32` header length, `u32` body length, both little-endian, a protobuf header, raw bytes.
//!
//! Used by workers and clients, on TCP and on the Unix socket alike. Lengths are checked against
//! `limits::FRAME_*_MAX_BYTES` before anything is allocated; a frame beyond them ends the connection.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use forebay_common::limits::{FRAME_BODY_MAX_BYTES, FRAME_HEADER_MAX_BYTES};
use forebay_common::{Result, err};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes before the header.
pub const PREFIX_BYTES: usize = 8;

/// Prefix and header of a frame whose body of `body_length` bytes follows.
pub fn encode_head<M: Message>(header: &M, body_length: usize) -> Bytes {
    let header_length = header.encoded_len();
    debug_assert!(header_length <= FRAME_HEADER_MAX_BYTES && body_length <= FRAME_BODY_MAX_BYTES);
    let mut out = BytesMut::with_capacity(PREFIX_BYTES + header_length);
    out.put_u32_le(header_length as u32);
    out.put_u32_le(body_length as u32);
    header.encode_raw(&mut out);
    out.freeze()
}

/// Header and body lengths of a prefix. Errors: `InvalidArgument` beyond the limits.
pub fn decode_prefix(mut prefix: &[u8]) -> Result<(usize, usize)> {
    if prefix.len() < PREFIX_BYTES {
        return Err(err!(InvalidArgument, "frame prefix of {} bytes", prefix.len()));
    }
    let (header, body) = (prefix.get_u32_le() as usize, prefix.get_u32_le() as usize);
    if header > FRAME_HEADER_MAX_BYTES || body > FRAME_BODY_MAX_BYTES {
        return Err(err!(
            InvalidArgument,
            "frame of {header} + {body} bytes is larger than the limits of {FRAME_HEADER_MAX_BYTES} + {FRAME_BODY_MAX_BYTES}: is this port the worker's data port?"
        ));
    }
    Ok((header, body))
}

/// Reads one frame; `None` at a clean end. The body's memory is its own, no larger than the body.
///
/// Errors: `Unavailable` when the peer goes away inside a frame, `InvalidArgument` for a malformed one.
pub async fn read<M: Message + Default, R: AsyncRead + Unpin>(reader: &mut R) -> Result<Option<(M, Bytes)>> {
    let mut prefix = [0u8; PREFIX_BYTES];
    match reader.read_exact(&mut prefix).await {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(forebay_common::Error::io("reading a frame", &e)),
    }
    let (header_length, body_length) = decode_prefix(&prefix)?;
    let mut header = vec![0u8; header_length];
    reader.read_exact(&mut header).await.map_err(forebay_common::error::at("reading a frame's header"))?;
    let mut body = BytesMut::with_capacity(body_length);
    while body.len() < body_length {
        let missing = body_length - body.len();
        let mut limited = (&mut body).limit(missing);
        if reader.read_buf(&mut limited).await.map_err(forebay_common::error::at("reading a frame's body"))? == 0 {
            return Err(err!(Unavailable, "connection closed inside a frame"));
        }
    }
    let header = M::decode(header.as_slice()).map_err(|e| err!(InvalidArgument, "frame header: {e}"))?;
    Ok(Some((header, body.freeze())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CloseGrant, DataRequest, data_request::Op};

    /// Golden: the bytes of a frame are a wire format.
    #[tokio::test]
    async fn golden_frame_round_trips() {
        let request = DataRequest { id: 5, op: Some(Op::CloseGrant(CloseGrant { grant_id: 300 })) };
        let mut wire = encode_head(&request, 3).to_vec();
        wire.extend_from_slice(b"abc");
        assert_eq!(wire, [7, 0, 0, 0, 3, 0, 0, 0, 0x08, 5, 0x32, 3, 0x08, 0xac, 0x02, b'a', b'b', b'c']);
        let mut cursor = wire.as_slice();
        let (back, body) = read::<DataRequest, _>(&mut cursor).await.unwrap().unwrap();
        assert_eq!((back, &body[..]), (request, &b"abc"[..]));
        assert!(read::<DataRequest, _>(&mut cursor).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn refuses_before_allocating() {
        let mut wire: &[u8] = &[0xff; 64];
        assert!(read::<DataRequest, _>(&mut wire).await.is_err());
        let mut cut: &[u8] = &[7, 0, 0, 0, 3, 0, 0, 0, 0x08];
        assert!(read::<DataRequest, _>(&mut cut).await.is_err());
    }
}
