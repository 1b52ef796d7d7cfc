//! Object stores through opendal: `s3://` at any endpoint, and with the same code the other services.
//!
//! Layers, from the store outwards: a count of each HTTP request, timeout (per call and per piece of a body), retry with jittered
//! backoff and a limit, concurrency limit. `stat("dir")` of an object store finds only objects, so a folder is looked for as a
//! prefix. opendal's append is never used: on S3 it silently overwrites.

use crate::requests::{Request as Kind, Requests};
use crate::s3_parts::{S3Parts, S3Piece};
use crate::store::{LIST_PAGE_ENTRIES, Page, UfsEntry};
use crate::{UfsUri, fingerprint, metrics};
use bytes::{Bytes, BytesMut};
use forebay_common::limits::NAME_MAX_BYTES;
use forebay_common::{Error, ErrorKind, Result, Service, err};
use futures::{StreamExt, TryStreamExt};
use http::{Method, Request, Response};
use opendal::layers::{ConcurrentLimitLayer, RetryEvent, RetryInterceptor, RetryLayer, TimeoutLayer};
use opendal::{Buffer, HttpBody, HttpTransport, HttpTransporter, Lister, Metadata, Operator, Writer};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Options that are ours; all others are handed to opendal's service as they are.
const OWN_OPTIONS: &[&str] = &["timeout_ms", "io_timeout_ms", "retries", "concurrency"];

/// What opendal's service takes (0.59); anything else is refused by name rather than ignored.
fn options_of(service: Service) -> &'static [&'static str] {
    match service {
        Service::S3 => &[
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
        ],
        Service::Gcs => &[
            "endpoint",
            "scope",
            "service_account",
            "credential",
            "credential_path",
            "predefined_acl",
            "default_storage_class",
            "skip_signature",
            "disable_vm_metadata",
            "disable_config_load",
            "token",
        ],
        Service::Azblob => &[
            "endpoint",
            "account_name",
            "account_key",
            "encryption_key",
            "encryption_key_sha256",
            "encryption_algorithm",
            "sas_token",
            "skip_signature",
        ],
        Service::Oss => &[
            "endpoint",
            "addressing_style",
            "access_key_id",
            "access_key_secret",
            "security_token",
            "role_arn",
            "role_session_name",
            "oidc_provider_arn",
            "oidc_token_file",
            "sts_endpoint",
            "external_id",
            "server_side_encryption",
            "server_side_encryption_key_id",
            "skip_signature",
        ],
        Service::Cos => &["endpoint", "secret_id", "secret_key", "security_token", "disable_config_load"],
        Service::Obs => &["endpoint", "access_key_id", "secret_access_key"],
        Service::WebHdfs => &["user_name", "delegation", "disable_list_batch", "endpoint"],
        Service::Http | Service::Https => &["username", "password", "token"],
    }
}
/// Bytes of one part of a multipart upload.
const PART_BYTES: usize = 8 << 20;
/// Parts uploaded at once.
const PART_CONCURRENCY: usize = 4;
/// Objects of a folder copied at once when it is renamed.
const MOVE_CONCURRENCY: usize = 16;

#[derive(Clone)]
pub struct ObjectStore {
    operator: Operator,
    /// Renames without a copy; nothing there is written by us otherwise.
    read_only: Option<&'static str>,
    /// Uploads that several processes send parts of.
    parts: Option<Arc<S3Parts>>,
}

struct CountRetries(String);

impl RetryInterceptor for CountRetries {
    fn intercept(&self, event: RetryEvent<'_>) {
        metrics::RETRIES.inc();
        tracing::warn!(store = self.0, attempt = event.attempt, after = ?event.retry_after, error = words(event.err), "under store call is tried again");
    }
}

/// Counts what really goes over the wire.
struct CountRequests {
    inner: HttpTransporter,
    requests: Arc<Requests>,
}

/// What an HTTP request to an object store is for.
fn kind_of(request: &Request<Buffer>) -> Kind {
    let query = request.uri().query().unwrap_or("");
    let has = |name: &str| query.split('&').any(|part| part == name || part.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')));
    let copies = || request.headers().keys().any(|name| name.as_str().ends_with("-copy-source")) || request.uri().path().contains("/copyTo/");
    match *request.method() {
        Method::HEAD => Kind::Stat,
        Method::GET if has("list-type") || has("prefix") || has("delimiter") || query.contains("op=LISTSTATUS") => Kind::List,
        Method::GET if query.contains("op=GETFILESTATUS") => Kind::Stat,
        Method::GET => Kind::Read,
        Method::DELETE => Kind::Delete,
        Method::POST if has("delete") || has("batch") => Kind::Delete,
        _ if copies() => Kind::Copy,
        _ => Kind::Write,
    }
}

impl HttpTransport for CountRequests {
    async fn fetch(&self, request: Request<Buffer>) -> opendal::Result<Response<HttpBody>> {
        self.requests.count(kind_of(&request));
        self.inner.fetch(request).await
    }
}

fn number(options: &BTreeMap<String, String>, name: &str, default: u64) -> Result<u64> {
    match options.get(name) {
        None => Ok(default),
        Some(text) => text.parse().map_err(|_| err!(InvalidArgument, "option {name} = {text:?} is not a number")),
    }
}

/// opendal's operator for a service, where this binary was built with it.
fn operator(service: Service, map: Vec<(String, String)>) -> Result<Operator> {
    let made = match service {
        Service::S3 => Operator::from_iter::<opendal::services::S3>(map),
        #[cfg(feature = "gcs")]
        Service::Gcs => Operator::from_iter::<opendal::services::Gcs>(map),
        #[cfg(feature = "azblob")]
        Service::Azblob => Operator::from_iter::<opendal::services::Azblob>(map),
        #[cfg(feature = "oss")]
        Service::Oss => Operator::from_iter::<opendal::services::Oss>(map),
        #[cfg(feature = "cos")]
        Service::Cos => Operator::from_iter::<opendal::services::Cos>(map),
        #[cfg(feature = "obs")]
        Service::Obs => Operator::from_iter::<opendal::services::Obs>(map),
        #[cfg(feature = "webhdfs")]
        Service::WebHdfs => Operator::from_iter::<opendal::services::Webhdfs>(map),
        #[cfg(feature = "http")]
        Service::Http | Service::Https => Operator::from_iter::<opendal::services::Http>(map),
        #[allow(unreachable_patterns, reason = "which services are left depends on the features")]
        other => return Err(err!(Unsupported, "this binary was built without {}://", other.scheme())),
    };
    made.map_err(|e| err!(InvalidArgument, "{} options: {}", service.scheme(), e.message()))
}

impl ObjectStore {
    pub fn open(
        uri: &UfsUri,
        service: Service,
        container: &str,
        prefix: &str,
        options: &BTreeMap<String, String>,
        requests: Arc<Requests>,
    ) -> Result<Self> {
        let scheme = service.scheme();
        let mut map: Vec<(String, String)> = vec![("root".into(), format!("/{prefix}"))];
        match service {
            Service::Azblob => map.push(("container".into(), container.to_owned())),
            Service::WebHdfs if !options.contains_key("endpoint") => map.push(("endpoint".into(), format!("http://{container}"))),
            Service::WebHdfs => {}
            Service::Http | Service::Https => map.push(("endpoint".into(), format!("{scheme}://{container}"))),
            _ => map.push(("bucket".into(), container.to_owned())),
        }
        let known = options_of(service);
        for (name, value) in options {
            if known.contains(&name.as_str()) {
                map.push((name.clone(), value.clone()));
            } else if !OWN_OPTIONS.contains(&name.as_str()) {
                return Err(err!(InvalidArgument, "{scheme} has no option {name:?}; it takes {} and {}", OWN_OPTIONS.join(", "), known.join(", ")));
            }
        }
        let region = options.get("region").cloned().or_else(|| std::env::var("AWS_REGION").ok()).unwrap_or_else(|| "us-east-1".into());
        if service == Service::S3 && !options.contains_key("region") {
            map.push(("region".into(), region.clone()));
        }
        let parts = (service == Service::S3).then(|| S3Parts::open(container, prefix, &region, options, requests.clone())).flatten().map(Arc::new);
        // Explicitly, not by a constructor before `main` (feature auto-register-services).
        opendal::install_default();
        let operator = operator(service, map)?;
        let counting = HttpTransporter::new(CountRequests { inner: operator.context().http_transport().clone(), requests });
        let context = operator.context().with_http_transport(counting);
        let operator = operator.with_context(context);
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
        let read_only = match service {
            Service::WebHdfs => Some("webhdfs:// is only read here, because it cannot publish a file whole: mount hdfs:// to write"),
            Service::Http | Service::Https => Some("a web server is only read"),
            _ => None,
        };
        Ok(ObjectStore { operator: operator.layer(timeout).layer(retry).layer(limit), read_only, parts })
    }

    /// Errors: `ReadOnly` for a service that is only read.
    fn check_writable(&self) -> Result<()> {
        self.read_only.map_or(Ok(()), |why| Err(err!(ReadOnly, "{why}")))
    }

    fn can_list(&self) -> bool {
        self.operator.info().capability().list
    }

    pub async fn check(&self) -> Result<()> {
        if !self.can_list() {
            return Ok(());
        }
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
        if !self.can_list() {
            return Err(err!(NotFound, "no such object"));
        }
        // The limit is of one request; only the first is made.
        let mut below = self.operator.lister_with(&format!("{key}/")).limit(1).await.map_err(error)?;
        if below.next().await.transpose().map_err(error)?.is_none() { Err(err!(NotFound, "no such object")) } else { Ok(folder_entry(name)) }
    }

    pub async fn lister(&self, key: &[u8]) -> Result<ObjectLister> {
        if !self.can_list() {
            return Err(err!(Unsupported, "this kind of store cannot be listed: name the files"));
        }
        let key = text(key)?;
        let prefix = if key.is_empty() { String::new() } else { format!("{key}/") };
        let lister = self.operator.lister(if prefix.is_empty() { "/" } else { &prefix }).await.map_err(error)?;
        Ok(ObjectLister { lister, prefix, ended: false })
    }

    pub async fn read(&self, key: &[u8], offset: u64, length: usize, expected: &str) -> Result<Bytes> {
        let unmarked = fingerprint::etag(expected).is_none();
        // Without an ETag the store compares nothing for us: looked at before and after.
        if unmarked {
            self.check_version(key, expected).await?;
        }
        let bytes = self.read_range(key, offset, length, expected).await?;
        if unmarked {
            self.check_version(key, expected).await?;
        }
        Ok(bytes)
    }

    /// Errors: `FileChanged` when the object is another version now.
    async fn check_version(&self, key: &[u8], expected: &str) -> Result<()> {
        let m = self.operator.stat(text(key)?).await.map_err(error)?;
        let now = entry(b"", &m).fingerprint;
        if now == expected && m.is_file() {
            return Ok(());
        }
        Err(err!(FileChanged, "the object is another version ({now}) than the one opened ({expected}): open it again"))
    }

    async fn read_range(&self, key: &[u8], offset: u64, length: usize, expected: &str) -> Result<Bytes> {
        let key = text(key)?;
        let options = opendal::options::ReaderOptions { if_match: self.if_match(expected), ..Default::default() };
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

    fn if_match(&self, expected: &str) -> Option<String> {
        let honoured = self.operator.info().capability().read_with_if_match;
        fingerprint::etag(expected).filter(|_| honoured).map(str::to_owned)
    }

    pub async fn writer(&self, key: &[u8]) -> Result<ObjectWriter> {
        self.check_writable()?;
        let key = text(key)?.to_owned();
        let writer = self.operator.writer_with(&key).chunk(PART_BYTES).concurrent(PART_CONCURRENCY).await.map_err(error)?;
        Ok(ObjectWriter { operator: self.operator.clone(), key, writer, length: 0 })
    }

    pub fn parts(&self) -> Option<&Arc<S3Parts>> {
        self.parts.as_ref()
    }

    fn must_have_parts(&self) -> Result<&Arc<S3Parts>> {
        self.parts().ok_or_else(|| err!(Unsupported, "an object of this mount has one writer"))
    }

    pub async fn begin_parts(&self, key: &[u8]) -> Result<String> {
        self.must_have_parts()?.begin(text(key)?).await
    }

    pub fn piece(&self, key: &[u8], upload: &str, offset: u64, length: u64) -> Result<S3Piece> {
        S3Piece::new(self.must_have_parts()?.clone(), text(key)?, upload, offset, length)
    }

    /// Looked at afterwards, so that its version is what this client calls it.
    pub async fn complete_parts(&self, key: &[u8], upload: &str, tags: Vec<String>) -> Result<UfsEntry> {
        self.must_have_parts()?.complete(text(key)?, upload, tags).await?;
        self.stat(key).await
    }

    pub async fn mkdir(&self, key: &[u8]) -> Result<()> {
        self.check_writable()?;
        let key = text(key)?;
        if key.is_empty() {
            return Ok(());
        }
        self.operator.create_dir(&format!("{key}/")).await.map_err(error)
    }

    pub async fn delete(&self, key: &[u8], folder: bool) -> Result<()> {
        self.check_writable()?;
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
        self.check_writable()?;
        let (source, target) = (text(source)?, text(target)?);
        if !folder {
            return self.move_one(source, target).await;
        }
        let (from, to) = (format!("{source}/"), format!("{target}/"));
        let all = self.operator.lister_with(&from).recursive(true).await.map_err(error)?;
        let mut chunks = all.try_chunks(LIST_PAGE_ENTRIES);
        // What was copied is deleted, and nothing that appears there meanwhile.
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|e| error(e.1))?;
            let names: Vec<(String, bool)> = chunk.iter().map(|e| (e.path().to_owned(), e.metadata().is_dir())).collect();
            let copies = futures::stream::iter(names.clone().into_iter().map(Ok)).try_for_each_concurrent(MOVE_CONCURRENCY, |(path, folder)| {
                let target = format!("{to}{}", path.strip_prefix(&from).unwrap_or(""));
                let operator = self.operator.clone();
                async move {
                    if folder {
                        return operator.create_dir(&target).await.map_err(error);
                    }
                    match operator.copy(&path, &target).await {
                        Ok(_) => Ok(()),
                        // Somebody else deleted it meanwhile.
                        Err(e) if e.kind() == opendal::ErrorKind::NotFound => Ok(()),
                        Err(e) => Err(error(e)),
                    }
                }
            });
            copies.await?;
            self.operator.delete_iter(names.into_iter().map(|(path, _)| path)).await.map_err(error)?;
        }
        self.operator.delete(&from).await.map_err(error)
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
    UfsEntry { name: name.to_vec(), folder: true, ..UfsEntry::default() }
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

/// opendal's closed set of kinds as ours, with the store's own words (which name the request), and no address: those may hold
/// signatures.
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
    Error::new(kind, words(&e))
}

/// What a person needs of opendal's error: the store's words, and the status when that is all there is.
fn words(e: &opendal::Error) -> String {
    let whole = e.to_string();
    let status = whole.split_once("status: ").map(|(_, rest)| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
    let status = status.filter(|s| !s.is_empty()).map_or_else(String::new, |s| format!(" (HTTP {s})"));
    let said = if e.message().is_empty() { e.kind().to_string() } else { format!("{}: {}", e.kind(), e.message()) };
    // Addresses may hold signatures after their question mark.
    let mut out = String::new();
    let mut hidden = false;
    for c in said.chars().take(500) {
        hidden = (hidden || c == '?') && !matches!(c, ' ' | ',' | '"' | ')');
        if !hidden {
            out.push(c);
        }
    }
    out + &status
}

/// One folder being listed.
pub struct ObjectLister {
    lister: Lister,
    prefix: String,
    ended: bool,
}

impl ObjectLister {
    pub async fn next(&mut self) -> Result<Option<Page>> {
        if self.ended {
            return Ok(None);
        }
        let mut page = Page::default();
        while page.entries.len() < LIST_PAGE_ENTRIES {
            let Some(e) = self.lister.next().await else {
                self.ended = true;
                break;
            };
            let (path, m) = e.map_err(error)?.into_parts();
            if path == self.prefix || path == "/" {
                continue;
            }
            let name = path.strip_prefix(&self.prefix).unwrap_or(&path).trim_end_matches('/');
            if forebay_common::path::check_name(name.as_bytes()).is_err() || name.len() > NAME_MAX_BYTES {
                page.unshown += 1;
                continue;
            }
            page.entries.push(if m.is_dir() { folder_entry(name.as_bytes()) } else { entry(name.as_bytes(), &m) });
        }
        Ok(Some(page))
    }
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
