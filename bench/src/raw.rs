//! A caller of the master alone: creations without the worker's part, which the client library always does.

use forebay_common::config::ClientConfig;
use forebay_common::{AbsPath, Result, err};
use forebay_proto::convert::from_status;
use forebay_proto::file_system_client::FileSystemClient;
use forebay_proto::{Caller, CompleteRequest, CreateRequest};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tonic::transport::{Channel, Endpoint};

/// One connection, one client id.
#[derive(Clone)]
pub struct RawClient {
    files: FileSystemClient<Channel>,
    user: String,
    client_id: u64,
    sequence: Arc<AtomicU64>,
}

impl RawClient {
    pub fn new(config: &ClientConfig) -> Result<Self> {
        let endpoint = Endpoint::from_shared(format!("http://{}", config.master)).map_err(|e| err!(InvalidArgument, "master: {e}"))?;
        let uid = nix::unistd::geteuid();
        let user = nix::unistd::User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |u| u.name);
        let client_id = forebay_common::clock::now_ms() << 20 | u64::from(rand::random::<u32>() >> 12) | 1;
        Ok(RawClient { files: FileSystemClient::new(endpoint.tcp_nodelay(true).connect_lazy()), user, client_id, sequence: Arc::default() })
    }

    fn caller(&self) -> Option<Caller> {
        Some(Caller { user: self.user.clone(), client_id: self.client_id, sequence: self.sequence.fetch_add(1, Ordering::Relaxed) + 1 })
    }

    /// Creates an entry; its file id and lease.
    pub async fn create(&self, path: &AbsPath) -> Result<(u64, u64)> {
        let request = CreateRequest {
            caller: self.caller(),
            path: path.as_bytes().to_vec().into(),
            write_type: "cache_only".into(),
            ..CreateRequest::default()
        };
        let created = self.files.clone().create(request).await.map_err(|s| from_status(&s))?.into_inner();
        let target = created.target.ok_or_else(|| err!(Internal, "a creation without a target"))?;
        Ok((target.file_id, target.lease_id))
    }

    /// Completes it empty.
    pub async fn complete(&self, file_id: u64, lease_id: u64) -> Result<()> {
        let request = CompleteRequest { caller: self.caller(), file_id, lease_id, ..CompleteRequest::default() };
        self.files.clone().complete(request).await.map(drop).map_err(|s| from_status(&s))
    }
}
