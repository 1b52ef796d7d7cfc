//! Fingerprints: one string per version of an object, compared for equality and nothing else.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

/// Of a file: device, inode, change time in nanoseconds, length.
pub fn of_file(m: &Metadata) -> String {
    format!("{:x}-{:x}-{:x}.{:09}-{:x}", m.dev(), m.ino(), m.ctime(), m.ctime_nsec(), m.len())
}

/// Of an object: its ETag, or where the store has none its modification time; with its length.
pub fn of_object(etag: Option<&str>, modified_ms: u64, length: u64) -> String {
    match etag {
        Some(etag) => format!("etag:{etag}:{length:x}"),
        None => format!("mtime:{modified_ms:x}:{length:x}"),
    }
}

/// The ETag in a fingerprint, for `If-Match`.
pub fn etag(fingerprint: &str) -> Option<&str> {
    fingerprint.strip_prefix("etag:")?.rsplit_once(':').map(|(etag, _)| etag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etag_comes_back() {
        assert_eq!(etag(&of_object(Some("\"a:b-2\""), 1, 2)), Some("\"a:b-2\""));
        assert_eq!(etag(&of_object(None, 1, 2)), None);
    }
}
