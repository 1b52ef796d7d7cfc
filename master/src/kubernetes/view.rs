//! `View`: the pods and nodes of a cluster, as far as locality needs them.
//!
//! Written by `watch` from the API server's events, asked by whoever sorts workers for a caller. Invariants: a pod is known by its uid, never by its address, which
//! others get when it is gone; a pod that has ended, or has no address or node yet, is in no index; the indexes hold what `pods` holds and nothing else.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Pods kept; those beyond are not seen.
pub const PODS_MAX: usize = 500_000;

/// What is kept of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    pub ip: IpAddr,
    pub node: Arc<str>,
    /// It has its node's address, as others there may.
    pub host_network: bool,
    /// The Spark application it belongs to.
    pub app: Option<Arc<str>>,
    /// Of Spark: it runs tasks.
    pub executor: bool,
    /// The uid of the pod that made it: of an executor, its driver, which has no label of its own where a program in a pod (a notebook) is the driver.
    pub owner: Option<Arc<str>>,
    /// Its containers see the folder with the workers' sockets.
    pub mounts_sockets: bool,
}

/// Pods by node: who could read there.
type Places = BTreeMap<Arc<str>, BTreeMap<Arc<str>, IpAddr>>;

#[derive(Default)]
struct Inner {
    pods: HashMap<Arc<str>, PodFacts>,
    /// The one that was seen last is last.
    by_ip: HashMap<IpAddr, Vec<Arc<str>>>,
    /// Executors, by application.
    apps: HashMap<Arc<str>, Places>,
    /// Applications of the executors that a pod made, with how many there are; the one that was begun last is last.
    drivers: HashMap<Arc<str>, Vec<(Arc<str>, usize)>>,
    /// Uids that the selector selects, whether they are among the pods or not.
    selected: HashSet<Arc<str>>,
    /// Those of them that are.
    readers: Places,
    zones: HashMap<Arc<str>, Option<Arc<str>>>,
    /// Addresses of callers that were no pod's for as long as one is waited for.
    strangers: HashMap<IpAddr, Instant>,
    /// Why not all is seen, by what is looked at.
    errors: BTreeMap<String, String>,
}

fn insert(places: &mut Places, uid: &Arc<str>, pod: &PodFacts) {
    places.entry(pod.node.clone()).or_default().insert(uid.clone(), pod.ip);
}

fn take(places: &mut Places, uid: &str, pod: &PodFacts) {
    if let Some(there) = places.get_mut(&pod.node) {
        there.remove(uid);
        if there.is_empty() {
            places.remove(&pod.node);
        }
    }
}

impl Inner {
    fn remove(&mut self, uid: &str) {
        let Some((uid, pod)) = self.pods.remove_entry(uid) else { return };
        if let Some(all) = self.by_ip.get_mut(&pod.ip) {
            all.retain(|other| *other != uid);
            if all.is_empty() {
                self.by_ip.remove(&pod.ip);
            }
        }
        if let Some(app) = pod.app.as_ref().filter(|_| pod.executor)
            && let Some(places) = self.apps.get_mut(app)
        {
            take(places, &uid, &pod);
            if places.is_empty() {
                self.apps.remove(app);
            }
            if let Some(owner) = &pod.owner
                && let Some(all) = self.drivers.get_mut(owner)
            {
                all.iter_mut().filter(|(of, _)| of == app).for_each(|(_, count)| *count -= 1);
                all.retain(|(_, count)| *count > 0);
                if all.is_empty() {
                    self.drivers.remove(owner);
                }
            }
        }
        take(&mut self.readers, &uid, &pod);
    }

    fn insert(&mut self, uid: Arc<str>, pod: PodFacts) {
        self.by_ip.entry(pod.ip).or_default().push(uid.clone());
        if let Some(app) = pod.app.as_ref().filter(|_| pod.executor) {
            insert(self.apps.entry(app.clone()).or_default(), &uid, &pod);
            if let Some(owner) = &pod.owner {
                let all = self.drivers.entry(owner.clone()).or_default();
                match all.iter_mut().find(|(of, _)| of == app) {
                    Some((_, count)) => *count += 1,
                    None => all.push((app.clone(), 1)),
                }
            }
        }
        if self.selected.contains(&uid) {
            insert(&mut self.readers, &uid, &pod);
        }
        self.pods.insert(uid, pod);
    }
}

/// Who calls from an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asker {
    pub node: Option<Arc<str>>,
    /// Its Spark application.
    pub app: Option<Arc<str>>,
    pub executor: bool,
    pub mounts_sockets: bool,
}

/// How long the first call from an address waits for the pod that may have it.
const AWAITED_MAX: Duration = Duration::from_secs(1);
/// Addresses remembered that no pod had by then, and for how long: another pod may have it later.
const STRANGERS_MAX: usize = 65_536;
const STRANGE_FOR: Duration = Duration::from_secs(600);

/// The view. Empty outside of a cluster.
#[derive(Default)]
pub struct View {
    inner: RwLock<Inner>,
    /// A pod has come.
    came: Notify,
}

impl View {
    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(|e| e.into_inner())
    }

    /// A pod is as `facts` say; `None`: it has ended, or is not anywhere yet. Returns `false` when there are too many.
    pub fn set_pod(&self, uid: &str, facts: Option<PodFacts>) -> bool {
        let mut inner = self.write();
        if facts.is_some() && inner.pods.get(uid) == facts.as_ref() {
            return true;
        }
        inner.remove(uid);
        match facts {
            Some(_) if inner.pods.len() >= PODS_MAX => false,
            Some(facts) => {
                inner.strangers.remove(&facts.ip);
                inner.insert(uid.into(), facts);
                self.came.notify_waiters();
                true
            }
            None => true,
        }
    }

    /// Whether the selector selects a pod.
    pub fn set_selected(&self, uid: &str, selected: bool) {
        let mut inner = self.write();
        let pod = inner.pods.get_key_value(uid).map(|(uid, pod)| (uid.clone(), pod.clone()));
        if selected {
            let uid = pod.as_ref().map_or_else(|| uid.into(), |(uid, _)| uid.clone());
            inner.selected.insert(uid.clone());
            if let Some((_, pod)) = pod {
                insert(&mut inner.readers, &uid, &pod);
            }
        } else {
            inner.selected.remove(uid);
            if let Some((uid, pod)) = pod {
                take(&mut inner.readers, &uid, &pod);
            }
        }
    }

    /// A node is in this zone; the outer `None`: it is gone.
    pub fn set_node(&self, name: &str, zone: Option<Option<String>>) {
        let mut inner = self.write();
        match zone {
            Some(zone) => drop(inner.zones.insert(name.into(), zone.map(Into::into))),
            None => drop(inner.zones.remove(name)),
        }
    }

    /// What is looked at cannot be seen, or can again.
    pub fn set_error(&self, what: &str, error: Option<String>) -> bool {
        // Nearly always there was none, and is none.
        if error.is_none() && self.read().errors.is_empty() {
            return false;
        }
        let mut inner = self.write();
        let before = match &error {
            Some(error) => inner.errors.insert(what.to_owned(), error.clone()),
            None => inner.errors.remove(what),
        };
        before != error
    }

    /// Returns when it is known who calls from an address, or when no pod has it for `AWAITED_MAX`: kubelet tells the API server a pod's address when its network is there, and its containers may
    /// run before that is heard here. Once for an address and ten minutes; not where not all is seen.
    pub async fn await_pod(&self, ip: IpAddr) {
        let ip = ip.to_canonical();
        let deadline = tokio::time::Instant::now() + AWAITED_MAX;
        loop {
            let mut came = std::pin::pin!(self.came.notified());
            // From here on nothing is missed.
            came.as_mut().enable();
            {
                let inner = self.read();
                if ip.is_loopback()
                    || inner.by_ip.contains_key(&ip)
                    || inner.strangers.get(&ip).is_some_and(|at| at.elapsed() < STRANGE_FOR)
                    || !inner.errors.is_empty()
                {
                    return;
                }
            }
            if tokio::time::timeout_at(deadline, came).await.is_err() {
                break;
            }
        }
        let mut inner = self.write();
        if inner.strangers.len() >= STRANGERS_MAX {
            inner.strangers.clear();
        }
        inner.strangers.insert(ip, Instant::now());
    }

    /// Who calls from an address.
    pub fn asker(&self, ip: IpAddr) -> Asker {
        let inner = self.read();
        let Some(all) = inner.by_ip.get(&ip) else { return Asker::default() };
        let mut pods = all.iter().rev().filter_map(|uid| Some((uid, inner.pods.get(uid)?)));
        let Some((uid, pod)) = pods.next() else { return Asker::default() };
        // Pods on their node's network share its address: what they do not agree about is not known.
        let of_one = !pod.host_network || pods.clone().next().is_none();
        Asker {
            node: Some(pod.node.clone()),
            app: match &pod.app {
                Some(app) => Some(app.clone()).filter(|_| of_one || pods.all(|(_, other)| other.app == pod.app)),
                None => inner.drivers.get(uid).and_then(|all| all.last()).map(|(app, _)| app.clone()).filter(|_| of_one),
            },
            executor: pod.executor && of_one,
            mounts_sockets: pod.mounts_sockets && of_one,
        }
    }

    /// Addresses of an application's executors on a node, in an order that stays.
    pub fn executors(&self, app: &str, node: &str) -> Vec<IpAddr> {
        let inner = self.read();
        inner.apps.get(app).and_then(|places| places.get(node)).map_or_else(Vec::new, |pods| pods.values().copied().collect())
    }

    /// Addresses of the selected pods on a node, in an order that stays.
    pub fn readers(&self, node: &str) -> Vec<IpAddr> {
        self.read().readers.get(node).map_or_else(Vec::new, |pods| pods.values().copied().collect())
    }

    /// Of some nodes, whether an application's executors are there; `app` `None`: the selected pods.
    pub fn busy(&self, app: Option<&str>, nodes: impl Iterator<Item = impl AsRef<str>>) -> Vec<bool> {
        let inner = self.read();
        let places = match app {
            Some(app) => inner.apps.get(app),
            None => Some(&inner.readers),
        };
        nodes.map(|node| places.is_some_and(|places| places.contains_key(node.as_ref()))).collect()
    }

    /// The zone of a node.
    pub fn zone(&self, node: &str) -> Option<Arc<str>> {
        self.read().zones.get(node).cloned().flatten()
    }

    /// Pods, nodes, and why not all are seen.
    pub fn summary(&self) -> (usize, usize, String) {
        let inner = self.read();
        let errors: Vec<&str> = inner.errors.values().map(String::as_str).collect();
        (inner.pods.len(), inner.zones.len(), errors.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test]
    async fn the_first_call_waits_for_its_pod() {
        let view = Arc::new(View::default());
        let (late, came) = (view.clone(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
        let told = came.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            late.set_pod("other", Some(pod(8, "n", None)));
            tokio::time::sleep(Duration::from_millis(20)).await;
            told.store(true, std::sync::atomic::Ordering::SeqCst);
            late.set_pod("a", Some(pod(7, "n", None)));
        });
        view.await_pod(ip(7)).await;
        assert!(came.load(std::sync::atomic::Ordering::SeqCst) && view.asker(ip(7)).node.is_some());
        // No pod's: it is waited for once, and again when a pod has had the address meanwhile.
        let waits = |last: u8| tokio::time::timeout(Duration::from_millis(100), view.await_pod(ip(last)));
        view.await_pod(ip(9)).await;
        waits(9).await.expect("a stranger is not waited for");
        view.set_pod("b", Some(pod(9, "n", None)));
        view.set_pod("b", None);
        waits(9).await.expect_err("it may be another pod's by now");
        view.set_error("pods", Some("forbidden".into()));
        waits(9).await.expect("not all is seen");
    }

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 244, 1, last])
    }

    fn pod(last: u8, node: &str, app: Option<&str>) -> PodFacts {
        PodFacts {
            ip: ip(last),
            node: node.into(),
            host_network: false,
            app: app.map(Into::into),
            executor: app.is_some(),
            owner: None,
            mounts_sockets: false,
        }
    }

    #[test]
    fn an_address_that_is_used_again_is_the_new_pods() {
        let view = View::default();
        view.set_pod("a", Some(pod(1, "n1", Some("app-1"))));
        view.set_pod("b", Some(pod(1, "n2", Some("app-2"))));
        assert_eq!(view.asker(ip(1)).node.as_deref(), Some("n2"));
        // The end of the first one is told late.
        view.set_pod("a", None);
        assert_eq!(view.asker(ip(1)).app.as_deref(), Some("app-2"));
        assert_eq!((view.executors("app-1", "n1"), view.executors("app-2", "n2")), (vec![], vec![ip(1)]));
        view.set_pod("b", None);
        assert_eq!(view.asker(ip(1)), Asker::default());
    }

    #[test]
    fn a_driver_without_a_label_is_known_by_its_executors() {
        let view = View::default();
        view.set_pod("notebook", Some(pod(1, "n1", None)));
        assert_eq!(view.asker(ip(1)).app, None);
        let made = |last, app| PodFacts { owner: Some("notebook".into()), ..pod(last, "n2", Some(app)) };
        view.set_pod("a", Some(made(2, "app-1")));
        view.set_pod("b", Some(made(3, "app-1")));
        assert_eq!((view.asker(ip(1)).app.as_deref(), view.asker(ip(1)).executor), (Some("app-1"), false));
        // Another session of the notebook.
        view.set_pod("c", Some(made(4, "app-2")));
        view.set_pod("a", None);
        assert_eq!(view.asker(ip(1)).app.as_deref(), Some("app-2"));
        view.set_pod("c", None);
        assert_eq!(view.asker(ip(1)).app.as_deref(), Some("app-1"));
        view.set_pod("b", None);
        assert_eq!(view.asker(ip(1)).app, None);
    }

    #[test]
    fn pods_on_their_nodes_network_are_not_taken_for_each_other() {
        let view = View::default();
        let on_host = |app| PodFacts { host_network: true, mounts_sockets: true, ..pod(9, "n1", Some(app)) };
        view.set_pod("a", Some(on_host("app-1")));
        assert_eq!(view.asker(ip(9)).app.as_deref(), Some("app-1"));
        view.set_pod("b", Some(on_host("app-2")));
        let asker = view.asker(ip(9));
        assert_eq!((asker.node.as_deref(), asker.app, asker.mounts_sockets), (Some("n1"), None, false));
    }

    #[test]
    fn selected_pods_are_found_whichever_is_told_first() {
        let view = View::default();
        view.set_selected("a", true);
        view.set_pod("a", Some(pod(1, "n1", None)));
        view.set_pod("b", Some(pod(2, "n1", None)));
        assert_eq!(view.readers("n1"), [ip(1)]);
        view.set_selected("b", true);
        view.set_selected("a", false);
        assert_eq!(view.readers("n1"), [ip(2)]);
        assert_eq!(view.busy(None, ["n1", "n2"].iter()), [true, false]);
    }

    #[derive(Clone, Debug)]
    enum Event {
        Set(u8, u8, u8, Option<u8>),
        End(u8),
        Select(u8, bool),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            6 => (0..12u8, 0..6u8, 0..4u8, proptest::option::of(0..3u8)).prop_map(|(uid, ip, node, app)| Event::Set(uid, ip, node, app)),
            3 => (0..12u8).prop_map(Event::End),
            1 => (0..12u8, any::<bool>()).prop_map(|(uid, on)| Event::Select(uid, on)),
        ];
        proptest::collection::vec(event, 0..200)
    }

    proptest! {
        /// The indexes agree with a plain table of pods, whatever the order of events.
        #[test]
        fn the_indexes_are_those_of_a_plain_table(events in events()) {
            let (view, mut pods, mut selected) = (View::default(), BTreeMap::new(), HashSet::new());
            for event in events {
                match event {
                    Event::Set(uid, ip, node, app) => {
                        let facts = pod(ip, &format!("n{node}"), app.map(|app| format!("app-{app}")).as_deref());
                        view.set_pod(&uid.to_string(), Some(facts.clone()));
                        pods.insert(uid, facts);
                    }
                    Event::End(uid) => {
                        view.set_pod(&uid.to_string(), None);
                        pods.remove(&uid);
                    }
                    Event::Select(uid, on) => {
                        view.set_selected(&uid.to_string(), on);
                        if on { selected.insert(uid); } else { selected.remove(&uid); }
                    }
                }
            }
            for node in (0..4).map(|n| format!("n{n}")) {
                let of = |wanted: &dyn Fn(u8, &PodFacts) -> bool| {
                    let mut all: Vec<IpAddr> = pods.iter().filter(|(uid, p)| *p.node == *node && wanted(**uid, p)).map(|(_, p)| p.ip).collect();
                    all.sort();
                    all
                };
                let sorted = |mut all: Vec<IpAddr>| { all.sort(); all };
                prop_assert_eq!(sorted(view.readers(&node)), of(&|uid, _| selected.contains(&uid)));
                for app in (0..3).map(|a| format!("app-{a}")) {
                    prop_assert_eq!(sorted(view.executors(&app, &node)), of(&|_, p| p.app.as_deref() == Some(&app)));
                }
            }
            for last in 0..6 {
                prop_assert_eq!(view.asker(ip(last)).node.is_some(), pods.values().any(|p| p.ip == ip(last)));
            }
            prop_assert_eq!(view.summary().0, pods.len());
        }
    }
}
