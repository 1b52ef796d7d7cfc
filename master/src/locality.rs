//! `Position`: where a caller is, and what follows from that: which of a block's workers it should read, and by which names a worker is told to those who place work.
//!
//! The one place that knows of nearness; asked by `service::placement` for our own clients and by `hadoop::locate` for Hadoop's. One is made per request, and
//! remembers what it found out about a worker. In a Kubernetes cluster the caller is known by its pod's address; elsewhere by its machine's.

use crate::core::Core;
use crate::kubernetes::Asker;
use crate::worker::{WorkerView, fetch_order};
use forebay_common::config::Locality;
use forebay_common::{BlockId, WorkerId};
use std::cell::RefCell;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Names of pods that one block is told by: Spark adds up bytes by name, and keeps the three with most.
const NAMES_PER_BLOCK: usize = 3;
/// A host that Spark and Hadoop place no work by.
const NOWHERE: &str = "localhost";

/// How far a worker is. The least is the nearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Distance {
    /// 0: the caller's machine; 1: its zone; 2: elsewhere.
    class: u8,
    /// Levels between two racks.
    racks: usize,
}

/// Levels of two racks that are not the same, as Hadoop's `NetworkTopology` counts them.
pub fn rack_distance(a: &str, b: &str) -> usize {
    if a == b {
        return 0;
    }
    let names = |rack: &'_ str| rack.split('/').filter(|name| !name.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    let (a, b) = (names(a), names(b));
    let common = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    a.len() + b.len() - 2 * common
}

/// Whether a worker is on the machine that a call came from.
pub fn is_at(worker: &WorkerView, ip: IpAddr) -> bool {
    worker.address.ip.parse() == Ok(ip)
}

/// By which name a worker is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// Its own.
    Own,
    /// As if it had this host name; its address stays.
    Host(String),
    /// The caller's own address, for Java clients that reach it by its socket.
    Here(IpAddr),
}

/// Where one caller is.
pub struct Position<'a> {
    core: &'a Core,
    ip: Option<IpAddr>,
    asker: Asker,
    zone: Option<Arc<str>>,
    rack: String,
    distances: RefCell<HashMap<WorkerId, Distance>>,
    names: RefCell<HashMap<WorkerId, Arc<[String]>>>,
}

impl<'a> Position<'a> {
    /// Of whoever calls from `ip`, and says that it is on `node` (empty: it does not say). `live`: the workers.
    pub fn of(core: &'a Core, ip: Option<IpAddr>, node: &str, live: &[WorkerView]) -> Position<'a> {
        // A socket for both families tells an old address in its new form.
        let ip = ip.map(|ip| ip.to_canonical());
        let mut asker = ip.map(|ip| core.kubernetes.asker(ip)).unwrap_or_default();
        if asker.node.is_none() && !node.is_empty() {
            asker.node = Some(node.into());
        }
        let zone = asker.node.as_ref().and_then(|node| core.kubernetes.zone(node));
        let rack = ip.map_or_else(String::new, |ip| {
            let beside = live.iter().find(|w| is_at(w, ip)).map(|w| w.rack.clone());
            beside.unwrap_or_else(|| core.soft.workers.racks.of(&[&ip.to_string()]))
        });
        Position { core, ip, asker, zone, rack, distances: RefCell::default(), names: RefCell::default() }
    }

    /// Whether a worker is on the caller's machine.
    pub fn is_here(&self, worker: &WorkerView) -> bool {
        let node = worker.address.node.as_str();
        self.ip.is_some_and(|ip| is_at(worker, ip)) || !node.is_empty() && self.asker.node.as_deref() == Some(node)
    }

    /// How far a worker is.
    pub fn distance(&self, worker: &WorkerView) -> Distance {
        *self.distances.borrow_mut().entry(worker.id).or_insert_with(|| {
            let node = worker.address.node.as_str();
            let near = || !node.is_empty() && self.zone.is_some() && self.core.kubernetes.zone(node) == self.zone;
            let class = if self.is_here(worker) {
                0
            } else if near() {
                1
            } else {
                2
            };
            Distance { class, racks: rack_distance(&self.rack, &worker.rack) }
        })
    }

    /// In which order a block's workers come, the least first: for who reads the nearest, for who plans those that have most of it.
    pub fn rank(&self, worker: &WorkerView, cached_bytes: u64, reads: bool) -> impl Ord + use<> {
        let (distance, fullness) = (self.distance(worker), std::cmp::Reverse(cached_bytes));
        let first = if reads && !self.plans() { (Some(distance), None) } else { (None, Some(fullness)) };
        (first, distance, fullness)
    }

    /// Whose pods are named: the asking application's executors, or those that the selector selects. `None`: nobody's.
    fn pods(&self) -> Option<Option<&str>> {
        match self.core.kubernetes_config.locality {
            Locality::Spark => self.asker.app.as_deref().map(Some),
            Locality::Pods => Some(None),
            Locality::None | Locality::Node => None,
        }
    }

    /// The names by which a worker is told to whoever places work.
    fn names(&self, worker: &WorkerView) -> Arc<[String]> {
        let find = || -> Arc<[String]> {
            let node = worker.address.node.as_str();
            let view = &self.core.kubernetes;
            let text = |all: Vec<IpAddr>| all.iter().map(IpAddr::to_string).collect();
            match (self.core.kubernetes_config.locality, &self.asker.app) {
                _ if node.is_empty() => Arc::new([]),
                (Locality::Node, _) => Arc::new([node.to_owned()]),
                (Locality::Spark, Some(app)) => text(view.executors(app, node)),
                (Locality::Pods, _) => text(view.readers(node)),
                (Locality::None | Locality::Spark, _) => Arc::new([]),
            }
        };
        self.names.borrow_mut().entry(worker.id).or_insert_with(find).clone()
    }

    /// Whether it asks for others: a Spark driver plans, its executors read.
    fn plans(&self) -> bool {
        self.asker.app.is_some() && !self.asker.executor
    }

    /// Live workers in the order in which they should fetch a block nobody has: that beside who is to read it, then those where its work is.
    /// `reads`: the caller itself is about to.
    pub fn fetchers(&self, open: &[WorkerView], block: BlockId, reads: bool, count: usize) -> Vec<WorkerId> {
        let beside = open.iter().find(|w| reads && !self.plans() && self.is_here(w)).map(|w| w.id);
        let busy = self.pods().map(|app| self.core.kubernetes.busy(app, open.iter().map(|w| &w.address.node)));
        let where_work_is: Vec<WorkerView> = match &busy {
            Some(busy) => open.iter().zip(busy).filter(|(_, busy)| **busy).map(|(w, _)| w.clone()).collect(),
            None => Vec::new(),
        };
        let order = fetch_order(if where_work_is.is_empty() { open } else { &where_work_is }, block);
        let mut all: Vec<WorkerId> = beside.into_iter().collect();
        all.extend(order.into_iter().filter(|id| Some(*id) != beside).take(count));
        all
    }

    /// How the workers of one block, the best first, are told: each by its own name, or by those of up to three pods on their machines, another three for
    /// the next block.
    pub fn tell(&self, block: BlockId, workers: &[&WorkerView]) -> Vec<(usize, Name)> {
        let names: Vec<Arc<[String]>> = workers.iter().map(|w| self.names(w)).collect();
        let mut told = vec![0; workers.len()];
        let mut left = NAMES_PER_BLOCK;
        while left > 0 {
            let before = left;
            for (told, names) in told.iter_mut().zip(&names) {
                if left > 0 && *told < names.len() {
                    *told += 1;
                    left -= 1;
                }
            }
            if left == before {
                break;
            }
        }
        let mut out = Vec::with_capacity(workers.len() + NAMES_PER_BLOCK);
        let any = told.iter().any(|told| *told > 0);
        for (i, (names, told)) in names.iter().zip(&told).enumerate() {
            if *told == 0 && !any {
                out.push((i, Name::Own));
            }
            let first = usize::try_from(block.get() % names.len().max(1) as u64).unwrap_or(0);
            out.extend(names.iter().cycle().skip(first).take(*told).map(|name| (i, Name::Host(name.clone()))));
        }
        // Beside names that work is placed by, that of a worker without any would only take one of Spark's three places: `localhost` it leaves out.
        if any {
            out.extend(told.iter().enumerate().filter(|(_, told)| **told == 0).map(|(i, _)| (i, Name::Host(NOWHERE.to_owned()))));
        }
        out
    }

    /// The worker that a Java client should be told under its own address: on its node, reached by a socket that its pod mounts. Those who plan do not read.
    pub fn by_socket(&self, worker: &WorkerView) -> Option<Name> {
        let wanted = self.core.kubernetes_config.java_short_circuit && self.asker.mounts_sockets && !self.plans() && self.is_here(worker);
        self.ip.filter(|ip| wanted && !is_at(worker, *ip)).map(Name::Here)
    }
}
