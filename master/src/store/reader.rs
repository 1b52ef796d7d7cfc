//! Reading records: the same typed getters over a snapshot (`View`) and over a command being applied (`Txn`).

use super::{CLUSTER_KEY, Cf, LEAVING_PREFIX, Store, dentry_key, id_key, rocks};
use forebay_common::{BlockId, InodeId, MountId, Result, WorkerId, err};
use forebay_proto::Job;
use forebay_proto::store::{Cluster, Counters, FileLocks, Inode, Lease, Link, LockSession, Mount, Pending, Persist};
use prost::Message;
use rocksdb::{Direction, IteratorMode, ReadOptions, SnapshotWithThreadMode};

/// Typed reads. Errors: `Corrupt` for a record that does not decode, naming its key.
pub trait Reader {
    /// The bytes under a key.
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// At most `limit` pairs with keys of this prefix, strictly after `after` when given, in order.
    fn scan(&self, cf: Cf, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>>;

    /// The pair with the greatest key not above `key` and not below `floor`. What was deleted in between is walked over.
    fn at_or_below(&self, cf: Cf, key: &[u8], floor: &[u8]) -> Result<Option<(Vec<u8>, Vec<u8>)>>;

    /// A decoded record.
    fn record<M: Message + Default>(&self, cf: Cf, key: &[u8]) -> Result<Option<M>> {
        self.get(cf, key)?.map(|raw| decode(cf, key, &raw)).transpose()
    }

    /// What is written under `name` in `parent`: an inode, or that it is one more name of a file (`alias_of`).
    fn entry(&self, parent: InodeId, name: &[u8]) -> Result<Option<Inode>> {
        self.record(Cf::Dentry, &dentry_key(parent, name))
    }

    /// The inode of `name` in `parent`.
    fn child(&self, parent: InodeId, name: &[u8]) -> Result<Option<Inode>> {
        self.entry(parent, name)?.map(|entry| self.behind(entry)).transpose()
    }

    /// The inode that an entry speaks of.
    fn behind(&self, entry: Inode) -> Result<Inode> {
        if entry.alias_of == 0 {
            return Ok(entry);
        }
        let (_, inode) =
            self.inode(InodeId(entry.alias_of))?.ok_or_else(|| err!(Corrupt, "a name of file {} is left, and the file is not", entry.alias_of))?;
        Ok(inode)
    }

    /// The inode of `/`.
    fn root(&self) -> Result<Inode> {
        self.entry(InodeId(0), b"")?.ok_or_else(|| err!(Corrupt, "metadata store has no root inode"))
    }

    /// Where an inode's entry is.
    fn link(&self, id: InodeId) -> Result<Option<Link>> {
        self.record(Cf::Link, &id_key(id.get()))
    }

    /// An inode by id, with its place.
    fn inode(&self, id: InodeId) -> Result<Option<(Link, Inode)>> {
        let Some(link) = self.link(id)? else { return Ok(None) };
        let inode =
            self.entry(InodeId(link.parent_id), &link.name)?.ok_or_else(|| err!(Corrupt, "inode {id} has a link to an entry that is not there"))?;
        Ok(Some((link, inode)))
    }

    /// An inode by id, the root among them.
    fn inode_or_root(&self, id: InodeId) -> Result<Option<Inode>> {
        if id == InodeId::ROOT { self.root().map(Some) } else { Ok(self.inode(id)?.map(|(_, inode)| inode)) }
    }

    /// Children in the order of names.
    fn children(&self, parent: InodeId, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, Inode)>> {
        self.entries(parent, after, limit)?.into_iter().map(|(name, entry)| Ok((name, self.behind(entry)?))).collect()
    }

    /// What is written under the names of a folder, in their order; as `entry`.
    fn entries(&self, parent: InodeId, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, Inode)>> {
        let prefix = id_key(parent.get());
        let after = after.map(|name| dentry_key(parent, name));
        self.scan(Cf::Dentry, &prefix, after.as_deref(), limit)?
            .into_iter()
            .map(|(key, raw)| Ok((key[8..].to_vec(), decode(Cf::Dentry, &key, &raw)?)))
            .collect()
    }

    /// The file that owns a block.
    fn block_owner(&self, block: BlockId) -> Result<Option<InodeId>> {
        let Some((key, raw)) = self.at_or_below(Cf::Block, &id_key(block.get()), &id_key(run_floor(block.get())))? else { return Ok(None) };
        let (Ok(first), Some((count, owner))) = (key.try_into().map(u64::from_be_bytes), parse_run(&raw)) else {
            return Err(err!(Corrupt, "block run of block {block} does not decode"));
        };
        Ok((block.get() - first < count).then_some(InodeId(owner)))
    }

    /// A mount by id.
    fn mount(&self, id: MountId) -> Result<Option<Mount>> {
        self.record(Cf::Mount, &id_key(id.get()))
    }

    /// All mounts by id. A mount table is small.
    fn mounts(&self) -> Result<Vec<Mount>> {
        self.all(Cf::Mount)
    }

    /// A lease by id.
    fn lease(&self, id: u64) -> Result<Option<Lease>> {
        self.record(Cf::Lease, &id_key(id))
    }

    /// All leases: as many as files are being written.
    fn leases(&self) -> Result<Vec<Lease>> {
        self.all(Cf::Lease)
    }

    /// The locks of a file.
    fn locks(&self, file: u64) -> Result<FileLocks> {
        Ok(self.record(Cf::Lock, &id_key(file))?.unwrap_or_default())
    }

    /// A session that may hold locks.
    fn lock_session(&self, id: u64) -> Result<Option<LockSession>> {
        self.record(Cf::LockSession, &id_key(id))
    }

    /// All of them: as many as mounts that have locked anything.
    fn lock_sessions(&self) -> Result<Vec<LockSession>> {
        self.all(Cf::LockSession)
    }

    /// Files of which a session holds locks, at most `limit`.
    fn locked_by(&self, session: u64, limit: usize) -> Result<Vec<u64>> {
        let rows = self.scan(Cf::LockedFile, &id_key(session), None, limit)?;
        Ok(rows.iter().filter_map(|(key, _)| Some(u64::from_be_bytes(key.get(8..)?.try_into().ok()?))).collect())
    }

    /// All changes that under stores have not done yet.
    fn pending(&self) -> Result<Vec<Pending>> {
        self.all(Cf::Pending)
    }

    /// What ends by `now_ms`, at most `limit`: when, and which inode.
    fn expired(&self, now_ms: u64, limit: usize) -> Result<Vec<(u64, InodeId)>> {
        let number = |raw: &[u8]| raw.try_into().map(u64::from_be_bytes).unwrap_or(0);
        let rows = self.scan(Cf::Ttl, b"", None, limit)?;
        let due = rows.iter().filter(|(key, _)| key.len() == 16).map(|(key, _)| (number(&key[..8]), InodeId(number(&key[8..]))));
        Ok(due.take_while(|(at, _)| *at <= now_ms).collect())
    }

    /// Files that are to get to their under store, oldest first, strictly after record `after`, at most `limit`.
    fn persists(&self, after: u64, limit: usize) -> Result<Vec<Persist>> {
        let rows = self.scan(Cf::Persist, b"", Some(&id_key(after)), limit)?;
        rows.iter().map(|(key, raw)| decode(Cf::Persist, key, raw)).collect()
    }

    /// Inodes of an index of them, strictly after `after`, at most `limit`.
    fn indexed(&self, cf: Cf, after: u64, limit: usize) -> Result<Vec<InodeId>> {
        let rows = self.scan(cf, b"", Some(&id_key(after)), limit)?;
        Ok(rows.iter().filter_map(|(key, _)| Some(InodeId(u64::from_be_bytes(key.as_slice().try_into().ok()?)))).collect())
    }

    /// All jobs, oldest first.
    fn jobs(&self) -> Result<Vec<Job>> {
        self.all(Cf::Job)
    }

    /// Workers that are to leave, each with the incarnation that alone is (0: the worker).
    fn leaving_workers(&self) -> Result<Vec<(WorkerId, u64)>> {
        let rows = self.scan(Cf::Meta, LEAVING_PREFIX, None, usize::MAX)?;
        let id = |key: &[u8]| Some(WorkerId(u64::from_be_bytes(key.strip_prefix(LEAVING_PREFIX)?.try_into().ok()?)));
        Ok(rows.iter().filter_map(|(key, value)| Some((id(key)?, value.as_slice().try_into().map_or(0, u64::from_be_bytes)))).collect())
    }

    /// The next ids and the totals.
    fn counters(&self) -> Result<Counters> {
        Ok(self.record(Cf::Meta, b"counters")?.unwrap_or_default())
    }

    /// Which cluster this is. Errors: `Corrupt` before it was opened.
    fn cluster(&self) -> Result<Cluster> {
        self.record(Cf::Meta, CLUSTER_KEY)?.ok_or_else(|| err!(Corrupt, "metadata store does not say which cluster it is of"))
    }

    /// Every record of a small family.
    fn all<M: Message + Default>(&self, cf: Cf) -> Result<Vec<M>> {
        self.scan(cf, b"", None, usize::MAX)?.iter().map(|(key, raw)| decode(cf, key, raw)).collect()
    }

    /// The names from the root down to this inode.
    fn path_of(&self, id: InodeId) -> Result<forebay_common::AbsPath> {
        let mut names = Vec::new();
        let mut at = id;
        while at != InodeId::ROOT {
            let link = self.link(at)?.ok_or_else(|| err!(NotFound, "inode {at} does not exist"))?;
            at = InodeId(link.parent_id);
            names.push(link.name);
        }
        names.iter().rev().try_fold(forebay_common::AbsPath::root(), |path, name| path.join(name))
    }
}

/// Ids that one run record may speak of: those with the same number of this many. Whose a block is, is then known after a look at no more keys than these, however many
/// blocks below it are gone: a deleted key is walked over like one that is there, until RocksDB has flushed and compacted it.
pub const RUN_SPAN: u64 = 64;

/// The first id of a block's span.
pub fn run_floor(id: u64) -> u64 {
    id - id % RUN_SPAN
}

/// Ids `first..first + count` by span: the first of each part, and how many it has.
pub fn spans(first: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    let (mut at, end) = (first, first.saturating_add(count));
    std::iter::from_fn(move || {
        let part = (at, end.min(run_floor(at).saturating_add(RUN_SPAN)) - at);
        at += part.1;
        (part.1 > 0).then_some(part)
    })
}

pub(super) fn not_below(floor: &[u8]) -> ReadOptions {
    let mut options = ReadOptions::default();
    options.set_iterate_lower_bound(floor);
    options
}

/// A run record.
pub fn run_record(count: u64, owner: InodeId) -> Vec<u8> {
    [count.to_be_bytes(), owner.get().to_be_bytes()].concat()
}

/// Count and owner of a run record.
pub fn parse_run(raw: &[u8]) -> Option<(u64, u64)> {
    let (count, rest) = raw.split_first_chunk::<8>()?;
    let owner = rest.first_chunk::<8>()?;
    Some((u64::from_be_bytes(*count), u64::from_be_bytes(*owner)))
}

pub(super) fn decode<M: Message + Default>(cf: Cf, key: &[u8], raw: &[u8]) -> Result<M> {
    M::decode(raw).map_err(|e| err!(Corrupt, "record {key:02x?} of {} does not decode: {e}", cf.name()))
}

/// A RocksDB snapshot.
pub struct View<'a> {
    store: &'a Store,
    snapshot: SnapshotWithThreadMode<'a, rocksdb::DB>,
}

impl<'a> View<'a> {
    pub(super) fn new(store: &'a Store) -> Self {
        View { store, snapshot: store.db.snapshot() }
    }
}

impl Reader for View<'_> {
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.snapshot.get_cf(self.store.cf(cf), key).map_err(rocks("reading"))
    }

    fn scan(&self, cf: Cf, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut options = ReadOptions::default();
        options.set_total_order_seek(true);
        let iterator = self.snapshot.iterator_cf_opt(self.store.cf(cf), options, IteratorMode::From(after.unwrap_or(prefix), Direction::Forward));
        collect(iterator, prefix, after, limit).map_err(rocks("scanning"))
    }

    fn at_or_below(&self, cf: Cf, key: &[u8], floor: &[u8]) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        let mut iterator = self.snapshot.iterator_cf_opt(self.store.cf(cf), not_below(floor), IteratorMode::From(key, Direction::Reverse));
        iterator.next().transpose().map(|pair| pair.map(|(k, v)| (k.into_vec(), v.into_vec()))).map_err(rocks("reading"))
    }
}

/// Keys and values.
type Rows = Vec<(Vec<u8>, Vec<u8>)>;
type Pair = std::result::Result<(Box<[u8]>, Box<[u8]>), rocksdb::Error>;

pub(super) fn collect(
    iterator: impl Iterator<Item = Pair>,
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: usize,
) -> std::result::Result<Rows, rocksdb::Error> {
    let mut out = Vec::new();
    for pair in iterator {
        let (key, value) = pair?;
        if !key.starts_with(prefix) || out.len() >= limit {
            break;
        }
        if after.is_none_or(|a| a != &*key) {
            out.push((key.into_vec(), value.into_vec()));
        }
    }
    Ok(out)
}
