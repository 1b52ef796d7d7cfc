//! `load`: has blocks cached, whole, on as many workers as asked for.

use super::{Done, Running, each, may_pass};
use crate::core::Core;
use crate::namespace::{self, READ};
use crate::replicate::load_order;
use crate::source;
use crate::store::Reader;
use crate::worker::{WorkerView, fetch_order};
use forebay_common::token::UfsSource;
use forebay_common::{AbsPath, BlockId, ErrorKind, InodeId, Result, err};
use forebay_proto::LoadBlock;
use forebay_proto::store::Inode;
use forebay_proto::task::What;
use futures::{FutureExt, StreamExt};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Blocks on their way at once, per worker; of small ones more.
const BLOCKS_PER_WORKER: u32 = 64;
const SMALL_PER_WORKER: u32 = 512;
/// A block that counts as a small one.
const SMALL_BYTES: u64 = 1 << 20;
/// Tries of one block.
const TRIES: u32 = 5;
/// Between two looks for a worker.
const WORKER_WAIT: Duration = Duration::from_secs(3);
/// Blocks of one file that are looked after at once.
const BLOCKS_OF_FILE: usize = 64;

pub async fn run(core: &Arc<Core>, running: &Arc<Running>) -> Result<()> {
    let (copies, tier) = {
        let job = running.job();
        (job.replicas.max(1) as usize, job.tier.clone())
    };
    let workers = super::workers(core, copies).await?;
    let permits = Semaphore::new(SMALL_PER_WORKER as usize * workers);
    let (loaded, folder) = (Mutex::default(), Mutex::default());
    let load = Arc::new(Load { core: core.clone(), running: running.clone(), permits, copies, tier, loaded, folder });
    each(core, running, false, |path, inode| load.clone().file(path, inode).boxed()).await?;
    tokio::time::sleep(REPORTED_WITHIN).await;
    let loaded = std::mem::take(&mut *load.loaded.lock().unwrap_or_else(|e| e.into_inner()));
    for id in loaded {
        let Some((_, inode)) = core.store.view().inode(id)? else { continue };
        let live = core.soft.workers.live();
        if !namespace::blocks(&inode).all(|(block, (_, length))| !source::whole_on(core, &live, block, length).is_empty()) {
            let mut job = running.job();
            job.files_done = job.files_done.saturating_sub(1);
            job.files_partly += 1;
        }
    }
    Ok(())
}

/// How files are to be loaded.
struct Load {
    core: Arc<Core>,
    running: Arc<Running>,
    permits: Semaphore,
    copies: usize,
    tier: String,
    /// Files that were loaded, the first ones.
    loaded: Mutex<Vec<InodeId>>,
    /// Where the folder of the last file is: the next file is mostly in the same.
    folder: Mutex<Option<Folder>>,
}

/// A folder in its under store.
#[derive(Clone)]
struct Folder {
    path: AbsPath,
    mount_id: u64,
    key: Vec<u8>,
}

/// Files looked at once more when all are loaded: what came later may have driven them out.
const LOOKED_AT_AGAIN: usize = 10_000;
/// How long workers have to report what they evicted.
const REPORTED_WITHIN: Duration = Duration::from_millis(200);

impl Load {
    async fn file(self: Arc<Self>, path: AbsPath, inode: Inode) -> Result<Done> {
        namespace::check(&self.running.who, &inode, READ, &path)?;
        if !inode.completed {
            return Err(err!(Busy, "{path} is still being written"));
        }
        let shared = Arc::new(inode.clone());
        let all: Vec<(BlockId, u64)> = namespace::blocks(&inode).map(|(id, (_, length))| (id, length)).collect();
        let blocks = futures::stream::iter(all).map(|(id, length)| self.clone().block(path.clone(), shared.clone(), id, length).boxed());
        let moved: Vec<Result<u64>> = blocks.buffer_unordered(BLOCKS_OF_FILE).collect().await;
        let moved: u64 = moved.into_iter().sum::<Result<u64>>()?;
        let mut loaded = self.loaded.lock().unwrap_or_else(|e| e.into_inner());
        if loaded.len() < LOOKED_AT_AGAIN {
            loaded.push(InodeId(inode.id));
        }
        Ok(if moved == 0 { Done::Nothing } else { Done::Did(inode.length) })
    }

    /// The order to fetch a block. What is known of its folder is believed at the first try.
    fn order(&self, path: &AbsPath, inode: &Inode, id: BlockId, first_try: bool) -> Result<LoadBlock> {
        let (Some(parent), Some(name), true) = (path.parent(), path.name(), first_try) else {
            return load_order(&self.core, InodeId(inode.id), inode, id);
        };
        if !inode.other_names.is_empty() {
            return load_order(&self.core, InodeId(inode.id), inode, id);
        }
        let known = self.folder.lock().unwrap_or_else(|e| e.into_inner()).clone().filter(|folder| folder.path == parent);
        let folder = match known {
            Some(folder) => folder,
            None => {
                let view = self.core.store.view();
                let walk = namespace::walk(&view, &parent)?;
                // While something is renamed in the store, each file is looked at for itself.
                let (Some((mount_id, _)), true) = (walk.mount, view.pending()?.is_empty()) else {
                    return load_order(&self.core, InodeId(inode.id), inode, id);
                };
                let folder = Folder { key: walk.ufs_key(&parent), mount_id: mount_id.get(), path: parent };
                *self.folder.lock().unwrap_or_else(|e| e.into_inner()) = Some(folder.clone());
                folder
            }
        };
        let key = if folder.key.is_empty() { name.to_vec() } else { [&folder.key[..], b"/", name].concat() };
        let ufs = UfsSource { mount_id: folder.mount_id, key, fingerprint: inode.fingerprint.clone(), previous_key: Vec::new() };
        Ok(source::load_order(inode, ufs, id))
    }

    /// Returns the bytes that were moved for it.
    async fn block(self: Arc<Self>, path: AbsPath, inode: Arc<Inode>, id: BlockId, length: u64) -> Result<u64> {
        let (core, inode, copies, tier) = (&self.core, &*inode, self.copies, self.tier.as_str());
        let (mut moved, mut tries) = (0, 0);
        loop {
            let live = core.soft.workers.live();
            let open: Vec<WorkerView> = live.iter().filter(|w| !w.leaving).cloned().collect();
            let whole = source::whole_on(core, &live, id, length);
            let in_tier = |worker| tier.is_empty() || core.soft.blocks.holders(id).iter().any(|h| h.worker == worker && h.tier == tier);
            let there: Vec<_> = whole.iter().copied().filter(|w| in_tier(*w)).collect();
            if there.len() >= copies {
                return Ok(moved);
            }
            // Where it is in another tier first, then where all agree that it is fetched.
            let order = whole.iter().copied().filter(|w| !there.contains(w)).chain(fetch_order(&open, id));
            let Some(target) = order.into_iter().find(|w| !there.contains(w)) else {
                tries += 1;
                if tries >= TRIES {
                    return Err(err!(Unavailable, "no worker is left that could take a copy"));
                }
                // One that was killed comes back, or is lost for good.
                tokio::time::sleep(WORKER_WAIT).await;
                continue;
            };
            let what = match there.first().and_then(|w| live.iter().find(|v| v.id == *w)) {
                Some(holder) if tier.is_empty() => What::Copy(source::copy_order(core, inode, id, length, holder)?),
                _ if inode.persisted => What::Load(LoadBlock { tier: tier.to_owned(), ..self.order(&path, inode, id, tries == 0)? }),
                // In no under store: what the cache has is all there is.
                _ => return Ok(moved),
            };
            self.running.bandwidth.take(length).await;
            let outcome = {
                let weight = if length <= SMALL_BYTES { 1 } else { SMALL_PER_WORKER / BLOCKS_PER_WORKER };
                let _permit = self.permits.acquire_many(weight).await;
                core.soft.tasks.submit(target, what).outcome().await
            };
            match outcome {
                Ok(done) => {
                    moved += done.bytes.max(1);
                    // Known before the worker's next report.
                    core.soft.blocks.report(target, id, length, if tier.is_empty() { "MEM" } else { crate::block::tier_name(tier) });
                }
                Err(e) => {
                    tries += 1;
                    // It may have been moved since its folder was looked at.
                    let elsewhere = tries == 1 && e.kind() == ErrorKind::NotFound;
                    if tries >= TRIES || !(may_pass(&e) || elsewhere) {
                        return Err(e);
                    }
                    tokio::time::sleep(Duration::from_millis(100 << tries)).await;
                }
            }
        }
    }
}
