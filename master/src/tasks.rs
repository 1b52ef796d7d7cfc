//! Work for workers: handed out when they ask for it, its outcome given to whoever wants it.
//!
//! Submitted to by jobs, the persistence driver, replication and drains; workers take tasks with a call that waits. Soft state: a
//! new master knows of no task, and whoever needs one submits it again. Invariant: every task ends with exactly one outcome, its
//! worker's, or `Unavailable` when the worker is lost, registers anew, or does not have the task though it was handed out.

use forebay_common::{Error, Result, WorkerId, counter, err, gauge};
use forebay_proto::task::What;
use forebay_proto::{Task, TaskOutcome};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

counter!(SUBMITTED, "forebay_master_tasks_total", "tasks submitted for workers");
counter!(LOST, "forebay_master_tasks_lost_total", "tasks that ended without an outcome, because their worker was lost or forgot them");
gauge!(OPEN, "forebay_master_tasks_open", "tasks that have no outcome yet");

/// Tasks handed out with one answer.
const HANDED_AT_ONCE: usize = 256;
/// How long a worker's call waits for work.
/// Shorter than what a worker waits for any answer.
const TAKE_WAIT: Duration = Duration::from_secs(3);

struct Open {
    worker: WorkerId,
    /// In which of the worker's calls it was handed out; 0: not yet.
    handed: u64,
    outcome: oneshot::Sender<Result<TaskOutcome>>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Task>,
    wake: Arc<Notify>,
    /// Calls for work so far.
    calls: u64,
}

struct Inner {
    /// The newest id. Begins at random: a worker that outlived a master must not end the next one's tasks with that one's outcomes.
    next: u64,
    queues: HashMap<WorkerId, Queue>,
    open: HashMap<u64, Open>,
    /// Workers that are lost: nothing is waited for from them.
    gone: HashSet<WorkerId>,
}

impl Default for Inner {
    fn default() -> Self {
        Inner { next: u64::from(rand::random::<u32>()) << 31, queues: HashMap::new(), open: HashMap::new(), gone: HashSet::new() }
    }
}

#[derive(Default)]
pub struct Tasks(Mutex<Inner>);

/// A task's outcome to come.
pub struct Submitted(oneshot::Receiver<Result<TaskOutcome>>);

impl Submitted {
    /// Waits. Errors: the worker's, `Unavailable` when it is lost.
    pub async fn outcome(self) -> Result<TaskOutcome> {
        self.0.await.unwrap_or_else(|_| Err(err!(Unavailable, "the master is stopping")))
    }
}

impl Tasks {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Has a worker do something.
    pub fn submit(&self, worker: WorkerId, what: What) -> Submitted {
        SUBMITTED.inc();
        OPEN.inc();
        let (outcome, receiver) = oneshot::channel();
        let mut inner = self.lock();
        inner.next += 1;
        let id = inner.next;
        if inner.gone.contains(&worker) {
            OPEN.dec();
            LOST.inc();
            let _ = outcome.send(Err(err!(Unavailable, "the worker that was to do this is lost")));
            return Submitted(receiver);
        }
        inner.open.insert(id, Open { worker, handed: 0, outcome });
        let queue = inner.queues.entry(worker).or_default();
        queue.waiting.push_back(Task { id, what: Some(what) });
        queue.wake.notify_one();
        Submitted(receiver)
    }

    /// At most `room` tasks for a worker, once there are some or after a while. `running` are those it still has: of those handed
    /// out before that are not among them the answer was lost.
    pub async fn take(&self, worker: WorkerId, room: usize, running: &[u64]) -> Vec<Task> {
        let (wake, call) = {
            let mut inner = self.lock();
            let queue = inner.queues.entry(worker).or_default();
            queue.calls += 1;
            let (wake, call) = (queue.wake.clone(), queue.calls);
            let running: HashSet<u64> = running.iter().copied().collect();
            let forgotten = inner.open.iter().filter(|(id, o)| o.worker == worker && o.handed > 0 && !running.contains(id));
            let forgotten: Vec<u64> = forgotten.map(|(id, _)| *id).collect();
            end(&mut inner, forgotten, "has no word of it");
            (wake, call)
        };
        let deadline = tokio::time::Instant::now() + TAKE_WAIT;
        loop {
            // A newer call of the same worker gets what there is.
            let Some(taken) = self.take_now(worker, room.min(HANDED_AT_ONCE), call) else {
                wake.notify_one();
                return Vec::new();
            };
            if !taken.is_empty() || tokio::time::timeout_at(deadline, wake.notified()).await.is_err() {
                return taken;
            }
        }
    }

    /// `None`: the worker called again meanwhile.
    fn take_now(&self, worker: WorkerId, room: usize, call: u64) -> Option<Vec<Task>> {
        let mut inner = self.lock();
        let queue = inner.queues.get_mut(&worker).filter(|queue| queue.calls == call)?;
        let count = queue.waiting.len().min(room);
        let taken: Vec<Task> = queue.waiting.drain(..count).collect();
        for task in &taken {
            if let Some(open) = inner.open.get_mut(&task.id) {
                open.handed = call;
            }
        }
        Some(taken)
    }

    /// Takes outcomes. One of a task that ended before is dropped.
    pub fn finish(&self, worker: WorkerId, outcomes: Vec<TaskOutcome>) {
        let mut inner = self.lock();
        for mut outcome in outcomes {
            if inner.open.get(&outcome.id).is_none_or(|open| open.worker != worker) {
                continue;
            }
            let Some(open) = inner.open.remove(&outcome.id) else { continue };
            OPEN.dec();
            let result = match outcome.error.take() {
                Some(e) => Err(Error::from(e)),
                None => Ok(outcome),
            };
            let _ = open.outcome.send(result);
        }
    }

    /// A worker is lost, or began anew: it has none of its tasks.
    pub fn forget_worker(&self, worker: WorkerId, lost: bool) {
        let mut inner = self.lock();
        if lost {
            inner.gone.insert(worker);
        } else {
            inner.gone.remove(&worker);
        }
        if let Some(queue) = inner.queues.get_mut(&worker) {
            queue.waiting.clear();
        }
        let its: Vec<u64> = inner.open.iter().filter(|(_, o)| o.worker == worker).map(|(id, _)| *id).collect();
        end(&mut inner, its, "is lost, or began anew");
    }

    /// Tasks of a worker that have no outcome yet.
    #[cfg(test)]
    fn open_of(&self, worker: WorkerId) -> usize {
        self.lock().open.values().filter(|o| o.worker == worker).count()
    }
}

fn end(inner: &mut Inner, tasks: Vec<u64>, why: &str) {
    for id in tasks {
        if let Some(open) = inner.open.remove(&id) {
            OPEN.dec();
            LOST.inc();
            let _ = open.outcome.send(Err(err!(Unavailable, "the worker that was to do this {why}")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_proto::LoadBlock;

    fn load() -> What {
        What::Load(LoadBlock::default())
    }

    #[tokio::test]
    async fn every_task_ends_once() {
        let (tasks, worker) = (Tasks::default(), WorkerId(1));
        let submitted: Vec<Submitted> = (0..3).map(|_| tasks.submit(worker, load())).collect();
        let taken = tasks.take(worker, 2, &[]).await;
        assert_eq!(taken.len(), 2);
        tasks.finish(WorkerId(2), vec![TaskOutcome { id: taken[0].id, ..TaskOutcome::default() }]);
        assert_eq!(tasks.open_of(worker), 3, "another worker's word does not count");
        tasks.finish(worker, vec![TaskOutcome { id: taken[0].id, bytes: 7, ..TaskOutcome::default() }]);
        // The second was lost on its way.
        let rest = tasks.take(worker, 2, &[]).await;
        assert_eq!(rest.len(), 1);
        tasks.forget_worker(worker, true);
        let late = tasks.submit(worker, load());
        assert!(late.outcome().await.is_err(), "nothing is waited for from a worker that is lost");
        let mut outcomes = Vec::new();
        for s in submitted {
            outcomes.push(s.outcome().await.map(|o| o.bytes).map_err(|e| e.is_retryable()));
        }
        assert_eq!(outcomes, [Ok(7), Err(true), Err(true)]);
        assert_eq!(tasks.open_of(worker), 0);
    }
}
