//! The files a session is writing: each has a task that takes its pieces in order.

use super::Session;
use crate::write::FileWrite;
use bytes::Bytes;
use forebay_common::token::WRITE;
use forebay_common::{BlockId, Result, counter, err};
use forebay_proto::data_request::Op;
use forebay_proto::data_response::Op as Answer;
use forebay_proto::{Ack, OpenWrite, WriteData};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::mpsc;

counter!(LIMITED, "forebay_worker_writes_limited_total", "writes refused because a session had too many open");

/// Pieces that may wait for a slow tier or store; the connection waits behind them.
const QUEUE_PIECES: usize = 8;
/// Files one session may write at once.
const WRITES_MAX: usize = 64;

enum Step {
    Data(WriteData, Bytes),
    Commit { id: u64, length: u64 },
}

#[derive(Default)]
pub struct Writes {
    open: HashMap<u64, mpsc::Sender<Step>>,
}

impl Writes {
    /// Takes a write request; gives any other back.
    pub async fn take(&mut self, session: &Arc<Session>, id: u64, op: Op, body: Bytes) -> Option<Op> {
        match op {
            Op::OpenWrite(open) => {
                self.open.retain(|_, queue| !queue.is_closed());
                if self.open.len() >= WRITES_MAX {
                    LIMITED.inc();
                    session.outbox.fail(id, &err!(LimitExceeded, "a session may write {WRITES_MAX} files at once")).await;
                    return None;
                }
                let (queue, steps) = mpsc::channel(QUEUE_PIECES);
                self.open.insert(id, queue);
                tokio::spawn(run(session.clone(), id, open, steps));
            }
            Op::WriteData(data) => {
                let write_id = data.write_id;
                self.step(session, id, write_id, Step::Data(data, body)).await;
            }
            Op::CommitWrite(commit) => {
                self.step(session, id, commit.write_id, Step::Commit { id, length: commit.length }).await;
                self.open.remove(&commit.write_id);
            }
            Op::AbortWrite(abort) => {
                self.open.remove(&abort.write_id);
                session.outbox.send(id, Answer::Ack(Ack { write_id: abort.write_id })).await;
            }
            other => return Some(other),
        }
        None
    }

    async fn step(&mut self, session: &Arc<Session>, id: u64, write_id: u64, step: Step) {
        let commit = matches!(step, Step::Commit { .. });
        let sent = match self.open.get(&write_id) {
            Some(queue) => queue.send(step).await.is_ok(),
            None => false,
        };
        // A write that failed has said so already; only who waits for an answer gets another.
        if !sent && commit {
            session.outbox.fail(id, &err!(Expired, "write {write_id} is over")).await;
        }
    }
}

/// Its end without a commit (the session's end, an abort, an error) drops the write and all it made.
async fn run(session: Arc<Session>, id: u64, open: OpenWrite, mut steps: mpsc::Receiver<Step>) {
    let mut write = match start(&session, &open).await {
        Ok(write) => write,
        Err(e) => return session.outbox.fail(id, &e).await,
    };
    session.outbox.send(id, Answer::Ack(Ack { write_id: id })).await;
    while let Some(step) = steps.recv().await {
        match step {
            Step::Data(data, body) => {
                if let Err(e) = piece(&session, &mut write, data, body).await {
                    session.outbox.fail(id, &e).await;
                    // A commit may be waiting behind the piece that failed.
                    steps.close();
                    while let Some(step) = steps.recv().await {
                        if let Step::Commit { id, .. } = step {
                            session.outbox.fail(id, &e).await;
                        }
                    }
                    return;
                }
            }
            Step::Commit { id: commit_id, length } => {
                return match write.commit(length).await {
                    Ok(committed) => session.outbox.send(commit_id, Answer::Committed(committed)).await,
                    Err(e) => session.outbox.fail(commit_id, &e).await,
                };
            }
        }
    }
}

async fn start(session: &Arc<Session>, open: &OpenWrite) -> Result<FileWrite> {
    let claims = session.verify(&open.token, WRITE).await?;
    FileWrite::open(session.core.clone(), claims).await
}

async fn piece(session: &Arc<Session>, write: &mut FileWrite, data: WriteData, body: Bytes) -> Result<()> {
    if !data.token.is_empty() {
        write.extend(session.verify(&data.token, WRITE).await?)?;
    }
    write.write(BlockId(data.block_id), data.offset, data.crc, body).await
}
