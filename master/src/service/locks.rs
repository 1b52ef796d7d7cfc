//! Locks of files, for mounts. The locks' part of `file_system`.

use super::file_system::Service;
use crate::apply::conflict;
use crate::locks::{CONFLICTS, TAKEN};
use crate::store::{Cf, Reader};
use forebay_common::limits::LIST_BATCH_ENTRIES;
use forebay_common::{InodeId, Result, err};
use forebay_proto::journal::{self, command::Op};
use forebay_proto::store::FileLocks;
use forebay_proto::*;
use prost::Message;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How long a call waits for a lock; shorter than what a client waits for any answer.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// What whoever asks is told of a lock that is in the way: whose it is only where that is its own session.
fn shown(found: &FileLock, wanted: &FileLock) -> FileLock {
    let own = found.session_id == wanted.session_id;
    FileLock { session_id: if own { found.session_id } else { 0 }, process: if own { found.process } else { 0 }, ..*found }
}

impl Service {
    pub(super) async fn hold_locks_inner(&self, request: HoldLocksRequest) -> Result<HoldLocksResponse> {
        let who = self.0.who(request.caller.as_ref())?;
        let ttl_ms = self.0.config.lock_ttl_ms;
        let op = journal::HoldLocks { session_id: request.session_id, ttl_ms, holder: request.holder, begin: request.begin };
        // Done twice it is the same: it needs no number, and waits behind no other change of its client.
        self.0.change_as(&who, Op::HoldLocks(op)).await?;
        Ok(HoldLocksResponse { ttl_ms })
    }

    fn in_the_way(&self, file: u64, wanted: &FileLock) -> Result<Option<FileLock>> {
        Ok(conflict(&self.0.store.view().locks(file)?.locks, wanted).map(|found| shown(found, wanted)))
    }

    pub(super) async fn set_lock_inner(&self, request: SetLockRequest) -> Result<LockResponse> {
        let wanted = request.lock.ok_or_else(|| err!(InvalidArgument, "a lock without a word"))?;
        // Most that cannot be taken cost no journal entry.
        if !request.unlock
            && let Some(conflict) = self.in_the_way(request.file_id, &wanted)?
        {
            CONFLICTS.inc();
            return Ok(LockResponse { conflict: Some(conflict) });
        }
        let op = journal::SetLock { file_id: request.file_id, lock: Some(wanted), unlock: request.unlock };
        let reply = self.0.change(request.caller.as_ref(), Op::SetLock(op)).await?;
        if reply.conflict.is_some() {
            CONFLICTS.inc()
        } else {
            TAKEN.inc()
        }
        Ok(LockResponse { conflict: reply.conflict.map(|found| shown(&found, &wanted)) })
    }

    pub(super) async fn test_lock_inner(&self, request: TestLockRequest) -> Result<LockResponse> {
        self.0.who(request.caller.as_ref())?;
        let wanted = request.lock.ok_or_else(|| err!(InvalidArgument, "a lock without a word"))?;
        let deadline = Instant::now() + Duration::from_millis(request.wait_ms.into()).min(WAIT_MAX);
        if request.wait_ms == 0 {
            return Ok(LockResponse { conflict: self.in_the_way(request.file_id, &wanted)? });
        }
        let place = self.0.soft.locks.join(request.file_id)?;
        loop {
            let given_back = place.given_back.notified();
            tokio::pin!(given_back);
            given_back.as_mut().enable();
            let conflict = self.in_the_way(request.file_id, &wanted)?;
            if conflict.is_none() || timeout_at(deadline, given_back).await.is_err() {
                return Ok(LockResponse { conflict });
            }
        }
    }

    pub(super) async fn end_locks_inner(&self, request: EndLocksRequest) -> Result<Done> {
        let who = self.0.who(request.caller.as_ref())?;
        while self.0.store.view().lock_session(request.session_id)?.is_some() {
            let op = journal::EndLocks { session_id: request.session_id, expired_only: false };
            self.0.change_as(&who, Op::EndLocks(op)).await?;
        }
        Ok(Done {})
    }

    pub(super) fn list_locks_inner(&self, request: &ListLocksRequest) -> Result<ListLocksResponse> {
        let who = self.0.who(request.caller.as_ref())?;
        if !who.superuser {
            return Err(err!(PermissionDenied, "user {} is no superuser: locks of all files are listed for those", who.user));
        }
        let view = self.0.store.view();
        let rows = view.scan(Cf::Lock, b"", None, LIST_BATCH_ENTRIES + 1)?;
        let more = rows.len() > LIST_BATCH_ENTRIES;
        let mut files = Vec::new();
        for (key, raw) in rows.into_iter().take(LIST_BATCH_ENTRIES) {
            let file_id = key.as_slice().try_into().map_or(0, u64::from_be_bytes);
            let locks = FileLocks::decode(raw.as_slice()).map_err(|e| err!(Corrupt, "the locks of file {file_id} do not decode: {e}"))?.locks;
            let path = view.path_of(InodeId(file_id)).map(|path| path.as_bytes().to_vec().into()).unwrap_or_default();
            files.push(LockedFile { path, file_id, locks });
        }
        let holders = view.lock_sessions()?.into_iter().map(|session| LockHolder {
            session_id: session.id,
            holder: session.holder,
            principal: session.principal,
            expires_at_ms: session.expires_at_ms,
        });
        Ok(ListLocksResponse { files, holders: holders.collect(), more })
    }
}
