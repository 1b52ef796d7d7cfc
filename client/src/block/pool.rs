//! Connections to workers, and the blocks they have granted. One TCP and one Unix connection per worker, made on demand.

use super::connection::Connection;
use super::local::LocalBlock;
use forebay_common::config::ClientConfig;
use forebay_common::{BlockId, Result, WorkerId, err};
use forebay_proto::data_request::Op;
use forebay_proto::data_response::Op as Answer;
use forebay_proto::{OpenBlock, OpenJoined, WorkerAddress};
use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How long a worker that could not be reached is passed over, where there is another.
const SHUNNED: Duration = Duration::from_secs(2);
/// How long the folder of sockets is trusted.
const LOOKED: Duration = Duration::from_secs(5);

/// Joined files of which the number is remembered.
const JOINED_MAX: usize = 65_536;

type Key = (WorkerId, bool);
type Slot = Arc<tokio::sync::Mutex<Option<Arc<Connection>>>>;

#[derive(Default)]
struct Granted {
    blocks: HashMap<BlockId, Arc<LocalBlock>>,
    /// Joined files: the number of one by its first and last block, and its length.
    joined: HashMap<(BlockId, BlockId, u64), BlockId>,
    /// Blocks that were taken back, ever.
    revocations: u64,
    order: VecDeque<BlockId>,
}

pub struct Pool {
    config: ClientConfig,
    slots: Mutex<HashMap<Key, Slot>>,
    shunned: Mutex<HashMap<Key, Instant>>,
    local: tokio::sync::Mutex<(Option<Instant>, HashMap<WorkerId, PathBuf>)>,
    granted: Arc<Mutex<Granted>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Pool {
    pub fn new(config: ClientConfig) -> Self {
        Pool { config, slots: Mutex::default(), shunned: Mutex::default(), local: tokio::sync::Mutex::default(), granted: Arc::default() }
    }

    fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.config.connect_timeout_ms)
    }

    fn read_timeout(&self) -> Duration {
        Duration::from_millis(self.config.read_timeout_ms)
    }

    /// Workers whose socket answers here. That, not a host name, is what local means.
    pub async fn local_workers(&self) -> Vec<WorkerId> {
        if !self.config.short_circuit {
            return Vec::new();
        }
        let mut local = self.local.lock().await;
        if local.0.is_none_or(|at| at.elapsed() > LOOKED) {
            let mut found = HashMap::new();
            for entry in std::fs::read_dir(&self.config.socket_dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.extension().is_none_or(|e| e != "sock") {
                    continue;
                }
                if let Some(id) = local.1.iter().find(|(_, known)| **known == path).map(|(id, _)| *id)
                    && self.open_slot((id, true)).await.is_some()
                {
                    found.insert(id, path);
                    continue;
                }
                match self.dial_unix(&path).await {
                    Ok(connection) => {
                        let id = WorkerId(connection.hello().worker_id);
                        *self.slot((id, true)).lock().await = Some(Arc::new(connection));
                        found.insert(id, path);
                    }
                    Err(e) => tracing::debug!(error = %e, path = %path.display(), "a socket that does not answer"),
                }
            }
            *local = (Some(Instant::now()), found);
        }
        local.1.keys().copied().collect()
    }

    fn slot(&self, key: Key) -> Slot {
        lock(&self.slots).entry(key).or_default().clone()
    }

    /// The open connection of a slot, if there is one.
    async fn open_slot(&self, key: Key) -> Option<Arc<Connection>> {
        let slot = self.slot(key);
        let guard = slot.lock().await;
        guard.as_ref().filter(|c| !c.is_closed()).cloned()
    }

    async fn dial_unix(&self, path: &Path) -> Result<Connection> {
        let granted = Arc::downgrade(&self.granted);
        let on_revoke = Arc::new(move |block: u64| {
            if let Some(granted) = granted.upgrade() {
                let dropped = {
                    let mut granted = lock(&granted);
                    granted.revocations += 1;
                    granted.blocks.remove(&BlockId(block))
                };
                drop(dropped);
            }
        });
        Connection::unix(path, self.connect_timeout(), self.read_timeout(), on_revoke).await
    }

    /// The Unix connection to a worker, if it is on this machine.
    pub async fn domain(&self, address: &WorkerAddress) -> Result<Arc<Connection>> {
        if !self.config.short_circuit {
            return Err(err!(Unsupported, "short circuit is switched off (client.short_circuit)"));
        }
        let path = PathBuf::from(&address.socket_path);
        let id = WorkerId(address.worker_id);
        let known = self.local.lock().await.1.get(&id).cloned();
        let path = known.unwrap_or(path);
        if !path.exists() {
            return Err(err!(NotFound, "no socket {} here", path.display()));
        }
        self.connect((id, true), || async {
            let connection = self.dial_unix(&path).await?;
            if connection.hello().worker_id != id.get() {
                return Err(err!(NotFound, "{} is the socket of another worker", path.display()));
            }
            Ok(connection)
        })
        .await
    }

    /// The TCP connection to a worker.
    pub async fn network(&self, address: &WorkerAddress) -> Result<Arc<Connection>> {
        let id = WorkerId(address.worker_id);
        let port = u16::try_from(address.data_port).map_err(|_| err!(InvalidArgument, "port {}", address.data_port))?;
        self.connect((id, false), || async {
            let connection = Connection::tcp(&address.host, port, self.connect_timeout(), self.read_timeout()).await?;
            if connection.hello().worker_id != id.get() {
                return Err(err!(Unavailable, "{}:{port} is another worker now", address.host));
            }
            Ok(connection)
        })
        .await
    }

    /// A connection of one's own, for writing: Unix where the worker is local, else TCP.
    pub async fn dedicated(&self, address: &WorkerAddress) -> Result<Connection> {
        if self.config.short_circuit && Path::new(&address.socket_path).exists() {
            match self.dial_unix(Path::new(&address.socket_path)).await {
                Ok(c) if c.hello().worker_id == address.worker_id => return Ok(c),
                Ok(_) => {}
                Err(e) => tracing::debug!(error = %e, "writing over the network instead"),
            }
        }
        let port = u16::try_from(address.data_port).map_err(|_| err!(InvalidArgument, "port {}", address.data_port))?;
        Connection::tcp(&address.host, port, self.connect_timeout(), self.read_timeout()).await
    }

    async fn connect<F: Future<Output = Result<Connection>>>(&self, key: Key, dial: impl FnOnce() -> F) -> Result<Arc<Connection>> {
        let slot = self.slot(key);
        let mut slot = slot.lock().await;
        if let Some(connection) = slot.as_ref().filter(|c| !c.is_closed()) {
            return Ok(connection.clone());
        }
        *slot = None;
        if let Some(at) = lock(&self.shunned).get(&key)
            && at.elapsed() < SHUNNED
        {
            return Err(err!(Unavailable, "worker {} could not be reached a moment ago", key.0));
        }
        match dial().await {
            Ok(connection) => {
                let connection = Arc::new(connection);
                *slot = Some(connection.clone());
                lock(&self.shunned).remove(&key);
                Ok(connection)
            }
            Err(e) => {
                lock(&self.shunned).insert(key, Instant::now());
                Err(e)
            }
        }
    }

    /// Tries a worker again that was passed over.
    pub fn forgive_all(&self) {
        lock(&self.shunned).clear();
    }

    /// The granted block; asked for when it is not held yet.
    pub async fn grant(&self, address: &WorkerAddress, token: &[u8], block: BlockId, length: u64) -> Result<Arc<LocalBlock>> {
        let revocations = {
            let granted = lock(&self.granted);
            if let Some(local) = granted.blocks.get(&block) {
                return Ok(local.clone());
            }
            granted.revocations
        };
        let open = Op::OpenBlock(OpenBlock { token: token.to_vec().into(), block_id: block.get() });
        self.take(address, open, Some(block), length, revocations).await
    }

    /// The whole file that a token is for, in one piece. `file`: its first and its last block, and its length. Errors: `NotFound` while there is no such piece.
    pub async fn grant_joined(&self, address: &WorkerAddress, token: &[u8], file: (BlockId, BlockId, u64)) -> Result<Arc<LocalBlock>> {
        let revocations = {
            let mut granted = lock(&self.granted);
            if let Some(local) = granted.joined.get(&file).and_then(|joined| granted.blocks.get(joined)) {
                return Ok(local.clone());
            }
            granted.joined.remove(&file);
            granted.revocations
        };
        let open = Op::OpenJoined(OpenJoined { token: token.to_vec().into() });
        let local = self.take(address, open, None, file.2, revocations).await?;
        let mut granted = lock(&self.granted);
        if granted.joined.len() >= JOINED_MAX {
            granted.joined.clear();
        }
        granted.joined.insert(file, local.block());
        Ok(local)
    }

    /// Takes what a worker grants; `block`: what was asked for, where that is known.
    async fn take(&self, address: &WorkerAddress, open: Op, block: Option<BlockId>, length: u64, revocations: u64) -> Result<Arc<LocalBlock>> {
        let connection = self.domain(address).await?;
        let received = connection.call(open).await?;
        let Answer::Granted(granted) = received.answer else { return Err(err!(Unavailable, "the worker answered something else")) };
        let Some(descriptors) = received.descriptors else {
            connection.close_later(granted.grant_id);
            return Err(err!(Unsupported, "the descriptors did not arrive: a sandbox drops them"));
        };
        let block = block.unwrap_or(BlockId(granted.block_id));
        let made = LocalBlock::new(block, length, &granted.tier, granted.grant_id, descriptors, connection.clone());
        let local = Arc::new(made.inspect_err(|_| connection.close_later(granted.grant_id))?);
        let mut held = lock(&self.granted);
        if held.revocations != revocations {
            // It may have been this one, taken back before it was put here: used now, and not kept.
            return Ok(local);
        }
        if held.blocks.insert(block, local.clone()).is_none() {
            held.order.push_back(block);
        }
        let mut dropped = Vec::new();
        while held.order.len() > self.config.grants_max {
            let oldest = held.order.pop_front();
            dropped.extend(oldest.and_then(|b| held.blocks.remove(&b)));
        }
        drop(held);
        drop(dropped);
        Ok(local)
    }

    /// Lets a grant go.
    pub fn forget(&self, block: BlockId) {
        let dropped = lock(&self.granted).blocks.remove(&block);
        drop(dropped);
    }

    /// Tells workers of grants that are no longer used.
    pub async fn flush_closes(&self) {
        let slots: Vec<Slot> = lock(&self.slots).values().cloned().collect();
        for slot in slots {
            let connection = slot.lock().await.clone();
            if let Some(connection) = connection.filter(|c| !c.is_closed()) {
                connection.flush_closes().await;
            }
        }
    }

    /// Open connections with what their workers said, for `doctor`.
    pub async fn hellos(&self) -> Vec<(forebay_proto::HelloOk, bool)> {
        let slots: Vec<Slot> = lock(&self.slots).values().cloned().collect();
        let mut out = Vec::new();
        for slot in slots {
            if let Some(connection) = slot.lock().await.as_ref() {
                out.push((connection.hello().clone(), connection.is_domain()));
            }
        }
        out
    }
}
