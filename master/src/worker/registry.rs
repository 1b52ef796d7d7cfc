//! Workers by heartbeat. Soft state: a master that restarts learns it again within a heartbeat.

use super::racks::Racks;
use forebay_common::{BlockId, WorkerId, clock};
use forebay_proto::{HeartbeatRequest, NamedValue, RefusedWorker, RegisterRequest, TierUsage, WorkerAddress, WorkerReport};
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

/// Refused workers that are remembered, and for how long: they ask again before it is over.
const REFUSED_MAX: usize = 1_000;
const REFUSED_FOR: Duration = Duration::from_secs(60);
/// Deletions, and pins, sent with one heartbeat.
const DELETES_PER_HEARTBEAT: usize = 10_000;

struct Worker {
    address: WorkerAddress,
    incarnation: u64,
    tiers: Vec<TierUsage>,
    heard: Instant,
    heard_ms: u64,
    skew_ms: i64,
    warnings: Vec<String>,
    deletes: VecDeque<u64>,
    /// The last word about each block.
    pins: HashMap<u64, bool>,
    counters: HashMap<String, u64>,
    lost: bool,
    /// Blocks whose bytes are in an under store by now.
    settled: HashSet<u64>,
    all_told: bool,
}

/// How far a worker is that is to leave.
#[derive(Default)]
struct Leaving {
    to_move: u64,
    left: bool,
    /// The incarnation that alone is; 0: the worker, until it is told otherwise.
    process: u64,
}

/// What placement needs to know of a live worker.
#[derive(Clone, Debug)]
pub struct WorkerView {
    /// Its id.
    pub id: WorkerId,
    /// How it is reached.
    pub address: WorkerAddress,
    /// Free bytes over its tiers; evictable bytes count as used here.
    pub free_bytes: u64,
    /// It is to leave: it gets nothing new.
    pub leaving: bool,
    /// Where its machine is, as Hadoop has it.
    pub rack: String,
}

/// What a heartbeat is answered with, and what it told.
#[derive(Default)]
pub struct Orders {
    /// Blocks to drop.
    pub deletes: Vec<u64>,
    /// Blocks to pin, or to let go.
    pub pins: HashMap<u64, bool>,
    /// Blocks that may be evicted from now on.
    pub settled: Vec<u64>,
    /// What the worker's counters have grown by.
    pub increments: Vec<NamedValue>,
}

/// Both locks are taken in this order: `leaving`, then `workers`.
#[derive(Default)]
pub struct Registry {
    leaving: RwLock<HashMap<WorkerId, Leaving>>,
    workers: RwLock<HashMap<WorkerId, Worker>>,
    refused: Mutex<HashMap<WorkerId, (Instant, RefusedWorker)>>,
    /// Where machines are.
    pub racks: Racks,
}

impl Registry {
    /// A worker says who it is.
    pub fn register(&self, request: &RegisterRequest, address: WorkerAddress) {
        let id = WorkerId(address.worker_id);
        let counters = request.counters.iter().map(|c| (c.name.clone(), c.value)).collect();
        let worker = Worker {
            address,
            incarnation: request.incarnation,
            tiers: request.tiers.clone(),
            heard: Instant::now(),
            heard_ms: clock::now_ms(),
            skew_ms: 0,
            warnings: Vec::new(),
            deletes: VecDeque::new(),
            pins: HashMap::new(),
            counters,
            lost: false,
            settled: HashSet::new(),
            all_told: false,
        };
        self.refused().remove(&id);
        self.workers.write().unwrap_or_else(|e| e.into_inner()).insert(id, worker);
    }

    fn refused(&self) -> MutexGuard<'_, HashMap<WorkerId, (Instant, RefusedWorker)>> {
        self.refused.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A worker is not let in, and what was known of it is over.
    pub fn refuse(&self, address: &WorkerAddress, reason: &str) {
        self.workers.write().unwrap_or_else(|e| e.into_inner()).remove(&WorkerId(address.worker_id));
        let mut refused = self.refused();
        refused.retain(|_, (at, _)| at.elapsed() < REFUSED_FOR);
        let id = WorkerId(address.worker_id);
        let worker = RefusedWorker { address: Some(address.clone()), reason: reason.to_owned() };
        if (refused.len() < REFUSED_MAX || refused.contains_key(&id)) && refused.insert(id, (Instant::now(), worker)).is_none() {
            tracing::error!(worker = %id, host = address.host, port = address.data_port, "a worker is refused: {reason}");
        }
    }

    /// Workers that asked a while ago and were not let in.
    pub fn refused_lately(&self) -> Vec<RefusedWorker> {
        self.refused().values().filter(|(at, _)| at.elapsed() < REFUSED_FOR).map(|(_, worker)| worker.clone()).collect()
    }

    /// Takes a heartbeat. `None`: unknown or lost, register again.
    pub fn heartbeat(&self, request: &HeartbeatRequest) -> Option<Orders> {
        let mut workers = self.workers.write().unwrap_or_else(|e| e.into_inner());
        let worker = workers.get_mut(&WorkerId(request.worker_id))?;
        if worker.lost || worker.incarnation != request.incarnation {
            return None;
        }
        worker.heard = Instant::now();
        worker.heard_ms = clock::now_ms();
        worker.skew_ms = request.now_ms as i64 - worker.heard_ms as i64;
        worker.tiers.clone_from(&request.tiers);
        worker.warnings.clone_from(&request.warnings);
        let mut increments = Vec::new();
        for counter in &request.counters {
            let before = worker.counters.insert(counter.name.clone(), counter.value).unwrap_or(0);
            if let Some(by @ 1..) = counter.value.checked_sub(before) {
                increments.push(NamedValue { name: counter.name.clone(), value: by });
            }
        }
        let count = worker.deletes.len().min(DELETES_PER_HEARTBEAT);
        let pinned: Vec<u64> = worker.pins.keys().take(DELETES_PER_HEARTBEAT).copied().collect();
        let pins = pinned.into_iter().filter_map(|id| worker.pins.remove_entry(&id)).collect();
        let settled: Vec<u64> = worker.settled.iter().take(DELETES_PER_HEARTBEAT).copied().collect();
        let settled = settled.into_iter().filter(|id| worker.settled.remove(id)).collect();
        Some(Orders { deletes: worker.deletes.drain(..count).collect(), pins, settled, increments })
    }

    fn leaving(&self) -> RwLockReadGuard<'_, HashMap<WorkerId, Leaving>> {
        self.leaving.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes the list of workers that are to leave.
    pub fn set_leaving(&self, workers: &[(WorkerId, u64)]) {
        let mut all = self.leaving.write().unwrap_or_else(|e| e.into_inner());
        all.retain(|id, _| workers.iter().any(|(of, _)| of == id));
        for (worker, process) in workers {
            let leaving = all.entry(*worker).or_insert_with(|| Leaving { to_move: u64::MAX, ..Leaving::default() });
            leaving.process = *process;
        }
    }

    /// The incarnation of a worker that runs now; 0: none is known.
    pub fn incarnation(&self, worker: WorkerId) -> u64 {
        self.workers.read().unwrap_or_else(|e| e.into_inner()).get(&worker).map_or(0, |w| w.incarnation)
    }

    /// Whether another incarnation of a worker was to leave than this one.
    pub fn another_was_to_leave(&self, worker: WorkerId, incarnation: u64) -> bool {
        self.leaving().get(&worker).is_some_and(|l| l.process > 0 && l.process != incarnation)
    }

    /// Workers whose process was to leave and is not there (any more), each with whether it had left. Asked for when all had the time to register.
    pub fn stopped(&self) -> Vec<(WorkerId, bool)> {
        let leaving = self.leaving();
        let workers = self.workers.read().unwrap_or_else(|e| e.into_inner());
        let there = |id: &WorkerId| workers.get(id).is_some_and(|w| !w.lost);
        leaving.iter().filter(|(id, l)| l.process > 0 && !there(id)).map(|(id, l)| (*id, l.left)).collect()
    }

    /// A worker that has left does not come back: nothing is said of it any more.
    pub fn forget(&self, worker: WorkerId) {
        self.workers.write().unwrap_or_else(|e| e.into_inner()).remove(&worker);
    }

    /// Whether a worker is to leave.
    pub fn is_leaving(&self, worker: WorkerId) -> bool {
        self.leaving().contains_key(&worker)
    }

    /// Whether all blocks of a worker are known, and it knows that it is to leave.
    pub fn note_told(&self, worker: WorkerId, all_told: bool) {
        if let Some(worker) = self.workers.write().unwrap_or_else(|e| e.into_inner()).get_mut(&worker) {
            worker.all_told = all_told;
        }
    }

    /// See `note_told`.
    pub fn has_told(&self, worker: WorkerId) -> bool {
        self.workers.read().unwrap_or_else(|e| e.into_inner()).get(&worker).is_some_and(|w| w.all_told)
    }

    /// Workers that are to leave, whether they have or not.
    pub fn to_drain(&self) -> Vec<WorkerId> {
        self.leaving().keys().copied().collect()
    }

    /// Notes how much is left to move off a leaving worker; at 0 it has left. Returns whether it has just now.
    pub fn note_drained(&self, worker: WorkerId, to_move: u64) -> bool {
        let mut all = self.leaving.write().unwrap_or_else(|e| e.into_inner());
        let Some(leaving) = all.get_mut(&worker) else { return false };
        let before = leaving.left;
        (leaving.to_move, leaving.left) = (to_move, to_move == 0);
        leaving.left && !before
    }

    /// Whether a worker is known, and not lost, as this start of its process.
    pub fn is_incarnation(&self, worker: WorkerId, incarnation: u64) -> bool {
        let workers = self.workers.read().unwrap_or_else(|e| e.into_inner());
        workers.get(&worker).is_some_and(|w| !w.lost && w.incarnation == incarnation)
    }

    /// Has a worker know that a block's bytes are in an under store.
    pub fn queue_settled(&self, worker: WorkerId, block: BlockId) {
        if let Some(worker) = self.workers.write().unwrap_or_else(|e| e.into_inner()).get_mut(&worker) {
            worker.settled.insert(block.get());
        }
    }

    /// Has a worker keep a block whatever happens, or let it go.
    pub fn queue_pin(&self, worker: WorkerId, block: BlockId, pinned: bool) {
        if let Some(worker) = self.workers.write().unwrap_or_else(|e| e.into_inner()).get_mut(&worker) {
            worker.pins.insert(block.get(), pinned);
        }
    }

    /// Has a worker drop a block.
    pub fn queue_delete(&self, worker: WorkerId, block: BlockId) {
        if let Some(worker) = self.workers.write().unwrap_or_else(|e| e.into_inner()).get_mut(&worker) {
            worker.deletes.push_back(block.get());
        }
    }

    /// Marks workers that were silent for too long and returns those newly lost.
    pub fn expire(&self, timeout: Duration) -> Vec<WorkerId> {
        let mut workers = self.workers.write().unwrap_or_else(|e| e.into_inner());
        let lost = workers.iter_mut().filter(|(_, w)| !w.lost && w.heard.elapsed() > timeout);
        lost.map(|(id, worker)| {
            worker.lost = true;
            *id
        })
        .collect()
    }

    /// The live workers, by id, without those that have left.
    pub fn live(&self) -> Vec<WorkerView> {
        let mut live = self.present();
        let leaving = self.leaving();
        live.retain(|w| !leaving.get(&w.id).is_some_and(|l| l.left));
        live
    }

    /// The live workers, by id, those that have left among them.
    pub fn present(&self) -> Vec<WorkerView> {
        let leaving = self.leaving();
        let workers = self.workers.read().unwrap_or_else(|e| e.into_inner());
        let mut live: Vec<WorkerView> = workers
            .iter()
            .filter(|(_, w)| !w.lost)
            .map(|(id, w)| {
                let free_bytes = w.tiers.iter().map(|t| t.total_bytes.saturating_sub(t.used_bytes)).sum();
                let address = w.address.clone();
                let rack = self.racks.of(&[&address.hadoop_host, &address.ip, &address.host]);
                WorkerView { id: *id, address, free_bytes, leaving: leaving.contains_key(id), rack }
            })
            .collect();
        live.sort_by_key(|w| w.id);
        live
    }

    /// Everything, for `report`.
    pub fn report(&self) -> Vec<WorkerReport> {
        let leaving = self.leaving();
        let workers = self.workers.read().unwrap_or_else(|e| e.into_inner());
        let mut out: Vec<WorkerReport> = workers
            .iter()
            .map(|(id, w)| WorkerReport {
                address: Some(w.address.clone()),
                last_heartbeat_ms: w.heard_ms,
                silent_ms: u64::try_from(w.heard.elapsed().as_millis()).unwrap_or(u64::MAX),
                lost: w.lost,
                tiers: w.tiers.clone(),
                clock_skew_ms: w.skew_ms,
                warnings: w.warnings.clone(),
                leaving: leaving.contains_key(id),
                left: leaving.get(id).is_some_and(|l| l.left),
                to_move: leaving.get(id).map_or(0, |l| l.to_move),
            })
            .collect();
        out.sort_by_key(|r| r.address.as_ref().map_or(0, |a| a.worker_id));
        out
    }
}

/// Live workers in the order in which they should fetch a block nobody has: rendezvous hashing (Thaler and Ravishankar,
/// 1998), so that all clients agree and few blocks move when a worker comes or goes.
pub fn fetch_order(live: &[WorkerView], block: BlockId) -> Vec<WorkerId> {
    let mut ranked: Vec<(u64, WorkerId)> = live
        .iter()
        .map(|w| {
            let mut hasher = DefaultHasher::new();
            (w.id.get(), block.get()).hash(&mut hasher);
            (hasher.finish(), w.id)
        })
        .collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.into_iter().map(|(_, id)| id).collect()
}
