//! One client connection, on TCP or on the Unix socket: requests in, answers out, multiplexed by request id.
//!
//! Each request runs in a task of its own, at most `SESSION_REQUESTS_MAX` at once; pieces of a file being written are taken
//! in order by that file's task. Answers go through one bounded queue to the writer task. On the Unix socket a client may
//! be granted a block: two descriptors travel with the answer. The end of the session drops its grants and writes.

mod grants;
mod outbox;
mod read;
mod writes;

use crate::core::Core;
use crate::store::BlockFile;
use bytes::Bytes;
use forebay_common::limits::SESSION_REQUESTS_MAX;
use forebay_common::token::{Claims, READ, WRITE};
use forebay_common::{BlockId, Error, ErrorKind, Result, clock, counter, err, gauge};
use forebay_proto::data_request::Op;
use forebay_proto::data_response::Op as Answer;
use forebay_proto::{Ack, DATA_PROTOCOL_VERSION, DataRequest, Filled, Granted, HelloOk, OpenBlock, Revoke, frame};
use grants::Grants;
use outbox::{Outbox, Writer};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::io::{AsyncRead, BufReader};
use tokio::sync::Semaphore;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use writes::Writes;

counter!(REQUESTS, "forebay_worker_requests_total", "requests of clients");
counter!(REFUSED_TOKENS, "forebay_worker_tokens_refused_total", "requests with a token that was not taken");
counter!(BUSY, "forebay_worker_session_limit_total", "requests refused because a session had too many under way");
gauge!(SESSIONS, "forebay_worker_sessions", "client connections");
counter!(GRANTED, "forebay_worker_grants_total", "blocks handed out by descriptor");
counter!(REVOKED, "forebay_worker_grants_revoked_total", "grants that clients were told to let go");
counter!(OVERDUE, "forebay_worker_sessions_overdue_total", "sessions ended because a revoked grant was not let go in time");
counter!(STREAMED, "forebay_worker_streamed_bytes_total", "bytes sent to clients");

/// Bytes read from a connection at once.
const READ_BUFFER_BYTES: usize = 64 << 10;
/// Tokens whose verification a session remembers.
const TOKENS_REMEMBERED: usize = 64;

pub use outbox::Socket;

struct Session {
    core: Arc<Core>,
    outbox: Outbox,
    grants: Mutex<Grants>,
    tokens: Mutex<HashMap<(Bytes, u32), Claims>>,
    descriptors: bool,
}

/// Serves a connection until it ends or `shutdown`.
pub async fn serve(core: Arc<Core>, socket: Socket, shutdown: CancellationToken) {
    let descriptors = socket.can_pass_descriptors();
    let (reader, writer) = match socket.split() {
        Ok(halves) => halves,
        Err(e) => return tracing::warn!(error = %e, "a session cannot begin"),
    };
    SESSIONS.inc();
    let (outbox, queue) = outbox::channel();
    let session = Arc::new(Session {
        grants: Mutex::new(Grants::new(core.config.session_pinned_max.as_u64())),
        core,
        outbox,
        tokens: Mutex::default(),
        descriptors,
    });
    let ended = CancellationToken::new();
    let writing = tokio::spawn(write_all(writer, queue, ended.clone()));
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = ended.cancelled() => {}
        () = take_back(&session) => {}
        result = read_requests(&session, reader) => {
            if let Err(e) = result {
                tracing::info!(error = %e, "a session ends");
            }
        }
    }
    drop(session);
    writing.abort();
    SESSIONS.dec();
}

async fn write_all(mut writer: Writer, mut queue: outbox::Queue, ended: CancellationToken) {
    while let Some(frame) = queue.recv().await {
        if let Err(e) = writer.write(frame).await {
            tracing::debug!(error = %e, "a session's connection broke");
            break;
        }
    }
    ended.cancel();
}

/// Takes grants back: of blocks that were evicted, and of all when this worker is to leave, so that clients let their memory
/// go. Ends, and the session with it, when a client does not do so in time.
async fn take_back(session: &Arc<Session>) {
    let limit = Duration::from_millis(session.core.config.revoke_deadline_ms);
    let (mut evictions, mut leaving) = (session.core.store.evictions(), session.core.leaving.subscribe());
    let mut look = tokio::time::interval(Duration::from_secs(1));
    loop {
        let evicted = tokio::select! {
            evicted = evictions.recv() => Some(evicted),
            changed = leaving.changed() => match changed {
                Ok(()) => None,
                Err(_) => return,
            },
            _ = look.tick() => {
                if let Some(block) = session.grants().overdue() {
                    OVERDUE.inc();
                    tracing::warn!(%block, "a session ends: its client did not let go in time of a block that was taken back");
                    return;
                }
                continue;
            }
        };
        let store = &session.core.store;
        let blocks = match evicted {
            Some(Ok(block)) => session.grants().revoke(limit, |held| held.header.block == block && !store.is_current(held)),
            Some(Err(RecvError::Lagged(_))) => session.grants().revoke(limit, |held| !store.is_current(held)),
            Some(Err(RecvError::Closed)) => return,
            None if *leaving.borrow_and_update() => session.grants().revoke(limit, |_| true),
            None => Vec::new(),
        };
        for block in blocks {
            REVOKED.inc();
            let deadline_ms = session.core.config.revoke_deadline_ms;
            let told = session.outbox.send(0, Answer::Revoke(Revoke { block_id: block.get(), deadline_ms }));
            if tokio::time::timeout(limit, told).await.is_err() {
                OVERDUE.inc();
                return tracing::warn!(%block, "a session ends: its client does not read what it is told, and holds blocks that were taken back");
            }
        }
    }
}

async fn read_requests(session: &Arc<Session>, reader: Box<dyn AsyncRead + Send + Unpin>) -> Result<()> {
    let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, reader);
    let permits = Arc::new(Semaphore::new(SESSION_REQUESTS_MAX));
    let mut writes = Writes::default();
    while let Some((request, body)) = frame::read::<DataRequest, _>(&mut reader).await? {
        REQUESTS.inc();
        let id = request.id;
        let Some(op) = request.op else {
            session.outbox.fail(id, &err!(Unsupported, "this worker does not know the request: it is older than the client")).await;
            continue;
        };
        let op = match writes.take(session, id, op, body).await {
            Some(op) => op,
            None => continue,
        };
        // Taken at once and not answered: a grant that is let go must never be refused.
        if let Op::CloseGrant(close) = &op {
            session.grants().close(close.grant_id);
            continue;
        }
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            BUSY.inc();
            session.outbox.fail(id, &err!(LimitExceeded, "a session may have {SESSION_REQUESTS_MAX} requests under way")).await;
            continue;
        };
        let session = session.clone();
        tokio::spawn(async move {
            if let Err(e) = handle(&session, id, op).await {
                if e.kind() == ErrorKind::Unauthenticated {
                    REFUSED_TOKENS.inc();
                }
                session.outbox.fail(id, &e).await;
            }
            drop(permit);
        });
    }
    Ok(())
}

async fn handle(session: &Arc<Session>, id: u64, op: Op) -> Result<()> {
    let answer = match op {
        Op::Hello(hello) if hello.version != DATA_PROTOCOL_VERSION => {
            return Err(err!(
                Unsupported,
                "data protocol {} was asked for, this worker speaks {DATA_PROTOCOL_VERSION}: use the same version of Forebay on both sides",
                hello.version
            ));
        }
        Op::Hello(_) => Answer::HelloOk(session.hello()),
        Op::OpenBlock(open) => return session.grant(id, &open).await,
        Op::OpenJoined(open) => return session.grant_joined(id, &open.token).await,
        Op::Fill(fill) => {
            let claims = session.verify(&fill.token, READ).await?;
            let cached_bytes = read::fill(&session.core, &claims, &fill).await?;
            Answer::Filled(Filled { cached_bytes })
        }
        Op::ReadBlock(read) => {
            let claims = session.verify(&read.token, READ).await?;
            return read::stream(&session.core, &session.outbox, id, &claims, &read).await;
        }
        Op::BadChunk(bad) => {
            let claims = session.verify(&bad.token, READ).await?;
            read::check_reported_chunk(&session.core, &claims, &bad).await?;
            Answer::Ack(Ack::default())
        }
        Op::CloseGrant(_) | Op::OpenWrite(_) | Op::WriteData(_) | Op::CommitWrite(_) | Op::AbortWrite(_) => {
            return Err(err!(Internal, "a write request reached the wrong place"));
        }
    };
    session.outbox.send(id, answer).await;
    Ok(())
}

impl Session {
    fn grants(&self) -> MutexGuard<'_, Grants> {
        self.grants.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn hello(&self) -> HelloOk {
        HelloOk {
            version: DATA_PROTOCOL_VERSION,
            worker_id: self.core.id.get(),
            host_id: self.core.host_id.clone(),
            grants_read_only_mount: self.core.store.grants_are_read_only(),
            mem_huge_pages: self.core.store.memory_is_huge(),
            grants: self.descriptors,
        }
    }

    /// Verifies a token, remembering those that were good until they expire.
    async fn verify(&self, token: &Bytes, right: u32) -> Result<Claims> {
        debug_assert!(right == READ || right == WRITE);
        let key = (token.clone(), right);
        if let Some(claims) = self.tokens.lock().unwrap_or_else(|e| e.into_inner()).get(&key)
            && claims.expires_at_ms > clock::now_ms()
        {
            return Ok(claims.clone());
        }
        let claims = self.core.verify(token, right).await?;
        let mut tokens = self.tokens.lock().unwrap_or_else(|e| e.into_inner());
        if tokens.len() >= TOKENS_REMEMBERED {
            tokens.clear();
        }
        tokens.insert(key, claims.clone());
        Ok(claims)
    }

    /// Hands out two fresh read-only descriptors of a block, in the same message as the answer.
    async fn grant(&self, id: u64, open: &OpenBlock) -> Result<()> {
        if !self.descriptors {
            return Err(err!(Unsupported, "descriptors cannot be passed over the network: read the block instead"));
        }
        let claims = self.verify(&open.token, READ).await?;
        let target = crate::ufs_read::Target::of(&claims, BlockId(open.block_id))?;
        let block = crate::ufs_read::block_of(&self.core, &target).ok_or_else(|| err!(NotFound, "block {} is not on this worker", open.block_id))?;
        self.grant_this(id, &block, 0).await
    }

    /// The same of a file of several blocks in one piece.
    async fn grant_joined(&self, id: u64, token: &Bytes) -> Result<()> {
        if !self.descriptors {
            return Err(err!(Unsupported, "descriptors cannot be passed over the network: read the blocks instead"));
        }
        let claims = self.verify(token, READ).await?;
        let joined = self.core.store.joined(&claims, self.core.config.join_after);
        let joined = joined.ok_or_else(|| err!(NotFound, "file {} is not here in one piece", claims.file_id))?;
        self.grant_this(id, &joined, joined.header.block.get()).await
    }

    async fn grant_this(&self, id: u64, block: &BlockFile, joined: u64) -> Result<()> {
        let grant_id = self.grants().add(&block.block)?;
        // From here on it is among those that are taken back.
        if *self.core.leaving.borrow() {
            self.grants().close(grant_id);
            return Err(err!(Unavailable, "this worker is to leave: read the block by stream, or elsewhere"));
        }
        let opened = self.core.store.open_for_grant(block);
        let (data, head) = match opened {
            Ok(fds) => fds,
            Err(e) => {
                self.grants().close(grant_id);
                return Err(Error::new(ErrorKind::Unavailable, e.message().to_owned()));
            }
        };
        GRANTED.inc();
        self.core.store.counters_of(&block.block.dir).hits.inc();
        let granted = Granted { grant_id, length: block.header.length_bytes, tier: block.block.dir.medium().name().into(), block_id: joined };
        self.outbox.send_with_descriptors(id, Answer::Granted(granted), [data, head]).await;
        Ok(())
    }
}
