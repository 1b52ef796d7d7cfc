//! How what an under store holds appears here: owner, group and mode where the store has none, and the bits of a shared mount.
//!
//! Used by `sync` for what it sees, and by apply for the mount's own folder. Pure: it only reads the mount's options.

use forebay_common::{Result, err};
use forebay_proto::journal::Seen;
use forebay_proto::store::Inode;
use std::collections::HashMap;

/// The options that it is made of.
pub const OPTIONS: &[&str] = &["owner", "group", "mode", "shared"];

/// What a folder has for everybody in a shared mount, and a file besides what it lets be executed.
const SHARED_FOLDER: u32 = 0o777;
const SHARED_FILE: u32 = 0o666;

/// Of one mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Appearance {
    owner: String,
    group: String,
    /// Of folders; files get it without the execute bits. 0: 0755.
    mode: u32,
    shared: bool,
}

impl Appearance {
    /// Errors: `InvalidArgument` naming the option.
    pub fn parse(options: &HashMap<String, String>) -> Result<Appearance> {
        let mode = match options.get("mode") {
            None => 0,
            Some(raw) => u32::from_str_radix(raw, 8)
                .ok()
                .filter(|mode| (1..=0o777).contains(mode))
                .ok_or_else(|| err!(InvalidArgument, "option mode = {raw:?} is not a mode like 750"))?,
        };
        let shared = match options.get("shared").map(String::as_str) {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => return Err(err!(InvalidArgument, "option shared = {other:?} is not true or false")),
        };
        let name = |key: &str| options.get(key).cloned().unwrap_or_default();
        Ok(Appearance { owner: name("owner"), group: name("group"), mode, shared })
    }

    /// Gives an entry of the store what that has not.
    pub fn dress(&self, seen: &mut Seen) {
        if seen.owner.is_empty() {
            seen.owner.clone_from(&self.owner);
        }
        if seen.group.is_empty() {
            seen.group.clone_from(&self.group);
        }
        if seen.mode == 0 && self.mode > 0 {
            seen.mode = if seen.folder { self.mode } else { self.mode & 0o666 };
        }
        if self.shared {
            seen.mode |= if seen.folder { SHARED_FOLDER } else { SHARED_FILE };
        }
    }

    /// The mount's own folder.
    pub fn dress_folder(&self, inode: &mut Inode) {
        if !self.owner.is_empty() {
            inode.owner.clone_from(&self.owner);
        }
        if !self.group.is_empty() {
            inode.group.clone_from(&self.group);
        }
        if self.mode > 0 {
            inode.mode = self.mode;
        }
        if self.shared {
            inode.mode |= SHARED_FOLDER;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<Appearance> {
        Appearance::parse(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn what_the_store_says_counts_and_a_shared_mount_opens_it() {
        let mut seen = Seen { mode: 0o640, owner: "hive".into(), ..Seen::default() };
        of(&[("owner", "etl"), ("group", "data"), ("mode", "750")]).unwrap().dress(&mut seen);
        assert_eq!((seen.owner.as_str(), seen.group.as_str(), seen.mode), ("hive", "data", 0o640));
        let (mut file, mut folder) = (Seen::default(), Seen { folder: true, ..Seen::default() });
        let plain = of(&[("mode", "750")]).unwrap();
        plain.dress(&mut file);
        plain.dress(&mut folder);
        assert_eq!((file.mode, folder.mode), (0o640, 0o750));
        of(&[("shared", "true")]).unwrap().dress(&mut seen);
        assert_eq!(seen.mode, 0o666);
        assert!(of(&[("mode", "999")]).is_err() && of(&[("shared", "yes")]).is_err());
    }
}
