//! `apply`: the pure function (state, command) -> (state, reply). The only code that writes the namespace.
//!
//! No clock, no randomness, no I/O but the store's own, no hash order. Time, principal and groups are stamped into the
//! command by the leader; ids come from the state. A command that fails leaves nothing but its remembered reply. What must
//! happen in an under store is written down as a pending record; the leader's driver does it and proposes the outcome.

mod attributes;
mod block;
mod cluster;
mod context;
mod delete;
mod file;
mod folder;
mod jobs;
mod locks;
mod mounts;
mod names;
mod node;
mod path_config;
mod persist;
mod quota;
mod rename;
mod reopen;
mod replication;
mod replies;
mod sync;
mod ttl;
mod workers;

pub use attributes::check_x_attr;
pub use file::FIRST_STAMP;
pub use jobs::RUNNING;
pub use locks::conflict;
pub use persist::check_arrived;
pub use replies::refusal;

#[cfg(test)]
mod tests;

use crate::store::{Cf, Reader, Store, Txn};
use context::Context;
use forebay_common::{Error, InodeId, Result};
use forebay_proto::journal::{Command, Reply, command::Op};
use forebay_proto::store::{Applied as AppliedRecord, Inode};

/// Told of every applied command, on the leader and on replay alike: where soft state follows.
pub trait Applied: Send + Sync {
    /// After the entry of `command` is in the store.
    fn applied(&self, command: &Command, reply: &Reply);
}

/// Limits of the remembered replies; part of the cluster's configuration.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Replies remembered per client.
    pub replies_per_client: u64,
    /// Clients remembered.
    pub clients_max: u64,
}

/// How far the store has come.
pub fn read_applied(store: &Store) -> Result<AppliedRecord> {
    read_applied_in(&store.view())
}

/// How far a view had come.
pub fn read_applied_in<R: Reader>(reader: &R) -> Result<AppliedRecord> {
    Ok(reader.record(Cf::Meta, b"applied")?.unwrap_or_default())
}

/// Applies the commands of one entry in one batch and returns a reply for each. Errors: the store failed, or a command is of a newer version; nothing was written.
pub fn apply_entry(store: &Store, commands: &[Command], applied: &mut AppliedRecord, limits: &Limits) -> Result<Vec<Reply>> {
    if commands.iter().any(|command| command.op.is_none()) {
        return Err(unknown());
    }
    let mut txn = Txn::new(store);
    let mut counters = txn.counters()?;
    if counters.next_inode_id == 0 {
        initialise(&mut txn, &mut counters);
        txn.keep();
    }
    let mut replies = Vec::with_capacity(commands.len());
    for command in commands {
        applied.changes += 1;
        let reply = match replies::remembered(&txn, command)? {
            Some(reply) => reply,
            None => {
                let mut context = Context::new(&mut txn, command, applied.changes, counters);
                let done = dispatch(&mut context).and_then(|()| context.take_refused());
                // What the store could not read says nothing of the command: the entry fails, and is applied again later.
                if let Some(e) = context.txn.failure() {
                    return Err(e);
                }
                let reply = match done {
                    Ok(()) => {
                        let (reply, after) = context.finish();
                        counters = after;
                        txn.keep();
                        reply
                    }
                    Err(e) => {
                        txn.discard();
                        failure(&e)
                    }
                };
                replies::remember(&mut txn, command, &reply, applied.changes, &mut counters, limits)?;
                txn.keep();
                reply
            }
        };
        replies.push(reply);
    }
    txn.put(Cf::Meta, b"counters", &counters);
    txn.put(Cf::Meta, b"applied", applied);
    txn.keep();
    txn.commit()?;
    Ok(replies)
}

fn failure(e: &Error) -> Reply {
    let error_stays = e.kind().is_retryable() && !e.is_retryable();
    Reply { error_kind: e.kind().code(), error_message: e.message().to_owned(), error_stays, ..Reply::default() }
}

/// A command of a newer version. Passing it over would leave another state than that version's, so that nothing of it is applied.
fn unknown() -> Error {
    forebay_common::err!(Unsupported, "the journal holds a command this version does not know: start the newer version again")
}

/// Whether the state is that of a cluster before its first change.
fn numbered_nothing(counters: &forebay_proto::store::Counters) -> bool {
    let next = [counters.next_inode_id, counters.next_block_id, counters.next_lease_id, counters.next_mount_id];
    next == [InodeId::ROOT.get() + 1, 1, 1, 1]
}

fn initialise(txn: &mut Txn<'_>, counters: &mut forebay_proto::store::Counters) {
    *counters = forebay_proto::store::Counters {
        next_inode_id: InodeId::ROOT.get() + 1,
        next_block_id: 1,
        next_lease_id: 1,
        next_mount_id: 1,
        next_pending_id: 1,
        folders: 1,
        ..Default::default()
    };
    let root = Inode { id: InodeId::ROOT.get(), folder: true, completed: true, mode: 0o755, ..Inode::default() };
    txn.put(Cf::Dentry, &crate::store::dentry_key(InodeId(0), b""), &root);
}

fn dispatch(c: &mut Context<'_, '_>) -> Result<()> {
    let command = c.command;
    match &command.op {
        Some(Op::Create(op)) => file::create(c, op),
        Some(Op::AddBlocks(op)) => file::add_blocks(c, op),
        Some(Op::AbandonBlock(op)) => file::abandon_block(c, op),
        Some(Op::Reopen(op)) => reopen::reopen(c, op),
        Some(Op::Concat(op)) => reopen::concat(c, op),
        Some(Op::SetAcl(op)) => attributes::set_acl(c, op),
        Some(Op::SetQuota(op)) => quota::set(c, op),
        Some(Op::SetXAttr(op)) => attributes::set_x_attr(c, op),
        Some(Op::SetPipeline(op)) => file::set_pipeline(c, op),
        Some(Op::NoteFlushed(op)) => file::note_flushed(c, op),
        Some(Op::Complete(op)) => file::complete(c, op),
        Some(Op::Abandon(op)) => file::abandon(c, op),
        Some(Op::RenewLease(op)) => file::renew(c, op),
        Some(Op::Mkdir(op)) => folder::mkdir(c, op),
        Some(Op::MakeNode(op)) => node::make(c, op),
        Some(Op::HardLink(op)) => names::link(c, op),
        Some(Op::HoldLocks(op)) => locks::hold(c, op),
        Some(Op::SetLock(op)) => locks::set(c, op),
        Some(Op::EndLocks(op)) => locks::end(c, op),
        Some(Op::OpenCluster(op)) => cluster::open(c, op),
        Some(Op::Delete(op)) => delete::delete(c, op),
        Some(Op::Rename(op)) => rename::rename(c, op),
        Some(Op::SetAttributes(op)) => attributes::set(c, op),
        Some(Op::SyncChildren(op)) => sync::children(c, op),
        Some(Op::AddMount(op)) => mounts::add(c, op),
        Some(Op::RemoveMount(op)) => mounts::remove(c, op),
        Some(Op::FinishPending(op)) => delete::finish_pending(c, op),
        Some(Op::UpdateMount(op)) => mounts::update(c, op),
        Some(Op::ExpireTtl(op)) => ttl::expire(c, op),
        Some(Op::SetWorkerState(op)) => workers::set_state(c, op),
        Some(Op::BeginPublish(op)) => persist::begin(c, op),
        Some(Op::FinishPersist(op)) => persist::finish(c, op),
        Some(Op::QueuePersist(op)) => persist::queue(c, op),
        Some(Op::SetReplication(op)) => replication::set(c, op),
        Some(Op::SetPathConfig(op)) => path_config::set(c, op),
        Some(Op::StartJob(op)) => jobs::start(c, op),
        Some(Op::UpdateJob(op)) => jobs::update(c, op),
        None => Err(unknown()),
    }
}
