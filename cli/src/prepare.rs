//! `forebay prepare`: folders of a node belong to root; a worker in a container is somebody else.

use forebay_common::error::at;
use forebay_common::{Result, err};
use std::path::PathBuf;

/// Makes the folders, and gives them to `UID:GID`; what is in them is left alone. Errors: it is none, or this process may not.
pub fn run(owner: &str, dirs: &[PathBuf]) -> Result<()> {
    let numbers = owner.split_once(':').and_then(|(user, group)| Some((user.parse::<u32>().ok()?, group.parse::<u32>().ok()?)));
    let (user, group) = numbers.ok_or_else(|| err!(InvalidArgument, "--owner {owner}: write UID:GID, two numbers, like 1000:1000"))?;
    for dir in dirs {
        std::fs::create_dir_all(dir).map_err(at(format!("making {}", dir.display())))?;
        std::os::unix::fs::chown(dir, Some(user), Some(group))
            .map_err(at(format!("giving {} to {owner} (needs root with CAP_CHOWN)", dir.display())))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn folders_are_made_and_given_away() {
        let dir = tempfile::tempdir().unwrap();
        let own = std::fs::metadata(dir.path()).unwrap();
        let (a, b) = (dir.path().join("a/b"), dir.path().join("c"));
        run(&format!("{}:{}", own.uid(), own.gid()), &[a.clone(), b.clone()]).unwrap();
        assert!(a.is_dir() && std::fs::metadata(b).unwrap().uid() == own.uid());
        assert!(run("root", &[a]).unwrap_err().message().contains("1000:1000"));
    }
}
