//! What a worker answers: the bytes of files, streamed.

use crate::Call;
use crate::names::PATH;
use crate::reply::Refusal;
use axum::body::Body;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use forebay_client::CreateOptions;
use forebay_common::{ErrorKind, counter, err};
use futures::{StreamExt, stream};
use percent_encoding::utf8_percent_encode;

counter!(READ, "forebay_webhdfs_read_bytes_total", "bytes of files sent over WebHDFS");
counter!(WRITTEN, "forebay_webhdfs_written_bytes_total", "bytes of files taken in over WebHDFS");

/// Bytes of one piece of an answer.
const PIECE_BYTES: usize = 1 << 20;

/// A range of a file. Once it has begun an error can only break the connection, which a client notices by the length.
pub async fn open(call: Call<'_>) -> Result<Response, Refusal> {
    let file = call.fs.open(&call.path).await.map_err(Refusal::of)?;
    let offset = call.params.number("offset")?.unwrap_or(0);
    if offset > file.length() {
        return Err(Refusal::io(format!("Offset={offset} out of the range [0, {}); OPEN, path={}", file.length(), call.path)));
    }
    let length = call.params.number("length")?.unwrap_or(u64::MAX).min(file.length() - offset);
    let end = offset + length;
    let pieces = stream::try_unfold((file, offset), move |(file, at)| async move {
        if at >= end {
            return Ok(None);
        }
        let wanted = PIECE_BYTES.min(usize::try_from(end - at).unwrap_or(PIECE_BYTES));
        let piece = file.slice(at, wanted).await?;
        if piece.is_empty() {
            return Err(err!(Corrupt, "the file ends at {at}, before its length"));
        }
        READ.inc_by(piece.len() as u64);
        let next = at + piece.len() as u64;
        Ok(Some((piece, (file, next))))
    });
    let logged = pieces.inspect(|piece: &Result<_, forebay_common::Error>| {
        if let Err(e) = piece {
            tracing::warn!(error = %e, "a file could not be sent to its end");
        }
    });
    let headers = [("content-type", "application/octet-stream".to_owned()), ("content-length", length.to_string())];
    Ok((StatusCode::OK, headers, Body::from_stream(logged)).into_response())
}

/// A new file, of all that comes. What does not come to its end leaves no file.
pub async fn create(call: Call<'_>, body: Body) -> Result<Response, Refusal> {
    let options = CreateOptions {
        overwrite: call.params.flag("overwrite", false)?,
        recursive: call.params.flag("createparent", true)?,
        mode: call.params.mode()?.unwrap_or(0o644),
        block_size_bytes: call.params.number("blocksize")?.unwrap_or(0),
        ..CreateOptions::default()
    };
    let made = call.fs.create(&call.path, &options).await;
    let mut writer = made.map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => Refusal::of(err!(AlreadyExists, "{} already exists", call.path)),
        _ => Refusal::of(e),
    })?;
    let mut pieces = body.into_data_stream();
    let taken = async {
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|e| err!(Unavailable, "the client ended in the middle of {}: {e}", call.path))?;
            writer.write(&piece).await?;
            WRITTEN.inc_by(piece.len() as u64);
        }
        Ok::<(), forebay_common::Error>(())
    };
    if let Err(e) = taken.await {
        writer.abort().await;
        return Err(Refusal::of(e));
    }
    writer.close().await.map_err(Refusal::of)?;
    let location = format!("/webhdfs/v1{}", utf8_percent_encode(&String::from_utf8_lossy(call.path.as_bytes()), PATH));
    Ok((StatusCode::CREATED, [("location", location)]).into_response())
}
