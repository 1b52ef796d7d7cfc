//! `Context`: one command at work: the overlay it writes to, the ids it draws, the reply it builds.

use super::quota;
use crate::namespace::{self, Walk, Who};
use crate::store::{Cf, Reader, Txn, dentry_key, id_key};
use forebay_common::{AbsPath, Error, InodeId, Result, err};
use forebay_proto::journal::{Command, Reply};
use forebay_proto::store::{Counters, Inode, Lease, Link};

pub struct Context<'a, 't> {
    pub txn: &'a mut Txn<'t>,
    pub command: &'a Command,
    /// The number of this change; later changes have greater ones.
    pub change: u64,
    pub counters: Counters,
    pub reply: Reply,
    pub who: Who,
    /// Why what was written may not stand, found out while it was.
    refused: Option<Error>,
}

impl<'a, 't> Context<'a, 't> {
    pub fn new(txn: &'a mut Txn<'t>, command: &'a Command, change: u64, counters: Counters) -> Self {
        let who = Who { user: command.principal.clone(), groups: command.groups.clone(), superuser: command.superuser };
        Context { txn, command, change, counters, reply: Reply::default(), who, refused: None }
    }

    pub fn finish(self) -> (Reply, Counters) {
        (self.reply, self.counters)
    }

    pub fn now_ms(&self) -> u64 {
        self.command.now_ms
    }

    /// Resolves a path of the command, permission to pass through it included.
    pub fn walk(&self, raw: &[u8]) -> Result<(AbsPath, Walk)> {
        let path = AbsPath::parse(raw)?;
        let walk = namespace::walk(&*self.txn, &path)?;
        namespace::check_traverse(&self.who, &walk, &path)?;
        Ok((path, walk))
    }

    /// Whether what lies here may be changed. Errors: `ReadOnly`.
    pub fn check_writable(&self, walk: &Walk, path: &AbsPath) -> Result<()> {
        if let Some((id, _)) = walk.mount
            && let Some(mount) = self.txn.mount(id)?
            && mount.read_only
        {
            return Err(err!(ReadOnly, "{path} lies in the read-only mount {}", String::from_utf8_lossy(&mount.path)));
        }
        Ok(())
    }

    /// Errors: `Busy` while an earlier removal of this name is on its way to the under store.
    pub fn check_no_tombstone(&self, parent: InodeId, name: &[u8], path: &AbsPath) -> Result<()> {
        if self.txn.get(Cf::Tombstone, &dentry_key(parent, name))?.is_some() {
            return Err(err!(Busy, "{path}: an earlier removal of this name is still on its way to the under store"));
        }
        Ok(())
    }

    pub fn draw_inode_id(&mut self) -> u64 {
        let id = self.counters.next_inode_id;
        self.counters.next_inode_id += 1;
        id
    }

    /// The version of a content that replaces one of version `old`.
    pub fn next_version(&self, old: u64) -> u64 {
        (old + 1).max(self.counters.versions_from)
    }

    /// A new lease of the caller's, with file, time, worker and holder as given. The caller writes its id into the inode.
    pub fn grant_lease(&mut self, lease: Lease) -> u64 {
        let id = self.counters.next_lease_id;
        self.counters.next_lease_id += 1;
        let lease = Lease { id, expires_at_ms: self.now_ms() + lease.ttl_ms, principal: self.who.user.clone(), ..lease };
        self.txn.put(Cf::Lease, &id_key(id), &lease);
        self.reply.lease_id = id;
        id
    }

    /// A new inode owned by the caller.
    pub fn new_inode(&mut self, parent: &Inode, folder: bool, mode: u32) -> Inode {
        Inode {
            id: self.draw_inode_id(),
            folder,
            owner: self.who.user.clone(),
            group: if parent.group.is_empty() { self.who.groups.first().cloned().unwrap_or_default() } else { parent.group.clone() },
            mode,
            created_ms: self.now_ms(),
            modified_ms: self.now_ms(),
            changed_index: self.change,
            completed: folder,
            ..Inode::default()
        }
    }

    /// What was found to be wrong while the command was at work.
    pub fn take_refused(&mut self) -> Result<()> {
        self.refused.take().map_or(Ok(()), Err)
    }

    /// Charges a change to the quotas above it; one that is exceeded refuses the command.
    pub fn charge(&mut self, folder: InodeId, names: i64, bytes: i64) {
        if let Err(e) = quota::charge(self, folder, quota::Use { names, bytes }) {
            self.refused.get_or_insert(e);
        }
    }

    /// Writes a new entry with its link.
    pub fn insert(&mut self, parent: InodeId, name: &[u8], inode: &Inode) {
        debug_assert!(inode.id > 0);
        self.charge(parent, 1, quota::space(inode));
        self.txn.put(Cf::Dentry, &dentry_key(parent, name), inode);
        self.txn.put(Cf::Link, &id_key(inode.id), &Link { parent_id: parent.get(), name: name.to_vec().into() });
        if inode.folder {
            self.counters.folders += 1
        } else {
            self.counters.files += 1
        }
        self.note_change(parent);
    }

    /// Notes on a folder that an entry came or went just now.
    pub fn note_change(&mut self, folder: InodeId) {
        let now = self.now_ms();
        let place = if folder == InodeId::ROOT { self.txn.root().map(|inode| Some((Link::default(), inode))) } else { self.txn.inode(folder) };
        // What cannot be read is noted by the overlay itself.
        if let Ok(Some((link, mut inode))) = place
            && (inode.modified_ms, inode.changed_ms) != (now, now)
        {
            (inode.modified_ms, inode.modified_ns, inode.changed_ms) = (now, 0, now);
            self.update(InodeId(link.parent_id), &link.name, &inode);
        }
    }

    /// Writes the entry of an inode that exists.
    pub fn update(&mut self, parent: InodeId, name: &[u8], inode: &Inode) {
        if self.counters.quota_folders > 0
            && let Ok(Some(before)) = self.txn.entry(parent, name)
            && before.id == inode.id
        {
            if inode.folder && (before.used_names, before.used_bytes) != (inode.used_names, inode.used_bytes) {
                // Read before something below it was charged.
                let current = Inode { used_names: before.used_names, used_bytes: before.used_bytes, ..inode.clone() };
                return self.txn.put(Cf::Dentry, &dentry_key(parent, name), &current);
            }
            self.charge(parent, 0, quota::space(inode).saturating_sub(quota::space(&before)));
        }
        self.txn.put(Cf::Dentry, &dentry_key(parent, name), inode);
    }

    /// Notes on a folder that a child went away just now.
    pub fn note_removal(&mut self, parent: InodeId) -> Result<()> {
        let (link, mut inode) = if parent == InodeId::ROOT {
            (Link::default(), self.txn.root()?)
        } else {
            let Some(place) = self.txn.inode(parent)? else { return Ok(()) };
            place
        };
        inode.removal_index = self.change;
        (inode.modified_ms, inode.modified_ns, inode.changed_ms) = (self.now_ms(), 0, self.now_ms());
        self.update(InodeId(link.parent_id), &link.name, &inode);
        Ok(())
    }
}
