//! Keeping the namespace in step with the under stores: on access, when what is known is older than the mount's interval.
//!
//! A path is resolved in the namespace first. A name that is missing, or an entry that was looked at too long ago, is
//! looked up in the store; what was seen becomes a `SyncChildren` command, and the path is resolved again. Freshness is
//! soft state with a bounded size: a restart only means one look more.
//!
//! Invariants: no view is held across a call to a store; a store that fails never makes an entry vanish (only a plain
//! "no such object" does), and never hides what is cached.

use super::{MountOptions, Mounted};
use crate::core::Core;
use crate::namespace::{self, Found, Walk, Who};
use crate::store::{Cf, Reader, dentry_key};
use forebay_common::limits::BLOCKS_PER_FILE_MAX;
use forebay_common::{AbsPath, ErrorKind, InodeId, Result, counter, err};
use forebay_proto::journal::{Seen, SyncChildren, command::Op};
use forebay_proto::store::Inode;
use forebay_ufs::UfsEntry;
use moka::sync::Cache;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

counter!(LOOKUPS, "forebay_master_sync_lookups_total", "entries looked up in under stores");
counter!(LISTINGS, "forebay_master_sync_listings_total", "folders listed in under stores");
counter!(CHANGES, "forebay_master_sync_changes_total", "entries that under stores changed");

/// Inodes whose freshness is remembered.
const FRESH_MAX: u64 = 1_000_000;
/// Rows of one sync command.
const ROWS_PER_COMMAND: usize = 1_000;
/// Looks at one path before giving up: each name below a mount takes one, and races take another.
const ROUNDS_MAX: usize = 600;
/// Listings of one folder that may turn out stale before its reader is told so.
const LISTING_ROUNDS: usize = 5;
/// How long a failing store is left alone where something cached can be served instead.
const FAILED_LOOK_BACKOFF: Duration = Duration::from_secs(5);
/// Limit of a look that something cached could stand in for.
const OPTIONAL_LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// A path as it stands after syncing.
pub struct Resolved {
    /// The walk.
    pub walk: Walk,
    /// The mount it lies in.
    pub mount: Option<Arc<Mounted>>,
}

impl Resolved {
    /// The entry. Errors: `NotFound`.
    pub fn found(&self, path: &AbsPath) -> Result<&Found> {
        self.walk.found(path)
    }
}

pub struct Syncer {
    looked: Cache<InodeId, Instant>,
    listed: Cache<InodeId, Instant>,
    absent: Cache<(InodeId, Vec<u8>), Instant>,
    unshown: Cache<u64, u64>,
    /// Files that a worker met another version of: to be looked at whatever is fresh.
    stale: Cache<InodeId, ()>,
}

impl Default for Syncer {
    fn default() -> Self {
        Syncer {
            looked: Cache::new(FRESH_MAX),
            listed: Cache::new(FRESH_MAX),
            absent: Cache::new(FRESH_MAX),
            unshown: Cache::new(FRESH_MAX),
            stale: Cache::new(FRESH_MAX),
        }
    }
}

/// Whether something seen then is still good for a call that began at `began`: what was looked at since then always is.
fn fresh(at: Option<Instant>, options: &MountOptions, began: Instant) -> bool {
    at.is_some_and(|at| at >= began || options.sync_interval.is_none_or(|interval| at.elapsed() < interval))
}

fn to_seen(e: &UfsEntry) -> Seen {
    Seen {
        name: e.name.clone().into(),
        folder: e.folder,
        length: e.length,
        modified_ms: e.modified_ms,
        fingerprint: e.fingerprint.clone(),
        owner: e.owner.clone(),
        group: e.group.clone(),
        mode: e.mode,
    }
}

enum Next {
    Done(Resolved),
    /// Look up this name of this folder.
    Look {
        mount: Arc<Mounted>,
        parent: InodeId,
        name: Vec<u8>,
        key: Vec<u8>,
        known: Option<InodeId>,
        base_index: u64,
    },
}

/// Whether a file has no more blocks than are possible. One that has is not shown.
fn fits(entry: &UfsEntry, mount: &Mounted) -> bool {
    crate::namespace::blocks_for(entry.length, mount.options.block_size_bytes) <= BLOCKS_PER_FILE_MAX
}

impl Syncer {
    /// Marks an entry that this cluster wrote itself just now.
    pub fn note_looked(&self, id: InodeId) {
        self.looked.insert(id, Instant::now());
    }

    /// Marks a folder that this cluster made itself just now: nothing else is in it.
    pub fn note_listed(&self, id: InodeId) {
        self.looked.insert(id, Instant::now());
        self.listed.insert(id, Instant::now());
    }

    /// Has the next access look at the store: somebody met another version there.
    pub fn invalidate(&self, id: InodeId) {
        self.looked.invalidate(&id);
        self.stale.insert(id, ());
    }

    /// Objects of a mount that cannot be shown, as far as listings met them.
    pub fn unshown(&self, mount: u64) -> u64 {
        self.unshown.get(&mount).unwrap_or(0)
    }

    /// Resolves a path, in step with the under store. Errors: those of the store only where nothing is cached.
    pub async fn resolve(&self, core: &Core, who: &Who, path: &AbsPath) -> Result<Resolved> {
        let began = Instant::now();
        for _ in 0..ROUNDS_MAX {
            match self.step(core, who, path, began)? {
                Next::Done(resolved) => return Ok(resolved),
                Next::Look { mount, parent, name, key, known, base_index } => {
                    self.look(core, &mount, parent, &name, &key, known, base_index).await?;
                }
            }
        }
        Err(err!(Busy, "{path} changes faster than it can be looked up"))
    }

    fn step(&self, core: &Core, who: &Who, path: &AbsPath, began: Instant) -> Result<Next> {
        core.journal.read_barrier()?;
        let view = core.store.view();
        let walk = namespace::walk(&view, path)?;
        namespace::check_traverse(who, &walk, path)?;
        let Some((mount_id, depth)) = walk.mount else { return Ok(Next::Done(Resolved { walk, mount: None })) };
        let mount = core.soft.mounts.get(&core.store, &core.config, mount_id)?;
        let deepest = walk.deepest();
        let (parent, name, known) = if walk.is_complete() {
            let listed =
                walk.chain.len() >= 2 && !self.stale.contains_key(&deepest.id()) && fresh(self.listed.get(&deepest.parent), &mount.options, began);
            let own = !deepest.inode.completed || (!deepest.inode.folder && !deepest.inode.persisted);
            if walk.chain.len() - 1 == depth || own || listed || fresh(self.looked.get(&deepest.id()), &mount.options, began) {
                return Ok(Next::Done(Resolved { walk, mount: Some(mount) }));
            }
            (deepest.parent, deepest.name.clone(), Some(deepest.id()))
        } else {
            let name = walk.missing[0].clone();
            let parent = deepest.id();
            let known_absent = (deepest.inode.children_known && fresh(self.listed.get(&parent), &mount.options, began))
                || fresh(self.absent.get(&(parent, name.clone())), &mount.options, began)
                || view.get(Cf::Tombstone, &dentry_key(parent, &name))?.is_some();
            if !deepest.inode.folder || known_absent {
                return Ok(Next::Done(Resolved { walk, mount: Some(mount) }));
            }
            (parent, name, None)
        };
        let take = if walk.is_complete() { walk.chain.len() - 1 } else { walk.chain.len() };
        let key = path.components().take(take).skip(depth).collect::<Vec<_>>().join(&b'/');
        let base_index = crate::apply::read_applied_in(&view)?.changes;
        Ok(Next::Look { mount, parent, name, key, known, base_index })
    }

    #[allow(clippy::too_many_arguments, reason = "one look is described by all of these, and they are used once")]
    async fn look(
        &self,
        core: &Core,
        mount: &Mounted,
        parent: InodeId,
        name: &[u8],
        key: &[u8],
        known: Option<InodeId>,
        base_index: u64,
    ) -> Result<()> {
        let at = Instant::now();
        LOOKUPS.inc();
        if let Some(id) = known {
            self.stale.invalidate(&id);
        }
        let looked = match known {
            None => mount.ufs.stat(key).await,
            Some(_) => match tokio::time::timeout(OPTIONAL_LOOK_TIMEOUT, mount.ufs.stat(key)).await {
                Ok(looked) => looked,
                Err(_) => Err(err!(Timeout, "{} does not answer", mount.ufs.uri())),
            },
        };
        let mut op = SyncChildren {
            parent_id: parent.get(),
            base_index,
            block_size_bytes: mount.options.block_size_bytes,
            page_size_bytes: mount.options.page_size_bytes,
            ..SyncChildren::default()
        };
        let looked = looked.and_then(|e| if fits(&e, mount) { Ok(e) } else { Err(err!(NotFound, "too large to be shown")) });
        match looked {
            Ok(entry) => {
                if let Some(id) = known
                    && self.same(core, id, &entry)?
                {
                    self.looked.insert(id, at);
                    return Ok(());
                }
                op.seen.push(Seen { name: name.to_vec().into(), ..to_seen(&entry) });
            }
            Err(e) if e.kind() == ErrorKind::NotFound => match known {
                Some(_) => op.gone.push(name.to_vec().into()),
                None => {
                    self.absent.insert((parent, name.to_vec()), at);
                    return Ok(());
                }
            },
            Err(e) => match known {
                Some(id) => {
                    tracing::warn!(error = %e, "an under store does not answer; what is known is served");
                    self.looked.insert(id, at);
                    let interval = mount.options.sync_interval.unwrap_or(Duration::MAX);
                    if interval > FAILED_LOOK_BACKOFF {
                        self.looked.insert(id, at.checked_sub(interval - FAILED_LOOK_BACKOFF).unwrap_or(at));
                    }
                    return Ok(());
                }
                None => return Err(e),
            },
        }
        CHANGES.inc();
        match core.own_change(Op::SyncChildren(op)).await {
            Ok(reply) if reply.skipped > 0 => {
                // Somebody changed the folder while the store was asked: what they did counts, and is newer.
                if let Some(id) = known {
                    self.looked.insert(id, at);
                }
                Ok(())
            }
            Ok(_) => {
                let child = core.store.view().child(parent, name)?;
                if let Some(inode) = child {
                    self.looked.insert(InodeId(inode.id), at);
                }
                Ok(())
            }
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn same(&self, core: &Core, id: InodeId, entry: &UfsEntry) -> Result<bool> {
        let inode = core.store.view().inode(id)?;
        Ok(inode.is_some_and(|(_, inode)| inode.folder == entry.folder && (inode.folder || inode.fingerprint == entry.fingerprint)))
    }

    /// Brings a folder's names in step, unless that was done within the interval.
    pub async fn sync_folder(&self, core: &Core, path: &AbsPath, resolved: &Resolved) -> Result<()> {
        let Some(mount) = &resolved.mount else { return Ok(()) };
        let folder = resolved.found(path)?;
        let id = folder.id();
        let at = Instant::now();
        if !folder.inode.folder || (folder.inode.children_known && fresh(self.listed.get(&id), &mount.options, at)) {
            return Ok(());
        }
        for _ in 0..LISTING_ROUNDS {
            if self.list_once(core, path, resolved, mount, folder).await? {
                self.listed.insert(id, at);
                return Ok(());
            }
        }
        Err(err!(Busy, "{path} changes faster than it can be listed"))
    }

    /// Takes one listing over. `false`: rows were stale, because somebody changed the folder meanwhile.
    async fn list_once(&self, core: &Core, path: &AbsPath, resolved: &Resolved, mount: &Mounted, folder: &Found) -> Result<bool> {
        let id = folder.id();
        let base_index = {
            let view = core.store.view();
            // The key that is listed is of this path: it must still be this folder's.
            if view.path_of(id)? != *path {
                return Err(err!(Busy, "{path} was moved while it was looked up"));
            }
            crate::apply::read_applied_in(&view)?.changes
        };
        LISTINGS.inc();
        let mut listing = match mount.ufs.list(&resolved.walk.ufs_key(path)).await {
            Ok(listing) => listing,
            Err(e) if folder.inode.children_known && e.is_retryable() => {
                tracing::warn!(error = %e, "an under store does not answer; what is known is served");
                return Ok(true);
            }
            Err(e) => return Err(e),
        };
        let shown = listing.entries.len();
        listing.entries.retain(|e| fits(e, mount));
        listing.unshown += (shown - listing.entries.len()) as u64;
        if listing.unshown > 0 {
            tracing::warn!(%path, count = listing.unshown, "objects that cannot be shown");
        }
        self.unshown.insert(mount.id.get(), listing.unshown);
        let known: BTreeMap<Vec<u8>, Inode> = core.store.view().children(id, None, usize::MAX)?.into_iter().collect();
        let differs = |e: &&UfsEntry| match known.get(&e.name) {
            None => true,
            Some(inode) => inode.folder != e.folder || (!e.folder && inode.fingerprint != e.fingerprint),
        };
        let seen: Vec<Seen> = listing.entries.iter().filter(differs).map(to_seen).collect();
        let there: std::collections::HashSet<&[u8]> =
            listing.entries.iter().map(|e| e.name.as_slice()).chain(listing.unknown.iter().map(Vec::as_slice)).collect();
        let gone: Vec<_> = known
            .iter()
            .filter(|(name, inode)| inode.persisted && inode.mount_id == 0 && !there.contains(name.as_slice()))
            .map(|(name, _)| name.clone().into())
            .collect();
        CHANGES.inc_by((seen.len() + gone.len()) as u64);
        let op = |seen, gone, all_seen| {
            Op::SyncChildren(SyncChildren {
                parent_id: id.get(),
                seen,
                gone,
                all_seen,
                base_index,
                block_size_bytes: mount.options.block_size_bytes,
                page_size_bytes: mount.options.page_size_bytes,
            })
        };
        let mut skipped = 0;
        for rows in seen.chunks(ROWS_PER_COMMAND) {
            skipped += core.own_change(op(rows.to_vec(), Vec::new(), false)).await?.skipped;
        }
        if skipped == 0 && (!gone.is_empty() || !folder.inode.children_known) {
            skipped += core.own_change(op(Vec::new(), gone, true)).await?.skipped;
        }
        Ok(skipped == 0)
    }
}
