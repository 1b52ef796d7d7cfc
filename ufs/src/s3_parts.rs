//! Multipart uploads of S3 whose parts come from several processes: one begins, others send parts, one completes.
//!
//! opendal keeps an upload's id inside one writer, so these calls are object_store's (`MultipartStore`), which is made for it. Only what both
//! clients understand alike is handed over: with any other option (a role, encryption by the customer, a storage class, virtual hosts), or without
//! an endpoint and keys of its own, a mount has one writer per object.

use crate::requests::{Request, Requests};
use bytes::Bytes;
use forebay_common::{Error, ErrorKind, Result, err};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{ClientOptions, PutPayload, RetryConfig};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// Options that mean the same to both clients, or nothing to uploads.
const UNDERSTOOD: &[&str] = &[
    "endpoint",
    "region",
    "access_key_id",
    "secret_access_key",
    "session_token",
    "skip_signature",
    "disable_config_load",
    "disable_ec2_metadata",
    "disable_list_objects_v2",
    "timeout_ms",
    "io_timeout_ms",
    "retries",
    "concurrency",
];
/// Parts of one upload, a little below what S3 allows (10,000).
const PARTS_MAX: u64 = 9_000;
/// The least bytes of a part but the last; S3 allows 5 MiB.
const PART_MIN_BYTES: u64 = 8 << 20;
/// The most: parts are held in memory. A longer object has one writer.
const PART_MAX_BYTES: u64 = 64 << 20;
/// Parts of all pieces of a mount that a process sends at once.
const PARTS_ON_THEIR_WAY: usize = 16;
/// Parts of one piece that are on their way at once.
const PARTS_AT_ONCE: usize = 4;

pub struct S3Parts {
    store: AmazonS3,
    prefix: String,
    requests: Arc<Requests>,
    /// For parts on their way.
    turns: Semaphore,
}

fn is_true(options: &BTreeMap<String, String>, name: &str) -> bool {
    options.get(name).is_some_and(|value| value == "true")
}

impl S3Parts {
    /// `None`: with these options an object has one writer.
    pub fn open(bucket: &str, prefix: &str, region: &str, options: &BTreeMap<String, String>, requests: Arc<Requests>) -> Option<S3Parts> {
        // S3 Express has another way to sign.
        if options.keys().any(|name| !UNDERSTOOD.contains(&name.as_str())) || bucket.ends_with("--x-s3") {
            return None;
        }
        let endpoint = options.get("endpoint").filter(|endpoint| endpoint.starts_with("http://") || endpoint.starts_with("https://"))?;
        let milliseconds = |name: &str, default| Duration::from_millis(options.get(name).and_then(|text| text.parse().ok()).unwrap_or(default));
        let client = ClientOptions::new()
            .with_allow_http(true)
            .with_connect_timeout(milliseconds("timeout_ms", 10_000))
            // Of a whole request, the body of a part included.
            .with_timeout(milliseconds("io_timeout_ms", 10_000) * 6);
        let retry = RetryConfig { max_retries: options.get("retries").and_then(|text| text.parse().ok()).unwrap_or(4), ..RetryConfig::default() };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_region(region)
            .with_client_options(client)
            .with_retry(retry)
            .with_endpoint(endpoint.trim_end_matches('/'));
        if is_true(options, "skip_signature") {
            builder = builder.with_skip_signature(true);
        } else {
            builder = builder.with_access_key_id(options.get("access_key_id")?).with_secret_access_key(options.get("secret_access_key")?);
            if let Some(token) = options.get("session_token") {
                builder = builder.with_token(token);
            }
        }
        let store = builder.build().map_err(|e| tracing::info!(bucket, error = %e, "objects here have one writer each")).ok()?;
        let concurrency = options.get("concurrency").and_then(|text| text.parse().ok()).unwrap_or(PARTS_ON_THEIR_WAY).clamp(1, PARTS_ON_THEIR_WAY);
        Some(S3Parts { store, prefix: prefix.trim_matches('/').to_owned(), requests, turns: Semaphore::new(concurrency) })
    }

    /// Bytes of each part but the last; `None` for a name or a length that cannot be uploaded so.
    pub fn part_bytes(&self, key: &str, length: u64) -> Option<u64> {
        self.path(key)?;
        let least = length.div_ceil(PARTS_MAX).next_multiple_of(1 << 20);
        Some(least.max(PART_MIN_BYTES)).filter(|bytes| *bytes <= PART_MAX_BYTES)
    }

    fn path(&self, key: &str) -> Option<Path> {
        let whole = if self.prefix.is_empty() { key.to_owned() } else { format!("{}/{key}", self.prefix) };
        Path::parse(&whole).ok().filter(|path| path.as_ref() == whole)
    }

    fn named(&self, key: &str) -> Result<Path> {
        self.path(key).ok_or_else(|| err!(InvalidArgument, "this name cannot be uploaded in parts"))
    }

    pub async fn begin(&self, key: &str) -> Result<String> {
        self.requests.count(Request::Write);
        self.store.create_multipart(&self.named(key)?).await.map_err(error)
    }

    pub async fn complete(&self, key: &str, upload: &str, tags: Vec<String>) -> Result<()> {
        self.requests.count(Request::Write);
        let parts = tags.into_iter().map(|content_id| PartId { content_id }).collect();
        self.store.complete_multipart(&self.named(key)?, &upload.to_owned(), parts).await.map(drop).map_err(error)
    }

    pub async fn abort(&self, key: &str, upload: &str) -> Result<()> {
        self.requests.count(Request::Delete);
        self.store.abort_multipart(&self.named(key)?, &upload.to_owned()).await.map_err(error)
    }
}

/// Some parts of an upload, in order.
pub struct S3Piece {
    parts: Arc<S3Parts>,
    path: Path,
    upload: String,
    part_bytes: u64,
    next: usize,
    gathered: Vec<Bytes>,
    gathered_bytes: u64,
    on_their_way: VecDeque<JoinHandle<Result<String>>>,
    tags: Vec<String>,
}

impl S3Piece {
    /// Errors: `InvalidArgument` for an offset within a part.
    pub fn new(parts: Arc<S3Parts>, key: &str, upload: &str, offset: u64, length: u64) -> Result<S3Piece> {
        let part_bytes = parts.part_bytes(key, length).ok_or_else(|| err!(InvalidArgument, "this name cannot be uploaded in parts"))?;
        if !offset.is_multiple_of(part_bytes) {
            return Err(err!(InvalidArgument, "a piece at {offset} does not begin with a part of {part_bytes} bytes"));
        }
        let next = usize::try_from(offset / part_bytes).unwrap_or(usize::MAX);
        let (path, upload) = (parts.named(key)?, upload.to_owned());
        Ok(S3Piece {
            parts,
            path,
            upload,
            part_bytes,
            next,
            gathered: Vec::new(),
            gathered_bytes: 0,
            on_their_way: VecDeque::new(),
            tags: Vec::new(),
        })
    }

    pub async fn write(&mut self, mut bytes: Bytes) -> Result<()> {
        while !bytes.is_empty() {
            let room = usize::try_from(self.part_bytes - self.gathered_bytes).unwrap_or(usize::MAX);
            let taken = bytes.split_to(room.min(bytes.len()));
            self.gathered_bytes += taken.len() as u64;
            self.gathered.push(taken);
            if self.gathered_bytes == self.part_bytes {
                self.send().await?;
            }
        }
        Ok(())
    }

    async fn send(&mut self) -> Result<()> {
        if self.on_their_way.len() >= PARTS_AT_ONCE {
            self.arrived().await?;
        }
        let payload: PutPayload = std::mem::take(&mut self.gathered).into_iter().collect();
        self.gathered_bytes = 0;
        let (parts, path, upload, number) = (self.parts.clone(), self.path.clone(), self.upload.clone(), self.next);
        self.next += 1;
        self.on_their_way.push_back(tokio::spawn(async move {
            let _turn = parts.turns.acquire().await;
            parts.requests.count(Request::Write);
            parts.store.put_part(&path, &upload, number, payload).await.map(|part| part.content_id).map_err(error)
        }));
        Ok(())
    }

    async fn arrived(&mut self) -> Result<()> {
        if let Some(oldest) = self.on_their_way.pop_front() {
            self.tags.push(oldest.await.map_err(|e| err!(Internal, "upload of a part: {e}"))??);
        }
        Ok(())
    }

    /// Waits for all parts; their tags, in order.
    pub async fn finish(mut self) -> Result<Vec<String>> {
        if !self.gathered.is_empty() {
            self.send().await?;
        }
        while !self.on_their_way.is_empty() {
            self.arrived().await?;
        }
        Ok(self.tags)
    }
}

/// The store's words without the address, which may hold a signature.
fn error(e: object_store::Error) -> Error {
    use object_store::Error as Store;
    let kind = match &e {
        Store::NotFound { .. } => ErrorKind::NotFound,
        Store::PermissionDenied { .. } | Store::Unauthenticated { .. } => ErrorKind::PermissionDenied,
        Store::NotSupported { .. } | Store::NotImplemented { .. } => ErrorKind::Unsupported,
        _ => ErrorKind::UnderStore,
    };
    let words: String = e.to_string().chars().take(500).collect();
    let words: Vec<&str> = words.split_whitespace().map(|word| word.split_once('?').map_or(word, |(address, _)| address)).collect();
    Error::new(kind, format!("upload in parts: {}", words.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(options: &[(&str, &str)]) -> Option<S3Parts> {
        let options = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        S3Parts::open("bucket", "a/b", "us-east-1", &options, Arc::default())
    }

    #[test]
    fn an_option_that_only_one_client_knows_leaves_one_writer() {
        let keys = [("access_key_id", "k"), ("secret_access_key", "s"), ("endpoint", "http://127.0.0.1:1"), ("disable_config_load", "true")];
        assert!(parts(&keys).is_some());
        assert!(parts(&[&keys[..], &[("role_arn", "r")]].concat()).is_none());
        assert!(parts(&keys[2..]).is_none(), "no keys");
        assert!(parts(&[&keys[2..], &[("skip_signature", "true")]].concat()).is_some());
        assert!(parts(&[&keys[..2], &[("endpoint", "host:9000")]].concat()).is_none(), "no scheme");
    }

    #[test]
    fn parts_are_few_enough() {
        let parts = parts(&[("skip_signature", "true"), ("endpoint", "http://127.0.0.1:1")]).unwrap();
        assert_eq!(parts.part_bytes("k", 1), Some(8 << 20));
        assert_eq!(parts.part_bytes("k", 5 << 40), None, "too large to be held");
        for length in [9_000 * (8 << 20) + 1, 1 << 38, 9_000 * (64 << 20)] {
            let bytes = parts.part_bytes("k", length).unwrap();
            assert!(length.div_ceil(bytes) <= PARTS_MAX && bytes.is_multiple_of(1 << 20));
        }
        assert_eq!((parts.part_bytes("a/../b", 1), parts.part_bytes("a//b", 1)), (None, None));
        assert_eq!(parts.path("x y/ü%20").unwrap().as_ref(), "a/b/x y/ü%20");
    }
}
