//! Keeping the namespace in step with the under stores: on access, when what is known is older than the mount's interval.
//!
//! A path is resolved in the namespace first. A name that is missing, or an entry that was looked at too long ago, is
//! looked up in the store; what was seen becomes a `SyncChildren` command, and the path is resolved again. Freshness is
//! soft state with a bounded size: a restart only means one look more.
//!
//! Invariants: no view is held across a call to a store; a store that fails never makes an entry vanish (only a plain
//! "no such object" does), and never hides what is cached.

use super::{Mounted, PathConfig};
use crate::core::Core;
use crate::namespace::{self, Found, Walk, Who};
use crate::store::{Cf, Reader, dentry_key};
use forebay_common::limits::BLOCKS_PER_FILE_MAX;
use forebay_common::{AbsPath, Error, ErrorKind, InodeId, Result, counter, err};
use forebay_proto::journal::{Seen, SyncChildren, command::Op};
use forebay_ufs::{SeenNames, UfsEntry};
use moka::sync::Cache;
use std::sync::{Arc, RwLock};
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
    /// Mounts whose store did not answer a moment ago.
    silent: Cache<u64, ()>,
    /// When something was made stale last: what was looked at before, and is noted after, is stale as well.
    staled: RwLock<Option<Instant>>,
}

impl Default for Syncer {
    fn default() -> Self {
        Syncer {
            looked: Cache::new(FRESH_MAX),
            listed: Cache::new(FRESH_MAX),
            absent: Cache::new(FRESH_MAX),
            unshown: Cache::new(FRESH_MAX),
            stale: Cache::new(FRESH_MAX),
            staled: RwLock::default(),
            silent: Cache::builder().max_capacity(FRESH_MAX).time_to_live(FAILED_LOOK_BACKOFF).build(),
        }
    }
}

/// Whether something seen then is still good for a call that began at `began`: what was looked at since then always is.
fn fresh(at: Option<Instant>, interval: Option<Duration>, began: Instant) -> bool {
    at.is_some_and(|at| at >= began || interval.is_none_or(|interval| at.elapsed() < interval))
}

/// How long what is known at the end of a walk is trusted; `None`: for ever.
fn interval_of(walk: &Walk, mount: &Mounted) -> Option<Duration> {
    PathConfig::of(walk).sync_interval.unwrap_or(mount.options.sync_interval)
}

fn to_seen(e: &UfsEntry, mount: &Mounted) -> Seen {
    let mut seen = Seen {
        name: e.name.clone().into(),
        folder: e.folder,
        length: e.length,
        modified_ms: e.modified_ms,
        fingerprint: e.fingerprint.clone(),
        owner: e.owner.clone(),
        group: e.group.clone(),
        mode: e.mode,
    };
    mount.options.appearance.dress(&mut seen);
    seen
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
        interval: Option<Duration>,
    },
}

/// Whether a file has no more blocks than are possible. One that has is not shown.
fn fits(entry: &UfsEntry, mount: &Mounted) -> bool {
    crate::namespace::blocks_for(entry.length, mount.options.block_size_bytes) <= BLOCKS_PER_FILE_MAX
}

impl Syncer {
    fn note_stale(&self) {
        *self.staled.write().unwrap_or_else(|e| e.into_inner()) = Some(Instant::now());
    }

    /// Whether nothing was made stale since a look began.
    fn holds(&self, at: Instant) -> bool {
        self.staled.read().unwrap_or_else(|e| e.into_inner()).is_none_or(|staled| staled < at)
    }

    fn note_looked_at(&self, id: InodeId, at: Instant) {
        if self.holds(at) {
            self.looked.insert(id, at);
        }
    }

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
        self.note_stale();
        self.looked.invalidate(&id);
        self.stale.insert(id, ());
    }

    /// Has the next access to these names of a folder, and to the folder's names, look at the store: something happened there.
    pub fn invalidate_names(&self, parent: InodeId, names: &[(Vec<u8>, Option<InodeId>)]) {
        self.note_stale();
        self.listed.invalidate(&parent);
        for (name, id) in names {
            self.absent.invalidate(&(parent, name.clone()));
            if let Some(id) = id {
                self.invalidate(*id);
                self.listed.invalidate(id);
            }
        }
    }

    /// Has every next access look at the store: nobody knows what happened.
    pub fn invalidate_all(&self) {
        self.note_stale();
        self.looked.invalidate_all();
        self.listed.invalidate_all();
        self.absent.invalidate_all();
    }

    /// Objects of a mount that cannot be shown, as far as listings met them.
    pub fn unshown(&self, mount: u64) -> u64 {
        self.unshown.get(&mount).unwrap_or(0)
    }

    /// Resolves a path, in step with the under store. Errors: those of the store only where nothing is cached.
    pub async fn resolve(&self, core: &Core, who: &Who, path: &AbsPath) -> Result<Resolved> {
        self.resolve_as(core, who, path, false).await
    }

    /// `resolve` for what is to be acknowledged without the store: while that does not answer, a name that is not known here is free.
    pub async fn resolve_free(&self, core: &Core, who: &Who, path: &AbsPath) -> Result<Resolved> {
        self.resolve_as(core, who, path, true).await
    }

    async fn resolve_as(&self, core: &Core, who: &Who, path: &AbsPath, free: bool) -> Result<Resolved> {
        let began = Instant::now();
        for _ in 0..ROUNDS_MAX {
            match self.step(core, who, path, began)? {
                Next::Done(resolved) => return Ok(resolved),
                Next::Look { mount, parent, name, key, known: None, base_index, interval } if free => {
                    let look = self.look(core, &mount, parent, &name, &key, None, base_index, interval);
                    let looked = if self.silent.contains_key(&mount.id.get()) {
                        Err(err!(UnderStore, "{} did not answer a moment ago", mount.ufs.uri()))
                    } else {
                        tokio::time::timeout(OPTIONAL_LOOK_TIMEOUT, look)
                            .await
                            .unwrap_or_else(|_| Err(err!(Timeout, "{} does not answer", mount.ufs.uri())))
                    };
                    match looked {
                        Ok(()) => {}
                        Err(e) if e.is_retryable() || e.kind() == ErrorKind::Unavailable => {
                            tracing::warn!(error = %e, %path, "an under store does not answer; what is not known here counts as free");
                            self.silent.insert(mount.id.get(), ());
                            let walk = namespace::walk(&core.store.view(), path)?;
                            return Ok(Resolved { walk, mount: Some(mount.clone()) });
                        }
                        Err(e) => return Err(e),
                    }
                }
                Next::Look { mount, parent, name, key, known, base_index, interval } => {
                    self.look(core, &mount, parent, &name, &key, known, base_index, interval).await?;
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
        let interval = interval_of(&walk, &mount);
        let deepest = walk.deepest();
        let (parent, name, known) = if walk.is_complete() {
            let listed = walk.chain.len() >= 2 && !self.stale.contains_key(&deepest.id()) && fresh(self.listed.get(&deepest.parent), interval, began);
            let own = !deepest.inode.completed || (!deepest.inode.folder && !deepest.inode.persisted);
            if walk.chain.len() - 1 == depth || own || listed || fresh(self.looked.get(&deepest.id()), interval, began) {
                return Ok(Next::Done(Resolved { walk, mount: Some(mount) }));
            }
            (deepest.parent, deepest.name.clone(), Some(deepest.id()))
        } else {
            let name = walk.missing[0].clone();
            let parent = deepest.id();
            let known_absent = (deepest.inode.children_known && fresh(self.listed.get(&parent), interval, began))
                || fresh(self.absent.get(&(parent, name.clone())), interval, began)
                || view.get(Cf::Tombstone, &dentry_key(parent, &name))?.is_some();
            if !deepest.inode.folder || known_absent {
                return Ok(Next::Done(Resolved { walk, mount: Some(mount) }));
            }
            (parent, name, None)
        };
        let key = match walk.is_complete() {
            true => walk.ufs_key(path),
            false => path.components().take(walk.chain.len()).skip(depth).collect::<Vec<_>>().join(&b'/'),
        };
        let base_index = crate::apply::read_applied_in(&view)?.changes;
        Ok(Next::Look { mount, parent, name, key, known, base_index, interval })
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
        interval: Option<Duration>,
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
                    self.note_looked_at(id, at);
                    return Ok(());
                }
                op.seen.push(Seen { name: name.to_vec().into(), ..to_seen(&entry, mount) });
            }
            Err(e) if e.kind() == ErrorKind::NotFound => match known {
                Some(_) => op.gone.push(name.to_vec().into()),
                None => {
                    if self.holds(at) {
                        self.absent.insert((parent, name.to_vec()), at);
                    }
                    return Ok(());
                }
            },
            Err(e) => match known {
                Some(id) => {
                    tracing::warn!(error = %e, "an under store does not answer; what is known is served");
                    self.note_looked_at(id, at);
                    let interval = interval.unwrap_or(Duration::MAX);
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
                    self.note_looked_at(id, at);
                }
                Ok(())
            }
            Ok(_) => {
                let child = core.store.view().entry(parent, name)?;
                if let Some(inode) = child {
                    self.note_looked_at(InodeId(inode.id), at);
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
        self.sync_names(core, path, resolved, Look::IfStale).await.map(drop)
    }

    /// At least the first `limit` names that the store tells, if the folder has as many. What is gone is not looked for.
    pub async fn sync_first(&self, core: &Core, path: &AbsPath, resolved: &Resolved, limit: usize) -> Result<()> {
        self.sync_names(core, path, resolved, Look::First(limit)).await.map(drop)
    }

    /// Brings a folder's names in step now, and tells what had changed; with `only_check` it is left as it was.
    pub async fn look_at_folder(&self, core: &Core, path: &AbsPath, resolved: &Resolved, only_check: bool) -> Result<Looked> {
        self.sync_names(core, path, resolved, if only_check { Look::Check } else { Look::Now }).await
    }

    async fn sync_names(&self, core: &Core, path: &AbsPath, resolved: &Resolved, how: Look) -> Result<Looked> {
        let Some(mount) = &resolved.mount else { return Ok(Looked::default()) };
        let folder = resolved.found(path)?;
        let id = folder.id();
        let at = Instant::now();
        let known = folder.inode.children_known && fresh(self.listed.get(&id), interval_of(&resolved.walk, mount), at);
        if !folder.inode.folder || (known && matches!(how, Look::IfStale | Look::First(_))) {
            return Ok(Looked::default());
        }
        for _ in 0..LISTING_ROUNDS {
            if let Some(looked) = self.list_once(core, path, resolved, mount, folder, how).await? {
                if looked.whole && !matches!(how, Look::Check) && self.holds(at) {
                    self.listed.insert(id, at);
                }
                return Ok(looked);
            }
        }
        Err(err!(Busy, "{path} changes faster than it can be listed"))
    }

    /// Takes one listing over, page by page. `None`: rows were stale, because somebody changed the folder meanwhile.
    async fn list_once(
        &self,
        core: &Core,
        path: &AbsPath,
        resolved: &Resolved,
        mount: &Mounted,
        folder: &Found,
        how: Look,
    ) -> Result<Option<Looked>> {
        let id = folder.id();
        let base_index = {
            let view = core.store.view();
            // The key that is listed is of this path: it must still be this folder's.
            if view.path_of(id)? != *path {
                return Err(err!(Busy, "{path} was moved while it was looked up"));
            }
            // On its way to the store: there is nothing yet to be in step with.
            for pending in view.pending()?.iter().filter(|p| p.kind != "delete") {
                if path.starts_with(&AbsPath::parse(&pending.target_path)?) {
                    return Ok(Some(Looked::default()));
                }
            }
            crate::apply::read_applied_in(&view)?.changes
        };
        LISTINGS.inc();
        let mut looked = Looked::default();
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
        let served_as_known = |e: &Error| {
            folder.inode.children_known && (e.is_retryable() || e.kind() == ErrorKind::Unavailable) && matches!(how, Look::IfStale | Look::First(_))
        };
        let mut lister = match mount.ufs.lister(&resolved.walk.ufs_key(path)).await {
            Ok(lister) => lister,
            // A store that is not listed: what was looked up by name is all there is.
            Err(e) if e.kind() == ErrorKind::Unsupported => return Ok(Some(Looked { whole: true, ..looked })),
            Err(e) if served_as_known(&e) => {
                tracing::warn!(error = %e, "an under store does not answer; what is known is served");
                return Ok(Some(Looked { whole: true, ..looked }));
            }
            Err(e) => return Err(e),
        };
        let (mut unshown, mut skipped) = (0, 0);
        let whole = loop {
            let page = match lister.next_page().await {
                Ok(Some(page)) => page,
                Ok(None) => break true,
                Err(e) if served_as_known(&e) => {
                    tracing::warn!(error = %e, "an under store does not answer; what is known is served");
                    return Ok(Some(Looked { whole: true, ..looked }));
                }
                Err(e) => return Err(e),
            };
            unshown += page.unshown;
            looked.entries += page.entries.len() as u64;
            let mut rows = Vec::new();
            {
                let view = core.store.view();
                for e in &page.entries {
                    if !fits(e, mount) {
                        unshown += 1;
                        continue;
                    }
                    let what = match view.entry(id, &e.name)? {
                        None if view.get(Cf::Tombstone, &dentry_key(id, &e.name))?.is_some() => continue,
                        None => "new",
                        Some(inode) if inode.mount_id > 0 || !inode.completed || inode.lease_id > 0 || (!inode.folder && !inode.persisted) => {
                            continue;
                        }
                        Some(inode) if inode.folder != e.folder || (!e.folder && inode.fingerprint != e.fingerprint) => "changed",
                        Some(_) => continue,
                    };
                    looked.note(path, &e.name, what)?;
                    rows.push(to_seen(e, mount));
                }
            }
            if !matches!(how, Look::Check) {
                CHANGES.inc_by(rows.len() as u64);
                for rows in rows.chunks(ROWS_PER_COMMAND) {
                    skipped += core.own_change(op(rows.to_vec(), Vec::new(), false)).await?.skipped;
                }
            }
            if let Look::First(limit) = how
                && looked.entries >= limit as u64
            {
                break false;
            }
        };
        if unshown > 0 {
            tracing::warn!(%path, count = unshown, "objects that cannot be shown");
        }
        self.unshown.insert(mount.id.get(), unshown);
        if !whole {
            return Ok((skipped == 0).then_some(looked));
        }
        looked.whole = true;
        skipped += self.take_gone(core, path, mount, id, &resolved.walk.ufs_key(path), &lister.into_names(), &mut looked, how, &op).await?;
        if skipped == 0 && !matches!(how, Look::Check) && !core.store.view().inode_or_root(id)?.is_some_and(|inode| inode.children_known) {
            skipped += core.own_change(op(Vec::new(), Vec::new(), true)).await?.skipped;
        }
        Ok((skipped == 0).then_some(looked))
    }

    /// What is known of a folder and was in no page is gone. Returns how many rows were stale.
    #[allow(clippy::too_many_arguments, reason = "the second half of `list_once`, which has all of them")]
    async fn take_gone(
        &self,
        core: &Core,
        path: &AbsPath,
        mount: &Mounted,
        id: InodeId,
        key: &[u8],
        seen: &SeenNames,
        looked: &mut Looked,
        how: Look,
        op: &(impl Fn(Vec<Seen>, Vec<bytes::Bytes>, bool) -> Op + Sync),
    ) -> Result<u64> {
        let (mut after, mut skipped): (Option<Vec<u8>>, u64) = (None, 0);
        loop {
            let batch = core.store.view().entries(id, after.as_deref(), ROWS_PER_COMMAND)?;
            let Some((last, _)) = batch.last() else { return Ok(skipped) };
            after = Some(last.clone());
            let mut gone = Vec::new();
            for (name, inode) in &batch {
                if !inode.persisted || inode.mount_id > 0 || !inode.completed || inode.lease_id > 0 || seen.saw(name) {
                    continue;
                }
                // A folder that is read while names in it are replaced may leave some out.
                let name_key = if key.is_empty() { name.clone() } else { [key, b"/", name].concat() };
                if mount.ufs.listing_may_miss() && !matches!(mount.ufs.stat(&name_key).await, Err(e) if e.kind() == ErrorKind::NotFound) {
                    continue;
                }
                looked.note(path, name, "gone")?;
                gone.push(name.clone().into());
            }
            if !gone.is_empty() && !matches!(how, Look::Check) {
                CHANGES.inc_by(gone.len() as u64);
                skipped += core.own_change(op(Vec::new(), gone, false)).await?.skipped;
            }
            if batch.len() < ROWS_PER_COMMAND {
                return Ok(skipped);
            }
        }
    }
}

/// Why a folder is listed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    /// A reader wants its names.
    IfStale,
    /// A reader wants so many of them.
    First(usize),
    /// Somebody asked for it to be brought in step.
    Now,
    /// Somebody wants to know what differs.
    Check,
}

/// What a look at a folder found.
#[derive(Debug, Default)]
pub struct Looked {
    /// Names in the store.
    pub entries: u64,
    /// Paths that were not as they were known, with what they are; the first ones.
    pub differences: Vec<(AbsPath, &'static str)>,
    /// How many there are.
    pub changes: u64,
    /// All names were looked at.
    whole: bool,
}

/// Differences told by name, per folder.
const DIFFERENCES_NAMED: usize = 1_000;

impl Looked {
    fn note(&mut self, folder: &AbsPath, name: &[u8], what: &'static str) -> Result<()> {
        self.changes += 1;
        if self.differences.len() < DIFFERENCES_NAMED {
            self.differences.push((folder.join(name)?, what));
        }
        Ok(())
    }
}
