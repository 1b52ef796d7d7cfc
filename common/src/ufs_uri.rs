//! `UfsUri`: `s3://bucket/prefix`, `hdfs://name-service/folder`, `file:///folder`, and the other object stores. How they are written, not how they are reached: that is `forebay-ufs`.

use crate::{Result, err};
use std::fmt;

/// A service reached through opendal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Service {
    /// Amazon S3 and what speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azblob,
    /// Alibaba Cloud OSS.
    Oss,
    /// Tencent Cloud COS.
    Cos,
    /// Huawei Cloud OBS.
    Obs,
    /// HDFS over HTTP; read only.
    WebHdfs,
    /// Files of a web server; read only, and not listed.
    Http,
    /// The same, encrypted.
    Https,
}

impl Service {
    /// All of them.
    pub const ALL: [Service; 9] =
        [Service::S3, Service::Gcs, Service::Azblob, Service::Oss, Service::Cos, Service::Obs, Service::WebHdfs, Service::Http, Service::Https];

    /// Its scheme in our addresses.
    pub const fn scheme(self) -> &'static str {
        match self {
            Service::S3 => "s3",
            Service::Gcs => "gs",
            Service::Azblob => "az",
            Service::Oss => "oss",
            Service::Cos => "cos",
            Service::Obs => "obs",
            Service::WebHdfs => "webhdfs",
            Service::Http => "http",
            Service::Https => "https",
        }
    }

    /// From a scheme as people write it.
    fn of(scheme: &str) -> Option<Service> {
        match scheme {
            "s3a" | "s3n" => Some(Service::S3),
            "gcs" => Some(Service::Gcs),
            "azblob" => Some(Service::Azblob),
            "cosn" => Some(Service::Cos),
            other => Service::ALL.into_iter().find(|s| s.scheme() == other),
        }
    }

    /// Whether what comes first is a host rather than a bucket.
    fn has_host(self) -> bool {
        matches!(self, Service::WebHdfs | Service::Http | Service::Https)
    }
}

/// A parsed and normalised under-store address. Never holds credentials.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum UfsUri {
    /// A folder of a file system of the machine.
    File {
        /// Absolute, without a trailing `/`.
        root: String,
    },
    /// A folder of an HDFS.
    Hdfs {
        /// `host:port`, a name service of the Hadoop configuration, or empty for its `fs.defaultFS`.
        authority: String,
        /// Absolute, without a trailing `/` unless it is `/`.
        root: String,
    },
    /// A bucket, a container, a host; or a prefix of one.
    Object {
        /// The service.
        service: Service,
        /// The bucket, container or host.
        container: String,
        /// The prefix without slashes at its ends; may be empty.
        prefix: String,
    },
}

impl UfsUri {
    /// Errors: `InvalidArgument` for a relative folder, or credentials inside the address; `Unsupported` for another scheme.
    pub fn parse(raw: &str) -> Result<Self> {
        let known = "write s3://BUCKET/PREFIX, hdfs://HOST:PORT/FOLDER or file:///FOLDER";
        if raw.starts_with('/') {
            return UfsUri::parse(&format!("file://{raw}"));
        }
        let Some((scheme, rest)) = raw.split_once("://") else {
            return Err(err!(InvalidArgument, "under store {raw:?} has no scheme: {known}"));
        };
        if rest.split('/').any(|part| part == "..") {
            return Err(err!(InvalidArgument, "under store {raw:?} holds a .. : {known}"));
        }
        let (first, path) = rest.split_once('/').unwrap_or((rest, ""));
        if first.contains('@') {
            return Err(err!(InvalidArgument, "{scheme} address with credentials in it: give them as --option KEY=VALUE"));
        }
        match (scheme, Service::of(scheme)) {
            ("file", _) if rest.starts_with('/') => Ok(UfsUri::File { root: format!("/{}", rest.trim_matches('/')) }),
            ("file", _) => Err(err!(InvalidArgument, "under store {raw:?} is not an absolute folder: {known}")),
            ("hdfs", _) => Ok(UfsUri::Hdfs { authority: first.to_owned(), root: format!("/{}", path.trim_matches('/')) }),
            (_, Some(service)) => {
                if first.is_empty() || (!service.has_host() && first.contains(':')) {
                    let what = if service.has_host() { "a host" } else { "a plain bucket name" };
                    return Err(err!(InvalidArgument, "{scheme} address without {what}: {known}; what else it needs goes into --option KEY=VALUE"));
                }
                Ok(UfsUri::Object { service, container: first.to_owned(), prefix: path.trim_matches('/').to_owned() })
            }
            (other, None) => {
                let all = Service::ALL.map(Service::scheme).join("://, ");
                Err(err!(Unsupported, "under store scheme {other:?} is not known: there are file://, hdfs://, {all}://"))
            }
        }
    }

    /// The whole address of a key below this root, for people.
    pub fn join(&self, key: &[u8]) -> String {
        let base = self.to_string();
        if key.is_empty() { base } else { format!("{}/{}", base.trim_end_matches('/'), String::from_utf8_lossy(key)) }
    }

    /// The key below this root of an object of a bucket, if it lies there.
    pub fn key_of(&self, bucket: &str, object: &str) -> Option<String> {
        let UfsUri::Object { container, prefix, .. } = self else { return None };
        let below = if prefix.is_empty() { Some(object) } else { object.strip_prefix(prefix.as_str()).and_then(|rest| rest.strip_prefix('/')) };
        (container == bucket).then_some(below).flatten().map(str::to_owned)
    }
}

impl fmt::Display for UfsUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UfsUri::File { root } => write!(f, "file://{root}"),
            UfsUri::Hdfs { authority, root } => write!(f, "hdfs://{authority}{root}"),
            UfsUri::Object { service, container, prefix } if prefix.is_empty() => write!(f, "{}://{container}", service.scheme()),
            UfsUri::Object { service, container, prefix } => write!(f, "{}://{container}/{prefix}", service.scheme()),
        }
    }
}

impl fmt::Debug for UfsUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_refuses() {
        assert_eq!(UfsUri::parse("s3a://b/p/q/").unwrap().to_string(), "s3://b/p/q");
        assert_eq!(UfsUri::parse("/data/x/").unwrap().to_string(), "file:///data/x");
        assert_eq!(UfsUri::parse("s3://b").unwrap().join(b"k/l"), "s3://b/k/l");
        assert_eq!(UfsUri::parse("hdfs://h:8020").unwrap().join(b"k"), "hdfs://h:8020/k");
        assert_eq!(UfsUri::parse("hdfs:///w/x/").unwrap().to_string(), "hdfs:///w/x");
        assert_eq!(UfsUri::parse("gcs://b/p").unwrap().to_string(), "gs://b/p");
        assert_eq!(UfsUri::parse("http://h:80/p").unwrap().to_string(), "http://h:80/p");
        for bad in ["b/p", "s3:///p", "s3://key:secret@b/p", "file://rel", "ftp://h/p", "file:///a/../b", "hdfs://u@h:1/", "s3://b:80/p", "http:///x"]
        {
            assert!(UfsUri::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn objects_of_a_bucket_have_keys() {
        let uri = UfsUri::parse("s3://b/p").unwrap();
        assert_eq!(uri.key_of("b", "p/x/y").as_deref(), Some("x/y"));
        assert_eq!((uri.key_of("b", "px/y"), uri.key_of("c", "p/x")), (None, None));
        assert_eq!(UfsUri::parse("s3://b").unwrap().key_of("b", "x").as_deref(), Some("x"));
    }
}
