//! Object stores through opendal: `s3://` at any endpoint.
//!
//! Layers, from the store outwards: timeout (per call and per piece of a body), retry with jittered backoff and a limit,
//! concurrency limit. `stat("dir")` of an object store finds only objects, so a folder is looked for as a prefix.

use crate::store::{Listing, UfsEntry};
use crate::{UfsUri, fingerprint, metrics};
use bytes::{Bytes, BytesMut};
use forebay_common::limits::NAME_MAX_BYTES;
use forebay_common::{Error, ErrorKind, Result, err};
use futures::StreamExt;
use opendal::layers::{ConcurrentLimitLayer, RetryEvent, RetryInterceptor, RetryLayer, TimeoutLayer};
use opendal::{Metadata, Operator, Writer};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

/// Options that are ours; all others are handed to opendal's service as they are.
const OWN_OPTIONS: &[&str] = &["timeout_ms", "io_timeout_ms", "retries", "concurrency"];
/// What opendal's S3 service takes (0.59); anything else is refused by name rather than ignored.
const S3_OPTIONS: &[&str] = &[
    "endpoint",
    "region",
    "access_key_id",
    "secret_access_key",
    "session_token",
    "role_arn",
    "external_id",
    "role_session_name",
    "default_storage_class",
    "server_side_encryption",
    "server_side_encryption_aws_kms_key_id",
    "server_side_encryption_customer_algorithm",
    "server_side_encryption_customer_key",
    "server_side_encryption_customer_key_md5",
    "disable_config_load",
    "disable_ec2_metadata",
    "disable_list_objects_v2",
    "enable_request_payer",
    "enable_virtual_host_style",
    "skip_signature",
    "checksum_algorithm",
    "profile",
    "default_acl",
];
/// Bytes of one part of a multipart upload.
const PART_BYTES: usize = 8 << 20;
/// Parts uploaded at once.
const PART_CONCURRENCY: usize = 4;

#[derive(Clone)]
pub struct ObjectStore {
    operator: Operator,
}

struct CountRetries(String);

impl RetryInterceptor for CountRetries {
    fn intercept(&self, event: RetryEvent<'_>) {
        metrics::RETRIES.inc();
        tracing::warn!(store = self.0, attempt = event.attempt, after = ?event.retry_after, error = %event.err, "under store call is tried again");
    }
}

fn number(options: &BTreeMap<String, String>, name: &str, default: u64) -> Result<u64> {
    match options.get(name) {
        None => Ok(default),
        Some(text) => text.parse().map_err(|_| err!(InvalidArgument, "option {name} = {text:?} is not a number")),
    }
}

impl ObjectStore {
    pub fn s3(uri: &UfsUri, bucket: &str, prefix: &str, options: &BTreeMap<String, String>) -> Result<Self> {
        let mut map: Vec<(String, String)> = vec![("bucket".into(), bucket.to_owned()), ("root".into(), format!("/{prefix}"))];
        for (name, value) in options {
            if S3_OPTIONS.contains(&name.as_str()) {
                map.push((name.clone(), value.clone()));
            } else if !OWN_OPTIONS.contains(&name.as_str()) {
                return Err(err!(InvalidArgument, "s3 has no option {name:?}; it takes {} and {}", OWN_OPTIONS.join(", "), S3_OPTIONS.join(", ")));
            }
        }
        if !options.contains_key("region") {
            map.push(("region".into(), std::env::var("AWS_REGION").unwrap_or_else(|_| "us-east-1".into())));
        }
        // Explicitly, not by a constructor before `main` (feature auto-register-services).
        opendal::install_default();
        let operator = Operator::from_iter::<opendal::services::S3>(map).map_err(|e| err!(InvalidArgument, "s3 options: {}", e.message()))?;
        let timeout = TimeoutLayer::new()
            .with_timeout(Duration::from_millis(number(options, "timeout_ms", 10_000)?))
            .with_io_timeout(Duration::from_millis(number(options, "io_timeout_ms", 10_000)?));
        let retry = RetryLayer::new()
            .with_max_times(usize::try_from(number(options, "retries", 4)?).unwrap_or(4))
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(5))
            .with_jitter()
            .with_notify(CountRetries(uri.to_string()));
        let limit = ConcurrentLimitLayer::new(usize::try_from(number(options, "concurrency", 64)?.max(1)).unwrap_or(64));
        Ok(ObjectStore { operator: operator.layer(timeout).layer(retry).layer(limit) })
    }

    pub async fn check(&self) -> Result<()> {
        let mut lister = self.operator.lister_with("/").limit(1).await.map_err(error)?;
        lister.next().await.transpose().map(drop).map_err(error)
    }

    pub async fn stat(&self, key: &[u8]) -> Result<UfsEntry> {
        let key = text(key)?;
        if key.is_empty() {
            return Ok(folder_entry(b""));
        }
        let name = key.rsplit('/').next().unwrap_or(key).as_bytes();
        match self.operator.stat(key).await {
            Ok(m) if m.is_file() => return Ok(entry(name, &m)),
            Ok(_) => return Ok(folder_entry(name)),
            Err(e) if e.kind() == opendal::ErrorKind::NotFound => {}
            Err(e) => return Err(error(e)),
        }
        // The limit is of one request; only the first is made.
        let mut below = self.operator.lister_with(&format!("{key}/")).limit(1).await.map_err(error)?;
        if below.next().await.transpose().map_err(error)?.is_none() { Err(err!(NotFound, "no such object")) } else { Ok(folder_entry(name)) }
    }

    pub async fn list(&self, key: &[u8]) -> Result<Listing> {
        let key = text(key)?;
        let prefix = if key.is_empty() { String::new() } else { format!("{key}/") };
        let all = self.operator.list(if prefix.is_empty() { "/" } else { &prefix }).await.map_err(error)?;
        let mut found: BTreeMap<Vec<u8>, UfsEntry> = BTreeMap::new();
        let mut unshown = 0;
        for e in all {
            let (path, m) = e.into_parts();
            if path == prefix || path == "/" {
                continue;
            }
            let name = path.strip_prefix(&prefix).unwrap_or(&path).trim_end_matches('/');
            if forebay_common::path::check_name(name.as_bytes()).is_err() || name.len() > NAME_MAX_BYTES {
                unshown += 1;
                continue;
            }
            let new = if m.is_dir() { folder_entry(name.as_bytes()) } else { entry(name.as_bytes(), &m) };
            // An object `a` beside objects `a/…`: the object is shown, as `stat` finds it; what lies below cannot be.
            match found.entry(new.name.clone()) {
                Entry::Vacant(slot) => drop(slot.insert(new)),
                Entry::Occupied(mut slot) => {
                    unshown += 1;
                    if slot.get().folder {
                        slot.insert(new);
                    }
                }
            }
        }
        Ok(Listing { entries: found.into_values().collect(), unshown, ..Listing::default() })
    }

    pub async fn read(&self, key: &[u8], offset: u64, length: usize, expected: &str) -> Result<Bytes> {
        let key = text(key)?;
        let options = opendal::options::ReaderOptions { if_match: fingerprint::etag(expected).map(str::to_owned), ..Default::default() };
        let reader = self.operator.reader_options(key, options).await.map_err(error)?;
        let mut stream = reader.into_stream(offset..offset + length as u64).await.map_err(error)?;
        if let Some(etag) = fingerprint::etag(expected) {
            let answered = stream.metadata().await.map_err(error)?;
            if answered.etag().is_some_and(|now| now != etag) {
                return Err(err!(
                    FileChanged,
                    "the object is another version ({}) than the one opened: open it again",
                    answered.etag().unwrap_or("")
                ));
            }
        }
        let mut out = BytesMut::with_capacity(length);
        while let Some(piece) = stream.next().await {
            for part in piece.map_err(error)? {
                out.extend_from_slice(&part);
            }
        }
        if out.len() != length {
            return Err(err!(UnderStore, "body of {} bytes instead of {length}", out.len()));
        }
        Ok(out.freeze())
    }

    pub async fn writer(&self, key: &[u8]) -> Result<ObjectWriter> {
        let key = text(key)?.to_owned();
        let writer = self.operator.writer_with(&key).chunk(PART_BYTES).concurrent(PART_CONCURRENCY).await.map_err(error)?;
        Ok(ObjectWriter { operator: self.operator.clone(), key, writer, length: 0 })
    }

    pub async fn mkdir(&self, key: &[u8]) -> Result<()> {
        let key = text(key)?;
        if key.is_empty() {
            return Ok(());
        }
        self.operator.create_dir(&format!("{key}/")).await.map_err(error)
    }

    pub async fn delete(&self, key: &[u8], folder: bool) -> Result<()> {
        let key = text(key)?;
        if key.is_empty() {
            return Err(err!(InvalidArgument, "the root of a mount cannot be deleted"));
        }
        if folder {
            self.operator.delete_with(&format!("{key}/")).recursive(true).await.map_err(error)
        } else {
            self.operator.delete(key).await.map_err(error)
        }
    }

    pub async fn rename(&self, source: &[u8], target: &[u8], folder: bool) -> Result<()> {
        let (source, target) = (text(source)?, text(target)?);
        if !folder {
            return self.move_one(source, target).await;
        }
        let (from, to) = (format!("{source}/"), format!("{target}/"));
        for e in self.operator.list_with(&from).recursive(true).await.map_err(error)? {
            let rest = e.path().strip_prefix(&from).unwrap_or("");
            if e.metadata().is_dir() {
                self.operator.create_dir(&format!("{to}{rest}")).await.map_err(error)?;
            } else {
                self.move_one(e.path(), &format!("{to}{rest}")).await?;
            }
        }
        self.operator.delete_with(&from).recursive(true).await.map_err(error)
    }

    /// Copies, then deletes. Where the source is gone and the target there, a repetition after a crash has nothing to do.
    async fn move_one(&self, source: &str, target: &str) -> Result<()> {
        match self.operator.copy(source, target).await {
            Ok(_) => self.operator.delete(source).await.map_err(error),
            Err(e) if e.kind() == opendal::ErrorKind::NotFound && self.operator.exists(target).await.map_err(error)? => Ok(()),
            Err(e) => Err(error(e)),
        }
    }
}

fn text(key: &[u8]) -> Result<&str> {
    std::str::from_utf8(key).map_err(|_| err!(InvalidArgument, "names of an object store must be UTF-8"))
}

fn folder_entry(name: &[u8]) -> UfsEntry {
    UfsEntry {
        name: name.to_vec(),
        folder: true,
        length: 0,
        modified_ms: 0,
        fingerprint: String::new(),
        owner: String::new(),
        group: String::new(),
        mode: 0,
    }
}

fn entry(name: &[u8], m: &Metadata) -> UfsEntry {
    let modified_ms = m
        .last_modified()
        .map_or(0, |t| std::time::SystemTime::from(t).duration_since(std::time::UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(0)));
    UfsEntry {
        length: m.content_length(),
        modified_ms,
        fingerprint: fingerprint::of_object(m.etag(), modified_ms, m.content_length()),
        folder: false,
        ..folder_entry(name)
    }
}

/// opendal's closed set of kinds as ours. Its text names operation, path and the store's request id; never credentials.
fn error(e: opendal::Error) -> Error {
    use opendal::ErrorKind as Dal;
    let kind = match e.kind() {
        Dal::NotFound => ErrorKind::NotFound,
        Dal::PermissionDenied => ErrorKind::PermissionDenied,
        Dal::IsADirectory => ErrorKind::IsADirectory,
        Dal::NotADirectory => ErrorKind::NotADirectory,
        Dal::AlreadyExists => ErrorKind::AlreadyExists,
        Dal::ConditionNotMatch | Dal::RangeNotSatisfied => ErrorKind::FileChanged,
        Dal::ConfigInvalid => ErrorKind::InvalidArgument,
        Dal::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::UnderStore,
    };
    let text = e.to_string();
    Error::new(kind, text.chars().take(600).collect::<String>())
}

/// A multipart upload in progress, or one PUT when it is small.
pub struct ObjectWriter {
    operator: Operator,
    key: String,
    writer: Writer,
    length: u64,
}

impl ObjectWriter {
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.length += bytes.len() as u64;
        self.writer.write(bytes).await.map_err(error)
    }

    pub async fn close(&mut self) -> Result<UfsEntry> {
        let m = self.writer.close().await.map_err(error)?;
        let name = self.key.rsplit('/').next().unwrap_or("").as_bytes();
        if m.etag().is_some() {
            let modified_ms = forebay_common::clock::now_ms();
            return Ok(UfsEntry {
                length: self.length,
                modified_ms,
                fingerprint: fingerprint::of_object(m.etag(), modified_ms, self.length),
                folder: false,
                ..folder_entry(name)
            });
        }
        let m = self.operator.stat(&self.key).await.map_err(error)?;
        if m.content_length() != self.length {
            return Err(err!(FileChanged, "the object was replaced by somebody else while it was written"));
        }
        Ok(entry(name, &m))
    }

    pub async fn abort(mut self) {
        if let Err(e) = self.writer.abort().await {
            tracing::warn!(key = self.key, error = %e, "an upload could not be aborted; the store's own expiry removes its parts");
        }
    }
}
