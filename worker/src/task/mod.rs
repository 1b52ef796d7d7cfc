//! Work that the master hands out: loading blocks, copying them from other workers, writing files and pieces of them out to under stores, ending blocks.
//!
//! One call for work is always waiting at the master; outcomes are sent in batches until the master has taken them. Invariant: a
//! task is named as running in every call for work until its outcome was taken, so that the master knows which it lost.

mod bytes_of;
mod copy;
mod hold;
mod load;
mod seal;
mod write_out;
mod write_piece;

use crate::core::Core;
use forebay_common::{Result, counter, err, gauge};
use forebay_proto::task::What;
use forebay_proto::{ErrorInfo, FinishTasksRequest, TakeTasksRequest, Task, TaskOutcome};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

counter!(DONE, "forebay_worker_tasks_total", "tasks of the master that were done");
counter!(FAILED, "forebay_worker_tasks_failed_total", "tasks of the master that failed");
gauge!(RUNNING, "forebay_worker_tasks_running", "tasks of the master that are under way, or wait for their turn");

/// Tasks here at once, those that wait for their turn included.
const TASKS_MAX: usize = 512;
/// Blocks loaded at once; fewer than the runs that may wait to be stored.
const LOADS_AT_ONCE: usize = 24;
/// Small blocks that one turn loads.
const SMALL_TOGETHER: usize = 32;
/// Blocks copied at once.
const COPIES_AT_ONCE: usize = 8;
/// Files written out at once.
const WRITES_AT_ONCE: usize = 16;
/// Outcomes sent at once.
const OUTCOMES_AT_ONCE: usize = 512;
const RETRY_AFTER: Duration = Duration::from_millis(300);

struct Turns {
    loads: Semaphore,
    copies: Semaphore,
    writes: Semaphore,
}

type Ids = Arc<Mutex<BTreeSet<u64>>>;

fn lock(ids: &Ids) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
    ids.lock().unwrap_or_else(|e| e.into_inner())
}

/// Runs until shutdown.
pub async fn run(core: Arc<Core>, incarnation: u64, shutdown: CancellationToken) {
    let turns =
        Arc::new(Turns { loads: Semaphore::new(LOADS_AT_ONCE), copies: Semaphore::new(COPIES_AT_ONCE), writes: Semaphore::new(WRITES_AT_ONCE) });
    let (ids, room_again) = (Ids::default(), Arc::new(Notify::new()));
    let (sender, outcomes) = mpsc::channel(TASKS_MAX);
    tokio::spawn(report(core.clone(), outcomes, ids.clone(), room_again.clone()));
    loop {
        let running: Vec<u64> = lock(&ids).iter().copied().collect();
        RUNNING.set(running.len() as i64);
        let room = TASKS_MAX.saturating_sub(running.len());
        // Nothing is asked for before there is room for a good part.
        if room < TASKS_MAX / 4 {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = room_again.notified() => continue,
            }
        }
        let request = TakeTasksRequest {
            cluster_secret: core.master.secret(),
            worker_id: core.id.get(),
            incarnation,
            room: u32::try_from(room).unwrap_or(u32::MAX),
            running,
        };
        let mut client = core.master.client();
        let taken = tokio::select! {
            () = shutdown.cancelled() => return,
            taken = client.take_tasks(request) => taken,
        };
        match taken {
            Ok(taken) => {
                let tasks = taken.into_inner().tasks;
                lock(&ids).extend(tasks.iter().map(|task| task.id));
                for together in together(tasks) {
                    let (core, turns, sender) = (core.clone(), turns.clone(), sender.clone());
                    let named: Vec<u64> = together.iter().map(|task| task.id).collect();
                    tokio::spawn(async move {
                        // However they end, they have outcomes.
                        let ended = tokio::spawn(async move { carry_out_all(&core, &turns, together).await }).await;
                        let outcomes = ended.unwrap_or_else(|e| named.into_iter().map(|id| outcome(id, Err(err!(Internal, "task: {e}")))).collect());
                        for outcome in outcomes {
                            let _ = sender.send(outcome).await;
                        }
                    });
                }
            }
            Err(status) => {
                tracing::debug!(error = %core.master.failed(&status), "no work from the master");
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(RETRY_AFTER) => {}
                }
            }
        }
    }
}

/// Tasks that are done together: small loads by the batch, all others one by one.
fn together(tasks: Vec<Task>) -> Vec<Vec<Task>> {
    let (small, others): (Vec<Task>, Vec<Task>) =
        tasks.into_iter().partition(|task| matches!(&task.what, Some(What::Load(order)) if load::is_small(order)));
    let mut small = small.into_iter().peekable();
    let mut all: Vec<Vec<Task>> = others.into_iter().map(|task| vec![task]).collect();
    while small.peek().is_some() {
        all.push(small.by_ref().take(SMALL_TOGETHER).collect());
    }
    all
}

async fn carry_out_all(core: &Arc<Core>, turns: &Turns, mut tasks: Vec<Task>) -> Vec<TaskOutcome> {
    if tasks.len() > 1 {
        return load_small(core, turns, tasks).await;
    }
    let Some(task) = tasks.pop() else { return Vec::new() };
    let id = task.id;
    vec![outcome(id, carry_out(core, turns, task).await)]
}

async fn load_small(core: &Arc<Core>, turns: &Turns, tasks: Vec<Task>) -> Vec<TaskOutcome> {
    let (mut ids, mut orders) = (Vec::with_capacity(tasks.len()), Vec::with_capacity(tasks.len()));
    for task in tasks {
        if let Some(What::Load(order)) = task.what {
            ids.push(task.id);
            orders.push(order);
        }
    }
    let Ok(_turn) = turns.loads.acquire().await else { return Vec::new() };
    let done = load::load_small(core, orders).await;
    ids.into_iter().zip(done).map(|(id, done)| outcome(id, done.map(|bytes| TaskOutcome { bytes, ..TaskOutcome::default() }))).collect()
}

async fn carry_out(core: &Arc<Core>, turns: &Turns, task: Task) -> Result<TaskOutcome> {
    let turn = |semaphore| async move { Semaphore::acquire(semaphore).await.map_err(|_| err!(Unavailable, "the worker is stopping")) };
    match task.what {
        Some(What::Load(order)) => {
            let _turn = turn(&turns.loads).await?;
            load::load(core, order).await.map(|bytes| TaskOutcome { bytes, ..TaskOutcome::default() })
        }
        Some(What::Copy(order)) => {
            let _turn = turn(&turns.copies).await?;
            copy::copy(core, &order).await.map(|bytes| TaskOutcome { bytes, ..TaskOutcome::default() })
        }
        Some(What::WriteOut(order)) => {
            let _turn = turn(&turns.writes).await?;
            write_out::write_out(core, order).await
        }
        Some(What::Hold(order)) => {
            let _turn = turn(&turns.loads).await?;
            hold::hold(core, order).await.map(|bytes| TaskOutcome { bytes, ..TaskOutcome::default() })
        }
        Some(What::Rewrite(order)) => {
            let _turn = turn(&turns.copies).await?;
            hold::rewrite(core, order).await.map(|bytes| TaskOutcome { bytes, ..TaskOutcome::default() })
        }
        Some(What::WritePiece(order)) => {
            let _turn = turn(&turns.writes).await?;
            write_piece::write_piece(core, order).await
        }
        Some(What::Seal(order)) => seal::seal(core, &order).await.map(|bytes| TaskOutcome { bytes, ..TaskOutcome::default() }),
        None => Err(err!(Unsupported, "this worker does not know that kind of task: start the newer version")),
    }
}

fn outcome(id: u64, done: Result<TaskOutcome>) -> TaskOutcome {
    match done {
        Ok(outcome) => {
            DONE.inc();
            TaskOutcome { id, ..outcome }
        }
        Err(e) => {
            FAILED.inc();
            TaskOutcome { id, error: Some(ErrorInfo::from(&e)), ..TaskOutcome::default() }
        }
    }
}

/// Sends outcomes until they are taken.
async fn report(core: Arc<Core>, mut outcomes: mpsc::Receiver<TaskOutcome>, ids: Ids, room_again: Arc<Notify>) {
    let mut batch = Vec::new();
    while outcomes.recv_many(&mut batch, OUTCOMES_AT_ONCE).await > 0 {
        loop {
            let request = FinishTasksRequest { cluster_secret: core.master.secret(), worker_id: core.id.get(), outcomes: batch.clone() };
            match core.master.client().finish_tasks(request).await {
                Ok(_) => break,
                Err(status) => {
                    tracing::debug!(error = %core.master.failed(&status), "outcomes of tasks are sent again");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
        let mut running = lock(&ids);
        for outcome in batch.drain(..) {
            running.remove(&outcome.id);
        }
        drop(running);
        room_again.notify_one();
    }
}
