//! `UfsUri`: `s3://bucket/prefix`, `file:///folder`.

use forebay_common::{Result, err};
use std::fmt;

/// A parsed and normalised under-store address. Never holds credentials.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum UfsUri {
    /// A folder of a file system of the machine.
    File {
        /// Absolute, without a trailing `/`.
        root: String,
    },
    /// A bucket, or a prefix of one.
    S3 {
        /// The bucket.
        bucket: String,
        /// The prefix without slashes at its ends; may be empty.
        prefix: String,
    },
}

impl UfsUri {
    /// Errors: `InvalidArgument` for another scheme, a relative folder, credentials inside the address.
    pub fn parse(raw: &str) -> Result<Self> {
        let known = "write s3://BUCKET/PREFIX or file:///FOLDER";
        if raw.starts_with('/') {
            return UfsUri::parse(&format!("file://{raw}"));
        }
        let Some((scheme, rest)) = raw.split_once("://") else {
            return Err(err!(InvalidArgument, "under store {raw:?} has no scheme: {known}"));
        };
        if rest.split('/').any(|part| part == "..") {
            return Err(err!(InvalidArgument, "under store {raw:?} holds a .. : {known}"));
        }
        match scheme {
            "file" if rest.starts_with('/') => {
                let root = format!("/{}", rest.trim_matches('/'));
                Ok(UfsUri::File { root })
            }
            "s3" | "s3a" | "s3n" => {
                let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                if bucket.is_empty() || bucket.contains('@') || bucket.contains(':') {
                    return Err(err!(
                        InvalidArgument,
                        "s3 address without a plain bucket name: {known}, with credentials as --option access_key_id=…"
                    ));
                }
                Ok(UfsUri::S3 { bucket: bucket.to_owned(), prefix: prefix.trim_matches('/').to_owned() })
            }
            "file" => Err(err!(InvalidArgument, "under store {raw:?} is not an absolute folder: {known}")),
            other => Err(err!(Unsupported, "under store scheme {other:?} is not built in yet: {known}")),
        }
    }

    /// The whole address of a key below this root, for people.
    pub fn join(&self, key: &[u8]) -> String {
        let base = self.to_string();
        if key.is_empty() { base } else { format!("{}/{}", base.trim_end_matches('/'), String::from_utf8_lossy(key)) }
    }
}

impl fmt::Display for UfsUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UfsUri::File { root } => write!(f, "file://{root}"),
            UfsUri::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            UfsUri::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
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
        for bad in ["b/p", "s3:///p", "s3://key:secret@b/p", "file://rel", "ftp://h/p", "file:///a/../b"] {
            assert!(UfsUri::parse(bad).is_err(), "{bad}");
        }
    }
}
