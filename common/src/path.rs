//! `AbsPath`: a path of the namespace that has been checked once and is trusted afterwards.
//!
//! Names are bytes (Linux programs have such names), without NUL and `/`, at most `NAME_MAX_BYTES` each. `.` and `..`
//! are refused rather than resolved: the path that is authorised is the path that was typed. Empty components
//! (`//`, a trailing `/`) are dropped.

use crate::limits::{NAME_MAX_BYTES, PATH_MAX_BYTES, PATH_MAX_DEPTH};
use crate::{Result, err};
use std::fmt;

/// An absolute, validated path. `/` has no components.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AbsPath(Vec<u8>);

impl AbsPath {
    /// `/`.
    pub fn root() -> Self {
        AbsPath(b"/".to_vec())
    }

    /// Checks and normalises. Errors: `InvalidArgument` (not absolute, `.` or `..`, NUL), `NameTooLong`.
    pub fn parse(raw: impl AsRef<[u8]>) -> Result<Self> {
        let raw = raw.as_ref();
        let shown = || String::from_utf8_lossy(&raw[..raw.len().min(200)]).into_owned();
        if raw.first() != Some(&b'/') {
            return Err(err!(InvalidArgument, "path {:?} is not absolute: start it with /", shown()));
        }
        if raw.len() > PATH_MAX_BYTES {
            return Err(err!(NameTooLong, "path of {} bytes is longer than the limit of {PATH_MAX_BYTES}", raw.len()));
        }
        let mut out = Vec::with_capacity(raw.len());
        let mut depth = 0;
        for name in raw.split(|b| *b == b'/').filter(|n| !n.is_empty()) {
            check_name(name).map_err(|e| e.context(format!("path {:?}", shown())))?;
            out.push(b'/');
            out.extend_from_slice(name);
            depth += 1;
        }
        if depth > PATH_MAX_DEPTH {
            return Err(err!(NameTooLong, "path has {depth} components, more than the limit of {PATH_MAX_DEPTH}"));
        }
        if out.is_empty() {
            out.push(b'/');
        }
        Ok(AbsPath(out))
    }

    /// The bytes, always starting with `/` and never ending with one but for `/` itself.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is `/`.
    pub fn is_root(&self) -> bool {
        self.0.len() == 1
    }

    /// The names from the top down; none for `/`.
    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|b| *b == b'/').filter(|n| !n.is_empty())
    }

    /// The last name; `None` for `/`.
    pub fn name(&self) -> Option<&[u8]> {
        if self.is_root() { None } else { self.0.rsplit(|b| *b == b'/').next() }
    }

    /// The folder above; `None` for `/`.
    pub fn parent(&self) -> Option<AbsPath> {
        if self.is_root() {
            return None;
        }
        let cut = self.0.iter().rposition(|b| *b == b'/').unwrap_or(0);
        Some(if cut == 0 { AbsPath::root() } else { AbsPath(self.0[..cut].to_vec()) })
    }

    /// This path with one more name.
    pub fn join(&self, name: &[u8]) -> Result<AbsPath> {
        check_name(name)?;
        let mut out = if self.is_root() { Vec::new() } else { self.0.clone() };
        out.push(b'/');
        out.extend_from_slice(name);
        if out.len() > PATH_MAX_BYTES {
            return Err(err!(NameTooLong, "path of {} bytes is longer than the limit of {PATH_MAX_BYTES}", out.len()));
        }
        Ok(AbsPath(out))
    }

    /// What follows `prefix` (without a leading `/`), if this path is `prefix` or below it.
    pub fn strip_prefix(&self, prefix: &AbsPath) -> Option<&[u8]> {
        if prefix.is_root() {
            return Some(&self.0[1..]);
        }
        let rest = self.0.strip_prefix(prefix.as_bytes())?;
        match rest.first() {
            None => Some(rest),
            Some(b'/') => Some(&rest[1..]),
            Some(_) => None,
        }
    }

    /// Whether this path is `other` or lies below it.
    pub fn starts_with(&self, other: &AbsPath) -> bool {
        self.strip_prefix(other).is_some()
    }
}

/// Checks one name. Errors: `InvalidArgument`, `NameTooLong`.
pub fn check_name(name: &[u8]) -> Result<()> {
    if name.is_empty() || name == b"." || name == b".." {
        return Err(err!(InvalidArgument, "{:?} is not a name: . and .. are not resolved, write the path out", String::from_utf8_lossy(name)));
    }
    if name.len() > NAME_MAX_BYTES {
        return Err(err!(NameTooLong, "name of {} bytes is longer than the limit of {NAME_MAX_BYTES}", name.len()));
    }
    if name.iter().any(|b| *b == 0 || *b == b'/') {
        return Err(err!(InvalidArgument, "a name cannot hold NUL or /"));
    }
    Ok(())
}

impl fmt::Display for AbsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for AbsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

impl std::str::FromStr for AbsPath {
    type Err = crate::Error;
    fn from_str(s: &str) -> Result<Self> {
        AbsPath::parse(s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_what_could_leave_the_namespace() {
        for bad in ["", "a", "/a/../b", "/..", "/./a", "/a\0b"] {
            assert!(AbsPath::parse(bad).is_err(), "{bad:?}");
        }
        assert!(AbsPath::parse(format!("/{}", "n".repeat(300))).is_err());
        assert_eq!(AbsPath::parse("//a///b/").unwrap().as_bytes(), b"/a/b");
        assert_eq!(AbsPath::parse("/").unwrap(), AbsPath::root());
    }

    proptest! {
        #[test]
        fn parse_is_idempotent_and_parents_join_back(raw in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut bytes = b"/".to_vec();
            bytes.extend(raw);
            if let Ok(p) = AbsPath::parse(&bytes) {
                prop_assert_eq!(AbsPath::parse(p.as_bytes()).unwrap(), p.clone());
                if let (Some(parent), Some(name)) = (p.parent(), p.name()) {
                    prop_assert_eq!(parent.join(name).unwrap(), p.clone());
                    prop_assert!(p.starts_with(&parent));
                    prop_assert_eq!(p.strip_prefix(&parent).unwrap(), name);
                }
            }
        }
    }
}
