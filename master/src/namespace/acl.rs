//! POSIX access control lists, as HDFS keeps them, and what they let through.
//!
//! Pure: used by `apply` (changes, inheritance) and by permission checks. An inode that has a list of its own holds its named entries and its group's entry in
//! `acl`, the mask in the group bits of its mode, the owner's and the others' entries in the mode; a folder may hold a default list as well, whole, which new
//! entries inherit. Source: `AclTransformation`, `AclStorage`, `FSPermissionChecker` of Hadoop 3.4.1; `acl(5)`.

use super::permission::Who;
use forebay_common::{Result, err};
use forebay_proto::AclEntry;
use forebay_proto::store::Inode;
use std::collections::BTreeMap;

/// Entries of one list, by which HDFS limits it.
const ENTRIES_MAX: usize = 32;

/// `AclEntry.scope`.
pub const ACCESS: u32 = 0;
/// Inherited by what is made in the folder.
pub const DEFAULT: u32 = 1;
/// `AclEntry.kind`.
pub const USER: u32 = 0;
/// A group's, the owning one's without a name.
pub const GROUP: u32 = 1;
/// What named users and all groups have at most.
pub const MASK: u32 = 2;
/// Everybody else's.
pub const OTHER: u32 = 3;

fn entry(scope: u32, kind: u32, name: &str, perm: u32) -> AclEntry {
    AclEntry { scope, kind, name: name.to_owned(), perm }
}

/// By which an entry is found, and sorted.
fn key(e: &AclEntry) -> (u32, u32, &str) {
    (e.scope, e.kind, &e.name)
}

fn minimal(mode: u32) -> Vec<AclEntry> {
    vec![entry(ACCESS, USER, "", mode >> 6 & 7), entry(ACCESS, GROUP, "", mode >> 3 & 7), entry(ACCESS, OTHER, "", mode & 7)]
}

/// The whole lists of an inode: what is kept in its mode included.
pub fn of(inode: &Inode) -> Vec<AclEntry> {
    let (access, default): (Vec<AclEntry>, Vec<AclEntry>) = inode.acl.iter().cloned().partition(|e| e.scope == ACCESS);
    let mut all = minimal(inode.mode);
    if !access.is_empty() {
        all = vec![entry(ACCESS, USER, "", inode.mode >> 6 & 7)];
        all.extend(access);
        all.extend([entry(ACCESS, MASK, "", inode.mode >> 3 & 7), entry(ACCESS, OTHER, "", inode.mode & 7)]);
    }
    all.extend(default);
    all
}

/// Gives an inode whole lists. Errors: a default list on a file.
pub fn set(inode: &mut Inode, all: Vec<AclEntry>) -> Result<()> {
    let (access, default): (Vec<AclEntry>, Vec<AclEntry>) = all.into_iter().partition(|e| e.scope == ACCESS);
    if !default.is_empty() && !inode.folder {
        return Err(err!(InvalidArgument, "Invalid ACL: only directories may have a default ACL."));
    }
    let [user, .., group_or_mask, other] = access.as_slice() else {
        return Err(err!(InvalidArgument, "Invalid ACL: the user, group and other entries are required."));
    };
    inode.mode = inode.mode & 0o1000 | user.perm << 6 | group_or_mask.perm << 3 | other.perm;
    inode.acl = if access.len() > 3 { access[1..access.len() - 2].to_vec() } else { Vec::new() };
    inode.acl.extend(default);
    Ok(())
}

/// Takes the list of an inode away: its mode is what its owner, its group and the others had.
pub fn remove(inode: &mut Inode) {
    if let Some(group) = inode.acl.iter().find(|e| e.scope == ACCESS && e.kind == GROUP && e.name.is_empty()) {
        inode.mode = inode.mode & !0o070 | group.perm << 3;
    }
    inode.acl.clear();
}

/// What a change keeps of the lists before masks are worked out.
#[derive(Default)]
struct Building {
    entries: Vec<AclEntry>,
    masks: BTreeMap<u32, AclEntry>,
    /// Scopes whose mask was given, or taken away.
    mask_dirty: [bool; 2],
    /// Scopes that were touched.
    dirty: [bool; 2],
}

impl Building {
    fn keep(&mut self, e: &AclEntry) {
        if e.kind == MASK {
            self.masks.insert(e.scope, e.clone());
        } else {
            self.entries.push(e.clone());
        }
    }

    fn give(&mut self, e: &AclEntry) {
        self.dirty[e.scope as usize] = true;
        self.mask_dirty[e.scope as usize] |= e.kind == MASK;
        self.keep(e);
    }

    fn build(mut self) -> Result<Vec<AclEntry>> {
        self.copy_defaults();
        for scope in [ACCESS, DEFAULT] {
            let of_scope: Vec<&AclEntry> = self.entries.iter().filter(|e| e.scope == scope).collect();
            if of_scope.is_empty() {
                continue;
            }
            let needed = of_scope.iter().any(|e| !e.name.is_empty());
            let union = of_scope.iter().filter(|e| e.kind == GROUP || !e.name.is_empty()).fold(0, |perm, e| perm | e.perm);
            let (given, touched, at) = (self.masks.get(&scope).cloned(), self.dirty[scope as usize], self.mask_dirty[scope as usize]);
            match given {
                None if needed && at => return Err(err!(InvalidArgument, "Invalid ACL: mask is required and cannot be deleted.")),
                Some(mask) if !touched || at => self.entries.push(mask),
                None if !needed => {}
                _ => self.entries.push(entry(scope, MASK, "", union)),
            }
        }
        self.entries.sort_by(|a, b| key(a).cmp(&key(b)));
        check(&self.entries)?;
        Ok(self.entries)
    }

    /// A default list without the owner's, the group's or the others' entry has those of the access list.
    fn copy_defaults(&mut self) {
        if self.entries.iter().all(|e| e.scope == ACCESS) {
            return;
        }
        for kind in [USER, GROUP, OTHER] {
            let unnamed = |scope: u32| self.entries.iter().find(|e| key(e) == (scope, kind, ""));
            if let (None, Some(access)) = (unnamed(DEFAULT), unnamed(ACCESS)) {
                let copied = entry(DEFAULT, kind, "", access.perm);
                self.entries.push(copied);
            }
        }
    }
}

fn check(sorted: &[AclEntry]) -> Result<()> {
    let invalid = |what: &str| err!(InvalidArgument, "Invalid ACL: {what}");
    if sorted.windows(2).any(|pair| key(&pair[0]) == key(&pair[1])) {
        return Err(invalid("multiple entries with same scope, type and name."));
    }
    if sorted.iter().any(|e| !e.name.is_empty() && (e.kind == MASK || e.kind == OTHER)) {
        return Err(invalid("a mask or other entry must not have a name."));
    }
    for (scope, name) in [(ACCESS, "access"), (DEFAULT, "default")] {
        let of_scope: Vec<&AclEntry> = sorted.iter().filter(|e| e.scope == scope).collect();
        if of_scope.len() > ENTRIES_MAX {
            return Err(invalid(&format!("ACL has {} {name} entries, which exceeds maximum of {ENTRIES_MAX}.", of_scope.len())));
        }
        let has = |kind: u32| of_scope.iter().any(|e| e.kind == kind && e.name.is_empty());
        if (scope == ACCESS || !of_scope.is_empty()) && ![USER, GROUP, OTHER].into_iter().all(has) {
            let which = if scope == ACCESS { "Invalid ACL" } else { "Invalid default ACL" };
            return Err(err!(InvalidArgument, "{which}: the user, group and other entries are required."));
        }
    }
    Ok(())
}

/// Errors: entries that are none, or the same one twice.
fn check_spec(spec: &[AclEntry]) -> Result<()> {
    if spec.len() > 2 * ENTRIES_MAX {
        return Err(err!(InvalidArgument, "Invalid ACL: {} entries in one call", spec.len()));
    }
    if spec.iter().any(|e| e.scope > DEFAULT || e.kind > OTHER || e.perm > 7) {
        return Err(err!(InvalidArgument, "Invalid ACL: an entry of a kind that is not known"));
    }
    let mut keys: Vec<_> = spec.iter().map(key).collect();
    keys.sort_unstable();
    if keys.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(err!(InvalidArgument, "Invalid ACL: multiple entries with same scope, type and name."));
    }
    Ok(())
}

/// The lists with these entries in place of all of their scopes.
pub fn replace(existing: &[AclEntry], spec: &[AclEntry]) -> Result<Vec<AclEntry>> {
    check_spec(spec)?;
    let mut building = Building::default();
    spec.iter().for_each(|e| building.give(e));
    let dirty = building.dirty;
    existing.iter().filter(|e| !dirty[e.scope as usize]).for_each(|e| building.keep(e));
    building.build()
}

/// The lists with these entries added, or in place of those of the same name.
pub fn merge(existing: &[AclEntry], spec: &[AclEntry]) -> Result<Vec<AclEntry>> {
    check_spec(spec)?;
    let mut building = Building::default();
    existing.iter().filter(|e| spec.iter().all(|s| key(s) != key(e))).for_each(|e| building.keep(e));
    spec.iter().for_each(|e| building.give(e));
    building.build()
}

/// The lists without these entries, whatever they grant.
pub fn without(existing: &[AclEntry], spec: &[AclEntry]) -> Result<Vec<AclEntry>> {
    check_spec(spec)?;
    let mut building = Building::default();
    for e in existing {
        if spec.iter().any(|s| key(s) == key(e)) {
            building.dirty[e.scope as usize] = true;
            building.mask_dirty[e.scope as usize] |= e.kind == MASK;
        } else {
            building.keep(e);
        }
    }
    building.build()
}

/// A new inode gets its folder's default list, where that has one; `unmasked` is the mode that was asked for before the umask. Returns whether it did.
pub fn inherit(folder: &Inode, inode: &mut Inode, unmasked: u32) -> Result<bool> {
    let default: Vec<AclEntry> = folder.acl.iter().filter(|e| e.scope == DEFAULT).cloned().collect();
    if default.is_empty() {
        return Ok(false);
    }
    let is_minimal = default.len() == 3;
    let filtered = |e: &AclEntry| {
        let at_most = match e.kind {
            USER if e.name.is_empty() => unmasked >> 6 & 7,
            GROUP if is_minimal => unmasked >> 3 & 7,
            MASK => unmasked >> 3 & 7,
            OTHER => unmasked & 7,
            _ => 7,
        };
        entry(ACCESS, e.kind, &e.name, e.perm & at_most)
    };
    let mut all: Vec<AclEntry> = default.iter().map(filtered).collect();
    if inode.folder {
        all.extend(default);
    }
    set(inode, all).map(|()| true)
}

/// Whether the list of an inode lets somebody do what is wanted; `None`: it has none, its mode says it.
pub fn allows(who: &Who, inode: &Inode, wanted: u32) -> Option<bool> {
    let access = || inode.acl.iter().filter(|e| e.scope == ACCESS);
    access().next()?;
    if who.user == inode.owner {
        return Some(inode.mode >> 6 & wanted == wanted);
    }
    let mask = inode.mode >> 3 & 7;
    if let Some(named) = access().find(|e| e.kind == USER && e.name == who.user) {
        return Some(named.perm & mask & wanted == wanted);
    }
    let member = |e: &&AclEntry| e.kind == GROUP && who.groups.contains(if e.name.is_empty() { &inode.group } else { &e.name });
    let mut groups = access().filter(member).peekable();
    if groups.peek().is_some() {
        return Some(groups.any(|e| e.perm & mask & wanted == wanted));
    }
    Some(inode.mode & wanted == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(mode: u32) -> Inode {
        Inode { id: 2, folder: true, mode, owner: "owner".into(), group: "group".into(), ..Inode::default() }
    }

    fn who(user: &str, groups: &[&str]) -> Who {
        Who { user: user.into(), groups: groups.iter().map(|g| (*g).to_owned()).collect(), superuser: false }
    }

    #[test]
    fn named_entries_are_masked_and_come_before_the_rest() {
        let mut inode = folder(0o750);
        let spec = [entry(ACCESS, USER, "ann", 7), entry(ACCESS, GROUP, "team", 5)];
        let all = merge(&of(&inode), &spec).unwrap();
        set(&mut inode, all).unwrap();
        assert_eq!(inode.mode, 0o770, "the mask is what they have together");
        assert_eq!(allows(&who("ann", &[]), &inode, 7), Some(true));
        assert_eq!(allows(&who("ben", &["team"]), &inode, 2), Some(false));
        assert_eq!(allows(&who("ben", &["team", "group"]), &inode, 5), Some(true));
        assert_eq!(allows(&who("ben", &[]), &inode, 4), Some(false));
        // chmod g=r lowers the mask, for all of them.
        inode.mode = 0o740;
        assert_eq!(allows(&who("ann", &[]), &inode, 2), Some(false));
        assert_eq!(allows(&who("owner", &["group"]), &inode, 7), Some(true));
        remove(&mut inode);
        assert_eq!((inode.mode, inode.acl.len()), (0o750, 0), "the group has what it had");
        assert_eq!(allows(&who("ann", &[]), &inode, 4), None);
    }

    #[test]
    fn defaults_are_inherited() {
        let mut parent = folder(0o755);
        let spec = [entry(DEFAULT, USER, "ann", 7), entry(DEFAULT, GROUP, "", 5)];
        let all = merge(&of(&parent), &spec).unwrap();
        set(&mut parent, all).unwrap();
        assert_eq!(parent.mode, 0o755);
        let mut file = Inode { id: 3, mode: 0o600, ..Inode::default() };
        assert!(inherit(&parent, &mut file, 0o666).unwrap());
        assert_eq!((file.mode, allows(&who("ann", &[]), &file, 6)), (0o664, Some(true)));
        assert!(file.acl.iter().all(|e| e.scope == ACCESS));
        let mut sub = Inode { id: 4, folder: true, mode: 0o700, ..Inode::default() };
        assert!(inherit(&parent, &mut sub, 0o777).unwrap());
        assert_eq!(of(&sub).iter().filter(|e| e.scope == DEFAULT).count(), 5);
        assert!(!inherit(&file, &mut sub, 0o777).unwrap());
    }

    #[test]
    fn lists_that_are_none_are_refused() {
        let inode = folder(0o755);
        let all = of(&inode);
        assert!(replace(&all, &[entry(ACCESS, USER, "", 7)]).is_err());
        assert!(merge(&all, &[entry(ACCESS, MASK, "m", 7)]).is_err());
        assert!(merge(&all, &[entry(ACCESS, USER, "a", 7), entry(ACCESS, USER, "a", 6)]).is_err());
        assert!(without(&all, &[entry(ACCESS, OTHER, "", 0)]).is_err());
        let many: Vec<AclEntry> = (0..40).map(|i| entry(ACCESS, USER, &format!("u{i}"), 4)).collect();
        assert!(merge(&all, &many).is_err());
        let named = merge(&all, &[entry(ACCESS, USER, "a", 7)]).unwrap();
        assert!(without(&named, &[entry(ACCESS, MASK, "", 0)]).is_err(), "a mask is needed");
        assert_eq!(without(&named, &[entry(ACCESS, USER, "a", 0), entry(ACCESS, MASK, "", 0)]).unwrap().len(), 3);
        let mut file = Inode { mode: 0o644, ..Inode::default() };
        assert!(set(&mut file, merge(&of(&folder(0o755)), &[entry(DEFAULT, USER, "a", 7)]).unwrap()).is_err());
    }
}
