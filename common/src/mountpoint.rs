//! Folders that something is mounted on: the mount command and the CSI driver make them where they are missing.

use crate::error::{Result, at};
use std::io::ErrorKind;
use std::path::Path;

/// Makes a folder, and those above it. One that is there is not looked at: what is mounted on it may have no process (ENOTCONN), or one that does not answer for a while, and a `stat` of it would wait.
/// Errors: a folder that cannot be made.
pub fn make(dir: &Path) -> Result<()> {
    let made = match std::fs::create_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => dir.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::create_dir(dir)),
        made => made,
    };
    match made {
        Err(e) if e.kind() != ErrorKind::AlreadyExists && e.raw_os_error() != Some(nix::libc::ENOTCONN) => Err(e).map_err(at(dir.display())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn is_there_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        super::make(&deep).unwrap();
        super::make(&deep).unwrap();
        assert!(deep.is_dir());
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(super::make(&file.join("below")).unwrap_err().message().contains("file/below"));
    }
}
