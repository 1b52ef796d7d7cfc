//! Locks of files between machines, for mounts. A session is begun with `hold_locks`, and lasts as long as it is held again in time.

use crate::FileSystem;
use forebay_common::Result;
use forebay_proto::*;
use std::time::Duration;

impl FileSystem {
    /// Begins a session, or has it last; returns for how long, from when it was asked for. Errors: `Expired` when one that is not to `begin` is over.
    pub async fn hold_locks(&self, session_id: u64, holder: &str, begin: bool) -> Result<Duration> {
        let m = &self.inner.master;
        let answer = m
            .ask(|caller| {
                let request = HoldLocksRequest { caller, session_id, holder: holder.to_owned(), begin };
                let mut files = m.files.clone();
                async move { files.hold_locks(request).await }
            })
            .await?;
        Ok(Duration::from_millis(answer.ttl_ms))
    }

    /// Takes a lock, or gives one back; returns what is in the way. Errors: `Expired` when the session is over.
    pub async fn set_lock(&self, file_id: u64, lock: &FileLock, unlock: bool) -> Result<Option<FileLock>> {
        let m = &self.inner.master;
        let answer = m
            .change(|caller| {
                let request = SetLockRequest { caller, file_id, lock: Some(*lock), unlock };
                let mut files = m.files.clone();
                async move { files.set_lock(request).await }
            })
            .await?;
        Ok(answer.conflict)
    }

    /// What is in the way of a lock, after waiting for it to go for a while. Takes nothing.
    pub async fn test_lock(&self, file_id: u64, lock: &FileLock, wait: Duration) -> Result<Option<FileLock>> {
        let m = &self.inner.master;
        let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        let answer = m
            .ask(|caller| {
                let request = TestLockRequest { caller, file_id, lock: Some(*lock), wait_ms };
                let mut files = m.files.clone();
                async move { files.test_lock(request).await }
            })
            .await?;
        Ok(answer.conflict)
    }

    /// Ends a session with all its locks.
    pub async fn end_locks(&self, session_id: u64) -> Result<()> {
        let m = &self.inner.master;
        m.ask(|caller| {
            let mut files = m.files.clone();
            async move { files.end_locks(EndLocksRequest { caller, session_id }).await }
        })
        .await
        .map(drop)
    }

    /// Locks of all files and who holds them, for superusers.
    pub async fn list_locks(&self) -> Result<ListLocksResponse> {
        let m = &self.inner.master;
        m.ask(|caller| {
            let mut files = m.files.clone();
            async move { files.list_locks(ListLocksRequest { caller }).await }
        })
        .await
    }
}
