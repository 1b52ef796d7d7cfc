//! The reply cache: a call that is sent twice is done once. Part of the state, bounded, and replayed with it.
//!
//! Per client the answers of its newest calls are kept. A call below that window is refused as expired: whether it
//! was done is not known any more, and doing it again would be wrong. Of a client that was forgotten (or is new) only
//! the first calls are taken; it starts over under a new id otherwise. An answer is kept with whose it is and to which kind
//! of call: who uses another's numbers is refused, and told nothing.

use super::Limits;
use crate::store::{Cf, Reader, Txn, id_key, reply_key};
use forebay_common::{Error, ErrorKind, Result};
use forebay_proto::journal::{Command, Reply, command::Op};
use forebay_proto::store::{ClientReplies, Counters};

/// The answer given before, or the refusal of a call that is too old. Client 0 (the master's own drivers) is not remembered.
pub fn remembered(txn: &Txn<'_>, command: &Command) -> Result<Option<Reply>> {
    if command.client_id == 0 {
        return Ok(None);
    }
    if let Some(reply) = txn.record::<Reply>(Cf::Reply, &reply_key(command.client_id, command.sequence))? {
        let same = reply.principal == command.principal && reply.op == number_of(command.op.as_ref());
        return Ok(Some(if same { Reply { principal: String::new(), op: 0, ..reply } } else { not_theirs() }));
    }
    let client: Option<ClientReplies> = txn.record(Cf::Client, &id_key(command.client_id))?;
    let too_old = match client {
        Some(client) => command.sequence <= client.forgotten_below,
        None => command.sequence > FIRST_CALLS,
    };
    Ok(too_old.then(|| Reply {
        error_kind: ErrorKind::Expired.code(),
        error_message: "this call is older than what is remembered of its client: whether it was done is not known, look before repeating it".into(),
        ..Reply::default()
    }))
}

/// The error that an answer tells, if it tells one.
pub fn refusal(reply: &Reply) -> Option<Error> {
    let kind = Some(ErrorKind::from_code(reply.error_kind)).filter(|_| reply.error_kind != 0)?;
    Some(Error::new(kind, reply.error_message.clone()).with_retryable(kind.is_retryable() && !reply.error_stays))
}

fn not_theirs() -> Reply {
    Reply {
        error_kind: ErrorKind::InvalidArgument.code(),
        error_message:
            "this client id and sequence number were used for another call: every client draws an id of its own, and a new number for each change"
                .into(),
        ..Reply::default()
    }
}

/// The field number of an operation in `Command.op`; 0 for none.
fn number_of(op: Option<&Op>) -> u32 {
    match op {
        None => 0,
        Some(Op::Create(_)) => 10,
        Some(Op::AddBlocks(_)) => 11,
        Some(Op::Complete(_)) => 12,
        Some(Op::Abandon(_)) => 13,
        Some(Op::RenewLease(_)) => 14,
        Some(Op::Mkdir(_)) => 15,
        Some(Op::Delete(_)) => 16,
        Some(Op::Rename(_)) => 17,
        Some(Op::SetAttributes(_)) => 18,
        Some(Op::SyncChildren(_)) => 19,
        Some(Op::AddMount(_)) => 20,
        Some(Op::RemoveMount(_)) => 21,
        Some(Op::FinishPending(_)) => 22,
        Some(Op::UpdateMount(_)) => 23,
        Some(Op::ExpireTtl(_)) => 24,
        Some(Op::SetWorkerState(_)) => 25,
        Some(Op::BeginPublish(_)) => 26,
        Some(Op::FinishPersist(_)) => 27,
        Some(Op::QueuePersist(_)) => 28,
        Some(Op::SetReplication(_)) => 29,
        Some(Op::SetPathConfig(_)) => 30,
        Some(Op::StartJob(_)) => 31,
        Some(Op::UpdateJob(_)) => 32,
        Some(Op::AbandonBlock(_)) => 33,
        Some(Op::SetPipeline(_)) => 34,
        Some(Op::NoteFlushed(_)) => 35,
        Some(Op::Reopen(_)) => 36,
        Some(Op::Concat(_)) => 37,
        Some(Op::SetAcl(_)) => 38,
        Some(Op::SetXAttr(_)) => 39,
        Some(Op::SetQuota(_)) => 40,
        Some(Op::MakeNode(_)) => 41,
        Some(Op::HardLink(_)) => 42,
        Some(Op::HoldLocks(_)) => 43,
        Some(Op::SetLock(_)) => 44,
        Some(Op::EndLocks(_)) => 45,
        Some(Op::OpenCluster(_)) => 46,
    }
}

/// Answers forgotten at a time.
const TRIM_EVERY: u64 = 32;
/// Calls of an unknown client that are taken.
pub const FIRST_CALLS: u64 = 64;

/// Keeps the answer and forgets what leaves the window.
pub fn remember(txn: &mut Txn<'_>, command: &Command, reply: &Reply, change: u64, counters: &mut Counters, limits: &Limits) -> Result<()> {
    // A refusal that may be tried again has changed nothing: the next try is to be answered afresh.
    if command.client_id == 0 || refusal(reply).is_some_and(|e| e.is_retryable()) {
        return Ok(());
    }
    let key = id_key(command.client_id);
    let mut client = match txn.record::<ClientReplies>(Cf::Client, &key)? {
        Some(client) => client,
        None => {
            if counters.reply_clients >= limits.clients_max {
                forget_oldest(txn, counters)?;
            }
            counters.reply_clients += 1;
            ClientReplies::default()
        }
    };
    let kept = Reply { principal: command.principal.clone(), op: number_of(command.op.as_ref()), ..reply.clone() };
    txn.put(Cf::Reply, &reply_key(command.client_id, command.sequence), &kept);
    client.touched = change;
    let floor = command.sequence.saturating_sub(limits.replies_per_client);
    // In steps, so that the scan is paid once in a while.
    if floor >= client.forgotten_below.saturating_add(TRIM_EVERY) {
        // Whatever a client's numbers are, no more rows are there than the window held.
        for (row, _) in txn.scan(Cf::Reply, &key, None, usize::MAX)? {
            if row.as_slice() <= reply_key(command.client_id, floor).as_slice() {
                txn.delete(Cf::Reply, &row);
            }
        }
        client.forgotten_below = floor;
    }
    txn.put(Cf::Client, &key, &client);
    Ok(())
}

/// What an under store said in the end of a change that was answered before: from now on that is the answer.
pub fn amend(txn: &mut Txn<'_>, client_id: u64, sequence: u64, error_kind: ErrorKind, error_message: &str) -> Result<()> {
    let key = reply_key(client_id, sequence);
    if client_id > 0
        && let Some(mut reply) = txn.record::<Reply>(Cf::Reply, &key)?
    {
        reply.error_kind = error_kind.code();
        reply.error_message = error_message.to_owned();
        txn.put(Cf::Reply, &key, &reply);
    }
    Ok(())
}

/// Forgets the quarter of the clients that was silent longest, so that the scan is paid rarely.
fn forget_oldest(txn: &mut Txn<'_>, counters: &mut Counters) -> Result<()> {
    let mut clients: Vec<(u64, Vec<u8>)> = txn
        .scan(Cf::Client, b"", None, usize::MAX)?
        .into_iter()
        .map(|(key, raw)| (<ClientReplies as prost::Message>::decode(raw.as_slice()).map_or(0, |c| c.touched), key))
        .collect();
    clients.sort();
    let forgotten = clients.len().div_ceil(4);
    for (_, key) in clients.drain(..forgotten) {
        for (reply, _) in txn.scan(Cf::Reply, &key, None, usize::MAX)? {
            txn.delete(Cf::Reply, &reply);
        }
        txn.delete(Cf::Client, &key);
    }
    counters.reply_clients = clients.len() as u64;
    Ok(())
}
